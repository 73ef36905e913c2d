//! IDX files (MNIST and its relatives), plain or gzipped: 8-bit grey images in one file, labels in another.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::blob::{self, Blob, Stamp};
use super::select::Split;
use super::source::{Fault, Item, Source};
use super::spool::{self, Spool};
use crate::data::decode::MAX_PIXELS;
use crate::error::{Error, Result};

const IMAGES_MAGIC: u32 = 0x0000_0803;
const LABELS_MAGIC: u32 = 0x0000_0801;
/// The most bytes a byte of deflate data can stand for.
const MAX_INFLATION: u64 = 1032;
const CHUNK: usize = 1 << 16;

/// The images, and perhaps labels, of a pair of IDX files.
#[derive(Debug)]
pub struct Idx {
    images: Blob,
    /// Where the first image starts in there.
    start: u64,
    count: usize,
    labels_path: Option<PathBuf>,
    labels: Option<Vec<u8>>,
    width: u16,
    height: u16,
    classes: Vec<String>,
}

impl Idx {
    /// Opens the images at `source`, a file or a folder with the usual names, and the labels that belong to them: those
    /// at `labels`, or else beside the images under the same name with `labels-idx1`. Images in a `.gz` are unpacked to a
    /// temporary file in `scratch`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] when it is not clear which files are meant, [`Error::Format`] when one is damaged.
    pub fn open(source: &Path, labels: Option<&Path>, split: Option<Split>, scratch: &Path) -> Result<Idx> {
        let path = if source.is_dir() { find_images(source, split)? } else { source.to_path_buf() };
        let labels_path = labels.map(Path::to_path_buf).or_else(|| labels_beside(&path));
        let packed = Packed::<3>::open(&path, IMAGES_MAGIC)?;
        let [count, height, width] = packed.dims;
        let side = |name: &str, value: u32| {
            u16::try_from(value).ok().filter(|&v| v > 0).ok_or_else(|| {
                Error::format(&path, None, format!("images of {width}x{height} pixels: the {name} must be 1 to 65535"))
            })
        };
        // An empty file is cut or too long as well, and that is told first.
        let (images, start) = packed.into_blob(&path, scratch)?;
        let (width, height) = (side("width", width)?, side("height", height)?);
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            return Err(Error::format(&path, None, format!("images of {width}x{height} pixels are too large")));
        }
        if count == 0 {
            return Err(Error::format(&path, Some(4), "holds no images"));
        }
        let labels = labels_path.as_deref().map(|labels| read_labels(labels, count, &path)).transpose()?;
        let highest = labels.as_ref().and_then(|labels| labels.iter().max());
        let classes = highest.map_or(Vec::new(), |&last| (0..=last).map(|class| class.to_string()).collect());
        Ok(Idx { images, start, count: count as usize, labels_path, labels, width, height, classes })
    }

    /// The file of the images.
    pub fn images(&self) -> &Path {
        self.images.path()
    }

    /// The file of the labels.
    pub fn labels(&self) -> Option<&Path> {
        self.labels_path.as_deref()
    }

    fn image_len(&self) -> usize {
        usize::from(self.width) * usize::from(self.height)
    }
}

impl Source for Idx {
    fn kind(&self) -> &'static str {
        "idx"
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        self.count
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.labels.as_ref().map(|labels| labels[i].into())
    }

    fn name(&self, i: usize) -> String {
        format!("image {i}")
    }

    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        let len = self.image_len();
        let pixels = self.images.read(self.start + i as u64 * len as u64, len, buffer)?;
        Ok(Item::Pixels { pixels, width: self.width, height: self.height, channels: 1 })
    }

    fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        self.images.fingerprint(hasher);
        hasher.update(self.labels.as_deref().unwrap_or_default());
    }
}

/// Whether a file is named like IDX images ("train-images-idx3-ubyte.gz", "train-images.idx3-ubyte").
pub fn is_images_name(name: &str) -> bool {
    let name = name.strip_suffix(".gz").unwrap_or(name);
    name.ends_with("images-idx3-ubyte") || name.ends_with("images.idx3-ubyte")
}

fn find_images(folder: &Path, split: Option<Split>) -> Result<PathBuf> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let name = entry.map_err(Error::io("list", folder))?.file_name();
        names.extend(name.into_string().ok().filter(|name| is_images_name(name)));
    }
    names.sort();
    if let Some(split) = split {
        names.retain(|name| Split::of_name(name) == Some(split));
    }
    // The plain file of a pair: sorted, it comes right before its .gz.
    names.dedup_by(|later, earlier| later.strip_suffix(".gz") == Some(earlier.as_str()));
    match &names[..] {
        [one] => Ok(folder.join(one)),
        [] => {
            let which = split.map_or(String::new(), |split| format!(" of the {split:?} split").to_lowercase());
            Err(Error::format(folder, None, format!("no IDX images{which} in this folder"))
                .with_hint("expected a file like train-images-idx3-ubyte.gz"))
        }
        [first, second, ..] => {
            Err(Error::config("--split", format!("the folder holds several sets of images: {first}, {second}"))
                .with_hint("choose with --split train or --split test, or name the file"))
        }
    }
}

