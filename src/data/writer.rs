//! Writes a dataset file: `OUT.tmp` first, in segments that are forced to disk, the header page last, then a rename.
//! Until the rename nothing exists under the name `OUT`, and a writer that is dropped unfinished removes its `OUT.tmp`.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::format::{
    Codec, ENTRY_LEN, Entry, HEADER_LEN, Header, JPEG_RECORDS, MAGIC, MAJOR, MINOR, Meta, NO_LABEL, SHUFFLED, Section,
    content_uuid, crc32c,
};
use crate::error::{Error, Result};

/// Bytes after which what was written is forced to disk, so that a late full disk or I/O error shows early and the last
/// sync of a large file is short.
const SEGMENT: u64 = 64 << 20;

/// A record on its way into the file.
#[derive(Debug)]
pub struct NewRecord {
    /// What `codec` says.
    pub bytes: Vec<u8>,
    /// What `bytes` holds.
    pub codec: Codec,
    /// Stored width.
    pub width: u16,
    /// Stored height.
    pub height: u16,
    /// 1 or 3.
    pub channels: u8,
    /// Width of the source image.
    pub original_width: u16,
    /// Height of the source image.
    pub original_height: u16,
    /// Class, where known.
    pub label: Option<u32>,
    /// CRC32C of `bytes`: part of the record so that the threads that make records compute it.
    pub crc: u32,
}

/// A dataset file being written.
#[derive(Debug)]
pub struct Writer {
    out: PathBuf,
    tmp: PathBuf,
    file: BufWriter<File>,
    alignment: u32,
    at: u64,
    synced: u64,
    entries: Vec<Entry>,
    finished: bool,
}

