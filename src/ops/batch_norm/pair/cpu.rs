//! Two batch norms and their sum on the CPU: a row of the normalised shortcut lies in the cache only.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};

use super::super::cpu::{
    Coefficients, GroupGradient, MaskData, Masked, apply_row, known_statistics, statistics, store_mask,
    write_affine_gradients,
};
use super::super::sums::{block_rows, group_sums};
use super::super::{BatchNorm, pack};
use super::{BRANCHES, MASK, R};

/// Sums of each channel in the gradient: of g, of g (x - mean) and of g (r - mean).
pub(super) const SUMS: usize = 3;

pub(super) fn forward<T: Real>(op: &BatchNorm, io: &mut CpuIo<'_>) {
    let of_x = statistics::<T>(op, io, 1);
    let of_r = known_statistics::<T>(R + 1, true, op.groups, io);
    apply(io, [&of_x, &of_r], R, 3);
}

/// y and the mask, outputs 0 and `mask`, from x and r, inputs 0 and `r`, and what is to be done to each of their groups.
pub(in super::super) fn apply<T: Real>(
    io: &mut CpuIo<'_>,
    [of_x, of_r]: [&[Coefficients<T>]; 2],
    r: usize,
    mask: usize,
) {
    let desc = io.inputs[0].desc;
    let (channels, group_rows) = (desc.shape.channels(), desc.shape.rows() / of_x.len());
    let (x, r) = (io.inputs[0].get::<T>(), io.inputs[r].get::<T>());
    let rows = block_rows(group_rows);
    let (head, tail) = io.outputs.split_at_mut(mask);
    let y = head[0].get::<T>();
    y.par_chunks_mut(rows * channels).enumerate().for_each(|(block, y)| {
        let mut shortcut = vec![T::ZERO; channels];
        for (i, y) in y.chunks_exact_mut(channels).enumerate() {
            let row = block * rows + i;
            let (group, row) = (row / group_rows, row * channels);
            apply_row(&mut shortcut, &r[row..], None, false, &of_r[group]);
            apply_row(y, &x[row..], Some(&shortcut), true, &of_x[group]);
        }
    });
    store_mask(tail[0].get::<u8>(), y, pack(desc));
}

/// As batch norm's gradient, for both branches, which have the masked d_y in common.
pub(super) fn backward<T: Real>(groups: usize, io: &mut CpuIo<'_>) {
    let desc = io.inputs[1].desc;
    let (channels, group_rows) = (desc.shape.channels(), desc.shape.rows() / groups);
    let of_branch = |i: usize| BRANCHES.map(|branch| io.inputs[branch.x + i].get::<T>());
    let ([x, r], [mean, mean_of_r]) = (of_branch(0), of_branch(1));
    let (rstd, gamma) = (of_branch(2), of_branch(3));
    let mask = MaskData::Stored(io.inputs[MASK].get::<u8>(), pack(desc));
    let masked = Masked { channels, group_rows, d_y: io.inputs[0].get::<T>(), x, mask };

    let sums = group_sums::<T, SUMS>(io.workspace, (groups, group_rows, channels), |group, row, sums, g| {
        let [first, of_x, of_r] = sums.map(|sums| &mut sums[..channels]);
        let means = [mean, mean_of_r].map(|mean| &mean[group * channels..][..channels]);
        let [x, r] = [x, r].map(|values| &values[row * channels..][..channels]);
        let g = &masked.row(row, g)[..channels];
        for c in 0..channels {
            first[c] += g[c];
            of_x[c] += g[c] * (x[c] - means[0][c]);
            of_r[c] += g[c] * (r[c] - means[1][c]);
        }
    });
    // The sums of each group that a branch needs.
    let of_groups = |branch: usize| -> Vec<[&[f64]; 2]> {
        let numbers = [0, 1 + branch];
        sums.chunks(SUMS * channels).map(|sums| numbers.map(|i| &sums[i * channels..][..channels])).collect()
    };
    let gradients: [Vec<GroupGradient<T>>; 2] = std::array::from_fn(|branch| {
        let mean = [mean, mean_of_r][branch];
        let of_group = |(group, sums): (usize, [&[f64]; 2])| {
            let span = group * channels..(group + 1) * channels;
            GroupGradient::new(sums, &mean[span.clone()], &rstd[branch][span], Some(gamma[branch]), group_rows)
        };
        of_groups(branch).into_iter().enumerate().map(of_group).collect()
    });
    for (branch, numbers) in BRANCHES.iter().enumerate() {
        write_affine_gradients(io, &of_groups(branch), rstd[branch], numbers.d_x + 1);
    }

    let (head, tail) = io.outputs.split_at_mut(BRANCHES[1].d_x);
    let (d_x, d_r) = (&mut head[0], &mut tail[0]);
    let accumulate = [d_x.accumulate, d_r.accumulate];
    let rows = block_rows(group_rows);
    let blocks = d_x.get::<T>().par_chunks_mut(rows * channels).zip(d_r.get::<T>().par_chunks_mut(rows * channels));
    blocks.enumerate().for_each(|(block, (d_x, d_r))| {
        let mut g = vec![T::ZERO; channels];
        for (i, (d_x, d_r)) in d_x.chunks_exact_mut(channels).zip(d_r.chunks_exact_mut(channels)).enumerate() {
            let row = block * rows + i;
            let (g, group) = (masked.row(row, &mut g), row / group_rows);
            let [x, r] = [x, r].map(|values| &values[row * channels..][..channels]);
            gradients[0][group].input_gradient(d_x, g, x, accumulate[0]);
            gradients[1][group].input_gradient(d_r, g, r, accumulate[1]);
        }
    });
}
