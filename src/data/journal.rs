//! The journal beside an unfinished dataset: what is safely on disk, so that a killed `prepare` goes on where it was.
//!
//! ```text
//! 0   magic, version, name of the job (64 bytes with their CRC32C)
//! 64  frames: length u32, CRC32C u32, then FrameHead, the index entries of new records, the rest as JSON
//! ```
//!
//! A frame is written after its records are forced to disk, and holds their index entries: when the file is finished, its
//! index is copied from here, and no part of it has to stay in memory. A frame cut by a kill does not match its checksum
//! and counts as never written.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

use super::format::{ENTRY_LEN, Entry, Rejected, crc32c};
use super::manifest::ShardRef;
use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"\x89SSJ\r\n\x1a\n";
const VERSION: u32 = 1;

/// Name of a job: a hash of the source and of every option that the bytes of the result depend on.
pub type JobId = [u8; 32];

#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    version: u32,
    reserved: [u32; 4],
    job: JobId,
    crc: u32,
}

const HEAD_LEN: u64 = size_of::<Head>() as u64;

impl Head {
    fn new(job: JobId) -> Head {
        let mut head = Head { magic: MAGIC, version: VERSION, reserved: [0; 4], job, crc: 0 };
        head.crc = crc32c(&bytemuck::bytes_of(&head)[..HEAD_LEN as usize - 4]);
        head
    }
}

/// Where the work stood when a frame was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct FrameHead {
    /// Images of the source that were dealt with, since the beginning.
    pub consumed: u64,
    /// Bytes of the current shard that are on disk.
    pub shard_len: u64,
    /// Number of the current shard within the job.
    pub shard: u32,
    /// Number of entries in this frame.
    pub entries: u32,
}

/// The part of a frame that is text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Notes {
    /// Images that could not be used, with their number in the source.
    pub rejected: Vec<(u64, Rejected)>,
    /// Set by the last frame of a shard, once that is complete under its temporary name.
    pub done: Option<ShardRef>,
}

/// A frame as it is read back.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Where the work stood.
    pub head: FrameHead,
    /// Index entries of the records since the frame before.
    pub entries: Vec<Entry>,
    /// Rejected images, and the end of a shard.
    pub notes: Notes,
}

/// An open journal. Its lock keeps other processes from the same output, and dies with its process.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Journal {
    /// Opens or creates the journal at `path` and locks it. An empty or damaged one has no job ([`Journal::job`]).
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`] when another process has it.
    pub fn open(path: &Path) -> Result<Journal> {
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path);
        let file = file.map_err(Error::io("create", path))?;
        let taken = || Error::config(path.display().to_string(), "another process is writing this dataset now");
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken()),
            Err(TryLockError::Error(e)) => return Err(Error::io("lock", path)(e)),
        }
        // Between the open and the lock the other process may have finished and removed what was opened here.
        if !is_file_at(&file, path) {
            return Err(taken());
        }
        let len = file.metadata().map_err(Error::io("look at", path))?.len();
        Ok(Journal { path: path.to_path_buf(), file, len })
    }

    /// The job it belongs to, when it is a whole journal of this version.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn job(&mut self) -> Result<Option<JobId>> {
        let mut bytes = [0; HEAD_LEN as usize];
        if self.len < HEAD_LEN {
            return Ok(None);
        }
        self.seek(0)?;
        self.file.read_exact(&mut bytes).map_err(Error::io("read", &self.path))?;
        let head: Head = bytemuck::pod_read_unaligned(&bytes);
        Ok((head == Head::new(head.job)).then_some(head.job))
    }

    /// Empties it and begins a job.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn begin(&mut self, job: JobId) -> Result<()> {
        self.truncate(0)?;
        self.put(bytemuck::bytes_of(&Head::new(job)))
    }

    /// Shows the frames to `see`, from byte `from` (0: all) to the first that is not whole, with the place where each ends.
    /// Returns the place where the last one ends.
    ///
    /// # Errors
    /// [`Error::Io`], and those of `see`.
    pub fn frames(&mut self, from: u64, mut see: impl FnMut(Frame, u64) -> Result<()>) -> Result<u64> {
        let mut at = from.max(HEAD_LEN);
        self.seek(at)?;
        let mut reader = BufReader::with_capacity(1 << 16, &self.file);
        while let Some((frame, len)) =
            read_frame(&mut reader, self.len.saturating_sub(at)).map_err(Error::io("read", &self.path))?
        {
            at += len;
            see(frame, at)?;
        }
        Ok(at)
    }

    /// Cuts it to `len` bytes, and goes on from there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn truncate(&mut self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(Error::io("cut", &self.path))?;
        self.len = len;
        Ok(())
    }

    /// Appends a frame, and forces it to disk if it is to be `durable`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(&mut self, head: FrameHead, entries: &[Entry], notes: &Notes, durable: bool) -> Result<()> {
        let head = FrameHead { entries: entries.len() as u32, ..head };
        let mut body = bytemuck::bytes_of(&head).to_vec();
        body.extend_from_slice(bytemuck::cast_slice(entries));
        serde_json::to_writer(&mut body, notes).map_err(|e| Error::io("encode", &self.path)(e.into()))?;
        let frame = [&(body.len() as u32).to_le_bytes()[..], &crc32c(&body).to_le_bytes(), &body].concat();
        self.put(&frame)?;
        if durable { self.file.sync_data().map_err(Error::io("write", &self.path)) } else { Ok(()) }
    }

    /// Bytes so far: where the next frame begins.
    pub fn end(&self) -> u64 {
        self.len
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.seek(self.len)?;
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn seek(&mut self, at: u64) -> Result<()> {
        self.file.seek(SeekFrom::Start(at)).map(drop).map_err(Error::io("read", &self.path))
    }
}

/// The next frame of `reader`, which has `left` bytes, and its length; `None` when it is not whole.
fn read_frame(reader: &mut impl Read, left: u64) -> std::io::Result<Option<(Frame, u64)>> {
    const PREFIX: u64 = 8;
    if left < PREFIX {
        return Ok(None);
    }
    let mut prefix = [0; PREFIX as usize];
    reader.read_exact(&mut prefix)?;
    let [len, crc] = bytemuck::cast::<_, [u32; 2]>(prefix);
    // Before memory is taken for it.
    if u64::from(len) > left - PREFIX {
        return Ok(None);
    }
    let mut body = vec![0; len as usize];
    reader.read_exact(&mut body)?;
    let whole = crc32c(&body) == crc;
    Ok(parse_frame(&body).filter(|_| whole).map(|frame| (frame, PREFIX + u64::from(len))))
}

fn parse_frame(body: &[u8]) -> Option<Frame> {
    let (head, rest) = body.split_at_checked(size_of::<FrameHead>())?;
    let head: FrameHead = bytemuck::pod_read_unaligned(head);
    let (entries, notes) = rest.split_at_checked(head.entries as usize * ENTRY_LEN)?;
    let entries = entries.chunks_exact(ENTRY_LEN).map(bytemuck::pod_read_unaligned).collect();
    Some(Frame { head, entries, notes: serde_json::from_slice(notes).ok()? })
}

/// Whether `file` is what lies at `path`.
fn is_file_at(file: &File, path: &Path) -> bool {
    let same = |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    file.metadata().and_then(|a| std::fs::metadata(path).map(|b| same(a, b))).unwrap_or(false)
}
