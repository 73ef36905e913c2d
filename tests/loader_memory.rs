//! The loader's memory does not grow with the dataset: measured on a file of 10,000 records and on one of 1,000,000.

mod common;

use std::path::{Path, PathBuf};

use common::succeed;
use simsiam_engine::data::format::{Codec, Meta, crc32c};
use simsiam_engine::data::writer::{NewRecord, Writer};

/// What the memory of the two may differ by: the noise of an allocator. The index of the larger file alone takes 32 MB.
const BOUND: u64 = 4 << 20;

/// A file of `count` images of 4x4 pixels.
fn write(folder: &Path, count: u32) -> PathBuf {
    let path = folder.join(format!("{count}.ssds"));
    let mut writer = Writer::create(&path, 64, false).unwrap();
    for i in 0..count {
        let bytes: Vec<u8> = (0..48).map(|k| (i.wrapping_mul(2_654_435_761) >> (k % 24)) as u8).collect();
        let record = NewRecord {
            crc: crc32c(&bytes),
            bytes,
            codec: Codec::Raw,
            width: 4,
            height: 4,
            channels: 3,
            original_width: 4,
            original_height: 4,
            label: None,
        };
        writer.append(&record).unwrap();
    }
    let text = || "test".to_string();
    let (classes, rejected) = (vec![], vec![]);
    let meta =
        Meta { classes, source: text(), store: text(), decoder: text(), resizer: text(), writer: text(), rejected };
    writer.finish(&meta, None).unwrap();
    path
}

/// The most memory of its own (mapped files do not count) that a process running the loader had.
fn peak(path: &Path, options: &[&str]) -> u64 {
    let mut args = vec!["bench", "loader", path.to_str().unwrap(), "--augment", "none", "--json"];
    args.extend(["--seconds", "1.5", "--warm-up", "0.2", "--workers", "2", "--batch", "128"]);
    args.extend(options);
    let report: serde_json::Value = serde_json::from_str(&succeed(&args)).unwrap();
    assert!(report["images"].as_u64().unwrap() >= 10_000, "{report:#}");
    report["peak_anonymous_bytes"].as_u64().unwrap()
}

#[test]
fn memory_does_not_grow_with_the_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let (small, large) = (write(folder.path(), 10_000), write(folder.path(), 1_000_000));
    for options in [&["--io", "map"][..], &["--io", "pread"], &["--io", "map", "--shuffle-window", "5000"]] {
        let (of_small, of_large) = (peak(&small, options), peak(&large, options));
        println!("{options:?}: {of_small} bytes with 10,000 records, {of_large} with 1,000,000");
        assert!(of_small > 256 << 10, "{options:?}: the memory was not measured: {of_small}");
        assert!(
            of_large < of_small + BOUND,
            "{options:?}: {of_small} bytes for 10,000 records, {of_large} for 1,000,000"
        );
    }
    // Were the file held in memory, the figure would show it.
    let held = peak(&large, &["--io", "memory"]);
    assert!(held > 90 << 20, "{held}");
}
