use std::fs;
use std::path::Path;

use super::*;
use crate::data::decode::Image;

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images").join(name)).unwrap()
}

/// Image 0 is the file, image 1 its pixels without the last channels: grey.
struct One {
    file: Vec<u8>,
    grey: Image,
}

impl One {
    fn new(name: &str) -> One {
        let file = fixture(name);
        let image = decoded(&file);
        let pixels = image.pixels.iter().copied().step_by(3).collect();
        One { file, grey: Image { pixels, channels: 1, ..image } }
    }
}

impl Source for One {
    fn kind(&self) -> &'static str {
        "test"
    }
    fn classes(&self) -> &[String] {
        &[]
    }
    fn len(&self) -> usize {
        2
    }
    fn label(&self, i: usize) -> Option<u32> {
        Some(7 + i as u32)
    }
    fn name(&self, i: usize) -> String {
        i.to_string()
    }
    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        if i == 1 {
            return Ok(Item::from_image(&self.grey));
        }
        buffer.clear();
        buffer.extend_from_slice(&self.file);
        Ok(Item::Encoded(buffer))
    }
    fn fingerprint(&self, _: &mut blake3::Hasher) {}
}

fn decoded(bytes: &[u8]) -> Image {
    Decoder::default().decode(bytes).unwrap().to_image()
}

fn make(source: &One, i: usize, store: &str) -> NewRecord {
    let record = record(source, i, store.parse().unwrap(), DecodeOptions::default()).unwrap();
    assert_eq!(record.crc, crc32c(&record.bytes));
    assert_eq!(record.label, Some(7 + i as u32));
    record
}

/// Mean difference in levels.
fn mean(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.len() as f64
}

#[test]
fn names_of_the_modes_are_read_and_told() {
    for (text, told) in
        [("raw", "raw"), ("raw:96", "raw:96"), ("raw256", "raw:256"), ("jpeg", "jpeg"), ("jpeg:512", "jpeg:512")]
    {
        assert_eq!(text.parse::<Store>().unwrap().to_string(), told);
    }
    for text in ["", "raw:", "raw:0", "raw:8193", "jpeg:", "jpeg:x", "png", "raw256:4", "JPEG"] {
        assert!(text.parse::<Store>().unwrap_err().contains("expected raw:SIDE"), "{text}");
    }
}

#[test]
fn pixels_keep_their_size_or_become_a_square() {
    let source = One::new("420.jpg");
    let whole = decoded(&source.file);
    let native = make(&source, 0, "raw");
    assert_eq!((native.codec, native.width, native.height, native.channels), (Codec::Raw, 53, 38, 3));
    assert_eq!(native.bytes, whole.pixels);
    let square = make(&source, 0, "raw:16");
    assert_eq!((square.width, square.height, square.bytes.len()), (16, 16, 768));
    assert_eq!((square.original_width, square.original_height), (53, 38));
    let grey = make(&source, 1, "raw:16");
    assert_eq!((grey.channels, grey.bytes.len(), grey.original_width), (1, 256, 53));
}

#[test]
fn a_jpeg_keeps_every_byte() {
    for (name, channels) in
        [("420.jpg", 3), ("trailer.jpg", 3), ("grey.jpg", 1), ("cmyk.jpg", 3), ("progressive.jpg", 3)]
    {
        let source = One::new(name);
        // At 38 the shorter side is just small enough.
        for store in ["jpeg", "jpeg:38"] {
            let record = make(&source, 0, store);
            assert_eq!((record.codec, record.width, record.height, record.channels), (Codec::Jpeg, 53, 38, channels));
            assert_eq!((record.original_width, record.original_height), (53, 38));
            assert!(record.bytes == source.file, "{name} {store}");
        }
    }
}

// The bounds are what Pillow loses on the same small and busy pictures with these settings: 2.5 to 3.1 levels at quality 95,
// 5.76 at quality 90 with 4:2:0. The lengths are those of its files with optimized tables.
#[test]
fn what_is_no_jpeg_becomes_a_good_one() {
    for (name, len) in [("rgb.png", 1611), ("grey8.png", 745), ("a.gif", 1936), ("lossless.webp", 1611)] {
        let source = One::new(name);
        let whole = decoded(&source.file);
        let record = make(&source, 0, "jpeg");
        assert_eq!(record.bytes.len(), len, "{name}");
        assert_eq!((record.codec, record.width, record.height), (Codec::Jpeg, whole.width, whole.height));
        let again = decoded(&record.bytes);
        assert_eq!((again.width, again.height), (whole.width, whole.height));
        assert!(mean(&again.pixels, &whole.pixels) < 3.2, "{name}: {}", mean(&again.pixels, &whole.pixels));
        // Grey stays grey, wherever it comes from.
        assert_eq!(record.channels, if name == "grey8.png" { 1 } else { 3 });
        assert_eq!(is_grey_jpeg(&record.bytes), name == "grey8.png");
        let grey = make(&source, 1, "jpeg");
        assert_eq!((grey.codec, grey.channels, is_grey_jpeg(&grey.bytes)), (Codec::Jpeg, 1, true));
        let again: Vec<u8> = decoded(&grey.bytes).pixels.into_iter().step_by(3).collect();
        assert!(mean(&again, &source.grey.pixels) < 2.0, "{name}");
    }
}

#[test]
fn a_larger_image_is_made_smaller_by_its_shorter_side() {
    let source = One::new("420.jpg");
    let record = make(&source, 0, "jpeg:20");
    // 53 * 20 / 38 is 27.9: torchvision's Resize takes 27.
    assert_eq!((record.codec, record.width, record.height, record.channels), (Codec::Jpeg, 27, 20, 3));
    assert_eq!((record.original_width, record.original_height), (53, 38));
    let again = decoded(&record.bytes);
    assert_eq!((again.width, again.height), (27, 20));
    let whole = decoded(&source.file);
    let whole = ImageRef { pixels: &whole.pixels, width: 53, height: 38, channels: 3 };
    let mut resizer = Resizer::default();
    assert!(mean(&again.pixels, resizer.resize(whole, 27, 20).unwrap().pixels) < 5.8);
    let small = make(&One::new("rgb.png"), 0, "jpeg:29");
    assert_eq!((small.codec, small.width, small.height), (Codec::Jpeg, 41, 29));
}

#[test]
fn a_bad_image_is_found_whatever_is_stored() {
    let mut source = One::new("420.jpg");
    let half = source.file.len() / 2;
    source.file.truncate(half);
    for store in ["raw", "raw:8", "jpeg", "jpeg:512"] {
        let fault = record(&source, 0, store.parse().unwrap(), DecodeOptions::default());
        assert!(matches!(fault, Err(Fault::Bad(reason)) if reason.contains("truncated")));
    }
}
