#![no_main]

use std::path::Path;

use simsiam_engine::import::{fit, foreign};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(foreign) = foreign::read(Path::new("input"), bytes.to_vec()) else { return };
    if let Ok(weights) = fit(&foreign, None, false) {
        assert!(weights.report.matched <= foreign.tensors().len());
    }
});
