//! Decoding and resizing against Pillow (tools/image_fixtures.py), and files that are cut or damaged.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use simsiam_engine::data::decode::{Alpha, DecodeOptions, Decoder, Image, ImageRef, Resizer};

fn decode(bytes: &[u8]) -> Result<Image, String> {
    Decoder::default().decode(bytes).map(ImageRef::to_image)
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images")
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap()
}

/// Lines of the manifest that start with `kind`.
fn manifest(kind: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(fixtures().join("manifest.txt")).unwrap();
    let lines = text.lines().map(|line| line.split(' ').map(str::to_owned).collect::<Vec<_>>());
    lines.filter(|line| if kind.is_empty() { line.len() == 4 } else { line[0] == kind }).collect()
}

fn files() -> Vec<(String, Vec<u8>)> {
    manifest("").into_iter().map(|line| (line[0].clone(), fixture(&line[0]))).collect()
}

fn worst(a: &[u8], b: &[u8]) -> u8 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn pixels_are_those_of_pillow() {
    let mut failures = Vec::new();
    // One decoder for all: what an image leaves in its buffers must not show in the next.
    let mut decoder = Decoder::default();
    for line in manifest("") {
        let [name, width, height, tolerance] = &line[..] else { panic!("{line:?}") };
        let golden = fixture(&format!("{name}.rgb"));
        match decoder.decode(&fixture(name)) {
            Err(reason) => failures.push(format!("{name}: {reason}")),
            Ok(image) => {
                assert_eq!((image.width, image.height), (width.parse().unwrap(), height.parse().unwrap()), "{name}");
                assert_eq!(image.channels, 3);
                let worst = worst(image.pixels, &golden);
                if worst > tolerance.parse().unwrap() {
                    let total: u32 = image.pixels.iter().zip(&golden).map(|(a, b)| u32::from(a.abs_diff(*b))).sum();
                    let mean = f64::from(total) / golden.len() as f64;
                    failures.push(format!("{name}: {worst} levels off (mean {mean:.2}), {tolerance} allowed"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn small_jpegs_of_every_subsampling_are_those_of_pillow() {
    let mut pack = Vec::new();
    GzDecoder::new(&fixture("sizes.pack.gz")[..]).read_to_end(&mut pack).unwrap();
    let (mut rest, mut count) = (&pack[..], 0);
    while let Some((head, after)) = rest.split_at_checked(8) {
        let len = u32::from_le_bytes(head[..4].try_into().unwrap()) as usize;
        let [width, height] = [4, 6].map(|i| u16::from_le_bytes([head[i], head[i + 1]]));
        let (file, after) = after.split_at(len);
        let (golden, after) = after.split_at(usize::from(width) * usize::from(height) * 3);
        let image = decode(file).unwrap();
        assert_eq!((image.width, image.height), (width, height));
        assert!(image.pixels == golden, "JPEG {count}, {width}x{height}: {} levels off", worst(&image.pixels, golden));
        (rest, count) = (after, count + 1);
    }
    assert_eq!(count, 5 * 9 * 9);
}

#[test]
fn alpha_goes_over_the_ground_asked_for() {
    let lines = manifest("over");
    assert!(lines.len() > 10);
    let mut failures = Vec::new();
    for line in lines {
        let name = &line[1];
        for (alpha, ground) in [(Alpha::White, "white"), (Alpha::Black, "black")] {
            let mut decoder = Decoder::new(DecodeOptions { alpha });
            let bytes = fixture(name);
            let worst = worst(decoder.decode(&bytes).unwrap().pixels, &fixture(&format!("{name}.{ground}.rgb")));
            if worst > 0 {
                failures.push(format!("{name} over {ground}: {worst} levels off"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn resize_is_that_of_pillow() {
    let mut resizer = Resizer::default();
    for line in manifest("resize") {
        let number = |i: usize| line[i].parse::<u16>().unwrap();
        let (width, height, channels, side) = (number(2), number(3), number(4), number(5));
        let golden = fixture(&line[1].replace(".raw", &format!(".{side}.raw")));
        let image = ImageRef { pixels: &fixture(&line[1]), width, height, channels: channels as u8 };
        let image = resizer.resize(image, side, side).unwrap();
        assert_eq!((image.width, image.height, u16::from(image.channels)), (side, side, channels));
        assert!(worst(image.pixels, &golden) <= number(6) as u8, "{line:?}: {}", worst(image.pixels, &golden));
    }
}

/// A file cut anywhere must be refused, or give the pixels of the whole file (only bytes behind the picture were lost).
#[test]
fn no_cut_file_gives_a_wrong_picture() {
    let mut wrong = Vec::new();
    for (name, bytes) in files() {
        let whole = decode(&bytes).unwrap();
        let cuts: Vec<usize> =
            (0..bytes.len()).filter(|&cut| decode(&bytes[..cut]).is_ok_and(|image| image != whole)).collect();
        if !cuts.is_empty() {
            wrong.push(format!("{name}: {} of {} cuts: {:?}", cuts.len(), bytes.len(), cuts));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The same with an end-of-image marker behind the cut, as careless tools leave it. Lax decoders fill up with grey.
#[test]
fn a_cut_jpeg_with_an_end_marker_is_refused() {
    let mut wrong = Vec::new();
    for (name, bytes) in files().into_iter().filter(|(name, _)| name.ends_with(".jpg")) {
        let whole = decode(&bytes).unwrap();
        let cuts: Vec<usize> = (2..bytes.len())
            .filter(|&cut| decode(&[&bytes[..cut], &[0xff, 0xd9]].concat()).is_ok_and(|image| image != whole))
            .collect();
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

#[test]
fn what_is_not_supported_is_named_so() {
    for (name, reason) in [
        ("arithmetic.jpg", "JPEG: arithmetic coding, in which a cut file cannot be told from a whole one"),
        (
            "palette.tiff",
            "TIFF: The decoder for Tiff does not support the format features Photometric interpretation RGBPalette",
        ),
    ] {
        let told = decode(&fixture(name)).unwrap_err();
        assert!(told.starts_with(reason), "{name}: {told}");
    }
}