/// The labels file that goes with an images file, where it exists.
fn labels_beside(images: &Path) -> Option<PathBuf> {
    let name = images.file_name()?.to_str()?;
    if !is_images_name(name) {
        return None;
    }
    let name = name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1");
    let plain = name.strip_suffix(".gz").unwrap_or(&name);
    let candidates = [name.clone(), plain.to_owned(), format!("{plain}.gz")];
    candidates.iter().map(|name| images.with_file_name(name)).find(|path| path.is_file())
}

fn read_labels(path: &Path, images: u32, images_path: &Path) -> Result<Vec<u8>> {
    let packed = Packed::<1>::open(path, LABELS_MAGIC)?;
    let [count] = packed.dims;
    let mut labels = Vec::new();
    packed.read(path, &mut |piece| {
        // Those of other images are only read to see that the file is whole, and not worth memory.
        labels.extend_from_slice(if count == images { piece } else { &[] });
        Ok(())
    })?;
    if count != images {
        let what = format!("{count} labels for the {images} images of {}", images_path.display());
        return Err(Error::format(path, Some(4), what).with_hint("the two files must belong together"));
    }
    Ok(labels)
}

/// A file of unsigned bytes with `N` dimensions, its header read and found possible.
struct Packed<const N: usize> {
    stream: Box<dyn Read>,
    stamp: Stamp,
    gzipped: bool,
    dims: [u32; N],
    /// Bytes that the header promises behind it.
    len: u64,
}

impl<const N: usize> Packed<N> {
    const HEADER: u64 = 4 * (N as u64 + 1);

    fn open(path: &Path, magic: u32) -> Result<Packed<N>> {
        let gzipped = spool::is_gzip(path)?;
        let (mut stream, stamp): (Box<dyn Read>, Stamp) = if gzipped {
            let (stream, stamp) = spool::gunzip(path)?;
            (Box::new(stream), stamp)
        } else {
            let (file, stamp) = blob::open(path)?;
            (Box::new(file), stamp)
        };
        let mut header = vec![0; Self::HEADER as usize];
        let missing = header.len() as u64;
        read_exactly(path, &mut stream, &mut header, 0, missing)?;
        let word = |i: usize| u32::from_be_bytes([0, 1, 2, 3].map(|b| header[4 * i + b]));
        if word(0) != magic {
            let what = format!(
                "not an IDX file of {N} dimensions and unsigned bytes: starts with {:08x}, not {magic:08x}",
                word(0)
            );
            return Err(Error::format(path, Some(0), what).with_hint("--source KIND says what else it may be"));
        }
        let dims: [u32; N] = std::array::from_fn(|i| word(i + 1));
        let available = stamp.len().saturating_mul(if gzipped { MAX_INFLATION } else { 1 });
        let promised = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim.into()));
        // A lying header must take neither memory nor disk: what the file cannot hold is refused first.
        let Some(len) = promised.filter(|&len| len <= available) else {
            let what = format!("its header promises {dims:?} bytes, more than the file can hold");
            return Err(Error::format(path, Some(4), what).with_hint("the file is cut or damaged"));
        };
        Ok(Packed { stream, stamp, gzipped, dims, len })
    }

    /// Hands the bytes that the header promises to `take`, piece by piece; there must be exactly so many.
    fn read(mut self, path: &Path, take: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        let mut left = self.len;
        while left > 0 {
            let piece = &mut chunk[..left.min(CHUNK as u64) as usize];
            read_exactly(path, &mut self.stream, piece, Self::HEADER + self.len - left, left)?;
            take(piece)?;
            left -= piece.len() as u64;
        }
        let end = Self::HEADER + self.len;
        match self.stream.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Error::format(path, Some(end), "goes on behind the data its header promises")),
            Err(e) => Err(spool::unreadable(path, end, &e)),
        }
    }

    /// The bytes to be read by position, and where they start: a plain file as it is, a packed one unpacked in `scratch`.
    fn into_blob(self, path: &Path, scratch: &Path) -> Result<(Blob, u64)> {
        if self.gzipped {
            let stamp = self.stamp;
            let mut spool = Spool::create(scratch)?;
            self.read(path, &mut |piece| spool.append(piece).map(drop))?;
            return Ok((spool.blob(path, stamp, 0), 0));
        }
        let end = Self::HEADER + self.len;
        match self.stamp.len() {
            len if len < end => Err(early(path, len, end - len)),
            len if len > end => Err(Error::format(path, Some(end), "goes on behind the data its header promises")),
            _ => Ok((Blob::open(path)?, Self::HEADER)),
        }
    }
}

/// Fills `out` with what follows at byte `at`, where `promised` bytes should follow.
fn read_exactly(path: &Path, stream: &mut dyn Read, out: &mut [u8], at: u64, promised: u64) -> Result<()> {
    let mut done = 0;
    while done < out.len() {
        match stream.read(&mut out[done..]) {
            Ok(0) => return Err(early(path, at + done as u64, promised - done as u64)),
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(spool::unreadable(path, at + done as u64, &e)),
        }
    }
    Ok(())
}

fn early(path: &Path, at: u64, missing: u64) -> Error {
    Error::format(path, Some(at), format!("ends {missing} bytes early")).with_hint("the file is cut")
}
