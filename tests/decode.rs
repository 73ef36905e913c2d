//! Decoding and resizing against Pillow (tools/image_fixtures.py), and files that are cut or damaged.

use std::fs;
use std::path::{Path, PathBuf};

use simsiam_engine::data::decode::{DecodeOptions, Decoder, Image, ImageRef, Resizer};
use simsiam_engine::rng::{Stream, below};

fn decode(bytes: &[u8]) -> Result<Image, String> {
    Decoder::new(DecodeOptions::default()).decode(bytes).map(ImageRef::to_image)
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images")
}

fn manifest() -> Vec<Vec<String>> {
    let text = fs::read_to_string(fixtures().join("manifest.txt")).unwrap();
    text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

fn worst(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn pixels_are_those_of_pillow() {
    let mut failures = Vec::new();
    for line in manifest().iter().filter(|line| line[0] != "resize") {
        let [name, width, height, tolerance] = &line[..] else { panic!("{line:?}") };
        let golden = fs::read(fixtures().join(format!("{name}.rgb"))).unwrap();
        match decode(&fs::read(fixtures().join(name)).unwrap()) {
            Err(reason) => failures.push(format!("{name}: {reason}")),
            Ok(image) => {
                assert_eq!((image.width, image.height), (width.parse().unwrap(), height.parse().unwrap()), "{name}");
                assert_eq!(image.channels, 3);
                let worst = worst(&image.pixels, &golden);
                let total: u32 = image.pixels.iter().zip(&golden).map(|(a, b)| u32::from(a.abs_diff(*b))).sum();
                let mean = f64::from(total) / golden.len() as f64;
                if worst > tolerance.parse().unwrap() || mean > 0.5 {
                    failures.push(format!("{name}: {worst} levels off (mean {mean:.2}), {tolerance} allowed"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn resize_is_that_of_pillow() {
    for line in manifest().iter().filter(|line| line[0] == "resize") {
        let number = |i: usize| line[i].parse::<u16>().unwrap();
        let (width, height, channels, side) = (number(2), number(3), number(4), number(5));
        let pixels = fs::read(fixtures().join(&line[1])).unwrap();
        let golden = fs::read(fixtures().join(line[1].replace(".raw", &format!(".{side}.raw")))).unwrap();
        let image = ImageRef { pixels: &pixels, width, height, channels: channels as u8 };
        let mut resizer = Resizer::default();
        let image = resizer.resize(image, side, side).unwrap();
        assert_eq!((image.width, image.height, u16::from(image.channels)), (side, side, channels));
        assert!(worst(image.pixels, &golden) <= number(6) as u8, "{line:?}: {}", worst(image.pixels, &golden));
    }
}

/// A file cut anywhere must be refused, or give the pixels of the whole file (only bytes behind the picture were lost).
#[test]
fn no_cut_file_gives_a_wrong_picture() {
    let mut wrong = Vec::new();
    for line in manifest().iter().filter(|line| line[0] != "resize") {
        let bytes = fs::read(fixtures().join(&line[0])).unwrap();
        let whole = decode(&bytes).unwrap();
        let cuts: Vec<usize> =
            (0..bytes.len()).filter(|&cut| decode(&bytes[..cut]).is_ok_and(|image| image != whole)).collect();
        if !cuts.is_empty() {
            wrong.push(format!("{}: {} of {} cuts: {:?}", line[0], cuts.len(), bytes.len(), cuts));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The same with an end-of-image marker behind the cut, as careless tools leave it. Lax decoders fill up with grey.
/// Within the last blocks of the picture the loss can look like data, and a progressive file may end after any scan.
#[test]
fn a_cut_jpeg_with_an_end_marker_is_refused() {
    let mut wrong = Vec::new();
    for name in ["444.jpg", "422.jpg", "420.jpg", "restart.jpg", "grey.jpg", "oriented.jpg", "cmyk.jpg", "ycck.jpg"] {
        let bytes = fs::read(fixtures().join(name)).unwrap();
        let cuts: Vec<usize> =
            (2..bytes.len() - 20).filter(|&cut| decode(&[&bytes[..cut], &[0xff, 0xd9]].concat()).is_ok()).collect();
        if !cuts.is_empty() {
            wrong.push(format!("{name}: {} of {} cuts: {:?}", cuts.len(), bytes.len(), cuts));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_is_no_image_is_named_so() {
    assert_eq!(decode(b"").unwrap_err(), "the file is empty");
    for text in [&b"hello"[..], b"BM a memo about nothing", b"\xff", b"<svg/>"] {
        assert_eq!(decode(text).unwrap_err(), "not a JPEG, PNG, GIF, BMP, WebP or TIFF image");
    }
}

/// Damage without a checksum may go unseen, but it must not get past the checks of size, or out of the decoder as a panic.
#[test]
fn damaged_files_are_decoded_or_refused() {
    for line in manifest().iter().filter(|line| line[0] != "resize") {
        let bytes = fs::read(fixtures().join(&line[0])).unwrap();
        for round in 0..300 {
            let mut stream = Stream::new(round, 0, 0);
            let mut damaged = bytes.clone();
            for _ in 0..=below(stream.word(), 4) {
                // Half of the hits in the headers.
                let end = if stream.word() & 1 == 0 { bytes.len().min(700) } else { bytes.len() };
                damaged[below(stream.word(), end as u32) as usize] = stream.word() as u8;
            }
            match decode(&damaged) {
                Ok(image) => {
                    assert_eq!(image.pixels.len(), usize::from(image.width) * usize::from(image.height) * 3);
                }
                Err(reason) => assert!(!reason.contains("inside the decoder"), "{} round {round}: {reason}", line[0]),
            }
        }
    }
}
