//! Batch norm on CUDA: partial sums over tiles of rows, a kernel that combines them, and one pass that applies the result.
//! What each kernel reads and writes, and how many bytes that is, stands in `kernels/batch_norm.cu`.
#![allow(unsafe_code)] // launches

use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
use crate::error::Result;
use crate::ops::group_sums;
use crate::ops::row_tiles::{RowTiles, Rows};
use crate::tensor::TensorDesc;

use super::{BatchNorm, BatchNormBackward, BatchNormEval, Fusion, Mask};

kernels! { "batch_norm";
    /// Partial sums of x - shift and its square.
    fn batch_norm_statistics[F32, Bf16, F16; 256](x: DevicePtr, partials: DevicePtr, tiles: RowTiles);
    /// Combines them: mean, rstd, the scale for `batch_norm_apply`, running statistics.
    fn batch_norm_finish_statistics[F32, Bf16, F16; 512](
        partials: DevicePtr, chunks: i32, groups: i32, x: DevicePtr, rows: i64, channels: i32, gamma: DevicePtr, eps: f64,
        momentum: f64, mean: DevicePtr, rstd: DevicePtr, scale: DevicePtr, running_mean: DevicePtr, running_var: DevicePtr,
        num_batches_tracked: DevicePtr,
    );
    /// The same from the sums of x and of its square.
    fn batch_norm_finish_sums[; 256](
        sums: DevicePtr, groups: i32, rows: i64, channels: i32, gamma: DevicePtr, eps: f64, momentum: f64, mean: DevicePtr,
        rstd: DevicePtr, scale: DevicePtr, running_mean: DevicePtr, running_var: DevicePtr, num_batches_tracked: DevicePtr,
    );
    /// y = act((x - mean) scale + beta + residual)
    fn batch_norm_apply[F32, Bf16, F16; 256](
        x: DevicePtr, residual: DevicePtr, mean: DevicePtr, scale: DevicePtr, beta: DevicePtr, relu: i32, y: DevicePtr,
        mask: DevicePtr, tiles: RowTiles,
    );
    /// scale = gamma rstd, of each channel and group
    fn batch_norm_scale[; 256](rstd: DevicePtr, gamma: DevicePtr, scale: DevicePtr, groups: i32, channels: i32);
    /// y = act((x - mean) scale + beta), and partial sums of its columns
    fn batch_norm_apply_and_sum[F32, Bf16, F16; 256](
        x: DevicePtr, mean: DevicePtr, scale: DevicePtr, beta: DevicePtr, relu: i32, y: DevicePtr, partials: DevicePtr,
        tiles: RowTiles,
    );
    /// scale = gamma / sqrt(running_var + eps)
    fn batch_norm_eval_scale[; 256](variance: DevicePtr, gamma: DevicePtr, eps: f64, scale: DevicePtr, channels: i32);
    /// Partial sums of the masked d_y and of its product with x - mean; d_residual.
    fn batch_norm_backward_reduce[F32, Bf16, F16; 256](
        d_y: DevicePtr, x: DevicePtr, masking: i32, mask: DevicePtr, mean: DevicePtr, rstd: DevicePtr, gamma: DevicePtr,
        beta: DevicePtr, d_residual: DevicePtr, partials: DevicePtr, tiles: RowTiles,
    );
    /// Combines them: d_gamma, d_beta, the coefficients for `batch_norm_backward_apply`.
    fn batch_norm_finish_backward[; 512](
        partials: DevicePtr, chunks: i32, groups: i32, rows: i64, channels: i32, rstd: DevicePtr, gamma: DevicePtr,
        coefficients: DevicePtr, d_gamma: DevicePtr, accumulate_gamma: i32, d_beta: DevicePtr, accumulate_beta: i32,
    );
    /// d_x; adds to d_residual
    fn batch_norm_backward_apply[F32, Bf16, F16; 256](
        d_y: DevicePtr, x: DevicePtr, masking: i32, mask: DevicePtr, mean: DevicePtr, coefficients: DevicePtr, all: i64,
        beta: DevicePtr, d_x: DevicePtr, accumulate: i32, d_residual: DevicePtr, tiles: RowTiles,
    );
}

