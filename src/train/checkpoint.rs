//! Checkpoints: one safetensors file each, holding every tensor of the run (weights, `momentum/<name>`, running statistics)
//! and the training state as JSON. They appear whole or not at all and carry a BLAKE3 checksum.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::atomic::sync_folder;
use crate::error::{Error, Result};
use crate::tensor::safetensors::{self, NamedTensors};
use crate::tensor::{HostTensor, TensorDesc};

const KIND: &str = "simsiam-checkpoint";
const VERSION: u32 = 1;

/// Writes a checkpoint to `path`, atomically. Returns once it is durable.
///
/// # Errors
/// [`Error::Io`] when it cannot be written.
pub fn save<S: Serialize>(path: &Path, tensors: &NamedTensors, state: &S) -> Result<()> {
    let state = serde_json::to_string(state).map_err(|e| Error::io("encode", path)(e.into()))?;
    let checksum = checksum(tensors, &state);
    let metadata = [("kind", KIND.into()), ("version", VERSION.to_string()), ("state", state), ("blake3", checksum)];
    let metadata = metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
    safetensors::write(path, tensors, &metadata)
}

/// Reads and verifies a checkpoint.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Unsupported`] when a newer version wrote it, [`Error::Format`] when it is
/// cut, altered or not a checkpoint.
pub fn load<S: DeserializeOwned>(path: &Path) -> Result<Checkpoint<S>> {
    let (tensors, metadata) = safetensors::read(path)?;
    verify(path, tensors, &metadata)
}

/// Whether a safetensors file with this metadata is a checkpoint.
pub fn is_checkpoint(metadata: &BTreeMap<String, String>) -> bool {
    metadata.get("kind").map(String::as_str) == Some(KIND)
}

/// The checkpoint that a safetensors file is, verified.
///
/// # Errors
/// As [`load`], but for reading.
pub fn verify<S: DeserializeOwned>(
    path: &Path,
    tensors: NamedTensors,
    metadata: &BTreeMap<String, String>,
) -> Result<Checkpoint<S>> {
    if !is_checkpoint(metadata) {
        return Err(Error::format(path, None, "a safetensors file, but not a checkpoint of this engine")
            .with_hint("pass a step-*.safetensors file of a run, or make a checkpoint of it with import --out"));
    }
    check_version(path, field(path, metadata, "version")?)?;
    let (state, stored) = (field(path, metadata, "state")?, field(path, metadata, "blake3")?);
    let actual = checksum(&tensors, state);
    if actual != stored {
        let what = format!("the content does not match its checksum: expected BLAKE3 {stored}, got {actual}");
        return Err(Error::format(path, None, what).with_hint("the file was damaged; use an older checkpoint"));
    }
    let state = serde_json::from_str(state)
        .map_err(|e| Error::format(path, None, format!("the training state cannot be read: {e}")))?;
    Ok(Checkpoint { path: path.to_path_buf(), tensors, state })
}

fn field<'a>(path: &Path, metadata: &'a BTreeMap<String, String>, key: &str) -> Result<&'a str> {
    let value = metadata.get(key).map(String::as_str);
    value.ok_or_else(|| Error::format(path, None, format!("checkpoint without the metadata entry \"{key}\"")))
}

fn check_version(path: &Path, version: &str) -> Result<()> {
    match version.parse::<u32>() {
        Ok(VERSION) => Ok(()),
        Ok(newer) if newer > VERSION => Err(Error::Unsupported {
            what: format!("{}: checkpoint format {newer}, this build reads up to {VERSION}", path.display()),
            hint: Some("use the newer simsiam-engine that wrote it".into()),
        }),
        _ => Err(Error::format(path, None, format!("checkpoint version: expected 1 to {VERSION}, got \"{version}\""))),
    }
}

