//! IDX files (MNIST and its relatives), plain or gzipped: 8-bit grey images in one file, labels in another.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use super::source::{Fault, Item, Source};
use crate::data::decode::MAX_PIXELS;
use crate::error::{Error, Result};

const IMAGES_MAGIC: u32 = 0x0000_0803;
const LABELS_MAGIC: u32 = 0x0000_0801;
/// The most bytes a byte of deflate data can stand for.
const MAX_INFLATION: u64 = 1032;

/// The images, and perhaps labels, of a pair of IDX files.
#[derive(Debug)]
pub struct Idx {
    images: PathBuf,
    labels_path: Option<PathBuf>,
    pixels: Vec<u8>,
    labels: Option<Vec<u8>>,
    width: u16,
    height: u16,
    classes: Vec<String>,
}

/// Which files of a folder are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Split {
    /// `train-images-idx3-ubyte`.
    Train,
    /// `t10k-images-idx3-ubyte` or `test-images-idx3-ubyte`.
    Test,
}

impl Idx {
    /// Reads the images at `source`, a file or a folder with the usual names, and the labels that belong to them: those
    /// at `labels`, or else beside the images under the same name with `labels-idx1`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] when it is not clear which files are meant, [`Error::Format`] when one is damaged.
    pub fn open(source: &Path, labels: Option<&Path>, split: Option<Split>) -> Result<Idx> {
        let images = if source.is_dir() { find_images(source, split)? } else { source.to_path_buf() };
        let labels_path = labels.map(Path::to_path_buf).or_else(|| labels_beside(&images));
        let (dims, pixels) = read_idx::<3>(&images, IMAGES_MAGIC)?;
        let [count, height, width] = dims;
        let side = |name: &str, value: u32| {
            u16::try_from(value).ok().filter(|&v| v > 0).ok_or_else(|| {
                Error::format(
                    &images,
                    None,
                    format!("images of {width}x{height} pixels: the {name} must be 1 to 65535"),
                )
            })
        };
        let (width, height) = (side("width", width)?, side("height", height)?);
        if u64::from(width) * u64::from(height) > MAX_PIXELS {
            return Err(Error::format(&images, None, format!("images of {width}x{height} pixels are too large")));
        }
        if count == 0 {
            return Err(Error::format(&images, Some(4), "holds no images"));
        }
        let labels = labels_path.as_deref().map(|path| read_labels(path, count, &images)).transpose()?;
        let highest = labels.as_ref().and_then(|labels| labels.iter().max());
        let classes = highest.map_or(Vec::new(), |&last| (0..=last).map(|class| class.to_string()).collect());
        Ok(Idx { images, labels_path, pixels, labels, width, height, classes })
    }

    /// The file of the images.
    pub fn images(&self) -> &Path {
        &self.images
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
        self.pixels.len() / self.image_len()
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.labels.as_ref().map(|labels| labels[i].into())
    }

    fn name(&self, i: usize) -> String {
        format!("image {i}")
    }

    fn read<'a>(&'a self, i: usize, _: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        let pixels = &self.pixels[i * self.image_len()..][..self.image_len()];
        Ok(Item::Pixels { pixels, width: self.width, height: self.height, channels: 1 })
    }

    fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&self.pixels);
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
        let prefixes: &[&str] = if split == Split::Train { &["train"] } else { &["t10k", "test"] };
        names.retain(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)));
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
    let ([count], labels) = read_idx::<1>(path, LABELS_MAGIC)?;
    if count != images {
        let what = format!("{count} labels for the {images} images of {}", images_path.display());
        return Err(Error::format(path, Some(4), what).with_hint("the two files must belong together"));
    }
    Ok(labels)
}

/// Reads a whole file of unsigned bytes with `N` dimensions: magic, dimensions, exactly as many bytes as they say.
fn read_idx<const N: usize>(path: &Path, magic: u32) -> Result<([u32; N], Vec<u8>)> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let file_len = file.metadata().map_err(Error::io("look at", path))?.len();
    let mut head = Vec::new();
    (&mut file).take(2).read_to_end(&mut head).map_err(Error::io("read", path))?;
    let gzipped = head == [0x1f, 0x8b];
    let mut whole = head.chain(BufReader::with_capacity(1 << 16, file));
    if gzipped {
        let available = file_len.saturating_mul(MAX_INFLATION);
        return read_stream(path, magic, &mut MultiGzDecoder::new(whole), available);
    }
    read_stream(path, magic, &mut whole, file_len)
}

/// [`read_idx`] on the bytes themselves, of which there can be at most `available`.
fn read_stream<const N: usize>(
    path: &Path,
    magic: u32,
    stream: &mut dyn Read,
    available: u64,
) -> Result<([u32; N], Vec<u8>)> {
    let mut header = vec![0; 4 * (N + 1)];
    read_exactly(path, stream, &mut header, 0)?;
    let word = |i: usize| u32::from_be_bytes([0, 1, 2, 3].map(|b| header[4 * i + b]));
    if word(0) != magic {
        let what = format!(
            "not an IDX file of {N} dimensions and unsigned bytes: starts with {:08x}, not {magic:08x}",
            word(0)
        );
        return Err(Error::format(path, Some(0), what).with_hint("prepare takes a folder of images, or IDX files"));
    }
    let dims: [u32; N] = std::array::from_fn(|i| word(i + 1));
    let promised = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim.into()));
    // A lying header must not take memory: what the file cannot hold is refused before anything is allocated.
    let Some(len) = promised.filter(|&len| len <= available).and_then(|len| usize::try_from(len).ok()) else {
        let what = format!("its header promises {dims:?} bytes, more than the file can hold");
        return Err(Error::format(path, Some(4), what).with_hint("the file is cut or damaged"));
    };
    let mut data = vec![0; len];
    read_exactly(path, stream, &mut data, header.len() as u64)?;
    match stream.read(&mut [0]) {
        Ok(0) => Ok((dims, data)),
        Ok(_) => {
            Err(Error::format(path, Some((header.len() + len) as u64), "goes on behind the data its header promises"))
        }
        Err(e) => Err(unreadable(path, (header.len() + len) as u64, &e)),
    }
}

fn read_exactly(path: &Path, stream: &mut dyn Read, mut out: &mut [u8], mut at: u64) -> Result<()> {
    while !out.is_empty() {
        match stream.read(out) {
            Ok(0) => {
                let what = format!("ends {} bytes early", out.len());
                return Err(Error::format(path, Some(at), what).with_hint("the file is cut"));
            }
            Ok(n) => {
                out = &mut out[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(unreadable(path, at, &e)),
        }
    }
    Ok(())
}

/// An error in the middle of the data: of the disk, or of the compressed stream.
fn unreadable(path: &Path, at: u64, error: &std::io::Error) -> Error {
    let what = format!("cannot be read or unpacked from here (counted unpacked): {error}");
    Error::format(path, Some(at), what).with_hint("the file is cut or damaged")
}
