//! Which part of a source is meant: a split, some classes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::source::{Fault, Item, Source};
use crate::error::{Error, Result};

/// The part of a published set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Split {
    /// To train on.
    Train,
    /// To choose by while training.
    #[value(aliases = ["valid", "validation", "dev"])]
    Val,
    /// To measure on in the end.
    Test,
}

impl Split {
    const ALL: [Split; 3] = [Split::Train, Split::Val, Split::Test];

    /// What it is called in the names of files and folders.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Split::Train => &["train", "training"],
            Split::Val => &["val", "valid", "validation", "dev"],
            Split::Test => &["test", "testing", "t10k"],
        }
    }

    /// The split that a name speaks of, as "train-00000-of-00014.parquet" or "imagenet-val-3.tar".
    pub fn of_name(name: &str) -> Option<Split> {
        let name = name.to_lowercase();
        let mut words = name.split(|c: char| !c.is_alphanumeric());
        words.find_map(|word| Split::ALL.into_iter().find(|split| split.names().contains(&word)))
    }

    /// The folder of this split in `root`.
    pub fn folder(self, root: &Path) -> Option<PathBuf> {
        self.names().iter().map(|name| root.join(name)).find(|path| path.is_dir())
    }
}

/// The folders of splits in `root`, by name.
pub fn split_folders(root: &Path) -> Vec<String> {
    let found = Split::ALL.into_iter().filter_map(|split| split.folder(root)?.file_name()?.to_str().map(str::to_owned));
    found.collect()
}

/// The files of a set that is spread over several: those of `root`, or of one of the folders `below` it where `root` has
/// none, whose names `fits` likes, of the split that is asked for; in the order of their names.
///
/// # Errors
/// [`Error::Io`]; [`Error::Config`] when the split is missing, or there are several and none was chosen; [`Error::Format`]
/// when there is no such file.
pub fn shards(
    root: &Path,
    split: Option<Split>,
    below: &[&str],
    fits: fn(&str) -> bool,
    what: &str,
) -> Result<Vec<PathBuf>> {
    let folders = || below.iter().map(|name| root.join(name)).filter(|path| path.is_dir());
    for folder in [root.to_path_buf()].into_iter().chain(folders()) {
        if let Some(inner) = split.and_then(|split| split.folder(&folder)) {
            let names = list(&inner, fits)?;
            if !names.is_empty() {
                return Ok(names.iter().map(|name| inner.join(name)).collect());
            }
        }
        let names = list(&folder, fits)?;
        if !names.is_empty() {
            let names = of_split(&folder, names, split)?;
            return Ok(names.iter().map(|name| folder.join(name)).collect());
        }
        let inner = split_folders(&folder);
        let full = |name: &&String| list(&folder.join(name), fits).is_ok_and(|names| !names.is_empty());
        let full: Vec<&str> = inner.iter().filter(full).map(String::as_str).collect();
        if !full.is_empty() {
            return Err(not_chosen(&folder, split, &full.join(", ")));
        }
    }
    Err(Error::format(root, None, format!("no {what} in this folder")))
}

fn list(folder: &Path, fits: fn(&str) -> bool) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let entry = entry.map_err(Error::io("list", folder))?;
        let name = entry.file_name().into_string().ok().filter(|name| fits(name) && !name.starts_with('.'));
        names.extend(name.filter(|_| entry.path().is_file()));
    }
    names.sort();
    Ok(names)
}

/// The names of the split that is asked for.
fn of_split(folder: &Path, names: Vec<String>, split: Option<Split>) -> Result<Vec<String>> {
    let mut found: BTreeMap<Split, usize> = BTreeMap::new();
    for name in &names {
        if let Some(split) = Split::of_name(name) {
            *found.entry(split).or_default() += 1;
        }
    }
    let listed = found.iter().map(|(split, files)| format!("{} ({files} files)", split.names()[0]));
    let listed = listed.collect::<Vec<_>>().join(", ");
    match split {
        Some(split) if found.contains_key(&split) => {
            Ok(names.into_iter().filter(|name| Split::of_name(name) == Some(split)).collect())
        }
        None if found.len() < 2 => Ok(names),
        _ if found.is_empty() => {
            let what = format!("no file name in {} tells of a split: {}", folder.display(), some_of(&names));
            Err(Error::config("--split", what).with_hint("leave --split out, or name the file"))
        }
        _ => Err(not_chosen(folder, split, &listed)),
    }
}

/// The error when there are splits, but none or an absent one was asked for.
pub(super) fn not_chosen(folder: &Path, split: Option<Split>, found: &str) -> Error {
    match split {
        Some(split) => {
            let what = format!("{} has no {} split", folder.display(), split.names()[0]);
            Error::config("--split", what).with_hint(format!("it has: {found}"))
        }
        None => Error::config("--split", format!("{} holds several splits: {found}", folder.display()))
            .with_hint("choose with --split, or name the file"),
    }
}

fn some_of(names: &[String]) -> String {
    let more = if names.len() > 5 { ", ..." } else { "" };
    format!("{}{more}", names[..names.len().min(5)].join(", "))
}

