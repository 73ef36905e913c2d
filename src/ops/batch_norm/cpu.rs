//! Batch norm on the CPU. Tensors are seen as rows x channels.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};

use super::pooled::Pooled;
use super::sums::{CHAIN, block_rows, group_sums};
use super::{BatchNorm, BatchNormBackward, BatchNormEval, Fusion, Mask, pack};

/// Per-channel coefficients of one group: `y = (x - mean) scale + beta`.
pub(super) struct Coefficients<T> {
    mean: Vec<T>,
    scale: Vec<T>,
    beta: Vec<T>,
}

impl<T: Real> Coefficients<T> {
    /// y of channel `c`.
    pub fn normalised(&self, c: usize, x: T) -> T {
        (x - self.mean[c]) * self.scale[c] + self.beta[c]
    }
}

/// `y = act((x - mean) scale + beta + residual)`, in parallel over blocks of rows.
fn apply<T: Real>(y: &mut [T], x: &[T], residual: Option<&[T]>, relu: bool, k: &Coefficients<T>) {
    let channels = k.mean.len();
    let chunk = block_rows(x.len() / channels) * channels;
    y.par_chunks_mut(chunk).enumerate().for_each(|(i, y)| {
        let x = &x[i * chunk..][..y.len()];
        let residual = residual.map(|r| &r[i * chunk..][..x.len()]);
        for (row, y) in y.chunks_exact_mut(channels).enumerate() {
            apply_row(y, &x[row * channels..], residual.map(|r| &r[row * channels..]), relu, k);
        }
    });
}

pub(super) fn apply_row<T: Real>(y: &mut [T], x: &[T], residual: Option<&[T]>, relu: bool, k: &Coefficients<T>) {
    let channels = y.iter_mut().zip(x).zip(&k.mean).zip(&k.scale).zip(&k.beta);
    channels.for_each(|((((y, x), mean), scale), beta)| *y = (*x - *mean) * *scale + *beta);
    if let Some(residual) = residual {
        y.iter_mut().zip(residual).for_each(|(y, r)| *y += *r);
    }
    if relu {
        y.iter_mut().for_each(|y| *y = y.when(*y > T::ZERO));
    }
}

/// As [`apply`] without a residual; returns the sums of the columns of y: of short chains in the tensor's type.
fn apply_and_sum<T: Real>(y: &mut [T], x: &[T], relu: bool, k: &Coefficients<T>) -> Vec<f64> {
    let channels = k.mean.len();
    let chunk = block_rows(x.len() / channels) * channels;
    let of_block = |(y, x): (&mut [T], &[T])| {
        let (mut sums, mut chain) = (vec![0.0; channels], vec![T::ZERO; channels]);
        for (y, x) in y.chunks_mut(CHAIN * channels).zip(x.chunks(CHAIN * channels)) {
            chain.fill(T::ZERO);
            for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                apply_row(y, x, None, relu, k);
                chain.iter_mut().zip(&*y).for_each(|(sum, y)| *sum += *y);
            }
            sums.iter_mut().zip(&chain).for_each(|(sum, chain)| *sum += chain.to_f64());
        }
        sums
    };
    let of_blocks: Vec<Vec<f64>> = y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).map(of_block).collect();
    (0..channels).map(|c| of_blocks.iter().map(|sums| sums[c]).sum()).collect()
}

