//! Image files to 8-bit RGB. What a file is follows from its first bytes, never from its name. Nothing half-read is accepted:
//! a file that ends early, or whose pixels would take an absurd amount of memory, is an error with the reason.
//!
//! As torchvision's loader does: alpha is dropped (unless [`Alpha`] says otherwise), grey becomes RGB, CMYK is converted, the
//! EXIF orientation is ignored, and of an animation the first frame is taken. JPEG pixels are those of libjpeg-turbo, bit for
//! bit; those of the lossless formats are what Pillow gives, but that 16-bit grey keeps its high byte (Pillow makes nearly all
//! of it white).
//!
//! Decoding takes at most 16 bytes of memory for each pixel the file declares, 16 for each of its bytes, and 2 MiB; what is declared is
//! believed only up to what a file of its length can hold (tests/decode_bounds.rs).

mod gif;
mod jpeg;
mod other;
mod resize;

use std::fmt;
use std::str::FromStr;

use image::ImageFormat;

pub use self::jpeg::is_grey as is_grey_jpeg;
use super::quiet::contain;

pub use self::resize::{RESIZER, Resizer};

/// The largest image accepted, in pixels: larger ones are refused before memory is taken for them.
pub const MAX_PIXELS: u64 = 100_000_000;

/// Where a format sets no limit to what a byte can stand for (as lossless WebP, where a picture of one colour takes no data),
/// images up to this size are taken as they come.
const FREE_PIXELS: u64 = 16_000_000;

/// And beyond it, this many pixels to a byte: deflate's maximum of 1032:1, on pixels of one bit.
const EASY_PIXELS: u64 = 1032 * 8;

/// Bytes of a file that [`sniff`] wants to see.
pub const SNIFF_LEN: usize = 16;

/// An image in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Height x width x channels bytes.
    pub pixels: Vec<u8>,
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// 1 (grey) or 3 (RGB).
    pub channels: u8,
}

/// An image whose pixels lie elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageRef<'a> {
    /// Height x width x channels bytes.
    pub pixels: &'a [u8],
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// 1 (grey) or 3 (RGB).
    pub channels: u8,
}

impl ImageRef<'_> {
    /// The same image with pixels of its own.
    pub fn to_image(self) -> Image {
        let ImageRef { pixels, width, height, channels } = self;
        Image { pixels: pixels.to_vec(), width, height, channels }
    }
}

/// What becomes of transparency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Alpha {
    /// The colours stay as they are, however transparent: what Pillow's `convert("RGB")` does, and so torchvision's loader.
    #[default]
    Drop,
    /// The image lies on white.
    White,
    /// The image lies on black.
    Black,
}

impl FromStr for Alpha {
    type Err = String;

    fn from_str(text: &str) -> Result<Alpha, String> {
        match text {
            "drop" => Ok(Alpha::Drop),
            "white" => Ok(Alpha::White),
            "black" => Ok(Alpha::Black),
            _ => Err("expected drop, white or black".into()),
        }
    }
}

/// How to decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DecodeOptions {
    /// What becomes of transparency.
    pub alpha: Alpha,
}

/// What decodes images, with versions, and what it does to them: for the meta text.
impl fmt::Display for DecodeOptions {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "libjpeg-turbo-rs 0.9, gif 0.14, image 0.25")?;
        match self.alpha {
            Alpha::Drop => Ok(()),
            Alpha::White => write!(f, "; transparency over white"),
            Alpha::Black => write!(f, "; transparency over black"),
        }
    }
}

/// Decodes images one after the other, and keeps its buffers: fresh memory for every image costs more than a resize.
#[derive(Debug, Default)]
pub struct Decoder {
    options: DecodeOptions,
    pixels: Vec<u8>,
    /// Samples before they are RGB.
    samples: Vec<u8>,
}

impl Decoder {
    /// A decoder without buffers yet.
    pub fn new(options: DecodeOptions) -> Decoder {
        Decoder { options, ..Decoder::default() }
    }

    /// Decodes an image file to RGB.
    ///
    /// # Errors
    /// The reason, as a clause without the name of the file.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<ImageRef<'_>, String> {
        if bytes.is_empty() {
            return Err("the file is empty".into());
        }
        let format = sniff(bytes).ok_or("not a JPEG, PNG, GIF, BMP, WebP or TIFF image")?;
        let decoded = contain(|| match format {
            ImageFormat::Jpeg => jpeg::decode(bytes, &mut self.samples, &mut self.pixels),
            ImageFormat::Gif => gif::decode(bytes, self.options.alpha, &mut self.samples, &mut self.pixels),
            other => other::decode(bytes, other, self.options.alpha, &mut self.samples, &mut self.pixels),
        });
        let (width, height) =
            decoded.unwrap_or_else(|| Err("the decoder gave up on it (a fault inside the decoder)".into()))?;
        if self.pixels.len() != usize::from(width) * usize::from(height) * 3 {
            return Err(format!("{} bytes decoded for {width}x{height} RGB pixels", self.pixels.len()));
        }
        Ok(ImageRef { pixels: &self.pixels, width, height, channels: 3 })
    }
}

/// The format of a file that starts with `head`, if it is one that [`Decoder`] reads.
pub fn sniff(head: &[u8]) -> Option<ImageFormat> {
    match head {
        [0xff, 0xd8, 0xff, ..] => Some(ImageFormat::Jpeg),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(ImageFormat::Png),
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(ImageFormat::Gif),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(ImageFormat::WebP),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => Some(ImageFormat::Tiff),
        // The reserved words keep a text that starts with "BM" out.
        [b'B', b'M', _, _, _, _, 0, 0, 0, 0, ..] => Some(ImageFormat::Bmp),
        _ => None,
    }
}

/// The size as the caller wants it, if it is one that is accepted. A byte of the file holds at most `most` pixels, where the
/// format sets a limit.
fn check_size(width: u64, height: u64, file_len: usize, most: Option<u64>) -> Result<(u16, u16), String> {
    if width == 0 || height == 0 {
        return Err(format!("empty image: {width}x{height}"));
    }
    let (Ok(w), Ok(h), true) = (u16::try_from(width), u16::try_from(height), width * height <= MAX_PIXELS) else {
        let limit = MAX_PIXELS / 1_000_000;
        return Err(format!("{width}x{height} pixels: more than {limit} million, or a side over 65535"));
    };
    let held = most.map_or((file_len as u64 * EASY_PIXELS).max(FREE_PIXELS), |most| file_len as u64 * most);
    if width * height > held {
        return Err(format!("{width}x{height} pixels in a file of {file_len} bytes, which cannot hold them"));
    }
    Ok((w, h))
}
