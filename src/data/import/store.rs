//! How images are stored: the step from what a source holds to a record of the dataset file.

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use super::source::{Fault, Item, Source};
use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress_optimized};

use crate::data::decode::{DecodeOptions, Decoder, ImageRef, RESIZER, Resizer, is_grey_jpeg, sniff};
use crate::data::format::{Codec, crc32c};
use crate::data::writer::NewRecord;

/// The quality of a JPEG made in place of an original that is none, and of one made smaller. The first loses next to nothing
/// and keeps the chroma whole, the second is what photographs usually have.
const KEPT: (u8, Subsampling) = (95, Subsampling::S444);
const REDUCED: (u8, Subsampling) = (90, Subsampling::S420);

/// The form in which images are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Pixels, in the size they come in.
    Native,
    /// Pixels, stretched to a square of this side. The size before is kept, so that crops can be drawn in the original
    /// geometry.
    Square(u16),
    /// JPEG files. An original that is one keeps its bytes, all of them; any other picture is encoded at quality 95.
    Jpeg,
    /// JPEG files whose shorter side is at most this. An original that is one and no larger keeps its bytes; any other picture
    /// is encoded at quality 90, made smaller where it is larger.
    JpegReduced(u16),
}

impl Store {
    /// What record offsets are multiples of: whole pages where every record fills whole pages, cache lines otherwise.
    pub fn alignment(self) -> u32 {
        match self {
            Store::Square(side) if (u32::from(side) * u32::from(side) * 3).is_multiple_of(4096) => 4096,
            _ => 64,
        }
    }

    /// What resizes and encodes the images, with versions, for the meta text.
    pub fn made_with(self) -> String {
        let encoder = |quality: u8, sampling: &str| format!("libjpeg-turbo-rs 0.9 JPEG quality {quality} {sampling}");
        match self {
            Store::Native => "none".into(),
            Store::Square(_) => RESIZER.into(),
            Store::Jpeg => encoder(KEPT.0, "4:4:4"),
            Store::JpegReduced(_) => format!("{RESIZER}, {}", encoder(REDUCED.0, "4:2:0")),
        }
    }
}

/// Bytes of finished records that may wait for the writer: what is decoded while it forces a segment to disk.
const WAITING: usize = 64 << 20;

impl Store {
    /// Images that `threads` threads may be ahead of the writer.
    pub fn window(self, threads: usize) -> usize {
        match self {
            Store::Square(side) => (WAITING / (3 * usize::from(side).pow(2))).clamp(4 * threads, 256 * threads),
            // Of any size, so few.
            _ => 4 * threads,
        }
    }
}

impl FromStr for Store {
    type Err = String;

    fn from_str(text: &str) -> Result<Store, String> {
        let (kind, side) = text.split_once(':').map_or((text, None), |(kind, side)| (kind, Some(side)));
        let side = side.map(|side| side.parse().ok().filter(|side| (1..=8192).contains(side)));
        match (kind, side) {
            ("raw", None) => Ok(Store::Native),
            ("raw", Some(Some(side))) => Ok(Store::Square(side)),
            ("raw256", None) => Ok(Store::Square(256)),
            ("jpeg", None) => Ok(Store::Jpeg),
            ("jpeg", Some(Some(side))) => Ok(Store::JpegReduced(side)),
            _ => Err("expected raw:SIDE (as raw:256), raw, jpeg:SIDE or jpeg, with a side of 1 to 8192".into()),
        }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Store::Native => write!(f, "raw"),
            Store::Square(side) => write!(f, "raw:{side}"),
            Store::Jpeg => write!(f, "jpeg"),
            Store::JpegReduced(side) => write!(f, "jpeg:{side}"),
        }
    }
}

/// Makes records one after the other, and keeps its buffers.
#[derive(Debug)]
struct Maker {
    options: DecodeOptions,
    bytes: Vec<u8>,
    decoder: Decoder,
    resizer: Resizer,
}

