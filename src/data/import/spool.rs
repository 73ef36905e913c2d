//! A temporary file that takes what cannot be read by position where it lies: the content of compressed files. It has no
//! name, so it is gone when the process ends, however that comes about.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::read::MultiGzDecoder;

use super::blob::{self, Blob, Stamp};
use crate::error::{Error, Result};

/// Bytes that are unpacked at a time.
const CHUNK: usize = 1 << 16;

/// The temporary file. It only grows.
#[derive(Debug)]
pub struct Spool {
    folder: PathBuf,
    file: Arc<File>,
    len: u64,
}

impl Spool {
    /// An empty one in `folder`: better beside the output than in /tmp, which is often small or in memory.
    ///
    /// # Errors
    /// [`Error::Io`] when no file can be made there.
    pub fn create(folder: &Path) -> Result<Spool> {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let file = tempfile::tempfile_in(folder).map_err(Error::io("create a temporary file in", folder))?;
        Ok(Spool { folder: folder.to_path_buf(), file: Arc::new(file), len: 0 })
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds bytes; returns where they start.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses.
    pub fn append(&mut self, bytes: &[u8]) -> Result<u64> {
        let start = self.len;
        self.file
            .write_all_at(bytes, start)
            .map_err(Error::io("unpack the source into a temporary file in", &self.folder))?;
        self.len += bytes.len() as u64;
        Ok(start)
    }

    /// Puts `len` bytes from `offset` on in `buffer`, in place of what it held. They must have been added before.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses.
    pub fn read<'a>(&self, offset: u64, len: usize, buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        buffer.resize(len, 0);
        self.file.read_exact_at(buffer, offset).map_err(Error::io("read a temporary file in", &self.folder))?;
        Ok(buffer)
    }

    /// Unpacks a gzip file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] when it is damaged.
    pub fn unpack(&mut self, path: &Path) -> Result<Blob> {
        let (mut stream, stamp) = gunzip(path)?;
        let start = self.len;
        let mut chunk = vec![0; CHUNK];
        loop {
            match stream.read(&mut chunk) {
                Ok(0) => return Ok(self.blob(path, stamp, start)),
                Ok(n) => _ = self.append(&chunk[..n])?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(unreadable(path, self.len - start, &e)),
            }
        }
    }

    /// All from `start` on, as the content of the file at `path`.
    pub(super) fn blob(&self, path: &Path, stamp: Stamp, start: u64) -> Blob {
        Blob::unpacked(path, stamp, Arc::clone(&self.file), start, self.len - start)
    }
}

/// The content of a gzip file from its start, and the state of the file.
pub(super) fn gunzip(path: &Path) -> Result<(MultiGzDecoder<BufReader<File>>, Stamp)> {
    let (file, stamp) = blob::open(path)?;
    Ok((MultiGzDecoder::new(BufReader::with_capacity(CHUNK, file)), stamp))
}

/// An error in the middle of the data: of the disk, or of the compressed stream.
pub(super) fn unreadable(path: &Path, at: u64, error: &std::io::Error) -> Error {
    let what = format!("cannot be read or unpacked from here (counted unpacked): {error}");
    Error::format(path, Some(at), what).with_hint("the file is cut or damaged")
}

/// Whether a file starts like a gzip file.
pub(super) fn is_gzip(path: &Path) -> Result<bool> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut head = Vec::with_capacity(2);
    file.take(2).read_to_end(&mut head).map_err(Error::io("read", path))?;
    Ok(head == [0x1f, 0x8b])
}
