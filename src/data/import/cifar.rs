//! CIFAR-10 and CIFAR-100 in their binary form: one or two bytes of label, then the red, green and blue plane of 32 x 32.

use std::fs;
use std::path::{Path, PathBuf};

use super::blob::Blob;
use super::select::{Split, not_chosen};
use super::source::{Fault, Item, Source};
use crate::error::{Error, Result};

const SIDE: u16 = 32;
const PLANE: usize = SIDE as usize * SIDE as usize;
/// Records that are read at a time when the labels are gathered.
const SCAN: u64 = 256;

/// Which of the two sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Set {
    /// Ten classes, files `data_batch_1.bin` to `_5.bin` and `test_batch.bin`.
    Cifar10,
    /// A hundred classes in twenty groups, files `train.bin` and `test.bin`.
    Cifar100,
}

impl Set {
    fn title(self) -> &'static str {
        match self {
            Set::Cifar10 => "CIFAR-10",
            Set::Cifar100 => "CIFAR-100",
        }
    }

    /// Bytes of a record.
    fn record(self) -> usize {
        self.label_bytes() + 3 * PLANE
    }

    fn label_bytes(self) -> usize {
        match self {
            Set::Cifar10 => 1,
            Set::Cifar100 => 2,
        }
    }

    /// How many classes each byte of label chooses from.
    fn classes(self) -> &'static [u8] {
        match self {
            Set::Cifar10 => &[10],
            Set::Cifar100 => &[20, 100],
        }
    }

    fn split_of(self, name: &str) -> Option<Split> {
        match (self, name) {
            (Set::Cifar10, "test_batch.bin") | (Set::Cifar100, "test.bin") => Some(Split::Test),
            (Set::Cifar100, "train.bin") => Some(Split::Train),
            (Set::Cifar10, _) => {
                let number = name.strip_prefix("data_batch_")?.strip_suffix(".bin")?;
                ["1", "2", "3", "4", "5"].contains(&number).then_some(Split::Train)
            }
            _ => None,
        }
    }

    /// The set that a file of this name belongs to.
    fn of_name(name: &str) -> Option<Set> {
        [Set::Cifar10, Set::Cifar100].into_iter().find(|set| set.split_of(name).is_some())
    }

    /// The set that a file of this name and length can be a part of.
    pub fn of_file(path: &Path, len: u64) -> Option<Set> {
        let by_name = path.file_name().and_then(|name| name.to_str()).and_then(Set::of_name);
        let fits = |set: &Set| len > 0 && len.is_multiple_of(set.record() as u64);
        let by_length = || match [Set::Cifar10, Set::Cifar100].map(|set| fits(&set)) {
            [true, false] => Some(Set::Cifar10),
            [false, true] => Some(Set::Cifar100),
            _ => None,
        };
        by_name.or_else(by_length)
    }
}

/// Images of CIFAR-10 or CIFAR-100.
#[derive(Debug)]
pub struct Cifar {
    set: Set,
    coarse: bool,
    files: Vec<Blob>,
    /// Image with which each file starts.
    starts: Vec<usize>,
    labels: Vec<u8>,
    classes: Vec<String>,
}

impl Cifar {
    /// Opens the files at `source`: one, or those of a split in a folder. `coarse` takes the twenty groups of CIFAR-100 for
    /// labels instead of its hundred classes.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] when it is not clear which files are meant, [`Error::Format`] when one is damaged.
    pub fn open(source: &Path, split: Option<Split>, coarse: bool) -> Result<Cifar> {
        let (set, paths) =
            if source.is_dir() { find(source, split)? } else { (file_set(source)?, vec![source.into()]) };
        if coarse && set == Set::Cifar10 {
            return Err(Error::config("--coarse-labels", "CIFAR-10 has no groups of classes; CIFAR-100 has"));
        }
        let folder = paths.first().and_then(|path: &PathBuf| path.parent()).unwrap_or(Path::new(""));
        let classes = class_names(folder, set, coarse)?;
        let mut cifar = Cifar { set, coarse, files: Vec::new(), starts: Vec::new(), labels: Vec::new(), classes };
        for path in &paths {
            cifar.add(path)?;
        }
        Ok(cifar)
    }

    /// "CIFAR-10" or "CIFAR-100".
    pub fn title(&self) -> &'static str {
        self.set.title()
    }

    /// The files, in the order of the images.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(Blob::path)
    }

    /// Checks a file and gathers its labels.
    fn add(&mut self, path: &Path) -> Result<()> {
        let blob = Blob::open(path)?;
        let record = self.set.record() as u64;
        let count = blob.len() / record;
        if blob.len() % record != 0 || count == 0 {
            let what = format!("{} bytes are no number of {} records of {record} bytes", blob.len(), self.set.title());
            return Err(Error::format(path, Some(count * record), what).with_hint("the file is cut or damaged"));
        }
        self.starts.push(self.labels.len());
        let mut chunk = Vec::new();
        for first in (0..count).step_by(SCAN as usize) {
            let records = SCAN.min(count - first);
            blob.read(first * record, (records * record) as usize, &mut chunk)?;
            for (i, bytes) in chunk.chunks_exact(record as usize).enumerate() {
                self.add_label(path, first + i as u64, bytes)?;
            }
        }
        self.files.push(blob);
        Ok(())
    }

    fn add_label(&mut self, path: &Path, number: u64, record: &[u8]) -> Result<()> {
        let limits = self.set.classes();
        for (byte, (&label, &limit)) in record.iter().zip(limits).enumerate() {
            if label >= limit {
                let at = number * record.len() as u64 + byte as u64;
                let what = format!("record {number} has label {label}, expected 0 to {}", limit - 1);
                let hint = format!("the file is damaged, or not of {}", self.set.title());
                return Err(Error::format(path, Some(at), what).with_hint(hint));
            }
        }
        self.labels.push(if self.coarse { record[0] } else { record[limits.len() - 1] });
        Ok(())
    }

    /// The file of image `i`, and its place in there.
    fn place(&self, i: usize) -> (&Blob, usize) {
        let file = self.starts.partition_point(|&start| start <= i) - 1;
        (&self.files[file], i - self.starts[file])
    }
}