/// Names from the command line: `a,b,c`, or `@FILE` with a name a line.
///
/// # Errors
/// [`Error::Io`], [`Error::Config`] when there is none, or one twice.
pub fn names(option: &str, text: &str) -> Result<Vec<String>> {
    let names = match text.strip_prefix('@') {
        Some(path) => return names_in(option, Path::new(path)),
        None => text.split(',').map(|name| name.trim().to_owned()).collect(),
    };
    distinct(option, names)
}

/// The lines of a file of names.
///
/// # Errors
/// As [`names`].
pub fn names_in(option: &str, path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    distinct(option, text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
}

fn distinct(option: &str, names: Vec<String>) -> Result<Vec<String>> {
    let mut seen = HashSet::new();
    if names.iter().all(String::is_empty) {
        return Err(Error::config(option, "names no class"));
    }
    match names.iter().find(|name| name.is_empty() || !seen.insert(name.as_str())) {
        None => Ok(names),
        Some(name) if name.is_empty() => Err(Error::config(option, "one of the names is empty")),
        Some(name) => Err(Error::config(option, format!("{name} is named twice"))),
    }
}

/// A source with other classes: some of its own, or its own under other names.
pub struct Subset {
    inner: Box<dyn Source>,
    classes: Vec<String>,
    /// New number of every class of `inner`.
    numbers: Vec<Option<u32>>,
    /// The images of `inner` that are left; `None` for all.
    images: Option<Vec<u32>>,
}

impl Subset {
    /// The images of the classes that `names` lists, numbered as they stand there.
    ///
    /// # Errors
    /// [`Error::Config`] when the source has no such class or none at all, or no image is left.
    pub fn of_classes(inner: Box<dyn Source>, names: Vec<String>) -> Result<Subset> {
        if inner.classes().is_empty() {
            return Err(Error::config("--classes", "the source has no labels"));
        }
        let known: HashMap<&str, usize> =
            inner.classes().iter().enumerate().map(|(i, name)| (name.as_str(), i)).collect();
        let mut numbers = vec![None; inner.classes().len()];
        for (number, name) in names.iter().enumerate() {
            let place = known.get(name.as_str()).ok_or_else(|| unknown(name, inner.classes()))?;
            numbers[*place] = Some(number as u32);
        }
        let wanted = |i: usize| inner.label(i).is_some_and(|label| numbers[label as usize].is_some());
        let images: Vec<u32> = (0..inner.len()).filter(|&i| wanted(i)).map(|i| i as u32).collect();
        if images.is_empty() {
            return Err(Error::config("--classes", format!("no image is of {}", some_of(&names))));
        }
        Ok(Subset { classes: names, numbers, images: Some(images), inner })
    }

    /// All images, of classes that are numbered so far and get these names.
    ///
    /// # Errors
    /// [`Error::Config`] when they have names, or there are too few.
    pub fn with_names(inner: Box<dyn Source>, names: Vec<String>) -> Result<Subset> {
        let classes = inner.classes();
        if classes.is_empty() {
            return Err(Error::config("--class-names", "the source has no labels"));
        }
        if let Some((_, name)) = classes.iter().enumerate().find(|(i, name)| i.to_string() != **name) {
            return Err(Error::config("--class-names", format!("the classes have names already, like {name}")));
        }
        if names.len() < classes.len() {
            let what = format!("{} names for {} classes", names.len(), classes.len());
            return Err(Error::config("--class-names", what).with_hint("one name a line, from class 0 on"));
        }
        let numbers = (0..classes.len() as u32).map(Some).collect();
        Ok(Subset { classes: names, numbers, images: None, inner })
    }

    fn place(&self, i: usize) -> usize {
        self.images.as_ref().map_or(i, |images| images[i] as usize)
    }
}

/// The error for a class that is not there, with those that are called much like it.
fn unknown(name: &str, classes: &[String]) -> Error {
    let mut near: Vec<(f64, &String)> = classes.iter().map(|class| (likeness(name, class), class)).collect();
    near.retain(|(score, _)| *score >= 0.7);
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    let near: Vec<&str> = near.iter().take(3).map(|(_, class)| class.as_str()).collect();
    let hint = match &near[..] {
        [] => format!("the source has {} classes: {}", classes.len(), some_of(classes)),
        near => format!("did you mean {}?", near.join(" or ")),
    };
    Error::config("--classes", format!("the source has no class {name}")).with_hint(hint)
}

fn likeness(a: &str, b: &str) -> f64 {
    strsim::jaro_winkler(&a.to_lowercase(), &b.to_lowercase())
}

impl Source for Subset {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        self.images.as_ref().map_or(self.inner.len(), Vec::len)
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.numbers[self.inner.label(self.place(i))? as usize]
    }

    fn name(&self, i: usize) -> String {
        self.inner.name(self.place(i))
    }

    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        self.inner.read(self.place(i), buffer)
    }

    fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        self.inner.fingerprint(hasher);
        for name in &self.classes {
            hasher.update(name.as_bytes()).update(&[0]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_of_splits_by_whole_words() {
        let cases = [
            ("train-00000-of-00014.parquet", Some(Split::Train)),
            ("imagenet1k-validation-03.tar", Some(Split::Val)),
            ("TEST.tar", Some(Split::Test)),
            ("trainset.tar", None),
            ("latest-0001.tar", None),
            ("shard-000.tar", None),
        ];
        for (name, split) in cases {
            assert_eq!(Split::of_name(name), split, "{name}");
        }
    }
}
