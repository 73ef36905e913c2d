//! Colour: the four operations of the jitter and the grey conversion, on levels of 0..255.

use crate::data::augment::{Jitter, JitterOp, Planes};

/// Pixels that are taken through all operations at a time: their three planes stay in the nearest cache.
const TILE: usize = 1024;
/// Lumas are summed up in steps of 2^-14 level: the sum of a tile fits 32 bits, and is the same in whatever order.
const LUMA_STEPS: f64 = 16384.0;
/// The floats from here to twice this are whole steps.
const LUMA_BIAS: f32 = 512.0;
const MANTISSA: u32 = 0x7f_ffff;

/// Red, green and blue levels of some pixels.
type Tile<'a> = [&'a mut [f32]; 3];

/// Applies the operations of `jitter` in its order, with a clamp after each.
#[inline(always)]
pub(super) fn jitter_colour(planes: &mut Planes, jitter: &Jitter) {
    // Contrast needs the mean of the image as the operations before it leave it: they get a pass of their own.
    let contrast_at = jitter.order.iter().position(|&op| op == JitterOp::Contrast).unwrap_or(0);
    let (before, rest) = jitter.order.split_at(contrast_at);
    let mut sum = 0;
    for mut tile in planes.tiles_mut(TILE) {
        apply(before, jitter, 0.0, &mut tile);
        sum += u64::from(sum_of_luma(&tile));
    }
    let mean = (sum as f64 / (LUMA_STEPS * planes.pixels() as f64)) as f32;
    for mut tile in planes.tiles_mut(TILE) {
        apply(rest, jitter, mean, &mut tile);
    }
}

/// Gives all channels the luma.
#[inline(always)]
pub(super) fn to_grayscale(planes: &mut Planes) {
    for mut tile in planes.tiles_mut(TILE) {
        for_each_pixel(&mut tile, |r, g, b| [luma(r, g, b); 3]);
    }
}

/// Applies operations to some pixels of an image whose mean luma is `mean`.
#[inline(always)]
fn apply(ops: &[JitterOp], jitter: &Jitter, mean: f32, tile: &mut Tile) {
    for op in ops {
        match op {
            JitterOp::Brightness => scale(tile, jitter.brightness, 0.0),
            JitterOp::Contrast => scale(tile, jitter.contrast, (1.0 - jitter.contrast) * mean),
            JitterOp::Saturation => saturate(tile, jitter.saturation),
            JitterOp::Hue => turn_hue(tile, jitter.hue),
        }
    }
}

#[inline(always)]
fn scale(tile: &mut Tile, factor: f32, offset: f32) {
    for plane in tile {
        for value in plane.iter_mut() {
            *value = (*value * factor + offset).clamp(0.0, 255.0);
        }
    }
}

#[inline(always)]
fn saturate(tile: &mut Tile, factor: f32) {
    for_each_pixel(tile, |r, g, b| {
        let grey = (1.0 - factor) * luma(r, g, b);
        [r, g, b].map(|value| (value * factor + grey).clamp(0.0, 255.0))
    });
}

/// Turns the hue, keeping the HSV value and saturation. Hues are counted in sixths of the circle.
#[inline(always)]
fn turn_hue(tile: &mut Tile, turn: f32) {
    let turn = 6.0 * turn;
    for_each_pixel(tile, |r, g, b| {
        let (value, chroma) = (r.max(g).max(b), r.max(g).max(b) - r.min(g).min(b));
        let inverse = if chroma > 0.0 { 1.0 / chroma } else { 0.0 };
        let red_largest = (g - b) * inverse;
        let green_largest = 2.0 + (b - r) * inverse;
        let blue_largest = 4.0 + (r - g) * inverse;
        let not_red = if value == g { green_largest } else { blue_largest };
        let hue = turn + if value == r { red_largest } else { not_red };
        let hue = if hue < 0.0 { hue + 6.0 } else { hue };
        let hue = if hue >= 6.0 { hue - 6.0 } else { hue };
        // How far each channel falls below the value, by its distance along the circle.
        [5.0, 3.0, 1.0].map(|origin| {
            let place = origin + hue;
            let place = if place >= 6.0 { place - 6.0 } else { place };
            value - chroma * place.min(4.0 - place).clamp(0.0, 1.0)
        })
    });
}

/// ITU-R BT.601 luma, as PIL and torchvision compute it.
#[inline(always)]
fn luma(r: f32, g: f32, b: f32) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}

/// The sum of the lumas, each rounded to the nearest step.
#[inline(always)]
fn sum_of_luma([red, green, blue]: &Tile) -> u32 {
    let steps = |((&r, &g), &b): ((&f32, &f32), &f32)| (luma(r, g, b) + LUMA_BIAS).to_bits() & MANTISSA;
    red.iter().zip(green.iter()).zip(blue.iter()).map(steps).fold(0, u32::wrapping_add)
}

#[inline(always)]
fn for_each_pixel([red, green, blue]: &mut Tile, f: impl Fn(f32, f32, f32) -> [f32; 3]) {
    for ((r, g), b) in red.iter_mut().zip(green.iter_mut()).zip(blue.iter_mut()) {
        [*r, *g, *b] = f(*r, *g, *b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_luma_of_a_full_tile_is_summed_up_exactly() {
        let sum = |levels: [f32; 3]| {
            let mut planes = levels.map(|level| vec![level; TILE]);
            sum_of_luma(&planes.each_mut().map(Vec::as_mut_slice))
        };
        assert_eq!(sum([0.0; 3]), 0);
        for levels in [[255.0; 3], [254.99, 17.3, 0.001], [0.0, 0.0, 1.0]] {
            let expected = (f64::from(luma(levels[0], levels[1], levels[2])) * LUMA_STEPS).round_ties_even();
            assert_eq!(f64::from(sum(levels)), expected * TILE as f64, "{levels:?}");
        }
    }

    fn pixel(colour: [f32; 3], turn: f32) -> [f32; 3] {
        let mut planes = colour.map(|value| vec![value]);
        turn_hue(&mut planes.each_mut().map(Vec::as_mut_slice), turn);
        planes.map(|plane| plane[0])
    }

    fn assert_near(got: [f32; 3], expected: [f32; 3]) {
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3), "got {got:?}, expected {expected:?}");
    }

    #[test]
    fn hue_turns_through_the_primaries() {
        assert_near(pixel([200.0, 50.0, 50.0], 1.0 / 3.0), [50.0, 200.0, 50.0]);
        assert_near(pixel([200.0, 50.0, 50.0], -1.0 / 3.0), [50.0, 50.0, 200.0]);
        assert_near(pixel([200.0, 50.0, 50.0], 1.0 / 6.0), [200.0, 200.0, 50.0]);
        assert_near(pixel([10.0, 250.0, 90.0], 0.5), [250.0, 10.0, 170.0]);
        assert_near(pixel([90.0, 90.0, 90.0], 0.3), [90.0, 90.0, 90.0]);
    }

    #[test]
    fn no_turn_changes_nothing() {
        for colour in [[1.0, 2.0, 3.0], [255.0, 0.0, 128.0], [7.5, 7.5, 100.0], [0.0, 0.0, 0.0]] {
            assert_near(pixel(colour, 0.0), colour);
        }
    }
}
