//! The manifest: several dataset files that are one dataset. A small JSON file beside its shards, written last and replaced
//! as a whole, so that a dataset changes from one complete state to the next.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::format::Header;
use crate::atomic::sync_folder;
use crate::error::{Error, Result};

/// The value of [`Manifest::format`].
pub const FORMAT: &str = "simsiam-engine dataset manifest";
/// The version this build reads and writes.
pub const VERSION: u32 = 1;
/// The longest manifest accepted.
pub const MAX_LEN: u64 = 64 << 20;

/// Several dataset files in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`]: tells this from other JSON files.
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Records in all.
    pub records: u64,
    /// Class names; a label is a place in this list. Those of every shard are a beginning of it.
    pub classes: Vec<String>,
    /// The files, in the order of their records.
    pub shards: Vec<ShardRef>,
}

/// What a manifest says of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRef {
    /// File name, in the folder of the manifest.
    pub file: String,
    /// Records in it.
    pub records: u64,
    /// Its length.
    pub bytes: u64,
    /// Its content's name.
    pub uuid: uuid::Uuid,
}

impl ShardRef {
    /// What the manifest says of the file called `file` with this header.
    pub fn new(file: String, header: &Header) -> ShardRef {
        let Header { records, file_len: bytes, .. } = *header;
        ShardRef { file, records, bytes, uuid: uuid::Uuid::from_bytes(header.uuid) }
    }
}

impl Manifest {
    /// A manifest of these shards.
    pub fn new(classes: Vec<String>, shards: Vec<ShardRef>) -> Manifest {
        let records = shards.iter().map(|shard| shard.records).sum();
        Manifest { format: FORMAT.into(), version: VERSION, records, classes, shards }
    }

    /// Reads the manifest at `path`; `None` when the file there is none, by its first byte.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] when it is a JSON file, but no manifest that makes sense.
    pub fn read(path: &Path) -> Result<Option<Manifest>> {
        let status = std::fs::metadata(path).map_err(Error::io("open", path))?;
        if !status.is_file() {
            return Ok(None);
        }
        let mut text = Vec::new();
        let file = File::open(path).map_err(Error::io("open", path))?;
        let mut limited = file.take(1);
        limited.read_to_end(&mut text).map_err(Error::io("read", path))?;
        if text != b"{" {
            return Ok(None);
        }
        limited.set_limit(MAX_LEN);
        limited.read_to_end(&mut text).map_err(Error::io("read", path))?;
        Manifest::parse(path, &text).map(Some)
    }

    /// The manifest with this text.
    ///
    /// # Errors
    /// [`Error::Format`] when it makes no sense.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Manifest> {
        let fault = |what: String| Error::format(path, None, what);
        let manifest: Manifest = serde_json::from_slice(text)
            .map_err(|e| fault(format!("not a dataset file, and as a manifest of dataset files it is broken: {e}")))?;
        if manifest.format != FORMAT {
            return Err(fault(format!("its format is {:?}, expected {FORMAT:?}", manifest.format)));
        }
        if manifest.version != VERSION {
            let what = format!("manifest version {}, but this build reads {VERSION}", manifest.version);
            return Err(fault(what).with_hint("update simsiam-engine"));
        }
        if manifest.shards.is_empty() {
            return Err(fault("names no shards".into()));
        }
        for shard in &manifest.shards {
            // A name with a path in it could lead anywhere.
            if Path::new(&shard.file).file_name().is_none_or(|name| name != shard.file.as_str()) {
                return Err(fault(format!("shard {:?} is not the name of a file beside the manifest", shard.file)));
            }
        }
        let sum = manifest.shards.iter().try_fold(0u64, |sum, shard| sum.checked_add(shard.records));
        if sum != Some(manifest.records) {
            return Err(fault(format!("says {} records, but its shards have another sum", manifest.records)));
        }
        Ok(manifest)
    }

    /// Writes it to `tmp`, then gives it the name `path`, in place of what was there. A `tmp` that a kill leaves behind is
    /// written over by the next attempt.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, tmp: &Path, path: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| Error::io("encode", path)(e.into()))?;
        text.push(b'\n');
        let written = File::create(tmp).and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        });
        written.map_err(Error::io("write", tmp))?;
        std::fs::rename(tmp, path).map_err(Error::io("rename to", path))?;
        sync_folder(path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")))
    }
}

/// The path of shard `i` of the manifest at `out`: "train.ssds" has "train-00000.ssds", "train-00001.ssds" and so on.
pub fn shard_path(out: &Path, i: u32) -> PathBuf {
    let mut name = out.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{i:05}"));
    if let Some(extension) = out.extension() {
        name.push(".");
        name.push(extension);
    }
    out.with_file_name(name)
}
