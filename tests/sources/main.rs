//! The sources of `prepare` against files written by other software: the fixtures of tools/source_fixtures.py, with what the
//! readers of others find in them; and against files that are damaged, incomplete or not what they seem.

mod binary;
mod changes;
#[path = "../common/mod.rs"]
mod common;
mod options;
#[cfg(feature = "parquet")]
mod parquet;
mod tar;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::{fail, run, scratch};
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::decode::Decoder;
use simsiam_engine::data::import::Source;
use simsiam_engine::data::import::source::{Fault, Item};
use simsiam_engine::data::import::webdataset::{Fields, WebDataset};
use simsiam_engine::error::Error;

type Opened = Result<Box<dyn Source>, Error>;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sources")
}

fn fixture(name: &str) -> PathBuf {
    fixtures().join(name)
}

fn boxed<S: Source + 'static>(source: Result<S, Error>) -> Opened {
    source.map(|source| Box::new(source) as Box<dyn Source>)
}

fn webdataset(path: &Path) -> Opened {
    boxed(WebDataset::open(path, None, Fields::default(), &std::env::temp_dir()))
}

fn error(opened: Opened) -> String {
    opened.err().expect("an error").to_string()
}

/// Columns x rows x channels, and the CRC-32 of the pixels.
fn digest(width: usize, height: usize, channels: usize, pixels: &[u8]) -> String {
    let mut crc = flate2::Crc::new();
    crc.update(pixels);
    format!("{width}x{height}x{channels} {:08x}", crc.sum())
}

fn digest_of(item: Item) -> Result<String, Fault> {
    match item {
        Item::Pixels { pixels, width, height, channels } => {
            Ok(digest(width.into(), height.into(), channels.into(), pixels))
        }
        Item::Encoded(bytes) => {
            let mut decoder = Decoder::default();
            let image = decoder.decode(bytes)?;
            Ok(digest(image.width.into(), image.height.into(), image.channels.into(), image.pixels))
        }
    }
}

/// What is wrong with image `i`, which must be bad.
fn fault(source: &dyn Source, i: usize) -> String {
    match source.read(i, &mut Vec::new()) {
        Err(Fault::Bad(reason)) => reason,
        other => panic!("image {i}: {other:?}"),
    }
}

fn expected(name: &str) -> (Vec<String>, Vec<Option<u32>>, Vec<String>) {
    let all: serde_json::Value = serde_json::from_slice(&fs::read(fixture("expected.json")).unwrap()).unwrap();
    let texts = |key: &str| serde_json::from_value(all[name][key].clone()).unwrap();
    (texts("pixels"), serde_json::from_value(all[name]["labels"].clone()).unwrap(), texts("classes"))
}

/// Compares with what is expected of `name`; bad images are left out. Read from the last to the first, with one buffer.
fn check(source: &dyn Source, name: &str) {
    let (pixels, labels, classes) = expected(name);
    assert_eq!(source.classes(), classes, "{name}");
    let mut buffer = Vec::new();
    let mut found = Vec::new();
    for i in (0..source.len()).rev() {
        match source.read(i, &mut buffer).and_then(digest_of) {
            Ok(digest) => found.push((digest, source.label(i))),
            Err(Fault::Bad(_)) => {}
            Err(Fault::Stop(error)) => panic!("{name}: {error}"),
        }
    }
    found.reverse();
    let expected: Vec<_> = pixels.into_iter().zip(labels).collect();
    assert_eq!(found, expected, "{name}");
    let names: std::collections::HashSet<String> = (0..source.len()).map(|i| source.name(i)).collect();
    assert_eq!(names.len(), source.len(), "{name}: names are unique");
}

fn gzip(path: &Path, bytes: &[u8]) {
    let mut encoder = flate2::write::GzEncoder::new(fs::File::create(path).unwrap(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap();
}

fn png() -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images/rgb.png")).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `prepare` in the order of the source; returns the dataset and what it said.
fn prepare(source: &Path, options: &[&str]) -> (Dataset, String) {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out.ssds");
    let args = ["prepare", text(source), text(&out), "--store", "raw", "--no-shuffle"];
    let output = run(&[&args[..], options].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    (Dataset::open(&out).unwrap(), said)
}

fn prepare_fails(source: &Path, options: &[&str]) -> String {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out.ssds");
    let text = fail(&[&["prepare", text(source), text(&out)], options].concat());
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "something is left behind");
    text
}

fn check_dataset(dataset: &Dataset, name: &str) {
    let (pixels, labels, classes) = expected(name);
    assert_eq!(dataset.classes(), classes, "{name}");
    assert_eq!(dataset.len(), pixels.len(), "{name}");
    for (i, (pixels, label)) in pixels.iter().zip(labels).enumerate() {
        let record = dataset.record(i, scratch()).unwrap();
        assert_eq!(&digest(record.width, record.height, record.channels, record.bytes), pixels, "{name} {i}");
        assert_eq!(record.label, label, "{name} {i}");
    }
}
