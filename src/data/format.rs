//! The dataset file, `.ssds` version 1: one header page, the payload, the index, the meta text. Little-endian throughout.
//!
//! ```text
//! 0        header page (4096 bytes, its CRC32C in the last four)
//! 4096     payload: the records one after the other, each at a multiple of `alignment`
//! index    32 bytes a record, in record order
//! meta     JSON: class names, how the records were made, which files were rejected
//! ```
//!
//! Everything here works on bytes in memory and trusts nothing: sums are checked, every range is compared with the length
//! of the file. The reader ([`super::shard`]) and the writer ([`super::writer`]) share these types.

use std::path::Path;

use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

use super::decode::MAX_PIXELS;
use crate::error::{Error, Result};

#[cfg(not(target_endian = "little"))]
compile_error!("the dataset file is little-endian and read in place: big-endian targets are not supported");

/// First bytes of the file. The high bit and the line ends show a transfer that rewrote text.
pub const MAGIC: [u8; 8] = *b"\x89SSD\r\n\x1a\n";
/// The version this build writes; it reads every minor version of the same major one.
pub const MAJOR: u16 = 1;
/// See [`MAJOR`].
pub const MINOR: u16 = 0;
/// Bytes of the header page.
pub const HEADER_LEN: usize = 4096;
/// Bytes of one index entry.
pub const ENTRY_LEN: usize = size_of::<Entry>();
/// [`Entry::label`] of a record without one.
pub const NO_LABEL: u32 = u32::MAX;
/// Required feature: some records are JPEG files ([`Codec::Jpeg`]).
pub const JPEG_RECORDS: u64 = 1;
/// Features a reader must know to read the file.
pub const KNOWN_REQUIRED: u64 = JPEG_RECORDS;
/// Optional feature: the records were shuffled with [`Header::shuffle_seed`].
pub const SHUFFLED: u64 = 1;

const CRC_AT: usize = HEADER_LEN - 4;

/// A byte range of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Section {
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Section {
    /// One past the last byte, unless that overflows.
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }

    /// The range of the section in a file of `len` bytes.
    pub fn range(self, len: usize) -> Option<std::ops::Range<usize>> {
        let (start, end) = (usize::try_from(self.offset).ok()?, usize::try_from(self.end()?).ok()?);
        (end <= len).then_some(start..end)
    }
}

/// The fields of the header page, in file order. The rest of the page is zero, but for its CRC32C in the last four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// Major version: a reader refuses a newer one.
    pub major: u16,
    /// Minor version: newer ones stay readable.
    pub minor: u16,
    /// Every record starts at a multiple of this: 64 or 4096.
    pub alignment: u32,
    /// Feature bits without which the file cannot be read rightly.
    pub required_features: u64,
    /// Feature bits a reader may ignore.
    pub optional_features: u64,
    /// Number of records.
    pub records: u64,
    /// Exact length of the file.
    pub file_len: u64,
    /// The records.
    pub payload: Section,
    /// The index.
    pub index: Section,
    /// The meta text.
    pub meta: Section,
    /// Distance from one record to the next, 0 when they differ in length.
    pub stride: u64,
    /// Bytes of the longest record.
    pub max_record: u64,
    /// Number of classes, 0 for an unlabelled set.
    pub classes: u32,
    /// Width of the widest record.
    pub max_width: u32,
    /// Height of the highest record.
    pub max_height: u32,
    /// Which shard this is, from 0.
    pub shard: u32,
    /// Of how many shards; 0 when that is for their manifest to say.
    pub shards: u32,
    /// Zero.
    pub reserved: u32,
    /// Global number of this file's first record.
    pub first_id: u64,
    /// Seed of the order of the records, where [`SHUFFLED`] is set.
    pub shuffle_seed: u64,
    /// Name of the content: derived from the index and meta by BLAKE3, so the same source gives the same file.
    pub uuid: [u8; 16],
    /// CRC32C of the index.
    pub index_crc: u32,
    /// CRC32C of the meta text.
    pub meta_crc: u32,
    /// BLAKE3 of the index.
    pub index_blake3: [u8; 32],
    /// BLAKE3 of the meta text.
    pub meta_blake3: [u8; 32],
}