/// Covers the state and, for each tensor in name order, name, description and data.
fn checksum(tensors: &NamedTensors, state: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(state.as_bytes());
    for (name, tensor) in tensors {
        hasher.update(format!("\n{name} {}\n", tensor.desc()).as_bytes());
        hasher.update(tensor.bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// A verified checkpoint in memory.
#[derive(Debug)]
pub struct Checkpoint<S> {
    path: PathBuf,
    tensors: NamedTensors,
    /// The training state.
    pub state: S,
}

impl<S> Checkpoint<S> {
    /// The file it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors not taken yet.
    pub fn tensors(&self) -> &NamedTensors {
        &self.tensors
    }

    /// The state and all tensors that were not taken.
    pub fn into_parts(self) -> (S, NamedTensors) {
        (self.state, self.tensors)
    }

    /// Moves the tensor `name` out, which must have the description `expected`.
    ///
    /// # Errors
    /// [`Error::Format`] when it is missing or has another shape or element type.
    pub fn take(&mut self, name: &str, expected: &TensorDesc) -> Result<HostTensor> {
        let fault = match self.tensors.remove(name) {
            Some(tensor) if tensor.desc() == expected => return Ok(tensor),
            Some(tensor) => format!("tensor {name}: expected {expected}, got {}", tensor.desc()),
            None => format!("tensor {name} is missing, expected {expected}"),
        };
        Err(self.other_network(fault))
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Leaves out the tensors whose names start with `prefix`.
    pub fn forget(&mut self, prefix: &str) {
        self.tensors.retain(|name, _| !name.starts_with(prefix));
    }

    /// Ends the loading.
    ///
    /// # Errors
    /// [`Error::Format`] when tensors are left that nobody took.
    pub fn finish(self) -> Result<()> {
        let Some(first) = self.tensors.keys().next() else { return Ok(()) };
        Err(self.other_network(format!("the network has no tensor {first} ({} such in all)", self.tensors.len())))
    }

    fn other_network(&self, what: String) -> Error {
        Error::format(&self.path, None, what)
            .with_hint("the checkpoint belongs to another network; use the architecture options of its run")
    }
}

/// The checkpoints of a run: files `step-<step>.safetensors` in one folder.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    keep_last: usize,
}

impl Checkpoints {
    /// The checkpoints in `folder`, which is created on the first save; `keep_last` of them are kept.
    ///
    /// # Errors
    /// [`Error::Config`] when `keep_last` is 0.
    pub fn new(folder: impl Into<PathBuf>, keep_last: usize) -> Result<Checkpoints> {
        if keep_last == 0 {
            return Err(Error::config("--keep-last", "expected at least 1 checkpoint to keep, got 0"));
        }
        Ok(Checkpoints { folder: folder.into(), keep_last })
    }

    /// The file of the checkpoint after `step` steps.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:08}.safetensors"))
    }

    /// Saves the checkpoint after `step` steps and, once it is durable, removes those of earlier steps beyond the last
    /// `keep_last` and temporaries of a killed process. Files of later steps (damaged ones that [`Checkpoints::latest`]
    /// passed over) are left alone.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written.
    pub fn save<S: Serialize>(&self, step: u64, tensors: &NamedTensors, state: &S) -> Result<PathBuf> {
        std::fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        let path = self.path(step);
        save(&path, tensors, state)?;
        self.prune(step)?;
        Ok(path)
    }

    /// The newest checkpoint that is whole, or nothing when the folder holds no checkpoint at all. Damaged newer ones are
    /// passed over with a warning in the log.
    ///
    /// # Errors
    /// The first fault when every checkpoint is damaged; [`Error::Unsupported`] when a newer version wrote the newest whole
    /// one; [`Error::Io`] when the folder or a file cannot be read.
    pub fn latest<S: DeserializeOwned>(&self) -> Result<Option<Checkpoint<S>>> {
        let mut newest_fault = None;
        for (_, path) in self.list()?.into_iter().rev() {
            match load(&path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(fault @ Error::Format { .. }) => {
                    tracing::warn!("{fault}; trying the checkpoint before it");
                    newest_fault.get_or_insert(fault);
                }
                Err(other) => return Err(other),
            }
        }
        newest_fault.map_or(Ok(None), Err)
    }

    /// Steps and files of all checkpoints, oldest first, whole or not.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder exists but cannot be read.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut steps: Vec<_> = self.files()?.into_iter().filter_map(|path| Some((step_of(&path)?, path))).collect();
        steps.sort();
        Ok(steps)
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        if !self.folder.exists() {
            return Ok(Vec::new());
        }
        let entries = std::fs::read_dir(&self.folder).and_then(|entries| entries.map(|e| Ok(e?.path())).collect());
        entries.map_err(Error::io("read", &self.folder))
    }

    fn prune(&self, step: u64) -> Result<()> {
        let mut past = self.list()?;
        past.retain(|(s, _)| *s <= step);
        past.truncate(past.len().saturating_sub(self.keep_last));
        let stale = self.files()?.into_iter().filter(|path| is_temporary(path));
        let surplus: Vec<_> = past.into_iter().map(|(_, path)| path).chain(stale).collect();
        for path in &surplus {
            std::fs::remove_file(path).map_err(Error::io("remove", path))?;
        }
        if surplus.is_empty() { Ok(()) } else { sync_folder(&self.folder) }
    }
}

fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    name.starts_with(".step-") && name.ends_with(".tmp")
}

