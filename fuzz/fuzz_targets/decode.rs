//! Image files of every format, as `prepare` and the loader decode them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use simsiam_engine::data::decode::Decoder;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(image) = Decoder::default().decode(bytes) {
        assert_eq!(image.pixels.len(), usize::from(image.width) * usize::from(image.height) * 3);
    }
});
