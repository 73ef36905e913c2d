//! One dataset file as a slice of records, each verified when read.

use std::io;
use std::path::Path;

use super::format::{
    Codec, ENTRY_LEN, Entry, HEADER_LEN, Header, IndexCheck, Meta, Section, crc32c, damaged, mismatch,
};
use super::mapped::{Access, FileBytes};
use crate::error::{Error, Result};

/// Bytes of the index that are looked at in one go.
const INDEX_CHUNK: u64 = 1 << 20;

/// An open dataset file. Cheap to share between threads; all methods take `&self`. Its index stays on disk: what it takes
/// of memory does not grow with the number of records.
#[derive(Debug)]
pub struct Shard {
    bytes: FileBytes,
    header: Header,
    meta: Meta,
}

/// One record, its checksum verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// What `codec` says: for [`Codec::Raw`] height x width x channels bytes.
    pub bytes: &'a [u8],
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
    /// What `bytes` holds.
    pub codec: Codec,
}

impl Shard {
    /// Opens a dataset file and checks everything except the records themselves.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened, [`Error::Format`] when it is not a whole and consistent dataset file.
    pub fn open(path: &Path, access: Access) -> Result<Shard> {
        let bytes = FileBytes::open(path, access)?;
        let mut scratch = Vec::new();
        let page = Section { offset: 0, len: bytes.size().min(HEADER_LEN as u64) };
        let header = Header::parse(path, bytes.get(page, &mut scratch)?, bytes.size())?;
        check_index(&bytes, &header)?;
        let meta = header.parse_meta(path, bytes.get(header.meta, &mut scratch)?)?;
        Ok(Shard { bytes, header, meta })
    }

    /// Number of records, at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.header.records as usize
    }

    /// Record `i`, after verifying its checksum. `scratch` is where its bytes are put when they have to be read.
    ///
    /// # Errors
    /// [`Error::Format`] with file, record and offset when the bytes are damaged, [`Error::Shape`] when `i >= len()`,
    /// [`Error::Io`] when the disk fails.
    pub fn record<'a>(&'a self, i: usize, scratch: &'a mut Vec<u8>) -> Result<Record<'a>> {
        let entry = self.entry(i)?;
        let bytes = self.bytes.get(section(&entry), scratch).map_err(|e| in_record(e, i))?;
        let computed = crc32c(bytes);
        if computed != entry.crc {
            let what = mismatch(&format!("record {i}:"), entry.crc, computed);
            return Err(damaged(Error::format(self.path(), Some(entry.offset), what)));
        }
        Ok(Record {
            bytes,
            width: entry.width.into(),
            height: entry.height.into(),
            channels: entry.channels.into(),
            original_width: entry.original_width.into(),
            original_height: entry.original_height.into(),
            label: entry.label(),
            codec: entry.codec().unwrap_or(Codec::Raw),
        })
    }

    /// Index entry of record `i`: its sizes and label, without touching its bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] when `i >= len()`, [`Error::Format`] when the file has changed since it was opened, [`Error::Io`]
    /// when the disk fails.
    pub fn entry(&self, i: usize) -> Result<Entry> {
        if i >= self.len() {
            return Err(Error::shape("dataset", "record number", format!("below {}", self.len()), i));
        }
        let offset = self.header.index.offset + (i * ENTRY_LEN) as u64;
        let mut scratch = Vec::new();
        let entry = Section { offset, len: ENTRY_LEN as u64 };
        let bytes = self.bytes.get(entry, &mut scratch).map_err(|e| in_record(e, i))?;
        let entry: Entry = bytemuck::pod_read_unaligned(bytes);
        // Again, as at opening: the entry lies on disk, and the record is found by it.
        self.header.check_entry(&entry, i as u64, self.header.payload.offset).map_err(|what| {
            let what = format!("index of record {i}: {what}; the file has changed since it was opened");
            damaged(Error::format(self.path(), Some(offset), what))
        })?;
        Ok(entry)
    }

    /// Asks the kernel to read record `i` ahead. A hint only: nothing fails when it is not taken.
    pub fn prefetch(&self, i: usize) {
        if let Ok(entry) = self.entry(i) {
            self.bytes.prefetch(section(&entry));
        }
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        self.bytes.path()
    }

    /// How its bytes are reached.
    pub fn access(&self) -> Access {
        self.bytes.access()
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How the file was made and what was left out.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// Compares index and meta with the BLAKE3 hashes of the header, on top of the checks of [`Shard::open`].
    ///
    /// # Errors
    /// [`Error::Format`] when one differs, [`Error::Io`] when the disk fails.
    pub fn verify_hashes(&self) -> Result<()> {
        let Header { index, meta, index_blake3, meta_blake3, .. } = self.header;
        for (name, section, stored) in [("index", index, index_blake3), ("meta", meta, meta_blake3)] {
            let mut hasher = blake3::Hasher::new();
            self.bytes.each_chunk(section, INDEX_CHUNK, |chunk| {
                hasher.update(chunk);
                Ok(())
            })?;
            if *hasher.finalize().as_bytes() != stored {
                let what = format!("BLAKE3 of the {name} is not the one in the header");
                return Err(damaged(Error::format(self.path(), Some(section.offset), what)));
            }
        }
        Ok(())
    }
}

fn check_index(bytes: &FileBytes, header: &Header) -> Result<()> {
    let mut check = IndexCheck::new(header, bytes.path());
    bytes.each_chunk(header.index, INDEX_CHUNK, |chunk| {
        check.feed(chunk);
        Ok(())
    })?;
    check.finish()
}

/// Says at which record the disk failed.
fn in_record(error: Error, i: usize) -> Error {
    match error {
        Error::Io { action, path, source } => {
            let reason = match source.kind() {
                io::ErrorKind::UnexpectedEof => "the file has been cut since it was opened".to_string(),
                _ => source.to_string(),
            };
            Error::Io { action, path, source: io::Error::new(source.kind(), format!("record {i}: {reason}")) }
        }
        other => other,
    }
}

fn section(entry: &Entry) -> Section {
    Section { offset: entry.offset, len: entry.len.into() }
}