impl Writer {
    /// Starts a file that will be called `out`. Records start at multiples of `alignment` (64 or 4096).
    ///
    /// # Errors
    /// [`Error::Config`] when `out` exists and `force` is not given, or another process is writing it;
    /// [`Error::Io`] when it cannot be created.
    pub fn create(out: &Path, alignment: u32, force: bool) -> Result<Writer> {
        refuse_existing(out, force)?;
        let mut name = out.as_os_str().to_owned();
        name.push(".tmp");
        let tmp = PathBuf::from(name);
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&tmp);
        let file = file.map_err(Error::io("create", &tmp))?;
        let taken = || Error::config(tmp.display().to_string(), "another process is writing this file now");
        // The lock dies with its process, so what a killed one left behind is free to be written over.
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken()),
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", &tmp)(e)),
        }
        // Between the open and the lock the other process may have finished and renamed what was opened here.
        if !is_file_at(&file, &tmp) {
            return Err(taken());
        }
        let mut writer = Writer {
            out: out.to_path_buf(),
            tmp,
            file: BufWriter::with_capacity(1 << 20, file),
            alignment,
            at: 0,
            synced: 0,
            entries: Vec::new(),
            finished: false,
        };
        writer.file.get_ref().set_len(0).map_err(Error::io("empty", &writer.tmp))?;
        writer.put(&[0; HEADER_LEN])?;
        Ok(writer)
    }

    /// Appends a record.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses, [`Error::Shape`] when the pixels are not width x height x channels.
    pub fn append(&mut self, record: &NewRecord) -> Result<()> {
        let expected = match record.codec {
            Codec::Raw => usize::from(record.width) * usize::from(record.height) * usize::from(record.channels),
            Codec::Jpeg => record.bytes.len(),
        };
        let len = u32::try_from(record.bytes.len()).ok().filter(|_| record.bytes.len() == expected);
        let len = len.ok_or_else(|| Error::shape("dataset writer", "record bytes", expected, record.bytes.len()))?;
        self.pad(self.alignment.into())?;
        self.entries.push(Entry {
            offset: self.at,
            len,
            width: record.width,
            height: record.height,
            original_width: record.original_width,
            original_height: record.original_height,
            crc: record.crc,
            label: record.label.unwrap_or(NO_LABEL),
            codec: record.codec as u8,
            channels: record.channels,
            flags: 0,
            reserved: 0,
        });
        self.put(&record.bytes)?;
        if self.at - self.synced >= SEGMENT {
            self.file.flush().and_then(|()| self.file.get_ref().sync_data()).map_err(Error::io("write", &self.tmp))?;
            self.synced = self.at;
        }
        Ok(())
    }

    /// Number of records so far.
    pub fn records(&self) -> usize {
        self.entries.len()
    }

    /// Writes index, meta and header, then gives the file its name. `shuffle` is the seed of the order, if it was shuffled.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses, [`Error::Format`] when there is no record.
    pub fn finish(mut self, meta: &Meta, shuffle: Option<u64>, force: bool) -> Result<Header> {
        if self.entries.is_empty() {
            return Err(Error::format(&self.out, None, "not written: there is no record to store"));
        }
        self.pad(HEADER_LEN as u64)?;
        let payload = Section { offset: HEADER_LEN as u64, len: self.at - HEADER_LEN as u64 };
        let index_bytes = bytemuck::cast_slice(&self.entries).to_vec();
        let index = self.put_section(&index_bytes)?;
        let meta_bytes =
            serde_json::to_vec_pretty(meta).map_err(|e| Error::io("encode meta of", &self.out)(e.into()))?;
        let meta_section = self.put_section(&meta_bytes)?;
        let header = Header {
            magic: MAGIC,
            major: MAJOR,
            minor: MINOR,
            alignment: self.alignment,
            required_features: if self.entries.iter().any(|e| e.codec == Codec::Jpeg as u8) { JPEG_RECORDS } else { 0 },
            optional_features: if shuffle.is_some() { SHUFFLED } else { 0 },
            records: self.entries.len() as u64,
            file_len: self.at,
            payload,
            index,
            meta: meta_section,
            stride: self.stride(),
            max_record: self.largest(|e| e.len).into(),
            classes: meta.classes.len() as u32,
            max_width: self.largest(|e| e.width.into()),
            max_height: self.largest(|e| e.height.into()),
            shard: 0,
            shards: 1,
            reserved: 0,
            first_id: 0,
            shuffle_seed: shuffle.unwrap_or(0),
            uuid: content_uuid(
                blake3::Hasher::new()
                    .update(&(index_bytes.len() as u64).to_le_bytes())
                    .update(&index_bytes)
                    .update(&meta_bytes),
            )
            .into_bytes(),
            index_crc: crc32c(&index_bytes),
            meta_crc: crc32c(&meta_bytes),
            index_blake3: *blake3::hash(&index_bytes).as_bytes(),
            meta_blake3: *blake3::hash(&meta_bytes).as_bytes(),
        };
        self.publish(&header, force)?;
        Ok(header)
    }

    /// Data to disk, header after it, and the name last of all.
    fn publish(&mut self, header: &Header, force: bool) -> Result<()> {
        let result = self.file.flush().and_then(|()| {
            let file = self.file.get_mut();
            file.sync_data()?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header.to_page())?;
            file.sync_all()
        });
        result.map_err(Error::io("write", &self.tmp))?;
        refuse_existing(&self.out, force)?;
        fs::rename(&self.tmp, &self.out).map_err(Error::io("rename to", &self.out))?;
        self.finished = true;
        let folder = folder_of(&self.out);
        File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("sync", folder))
    }

    /// The distance between records, 0 when they differ in length.
    fn stride(&self) -> u64 {
        let first = self.entries[0].len;
        let equal = self.entries.iter().all(|e| e.len == first);
        if equal { u64::from(first).next_multiple_of(self.alignment.into()) } else { 0 }
    }

    fn largest(&self, field: impl Fn(&Entry) -> u32) -> u32 {
        self.entries.iter().map(field).max().unwrap_or(0)
    }

    fn put_section(&mut self, bytes: &[u8]) -> Result<Section> {
        self.pad(ENTRY_LEN as u64)?;
        let section = Section { offset: self.at, len: bytes.len() as u64 };
        self.put(bytes)?;
        Ok(section)
    }

    fn pad(&mut self, alignment: u64) -> Result<()> {
        let missing = self.at.next_multiple_of(alignment) - self.at;
        self.put(&[0; HEADER_LEN][..missing as usize])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.tmp))?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            // Best effort: a leftover is harmless, the next run writes over it.
            let _ = fs::remove_file(&self.tmp);
        }
    }
}

/// Fails when `out` cannot be the name of a new file.
pub fn refuse_existing(out: &Path, force: bool) -> Result<()> {
    let folder = folder_of(out);
    if !folder.is_dir() {
        return Err(Error::config(out.display().to_string(), format!("there is no folder {}", folder.display())));
    }
    match fs::symlink_metadata(out) {
        Ok(status) if status.is_dir() => {
            let what = "is a folder; the output is one file";
            Err(Error::config(out.display().to_string(), what).with_hint("name it, for example train.ssds"))
        }
        Ok(_) if !force => {
            Err(Error::config(out.display().to_string(), "exists already").with_hint("--force replaces it"))
        }
        _ => Ok(()),
    }
}

/// Whether `file` is what lies at `path`.
fn is_file_at(file: &File, path: &Path) -> bool {
    let same = |a: fs::Metadata, b: fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    file.metadata().and_then(|a| fs::metadata(path).map(|b| same(a, b))).unwrap_or(false)
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
