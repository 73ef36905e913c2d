//! What the tests of the binary share.
#![allow(dead_code, unused_imports, unused_macros)] // each test binary uses its own part

#[cfg(feature = "emulator")]
pub mod fake_cuda;
pub mod sanitizer;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use simsiam_engine::data::format::{ENTRY_LEN, Entry, HEADER_LEN, Header, crc32c};

/// The binary, with output that does not depend on the terminal.
pub fn engine() -> Command {
    Command::new(env!("CARGO_BIN_EXE_simsiam-engine"))
}

/// Runs the binary to its end.
pub fn run(args: &[&str]) -> Output {
    engine().args(args).output().unwrap()
}

/// Runs the binary and expects success; returns standard output.
pub fn succeed(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the binary and expects exit code 1 with a one-line error; returns it.
pub fn fail(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    errors[0].to_string()
}

/// A dataset file of the first `limit` images of a split of the embedded Fashion-MNIST subset.
pub fn fashion(folder: &Path, split: &str, limit: usize) -> PathBuf {
    let out = folder.join(format!("{split}-{limit}.ssds"));
    let images =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("assets/fashion-mnist/{split}-images-idx3-ubyte.gz"));
    succeed(&["prepare", images.to_str().unwrap(), out.to_str().unwrap(), "--limit", &limit.to_string()]);
    out
}

/// Memory for one call of `Dataset::record`, given up after it: test datasets are mapped, and leave it empty.
pub fn scratch() -> &'static mut Vec<u8> {
    Box::leak(Box::default())
}

/// A dataset file made of a good one: header, entries and meta text changed, and all checksums made to fit again.
pub fn lying(good: &[u8], lie: impl FnOnce(&mut Header, &mut [Entry], &mut Vec<u8>)) -> Vec<u8> {
    let honest: Header = bytemuck::pod_read_unaligned(&good[..size_of::<Header>()]);
    let mut header = honest;
    let (index, meta) = (header.index, header.meta);
    let part = |offset: u64, len: u64| good[offset as usize..(offset + len) as usize].to_vec();
    let mut entries: Vec<Entry> =
        part(index.offset, index.len).chunks(ENTRY_LEN).map(bytemuck::pod_read_unaligned).collect();
    let mut text = part(meta.offset, meta.len);
    lie(&mut header, &mut entries, &mut text);
    let mut bytes = good[..index.offset as usize].to_vec();
    let index_bytes: Vec<u8> = bytemuck::cast_slice(&entries).to_vec();
    bytes.extend_from_slice(&index_bytes);
    bytes.extend_from_slice(&text);
    if header.file_len == honest.file_len {
        header.file_len = bytes.len() as u64;
    }
    if header.meta.len == meta.len {
        header.meta.len = text.len() as u64;
    }
    (header.index_crc, header.meta_crc) = (crc32c(&index_bytes), crc32c(&text));
    bytes[..HEADER_LEN].copy_from_slice(&header.to_page());
    bytes
}

/// A temporary folder, in memory where the system has such a place: for thousands of small files.
pub fn quick_folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}
