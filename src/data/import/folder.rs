//! A folder of images. With folders inside, each is a class and the order is that of torchvision's `ImageFolder`: classes by
//! name, then the folders below a class by path, then files by name. Without, the images have no labels.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::select::{Split, split_folders};
use super::source::{Fault, Item, Source};
use crate::data::decode::{SNIFF_LEN, sniff};
use crate::error::{Error, Result};

/// Names that claim to be images. Files so named are used, or listed as rejected; files of other names only when their first
/// bytes are those of an image.
const EXTENSIONS: [&str; 16] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm", "pnm", "heic", "avif",
    "jp2",
];

/// The images below a folder.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    classes: Vec<String>,
    /// Folders with images, relative to the root, and the class of what lies in them.
    folders: Vec<(PathBuf, Option<u32>)>,
    files: Vec<ImageFile>,
    /// The names of all files, one behind the other: of a million files each, no path has an allocation of its own.
    names: Vec<u8>,
    ignored: usize,
}

#[derive(Debug)]
struct ImageFile {
    folder: u32,
    name_len: u32,
    name_start: u64,
}

impl Folder {
    /// Lists the images below `root`, or below its folder of the split.
    ///
    /// # Errors
    /// [`Error::Io`] when a folder cannot be listed, [`Error::Format`] when there is no image or a class has no valid name,
    /// [`Error::Config`] when there is no such split.
    pub fn open(root: &Path, split: Option<Split>) -> Result<Folder> {
        let root = &match split {
            Some(split) => split.folder(root).ok_or_else(|| no_split(root, split))?,
            None => root.to_path_buf(),
        };
        let mut folder = Folder {
            root: root.clone(),
            classes: Vec::new(),
            folders: Vec::new(),
            files: Vec::new(),
            names: Vec::new(),
            ignored: 0,
        };
        let top = list(root)?;
        if top.folders.is_empty() {
            folder.add_files(PathBuf::new(), top.files, None);
        }
        for (label, name) in top.folders.iter().enumerate() {
            folder.classes.push(name.to_str().map(str::to_owned).ok_or_else(|| {
                Error::format(&root.join(name), None, "the name of this class folder is not valid UTF-8")
                    .with_hint("rename it")
            })?);
            folder.add_class(name, label as u32)?;
        }
        if folder.files.is_empty() {
            return Err(Error::format(root, None, "no image files in this folder or its class folders")
                .with_hint("expected FOLDER/CLASS/IMAGE files, or images directly in the folder"));
        }
        Ok(folder)
    }

    /// The folder that the paths of the images start from.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Files below the class folders that are no images by name or content.
    pub fn ignored(&self) -> usize {
        self.ignored
    }

    /// Classes without any image.
    pub fn empty_classes(&self) -> Vec<&str> {
        let used: HashSet<u32> = self.folders.iter().filter_map(|(_, label)| *label).collect();
        let unused = |label: &usize| !used.contains(&(*label as u32));
        (0..self.classes.len()).filter(unused).map(|label| self.classes[label].as_str()).collect()
    }

    fn add_class(&mut self, name: &OsStr, label: u32) -> Result<()> {
        let mut found = Vec::new();
        walk(&self.root, PathBuf::from(name), &mut Vec::new(), &mut found)?;
        // By the text of the path, as Python sorts: "a-b" comes before "a/b", unlike in the order of components.
        found.sort_by(|(a, _), (b, _)| a.as_os_str().cmp(b.as_os_str()));
        for (path, files) in found {
            self.add_files(path, files, Some(label));
        }
        Ok(())
    }

    fn add_files(&mut self, folder: PathBuf, names: Vec<OsString>, label: Option<u32>) {
        let (number, before) = (self.folders.len() as u32, self.files.len());
        for name in names {
            if is_candidate(&self.root.join(&folder).join(&name)) {
                let name = name.as_bytes();
                let (name_start, name_len) = (self.names.len() as u64, name.len() as u32);
                self.files.push(ImageFile { folder: number, name_len, name_start });
                self.names.extend_from_slice(name);
            } else {
                self.ignored += 1;
            }
        }
        if self.files.len() > before {
            self.folders.push((folder, label));
        }
    }

