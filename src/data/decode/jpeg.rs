//! JPEG files: every pixel as libjpeg-turbo gives it, and nothing that was cut short.

use libjpeg_turbo_rs::{ComponentInfo, DecodeLimits, Decoder, FrameHeader, JpegError, PixelFormat};

use super::{MAX_PIXELS, check_size};

/// Scans in one file. Encoders write about ten; each costs a pass over the picture.
const MAX_SCANS: usize = 200;

/// Pixels to a byte at most: a block of 64 (at odd samplings 128) takes a bit or more in some scan.
const MOST_PIXELS: u64 = 8 * 128;

const CUT: &str = "the file is truncated (it lacks the end-of-image marker)";

/// Decodes to RGB in `pixels`, and returns the size.
pub fn decode(bytes: &[u8], samples: &mut Vec<u8>, pixels: &mut Vec<u8>) -> Result<(u16, u16), String> {
    let named = |what: String| format!("JPEG: {what}");
    // What comes behind the end (trailers of cameras and phones) is no part of the picture.
    let bytes = &bytes[..complete_len(bytes).map_err(|what| named(what.into()))?];
    let limits = DecodeLimits { max_pixels: MAX_PIXELS, max_scans: MAX_SCANS, ..DecodeLimits::default() };
    let decoder = Decoder::new_with_limits(bytes, limits).map_err(|e| named(e.to_string()))?;
    let frame = decoder.header();
    let size = check_size(frame.width.into(), frame.height.into(), bytes.len(), Some(MOST_PIXELS))?;
    read(decoder, samples, pixels).map_err(named)?;
    Ok(size)
}

fn read(mut decoder: Decoder, samples: &mut Vec<u8>, pixels: &mut Vec<u8>) -> Result<(), String> {
    let frame = decoder.header();
    if frame.precision != 8 || frame.is_lossless {
        return Err("not of 8 bits a sample, or of the lossless kind".into());
    }
    if decoder.is_arithmetic() {
        return Err("arithmetic coding, in which a cut file cannot be told from a whole one".into());
    }
    check_sampling(frame)?;
    match frame.components.len() {
        1 | 3 => {
            decoder.set_output_format(PixelFormat::Rgb);
            decode_into(&decoder, pixels)
        }
        4 => {
            decoder.set_output_format(PixelFormat::Cmyk);
            decode_into(&decoder, samples)?;
            cmyk_to_rgb(samples, pixels);
            Ok(())
        }
        n => Err(format!("{n} components a pixel, expected 1, 3 or 4")),
    }
}

/// That the first component is sampled finest, and the others at whole fractions of it, black like the first: the decoder
/// counts on it.
fn check_sampling(frame: &FrameHeader) -> Result<(), String> {
    let sampling = |c: &ComponentInfo| (c.horizontal_sampling, c.vertical_sampling);
    let all: Vec<_> = frame.components.iter().map(sampling).collect();
    let Some(&(h, v)) = all.first() else { return Err("no components".into()) };
    let whole = all.iter().all(|&(x, y)| x > 0 && y > 0 && h % x == 0 && v % y == 0);
    if !whole || all.get(3).is_some_and(|&black| black != (h, v)) {
        return Err(format!("components sampled at {all:?}, which no encoder does"));
    }
    Ok(())
}

fn decode_into(decoder: &Decoder, out: &mut Vec<u8>) -> Result<(), String> {
    let reason = |e: JpegError| e.to_string();
    out.resize(decoder.output_buffer_size().map_err(reason)?, 0);
    decoder.decode_image_into(out).map_err(reason)?;
    Ok(())
}

/// As Pillow does it: the samples are taken as inverted (so Adobe writes them), and black darkens what the inks leave.
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

/// Whether a JPEG file is grey, by its frame header.
pub fn is_grey(bytes: &[u8]) -> bool {
    let mut segments = Segments { bytes, at: 2 };
    let frame = std::iter::from_fn(|| segments.next()).find(|segment| segment.is_frame());
    frame.is_some_and(|frame| frame.body.get(5) == Some(&1))
}