/// Computes the statistics of x, the first input, into mean, which is the output of this number, rstd, the next one, and the
/// running statistics; returns what is to be done to each group.
pub(super) fn statistics<T: Real>(op: &BatchNorm, io: &mut CpuIo<'_>, mean_output: usize) -> Vec<Coefficients<T>> {
    let channels = io.inputs[0].desc.shape.channels();
    let group_rows = io.inputs[0].desc.shape.rows() / op.groups;
    let x = io.inputs[0].get::<T>();
    let affine = op.fusion.affine.then(|| (io.inputs[1].get::<T>(), io.inputs[2].get::<T>()));
    let given = op.sums_given.then(|| io.inputs[io.inputs.len() - 1].get::<T>());

    // Sums of x - shift and its square, with the first row of the group as shift: exact where the mean is large.
    let group_len = group_rows * channels;
    let shifted = |group: usize, row: usize, [first, second]: [&mut [T]; 2], _: &mut [T]| {
        let shift = &x[group * group_len..][..channels];
        let x = &x[row * channels..][..channels];
        let (first, second) = (&mut first[..channels], &mut second[..channels]);
        for c in 0..channels {
            let d = x[c] - shift[c];
            first[c] += d;
            second[c] += d * d;
        }
    };
    let sums = match given {
        Some(sums) => sums.iter().map(|s| s.to_f64()).collect(),
        None => group_sums::<T, 2>(io.workspace, (op.groups, group_rows, channels), shifted),
    };
    io.updates[2].get::<i64>()[0] += op.groups as i64;
    let rows = group_rows as f64;
    let mut finish = |group: usize| {
        let range = group * channels..(group + 1) * channels;
        let (first, second) = sums[group * 2 * channels..][..2 * channels].split_at(channels);
        let shift = |c: usize| if op.sums_given { 0.0 } else { x[group * group_len + c].to_f64() };
        let mean: Vec<f64> = first.iter().enumerate().map(|(c, s)| shift(c) + s / rows).collect();
        let variance: Vec<f64> = first.iter().zip(second).map(|(s, q)| ((q - s * s / rows) / rows).max(0.0)).collect();
        let rstd: Vec<f64> = variance.iter().map(|v| 1.0 / (v + op.eps).sqrt()).collect();
        let unbiased: Vec<f64> = variance.iter().map(|v| v * rows / (rows - 1.0)).collect();
        update_running(io.updates[0].get::<T>(), &mean, op.momentum);
        update_running(io.updates[1].get::<T>(), &unbiased, op.momentum);
        for (values, output) in [(&mean, mean_output), (&rstd, mean_output + 1)] {
            let output = &mut io.outputs[output].get::<T>()[range.clone()];
            output.iter_mut().zip(values).for_each(|(o, v)| *o = T::of(*v));
        }
        coefficients(&mean, &rstd, affine)
    };
    (0..op.groups).map(&mut finish).collect()
}

pub(super) fn forward<T: Real>(op: &BatchNorm, io: &mut CpuIo<'_>) {
    let groups = statistics::<T>(op, io, 1);
    if op.means {
        return apply_with_means(op.fusion, &groups, io);
    }
    apply_groups(op.fusion, &groups, io, [op.fusion.residual_input(), 3]);
}

/// y, the first output, from x, the first input; where the residual is among the inputs and the mask among the outputs, if they
/// are there, the caller says.
fn apply_groups<T: Real>(fusion: Fusion, groups: &[Coefficients<T>], io: &mut CpuIo<'_>, [residual, mask]: [usize; 2]) {
    let x = io.inputs[0].get::<T>();
    let residual = fusion.residual.then(|| io.inputs[residual].get::<T>());
    let group_len = x.len() / groups.len();
    for (group, k) in groups.iter().enumerate() {
        let span = group * group_len..(group + 1) * group_len;
        let residual = residual.map(|r| &r[span.clone()]);
        apply(&mut io.outputs[0].get::<T>()[span.clone()], &x[span], residual, fusion.relu, k);
    }
    if fusion.mask() == Mask::Stored {
        let pack = pack(io.inputs[0].desc);
        let (head, tail) = io.outputs.split_at_mut(mask);
        store_mask(tail[0].get::<u8>(), head[0].get::<T>(), pack);
    }
}

/// As [`apply_groups`] without a residual; the last output are the means of y.
fn apply_with_means<T: Real>(fusion: Fusion, groups: &[Coefficients<T>], io: &mut CpuIo<'_>) {
    let x = io.inputs[0].get::<T>();
    let (group_len, channels) = (x.len() / groups.len(), io.inputs[0].desc.shape.channels());
    let rows = (group_len / channels) as f64;
    for (group, k) in groups.iter().enumerate() {
        let y = &mut io.outputs[0].get::<T>()[group * group_len..][..group_len];
        let sums = apply_and_sum(y, &x[group * group_len..][..group_len], fusion.relu, k);
        let last = io.outputs.len() - 1;
        let means = &mut io.outputs[last].get::<T>()[group * channels..];
        means.iter_mut().zip(&sums).for_each(|(mean, sum)| *mean = T::of(sum / rows));
    }
}

