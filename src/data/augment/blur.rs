//! Gaussian blur as PIL does it: three passes of a box of fractional width whose variances add up to sigma squared.
//! The three boxes are convolved into one short kernel, applied to rows and then to columns; the border is repeated.

use crate::data::augment::Planes;

/// Values that are summed up in registers at a time.
const LANES: usize = 32;

/// The kernel of `sigma`: its centre and right half (it is symmetric).
fn half_kernel(sigma: f64, kernel: &mut Vec<f32>) {
    let radius = box_radius(sigma);
    let whole = radius.floor();
    let box_weight = |distance: i32| match distance.abs() - whole as i32 {
        ..=0 => 1.0 / (2.0 * radius + 1.0),
        1 => (radius - whole) / (2.0 * radius + 1.0),
        _ => 0.0,
    };
    let reach = whole as i32 + 1;
    let twice = |distance: i32| -> f64 { (-reach..=reach).map(|i| box_weight(i) * box_weight(distance - i)).sum() };
    let thrice = |distance: i32| -> f64 { (-reach..=reach).map(|i| box_weight(i) * twice(distance - i)).sum() };
    kernel.clear();
    kernel.extend((0..=3 * reach).map(|distance| thrice(distance) as f32));
    // Taps below a thousandth of a level cost time and change nothing.
    while kernel.last().is_some_and(|&weight| weight < 1e-6) {
        kernel.pop();
    }
}

/// The radius (half of the width minus one) of the fractional box of which three passes have the variance of `sigma`.
fn box_radius(sigma: f64) -> f64 {
    let variance = sigma * sigma / 3.0;
    let whole = (((12.0 * variance + 1.0).sqrt() - 1.0) / 2.0).floor();
    let fraction = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
    whole + fraction
}

/// Blurs planes; keeps its scratch memory.
#[derive(Debug, Default)]
pub(super) struct Blur {
    half: Vec<f32>,
    /// One row with its border repeated on both sides.
    padded: Vec<f32>,
    /// A plane after its rows were blurred; each row is followed by space up to a multiple of [`LANES`].
    rows: Vec<f32>,
}

impl Blur {
    /// Blurs all three planes with the given sigma in pixels.
    #[inline(always)]
    pub(super) fn apply(&mut self, planes: &mut Planes, sigma: f32) {
        half_kernel(f64::from(sigma), &mut self.half);
        let size = planes.size();
        let (reach, stride) = (self.half.len() - 1, size.next_multiple_of(LANES));
        self.padded.resize(stride + 2 * reach, 0.0);
        self.rows.resize(stride * size, 0.0);
        for plane in planes.each_mut() {
            for (row, blurred) in plane.chunks_exact(size).zip(self.rows.chunks_exact_mut(stride)) {
                self.padded[..reach].fill(row[0]);
                self.padded[reach..reach + size].copy_from_slice(row);
                self.padded[reach + size..].fill(row[size - 1]);
                for (x, sums) in blurred.as_chunks_mut().0.iter_mut().enumerate() {
                    let at = |offset: usize| &self.padded[x * LANES + offset..];
                    *sums = convolve(&self.half, at(reach), |i| (at(reach - i), at(reach + i)));
                }
            }
            for (y, row) in plane.chunks_exact_mut(size).enumerate() {
                for (x, out) in row.chunks_mut(LANES).enumerate() {
                    let at = |y: usize| &self.rows[y * stride + x * LANES..];
                    let below = |i: usize| at((y + i).min(size - 1));
                    let sums = convolve(&self.half, at(y), |i: usize| (at(y.saturating_sub(i)), below(i)));
                    out.copy_from_slice(&sums[..out.len()]);
                }
            }
        }
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
