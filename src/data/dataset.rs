//! A dataset as its users see it: records by number, whether they lie in one file or in the shards of a manifest.

use std::path::{Path, PathBuf};

use super::format::{Entry, Header};
use super::manifest::{Manifest, ShardRef};
use super::mapped::{Access, check_fits};
use super::shard::{Record, Shard};
use crate::error::{Error, Result};

/// An open dataset. Cheap to share between threads; all methods take `&self`.
#[derive(Debug)]
pub struct Dataset {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Number of the first record of every shard, and after them of all records.
    starts: Vec<usize>,
    classes: Vec<String>,
    /// The records that it consists of, where that is not all of them.
    chosen: Option<Vec<usize>>,
}

impl Dataset {
    /// Opens a dataset file, or the manifest of several, and checks everything except the records themselves.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be opened, [`Error::Format`] when one is not whole and consistent, or not what the
    /// manifest says.
    pub fn open(path: &Path) -> Result<Dataset> {
        Dataset::open_with(path, Access::Map)
    }

    /// As [`Dataset::open`], reaching the bytes in the way given.
    ///
    /// # Errors
    /// As [`Dataset::open`]; [`Error::Unsupported`] when the dataset does not fit into memory and should.
    pub fn open_with(path: &Path, access: Access) -> Result<Dataset> {
        match Manifest::read(path)? {
            Some(manifest) => Dataset::of_manifest(path, manifest, access),
            None => {
                let shard = Shard::open(path, access)?;
                let (starts, classes) = (vec![0, shard.len()], shard.meta().classes.clone());
                Ok(Dataset { path: path.to_path_buf(), shards: vec![shard], starts, classes, chosen: None })
            }
        }
    }

    fn of_manifest(path: &Path, manifest: Manifest, access: Access) -> Result<Dataset> {
        let bytes = manifest.shards.iter().fold(0, |sum, shard| shard.bytes.saturating_add(sum));
        let access = access.resolve(bytes);
        if access == Access::Memory {
            // All of it, before the first shard is read.
            check_fits(path, bytes)?;
        }
        let mut starts = vec![0];
        let mut shards = Vec::with_capacity(manifest.shards.len());
        for (i, expected) in manifest.shards.iter().enumerate() {
            let shard = Shard::open(&path.with_file_name(&expected.file), access)?;
            let first = starts[i];
            check_shard(&shard, i, first, expected, &manifest.classes)?;
            starts.push(first + shard.len());
            shards.push(shard);
        }
        Ok(Dataset { path: path.to_path_buf(), shards, starts, classes: manifest.classes, chosen: None })
    }

    /// The dataset of these records alone, in this order: record `i` of it is what was record `records[i]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is none, or one that the dataset has not.
    pub fn select(mut self, records: &[usize]) -> Result<Dataset> {
        if records.is_empty() {
            return Err(Error::shape("dataset", "chosen records", "at least 1", 0));
        }
        let chosen = records.iter().map(|&i| self.number(i)).collect::<Result<_>>()?;
        self.chosen = Some(chosen);
        Ok(self)
    }

    /// Number of records, at least 1.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.chosen.as_ref().map_or(self.stored(), Vec::len)
    }

    /// Number of records in the files.
    fn stored(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Record `i`, after verifying its checksum. `scratch` is where its bytes are put when they have to be read.
    ///
    /// # Errors
    /// As [`Shard::record`].
    pub fn record<'a>(&'a self, i: usize, scratch: &'a mut Vec<u8>) -> Result<Record<'a>> {
        let (shard, i) = self.find(i)?;
        shard.record(i, scratch)
    }

    /// Index entry of record `i`: its sizes and label, without touching its bytes.
    ///
    /// # Errors
    /// As [`Shard::entry`].
    pub fn entry(&self, i: usize) -> Result<Entry> {
        let (shard, i) = self.find(i)?;
        shard.entry(i)
    }

    /// Label of record `i`, without touching its bytes.
    ///
    /// # Errors
    /// As [`Shard::entry`].
    pub fn label(&self, i: usize) -> Result<Option<u32>> {
        Ok(self.entry(i)?.label())
    }

    /// Asks the kernel to read record `i` ahead. A hint only: nothing fails when it is not taken.
    pub fn prefetch(&self, i: usize) {
        if let Ok((shard, i)) = self.find(i) {
            shard.prefetch(i);
        }
    }

    /// Class names; a label is a place in this list.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files the records lie in, at least one.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// How the bytes are reached: what [`Access::Auto`] came to, where it was asked for.
    pub fn access(&self) -> Access {
        self.shards[0].access()
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.header().file_len).sum()
    }

    /// Name of the content: that of the one file, or one derived from those of the shards and the choice of records.
    pub fn uuid(&self) -> uuid::Uuid {
        match (&self.shards[..], &self.chosen) {
            ([only], None) => uuid::Uuid::from_bytes(only.header().uuid),
            (shards, chosen) => {
                let mut hasher = blake3::Hasher::new();
                for shard in shards {
                    hasher.update(&shard.header().uuid);
                }
                for &record in chosen.iter().flatten() {
                    hasher.update(&(record as u64).to_le_bytes());
                }
                super::format::content_uuid(&hasher)
            }
        }
    }

    /// The shard that holds record `i`, and its number there.
    fn find(&self, i: usize) -> Result<(&Shard, usize)> {
        let i = self.number(i)?;
        let shard = self.starts.partition_point(|&start| start <= i) - 1;
        Ok((&self.shards[shard], i - self.starts[shard]))
    }

    /// The number in the files of record `i`.
    fn number(&self, i: usize) -> Result<usize> {
        if i >= self.len() {
            return Err(Error::shape("dataset", "record number", format!("below {}", self.len()), i));
        }
        Ok(self.chosen.as_ref().map_or(i, |chosen| chosen[i]))
    }
}

/// Whether a shard is the one the manifest means: number `i`, whose first record is number `first`.
fn check_shard(shard: &Shard, i: usize, first: usize, expected: &ShardRef, classes: &[String]) -> Result<()> {
    let Header { shard: number, first_id, .. } = *shard.header();
    let found = ShardRef::new(expected.file.clone(), shard.header());
    let fault =
        |what: String| Err(Error::format(shard.path(), None, what).with_hint("this file is from another dataset"));
    if found != *expected {
        return fault(format!(
            "holds {} records in {} bytes (uuid {}), but the manifest says {} in {} (uuid {})",
            found.records, found.bytes, found.uuid, expected.records, expected.bytes, expected.uuid
        ));
    }
    if (number as usize, first_id) != (i, first as u64) {
        return fault(format!(
            "is shard {number} from record {first_id} on, but stands in the place of shard {i}, record {first}"
        ));
    }
    if !classes.starts_with(&shard.meta().classes) {
        return fault("its class names are not those of the manifest".into());
    }
    Ok(())
}
