//! Launches of `kernels/gram_norm.cu`.
#![allow(unsafe_code)] // launches

use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
use crate::error::Result;
use crate::ops::group_sums;
use crate::ops::row_tiles::{RowTiles, Rows};

use super::covariance::Covariance;
use super::fold::Fold;
use super::fold_backward::FoldBackward;
use super::shift::Shift;

kernels! { "gram_norm";
    /// g = d_y where y > 0, and partial sums of its columns.
    fn gram_masked_sums[F32, Bf16, F16; 256](
        d_y: DevicePtr, y: DevicePtr, g: DevicePtr, partials: DevicePtr, tiles: RowTiles,
    );
    /// y = x - mean
    fn gram_centre[F32, Bf16, F16; 256](x: DevicePtr, mean: DevicePtr, y: DevicePtr, tiles: RowTiles);
    /// Covariances of sums of products.
    fn gram_covariance[; 256](
        sums: DevicePtr, splits: i32, mean: DevicePtr, groups: i64, c: i32, rows: f64, centred: i32, covariance: DevicePtr,
    );
    /// Folded weight, bias, rstd and running statistics.
    fn gram_fold[F32, Bf16, F16; 128](
        w: DevicePtr, t: DevicePtr, mean: DevicePtr, gamma: DevicePtr, beta: DevicePtr, groups: i32, c_out: i32, c_in: i32,
        rows: f64, centred: i32, eps: f64, momentum: f64, folded: DevicePtr, bias: DevicePtr, rstd: DevicePtr, running_mean: DevicePtr,
        running_var: DevicePtr, tracked: DevicePtr,
    );
    /// d_w, d_gamma, d_beta, and what d_z takes.
    fn gram_fold_backward[; 128](
        r: DevicePtr, splits: i32, s: DevicePtr, mean: DevicePtr, t: DevicePtr, w: DevicePtr, gamma: DevicePtr,
        rstd: DevicePtr, groups: i32, c_out: i32, c_in: i32, per_row: f64, centred: i32, d_w: DevicePtr, accumulate_w: i32,
        d_gamma: DevicePtr, accumulate_gamma: i32, d_beta: DevicePtr, accumulate_beta: i32, q: DevicePtr,
    );
    /// m rounded, and -(s / rows) f - mean m.
    fn gram_shift[F32, Bf16, F16; 256](
        m: DevicePtr, s: DevicePtr, f: DevicePtr, mean: DevicePtr, c_out: i32, c_in: i32, per_row: f64, centred: i32,
        rounded: DevicePtr, bias: DevicePtr,
    );
}

/// Warps of a block that folds, one for each channel.
const FOLD_WARPS: usize = 4;

/// Output 0 is input 0 where input 1 is greater than 0; output 1 its sums.
pub(super) fn masked(io: &CudaIo<'_>, groups: usize) -> Result<()> {
    let rows = Rows::new(io.inputs[0].desc, groups);
    let tiles = rows.summing();
    let [d_y, y] = [0, 1].map(|i| io.inputs[i].ptr);
    let call = gram_masked_sums(io.dtype(), d_y, y, io.outputs[0].ptr, io.workspace, tiles);
    // SAFETY: `infer` checked that y is like d_y and made g so; `cuda_workspace` counted a sum for each channel of the tiles.
    unsafe { io.launch(rows.grid(tiles), call)? };
    // SAFETY: the launch before filled these sums; `infer` made output 1 [groups, channels].
    unsafe { group_sums::cuda::finish(io, &rows, io.workspace, 1.0, io.outputs[1].ptr) }
}

pub(super) fn centre(io: &CudaIo<'_>, groups: usize) -> Result<()> {
    let rows = Rows::new(io.inputs[0].desc, groups);
    let tiles = rows.streaming();
    let call = gram_centre(io.dtype(), io.inputs[0].ptr, io.inputs[1].ptr, io.outputs[0].ptr, tiles);
    // SAFETY: the tiles are those of x; `infer` checked that there is a mean for each group and channel, and made y like x.
    unsafe { io.launch(rows.grid(tiles), call) }
}

