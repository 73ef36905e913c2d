//! JPEG files: every pixel as libjpeg-turbo gives it, and nothing that was cut short.

use libjpeg_turbo_rs::{DecodeLimits, Decoder, PixelFormat};

use super::{MAX_PIXELS, check_size};

/// Scans in one file. Encoders write about ten; each costs a pass over the picture.
const MAX_SCANS: usize = 500;

/// Decodes to RGB in `pixels`, and returns the size.
pub fn decode(bytes: &[u8], samples: &mut Vec<u8>, pixels: &mut Vec<u8>) -> Result<(u16, u16), String> {
    check_structure(bytes).map_err(|what| format!("JPEG: {what}"))?;
    let reason = |e: libjpeg_turbo_rs::JpegError| format!("JPEG: {e}");
    let limits = DecodeLimits { max_pixels: MAX_PIXELS, max_scans: MAX_SCANS, ..DecodeLimits::default() };
    let mut decoder = Decoder::new_with_limits(bytes, limits).map_err(reason)?;
    let frame = decoder.header();
    let size = check_size(frame.width.into(), frame.height.into())?;
    if frame.precision != 8 || frame.is_lossless {
        return Err("JPEG: not of 8 bits a sample, or of the lossless kind".into());
    }
    match frame.components.len() {
        1 | 3 => {
            decoder.set_output_format(PixelFormat::Rgb);
            decode_into(&decoder, pixels).map_err(reason)?;
        }
        4 => {
            decoder.set_output_format(PixelFormat::Cmyk);
            decode_into(&decoder, samples).map_err(reason)?;
            cmyk_to_rgb(samples, pixels);
        }
        n => return Err(format!("JPEG: {n} components a pixel, expected 1, 3 or 4")),
    }
    Ok(size)
}

fn decode_into(decoder: &Decoder, out: &mut Vec<u8>) -> Result<(), libjpeg_turbo_rs::JpegError> {
    out.resize(decoder.output_buffer_size()?, 0);
    decoder.decode_image_into(out)?;
    Ok(())
}

/// As Pillow does it: the samples are taken as inverted (so Adobe writes them), and what the black plate leaves is shared
/// by the inks.
fn cmyk_to_rgb(samples: &[u8], pixels: &mut Vec<u8>) {
    pixels.clear();
    pixels.extend(samples.chunks_exact(4).flat_map(|cmyk| {
        let white = u32::from(cmyk[3]);
        [0, 1, 2].map(|i| {
            let product = (255 - u32::from(cmyk[i])) * white + 128;
            (white - (((product >> 8) + product) >> 8)) as u8
        })
    }));
}

/// Walks the segments up to the end-of-image marker. A decoder stops at what it can use; only the whole walk tells a
/// complete file from a cut one.
fn check_structure(bytes: &[u8]) -> Result<(), &'static str> {
    const CUT: &str = "the file is truncated (it lacks the end-of-image marker)";
    let mut at = 2;
    while let Some(&[first, marker]) = bytes.get(at..at + 2) {
        match marker {
            // Stray bytes between segments are for the decoder to judge.
            _ if first != 0xff => at += 1,
            0xd9 => return Ok(()),
            // A fill byte.
            0xff => at += 1,
            // Markers that stand alone: TEM and restarts.
            0x01 | 0xd0..=0xd7 => at += 2,
            _ => {
                let &[high, low] = bytes.get(at + 2..at + 4).ok_or(CUT)? else { return Err(CUT) };
                at += 2 + usize::from(u16::from_be_bytes([high, low]));
                if marker == 0xda {
                    at += scan_len(bytes.get(at..).ok_or(CUT)?);
                }
            }
        }
    }
    Err(CUT)
}

/// Bytes of entropy-coded data before the next marker that is no restart.
fn scan_len(data: &[u8]) -> usize {
    let ends = |&at: &usize| data.get(at + 1).is_some_and(|next| !matches!(next, 0x00 | 0xd0..=0xd7 | 0xff));
    memchr::memchr_iter(0xff, data).find(ends).unwrap_or(data.len())
}
