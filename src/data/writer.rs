//! Writes a dataset: one file, or shards and their manifest.
//!
//! A file is written as `FILE.tmp`, its header last, then renamed; the manifest comes after the last shard. So until a
//! dataset is complete nothing lies under its name. Every [`SEGMENT`] bytes the records are forced to disk and noted in
//! the journal `OUT.journal` ([`super::journal`]); a later [`Writer`] of the same job goes on from there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::format::{
    Codec, Crc32c, ENTRY_LEN, Entry, HEADER_LEN, Header, IndexSummary, JPEG_RECORDS, MAGIC, MAJOR, MINOR, Meta,
    NO_LABEL, Rejected, SHUFFLED, Section, content_uuid, crc32c,
};
use super::journal::{FrameHead, JobId, Journal, Notes};
use super::manifest::{Manifest, ShardRef, shard_path};
use crate::atomic::sync_folder;
use crate::error::{Error, Result};

/// Bytes of records after which they are forced to disk and noted: at most so much is written again after a kill.
pub const SEGMENT: u64 = 64 << 20;

/// As much, in number: keeps the index entries that wait for it few.
const SEGMENT_RECORDS: usize = 1 << 14;

/// Collects small records. Longer ones, as 256 x 256 pixels, go past it and are not copied.
const BUFFER: usize = 1 << 17;

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

/// What is to be written, and how.
#[derive(Debug, Clone)]
pub struct Job {
    /// The dataset file, or the manifest when there are shards.
    pub out: PathBuf,
    /// Same source and options, same name: only then an unfinished dataset is gone on with.
    pub id: JobId,
    /// Records start at multiples of this (64 or 4096).
    pub alignment: u32,
    /// Bytes between two notes in the journal: [`SEGMENT`], less in tests.
    pub segment: u64,
    /// A new shard begins where a record would make the file longer than this.
    pub shard_size: Option<u64>,
    /// What the new shards are added to.
    pub base: Option<Base>,
    /// Replace `out`.
    pub force: bool,
    /// Throw away what another job left unfinished.
    pub restart: bool,
}

/// A complete dataset that gets more shards.
#[derive(Debug, Clone)]
pub struct Base {
    /// Its manifest, or the one that it gets.
    pub manifest: Manifest,
    /// Whether it is a single file, which becomes the first shard.
    pub single: bool,
}

impl Job {
    /// One file, without a past.
    fn simple(out: &Path, alignment: u32, force: bool) -> Job {
        let (id, out) = (JobId::default(), out.to_path_buf());
        Job { out, id, alignment, segment: SEGMENT, shard_size: None, base: None, force, restart: true }
    }

    fn is_sharded(&self) -> bool {
        self.shard_size.is_some() || self.base.is_some()
    }

    /// The name of the `i`-th new file.
    fn file(&self, i: usize) -> PathBuf {
        let before = self.base.as_ref().map_or(0, |base| base.manifest.shards.len());
        if self.is_sharded() { shard_path(&self.out, (before + i) as u32) } else { self.out.clone() }
    }

    /// Whether `out` can be the name of what is written.
    fn check_output(&self) -> Result<()> {
        match self.base {
            Some(_) => Ok(()),
            None => refuse_existing(&self.out, self.force),
        }
    }
}

/// A dataset being written.
#[derive(Debug)]
pub struct Writer {
    job: Job,
    journal: Journal,
    /// Complete files of this job.
    done: Vec<ShardRef>,
    consumed: u64,
    /// Frames in the journal: without one there is nothing worth keeping.
    frames: u64,
    file: BufWriter<File>,
    /// End of the current file.
    at: u64,
    /// Its end at the last frame.
    noted: u64,
    summary: IndexSummary,
    /// Where the frames of the current file begin in the journal.
    first_frame: u64,
    /// Since the last frame.
    pending: Vec<Entry>,
    /// Of the whole job.
    rejected: Vec<(u64, Rejected)>,
    /// How many of them are noted, and how many belong to earlier files.
    rejected_noted: usize,
    rejected_before: usize,
    finished: bool,
}

