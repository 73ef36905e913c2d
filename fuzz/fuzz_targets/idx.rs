#![no_main]
mod common;

use std::path::Path;

use simsiam_engine::data::import::idx::Idx;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| common::as_file(bytes, |path| {
    common::read_all(Idx::open(path, None, None, path.parent().unwrap_or(Path::new(""))));
}));
