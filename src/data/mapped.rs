//! The bytes of a dataset file, by range: mapped, read on demand, or held in memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};
use rustix::fs::fadvise;

use super::format::Section;
use crate::error::{Error, Result};

/// How the bytes of a dataset are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// In memory when the dataset takes at most a quarter of what is free, mapped otherwise.
    #[default]
    Auto,
    /// Mapped: the kernel's cache is the only copy. A file that is cut while in use kills the process (SIGBUS).
    Map,
    /// Read record by record: a failing disk is an error, and so is a file that is cut while in use.
    Pread,
    /// Read as a whole when opened.
    Memory,
}

impl Access {
    /// What [`Access::Auto`] comes to for a dataset of `bytes` bytes.
    pub fn resolve(self, bytes: u64) -> Access {
        match self {
            Access::Auto if available_memory().is_some_and(|free| bytes <= free / 4) => Access::Memory,
            Access::Auto => Access::Map,
            chosen => chosen,
        }
    }
}

/// Bytes of memory that can be had without swapping, where the system tells.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// An open file.
#[derive(Debug)]
pub struct FileBytes {
    path: PathBuf,
    len: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Map(Mmap),
    Pread(File),
    Memory(Vec<u8>),
}

impl FileBytes {
    /// Opens a regular file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened, [`Error::Format`] when it is no regular file, [`Error::Unsupported`] when it
    /// does not fit into memory.
    pub fn open(path: &Path, access: Access) -> Result<FileBytes> {
        // Before the open, which would wait for the other end of a pipe.
        let status = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if status.is_dir() {
            return Err(Error::format(path, None, "is a folder, not a dataset file")
                .with_hint("`prepare` turns a folder of images into one file"));
        }
        if !status.is_file() {
            return Err(Error::format(path, None, "is not a regular file: it cannot be mapped"));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        let len = file.metadata().map_err(Error::io("look at", path))?.len();
        let content = match access.resolve(len) {
            Access::Memory => Content::Memory(read_whole(&file, path, len)?),
            Access::Pread => Content::Pread(file),
            // SAFETY: the map is read-only and private to this type, which hands out shared slices only. A dataset file is
            // written under another name and renamed when complete, and `prepare` never rewrites one in place, so its
            // bytes do not change under the map; a foreign program that does so anyway is caught by the record checksums
            // (or, when it cuts the file, by SIGBUS).
            Access::Map | Access::Auto => Content::Map(unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?),
        };
        let len = if let Content::Map(map) = &content { map.len() as u64 } else { len };
        Ok(FileBytes { path: path.to_path_buf(), len, content })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the bytes are reached, which is never [`Access::Auto`].
    pub fn access(&self) -> Access {
        match self.content {
            Content::Map(_) => Access::Map,
            Content::Pread(_) => Access::Pread,
            Content::Memory(_) => Access::Memory,
        }
    }

    /// Bytes of the file when it was opened.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// The bytes of `section`; `scratch` is where they are put when they have to be read, and grows to at most their number.
    ///
    /// # Errors
    /// [`Error::Format`] when the section leaves the file, [`Error::Io`] when the disk fails or the file has been cut.
    pub fn get<'a>(&'a self, section: Section, scratch: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        let range = usize::try_from(self.len).ok().and_then(|len| section.range(len));
        let range = range.ok_or_else(|| {
            let what = format!("{} bytes at {} leave the file of {} bytes", section.len, section.offset, self.len);
            Error::format(&self.path, Some(section.offset), what)
        })?;
        match &self.content {
            Content::Map(map) => Ok(&map[range]),
            Content::Memory(bytes) => Ok(&bytes[range]),
            Content::Pread(file) => {
                if scratch.len() < range.len() {
                    scratch.resize(range.len(), 0);
                }
                let target = &mut scratch[..range.len()];
                file.read_exact_at(target, section.offset).map_err(Error::io("read", &self.path))?;
                Ok(target)
            }
        }
    }

    /// Shows `section` to `see` in pieces of `len` bytes (the last may be shorter).
    ///
    /// # Errors
    /// As [`FileBytes::get`], and those of `see`.
    pub fn each_chunk(&self, section: Section, len: u64, mut see: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut scratch = Vec::new();
        let mut done = 0;
        while done < section.len {
            let piece = Section { offset: section.offset.saturating_add(done), len: len.min(section.len - done) };
            see(self.get(piece, &mut scratch)?)?;
            done += piece.len;
        }
        Ok(())
    }

    /// Asks the kernel to read `section` ahead. A hint only: nothing fails when it is not taken.
    pub fn prefetch(&self, section: Section) {
        // A refused hint costs speed, never correctness.
        match &self.content {
            Content::Map(map) => {
                let _ = map.advise_range(Advice::WillNeed, section.offset as usize, section.len as usize);
            }
            Content::Pread(file) => {
                let len = std::num::NonZeroU64::new(section.len);
                let _ = fadvise(file, section.offset, len, rustix::fs::Advice::WillNeed);
            }
            Content::Memory(_) => {}
        }
    }
}

/// Fails when `bytes` bytes of data cannot be held in memory.
///
/// # Errors
/// [`Error::Unsupported`] naming `path`.
pub fn check_fits(path: &Path, bytes: u64) -> Result<()> {
    match available_memory() {
        Some(free) if bytes > free => Err(does_not_fit(path, bytes)),
        _ => Ok(()),
    }
}

fn does_not_fit(path: &Path, bytes: u64) -> Error {
    let what = format!("{} of {} MB does not fit into memory", path.display(), bytes / 1_000_000);
    Error::Unsupported { what, hint: Some("--io map reads it from the disk".into()) }
}

fn read_whole(mut file: &File, path: &Path, len: u64) -> Result<Vec<u8>> {
    check_fits(path, len)?;
    let mut bytes = Vec::new();
    if usize::try_from(len).is_ok_and(|len| bytes.try_reserve_exact(len).is_err()) {
        return Err(does_not_fit(path, len));
    }
    file.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 != len {
        let what = format!("{} bytes were read, {len} expected: it changes while it is read", bytes.len());
        return Err(Error::format(path, None, what));
    }
    Ok(bytes)
}