impl Writer {
    /// Starts a file that will be called `out`; nothing of it stays when the writer is dropped unfinished.
    ///
    /// # Errors
    /// As [`Writer::open`].
    pub fn create(out: &Path, alignment: u32, force: bool) -> Result<Writer> {
        Writer::open(Job::simple(out, alignment, force))
    }

    /// Starts a job, or goes on with it where an earlier writer of it stopped ([`Writer::consumed`]).
    ///
    /// # Errors
    /// [`Error::Config`] when the output exists, another process is writing it, or another job was left unfinished there;
    /// [`Error::Io`] when it cannot be created.
    pub fn open(job: Job) -> Result<Writer> {
        // Before a journal is made for nothing.
        if !is_unfinished(&job.out) {
            job.check_output()?;
        }
        let mut journal = Journal::open(&journal_path(&job.out))?;
        let state = match journal.job()? {
            Some(id) if id == job.id && id != JobId::default() => {
                super::resume::recover(&mut journal, &job.out, |i| job.file(i))?
            }
            Some(_) if !job.restart => return Err(unfinished_other(&job.out)),
            _ => None,
        };
        match state {
            Some(state) => {
                // What is complete may have its name already: the kill came right before the end.
                if state.done.is_empty() {
                    job.check_output()?;
                }
                Writer::go_on(job, journal, state)
            }
            None => {
                job.check_output()?;
                Writer::begin(job, journal)
            }
        }
    }

    fn begin(job: Job, mut journal: Journal) -> Result<Writer> {
        let first = job.file(0);
        if job.is_sharded() {
            refuse_existing(&first, false)?;
        }
        super::resume::discard(&mut journal, &job.out)?;
        journal.begin(job.id)?;
        let file = open_tmp(&first)?;
        file.set_len(0).map_err(Error::io("empty", &tmp_path(&first)))?;
        let mut writer = Writer::over(job, journal, file, Recovered::default());
        writer.put(&[0; HEADER_LEN])?;
        Ok(writer)
    }

    fn go_on(job: Job, journal: Journal, state: Recovered) -> Result<Writer> {
        let path = job.file(state.done.len());
        let mut file = open_tmp(&path)?;
        let cut = file.set_len(state.at).and_then(|()| file.seek(SeekFrom::End(0)).map(drop));
        cut.map_err(Error::io("cut", &tmp_path(&path)))?;
        let fresh = state.at == 0;
        let mut writer = Writer::over(job, journal, file, state);
        if fresh {
            writer.put(&[0; HEADER_LEN])?;
        }
        Ok(writer)
    }

    fn over(job: Job, journal: Journal, file: File, state: Recovered) -> Writer {
        Writer {
            job,
            journal,
            done: state.done,
            consumed: state.consumed,
            frames: state.frames,
            file: BufWriter::with_capacity(BUFFER, file),
            at: state.at,
            noted: state.at,
            summary: state.summary,
            first_frame: state.first_frame,
            pending: Vec::new(),
            rejected_noted: state.rejected.len(),
            rejected_before: state.rejected_before,
            rejected: state.rejected,
            finished: false,
        }
    }

    /// Images of the source that were dealt with: records and rejected ones, from the beginning of the job on.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// Where the dataset will lie.
    pub fn path(&self) -> &Path {
        &self.job.out
    }

    /// Records so far, in all files of the job.
    pub fn records(&self) -> u64 {
        self.done.iter().map(|file| file.records).sum::<u64>() + self.summary.records
    }

    /// Whether a record of `len` bytes belongs into the next shard: [`Writer::end_shard`] first, then.
    pub fn is_full(&self, len: usize) -> bool {
        let end = self.at.next_multiple_of(self.job.alignment.into()) + len as u64;
        self.summary.records > 0 && self.job.shard_size.is_some_and(|size| end > size)
    }

    /// Appends a record.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses, [`Error::Shape`] when raw bytes are not width x height x channels.
    pub fn append(&mut self, record: &NewRecord) -> Result<()> {
        let expected = match record.codec {
            Codec::Raw => usize::from(record.width) * usize::from(record.height) * usize::from(record.channels),
            Codec::Jpeg => record.bytes.len(),
        };
        let len = u32::try_from(record.bytes.len()).ok().filter(|_| record.bytes.len() == expected);
        let len = len.ok_or_else(|| Error::shape("dataset writer", "record bytes", expected, record.bytes.len()))?;
        self.pad(self.job.alignment.into())?;
        let entry = Entry {
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
        };
        self.put(&record.bytes)?;
        self.summary.add(&entry);
        self.pending.push(entry);
        self.consumed += 1;
        let due = self.at - self.noted >= self.job.segment || self.pending.len() >= SEGMENT_RECORDS;
        if due { self.note(None) } else { Ok(()) }
    }