/// One index entry, in file order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Entry {
    /// First byte of the record, from the start of the file.
    pub offset: u64,
    /// Bytes of the record.
    pub len: u32,
    /// Stored width.
    pub width: u16,
    /// Stored height.
    pub height: u16,
    /// Width before the store resized it.
    pub original_width: u16,
    /// Height before the store resized it.
    pub original_height: u16,
    /// CRC32C of the record.
    pub crc: u32,
    /// Class, or [`NO_LABEL`].
    pub label: u32,
    /// A [`Codec`] as a number.
    pub codec: u8,
    /// 1 (grey) or 3 (RGB).
    pub channels: u8,
    /// Zero in this version.
    pub flags: u8,
    /// Zero in this version.
    pub reserved: u8,
}

/// How the bytes of a record stand for pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// Height x width x channels bytes.
    Raw = 0,
    /// A JPEG file of the entry's width, height and channels.
    Jpeg = 1,
}

/// The meta text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Class names; a label is a place in this list.
    pub classes: Vec<String>,
    /// Kind of the source: "folder" or "idx".
    pub source: String,
    /// Store mode as the user types it: "raw:256", or "raw" for the sizes of the source.
    pub store: String,
    /// What decoded the images, with version.
    pub decoder: String,
    /// What resized them, with version.
    pub resizer: String,
    /// What wrote the file, with version.
    pub writer: String,
    /// Files that were left out.
    pub rejected: Vec<Rejected>,
}

/// A source file that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// Path relative to the source.
    pub path: String,
    /// Why.
    pub reason: String,
}

/// CRC32C (Castagnoli), the checksum of every part of the file.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

