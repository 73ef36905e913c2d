//! Files that many images lie in: read by position, from any thread, and never wholly in memory.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};

/// A file, or what it unpacks to.
#[derive(Debug)]
pub struct Blob {
    path: PathBuf,
    stamp: Stamp,
    place: Place,
}

/// Tells a file from itself after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    len: u64,
    modified: (i64, i64),
}

impl Stamp {
    /// Bytes of the file.
    pub(super) fn len(self) -> u64 {
        self.len
    }
}

#[derive(Debug)]
enum Place {
    /// The file itself.
    Open(File),
    /// The file itself, opened for every read: there are too many to keep all open.
    Closed,
    /// A stretch of a temporary file.
    Unpacked { spool: Arc<File>, start: u64, len: u64 },
}

impl Blob {
    /// Opens a file as it is.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] when it is no plain file.
    pub fn open(path: &Path) -> Result<Blob> {
        let (file, stamp) = open(path)?;
        Ok(Blob { path: path.to_path_buf(), stamp, place: Place::Open(file) })
    }

    /// What the file at `path`, as it was at `stamp`, unpacked to: `len` bytes of a temporary file.
    pub(super) fn unpacked(path: &Path, stamp: Stamp, spool: Arc<File>, start: u64, len: u64) -> Blob {
        Blob { path: path.to_path_buf(), stamp, place: Place::Unpacked { spool, start, len } }
    }

    /// The same without a file descriptor of its own.
    pub fn closed(self) -> Blob {
        match self.place {
            Place::Open(_) => Blob { place: Place::Closed, ..self },
            _ => self,
        }
    }

    /// The file as the user knows it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes, unpacked.
    pub fn len(&self) -> u64 {
        match self.place {
            Place::Unpacked { len, .. } => len,
            _ => self.stamp.len,
        }
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] when the file ends before, or has changed since it was opened.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > self.len()) {
            let what = format!("ends before byte {}", offset.saturating_add(out.len() as u64));
            return Err(Error::format(&self.path, Some(self.len()), what).with_hint("the file is cut or damaged"));
        }
        let read = match &self.place {
            Place::Open(file) => {
                self.check(stamp(file, &self.path)?)?;
                file.read_exact_at(out, offset)
            }
            Place::Closed => {
                let (file, stamp) = open(&self.path)?;
                self.check(stamp)?;
                file.read_exact_at(out, offset)
            }
            Place::Unpacked { spool, start, .. } => spool.read_exact_at(out, start + offset),
        };
        read.map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => self.changed(),
            _ => Error::io("read", &self.path)(e),
        })
    }

    /// Puts `len` bytes from `offset` on in `buffer`, in place of what it held.
    ///
    /// # Errors
    /// As [`Blob::read_at`]; memory is only taken for bytes that are there.
    pub fn read<'a>(&self, offset: u64, len: usize, buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        if offset.checked_add(len as u64).is_some_and(|end| end <= self.len()) {
            buffer.resize(len, 0);
            self.read_at(offset, buffer)?;
            return Ok(buffer);
        }
        let what = format!("ends before byte {}", offset.saturating_add(len as u64));
        Err(Error::format(&self.path, Some(self.len()), what).with_hint("the file is cut or damaged"))
    }

    /// Adds path, size and time of the file.
    pub fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        hasher.update(self.path.as_os_str().as_bytes()).update(&[0]);
        let (seconds, nanoseconds) = self.stamp.modified;
        for word in [self.stamp.len, seconds as u64, nanoseconds as u64] {
            hasher.update(&word.to_le_bytes());
        }
    }

    fn check(&self, now: Stamp) -> Result<()> {
        if now == self.stamp { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> Error {
        Error::format(&self.path, None, "has changed since it was opened")
            .with_hint("start again with the file as it is")
    }
}

/// Opens a plain file and notes its state.
pub(super) fn open(path: &Path) -> Result<(File, Stamp)> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let stamp = stamp(&file, path)?;
    Ok((file, stamp))
}

fn stamp(file: &File, path: &Path) -> Result<Stamp> {
    let status = file.metadata().map_err(Error::io("look at", path))?;
    if !status.is_file() {
        return Err(Error::format(path, None, "is not a plain file"));
    }
    Ok(Stamp { len: status.len(), modified: (status.mtime(), status.mtime_nsec()) })
}