impl Mask {
    /// `Masking` in `kernels/batch_norm.cu`.
    fn code(self) -> i32 {
        match self {
            Mask::None => 0,
            Mask::OfX => 1,
            Mask::Stored => 2,
        }
    }
}

/// Bytes of the two sums of each channel and tile.
pub(super) fn partials_bytes(rows: &Rows) -> usize {
    rows.groups * rows.chunks(rows.summing()) * rows.channels * 2 * size_of::<f32>()
}

/// Scratch of both directions: the partial sums, then `arrays` coefficients per channel and group.
pub(super) fn workspace_bytes(rows: &Rows, arrays: usize) -> usize {
    partials_bytes(rows) + arrays * rows.groups * rows.channels * size_of::<f32>()
}

/// Scratch of a forward pass whose sums or statistics are given: the scale of each channel and group.
pub(super) fn scale_bytes(x: &TensorDesc, groups: usize) -> usize {
    groups * x.shape.channels() * size_of::<f32>()
}

/// What the statistics of a forward pass leave for its last kernel.
pub(super) struct Statistics {
    pub mean: DevicePtr,
    pub scale: DevicePtr,
    pub beta: DevicePtr,
}

/// Computes the statistics of x, the first input, into mean, which is the output of this number, rstd, the next one, and the
/// running statistics.
pub(super) fn statistics(op: &BatchNorm, rows: &Rows, io: &CudaIo<'_>, mean: usize) -> Result<Statistics> {
    let (dtype, x) = (io.dtype(), io.inputs[0].ptr);
    let (gamma, beta) = match op.fusion.affine {
        true => (io.inputs[1].ptr, io.inputs[2].ptr),
        false => (DevicePtr::NULL, DevicePtr::NULL),
    };
    let [mean, rstd] = [mean, mean + 1].map(|output| io.outputs[output].ptr);
    if op.sums_given {
        let scale = finish_given(op, rows, io, [mean, rstd])?;
        return Ok(Statistics { mean, scale, beta });
    }
    let (partials, scale) = (io.workspace, io.workspace.offset(partials_bytes(rows)));

    let tiles = rows.summing();
    let call = batch_norm_statistics(dtype, x, partials, tiles);
    // SAFETY: the tiles are those of x, and `cuda_workspace` counted two sums for each of their channels.
    unsafe { io.launch(rows.grid(tiles), call)? };

    let [chunks, groups, channels] = [rows.chunks(tiles), rows.groups, rows.channels].map(|n| n as i32);
    let [running_mean, running_var, tracked] = [0, 1, 2].map(|i| io.updates[i].ptr);
    let call = batch_norm_finish_statistics(
        dtype,
        partials,
        chunks,
        groups,
        x,
        rows.rows as i64,
        channels,
        gamma,
        op.eps,
        op.momentum,
        mean,
        rstd,
        scale,
        running_mean,
        running_var,
        tracked,
    );
    // SAFETY: `infer` checked that gamma has x's channels and made mean and rstd [groups, channels]; the running statistics
    // are [channels], as `BatchNorm` demands, and scale is the workspace behind the partial sums.
    unsafe { io.launch(combining_grid(rows), call)? };
    Ok(Statistics { mean, scale, beta })
}

