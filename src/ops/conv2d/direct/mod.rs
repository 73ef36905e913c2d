//! Implicit GEMM: patches are gathered into tiles that stay in the L2 cache and multiplied there. No matrix of all patches
//! is ever made. Blocks and the order of sums depend on the geometry alone, so results are bit-identical for any number of
//! threads.

mod gather;
mod grid;
mod wgrad;

pub use grid::{dgrad, forward};
pub use wgrad::{wgrad, wgrad_workspace};

use crate::backend::conv::ConvGeometry;

/// Bytes of scratch memory of one convolution in elements of type `T`. Threads keep and reuse the memory: over several
/// convolutions the largest counts, not the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScratchBytes {
    /// The packed weights, in the thread that makes the call.
    pub call: usize,
    /// Tiles of patches and products, in every thread.
    pub thread: usize,
}

/// The scratch memory that all passes of a convolution need at most.
pub fn scratch_bytes<T>(g: &ConvGeometry) -> ScratchBytes {
    let [weights, grid] = grid::scratch(g);
    ScratchBytes { call: weights * size_of::<T>(), thread: grid.max(wgrad::scratch(g)) * size_of::<T>() }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::backend::cpu::Real;
    use crate::rng::Stream;

    fn geometry(n: usize, hw: [usize; 2], c: [usize; 2], k: [usize; 2], s: [usize; 2], p: [usize; 2]) -> ConvGeometry {
        ConvGeometry { n, h: hw[0], w: hw[1], c_in: c[0], c_out: c[1], kernel: k, stride: s, padding: p }
    }

    fn awkward() -> Vec<ConvGeometry> {
        vec![
            geometry(2, [9, 7], [3, 17], [3, 3], [1, 1], [1, 1]),
            geometry(3, [8, 11], [64, 33], [3, 3], [1, 1], [1, 1]),
            geometry(2, [9, 8], [5, 7], [3, 3], [2, 2], [1, 1]),
            geometry(2, [12, 12], [7, 64], [3, 3], [2, 2], [1, 1]),
            geometry(1, [23, 30], [3, 9], [7, 7], [2, 2], [3, 3]),
            geometry(1, [6, 5], [64, 31], [1, 1], [1, 1], [0, 0]),
            geometry(4, [7, 7], [31, 65], [1, 1], [2, 2], [0, 0]),
            geometry(2, [11, 13], [5, 3], [5, 3], [3, 2], [1, 2]),
            geometry(2, [5, 4], [1, 1], [2, 4], [1, 3], [3, 5]),
            geometry(1, [3, 3], [7, 5], [3, 3], [4, 4], [2, 2]),
            geometry(1, [1, 1], [3, 2], [1, 1], [1, 1], [0, 0]),
            geometry(3, [5, 6], [130, 47], [3, 3], [1, 1], [1, 1]),
            geometry(1, [4, 4], [512, 40], [3, 3], [1, 1], [1, 1]),
            geometry(5, [16, 14], [9, 96], [3, 3], [1, 2], [0, 1]),
            geometry(1, [20, 37], [33, 5], [3, 3], [1, 2], [1, 1]),
            geometry(2, [3, 4], [300, 270], [3, 3], [1, 1], [1, 1]),
            geometry(2, [2, 2], [280, 9], [3, 3], [2, 2], [1, 1]),
        ]
    }

    fn noise<T: Real>(len: usize, index: u64) -> Vec<T> {
        let mut stream = Stream::new(42, 0, index);
        (0..len).map(|_| T::of(stream.uniform(-1.0, 1.0))).collect()
    }

    /// Input, weights and output gradient.
    fn tensors<T: Real>(g: &ConvGeometry) -> [Vec<T>; 3] {
        [noise(g.x_len(), 1), noise(g.w_len(), 2), noise(g.y_len(), 3)]
    }

    fn widened<T: Real>(values: &[T]) -> Vec<f64> {
        values.iter().map(|v| v.to_f64()).collect()
    }

    fn magnitudes<T: Real>(values: &[T]) -> Vec<f64> {
        values.iter().map(|v| v.to_f64().abs()).collect()
    }

    /// y, d_x and d_w of one tier. Outputs hold `before` first, or NaN where they are to be overwritten.
    struct Passes<T> {
        y: Vec<T>,
        d_x: Vec<T>,
        d_w: Vec<T>,
    }

    fn before<T: Real>(len: usize, accumulate: bool) -> Vec<T> {
        if accumulate { noise(len, 4) } else { vec![T::of(f64::NAN); len] }
    }

    fn direct<T: Real>(g: &ConvGeometry, [x, w, d_y]: &[Vec<T>; 3], accumulate: bool) -> Passes<T> {
        let mut y = before(g.y_len(), false);
        let (mut d_x, mut d_w) = (before(g.x_len(), accumulate), before(g.w_len(), accumulate));
        let mut workspace = before(wgrad_workspace(g), false);
        forward(g, x, w, &mut y);
        dgrad(g, d_y, w, &mut d_x, accumulate);
        wgrad(g, x, d_y, &mut d_w, accumulate, &mut workspace);
        Passes { y, d_x, d_w }
    }

    fn oracle(g: &ConvGeometry, [x, w, d_y]: &[Vec<f64>; 3], [mut d_x, mut d_w]: [Vec<f64>; 2]) -> Passes<f64> {
        let mut y = vec![0.0; g.y_len()];
        reference::forward(g, x, w, &mut y);
        reference::dgrad(g, d_y, w, &mut d_x, true);
        reference::wgrad(g, x, d_y, &mut d_w, true, &mut []);
        Passes { y, d_x, d_w }
    }

    /// Every element within `tolerance` of the oracle, relative to the sum of the magnitudes of its terms.
    fn check<T: Real>(g: &ConvGeometry, tolerance: f64, accumulate: bool) {
        let inputs = tensors::<T>(g);
        let got = direct(g, &inputs, accumulate);
        let old = |len| if accumulate { widened(&before::<T>(len, true)) } else { vec![0.0; len] };
        let want = oracle(g, &inputs.each_ref().map(|v| widened(v)), [old(g.x_len()), old(g.w_len())]);
        let scale = oracle(
            g,
            &inputs.each_ref().map(|v| magnitudes(v)),
            [old(g.x_len()), old(g.w_len())].map(|v| magnitudes(&v)),
        );
        let results = [
            ("y", got.y, want.y, scale.y),
            ("d_x", got.d_x, want.d_x, scale.d_x),
            ("d_w", got.d_w, want.d_w, scale.d_w),
        ];
        for (name, got, want, scale) in results {
            for (i, got) in got.iter().enumerate() {
                let error = (got.to_f64() - want[i]).abs();
                assert!(error <= tolerance * scale[i], "{g:?} {name}[{i}]: {got} against {}", want[i]);
            }
        }
    }

    #[test]
    fn agrees_with_the_reference_in_f64() {
        for g in awkward() {
            check::<f64>(&g, 1e-14, false);
            check::<f64>(&g, 1e-14, true);
        }
    }

    #[test]
    fn agrees_with_the_reference_in_f32() {
        for g in awkward() {
            check::<f32>(&g, 1e-6, false);
            check::<f32>(&g, 1e-6, true);
        }
    }

    #[test]
    fn scratch_memory_is_as_declared() {
        for g in awkward() {
            let [x, w, d_y] = tensors::<f32>(&g);
            type Pass = fn(&ConvGeometry, &mut [Vec<f32>; 3]);
            let passes: [Pass; 3] = [
                |g, [x, w, y]| forward(g, x, w, y),
                |g, [x, w, y]| dgrad(g, y, w, x, false),
                |g, [x, w, y]| wgrad(g, x, y, w, false, &mut vec![0.0; wgrad_workspace(g)]),
            ];
            let declared = scratch_bytes::<f32>(&g);
            for pass in passes {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                let mut tensors = [x.clone(), w.clone(), d_y.clone()];
                let kept = pool.install(|| {
                    pass(&g, &mut tensors);
                    crate::backend::cpu::scratch::kept_bytes()
                });
                let rounding = 3 * 64; // three buffers of whole cache lines
                assert!(kept > 0 && kept <= declared.call + declared.thread + rounding, "{g:?}: {kept}, {declared:?}");
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        for g in awkward() {
            let inputs = tensors::<f32>(&g);
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let passes = pool.install(|| direct(&g, &inputs, false));
                [passes.y, passes.d_x, passes.d_w].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            };
            let one = run(1);
            for threads in 2..=4 {
                assert_eq!(one, run(threads), "{g:?}, {threads} threads");
            }
        }
    }
}