fn step_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix("step-")?.strip_suffix(".safetensors")?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::tensor::DType;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct State {
        step: u64,
        seed: u64,
        best: f64,
        note: String,
    }

    fn state(step: u64) -> State {
        State { step, seed: u64::MAX, best: 0.1 + 0.2, note: "a \"quoted\" note".into() }
    }

    fn tensors(salt: f32) -> NamedTensors {
        let weight = HostTensor::from_f32([2, 3], &[salt, -1.5, 0.1, 4.0, f32::MIN_POSITIVE, 6.0]).unwrap();
        let counter = HostTensor::from_bytes(TensorDesc::new([], DType::I64), 40_i64.to_le_bytes().to_vec()).unwrap();
        let momentum = HostTensor::from_f32([2, 3], &[0.5; 6]).unwrap();
        let names = ["encoder.conv1.weight", "encoder.bn1.num_batches_tracked", "momentum/encoder.conv1.weight"];
        names.into_iter().map(String::from).zip([weight, counter, momentum]).collect()
    }

    #[test]
    fn round_trip_is_exact() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        save(&path, &tensors(2.0), &state(7)).unwrap();
        let mut loaded = load::<State>(&path).unwrap();
        assert_eq!((&loaded.state, loaded.tensors()), (&state(7), &tensors(2.0)));
        let first = std::fs::read(&path).unwrap();
        save(&path, &tensors(2.0), &state(7)).unwrap();
        assert_eq!(first, std::fs::read(&path).unwrap(), "equal runs give equal files");

        let desc = TensorDesc::new([2, 3], DType::F32);
        let weight = loaded.take("encoder.conv1.weight", &desc).unwrap();
        assert_eq!(weight, tensors(2.0)["encoder.conv1.weight"]);
        let missing = loaded.take("encoder.conv1.weight", &desc).unwrap_err().to_string();
        assert!(missing.contains("tensor encoder.conv1.weight is missing, expected f32[2, 3]"), "{missing}");
        let shape = loaded.take("momentum/encoder.conv1.weight", &TensorDesc::new([3, 2], DType::F32)).unwrap_err();
        assert!(shape.to_string().contains("expected f32[3, 2], got f32[2, 3]; hint"), "{shape}");
        let left = loaded.finish().unwrap_err().to_string();
        assert!(left.contains("the network has no tensor encoder.bn1.num_batches_tracked (1 such"), "{left}");
    }

    #[test]
    fn every_flipped_bit_and_cut_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        save(&path, &tensors(2.0), &state(7)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bytes).unwrap();
            // A flip in the padding of the header may turn one kind of white space into another: harmless.
            if let Ok(loaded) = load::<State>(&path) {
                assert_eq!((&loaded.state, loaded.tensors()), (&state(7), &tensors(2.0)), "bit flip at byte {at}");
                assert!(whole[at] == b' ', "bit flip at byte {at}");
            }
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(load::<State>(&path).is_err(), "cut at byte {at}");
        }
    }

    #[test]
    fn foreign_and_newer_files_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        let write = |entries: &[(&str, &str)]| {
            let metadata = entries.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            safetensors::write(&path, &tensors(1.0), &metadata).unwrap();
            load::<State>(&path).unwrap_err()
        };
        assert!(write(&[("format", "pt")]).to_string().contains("not a checkpoint of this engine"));
        let newer = write(&[("kind", KIND), ("version", "2")]);
        assert!(
            matches!(newer, Error::Unsupported { .. })
                && newer.to_string().contains("format 2, this build reads up to 1")
        );
        assert!(write(&[("kind", KIND), ("version", "one")]).to_string().contains("got \"one\""));
        assert!(
            write(&[("kind", KIND), ("version", "1")]).to_string().contains("without the metadata entry \"state\"")
        );

        save(&path, &tensors(1.0), &serde_json::json!({ "step": 3 })).unwrap();
        assert!(load::<State>(&path).unwrap_err().to_string().contains("missing field `seed`"));
    }

    #[test]
    fn keeps_the_last_and_finds_the_newest_whole_one() {
        let folder = tempfile::tempdir().unwrap();
        let runs = Checkpoints::new(folder.path().join("checkpoints"), 3).unwrap();
        assert!(runs.latest::<State>().unwrap().is_none());
        for step in [5, 100, 20, 123_456_789_012] {
            runs.save(step, &tensors(step as f32), &state(step)).unwrap();
        }
        let steps = |runs: &Checkpoints| runs.list().unwrap().into_iter().map(|(step, _)| step).collect::<Vec<_>>();
        assert_eq!(steps(&runs), [20, 100, 123_456_789_012]);
        assert!(runs.path(20).ends_with("step-00000020.safetensors"));
        assert_eq!(runs.latest::<State>().unwrap().unwrap().state, state(123_456_789_012));

        // The newest one is damaged: the one before is used, and saving goes on without losing good ones.
        std::fs::write(runs.path(123_456_789_012), b"torn").unwrap();
        assert_eq!(runs.latest::<State>().unwrap().unwrap().state, state(100));
        let tight = Checkpoints::new(folder.path().join("checkpoints"), 1).unwrap();
        tight.save(101, &tensors(1.0), &state(101)).unwrap();
        assert_eq!(steps(&tight), [101, 123_456_789_012]);
        assert_eq!(tight.latest::<State>().unwrap().unwrap().state, state(101));

        std::fs::write(runs.path(101), b"").unwrap();
        let message = runs.latest::<State>().unwrap_err().to_string();
        assert!(message.contains("step-123456789012.safetensors"), "the newest fault is told: {message}");
    }

    #[test]
    fn other_files_are_ignored_and_zero_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["step-x.safetensors", "step-3.safetensors.bak", ".step-00000009.safetensors.ab.tmp", "notes.txt"] {
            std::fs::write(folder.path().join(name), b"x").unwrap();
        }
        let runs = Checkpoints::new(folder.path(), 1).unwrap();
        assert!(runs.list().unwrap().is_empty());
        runs.save(4, &tensors(1.0), &state(4)).unwrap();
        let mut names: Vec<_> = runs.files().unwrap().iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        names.sort();
        let left = ["notes.txt", "step-00000004.safetensors", "step-3.safetensors.bak", "step-x.safetensors"];
        assert_eq!(names, left, "only the temporary goes");
        assert!(Checkpoints::new(folder.path(), 0).unwrap_err().to_string().contains("--keep-last"));
    }
}
