//! Gaussian blur with one short symmetric kernel, applied to rows and then to columns.

use crate::data::augment::{AugmentConfig, BlurKernel, Planes};

/// Values that are summed up in registers at a time.
const LANES: usize = 32;
/// Lighter taps cost time and change nothing.
const LIGHTEST: f64 = 1e-6;
/// No blur that a configuration allows reaches further.
pub const MAX_REACH: usize = 96;

/// PIL's kernel: three passes of a box of fractional width, convolved. Centre and right half.
fn boxes(sigma: f64, half: &mut Vec<f32>) {
    let radius = box_radius(sigma);
    let whole = radius.floor();
    let box_weight = |distance: i32| match distance.abs() - whole as i32 {
        ..=0 => 1.0 / (2.0 * radius + 1.0),
        1 => (radius - whole) / (2.0 * radius + 1.0),
        _ => 0.0,
    };
    let reach = whole as i32 + 1;
    let twice = |distance: i32| -> f64 { (-reach..=reach).map(|i| box_weight(i) * box_weight(distance - i)).sum() };
    let twice: Vec<f64> = (-reach..=4 * reach).map(twice).collect();
    let twice = |distance: i32| twice[(distance + reach) as usize];
    let thrice = |distance: i32| -> f64 { (-reach..=reach).map(|i| box_weight(i) * twice(distance - i)).sum() };
    half.extend((0..=3 * reach).map(thrice).take_while(|&weight| weight > LIGHTEST).map(|weight| weight as f32));
}

/// The radius (half of the width minus one) of the fractional box of which three passes have the variance of `sigma`.
fn box_radius(sigma: f64) -> f64 {
    let variance = sigma * sigma / 3.0;
    let whole = (((12.0 * variance + 1.0).sqrt() - 1.0) / 2.0).floor();
    let fraction = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
    whole + fraction
}

/// torchvision's kernel: the density at whole pixels up to `reach`, scaled to a sum of 1. Centre and right half.
fn samples(sigma: f64, reach: usize, half: &mut Vec<f32>) {
    let density = |distance: usize| (-0.5 * (distance as f64 / sigma).powi(2)).exp();
    let total = 2.0 * (0..=reach).map(density).sum::<f64>() - 1.0;
    let weights = (0..=reach).map(|distance| density(distance) / total);
    half.extend(weights.take_while(|&weight| weight > LIGHTEST).map(|weight| weight as f32));
}

/// Blurs planes; keeps its scratch memory.
#[derive(Debug)]
pub(super) struct Blur {
    kernel: BlurKernel,
    /// The furthest that any blur reaches.
    reach: usize,
    half: Vec<f32>,
    /// One row, continued past both ends.
    padded_row: Vec<f32>,
    /// A plane after its rows were blurred, continued above and below; each row is as long as a multiple of [`LANES`].
    padded_rows: Vec<f32>,
}

impl Blur {
    pub(super) fn new(config: &AugmentConfig) -> Blur {
        Blur {
            kernel: config.blur_kernel,
            reach: config.blur_kernel.reach(config.blur_sigma[1]),
            half: Vec::new(),
            padded_row: Vec::new(),
            padded_rows: Vec::new(),
        }
    }

    /// Blurs all three planes with the given sigma in pixels.
    #[inline(always)]
    pub(super) fn apply(&mut self, planes: &mut Planes, sigma: f32) {
        self.kernel.half(sigma, self.reach, &mut self.half);
        let size = planes.size();
        let (reach, stride) = (self.half.len() - 1, size.next_multiple_of(LANES));
        self.padded_row.resize(stride + 2 * reach, 0.0);
        self.padded_rows.resize(stride * (size + 2 * reach), 0.0);
        for plane in planes.each_mut() {
            self.blur_rows(plane, size);
            self.blur_columns(plane, size);
        }
    }

