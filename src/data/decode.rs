//! Image files to 8-bit RGB. What a file is follows from its first bytes, never from its name. Nothing half-read is accepted:
//! a file that ends early, or whose pixels would take an absurd amount of memory, is an error with the reason.
//!
//! As torchvision's loader does: alpha is dropped, grey becomes RGB, CMYK is converted, the EXIF orientation is ignored, and
//! of an animation the first frame is taken.

use std::cell::RefCell;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fast_image_resize::images::{Image as Target, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// The largest image accepted, in pixels: larger ones are refused before memory is taken for them.
pub const MAX_PIXELS: u64 = 100_000_000;

/// Working memory a decoder of the `image` crate may take: [`MAX_PIXELS`] at 16 bits RGBA.
const MAX_ALLOC: u64 = MAX_PIXELS * 8;

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

/// What decoded the images, for the meta text.
pub const DECODER: &str = "zune-jpeg 0.5 strict, image 0.25";

/// What resized them, for the meta text.
pub const RESIZER: &str = "fast_image_resize 6 bilinear antialias";

/// The format of a file that starts with `head`, if it is one that [`decode`] reads.
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

/// Decodes an image file to RGB.
///
/// # Errors
/// The reason, as a clause without the name of the file.
pub fn decode(bytes: &[u8]) -> Result<Image, String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    let Some(format) = sniff(bytes) else {
        return Err("not a JPEG, PNG, GIF, BMP, WebP or TIFF image".into());
    };
    let decoded = catch_unwind(AssertUnwindSafe(|| match format {
        ImageFormat::Jpeg => decode_jpeg(bytes),
        other => decode_other(bytes, other),
    }));
    decoded.unwrap_or_else(|_| Err("the decoder gave up on it (a fault inside the decoder)".into()))
}

/// Stretches to `side` x `side` pixels, with antialias (each output pixel averages all the input it covers).
///
/// # Errors
/// The reason, when the resizer refuses.
pub fn stretch(image: Image, side: u16) -> Result<Image, String> {
    thread_local! {
        static RESIZER: RefCell<Resizer> = RefCell::new(Resizer::new());
    }
    if (image.width, image.height) == (side, side) {
        return Ok(image);
    }
    let pixel_type = if image.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
    let source = ImageRef::new(image.width.into(), image.height.into(), &image.pixels, pixel_type);
    let source = source.map_err(|e| e.to_string())?;
    let mut target = Target::new(side.into(), side.into(), pixel_type);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
    RESIZER.with_borrow_mut(|r| r.resize(&source, &mut target, &options)).map_err(|e| e.to_string())?;
    Ok(Image { pixels: target.into_vec(), width: side, height: side, channels: image.channels })
}

fn decode_jpeg(bytes: &[u8]) -> Result<Image, String> {
    let scans = jpeg_scans(bytes).ok_or("JPEG: the file is truncated (it lacks the end-of-image marker)")?;
    // Behind an end marker the decoder takes missing data for zeros, even in strict mode. So in the usual case of one scan it
    // does not get to see the marker, and a picture that was cut and then closed is refused like any other cut one.
    let bytes = if scans.count == 1 { &bytes[..scans.end] } else { bytes };
    let side = usize::from(u16::MAX);
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(side)
        .set_max_height(side)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let reason = |e: zune_jpeg::errors::DecodeErrors| format!("JPEG: {e:?}");
    decoder.decode_headers().map_err(reason)?;
    let info = decoder.info().ok_or("JPEG: no header")?;
    check_size(info.width.into(), info.height.into())?;
    let pixels = decoder.decode().map_err(reason)?;
    image(pixels, info.width.into(), info.height.into())
}

/// What follows the headers of a JPEG file.
struct Scans {
    count: usize,
    /// Where the end-of-image marker lies. What comes behind it (trailers of cameras and phones) is no part of the picture.
    end: usize,
}