    /// Notes that image `i` of the source could not be used.
    pub fn reject(&mut self, i: u64, rejected: Rejected) {
        self.rejected.push((i, rejected));
        self.consumed += 1;
    }

    /// All images rejected so far, with their number in the source.
    pub fn rejected(&self) -> &[(u64, Rejected)] {
        &self.rejected
    }

    /// Completes the current file and starts the next. `shuffle` is the seed of the order, if it was shuffled.
    ///
    /// # Errors
    /// As [`Writer::finish`].
    pub fn end_shard(&mut self, meta: &Meta, shuffle: Option<u64>) -> Result<()> {
        self.end_file(meta, shuffle)?;
        let path = self.job.file(self.done.len());
        let file = open_tmp(&path)?;
        file.set_len(0).map_err(Error::io("empty", &tmp_path(&path)))?;
        self.file = BufWriter::with_capacity(BUFFER, file);
        (self.at, self.noted, self.summary) = (0, 0, IndexSummary::default());
        self.put(&[0; HEADER_LEN])
    }

    /// Completes the last file and gives the dataset its name; returns the new files. Rejected images are added to those
    /// of `meta`.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses, [`Error::Format`] when there is no record.
    pub fn finish(mut self, meta: &Meta, shuffle: Option<u64>) -> Result<Vec<ShardRef>> {
        if self.summary.records > 0 || self.done.is_empty() {
            self.end_file(meta, shuffle)?;
        } else {
            // An earlier writer of the job was killed when all was written and only the end was missing.
            let tmp = tmp_path(&self.job.file(self.done.len()));
            fs::remove_file(&tmp).map_err(Error::io("remove", &tmp))?;
        }
        if self.job.is_sharded() {
            let base = self.job.base.as_ref();
            let mut shards = base.map_or(Vec::new(), |base| base.manifest.shards.clone());
            shards.extend(self.done.iter().cloned());
            if base.is_some_and(|base| base.single) {
                link_first_shard(&self.job.out)?;
            }
            self.publish_manifest(&Manifest::new(meta.classes.clone(), shards))?;
        }
        self.finished = true;
        fs::remove_file(self.journal.path()).map_err(Error::io("remove", self.journal.path()))?;
        Ok(std::mem::take(&mut self.done))
    }

    /// Stops, so that a later writer of the job can go on. Small beginnings (under a segment) are not kept.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk refuses; what was noted before stays.
    pub fn suspend(mut self) -> Result<()> {
        if self.frames > 0 { self.note(None) } else { Ok(()) }
    }

    /// In place of the dataset that is added to; otherwise there must be nothing yet, but perhaps this very manifest.
    fn publish_manifest(&self, manifest: &Manifest) -> Result<()> {
        let out = &self.job.out;
        let is_there = || out.is_file() && Manifest::read(out).is_ok_and(|there| there.as_ref() == Some(manifest));
        if self.job.base.is_none() && !is_there() {
            refuse_existing(out, self.job.force)?;
        }
        manifest.write(&tmp_path(out), out)
    }

    /// Forces everything to disk, then notes it in the journal.
    fn note(&mut self, done: Option<ShardRef>) -> Result<()> {
        let tmp = tmp_path(&self.job.file(self.done.len()));
        self.file.flush().map_err(Error::io("write", &tmp))?;
        // What nobody will go on with need not be safe before it is complete.
        let durable = self.job.id != JobId::default();
        if durable {
            self.file.get_ref().sync_data().map_err(Error::io("write", &tmp))?;
        }
        let head = FrameHead { consumed: self.consumed, shard_len: self.at, shard: self.shard(), entries: 0 };
        let notes = Notes { rejected: self.rejected[self.rejected_noted..].to_vec(), done };
        self.journal.commit(head, &self.pending, &notes, durable)?;
        self.rejected_noted = self.rejected.len();
        self.pending.clear();
        self.noted = self.at;
        self.frames += 1;
        Ok(())
    }

