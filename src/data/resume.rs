//! Finds out from a journal and the files beside it how much of an unfinished dataset is good.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::format::{Entry, HEADER_LEN, Header, IndexSummary, Section, crc32c};
use super::journal::{Frame, FrameHead, Journal};
use super::manifest::{ShardRef, shard_path};
use super::mapped::{Access, FileBytes};
use super::writer::{Recovered, tmp_path};
use crate::error::{Error, Result};

/// A frame without its entries.
struct Mark {
    end: u64,
    head: FrameHead,
    done: Option<ShardRef>,
}

/// The state to go on from, and the journal cut to it; `None` when there is nothing to go on with. `file` names the files
/// of the job.
///
/// # Errors
/// [`Error::Io`].
pub fn recover(journal: &mut Journal, out: &Path, file: impl Fn(usize) -> PathBuf) -> Result<Option<Recovered>> {
    let marks = marks(journal)?;
    let done: Vec<&ShardRef> = marks.iter().filter_map(|mark| mark.done.as_ref()).collect();
    for (i, shard) in done.iter().enumerate() {
        if !complete(&file(i), shard, i + 1 == done.len())? {
            return Ok(None);
        }
    }
    // The last frame whose records are on disk as it says. After a kill that is the last one; a power failure on a disk
    // that lies about what it has written, or another program's hand, may cost some.
    let mut good = marks.len();
    while let Some(mark) = marks[..good].last()
        && mark.done.is_none()
        && !holds(journal, &tmp_path(&file(done.len())), mark, marks[..good - 1].last())?
    {
        good -= 1;
    }
    if good == 0 {
        return Ok(None);
    }
    journal.truncate(marks[good - 1].end)?;
    tracing::info!("{}: going on after {} frames of its journal", out.display(), good);
    collect(journal).map(Some)
}

/// Removes the files of an unfinished job.
///
/// # Errors
/// [`Error::Io`].
pub fn discard(journal: &mut Journal, out: &Path) -> Result<()> {
    if journal.job()?.is_none() {
        return Ok(());
    }
    for Mark { head, done, .. } in marks(journal)? {
        // The next shard may have been begun, without a frame yet.
        for path in [out.to_path_buf(), shard_path(out, head.shard), shard_path(out, head.shard + 1)] {
            remove_if_there(&tmp_path(&path))?;
        }
        let Some(shard) = done else { continue };
        let path = out.with_file_name(&shard.file);
        // Only what is certainly the job's own; the dataset itself is not its to remove.
        if path != out && is_file(&path, &shard)? {
            remove_if_there(&path)?;
        }
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// The files that were noted as complete.
///
/// # Errors
/// [`Error::Io`].
pub fn noted_files(journal: &mut Journal) -> Result<Vec<ShardRef>> {
    Ok(marks(journal)?.into_iter().filter_map(|mark| mark.done).collect())
}

fn marks(journal: &mut Journal) -> Result<Vec<Mark>> {
    let mut marks = Vec::new();
    journal.frames(0, |frame, end| {
        marks.push(Mark { end, head: frame.head, done: frame.notes.done });
        Ok(())
    })?;
    Ok(marks)
}

/// Whether a file that was noted as complete is there. The last one may still wait for its name, and gets it.
fn complete(path: &Path, shard: &ShardRef, last: bool) -> Result<bool> {
    let tmp = tmp_path(path);
    if last && is_file(&tmp, shard)? {
        fs::rename(&tmp, path).map_err(Error::io("rename to", path))?;
        return Ok(true);
    }
    is_file(path, shard)
}

/// Whether the file at `path` is the one that `shard` names.
fn is_file(path: &Path, shard: &ShardRef) -> Result<bool> {
    if !path.is_file() {
        return Ok(false);
    }
    let bytes = FileBytes::open(path, Access::Pread)?;
    let page = Section { offset: 0, len: bytes.size().min(HEADER_LEN as u64) };
    let header = Header::parse(path, bytes.get(page, &mut Vec::new())?, bytes.size());
    Ok(header.is_ok_and(|header| ShardRef::new(shard.file.clone(), &header) == *shard))
}

/// Whether the records of a frame are in the file as it says.
fn holds(journal: &mut Journal, tmp: &Path, mark: &Mark, before: Option<&Mark>) -> Result<bool> {
    let long_enough = File::open(tmp).and_then(|file| file.metadata()).is_ok_and(|m| m.len() >= mark.head.shard_len);
    if !long_enough {
        return Ok(false);
    }
    let bytes = FileBytes::open(tmp, Access::Pread)?;
    let mut scratch = Vec::new();
    let mut whole = true;
    let mut check = |entry: &Entry| {
        let section = Section { offset: entry.offset, len: entry.len.into() };
        whole &= bytes.get(section, &mut scratch).is_ok_and(|record| crc32c(record) == entry.crc);
    };
    journal.frames(before.map_or(0, |before| before.end), |frame, end| {
        if end == mark.end {
            frame.entries.iter().for_each(&mut check);
        }
        Ok(())
    })?;
    Ok(whole)
}

/// Adds up all frames.
fn collect(journal: &mut Journal) -> Result<Recovered> {
    let mut state = Recovered::default();
    journal.frames(0, |Frame { head, entries, notes }, end| {
        state.consumed = head.consumed;
        state.frames += 1;
        state.at = head.shard_len;
        entries.iter().for_each(|entry| state.summary.add(entry));
        state.rejected.extend(notes.rejected);
        if let Some(shard) = notes.done {
            state.done.push(shard);
            (state.at, state.summary, state.first_frame) = (0, IndexSummary::default(), end);
            state.rejected_before = state.rejected.len();
        }
        Ok(())
    })?;
    Ok(state)
}
