//! The mapped reader: a dataset file as a slice of records, each verified when read.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};

use super::format::{Codec, Entry, Header, Meta, NO_LABEL, crc32c, damaged, mismatch};
use crate::error::{Error, Result};

/// An open dataset file. Cheap to share between threads; all methods take `&self`.
#[derive(Debug)]
pub struct Dataset {
    path: PathBuf,
    map: Mmap,
    header: Header,
    /// A checked copy: what the index says cannot change after `open`, whatever happens to the file.
    entries: Vec<Entry>,
    meta: Meta,
}

/// One record, its checksum verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// The stored bytes; for [`Codec::Raw`] height x width x channels.
    pub pixels: &'a [u8],
    /// Stored width.
    pub width: usize,
    /// Stored height.
    pub height: usize,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Width of the source image: crops are drawn in its geometry.
    pub original_width: usize,
    /// Height of the source image.
    pub original_height: usize,
    /// Class, where known.
    pub label: Option<u32>,
    /// What `pixels` holds.
    pub codec: Codec,
}

impl Dataset {
    /// Maps the file and checks everything except the records themselves.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened, [`Error::Format`] when it is not a whole and consistent dataset file.
    pub fn open(path: &Path) -> Result<Dataset> {
        let status = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if status.is_dir() {
            return Err(Error::format(path, None, "is a folder, not a dataset file")
                .with_hint("`prepare` turns a folder of images into one file"));
        }
        if !status.is_file() {
            return Err(Error::format(path, None, "is not a regular file: it cannot be mapped"));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is read-only and private to this type, which hands out shared slices only. A dataset file is
        // written under another name and renamed when complete, and `prepare` never rewrites one in place, so its
        // bytes do not change under the map; a foreign program that does so anyway is caught by the record checksums
        // (or, when it cuts the file, by SIGBUS).
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        let header = Header::parse(path, &map)?;
        let entries = header.read_index(path, &map)?;
        let meta = header.read_meta(path, &map)?;
        Ok(Dataset { path: path.to_path_buf(), map, header, entries, meta })
    }

    /// Number of records, at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Record `i`, after verifying its checksum.
    ///
    /// # Errors
    /// [`Error::Format`] with file, record and offset when the bytes are damaged, [`Error::Shape`] when `i >= len()`.
    pub fn record(&self, i: usize) -> Result<Record<'_>> {
        let entry = self.entry(i)?;
        let pixels = self.bytes(entry);
        let computed = crc32c(pixels);
        if computed != entry.crc {
            let what = mismatch(&format!("record {i}:"), entry.crc, computed);
            return Err(damaged(Error::format(&self.path, Some(entry.offset), what)));
        }
        Ok(Record {
            pixels,
            width: entry.width.into(),
            height: entry.height.into(),
            channels: entry.channels.into(),
            original_width: entry.original_width.into(),
            original_height: entry.original_height.into(),
            label: label(entry),
            codec: Codec::from_number(entry.codec).unwrap_or(Codec::Raw),
        })
    }

    /// Label of record `i`, without touching its bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] when `i >= len()`.
    pub fn label(&self, i: usize) -> Result<Option<u32>> {
        self.entry(i).map(label)
    }

    /// Asks the kernel to read record `i` ahead. A hint only: nothing fails when it is not taken.
    pub fn prefetch(&self, i: usize) {
        if let Some(entry) = self.entries.get(i) {
            // A refused hint costs speed, never correctness.
            let _ = self.map.advise_range(Advice::WillNeed, entry.offset as usize, entry.len as usize);
        }
    }

    /// Class names; a label is a place in this list.
    pub fn classes(&self) -> &[String] {
        &self.meta.classes
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How the file was made and what was left out.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Compares index and meta with the BLAKE3 hashes of the header, on top of the checks of [`Dataset::open`].
    ///
    /// # Errors
    /// [`Error::Format`] when one differs.
    pub fn verify_hashes(&self) -> Result<()> {
        let Header { index, meta, index_blake3, meta_blake3, .. } = self.header;
        for (name, section, stored) in [("index", index, index_blake3), ("meta", meta, meta_blake3)] {
            let bytes = section.range(self.map.len()).map_or(&[][..], |range| &self.map[range]);
            if *blake3::hash(bytes).as_bytes() != stored {
                let what = format!("BLAKE3 of the {name} is not the one in the header");
                return Err(damaged(Error::format(&self.path, Some(section.offset), what)));
            }
        }
        Ok(())
    }

    /// Index entry of record `i`: its sizes and label, without touching its bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] when `i >= len()`.
    pub fn entry(&self, i: usize) -> Result<&Entry> {
        let out_of_range = || Error::shape("dataset", "record number", format!("below {}", self.len()), i);
        self.entries.get(i).ok_or_else(out_of_range)
    }

    /// The range was checked against the length of the map by `open`.
    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.offset as usize..][..entry.len as usize]
    }
}

fn label(entry: &Entry) -> Option<u32> {
    (entry.label != NO_LABEL).then_some(entry.label)
}