/// Bytes of the file up to its end, if the scans before it give every coefficient in every bit. A decoder shows what it has:
/// only this tells a complete file from one that was cut between two scans.
fn complete_len(bytes: &[u8]) -> Result<usize, &'static str> {
    let mut segments = Segments { bytes, at: 2 };
    // For each component its name, and the bits that each coefficient still lacks.
    let mut lacking: Vec<(u8, [u8; 64])> = Vec::new();
    let mut progressive = false;
    while let Some(segment) = segments.next() {
        if segment.is_frame() {
            progressive = matches!(segment.marker, 0xc2 | 0xca);
            let names = segment.body.get(6..).unwrap_or_default().chunks_exact(3).map(|component| component[0]);
            lacking = names.map(|name| (name, [u8::MAX; 64])).collect();
        } else if segment.marker == 0xda {
            let (names, spectrum) = segment.scan().ok_or("a scan header is too short")?;
            let (first, last, low) = if progressive { spectrum } else { (0, 63, 0) };
            for (_, bits) in lacking.iter_mut().filter(|(name, _)| names.clone().any(|n| n == *name)) {
                bits.iter_mut().take(last + 1).skip(first).for_each(|bit| *bit = low);
            }
        } else if segment.marker == 0xd9 {
            let complete = lacking.iter().all(|(_, bits)| bits.iter().all(|&low| low == 0));
            return if complete { Ok(segments.at) } else { Err("the file is truncated (its last scans are missing)") };
        }
    }
    Err(CUT)
}

/// A marker and what its length field spans.
struct Segment<'a> {
    marker: u8,
    body: &'a [u8],
}

impl<'a> Segment<'a> {
    fn is_frame(&self) -> bool {
        matches!(self.marker, 0xc0..=0xcf) && !matches!(self.marker, 0xc4 | 0xc8 | 0xcc)
    }

    /// Of a scan header: names of the components, and first coefficient, last coefficient and lowest bit.
    fn scan(&self) -> Option<(impl Iterator<Item = u8> + Clone + use<'a>, (usize, usize, u8))> {
        let (&count, rest) = self.body.split_first()?;
        let (components, spectrum) = rest.split_at_checked(2 * usize::from(count))?;
        let &[first, last, approximation, ..] = spectrum else { return None };
        Some((components.iter().step_by(2).copied(), (first.into(), last.into(), approximation & 15)))
    }
}

/// Walks over the segments of a file, and over the entropy-coded data behind each scan header.
struct Segments<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Segments<'a> {
    fn next(&mut self) -> Option<Segment<'a>> {
        loop {
            let &[first, marker] = self.bytes.get(self.at..self.at + 2)? else { return None };
            match marker {
                // Stray bytes between segments are for the decoder to judge; 0xff may fill up before a marker.
                _ if first != 0xff || marker == 0xff => self.at += 1,
                // Markers that stand alone: TEM, restarts, the start of an image.
                0x01 | 0xd0..=0xd8 => self.at += 2,
                0xd9 => {
                    self.at += 2;
                    return Some(Segment { marker, body: &[] });
                }
                _ => return self.long(marker),
            }
        }
    }

    fn long(&mut self, marker: u8) -> Option<Segment<'a>> {
        let len = self.bytes.get(self.at + 2..self.at + 4)?;
        let end = self.at + 2 + usize::from(u16::from_be_bytes([len[0], len[1]]));
        let body = self.bytes.get(self.at + 4..end)?;
        self.at = end;
        if marker == 0xda {
            self.at += scan_len(&self.bytes[end..]);
        }
        Some(Segment { marker, body })
    }
}

/// Bytes of entropy-coded data before the next marker that is no restart.
fn scan_len(data: &[u8]) -> usize {
    let ends = |&at: &usize| data.get(at + 1).is_some_and(|next| !matches!(next, 0x00 | 0xd0..=0xd7 | 0xff));
    memchr::memchr_iter(0xff, data).find(ends).unwrap_or(data.len())
}