impl Header {
    /// The header page.
    pub fn to_page(&self) -> [u8; HEADER_LEN] {
        let mut page = [0; HEADER_LEN];
        page[..size_of::<Header>()].copy_from_slice(bytemuck::bytes_of(self));
        let crc = crc32c(&page[..CRC_AT]);
        page[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// Reads and checks the header of a file of `file_len` bytes, of which `page` holds the first [`HEADER_LEN`], or all.
    ///
    /// # Errors
    /// [`Error::Format`] when this is no dataset file, is damaged, cut, too new, or contradicts itself.
    pub fn parse(path: &Path, page: &[u8], file_len: u64) -> Result<Header> {
        let fault = |offset: usize, what: String| Error::format(path, Some(offset as u64), what);
        if !page.starts_with(&MAGIC) {
            return Err(fault(0, "not a dataset file: its first 8 bytes are not the .ssds magic".into())
                .with_hint("`prepare` makes dataset files from images"));
        }
        if page.len() < HEADER_LEN {
            return Err(damaged(fault(page.len(), format!("cut inside the {HEADER_LEN}-byte header page"))));
        }
        let header: Header = bytemuck::pod_read_unaligned(&page[..size_of::<Header>()]);
        // Before the checksum: another major version may keep it elsewhere.
        if header.major > MAJOR {
            let what =
                format!("format version {}.{}, but this build reads up to {MAJOR}.x", header.major, header.minor);
            return Err(fault(8, what).with_hint("update simsiam-engine"));
        }
        let stored = u32::from_le_bytes([0, 1, 2, 3].map(|i| page[CRC_AT + i]));
        let computed = crc32c(&page[..CRC_AT]);
        if stored != computed {
            return Err(damaged(fault(0, mismatch("header", stored, computed))));
        }
        if header.major < MAJOR {
            return Err(fault(8, format!("format version {}.{} never existed", header.major, header.minor)));
        }
        header.check(file_len).map_err(|(field, what)| fault(field, what))?;
        Ok(header)
    }

    /// Everything the header says by itself, in a file of `file_len` bytes; the fault as (byte of the field, sentence).
    fn check(&self, file_len: u64) -> Result<(), (usize, String)> {
        let unknown = self.required_features & !KNOWN_REQUIRED;
        if unknown != 0 {
            return Err((
                16,
                format!("needs features {unknown:#x} that this build does not know; hint: update simsiam-engine"),
            ));
        }
        if self.file_len != file_len {
            let cut = if file_len < self.file_len { "cut" } else { "grown" };
            return Err((40, format!("the file is {cut}: {file_len} bytes, but its header says {}", self.file_len)));
        }
        if self.records == 0 {
            return Err((32, "holds no records".into()));
        }
        if !matches!(self.alignment, 64 | 4096) {
            return Err((12, format!("alignment is {}, expected 64 or 4096", self.alignment)));
        }
        if self.shards != 0 && self.shard >= self.shards {
            return Err((124, format!("shard {} of {} does not exist", self.shard, self.shards)));
        }
        let mut free_from = HEADER_LEN as u64;
        for (name, field, section) in
            [("payload", 48, self.payload), ("index", 64, self.index), ("meta", 80, self.meta)]
        {
            match section.end() {
                Some(end) if section.offset >= free_from && end <= self.file_len => free_from = end,
                _ => {
                    let Section { offset, len } = section;
                    let what = format!(
                        "{name} of {len} bytes at {offset} overlaps what comes before it or leaves the file of {file_len} bytes"
                    );
                    return Err((field, what));
                }
            }
        }
        if self.records.checked_mul(ENTRY_LEN as u64) != Some(self.index.len) {
            let what =
                format!("{} records need {ENTRY_LEN} bytes of index each, but it has {}", self.records, self.index.len);
            return Err((72, what));
        }
        Ok(())
    }

    /// Checks entry `i`, whose record may start at `free_from`; returns where the next one may.
    pub(super) fn check_entry(&self, entry: &Entry, i: u64, free_from: u64) -> Result<u64, String> {
        let codec = entry
            .codec()
            .ok_or_else(|| format!("codec {} is not one this build knows (0 raw, 1 JPEG)", entry.codec))?;
        if codec == Codec::Jpeg && self.required_features & JPEG_RECORDS == 0 {
            return Err("codec 1 (JPEG) in a file whose header names no JPEG records".into());
        }
        if !matches!(entry.channels, 1 | 3) {
            return Err(format!("{} channels, expected 1 or 3", entry.channels));
        }
        let Entry { width, height, original_width, original_height, .. } = *entry;
        if [width, height, original_width, original_height].contains(&0) {
            return Err(format!("an empty image: {width}x{height} from {original_width}x{original_height}"));
        }
        let pixels = u64::from(width) * u64::from(height) * u64::from(entry.channels);
        if codec == Codec::Jpeg && (entry.len == 0 || u64::from(width) * u64::from(height) > MAX_PIXELS) {
            return Err(format!("a JPEG of {} bytes and {width}x{height} pixels", entry.len));
        }
        if codec == Codec::Raw && u64::from(entry.len) != pixels {
            return Err(format!("{} bytes, but {width}x{height}x{} needs {pixels}", entry.len, entry.channels));
        }
        if entry.label != NO_LABEL && entry.label >= self.classes {
            return Err(format!("label {} in a file of {} classes", entry.label, self.classes));
        }
        if !entry.offset.is_multiple_of(self.alignment.into()) {
            return Err(format!("offset {} is not a multiple of {}", entry.offset, self.alignment));
        }
        let expected = i.checked_mul(self.stride).and_then(|at| at.checked_add(self.payload.offset));
        if self.stride != 0 && Some(entry.offset) != expected {
            return Err(format!("offset {} does not follow the record stride of {}", entry.offset, self.stride));
        }
        if entry.offset < free_from {
            return Err(format!("offset {} lies before {free_from}, where its record may start", entry.offset));
        }
        match (Section { offset: entry.offset, len: u64::from(entry.len) }.end(), self.payload.end()) {
            (Some(end), Some(limit)) if end <= limit => Ok(end),
            _ => Err(format!("{} bytes at {} leave the payload", entry.len, entry.offset)),
        }
    }

    /// The meta text, of which `bytes` are all.
    ///
    /// # Errors
    /// [`Error::Format`] when it is damaged, no such JSON, or not of as many classes as the header says.
    pub fn parse_meta(&self, path: &Path, bytes: &[u8]) -> Result<Meta> {
        let fault = |what: String| Error::format(path, Some(self.meta.offset), what);
        let computed = crc32c(bytes);
        if computed != self.meta_crc {
            return Err(damaged(fault(mismatch("meta", self.meta_crc, computed))));
        }
        let meta: Meta = serde_json::from_slice(bytes).map_err(|e| fault(format!("meta text: {e}")))?;
        if meta.classes.len() as u64 != u64::from(self.classes) {
            return Err(fault(format!("{} class names, but the header says {}", meta.classes.len(), self.classes)));
        }
        Ok(meta)
    }
}

impl Entry {
    /// Class of the record, where known.
    pub fn label(&self) -> Option<u32> {
        (self.label != NO_LABEL).then_some(self.label)
    }

    /// What the record holds, if this build knows it.
    pub fn codec(&self) -> Option<Codec> {
        [Codec::Raw, Codec::Jpeg].into_iter().find(|&codec| codec as u8 == self.codec)
    }
}

/// Checks an index piece by piece, in constant memory.
pub struct IndexCheck<'a> {
    header: &'a Header,
    path: &'a Path,
    crc: Crc32c,
    summary: IndexSummary,
    free_from: u64,
    /// The first: told only when the checksum holds, for otherwise the damage is the news.
    fault: Option<Error>,
}

impl<'a> IndexCheck<'a> {
    /// Starts the check of the index of the file at `path`.
    pub fn new(header: &'a Header, path: &'a Path) -> IndexCheck<'a> {
        let (crc, summary) = (Crc32c::default(), IndexSummary::default());
        IndexCheck { header, path, crc, summary, free_from: header.payload.offset, fault: None }
    }

