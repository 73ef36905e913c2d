//! The memory of `prepare` does not grow with the images, only by the few bytes that its order and the labels take.

mod common;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use common::engine;

/// Images of the large set, and of the small one.
const LARGE: u32 = 400_000;
const SMALL: u32 = 20_000;
/// Bytes of memory for each more image: 4 of the order and 1 of the label, where its index entry alone takes 32 on disk.
const PER_IMAGE: u64 = 5;
/// The noise of an allocator.
const NOISE: u64 = 4 << 20;

/// IDX files of `count` images of 8x8 pixels.
fn write(folder: &Path, count: u32) {
    let header = |magic: u32, dims: &[u32]| -> Vec<u8> {
        [&[magic], dims].concat().into_iter().flat_map(u32::to_be_bytes).collect()
    };
    let mut images = BufWriter::new(File::create(folder.join("train-images-idx3-ubyte")).unwrap());
    images.write_all(&header(0x803, &[count, 8, 8])).unwrap();
    for i in 0..count {
        images.write_all(&[0; 16].map(|_| i.wrapping_mul(2_654_435_761)).map(u32::to_le_bytes).concat()).unwrap();
    }
    images.flush().unwrap();
    let labels: Vec<u8> = (0..count).map(|i| (i % 10) as u8).collect();
    fs::write(folder.join("train-labels-idx1-ubyte"), [header(0x801, &[count]), labels].concat()).unwrap();
}

/// The most memory that `prepare` had while it made a dataset of `count` images.
fn peak(count: u32) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), count);
    let out = folder.path().join("out.ssds");
    let mut command = engine();
    command.args(["prepare", folder.path().to_str().unwrap(), out.to_str().unwrap(), "--threads", "2"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        // The kernel keeps the maximum, so nothing is missed between two looks but what comes after the last.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = kilobytes.map_or(peak, |kilobytes| kilobytes * 1024);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().unwrap().success());
    assert!(peak > 1 << 20, "the memory was not measured: {peak}");
    peak
}

#[test]
fn memory_does_not_grow_with_the_images() {
    let (small, large) = (peak(SMALL), peak(LARGE));
    println!("{small} bytes for {SMALL} images, {large} for {LARGE}");
    let allowed = small + u64::from(LARGE - SMALL) * PER_IMAGE + NOISE;
    assert!(large < allowed, "{small} bytes for {SMALL} images, {large} for {LARGE}: more than {allowed}");
}