    /// Relative to the root.
    fn path(&self, i: usize) -> PathBuf {
        let file = &self.files[i];
        let name = &self.names[file.name_start as usize..][..file.name_len as usize];
        self.folders[file.folder as usize].0.join(OsStr::from_bytes(name))
    }
}

impl Source for Folder {
    fn kind(&self) -> &'static str {
        "folder"
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        self.files.len()
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.folders[self.files[i].folder as usize].1
    }

    fn name(&self, i: usize) -> String {
        self.path(i).to_string_lossy().into_owned()
    }

    /// A file that cannot be read ends the work: the disk or its rights need a look, and a resumed run takes it up here.
    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        let path = self.root.join(self.path(i));
        buffer.clear();
        match File::open(&path).and_then(|mut file| file.read_to_end(buffer)) {
            Ok(_) => Ok(Item::Encoded(buffer)),
            Err(_) if is_dangling(&path) => Err(Fault::Bad("a link to nowhere".into())),
            Err(e) => Err(Fault::Stop(Error::io("read", &path)(e))),
        }
    }

    /// By names: to look at every file of a large set takes minutes on a network disk.
    fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        hasher.update(self.root.as_os_str().as_bytes());
        for i in 0..self.len() {
            hasher.update(self.path(i).as_os_str().as_bytes()).update(&[0]);
        }
    }
}

fn no_split(root: &Path, split: Split) -> Error {
    let name = split.names()[0];
    let found = split_folders(root);
    let hint = match &found[..] {
        [] => format!("expected a folder {name} in it"),
        found => format!("it has: {}", found.join(", ")),
    };
    Error::config("--split", format!("{} has no {name} split", root.display())).with_hint(hint)
}

/// What lies directly in a folder, each list sorted by name.
struct Listing {
    folders: Vec<OsString>,
    files: Vec<OsString>,
}

fn list(path: &Path) -> Result<Listing> {
    let mut listing = Listing { folders: Vec::new(), files: Vec::new() };
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let entry = entry.map_err(Error::io("list", path))?;
        let mut kind = entry.file_type().map_err(Error::io("look at", path))?;
        if kind.is_symlink() {
            match fs::metadata(entry.path()) {
                Ok(target) => kind = target.file_type(),
                // Dangling: let it be listed as a file and rejected with the reason, if it is named like an image.
                Err(_) => {
                    listing.files.push(entry.file_name());
                    continue;
                }
            }
        }
        if kind.is_dir() {
            listing.folders.push(entry.file_name());
        } else if kind.is_file() {
            listing.files.push(entry.file_name());
        }
    }
    listing.folders.sort();
    listing.files.sort();
    Ok(listing)
}

/// Collects (folder, its files) for `folder` and all below it, following links. `above` holds the device and inode of every
/// folder on the way down, so that a link to one of them is found out.
fn walk(
    root: &Path,
    folder: PathBuf,
    above: &mut Vec<(u64, u64)>,
    found: &mut Vec<(PathBuf, Vec<OsString>)>,
) -> Result<()> {
    let path = root.join(&folder);
    let status = fs::metadata(&path).map_err(Error::io("look at", &path))?;
    let id = (status.dev(), status.ino());
    if above.contains(&id) {
        return Err(Error::format(&path, None, "links back to a folder it lies in"));
    }
    above.push(id);
    let listing = list(&path)?;
    for name in &listing.folders {
        walk(root, folder.join(name), above, found)?;
    }
    above.pop();
    found.push((folder, listing.files));
    Ok(())
}

fn is_dangling(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|status| status.is_symlink()) && !path.exists()
}

fn is_candidate(path: &Path) -> bool {
    // What macOS leaves beside a file on foreign disks: the name of an image, but no image.
    if path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"._")) {
        return false;
    }
    has_image_extension(path) || starts_like_image(path).unwrap_or(false)
}

/// Whether a file is named like an image.
pub fn is_image_name(name: &str) -> bool {
    has_image_extension(Path::new(name))
}

fn has_image_extension(path: &Path) -> bool {
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default().to_ascii_lowercase();
    EXTENSIONS.contains(&extension.as_str())
}

fn starts_like_image(path: &Path) -> std::io::Result<bool> {
    let mut head = Vec::with_capacity(SNIFF_LEN);
    File::open(path)?.take(SNIFF_LEN as u64).read_to_end(&mut head)?;
    Ok(sniff(&head).is_some())
}
