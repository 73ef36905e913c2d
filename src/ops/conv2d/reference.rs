//! The oracle: plain loops, every sum in float64. Slow and obvious.

use std::ops::Range;

use rayon::prelude::*;

use crate::backend::conv::ConvGeometry;
use crate::backend::cpu::Real;

/// y = x * w.
///
/// # Panics
/// If a slice does not have the length that the geometry gives it.
pub fn forward<T: Real>(g: &ConvGeometry, x: &[T], w: &[T], y: &mut [T]) {
    g.check_lengths(x.len(), w.len(), y.len());
    y.par_chunks_mut(g.c_out).enumerate().for_each(|(pixel, y)| {
        let (n, oy, ox) = (pixel / (g.oh() * g.ow()), pixel / g.ow() % g.oh(), pixel % g.ow());
        for (co, y) in y.iter_mut().enumerate() {
            let mut sum = 0.0;
            for ky in 0..g.kernel[0] {
                for kx in 0..g.kernel[1] {
                    let Some([iy, ix]) = input_of(g, [oy, ox], [ky, kx]) else { continue };
                    let (x, w) = (&x[x_range(g, n, iy, ix)], &w[w_range(g, co, ky, kx)]);
                    sum += x.iter().zip(w).map(|(x, w)| x.to_f64() * w.to_f64()).sum::<f64>();
                }
            }
            *y = T::of(sum);
        }
    });
}

/// Gradient of the input, written over `d_x` or added to it.
///
/// # Panics
/// If a slice does not have the length that the geometry gives it.
pub fn dgrad<T: Real>(g: &ConvGeometry, d_y: &[T], w: &[T], d_x: &mut [T], accumulate: bool) {
    g.check_lengths(d_x.len(), w.len(), d_y.len());
    d_x.par_chunks_mut(g.c_in).enumerate().for_each_init(
        || vec![0.0; g.c_in],
        |sums, (pixel, d_x)| {
            let (n, iy, ix) = (pixel / (g.h * g.w), pixel / g.w % g.h, pixel % g.w);
            sums.fill(0.0);
            for ky in 0..g.kernel[0] {
                for kx in 0..g.kernel[1] {
                    let Some([oy, ox]) = output_of(g, [iy, ix], [ky, kx]) else { continue };
                    for (co, d_y) in d_y[y_range(g, n, oy, ox)].iter().enumerate() {
                        add_scaled(sums, d_y.to_f64(), &w[w_range(g, co, ky, kx)]);
                    }
                }
            }
            store(d_x, sums, accumulate);
        },
    );
}

/// Gradient of the weights, written over `d_w` or added to it. Needs no workspace; the parameter is there so that all tiers
/// are called alike.
///
/// # Panics
/// If a slice does not have the length that the geometry gives it.
pub fn wgrad<T: Real>(g: &ConvGeometry, x: &[T], d_y: &[T], d_w: &mut [T], accumulate: bool, _workspace: &mut [T]) {
    g.check_lengths(x.len(), d_w.len(), d_y.len());
    d_w.par_chunks_mut(g.c_in).enumerate().for_each_init(
        || vec![0.0; g.c_in],
        |sums, (tap, d_w)| {
            let taps = g.kernel[0] * g.kernel[1];
            let (co, ky, kx) = (tap / taps, tap / g.kernel[1] % g.kernel[0], tap % g.kernel[1]);
            sums.fill(0.0);
            for n in 0..g.n {
                for oy in 0..g.oh() {
                    for ox in 0..g.ow() {
                        let Some([iy, ix]) = input_of(g, [oy, ox], [ky, kx]) else { continue };
                        let d_y = d_y[y_range(g, n, oy, ox)][co];
                        add_scaled(sums, d_y.to_f64(), &x[x_range(g, n, iy, ix)]);
                    }
                }
            }
            store(d_w, sums, accumulate);
        },
    );
}