    /// Blurs the rows of `plane` into `padded_rows`.
    #[inline(always)]
    fn blur_rows(&mut self, plane: &[f32], size: usize) {
        let (reach, stride) = (self.half.len() - 1, size.next_multiple_of(LANES));
        let padded = &mut self.padded_row;
        for (row, blurred) in plane.chunks_exact(size).zip(self.padded_rows[reach * stride..].chunks_exact_mut(stride))
        {
            padded[reach..reach + size].copy_from_slice(row);
            for i in 0..reach {
                padded[i] = row[self.kernel.inside(i as isize - reach as isize, size)];
                padded[reach + size + i] = row[self.kernel.inside((size + i) as isize, size)];
            }
            for (x, sums) in blurred.as_chunks_mut().0.iter_mut().enumerate() {
                let at = |offset: usize| &padded[x * LANES + offset..];
                *sums = convolve(&self.half, at(reach), |i| (at(reach - i), at(reach + i)));
            }
        }
        for i in 0..reach {
            let above = self.kernel.inside(i as isize - reach as isize, size);
            let below = self.kernel.inside((size + i) as isize, size);
            for (place, source) in [(i, above), (reach + size + i, below)] {
                let source = (reach + source) * stride;
                self.padded_rows.copy_within(source..source + stride, place * stride);
            }
        }
    }

    /// Blurs the columns of `padded_rows` into `plane`.
    #[inline(always)]
    fn blur_columns(&self, plane: &mut [f32], size: usize) {
        let (reach, stride) = (self.half.len() - 1, size.next_multiple_of(LANES));
        for (y, row) in plane.chunks_exact_mut(size).enumerate() {
            for (x, out) in row.chunks_mut(LANES).enumerate() {
                let at = |row: usize| &self.padded_rows[(y + row) * stride + x * LANES..];
                let sums = convolve(&self.half, at(reach), |i| (at(reach - i), at(reach + i)));
                out.copy_from_slice(&sums[..out.len()]);
            }
        }
    }
}

impl BlurKernel {
    /// How many pixels away the furthest tap of a blur of at most this sigma can be.
    pub fn reach(self, max_sigma: f64) -> usize {
        match self {
            // Sigma is drawn as a float, which may be rounded up.
            BlurKernel::Pil => 3 * (box_radius(f64::from(max_sigma as f32)).floor() as usize + 1),
            BlurKernel::Gaussian => (3.0 * max_sigma).ceil() as usize,
        }
    }

    /// Fills `half` with the centre and the right half of the kernel of `sigma`: at most 1 + `reach` weights.
    pub fn half(self, sigma: f32, reach: usize, half: &mut Vec<f32>) {
        half.clear();
        match self {
            BlurKernel::Pil => boxes(f64::from(sigma), half),
            BlurKernel::Gaussian => samples(f64::from(sigma), reach, half),
        }
    }

    /// Which of `0..size` stands in for place `i`: PIL repeats the border, torchvision reflects at it.
    #[inline(always)]
    fn inside(self, i: isize, size: usize) -> usize {
        let last = size as isize - 1;
        let i = match self {
            BlurKernel::Pil => i,
            BlurKernel::Gaussian if i < 0 => -i,
            BlurKernel::Gaussian if i > last => 2 * last - i,
            BlurKernel::Gaussian => i,
        };
        // A kernel longer than the image reflects past the other border.
        i.clamp(0, last) as usize
    }
}

/// `half[0] * centre + sum of half[i] * (left + right)` where `neighbours(i)` gives the values at distance `i`.
#[inline(always)]
fn convolve<'a>(half: &[f32], centre: &[f32], neighbours: impl Fn(usize) -> (&'a [f32], &'a [f32])) -> [f32; LANES] {
    let mut sums = [0.0; LANES];
    for (sum, &value) in sums.iter_mut().zip(&centre[..LANES]) {
        *sum = half[0] * value;
    }
    for (i, &weight) in half.iter().enumerate().skip(1) {
        let (before, after) = neighbours(i);
        let (before, after) = (&before[..LANES], &after[..LANES]);
        for lane in 0..LANES {
            sums[lane] += weight * (before[lane] + after[lane]);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::augment::config::MAX_SIGMA;

    #[test]
    fn no_kernel_is_longer_than_its_reach() {
        let mut half = Vec::new();
        for kernel in [BlurKernel::Pil, BlurKernel::Gaussian] {
            for step in 1..=640 {
                let sigma = f64::from(step) / 20.0;
                let reach = kernel.reach(sigma);
                kernel.half(sigma as f32, reach, &mut half);
                let total = 2.0 * half.iter().copied().map(f64::from).sum::<f64>() - f64::from(half[0]);
                assert!((1..=1 + reach).contains(&half.len()), "sigma {sigma}: {} taps, reach {reach}", half.len());
                assert!((total - 1.0).abs() < 1e-4, "sigma {sigma}: taps add up to {total}");
            }
            assert!(kernel.reach(MAX_SIGMA) <= MAX_REACH);
        }
    }
}
