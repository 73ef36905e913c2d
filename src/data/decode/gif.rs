//! GIF: the first frame, on the screen it belongs to.

use std::num::NonZeroU64;

use gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use super::{Alpha, MAX_PIXELS, check_size};

/// Pixels to a byte at most: in a full table of LZW a code of 12 bits stands for up to 3,839 pixels.
const MOST_PIXELS: u64 = 2560;

/// Decodes to RGB in `pixels`, and returns the size.
pub fn decode(bytes: &[u8], alpha: Alpha, samples: &mut Vec<u8>, pixels: &mut Vec<u8>) -> Result<(u16, u16), String> {
    let reason = |e: DecodingError| format!("GIF: {e}");
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.set_memory_limit(NonZeroU64::new(MAX_PIXELS).map_or(MemoryLimit::Unlimited, MemoryLimit::Bytes));
    let mut decoder = options.read_info(bytes).map_err(reason)?;
    let screen = (decoder.width(), decoder.height());
    let frame = decoder.next_frame_info().map_err(reason)?.ok_or("GIF: no picture in the file")?;
    let (left, top, width, height) = (frame.left, frame.top, frame.width, frame.height);
    let ground = frame.transparent;
    // As Pillow does it, the screen grows to where the frame ends.
    let across = u64::from(screen.0).max(u64::from(left) + u64::from(width));
    let down = u64::from(screen.1).max(u64::from(top) + u64::from(height));
    let size = check_size(across, down, bytes.len(), Some(MOST_PIXELS))?;
    let colours = colours(decoder.palette().map_err(reason)?, ground, alpha);
    samples.resize(usize::from(width) * usize::from(height), 0);
    decoder.read_into_buffer(samples).map_err(reason)?;
    // What the frame leaves free is transparent, or else of the first colour.
    pixels.clear();
    let ground = colours[usize::from(ground.unwrap_or(0))];
    pixels.extend(ground.iter().cycle().take(usize::from(size.0) * usize::from(size.1) * 3));
    let row = usize::from(size.0) * 3;
    let covered = usize::from(left) * 3..(usize::from(left) + usize::from(width)) * 3;
    let lines = pixels.chunks_exact_mut(row).skip(top.into());
    for (line, indices) in lines.zip(samples.chunks_exact(usize::from(width).max(1))) {
        for (pixel, &index) in line[covered.clone()].chunks_exact_mut(3).zip(indices) {
            pixel.copy_from_slice(&colours[usize::from(index)]);
        }
    }
    Ok(size)
}

/// The colour of every index; black where the palette has none.
fn colours(palette: &[u8], transparent: Option<u8>, alpha: Alpha) -> [[u8; 3]; 256] {
    let mut colours = [[0; 3]; 256];
    for (colour, rgb) in colours.iter_mut().zip(palette.chunks_exact(3)) {
        colour.copy_from_slice(rgb);
    }
    match (alpha, transparent) {
        (Alpha::White, Some(index)) => colours[usize::from(index)] = [255; 3],
        (Alpha::Black, Some(index)) => colours[usize::from(index)] = [0; 3],
        _ => {}
    }
    colours
}
