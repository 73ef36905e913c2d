//! The formats that the `image` crate reads: PNG, WebP, BMP and TIFF.

use std::io::Cursor;

use image::{ColorType, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{Alpha, MAX_PIXELS, check_size};

/// Working memory a decoder of the `image` crate may take: [`MAX_PIXELS`] at 16 bits RGBA.
const MAX_ALLOC: u64 = MAX_PIXELS * 8;

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
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_ALLOC);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(reason)?;
    let (width, height) = decoder.dimensions();
    // Rows of PNG lie in one deflate stream, which expands 1032 times at most.
    let bits = u64::from(decoder.original_color_type().bits_per_pixel().max(1));
    let most = (format == ImageFormat::Png).then_some(1032 * 8 / bits);
    let size = check_size(width.into(), height.into(), bytes.len(), most).map_err(|what| format!("{name}: {what}"))?;
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

/// A lossy picture that lacks its last bytes decodes all the same, so the length in the header has to tell.
fn webp_is_whole(bytes: &[u8]) -> bool {
    let len = bytes.get(4..8).map(|len| u64::from(u32::from_le_bytes([len[0], len[1], len[2], len[3]])));
    len.is_some_and(|len| len + 8 <= bytes.len() as u64)
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
