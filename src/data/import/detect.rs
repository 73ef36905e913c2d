//! What a source is, by what its files start with and are called.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::cifar::{self, Set};
use super::folder;
use super::idx;
use super::spool;
use super::webdataset::{is_pattern, is_tar_name};
use crate::error::{Error, Result};

/// Kinds of sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Find out.
    Auto,
    /// A folder of images, or of class folders of images.
    Folder,
    /// IDX files (MNIST and its relatives).
    Idx,
    /// CIFAR-10 or CIFAR-100, binary version.
    Cifar,
    /// WebDataset: tar files of samples.
    Webdataset,
    /// Parquet files with a column of images.
    Parquet,
}

impl Kind {
    /// What it is called in messages.
    pub fn title(self) -> &'static str {
        match self {
            Kind::Auto => "unknown",
            Kind::Folder => "a folder of images",
            Kind::Idx => "IDX files",
            Kind::Cifar => "CIFAR binary files",
            Kind::Webdataset => "WebDataset tar files",
            Kind::Parquet => "Parquet files",
        }
    }
}

/// Whether a file is named like a Parquet file.
pub fn is_parquet_name(name: &str) -> bool {
    name.to_lowercase().ends_with(".parquet")
}

/// Finds out what `source` is.
///
/// # Errors
/// [`Error::Io`]; [`Error::Config`] when a folder holds several kinds; [`Error::Format`] when it is none.
pub fn detect(source: &Path) -> Result<Kind> {
    if is_pattern(source) {
        return Ok(Kind::Webdataset);
    }
    let status = fs::metadata(source).map_err(Error::io("open", source))?;
    if status.is_dir() { detect_folder(source) } else { detect_file(source) }
}

fn detect_file(path: &Path) -> Result<Kind> {
    let mut head = start_of(File::open(path).map_err(Error::io("open", path))?, path)?;
    let len = fs::metadata(path).map_err(Error::io("look at", path))?.len();
    if len == 0 {
        return Err(Error::format(path, None, "is empty"));
    }
    if head.starts_with(&[0x1f, 0x8b]) {
        // One that cannot be unpacked is for its reader to refuse.
        head = start_of(spool::gunzip(path)?.0, path).unwrap_or_default();
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    Ok(match &head[..] {
        [b'P', b'A', b'R', b'1', ..] => Kind::Parquet,
        [0, 0, 8, 1 | 3, ..] => Kind::Idx,
        head if is_tar_head(head) => Kind::Webdataset,
        _ if idx::is_images_name(name) => Kind::Idx,
        _ if is_tar_name(name) => Kind::Webdataset,
        _ if is_parquet_name(name) => Kind::Parquet,
        _ if Set::of_file(path, len).is_some() => Kind::Cifar,
        _ => {
            let what = "is no Parquet, tar, IDX or CIFAR file by its first bytes, name or length";
            return Err(Error::format(path, None, what).with_hint(HINT));
        }
    })
}

const HINT: &str = "prepare takes a folder of images, IDX files, CIFAR binaries, WebDataset tar files and Parquet files; \
                    --source KIND says which, if it cannot be seen";

fn start_of(stream: impl Read, path: &Path) -> Result<Vec<u8>> {
    let mut head = Vec::with_capacity(512);
    stream.take(512).read_to_end(&mut head).map_err(Error::io("read", path))?;
    Ok(head)
}

/// Whether a file that starts so is a tar file: the mark of all but the oldest form, which has only the checksum.
fn is_tar_head(head: &[u8]) -> bool {
    let Ok(block) = <&[u8; 512]>::try_from(head) else { return false };
    let mut header = ::tar::Header::new_old();
    header.as_mut_bytes().copy_from_slice(block);
    let sum: u32 = block[..148].iter().chain(&block[156..]).map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
    &block[257..262] == b"ustar" || header.cksum().is_ok_and(|stored| stored == sum && block[0] != 0)
}

fn detect_folder(root: &Path) -> Result<Kind> {
    let mut kinds: Vec<(Kind, String)> = Vec::new();
    let mut note = |kind: Kind, name: &str| {
        if kinds.iter().all(|(known, _)| *known != kind) {
            kinds.push((kind, name.to_owned()));
        }
    };
    for entry in fs::read_dir(root).map_err(Error::io("list", root))? {
        let entry = entry.map_err(Error::io("list", root))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if entry.path().is_dir() {
            // Splits and Hugging Face's folders may hold files of any kind.
            if let Some(kind) = files_in(&entry.path())? {
                note(kind, &format!("{name}/"));
            }
        } else if let Some(kind) = kind_of_name(&name) {
            note(kind, &name);
        }
    }
    kinds.sort_by(|a, b| a.1.cmp(&b.1));
    match &kinds[..] {
        // It may still be one whose files have odd names, and can say best what is wrong.
        [] => Ok(Kind::Folder),
        [(kind, _)] => Ok(*kind),
        several => {
            let listed: Vec<String> = several.iter().map(|(kind, name)| format!("{} ({name})", kind.title())).collect();
            let what = format!("{} holds {}", root.display(), listed.join(" and "));
            Err(Error::config("--source", what).with_hint("say which is meant, as --source folder"))
        }
    }
}

/// What a folder inside the source holds, by the first file that tells.
fn files_in(folder: &Path) -> Result<Option<Kind>> {
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))?.take(1000) {
        let entry = entry.map_err(Error::io("list", folder))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        match kind_of_name(&name) {
            Some(kind @ (Kind::Webdataset | Kind::Parquet | Kind::Folder)) => return Ok(Some(kind)),
            _ if entry.path().is_dir() => return Ok(files_in_deeper(&entry.path())),
            _ => {}
        }
    }
    Ok(None)
}

fn files_in_deeper(folder: &Path) -> Option<Kind> {
    let names =
        fs::read_dir(folder).ok()?.flatten().take(1000).filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| kind_of_name(&name)).find(|kind| matches!(kind, Kind::Parquet | Kind::Folder))
}

fn kind_of_name(name: &str) -> Option<Kind> {
    if name.starts_with('.') {
        return None;
    }
    let tests: [(Kind, fn(&str) -> bool); 5] = [
        (Kind::Idx, idx::is_images_name),
        (Kind::Cifar, cifar::is_cifar_name),
        (Kind::Webdataset, is_tar_name),
        (Kind::Parquet, is_parquet_name),
        (Kind::Folder, folder::is_image_name),
    ];
    // The Python version of CIFAR; its reader says which one to get.
    if name == "data_batch_1" {
        return Some(Kind::Cifar);
    }
    tests.into_iter().find(|(_, fits)| fits(name)).map(|(kind, _)| kind)
}
