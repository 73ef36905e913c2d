//! The formats that the `image` crate reads: PNG, WebP, BMP and TIFF.

use std::io::Cursor;

use image::{ColorType, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{Alpha, check_size};

/// Bytes a decoder of the `image` crate may take for each pixel: RGBA at 16 bits.
const PIXEL_ALLOC: u64 = 8;

/// And without pixels: tables and the like.
const FREE_ALLOC: u64 = 1 << 18;

/// Decodes to RGB in `pixels`, and returns the size.
pub fn decode(
    bytes: &[u8],
    format: ImageFormat,
    alpha: Alpha,
    samples: &mut Vec<u8>,
    pixels: &mut Vec<u8>,
) -> Result<(u16, u16), String> {
    let name = format.extensions_str().first().map_or(String::new(), |extension| extension.to_uppercase());
    // The source, where there is one, says the same without the name of the format.
    let reason = |e: image::ImageError| match std::error::Error::source(&e) {
        Some(source) => format!("{name}: {source}"),
        None => format!("{name}: {e}"),
    };
    if format == ImageFormat::WebP && !webp_is_whole(bytes) {
        return Err("WEBP: the file is truncated".into());
    }
    if format == ImageFormat::Tiff {
        check_tiff(bytes).map_err(|what| format!("{name}: {what}"))?;
    }
    let reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut decoder = reader.into_decoder().map_err(reason)?;
    let (width, height) = decoder.dimensions();
    let most = (format == ImageFormat::Png).then(|| png_pixels(bytes)).flatten();
    let size = check_size(width.into(), height.into(), bytes.len(), most)?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(u64::from(width) * u64::from(height) * PIXEL_ALLOC + FREE_ALLOC);
    decoder.set_limits(limits).map_err(reason)?;
    let color = decoder.color_type();
    let len = usize::try_from(decoder.total_bytes()).map_err(|e| format!("{name}: {e}"))?;
    if color == ColorType::Rgb8 {
        pixels.resize(len, 0);
        decoder.read_image(pixels).map_err(reason)?;
        return Ok(size);
    }
    samples.resize(len, 0);
    decoder.read_image(samples).map_err(reason)?;
    let samples = match color {
        ColorType::L8 | ColorType::La8 | ColorType::Rgba8 => &samples[..],
        ColorType::L16 | ColorType::La16 | ColorType::Rgb16 | ColorType::Rgba16 => high_bytes(samples),
        other => return Err(format!("{name}: samples of type {other:?} are not a picture")),
    };
    to_rgb(samples, color.channel_count(), alpha, pixels);
    Ok(size)
}

/// Pixels of a PNG to a byte at most: all rows lie in one deflate stream, which expands 1032 times.
fn png_pixels(bytes: &[u8]) -> Option<u64> {
    let &[depth, kind] = bytes.get(24..26)? else { return None };
    let samples = [1, 1, 3, 1, 2, 1, 4].get(usize::from(kind)).copied().unwrap_or(1);
    Some(1032 * 8 / (u64::from(depth.max(1)) * samples))
}

/// A lossy picture that lacks its last bytes decodes all the same, so the length in the header has to tell.
fn webp_is_whole(bytes: &[u8]) -> bool {
    let len = bytes.get(4..8).map(|len| u64::from(u32::from_le_bytes([len[0], len[1], len[2], len[3]])));
    len.is_some_and(|len| len + 8 <= bytes.len() as u64)
}

/// That no entry of the first directory is longer than the file: memory is taken for them on trust.
fn check_tiff(bytes: &[u8]) -> Result<(), &'static str> {
    const CUT: &str = "the file is truncated (its directory lies outside)";
    let field = |at: usize, len: usize| {
        let raw = at.checked_add(len).and_then(|end| bytes.get(at..end)).ok_or(CUT)?;
        let join = |value: usize, byte: &u8| value << 8 | usize::from(*byte);
        Ok::<usize, &'static str>(if bytes[0] == b'M' {
            raw.iter().fold(0, join)
        } else {
            raw.iter().rev().fold(0, join)
        })
    };
    let directory = field(4, 4)?;
    for i in 0..field(directory, 2)? {
        let entry = directory + 2 + 12 * i;
        let size = match field(entry + 2, 2)? {
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 => 8,
            _ => 1,
        };
        if field(entry + 4, 4)?.saturating_mul(size) > bytes.len() {
            return Err("an entry of its directory is longer than the file");
        }
    }
    Ok(())
}

/// 16-bit samples to 8 bits, where they lie.
fn high_bytes(samples: &mut [u8]) -> &[u8] {
    for i in 0..samples.len() / 2 {
        samples[i] = (u16::from_ne_bytes([samples[2 * i], samples[2 * i + 1]]) >> 8) as u8;
    }
    &samples[..samples.len() / 2]
}

/// Repeats grey, and takes alpha away.
fn to_rgb(samples: &[u8], channels: u8, alpha: Alpha, pixels: &mut Vec<u8>) {
    let over = |[r, g, b]: [u8; 3], a: u8| match alpha {
        Alpha::Drop => [r, g, b],
        Alpha::White => [r, g, b].map(|colour| blend(colour, a, 255)),
        Alpha::Black => [r, g, b].map(|colour| blend(colour, a, 0)),
    };
    pixels.clear();
    match channels {
        1 => pixels.extend(samples.iter().flat_map(|&grey| [grey; 3])),
        2 => pixels.extend(samples.chunks_exact(2).flat_map(|p| over([p[0]; 3], p[1]))),
        3 => pixels.extend_from_slice(samples),
        _ => pixels.extend(samples.chunks_exact(4).flat_map(|p| over([p[0], p[1], p[2]], p[3]))),
    }
}

/// `colour` over `ground`, rounded as Pillow's `alpha_composite` does.
fn blend(colour: u8, alpha: u8, ground: u8) -> u8 {
    let alpha = u32::from(alpha);
    let sum = u32::from(colour) * alpha + u32::from(ground) * (255 - alpha) + 128;
    ((sum + (sum >> 8)) >> 8) as u8
}