    /// Writes index, meta and header, then gives the file its name.
    fn end_file(&mut self, meta: &Meta, shuffle: Option<u64>) -> Result<()> {
        if self.summary.records == 0 {
            return Err(Error::format(&self.job.out, None, "not written: there is no record to store"));
        }
        self.note(None)?;
        self.pad(HEADER_LEN as u64)?;
        let payload = Section { offset: HEADER_LEN as u64, len: self.at - HEADER_LEN as u64 };
        let (index, index_crc, index_blake3, mut content) = self.put_index()?;
        let meta = self.with_rejected(meta);
        let text =
            serde_json::to_vec_pretty(&meta).map_err(|e| Error::io("encode meta of", &self.job.out)(e.into()))?;
        content.update(&text);
        let meta_section = Section { offset: self.at, len: text.len() as u64 };
        self.put(&text)?;
        let header = Header {
            magic: MAGIC,
            major: MAJOR,
            minor: MINOR,
            alignment: self.job.alignment,
            required_features: if self.summary.jpegs > 0 { JPEG_RECORDS } else { 0 },
            optional_features: if shuffle.is_some() { SHUFFLED } else { 0 },
            records: self.summary.records,
            file_len: self.at,
            payload,
            index,
            meta: meta_section,
            stride: self.summary.stride(self.job.alignment),
            max_record: self.summary.longest,
            classes: meta.classes.len() as u32,
            max_width: self.summary.widest,
            max_height: self.summary.highest,
            shard: self.shard(),
            shards: u32::from(!self.job.is_sharded()),
            reserved: 0,
            first_id: self.first_id(),
            shuffle_seed: shuffle.unwrap_or(0),
            uuid: content_uuid(&content).into_bytes(),
            index_crc,
            meta_crc: crc32c(&text),
            index_blake3,
            meta_blake3: *blake3::hash(&text).as_bytes(),
        };
        self.publish(&header)
    }

    /// `meta`, with the images rejected in the current file, in the order of the source.
    fn with_rejected(&self, meta: &Meta) -> Meta {
        let mut rejected: Vec<&(u64, Rejected)> = self.rejected[self.rejected_before..].iter().collect();
        rejected.sort_by_key(|(i, _)| *i);
        let mut meta = meta.clone();
        meta.rejected.extend(rejected.into_iter().map(|(_, rejected)| rejected.clone()));
        meta
    }

    /// Number of the current file among the shards of the dataset.
    fn shard(&self) -> u32 {
        let before = self.job.base.as_ref().map_or(0, |base| base.manifest.shards.len());
        (before + self.done.len()) as u32
    }

    /// Number of the current file's first record in the dataset.
    fn first_id(&self) -> u64 {
        let before = self.job.base.as_ref().map_or(0, |base| base.manifest.records);
        before + self.done.iter().map(|file| file.records).sum::<u64>()
    }

    /// Copies the index out of the journal. Returns its place, checksum, hash, and the hash that the UUID is made of.
    fn put_index(&mut self) -> Result<(Section, u32, [u8; 32], blake3::Hasher)> {
        let section = Section { offset: self.at, len: self.summary.records * ENTRY_LEN as u64 };
        let (mut crc, mut hash, mut content) = (Crc32c::default(), blake3::Hasher::new(), blake3::Hasher::new());
        content.update(&section.len.to_le_bytes());
        let tmp = tmp_path(&self.job.file(self.done.len()));
        let file = &mut self.file;
        self.journal.frames(self.first_frame, |frame, _| {
            let bytes = bytemuck::cast_slice(&frame.entries);
            crc.update(bytes);
            hash.update(bytes);
            content.update(bytes);
            file.write_all(bytes).map_err(Error::io("write", &tmp))
        })?;
        self.at += section.len;
        Ok((section, crc.finish(), *hash.finalize().as_bytes(), content))
    }

