//! What the tests of the binary share.
#![allow(dead_code)] // each test binary uses its own part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
