//! Sums of a few quantities per channel over the rows of groups, on the CPU. Each group is cut into a fixed number of blocks,
//! whose sums are combined in order, so results do not depend on the number of threads.

use rayon::prelude::*;

use crate::backend::cpu::Real;

/// Blocks per group: enough to balance any number of cores, few enough that combining them costs nothing.
const BLOCKS: usize = 32;
/// Rows summed in the tensor's precision before the sums move to float64: bounds the rounding error of float32 sums.
pub(in crate::ops) const CHAIN: usize = 64;

/// Scratch for so many float64 sums per channel, block and group.
pub(in crate::ops) fn workspace_bytes(sums: usize, channels: usize, groups: usize) -> usize {
    groups * BLOCKS * sums * channels * size_of::<f64>()
}

/// Rows of a block.
pub(in crate::ops) fn block_rows(group_rows: usize) -> usize {
    group_rows.div_ceil(BLOCKS).max(1)
}

/// Sums S per-channel quantities over the rows of each group: `term(group, row, sums, scratch)` adds one row's terms to the S
/// sums of a channel each; in `scratch` it may keep a row. Returns the sums as `[group][S][c]`.
pub(in crate::ops) fn group_sums<T: Real, const S: usize>(
    workspace: &mut [u8],
    (groups, group_rows, channels): (usize, usize, usize),
    term: impl Fn(usize, usize, [&mut [T]; S], &mut [T]) + Sync,
) -> Vec<f64> {
    let partials: &mut [f64] = &mut bytemuck::cast_slice_mut(workspace)[..groups * BLOCKS * S * channels];
    let rows_per_block = block_rows(group_rows);
    partials.par_chunks_mut(S * channels).enumerate().for_each(|(task, partial)| {
        partial.fill(0.0);
        let (group, block) = (task / BLOCKS, task % BLOCKS);
        let end = ((block + 1) * rows_per_block).min(group_rows);
        let (mut chain, mut scratch) = (vec![T::ZERO; S * channels], vec![T::ZERO; channels]);
        let mut row = block * rows_per_block;
        while row < end {
            chain.fill(T::ZERO);
            for r in row..(row + CHAIN).min(end) {
                let mut sums = chain.chunks_exact_mut(channels);
                let sums = std::array::from_fn(|_| sums.next().unwrap_or_default());
                term(group, group * group_rows + r, sums, &mut scratch);
            }
            partial.iter_mut().zip(&chain).for_each(|(p, c)| *p += c.to_f64());
            row += CHAIN;
        }
    });
    let mut sums = vec![0.0; groups * S * channels];
    for (task, partial) in partials.chunks(S * channels).enumerate() {
        let group = task / BLOCKS;
        let sum = &mut sums[group * S * channels..][..S * channels];
        sum.iter_mut().zip(partial).for_each(|(s, p)| *s += p);
    }
    sums
}
