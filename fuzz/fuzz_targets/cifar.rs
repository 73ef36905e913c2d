#![no_main]
mod common;

use simsiam_engine::data::import::cifar::Cifar;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| common::as_file(bytes, |path| {
    common::read_all(Cifar::open(path, None, false));
}));
