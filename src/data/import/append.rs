//! Adding to a dataset: what is there, and a source whose labels are made to fit it.

use std::path::Path;

use super::source::{Fault, Item, Source};
use super::store::Store;
use crate::data::dataset::Dataset;
use crate::data::manifest::{Manifest, ShardRef, shard_path};
use crate::data::writer::{Base, noted_files};
use crate::error::{Error, Result};

/// The dataset at `out`, to which images stored as `store` are to be added.
///
/// # Errors
/// Those of opening it; [`Error::Config`] when its images are stored otherwise.
pub fn base(out: &Path, store: Store) -> Result<Base> {
    let dataset = Dataset::open(out)?;
    let there = &dataset.shards()[0].meta().store;
    if *there != store.to_string() {
        let what = format!("{} is stored as {there}, not as {store}", out.display());
        return Err(Error::config("--append", what).with_hint(format!("--store {there}")));
    }
    if let Some(manifest) = Manifest::read(out)? {
        let manifest = without_noted(&dataset, manifest, &noted_files(out)?);
        return Ok(Base { manifest, single: false });
    }
    let first = shard_path(out, 0);
    let name = first.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let shards = vec![ShardRef::new(name, dataset.shards()[0].header())];
    Ok(Base { manifest: Manifest::new(dataset.classes().to_vec(), shards), single: true })
}

/// The manifest without shards that the journal knows: when a call is killed after the manifest was replaced and before the
/// journal was removed, the same call must find what it added to, or it would add the same again.
fn without_noted(dataset: &Dataset, manifest: Manifest, noted: &[ShardRef]) -> Manifest {
    let left = manifest.shards.len() - noted.len().min(manifest.shards.len());
    if noted.is_empty() || left == 0 || !manifest.shards.ends_with(noted) {
        return manifest;
    }
    // The newest shard has all classes of its time.
    let classes = dataset.shards()[left - 1].meta().classes.clone();
    Manifest::new(classes, manifest.shards[..left].to_vec())
}

/// A source with the class list of a dataset: its own classes take the numbers of the same names there, and new ones are
/// added behind them.
pub struct Relabelled<'a> {
    inner: &'a dyn Source,
    classes: Vec<String>,
    /// The new number of every class of `inner`.
    labels: Vec<u32>,
}

impl<'a> Relabelled<'a> {
    /// Gives `inner` the class list that begins with `classes`.
    pub fn new(inner: &'a dyn Source, classes: &[String]) -> Relabelled<'a> {
        let mut classes = classes.to_vec();
        let number = |name: &String| {
            let place = classes.iter().position(|class| class == name).unwrap_or_else(|| {
                classes.push(name.clone());
                classes.len() - 1
            });
            place as u32
        };
        let labels = inner.classes().iter().map(number).collect();
        Relabelled { inner, classes, labels }
    }
}

impl Source for Relabelled<'_> {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.inner.label(i).map(|label| self.labels[label as usize])
    }

    fn name(&self, i: usize) -> String {
        self.inner.name(i)
    }

    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        self.inner.read(i, buffer)
    }

    fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        self.inner.fingerprint(hasher);
    }
}