/// The same from the sums that were given; returns where the scale is.
fn finish_given(op: &BatchNorm, rows: &Rows, io: &CudaIo<'_>, [mean, rstd]: [DevicePtr; 2]) -> Result<DevicePtr> {
    let sums = io.inputs[io.inputs.len() - 1].ptr;
    let gamma = if op.fusion.affine { io.inputs[1].ptr } else { DevicePtr::NULL };
    let [running_mean, running_var, tracked] = [0, 1, 2].map(|i| io.updates[i].ptr);
    let scale = io.workspace;
    let [groups, channels] = [rows.groups, rows.channels].map(|n| n as i32);
    let call = batch_norm_finish_sums(
        sums,
        groups,
        rows.rows as i64,
        channels,
        gamma,
        op.eps,
        op.momentum,
        mean,
        rstd,
        scale,
        running_mean,
        running_var,
        tracked,
    );
    // SAFETY: `infer` checked that the sums are [groups, 2, channels], and `cuda_workspace` counted the scales; the rest as in
    // `statistics`.
    unsafe { io.launch(Grid::new([rows.channels.div_ceil(256) as u32, 1, 1]), call)? };
    Ok(scale)
}

pub(super) fn forward(op: &BatchNorm, io: &CudaIo<'_>) -> Result<()> {
    let rows = Rows::new(io.inputs[0].desc, op.groups);
    let Statistics { mean, scale, beta } = statistics(op, &rows, io, 1)?;
    if op.means {
        return apply_with_means(op, &rows, &Statistics { mean, scale, beta }, io);
    }
    let residual = if op.fusion.residual { io.inputs[op.fusion.residual_input()].ptr } else { DevicePtr::NULL };
    let mask = io.outputs.get(3).map_or(DevicePtr::NULL, |mask| mask.ptr);
    let tiles = rows.streaming();
    let (x, y, relu) = (io.inputs[0].ptr, io.outputs[0].ptr, i32::from(op.fusion.relu));
    let call = batch_norm_apply(io.dtype(), x, residual, mean, scale, beta, relu, y, mask, tiles);
    // SAFETY: `infer` checked that the residual is like x and beta has its channels, and made y like x and the mask with a
    // byte for each pack.
    unsafe { io.launch(rows.grid(tiles), call) }
}

/// The last kernel of a forward pass whose last output are the means of y.
fn apply_with_means(op: &BatchNorm, rows: &Rows, by: &Statistics, io: &CudaIo<'_>) -> Result<()> {
    let Statistics { mean, scale, beta } = *by;
    // The partial sums of x are not needed any more; where there were none, there is room behind the scale.
    let partials = if op.sums_given { scale.offset(scale_bytes(io.inputs[0].desc, op.groups)) } else { io.workspace };
    let tiles = rows.summing();
    let (x, y, relu) = (io.inputs[0].ptr, io.outputs[0].ptr, i32::from(op.fusion.relu));
    let call = batch_norm_apply_and_sum(io.dtype(), x, mean, scale, beta, relu, y, partials, tiles);
    // SAFETY: `infer` checked that beta has x's channels, and made y like x; `cuda_workspace` counted a sum for each channel of
    // the tiles.
    unsafe { io.launch(rows.grid(tiles), call)? };
    let means = io.outputs[io.outputs.len() - 1].ptr;
    // SAFETY: the launch before filled these sums, and `infer` made the means [groups, channels].
    unsafe { group_sums::cuda::finish(io, rows, partials, 1.0 / rows.rows as f64, means) }
}

/// What [`statistics`] left, from mean and rstd as inputs 1 and 2, behind which are gamma and beta where it is affine.
pub(super) fn known_statistics(affine: bool, groups: usize, io: &CudaIo<'_>) -> Result<Statistics> {
    let [mean, rstd] = [1, 2].map(|i| io.inputs[i].ptr);
    if !affine {
        return Ok(Statistics { mean, scale: rstd, beta: DevicePtr::NULL });
    }
    let ([gamma, beta], scale) = ([3, 4].map(|i| io.inputs[i].ptr), io.workspace);
    let channels = io.inputs[0].desc.shape.channels();
    let call = batch_norm_scale(rstd, gamma, scale, groups as i32, channels as i32);
    // SAFETY: `infer` checked that rstd is [groups, channels] and gamma [channels]; `cuda_workspace` counted the scales.
    unsafe { io.launch(Grid::stride(groups * channels, 256), call)? };
    Ok(Statistics { mean, scale, beta })
}

