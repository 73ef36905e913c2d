//! What the targets share.

use std::path::Path;

use simsiam_engine::data::import::Source;
use simsiam_engine::data::import::source::Fault;
use simsiam_engine::error::Error;

/// Hands the input to `open` as a file, in a folder of its own.
pub fn as_file(bytes: &[u8], open: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("input");
    std::fs::write(&path, bytes).expect("a temporary file");
    open(&path);
}

/// What a source accepts, it must be able to read.
#[allow(dead_code)] // the target of dataset files reads no source
pub fn read_all(source: Result<impl Source, Error>) {
    let Ok(source) = source else { return };
    let mut buffer = Vec::new();
    for i in 0..source.len().min(100) {
        assert!(source.label(i).is_none_or(|label| (label as usize) < source.classes().len()));
        assert!(!source.name(i).is_empty());
        if let Err(Fault::Stop(error)) = source.read(i, &mut buffer) {
            panic!("{error}");
        }
    }
}