/// What [`statistics`] returned, from mean, which is the input of this number, and rstd, the next one, behind which are gamma
/// and beta where it is affine.
pub(super) fn known_statistics<T: Real>(
    mean: usize,
    affine: bool,
    groups: usize,
    io: &CpuIo<'_>,
) -> Vec<Coefficients<T>> {
    let input = |i: usize| io.inputs[mean + i].get::<T>();
    let (mean, rstd) = (input(0), input(1));
    let affine = affine.then(|| (input(2), input(3)));
    let channels = mean.len() / groups;
    mean.chunks(channels).zip(rstd.chunks(channels)).map(|(mean, rstd)| recomputed(mean, rstd, affine)).collect()
}

/// The forward pass from statistics that are known; see [`super::repeat`].
pub(super) fn repeat<T: Real>(fusion: Fusion, groups: usize, io: &mut CpuIo<'_>) {
    let groups = known_statistics::<T>(1, fusion.affine, groups, io);
    let last = io.inputs.len() - 1;
    apply_groups(fusion, &groups, io, [last, 1]);
}

/// A bit for each element of y that is greater than 0; `pack` of them to a byte.
pub(super) fn store_mask<T: Real>(mask: &mut [u8], y: &[T], pack: usize) {
    mask.par_iter_mut().zip(y.par_chunks(pack)).with_min_len(1 << 12).for_each(|(bits, y)| {
        *bits = y.iter().enumerate().map(|(k, &y)| u8::from(y > T::ZERO) << k).sum();
    });
}

/// `r = (1 - momentum) r + momentum value`.
pub fn update_running<T: Real>(running: &mut [T], values: &[f64], momentum: f64) {
    for (r, v) in running.iter_mut().zip(values) {
        *r = T::of(r.to_f64() * (1.0 - momentum) + momentum * v);
    }
}

fn coefficients<T: Real>(mean: &[f64], rstd: &[f64], affine: Option<(&[T], &[T])>) -> Coefficients<T> {
    let mean = mean.iter().map(|&m| T::of(m)).collect();
    match affine {
        Some((gamma, beta)) => {
            // Of the rounded rstd, which is all that the gradient knows when it computes the same again.
            let scale = gamma.iter().zip(rstd).map(|(&g, &r)| g * T::of(r)).collect();
            Coefficients { mean, scale, beta: beta.to_vec() }
        }
        None => {
            let beta = vec![T::ZERO; rstd.len()];
            Coefficients { mean, scale: rstd.iter().map(|&r| T::of(r)).collect(), beta }
        }
    }
}

pub(super) fn eval<T: Real>(op: &BatchNormEval, io: &mut CpuIo<'_>) {
    let widen = |i: usize| -> Vec<f64> { io.inputs[i].get::<T>().iter().map(|v| v.to_f64()).collect() };
    let (mean, variance) = (widen(1), widen(2));
    let rstd: Vec<f64> = variance.iter().map(|v| 1.0 / (v + op.eps).sqrt()).collect();
    let affine = op.fusion.affine.then(|| (io.inputs[3].get::<T>(), io.inputs[4].get::<T>()));
    let residual = op.fusion.residual.then(|| io.inputs[io.inputs.len() - 1].get::<T>());
    let k = coefficients(&mean, &rstd, affine);
    apply(io.outputs[0].get::<T>(), io.inputs[0].get::<T>(), residual, op.fusion.relu, &k);
}

/// d_y behind the mask of the ReLU, a row of x at a time.
pub(super) struct Masked<'a, T> {
    pub channels: usize,
    pub group_rows: usize,
    pub d_y: &'a [T],
    pub x: &'a [T],
    pub mask: MaskData<'a, T>,
}