/// Elements of workspace that [`wgrad`] needs: none.
pub fn wgrad_workspace(_g: &ConvGeometry) -> usize {
    0
}

/// The input pixel that output pixel `o` reads through kernel tap `k`, if it lies inside the image.
fn input_of(g: &ConvGeometry, o: [usize; 2], k: [usize; 2]) -> Option<[usize; 2]> {
    let axis = |d: usize, size: usize| (o[d] * g.stride[d] + k[d]).checked_sub(g.padding[d]).filter(|&i| i < size);
    Some([axis(0, g.h)?, axis(1, g.w)?])
}

/// The output pixel that reads input pixel `i` through kernel tap `k`, if there is one.
fn output_of(g: &ConvGeometry, i: [usize; 2], k: [usize; 2]) -> Option<[usize; 2]> {
    let axis = |d: usize, size: usize| {
        let scaled = (i[d] + g.padding[d]).checked_sub(k[d])?;
        (scaled % g.stride[d] == 0).then_some(scaled / g.stride[d]).filter(|&o| o < size)
    };
    Some([axis(0, g.oh())?, axis(1, g.ow())?])
}

fn x_range(g: &ConvGeometry, n: usize, iy: usize, ix: usize) -> Range<usize> {
    let start = ((n * g.h + iy) * g.w + ix) * g.c_in;
    start..start + g.c_in
}

fn y_range(g: &ConvGeometry, n: usize, oy: usize, ox: usize) -> Range<usize> {
    let start = ((n * g.oh() + oy) * g.ow() + ox) * g.c_out;
    start..start + g.c_out
}

fn w_range(g: &ConvGeometry, co: usize, ky: usize, kx: usize) -> Range<usize> {
    let start = ((co * g.kernel[0] + ky) * g.kernel[1] + kx) * g.c_in;
    start..start + g.c_in
}

fn add_scaled<T: Real>(sums: &mut [f64], factor: f64, values: &[T]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += factor * value.to_f64();
    }
}

