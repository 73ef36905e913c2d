//! Two batch norms and their sum on CUDA: statistics and the combination of sums as in batch norm, kernels of its own around them.
#![allow(unsafe_code)] // launches

use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr};
use crate::error::Result;
use crate::ops::row_tiles::{RowTiles, Rows};

use super::super::BatchNorm;
use super::super::cuda::{
    Affine, Statistics, Sums, finish_backward, known_statistics, partials_bytes, statistics, workspace_bytes,
};
use super::{BRANCHES, MASK, R};

kernels! { "batch_norm_pair";
    /// y = relu((x - mean) scale + beta + (r - mean_r) rstd_r gamma_r + beta_r), and the mask
    fn batch_norm_pair_apply[F32, Bf16, F16; 256](
        x: DevicePtr, mean: DevicePtr, scale: DevicePtr, beta: DevicePtr, r: DevicePtr, mean_r: DevicePtr, rstd_r: DevicePtr,
        gamma_r: DevicePtr, beta_r: DevicePtr, y: DevicePtr, mask: DevicePtr, tiles: RowTiles,
    );
    /// Partial sums of the masked d_y and of its products with x - mean and with r - mean_r
    fn batch_norm_pair_reduce[F32, Bf16, F16; 256](
        d_y: DevicePtr, mask: DevicePtr, x: DevicePtr, mean: DevicePtr, partials: DevicePtr, r: DevicePtr, mean_r: DevicePtr,
        partials_r: DevicePtr, tiles: RowTiles,
    );
    /// d_x and d_r
    fn batch_norm_pair_backward[F32, Bf16, F16; 256](
        d_y: DevicePtr, mask: DevicePtr, x: DevicePtr, mean: DevicePtr, coefficients: DevicePtr, d_x: DevicePtr,
        accumulate: i32, r: DevicePtr, mean_r: DevicePtr, coefficients_r: DevicePtr, d_r: DevicePtr, accumulate_r: i32,
        all: i64, tiles: RowTiles,
    );
}

pub(super) fn forward(op: &BatchNorm, io: &CudaIo<'_>) -> Result<()> {
    let by = statistics(op, &Rows::new(io.inputs[0].desc, op.groups), io, 1)?;
    // SAFETY: `infer` checked what belongs to r, and made y and the mask, outputs 0 and 3.
    unsafe { apply(op.groups, by, R, 3, io) }
}

/// The same from statistics of x that are known, as inputs 1 to 4; r is input 5, and the mask output 1.
pub(in super::super) fn repeat(groups: usize, io: &CudaIo<'_>) -> Result<()> {
    let by = known_statistics(true, groups, io)?;
    // SAFETY: `infer` checked what belongs to r, and made y and the mask, outputs 0 and 1.
    unsafe { apply(groups, by, 5, 1, io) }
}

/// y and the mask, outputs 0 and `mask`, from x, input 0, and r, input `r`, behind which are its mean, rstd, gamma and beta.
///
/// # Safety
/// r and y are like x, the mask has a byte for each of its packs, and the statistics are those of its groups and channels.
unsafe fn apply(groups: usize, by: Statistics, r: usize, mask: usize, io: &CudaIo<'_>) -> Result<()> {
    let rows = Rows::new(io.inputs[0].desc, groups);
    let Statistics { mean, scale, beta } = by;
    let [r, mean_r, rstd_r, gamma_r, beta_r] = [0, 1, 2, 3, 4].map(|i| io.inputs[r + i].ptr);
    let [x, y, mask] = [io.inputs[0].ptr, io.outputs[0].ptr, io.outputs[mask].ptr];
    let tiles = rows.streaming();
    let call =
        batch_norm_pair_apply(io.dtype(), x, mean, scale, beta, r, mean_r, rstd_r, gamma_r, beta_r, y, mask, tiles);
    // SAFETY: the tiles are those of x; the rest is the caller's promise.
    unsafe { io.launch(rows.grid(tiles), call) }
}

pub(super) fn backward(groups: usize, io: &CudaIo<'_>) -> Result<()> {
    let rows = Rows::new(io.inputs[1].desc, groups);
    let [d_y, mask] = [io.inputs[0].ptr, io.inputs[MASK].ptr];
    let [[x, mean], [r, mean_r]] = BRANCHES.map(|branch| [0, 1].map(|i| io.inputs[branch.x + i].ptr));
    // Both branches' partial sums, which are 8 bytes each, come before the coefficients, which are 4.
    let sums = partials_bytes(&rows);
    let of_branch = workspace_bytes(&rows, 3) - sums;
    let partials = [0, 1].map(|branch| io.workspace.offset(branch * sums));
    let coefficients = [0, 1].map(|branch| io.workspace.offset(2 * sums + branch * of_branch));

    let tiles = rows.summing();
    let call = batch_norm_pair_reduce(io.dtype(), d_y, mask, x, mean, partials[0], r, mean_r, partials[1], tiles);
    // SAFETY: `infer` checked that d_y is like x, and the forward op that r is, that both means are [groups, channels] and that the
    // mask has a byte for each pack of x; `cuda_workspace` counted two sums for each channel of the tiles, twice.
    unsafe { io.launch(rows.grid(tiles), call)? };

    for ((branch, partials), coefficients) in BRANCHES.iter().zip(partials).zip(coefficients) {
        let sums = Sums { rows: rows.rows, summed: &rows, partials, coefficients };
        finish_backward(sums, Affine { rstd: branch.x + 2, gamma: Some(branch.x + 3), d_gamma: branch.d_x + 1 }, io)?;
    }

    let [d_x, d_r] = BRANCHES.map(|branch| &io.outputs[branch.d_x]);
    let all = (rows.groups * rows.channels) as i64;
    let tiles = rows.streaming();
    let call = batch_norm_pair_backward(
        io.dtype(),
        d_y,
        mask,
        x,
        mean,
        coefficients[0],
        d_x.ptr,
        i32::from(d_x.accumulate),
        r,
        mean_r,
        coefficients[1],
        d_r.ptr,
        i32::from(d_r.accumulate),
        all,
        tiles,
    );
    // SAFETY: as for the first pass; `infer` made d_x and d_r like x, and the coefficients are there.
    unsafe { io.launch(rows.grid(tiles), call) }
}