/// Walks the segments of a JPEG file up to its end-of-image marker, if it has one.
fn jpeg_scans(bytes: &[u8]) -> Option<Scans> {
    let mut at = 2;
    let mut count = 0;
    while let Some(&[first, marker]) = bytes.get(at..at + 2) {
        match marker {
            // Stray bytes between segments are for the decoder to judge.
            _ if first != 0xff => at += 1,
            0xd9 => return Some(Scans { count, end: at }),
            // A fill byte.
            0xff => at += 1,
            // Markers that stand alone: TEM and restarts.
            0x01 | 0xd0..=0xd7 => at += 2,
            _ => {
                let &[high, low] = bytes.get(at + 2..at + 4)? else { return None };
                at += 2 + usize::from(u16::from_be_bytes([high, low]));
                if marker == 0xda {
                    count += 1;
                    at += scan_len(bytes.get(at..)?);
                }
            }
        }
    }
    None
}

/// Bytes of entropy-coded data before the next marker that is no restart.
fn scan_len(data: &[u8]) -> usize {
    let ends = |&at: &usize| data.get(at + 1).is_some_and(|next| !matches!(next, 0x00 | 0xd0..=0xd7 | 0xff));
    memchr::memchr_iter(0xff, data).find(ends).unwrap_or(data.len())
}

fn decode_other(bytes: &[u8], format: ImageFormat) -> Result<Image, String> {
    let name = format.extensions_str().first().map_or(String::new(), |extension| extension.to_uppercase());
    // The source, where there is one, says the same without the name of the format.
    let reason = |e: image::ImageError| match std::error::Error::source(&e) {
        Some(source) => format!("{name}: {source}"),
        None => format!("{name}: {e}"),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_ALLOC);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(reason)?;
    let (width, height) = decoder.dimensions();
    check_size(width.into(), height.into())?;
    let decoded = DynamicImage::from_decoder(decoder).map_err(reason)?;
    image(rgb8(decoded).map_err(|what| format!("{name}: {what}"))?, width.into(), height.into())
}

/// Drops alpha, repeats grey, and takes the high byte of 16-bit samples.
fn rgb8(image: DynamicImage) -> Result<Vec<u8>, String> {
    let high = |sample: u16| (sample >> 8) as u8;
    Ok(match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageLuma8(_) | DynamicImage::ImageLumaA8(_) | DynamicImage::ImageRgba8(_) => {
            image.into_rgb8().into_raw()
        }
        DynamicImage::ImageLuma16(image) => image.pixels().flat_map(|p| [high(p.0[0]); 3]).collect(),
        DynamicImage::ImageLumaA16(image) => image.pixels().flat_map(|p| [high(p.0[0]); 3]).collect(),
        DynamicImage::ImageRgb16(image) => image.pixels().flat_map(|p| p.0.map(high)).collect(),
        DynamicImage::ImageRgba16(image) => image.pixels().flat_map(|p| [0, 1, 2].map(|c| high(p.0[c]))).collect(),
        other => return Err(format!("samples of type {:?} are not a picture", other.color())),
    })
}

fn check_size(width: u64, height: u64) -> Result<(), String> {
    if width == 0 || height == 0 {
        return Err(format!("empty image: {width}x{height}"));
    }
    if width > u16::MAX.into() || height > u16::MAX.into() || width * height > MAX_PIXELS {
        return Err(format!(
            "{width}x{height} pixels: more than {} million, or a side over 65535",
            MAX_PIXELS / 1_000_000
        ));
    }
    Ok(())
}

/// The checked end of every decoder.
fn image(pixels: Vec<u8>, width: u64, height: u64) -> Result<Image, String> {
    if pixels.len() as u64 != width * height * 3 {
        return Err(format!("{} bytes decoded for {width}x{height} RGB pixels", pixels.len()));
    }
    Ok(Image { pixels, width: width as u16, height: height as u16, channels: 3 })
}