/// Makes the record of image `i` of `source`, which is decoded whatever is stored: a bad image is found now, not in training.
///
/// # Errors
/// As [`Source::read`]; [`Fault::Bad`] when it cannot be decoded.
pub fn record(source: &dyn Source, i: usize, store: Store, options: DecodeOptions) -> Result<NewRecord, Fault> {
    thread_local! {
        static MAKER: RefCell<Option<Maker>> = const { RefCell::new(None) };
    }
    MAKER.with_borrow_mut(|maker| {
        if maker.as_ref().is_none_or(|maker| maker.options != options) {
            *maker = None;
        }
        maker.get_or_insert_with(|| Maker::new(options)).record(source, i, store)
    })
}

impl Maker {
    fn new(options: DecodeOptions) -> Maker {
        Maker { options, bytes: Vec::new(), decoder: Decoder::new(options), resizer: Resizer::default() }
    }

    fn record(&mut self, source: &dyn Source, i: usize, store: Store) -> Result<NewRecord, Fault> {
        let (image, file) = match source.read(i, &mut self.bytes)? {
            Item::Encoded(bytes) => (self.decoder.decode(bytes)?, Some(bytes)),
            Item::Pixels { pixels, width, height, channels } => (ImageRef { pixels, width, height, channels }, None),
        };
        let jpeg = file.filter(|bytes| sniff(bytes) == Some(image::ImageFormat::Jpeg));
        let resizer = &mut self.resizer;
        let (stored, codec, bytes) = match (store, jpeg) {
            (Store::Native, _) => (image, Codec::Raw, image.pixels.to_vec()),
            (Store::Square(side), _) => {
                let stretched = resizer.resize(image, side, side)?;
                (stretched, Codec::Raw, stretched.pixels.to_vec())
            }
            (Store::Jpeg, Some(jpeg)) => original(image, jpeg),
            (Store::Jpeg, None) => encode(image, KEPT)?,
            (Store::JpegReduced(side), Some(jpeg)) if image.width.min(image.height) <= side => original(image, jpeg),
            (Store::JpegReduced(side), _) => encode(reduce(image, side, resizer)?, REDUCED)?,
        };
        Ok(NewRecord {
            crc: crc32c(&bytes),
            bytes,
            codec,
            width: stored.width,
            height: stored.height,
            channels: stored.channels,
            original_width: image.width,
            original_height: image.height,
            label: source.label(i),
        })
    }
}

/// The record of a JPEG file as it is.
fn original<'a>(image: ImageRef<'a>, jpeg: &[u8]) -> (ImageRef<'a>, Codec, Vec<u8>) {
    let channels = if is_grey_jpeg(jpeg) { 1 } else { 3 };
    (ImageRef { channels, ..image }, Codec::Jpeg, jpeg.to_vec())
}

/// Encodes as JPEG: grey where every pixel is.
fn encode<'a>(
    image: ImageRef<'a>,
    (quality, subsampling): (u8, Subsampling),
) -> Result<(ImageRef<'a>, Codec, Vec<u8>), String> {
    let (width, height) = (image.width.into(), image.height.into());
    let rgb = image.channels == 3;
    let grey = !rgb || image.pixels.chunks_exact(3).all(|p| p[0] == p[1] && p[1] == p[2]);
    let result = if grey {
        let first: Vec<u8> = image.pixels.iter().copied().step_by(image.channels.into()).collect();
        compress_optimized(&first, width, height, PixelFormat::Grayscale, quality, subsampling)
    } else {
        compress_optimized(image.pixels, width, height, PixelFormat::Rgb, quality, subsampling)
    };
    let bytes = result.map_err(|e| format!("cannot be encoded as JPEG: {e}"))?;
    Ok((ImageRef { channels: if grey { 1 } else { 3 }, ..image }, Codec::Jpeg, bytes))
}

/// Makes the shorter side `side`, where it is longer, and the other as torchvision's Resize does.
fn reduce<'a>(image: ImageRef<'a>, side: u16, resizer: &'a mut Resizer) -> Result<ImageRef<'a>, String> {
    let short = image.width.min(image.height);
    if short <= side {
        return Ok(image);
    }
    let scaled = |length: u16| (u32::from(length) * u32::from(side) / u32::from(short)) as u16;
    resizer.resize(image, scaled(image.width), scaled(image.height))
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