/// The forward pass from statistics that are known; see [`super::repeat`].
pub(super) fn repeat(fusion: Fusion, groups: usize, io: &CudaIo<'_>) -> Result<()> {
    let rows = Rows::new(io.inputs[0].desc, groups);
    let Statistics { mean, scale, beta } = known_statistics(fusion.affine, groups, io)?;
    let residual = if fusion.residual { io.inputs[io.inputs.len() - 1].ptr } else { DevicePtr::NULL };
    let mask = io.outputs.get(1).map_or(DevicePtr::NULL, |mask| mask.ptr);
    let tiles = rows.streaming();
    let (x, y, relu) = (io.inputs[0].ptr, io.outputs[0].ptr, i32::from(fusion.relu));
    let call = batch_norm_apply(io.dtype(), x, residual, mean, scale, beta, relu, y, mask, tiles);
    // SAFETY: `infer` checked that the residual is like x, the statistics are those of its groups and beta has its channels,
    // and made y like x and the mask with a byte for each pack.
    unsafe { io.launch(rows.grid(tiles), call) }
}

/// Blocks of the kernels that combine partial sums: 8 channels each.
fn combining_grid(rows: &Rows) -> Grid {
    Grid::new([rows.channels.div_ceil(8) as u32, 1, 1])
}

/// Scratch for the scale of each channel.
pub(super) fn eval_workspace_bytes(x: &TensorDesc) -> usize {
    x.shape.channels() * size_of::<f32>()
}

pub(super) fn eval(op: &BatchNormEval, io: &CudaIo<'_>) -> Result<()> {
    let rows = Rows::new(io.inputs[0].desc, 1);
    let (gamma, beta) = match op.fusion.affine {
        true => (io.inputs[3].ptr, io.inputs[4].ptr),
        false => (DevicePtr::NULL, DevicePtr::NULL),
    };
    let residual = if op.fusion.residual { io.inputs[io.inputs.len() - 1].ptr } else { DevicePtr::NULL };
    let [x, mean, variance] = [0, 1, 2].map(|i| io.inputs[i].ptr);
    let scale = io.workspace;

    let call = batch_norm_eval_scale(variance, gamma, op.eps, scale, rows.channels as i32);
    // SAFETY: `infer` checked that running_var and gamma have x's channels, as many as `cuda_workspace` counted.
    unsafe { io.launch(Grid::new([rows.channels.div_ceil(256) as u32, 1, 1]), call)? };

    let tiles = rows.streaming();
    let relu = i32::from(op.fusion.relu);
    let y = io.outputs[0].ptr;
    let call = batch_norm_apply(io.dtype(), x, residual, mean, scale, beta, relu, y, DevicePtr::NULL, tiles);
    // SAFETY: `infer` checked that running_mean and beta have x's channels and the residual is like x, and made y like x.
    unsafe { io.launch(rows.grid(tiles), call) }
}