/// What decides which elements pass.
pub(super) enum MaskData<'a, T> {
    None,
    /// One for each group.
    OfX(Vec<Coefficients<T>>),
    /// Bits, and how many of them a byte has.
    Stored(&'a [u8], usize),
    /// None of them: d_y is the gradient behind a pooling.
    Pooled(Pooled<'a>),
}

impl<T: Real> Masked<'_, T> {
    /// The gradient of row `row`, in `g` where it is not d_y itself.
    pub fn row<'a>(&'a self, row: usize, g: &'a mut [T]) -> &'a [T] {
        let span = row * self.channels..(row + 1) * self.channels;
        if let MaskData::Pooled(pooled) = &self.mask {
            pooled.gather(&mut g[..self.channels], self.d_y, row);
            return g;
        }
        let d_y = &self.d_y[span.clone()];
        match &self.mask {
            MaskData::None | MaskData::Pooled(_) => return d_y,
            MaskData::OfX(groups) => {
                let k = &groups[row / self.group_rows];
                let channels = g.iter_mut().zip(d_y).zip(&self.x[span]).zip(&k.mean).zip(&k.scale).zip(&k.beta);
                channels.for_each(|(((((g, d_y), x), mean), scale), beta)| {
                    let open = (*x - *mean) * *scale + *beta > T::ZERO;
                    *g = d_y.when(open);
                });
            }
            MaskData::Stored(bits, pack) => {
                let bits = &bits[span.start / pack..span.end / pack];
                for ((g, d_y), bits) in g.chunks_mut(*pack).zip(d_y.chunks(*pack)).zip(bits) {
                    for (k, (g, d_y)) in g.iter_mut().zip(d_y).enumerate() {
                        *g = d_y.when(bits >> k & 1 != 0);
                    }
                }
            }
        }
        g
    }

    /// Calls `f(row, out, g)` for every row of `out`, a tensor like x, in parallel over blocks of rows.
    fn for_rows(&self, out: &mut [T], f: impl Fn(usize, &mut [T], &[T]) + Sync) {
        let rows = block_rows(out.len() / self.channels);
        out.par_chunks_mut(rows * self.channels).enumerate().for_each(|(block, out)| {
            let mut g = vec![T::ZERO; self.channels];
            for (i, out) in out.chunks_exact_mut(self.channels).enumerate() {
                let row = block * rows + i;
                f(row, out, self.row(row, &mut g));
            }
        });
    }
}

/// With g the masked d_y, x̂ = (x - mean) rstd and M rows per group:
/// d_beta = sum g, d_gamma = sum g x̂, d_x = gamma rstd (g - sum(g)/M - x̂ sum(g x̂)/M).
pub(super) fn backward<T: Real>(op: &BatchNormBackward, io: &mut CpuIo<'_>) {
    let channels = io.inputs[1].desc.shape.channels();
    let (mean, rstd) = (io.inputs[2].get::<T>(), io.inputs[3].get::<T>());
    let affine = op.affine.then(|| (io.inputs[4].get::<T>(), io.inputs[5].get::<T>()));
    let of_group = |group: usize| group * channels..(group + 1) * channels;
    let mask = match op.mask {
        Mask::None => MaskData::None,
        Mask::OfX => {
            let of_group = |group| recomputed(&mean[of_group(group)], &rstd[of_group(group)], affine);
            MaskData::OfX((0..op.groups).map(of_group).collect())
        }
        Mask::Stored => MaskData::Stored(io.inputs[io.inputs.len() - 1].get::<u8>(), pack(io.inputs[1].desc)),
    };
    gradients(op, io, mask);
}

/// The gradient behind [`super::pooled::BatchNormMaxPool`], whose inputs are those of `op`, and last what was taken.
pub(super) fn pooled_backward<T: Real>(op: &BatchNormBackward, io: &mut CpuIo<'_>, pooled: Pooled<'_>) {
    gradients::<T>(op, io, MaskData::Pooled(pooled));
}

fn gradients<T: Real>(op: &BatchNormBackward, io: &mut CpuIo<'_>, mask: MaskData<'_, T>) {
    let channels = io.inputs[1].desc.shape.channels();
    let group_rows = io.inputs[1].desc.shape.rows() / op.groups;
    let (d_y, x) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
    let (mean, rstd) = (io.inputs[2].get::<T>(), io.inputs[3].get::<T>());
    let gamma = op.affine.then(|| io.inputs[4].get::<T>());
    let of_group = |group: usize| group * channels..(group + 1) * channels;
    let masked = Masked { channels, group_rows, d_y, x, mask };

    let sums = group_sums::<T, 2>(io.workspace, (op.groups, group_rows, channels), |group, row, [first, second], g| {
        let (mean, x) = (&mean[of_group(group)], &x[row * channels..]);
        let sums = first.iter_mut().zip(second).zip(masked.row(row, g)).zip(x).zip(mean);
        sums.for_each(|((((first, second), g), x), mean)| {
            *first += *g;
            *second += *g * (*x - *mean);
        });
    });
    if op.affine {
        let of_groups: Vec<[&[f64]; 2]> = sums.chunks(2 * channels).map(halves).collect();
        write_affine_gradients::<T>(io, &of_groups, rstd, 1);
    }
    let others = io.outputs.len() - usize::from(op.residual);
    let (head, tail) = io.outputs.split_at_mut(others);
    let groups: Vec<GroupGradient<T>> = (0..op.groups)
        .map(|group| {
            let sums = halves(&sums[group * 2 * channels..][..2 * channels]);
            GroupGradient::new(sums, &mean[of_group(group)], &rstd[of_group(group)], gamma, group_rows)
        })
        .collect();
    let accumulate = head[0].accumulate;
    masked.for_rows(head[0].get::<T>(), |row, d_x, g| {
        groups[row / group_rows].input_gradient(d_x, g, &x[row * channels..][..channels], accumulate);
    });
    if let Some(d_residual) = tail.first_mut() {
        let accumulate = d_residual.accumulate;
        masked.for_rows(d_residual.get::<T>(), |_, d_residual, g| match accumulate {
            true => d_residual.iter_mut().zip(g).for_each(|(d, g)| *d += *g),
            false => d_residual.copy_from_slice(g),
        });
    }
}