pub(super) fn covariance(io: &CudaIo<'_>, op: &Covariance) -> Result<()> {
    let c = io.outputs[0].desc.shape.channels();
    let splits = io.inputs[0].desc.shape.dims()[0] / op.groups;
    let (sums, mean, out) = (io.inputs[0].ptr, io.inputs[1].ptr, io.outputs[0].ptr);
    let (groups, centred) = (op.groups as i64, i32::from(op.centred));
    let call = gram_covariance(sums, splits as i32, mean, groups, c as i32, op.rows as f64, centred, out);
    // SAFETY: `infer` checked that the sums are [groups x splits, c, c] and the means [groups, c], and made the result
    // [groups, c, c].
    unsafe { io.launch(Grid::stride(op.groups * c * c, 256), call) }
}

pub(super) fn fold(io: &CudaIo<'_>, op: &Fold) -> Result<()> {
    let (c_out, c_in) = (io.outputs[2].desc.shape.channels(), io.inputs[2].desc.shape.channels());
    let [w, t, mean, gamma, beta] = [0, 1, 2, 3, 4].map(|i| io.inputs[i].ptr);
    let [folded, bias, rstd] = [0, 1, 2].map(|i| io.outputs[i].ptr);
    let [running_mean, running_var, tracked] = [0, 1, 2].map(|i| io.updates[i].ptr);
    let [groups, outputs, inputs] = [op.groups, c_out, c_in].map(|n| n as i32);
    let call = gram_fold(
        op.to,
        w,
        t,
        mean,
        gamma,
        beta,
        groups,
        outputs,
        inputs,
        op.rows as f64,
        i32::from(op.centred),
        op.eps,
        op.momentum,
        folded,
        bias,
        rstd,
        running_mean,
        running_var,
        tracked,
    );
    // SAFETY: `infer` checked w and T against c_out and c_in and the vectors against one of them, and made the outputs of these
    // sizes; the running statistics are [c_out], as `Fold` demands.
    unsafe { io.launch(Grid::new([c_out.div_ceil(FOLD_WARPS) as u32, 1, 1]), call) }
}

pub(super) fn fold_backward(io: &CudaIo<'_>, op: &FoldBackward) -> Result<()> {
    let [parts, c_out, c_in] = [0, 1, 2].map(|i| io.inputs[0].desc.shape.dims()[i]);
    let [r, s, mean, t, w, gamma, rstd] = [0, 1, 2, 3, 4, 5, 6].map(|i| io.inputs[i].ptr);
    let [splits, groups, outputs, inputs] = [parts / op.groups, op.groups, c_out, c_in].map(|n| n as i32);
    let to = |i: usize| (io.outputs[i].ptr, i32::from(io.outputs[i].accumulate));
    let [(d_w, accumulate_w), (d_gamma, accumulate_gamma), (d_beta, accumulate_beta)] = [0, 1, 2].map(to);
    let q = io.outputs[3].ptr;
    let call = gram_fold_backward(
        r,
        splits,
        s,
        mean,
        t,
        w,
        gamma,
        rstd,
        groups,
        outputs,
        inputs,
        1.0 / op.rows as f64,
        i32::from(op.centred),
        d_w,
        accumulate_w,
        d_gamma,
        accumulate_gamma,
        d_beta,
        accumulate_beta,
        q,
    );
    // SAFETY: `infer` checked every input against R's [groups x splits, c_out, c_in], and made the outputs like w, gamma and
    // the inputs of groups.
    unsafe { io.launch(Grid::new([c_out.div_ceil(FOLD_WARPS) as u32, 1, 1]), call) }
}

pub(super) fn shift(io: &CudaIo<'_>, op: &Shift) -> Result<()> {
    let (c_out, c_in) = (io.inputs[1].desc.shape.channels(), io.inputs[3].desc.shape.channels());
    let [m, s, f, mean] = [0, 1, 2, 3].map(|i| io.inputs[i].ptr);
    let ((rounded, bias), per_row) = ((io.outputs[0].ptr, io.outputs[1].ptr), 1.0 / op.rows as f64);
    let ([c_out, c_in], centred) = ([c_out as i32, c_in as i32], i32::from(op.centred));
    let tiles = (c_in as u32).div_ceil(32);
    let call = gram_shift(io.inputs[2].desc.dtype, m, s, f, mean, c_out, c_in, per_row, centred, rounded, bias);
    let grid = Grid::new([tiles, op.groups as u32, 1]);
    // SAFETY: `infer` checked m, s, F and the mean against c_out, c_in and the groups, and made the outputs like m and the mean.
    unsafe { io.launch(grid, call) }
}