pub(super) fn backward(op: &BatchNormBackward, io: &CudaIo<'_>) -> Result<()> {
    let rows = Rows::new(io.inputs[1].desc, op.groups);
    let dtype = io.dtype();
    let [d_y, x, mean, rstd] = [0, 1, 2, 3].map(|i| io.inputs[i].ptr);
    let (gamma, beta) = match op.affine {
        true => (io.inputs[4].ptr, io.inputs[5].ptr),
        false => (DevicePtr::NULL, DevicePtr::NULL),
    };
    let mask = if op.mask == Mask::Stored { io.inputs[io.inputs.len() - 1].ptr } else { DevicePtr::NULL };
    let d_x = &io.outputs[0];
    let d_residual = op.residual.then(|| &io.outputs[io.outputs.len() - 1]);
    let (partials, coefficients) = (io.workspace, io.workspace.offset(partials_bytes(&rows)));

    // A residual's gradient that overwrites is written by the first pass and spares the second one the mask.
    let early = d_residual.filter(|output| !output.accumulate).map(|output| output.ptr);
    let late = d_residual.filter(|output| output.accumulate).map(|output| output.ptr);

    let tiles = rows.summing();
    let call = batch_norm_backward_reduce(
        dtype,
        d_y,
        x,
        op.mask.code(),
        mask,
        mean,
        rstd,
        gamma,
        beta,
        early.unwrap_or_default(),
        partials,
        tiles,
    );
    // SAFETY: `infer` checked that d_y is like x and made d_residual so; mask, mean and rstd are outputs of the forward op, a
    // byte for each pack of x and [groups, channels], and gamma and beta its inputs, [channels]; `cuda_workspace` counted two
    // sums for each channel of the tiles.
    unsafe { io.launch(rows.grid(tiles), call)? };

    let sums = Sums { rows: rows.rows, summed: &rows, partials, coefficients };
    finish_backward(sums, Affine { rstd: 3, gamma: op.affine.then_some(4), d_gamma: 1 }, io)?;

    let (g, masking) = early.map_or((d_y, op.mask), |masked| (masked, Mask::None));
    let all = (rows.groups * rows.channels) as i64;
    let tiles = rows.streaming();
    let call = batch_norm_backward_apply(
        dtype,
        g,
        x,
        masking.code(),
        mask,
        mean,
        coefficients,
        all,
        beta,
        d_x.ptr,
        i32::from(d_x.accumulate),
        late.unwrap_or_default(),
        tiles,
    );
    // SAFETY: as for the first pass; `infer` made d_x like x.
    unsafe { io.launch(rows.grid(tiles), call) }
}

/// The sums of a backward pass: those of `rows` rows of each group, of which a tile of `summed` may have several in a row.
pub(super) struct Sums<'a> {
    pub rows: usize,
    pub summed: &'a Rows,
    /// The partial sums of the tiles.
    pub partials: DevicePtr,
    /// Room for three coefficients per channel and group.
    pub coefficients: DevicePtr,
}

/// Which inputs rstd and gamma are, and which output d_gamma is, behind which is d_beta.
pub(super) struct Affine {
    pub rstd: usize,
    pub gamma: Option<usize>,
    pub d_gamma: usize,
}

/// Combines the partial sums of a backward pass: d_gamma, d_beta where there is gamma, and the coefficients of d_x.
pub(super) fn finish_backward(sums: Sums<'_>, numbers: Affine, io: &CudaIo<'_>) -> Result<()> {
    let Sums { rows, summed, partials, coefficients } = sums;
    let gradient = |i: usize| match numbers.gamma {
        Some(_) => (io.outputs[i].ptr, i32::from(io.outputs[i].accumulate)),
        None => (DevicePtr::NULL, 0),
    };
    let (d_gamma, accumulate_gamma) = gradient(numbers.d_gamma);
    let (d_beta, accumulate_beta) = gradient(numbers.d_gamma + 1);
    let [chunks, groups, channels] =
        [summed.chunks(summed.summing()), summed.groups, summed.channels].map(|n| n as i32);
    let call = batch_norm_finish_backward(
        partials,
        chunks,
        groups,
        rows as i64,
        channels,
        io.inputs[numbers.rstd].ptr,
        numbers.gamma.map_or(DevicePtr::NULL, |gamma| io.inputs[gamma].ptr),
        coefficients,
        d_gamma,
        accumulate_gamma,
        d_beta,
        accumulate_beta,
    );
    // SAFETY: rstd is [groups, channels] and gamma [channels], as the forward op's `infer` checked; `infer` made d_gamma and
    // d_beta like gamma; `cuda_workspace` counted the partial sums and three coefficients per channel and group.
    unsafe { io.launch(combining_grid(summed), call) }
}