    /// The next piece: whole entries.
    pub fn feed(&mut self, piece: &[u8]) {
        self.crc.update(piece);
        let entries = piece.chunks_exact(ENTRY_LEN).map(bytemuck::pod_read_unaligned);
        if self.fault.is_none() {
            self.fault = entries.map(|entry: Entry| self.check(&entry)).find_map(Result::err);
        }
    }

    fn check(&mut self, entry: &Entry) -> Result<()> {
        let i = self.summary.records;
        self.free_from = self.header.check_entry(entry, i, self.free_from).map_err(|what| {
            let offset = self.header.index.offset + i * ENTRY_LEN as u64;
            Error::format(self.path, Some(offset), format!("index of record {i}: {what}"))
        })?;
        self.summary.add(entry);
        Ok(())
    }

    /// The verdict after the last piece.
    ///
    /// # Errors
    /// [`Error::Format`] when the checksum is not that of the header, when an entry makes no sense (named with the byte where
    /// it lies), or when the sizes are not those of the header.
    pub fn finish(self) -> Result<()> {
        let Header { index, index_crc, max_record, max_width, max_height, .. } = *self.header;
        let computed = self.crc.finish();
        if computed != index_crc {
            let what = mismatch("index", index_crc, computed);
            return Err(damaged(Error::format(self.path, Some(index.offset), what)));
        }
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let IndexSummary { longest, widest, highest, .. } = self.summary;
        if (longest, widest, highest) != (max_record, max_width, max_height) {
            let what = format!(
                "the header's largest record ({max_record} bytes, {max_width}x{max_height}) is not that of the index ({longest} bytes, {widest}x{highest})",
            );
            return Err(Error::format(self.path, Some(104), what));
        }
        Ok(())
    }
}

/// What the header says about all entries together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IndexSummary {
    /// Number of entries.
    pub records: u64,
    /// Bytes of the longest record.
    pub longest: u64,
    /// Bytes of the shortest record.
    pub shortest: u64,
    /// Width of the widest record.
    pub widest: u32,
    /// Height of the highest record.
    pub highest: u32,
    /// Records that are JPEG files.
    pub jpegs: u64,
}

impl IndexSummary {
    /// Takes the next entry into account.
    pub fn add(&mut self, entry: &Entry) {
        let len = u64::from(entry.len);
        self.shortest = if self.records == 0 { len } else { self.shortest.min(len) };
        self.longest = self.longest.max(len);
        self.widest = self.widest.max(entry.width.into());
        self.highest = self.highest.max(entry.height.into());
        self.jpegs += u64::from(entry.codec == Codec::Jpeg as u8);
        self.records += 1;
    }

    /// The distance between records, 0 when they differ in length.
    pub fn stride(&self, alignment: u32) -> u64 {
        if self.longest == self.shortest { self.longest.next_multiple_of(alignment.into()) } else { 0 }
    }
}

/// CRC32C of bytes that come in pieces.
pub struct Crc32c(crc_fast::Digest);

impl Default for Crc32c {
    fn default() -> Crc32c {
        Crc32c(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))
    }
}

impl Crc32c {
    /// The next piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of all pieces.
    pub fn finish(self) -> u32 {
        self.0.finalize() as u32
    }
}

/// A version 8 UUID of content (the index holds every record's checksum): no clock and no chance, so that the same source
/// and options give the same bytes.
pub fn content_uuid(content: &blake3::Hasher) -> uuid::Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&content.finalize().as_bytes()[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// The sentence for a checksum that does not hold.
pub fn mismatch(part: &str, stored: u32, computed: u32) -> String {
    format!("{part} checksum mismatch: stored {stored:08x}, computed {computed:08x}")
}

/// Adds the hint for a file whose bytes changed since they were written.
pub fn damaged(error: Error) -> Error {
    error.with_hint("the file is damaged: copy it again, or prepare it again")
}