/// The coefficients of the forward pass, bit for bit.
fn recomputed<T: Real>(mean: &[T], rstd: &[T], affine: Option<(&[T], &[T])>) -> Coefficients<T> {
    let [mean, rstd] = [mean, rstd].map(|values| values.iter().map(|v| v.to_f64()).collect::<Vec<f64>>());
    coefficients(&mean, &rstd, affine)
}

/// Two sums of each channel.
fn halves(sums: &[f64]) -> [&[f64]; 2] {
    let (first, second) = sums.split_at(sums.len() / 2);
    [first, second]
}

/// d_gamma, the output of this number, and d_beta, the next one, from the sums of g and of g (x - mean) of each group.
pub(super) fn write_affine_gradients<T: Real>(io: &mut CpuIo<'_>, sums: &[[&[f64]; 2]], rstd: &[T], d_gamma: usize) {
    let channels = rstd.len() / sums.len();
    for c in 0..channels {
        let over_groups = |f: &dyn Fn(usize) -> f64| T::of((0..sums.len()).map(f).sum());
        let of_beta: T = over_groups(&|g| sums[g][0][c]);
        let of_gamma: T = over_groups(&|g| sums[g][1][c] * rstd[g * channels + c].to_f64());
        for (output, value) in [(d_gamma, of_gamma), (d_gamma + 1, of_beta)] {
            let base = if io.outputs[output].accumulate { io.outputs[output].get::<T>()[c] } else { T::ZERO };
            io.outputs[output].get::<T>()[c] = base + value;
        }
    }
}

/// `d_x = scale (g - offset - (x - mean) slope)`, per channel of one group.
pub(super) struct GroupGradient<T> {
    mean: Vec<T>,
    scale: Vec<T>,
    offset: Vec<T>,
    slope: Vec<T>,
}

impl<T: Real> GroupGradient<T> {
    /// From the group's sums of g and of g (x - mean), and its statistics, all of them slices of one group.
    pub fn new([g, g_x]: [&[f64]; 2], mean: &[T], rstd: &[T], gamma: Option<&[T]>, rows: usize) -> Self {
        let (channels, rows) = (mean.len(), rows as f64);
        GroupGradient {
            mean: mean.to_vec(),
            scale: (0..channels).map(|c| gamma.map_or(rstd[c], |g| g[c] * rstd[c])).collect(),
            offset: (0..channels).map(|c| T::of(g[c] / rows)).collect(),
            slope: (0..channels).map(|c| T::of(g_x[c] * rstd[c].to_f64().powi(2) / rows)).collect(),
        }
    }

    /// d_x of one row.
    pub fn input_gradient(&self, d_x: &mut [T], g: &[T], x: &[T], accumulate: bool) {
        let channels = self.mean.len();
        let (mean, scale) = (&self.mean[..channels], &self.scale[..channels]);
        let (offset, slope) = (&self.offset[..channels], &self.slope[..channels]);
        let (d_x, g, x) = (&mut d_x[..channels], &g[..channels], &x[..channels]);
        for c in 0..channels {
            let value = scale[c] * (g[c] - offset[c] - (x[c] - mean[c]) * slope[c]);
            d_x[c] = if accumulate { d_x[c] + value } else { value };
        }
    }
}