impl Source for Cifar {
    fn kind(&self) -> &'static str {
        match self.set {
            Set::Cifar10 => "cifar10",
            Set::Cifar100 => "cifar100",
        }
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn label(&self, i: usize) -> Option<u32> {
        Some(self.labels[i].into())
    }

    fn name(&self, i: usize) -> String {
        let (file, number) = self.place(i);
        format!("{} record {number}", file.path().file_name().unwrap_or_default().to_string_lossy())
    }

    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        let (file, number) = self.place(i);
        let mut record = [0; 2 + 3 * PLANE];
        let record = &mut record[..self.set.record()];
        file.read_at((number * record.len()) as u64, record)?;
        let (red, rest) = record[self.set.label_bytes()..].split_at(PLANE);
        let (green, blue) = rest.split_at(PLANE);
        buffer.resize(3 * PLANE, 0);
        for (p, pixel) in buffer.chunks_exact_mut(3).enumerate() {
            pixel.copy_from_slice(&[red[p], green[p], blue[p]]);
        }
        Ok(Item::Pixels { pixels: buffer, width: SIDE, height: SIDE, channels: 3 })
    }

    fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&[self.coarse.into()]);
        for file in &self.files {
            file.fingerprint(hasher);
        }
    }
}

fn file_set(path: &Path) -> Result<Set> {
    let len = fs::metadata(path).map_err(Error::io("open", path))?.len();
    Set::of_file(path, len).ok_or_else(|| {
        let sizes = format!("{} (CIFAR-10) or {} (CIFAR-100)", Set::Cifar10.record(), Set::Cifar100.record());
        Error::format(path, None, format!("neither its name nor its {len} bytes tell which CIFAR set it is of"))
            .with_hint(format!("records have {sizes} bytes; the published names are data_batch_1.bin, train.bin, ..."))
    })
}

/// Whether the files of a folder make it one of CIFAR.
pub fn is_cifar_name(name: &str) -> bool {
    Set::of_name(name).is_some()
}

/// The files of a folder, in the published order.
fn find(folder: &Path, split: Option<Split>) -> Result<(Set, Vec<PathBuf>)> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let name = entry.map_err(Error::io("list", folder))?.file_name();
        names.extend(name.into_string());
    }
    names.sort();
    let of = |set: Set| names.iter().filter_map(move |name| Some((set.split_of(name)?, name))).collect::<Vec<_>>();
    let (set, mut found) = match (of(Set::Cifar10), of(Set::Cifar100)) {
        (files, none) if !files.is_empty() && none.is_empty() => (Set::Cifar10, files),
        (none, files) if !files.is_empty() && none.is_empty() => (Set::Cifar100, files),
        (none, _) if none.is_empty() => return Err(no_files(folder, &names)),
        _ => {
            return Err(Error::format(folder, None, "holds files of both CIFAR-10 and CIFAR-100")
                .with_hint("name the file, or put each set in a folder of its own"));
        }
    };
    let mut splits: Vec<Split> = found.iter().map(|(split, _)| *split).collect();
    splits.dedup();
    match split {
        Some(split) => found.retain(|(of, _)| *of == split),
        None if splits.len() > 1 => found.clear(),
        None => {}
    }
    if found.is_empty() {
        let listed = splits.iter().map(|split| split.names()[0]).collect::<Vec<_>>().join(", ");
        return Err(not_chosen(folder, split, &listed));
    }
    Ok((set, found.iter().map(|(_, name)| folder.join(name)).collect()))
}

fn no_files(folder: &Path, names: &[String]) -> Error {
    let error = Error::format(folder, None, "no CIFAR files (data_batch_1.bin, train.bin, ...) in this folder");
    match names.iter().any(|name| name == "data_batch_1" || name == "train") {
        true => error.with_hint("this looks like the Python version of CIFAR; get the binary version"),
        false => error,
    }
}

/// The names of the classes in the file that comes with the set, or numbers.
fn class_names(folder: &Path, set: Set, coarse: bool) -> Result<Vec<String>> {
    let (name, count) = match (set, coarse) {
        (Set::Cifar10, _) => ("batches.meta.txt", 10),
        (Set::Cifar100, false) => ("fine_label_names.txt", 100),
        (Set::Cifar100, true) => ("coarse_label_names.txt", 20),
    };
    let path = folder.join(name);
    if !path.is_file() {
        return Ok((0..count).map(|class| class.to_string()).collect());
    }
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let names: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if names.len() != count {
        return Err(Error::format(&path, None, format!("{} names, expected {count}", names.len())));
    }
    Ok(names)
}
