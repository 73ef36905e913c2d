#![no_main]
mod common;

use std::path::Path;

use simsiam_engine::data::import::webdataset::{Fields, WebDataset};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| common::as_file(bytes, |path| {
    let scratch = path.parent().unwrap_or(Path::new(""));
    common::read_all(WebDataset::open(path, None, Fields::default(), scratch));
}));