fn store<T: Real>(to: &mut [T], sums: &[f64], accumulate: bool) {
    for (to, &sum) in to.iter_mut().zip(sums) {
        *to = T::of(if accumulate { to.to_f64() + sum } else { sum });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 x 1 x 2 x 3 image [[1, 2, 3], [4, 5, 6]], kernel [[1, 10], [100, 1000]]: every digit of a result names its source.
    const PLAIN: ConvGeometry =
        ConvGeometry { n: 1, h: 2, w: 3, c_in: 1, c_out: 1, kernel: [2, 2], stride: [1, 1], padding: [0, 0] };
    const X: [f64; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    const W: [f64; 4] = [1.0, 10.0, 100.0, 1000.0];

    #[test]
    fn forward_is_cross_correlation() {
        let mut y = [0.0; 2];
        forward(&PLAIN, &X, &W, &mut y);
        assert_eq!(y, [5421.0, 6532.0]);
        // Stride 2 x 3 and padding 1 x 2: windows start at rows -1, 1 and columns -2, 1.
        let strided = ConvGeometry { stride: [2, 3], padding: [1, 2], ..PLAIN };
        let mut y = [f64::NAN; 4];
        forward(&strided, &X, &W, &mut y);
        assert_eq!(y, [0.0, 3200.0, 0.0, 65.0]);
    }

    #[test]
    fn dgrad_spreads_each_output_over_its_window() {
        let mut d_x = [0.5; 6];
        dgrad(&PLAIN, &[2.0, 3.0], &W, &mut d_x, false);
        assert_eq!(d_x, [2.0, 23.0, 30.0, 200.0, 2300.0, 3000.0]);
        dgrad(&PLAIN, &[0.0, 1.0], &W, &mut d_x, true);
        assert_eq!(d_x, [2.0, 24.0, 40.0, 200.0, 2400.0, 4000.0]);
    }

    #[test]
    fn wgrad_sums_products_over_pixels() {
        let mut d_w = [7.0; 4];
        wgrad(&PLAIN, &X, &[100.0, 1.0], &mut d_w, false, &mut []);
        assert_eq!(d_w, [102.0, 203.0, 405.0, 506.0]);
        wgrad(&PLAIN, &X, &[1.0, 0.0], &mut d_w, true, &mut []);
        assert_eq!(d_w, [103.0, 205.0, 409.0, 511.0]);
    }

    /// Convolution of a separable pattern has a closed form: x = a^row b^col gives y = x0 * sum of w a^ky b^kx, channel by
    /// channel. Independent of the index arithmetic under test.
    #[test]
    fn forward_of_an_exponential_image_is_the_kernel_polynomial() {
        let g = ConvGeometry { n: 2, h: 7, w: 9, c_in: 3, c_out: 5, kernel: [3, 2], stride: [2, 3], padding: [0, 0] };
        let (a, b) = (1.25f64, 0.75f64);
        let weight =
            |co: usize, ky: usize, kx: usize, ci: usize| (1 + co * 7 + ky * 5 + kx * 3 + ci * 11) as f64 * 0.125;
        let scale = |n: usize, ci: usize| (1.0 + n as f64) * (ci as f64 - 0.5);
        let mut x = Vec::new();
        for n in 0..g.n {
            for row in 0..g.h {
                for col in 0..g.w {
                    x.extend((0..g.c_in).map(|ci| scale(n, ci) * a.powi(row as i32) * b.powi(col as i32)));
                }
            }
        }
        let mut w = Vec::new();
        for co in 0..g.c_out {
            for ky in 0..3 {
                for kx in 0..2 {
                    w.extend((0..g.c_in).map(|ci| weight(co, ky, kx, ci)));
                }
            }
        }
        assert_eq!((g.oh(), g.ow()), (3, 3));
        let mut y = vec![f64::NAN; g.y_len()];
        forward(&g, &x, &w, &mut y);
        for (i, &got) in y.iter().enumerate() {
            let (co, ox, oy, n) = (i % 5, i / 5 % 3, i / 15 % 3, i / 45);
            let mut polynomial = 0.0;
            for ci in 0..3 {
                for ky in 0..3 {
                    for kx in 0..2 {
                        polynomial += scale(n, ci) * weight(co, ky, kx, ci) * a.powi(ky as i32) * b.powi(kx as i32);
                    }
                }
            }
            let want = polynomial * a.powi(2 * oy as i32) * b.powi(3 * ox as i32);
            assert!((got - want).abs() <= 1e-12 * want.abs(), "{i}: {got} against {want}");
        }
    }

    /// The convolution is bilinear, so <d_y, forward(x, w)> = <dgrad(d_y, w), x> = <wgrad(x, d_y), w>.
    #[test]
    fn gradients_are_the_adjoints_of_forward() {
        let g = ConvGeometry { n: 2, h: 6, w: 5, c_in: 3, c_out: 4, kernel: [3, 2], stride: [2, 1], padding: [2, 1] };
        let wave = |len: usize, step: f64| (0..len).map(|i| (i as f64 * step).sin()).collect::<Vec<f64>>();
        let (x, w, d_y) = (wave(g.x_len(), 0.9), wave(g.w_len(), 1.7), wave(g.y_len(), 2.3));
        let (mut y, mut d_x, mut d_w) = (vec![0.0; g.y_len()], vec![0.0; g.x_len()], vec![0.0; g.w_len()]);
        forward(&g, &x, &w, &mut y);
        dgrad(&g, &d_y, &w, &mut d_x, false);
        wgrad(&g, &x, &d_y, &mut d_w, false, &mut []);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let want = dot(&d_y, &y);
        assert!(want.abs() > 1e-3);
        assert!((dot(&d_x, &x) - want).abs() < 1e-12 * 100.0, "dgrad");
        assert!((dot(&d_w, &w) - want).abs() < 1e-12 * 100.0, "wgrad");
    }
}