    /// Data to disk, header after it, a note that the file is complete, and the name last of all.
    fn publish(&mut self, header: &Header) -> Result<()> {
        let path = self.job.file(self.done.len());
        let tmp = tmp_path(&path);
        let result = self.file.flush().and_then(|()| {
            let file = self.file.get_ref();
            file.sync_data()?;
            file.write_all_at(&header.to_page(), 0)?;
            file.sync_all()
        });
        result.map_err(Error::io("write", &tmp))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let shard = ShardRef::new(name, header);
        self.note(Some(shard.clone()))?;
        refuse_existing(&path, self.job.force && !self.job.is_sharded())?;
        fs::rename(&tmp, &path).map_err(Error::io("rename to", &path))?;
        sync_folder(folder_of(&path))?;
        self.done.push(shard);
        self.first_frame = self.journal.end();
        self.rejected_before = self.rejected.len();
        Ok(())
    }

    fn pad(&mut self, alignment: u64) -> Result<()> {
        let missing = self.at.next_multiple_of(alignment) - self.at;
        self.put(&[0; HEADER_LEN][..missing as usize])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all(bytes);
        written.map_err(|e| Error::io("write", &tmp_path(&self.job.file(self.done.len())))(e))?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished && (self.frames == 0 || self.job.id == JobId::default()) {
            // Best effort: a leftover is harmless, the next run writes over it.
            let _ = fs::remove_file(tmp_path(&self.job.file(self.done.len())));
            let _ = fs::remove_file(self.journal.path());
        }
    }
}

/// What the journal of an unfinished job says: the state to go on from.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    pub done: Vec<ShardRef>,
    pub consumed: u64,
    pub frames: u64,
    pub at: u64,
    pub summary: IndexSummary,
    pub first_frame: u64,
    pub rejected: Vec<(u64, Rejected)>,
    pub rejected_before: usize,
}

/// Whether something unfinished is kept for the dataset at `out`.
pub fn is_unfinished(out: &Path) -> bool {
    journal_path(out).exists()
}

/// The complete files of an unfinished job at `out`, if there is one.
///
/// # Errors
/// [`Error::Io`]; [`Error::Config`] when another process is at work there.
pub fn noted_files(out: &Path) -> Result<Vec<ShardRef>> {
    if !is_unfinished(out) {
        return Ok(Vec::new());
    }
    super::resume::noted_files(&mut Journal::open(&journal_path(out))?)
}

/// The journal of the dataset at `out`.
fn journal_path(out: &Path) -> PathBuf {
    with_suffix(out, ".journal")
}

/// What a file is called while it is written.
pub(super) fn tmp_path(path: &Path) -> PathBuf {
    with_suffix(path, ".tmp")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn open_tmp(path: &Path) -> Result<File> {
    let tmp = tmp_path(path);
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&tmp).map_err(Error::io("create", &tmp))
}

/// A single file becomes the first shard of its own manifest: under both names at once, until the manifest takes the old one.
fn link_first_shard(out: &Path) -> Result<()> {
    let first = shard_path(out, 0);
    match fs::hard_link(out, &first) {
        // By an earlier attempt.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(Error::io("link to", &first)),
    }
}

fn unfinished_other(out: &Path) -> Error {
    let what = "an unfinished dataset from another source or with other options is kept there";
    Error::config(out.display().to_string(), what)
        .with_hint("run that command again to finish it, or add --restart to throw it away")
}

/// Fails when `out` cannot be the name of a new file.
pub fn refuse_existing(out: &Path, force: bool) -> Result<()> {
    let refuse = |what: String| Error::config(out.display().to_string(), what);
    let folder = folder_of(out);
    if !folder.is_dir() {
        return Err(refuse(format!("there is no folder {}", folder.display())));
    }
    match fs::symlink_metadata(out) {
        Ok(status) if status.is_dir() => {
            Err(refuse("is a folder; the output is one file".into()).with_hint("name it, for example train.ssds"))
        }
        Ok(_) if !force => Err(refuse("exists already".into()).with_hint("--force replaces it")),
        Ok(_) => match Manifest::read(out) {
            Ok(Some(manifest)) => Err(refuse(format!("is a dataset of {} shards", manifest.shards.len()))
                .with_hint("remove it and them first, or choose another name")),
            _ => Ok(()),
        },
        Err(_) => Ok(()),
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
