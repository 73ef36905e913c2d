#![no_main]
mod common;

use simsiam_engine::data::dataset::Dataset;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| common::as_file(bytes, |path| {
    let Ok(dataset) = Dataset::open(path) else { return };
    let mut scratch = Vec::new();
    for i in 0..dataset.len().min(100) {
        _ = dataset.record(i, &mut scratch);
    }
}));
