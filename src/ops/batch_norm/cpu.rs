//! Batch norm on the CPU. Tensors are seen as rows x channels.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};

use super::sums::{BLOCKS, block_rows, group_sums};
use super::{BatchNorm, BatchNormBackward, BatchNormEval};

/// Per-channel coefficients of one group: `y = (x - mean) scale + beta`.
struct Coefficients<T> {
    mean: Vec<T>,
    scale: Vec<T>,
    beta: Vec<T>,
}

/// `y = act((x - mean) scale + beta + residual)`, in parallel over blocks of rows.
fn apply<T: Real>(y: &mut [T], x: &[T], residual: Option<&[T]>, relu: bool, k: &Coefficients<T>) {
    let channels = k.mean.len();
    let chunk = block_rows(x.len() / channels) * channels;
    y.par_chunks_mut(chunk).enumerate().for_each(|(i, y)| {
        let x = &x[i * chunk..][..y.len()];
        let residual = residual.map(|r| &r[i * chunk..][..x.len()]);
        for (row, y) in y.chunks_exact_mut(channels).enumerate() {
            let x = &x[row * channels..][..channels];
            for c in 0..channels {
                y[c] = (x[c] - k.mean[c]) * k.scale[c] + k.beta[c];
            }
            if let Some(residual) = residual {
                y.iter_mut().zip(&residual[row * channels..]).for_each(|(y, r)| *y += *r);
            }
            if relu {
                y.iter_mut().for_each(|y| *y = if *y > T::ZERO { *y } else { T::ZERO });
            }
        }
    });
}

pub(super) fn forward<T: Real>(op: &BatchNorm, io: &mut CpuIo<'_>) {
    let channels = io.inputs[0].desc.shape.channels();
    let group_rows = io.inputs[0].desc.shape.rows() / op.groups;
    let x = io.inputs[0].get::<T>();
    let affine = op.fusion.affine.then(|| (io.inputs[1].get::<T>(), io.inputs[2].get::<T>()));
    let residual = op.fusion.residual.then(|| io.inputs[op.fusion.residual_input()].get::<T>());
    let given = op.sums_given.then(|| io.inputs[io.inputs.len() - 1].get::<T>());

    // Sums of x - shift and its square, with the first row of the group as shift: exact where the mean is large.
    let group_len = group_rows * channels;
    let shifted = |group: usize, row: usize, first: &mut [T], second: &mut [T]| {
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
        None => group_sums::<T>(io.workspace, (op.groups, group_rows, channels), shifted),
    };
    let rows = group_rows as f64;
    for group in 0..op.groups {
        let range = group * channels..(group + 1) * channels;
        let (first, second) = sums[group * 2 * channels..][..2 * channels].split_at(channels);
        let shift = |c: usize| if op.sums_given { 0.0 } else { x[group * group_len + c].to_f64() };
        let mean: Vec<f64> = first.iter().enumerate().map(|(c, s)| shift(c) + s / rows).collect();
        let variance: Vec<f64> = first.iter().zip(second).map(|(s, q)| ((q - s * s / rows) / rows).max(0.0)).collect();
        let rstd: Vec<f64> = variance.iter().map(|v| 1.0 / (v + op.eps).sqrt()).collect();
        let unbiased: Vec<f64> = variance.iter().map(|v| v * rows / (rows - 1.0)).collect();
        update_running(io.updates[0].get::<T>(), &mean, op.momentum);
        update_running(io.updates[1].get::<T>(), &unbiased, op.momentum);
        io.outputs[1].get::<T>()[range.clone()].iter_mut().zip(&mean).for_each(|(o, m)| *o = T::of(*m));
        io.outputs[2].get::<T>()[range].iter_mut().zip(&rstd).for_each(|(o, r)| *o = T::of(*r));
        let k = coefficients(&mean, &rstd, affine);
        let span = group * group_len..(group + 1) * group_len;
        let residual = residual.map(|r| &r[span.clone()]);
        apply(&mut io.outputs[0].get::<T>()[span.clone()], &x[span.clone()], residual, op.fusion.relu, &k);
    }
    io.updates[2].get::<i64>()[0] += op.groups as i64;
}

/// `r = (1 - momentum) r + momentum value`.
fn update_running<T: Real>(running: &mut [T], values: &[f64], momentum: f64) {
    for (r, v) in running.iter_mut().zip(values) {
        *r = T::of(r.to_f64() * (1.0 - momentum) + momentum * v);
    }
}

fn coefficients<T: Real>(mean: &[f64], rstd: &[f64], affine: Option<(&[T], &[T])>) -> Coefficients<T> {
    let mean = mean.iter().map(|&m| T::of(m)).collect();
    match affine {
        Some((gamma, beta)) => {
            let scale = gamma.iter().zip(rstd).map(|(g, r)| T::of(g.to_f64() * r)).collect();
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

/// With g the masked d_y, x̂ = (x - mean) rstd and M rows per group:
/// d_beta = sum g, d_gamma = sum g x̂, d_x = gamma rstd (g - sum(g)/M - x̂ sum(g x̂)/M).
pub(super) fn backward<T: Real>(op: &BatchNormBackward, io: &mut CpuIo<'_>) {
    let channels = io.inputs[1].desc.shape.channels();
    let group_rows = io.inputs[1].desc.shape.rows() / op.groups;
    let (d_y, x) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
    let (mean, rstd) = (io.inputs[2].get::<T>(), io.inputs[3].get::<T>());
    let gamma = op.fusion.affine.then(|| io.inputs[4].get::<T>());
    let y = op.fusion.relu.then(|| io.inputs[io.inputs.len() - 1].get::<T>());

    let sums = group_sums::<T>(io.workspace, (op.groups, group_rows, channels), |group, row, first, second| {
        let mean = &mean[group * channels..][..channels];
        let span = row * channels..(row + 1) * channels;
        let (x, d_y) = (&x[span.clone()], &d_y[span.clone()]);
        let (first, second) = (&mut first[..channels], &mut second[..channels]);
        match y.map(|y| &y[span]) {
            Some(y) => {
                for c in 0..channels {
                    let g = if y[c] > T::ZERO { d_y[c] } else { T::ZERO };
                    first[c] += g;
                    second[c] += g * (x[c] - mean[c]);
                }
            }
            None => {
                for c in 0..channels {
                    first[c] += d_y[c];
                    second[c] += d_y[c] * (x[c] - mean[c]);
                }
            }
        }
    });
    if op.fusion.affine {
        write_affine_gradients::<T>(io, &sums, rstd, channels);
    }
    let others = io.outputs.len() - usize::from(op.fusion.residual);
    let (head, tail) = io.outputs.split_at_mut(others);
    let d_x = &mut head[0];
    for group in 0..op.groups {
        let span = group * group_rows * channels..(group + 1) * group_rows * channels;
        let statistics = group * channels..(group + 1) * channels;
        let sums = &sums[group * 2 * channels..][..2 * channels];
        let k = GroupGradient::new(sums, &mean[statistics.clone()], &rstd[statistics], gamma, group_rows);
        let accumulate = d_x.accumulate;
        k.input_gradient(
            &mut d_x.get::<T>()[span.clone()],
            &d_y[span.clone()],
            &x[span.clone()],
            y.map(|y| &y[span.clone()]),
            accumulate,
        );
        if let Some(d_residual) = tail.first_mut() {
            let accumulate = d_residual.accumulate;
            masked(&mut d_residual.get::<T>()[span.clone()], &d_y[span.clone()], y.map(|y| &y[span]), accumulate);
        }
    }
}

fn write_affine_gradients<T: Real>(io: &mut CpuIo<'_>, sums: &[f64], rstd: &[T], channels: usize) {
    let groups = sums.len() / (2 * channels);
    for c in 0..channels {
        let over_groups = |f: &dyn Fn(usize) -> f64| T::of((0..groups).map(f).sum());
        let d_beta: T = over_groups(&|g| sums[g * 2 * channels + c]);
        let d_gamma: T = over_groups(&|g| sums[(g * 2 + 1) * channels + c] * rstd[g * channels + c].to_f64());
        for (output, value) in [(1, d_gamma), (2, d_beta)] {
            let base = if io.outputs[output].accumulate { io.outputs[output].get::<T>()[c] } else { T::ZERO };
            io.outputs[output].get::<T>()[c] = base + value;
        }
    }
}

/// `d_x = scale (g - offset - (x - mean) slope)`, per channel of one group.
struct GroupGradient<T> {
    mean: Vec<T>,
    scale: Vec<T>,
    offset: Vec<T>,
    slope: Vec<T>,
}

impl<T: Real> GroupGradient<T> {
    /// From the group's sums and statistics, all of them slices of one group.
    fn new(sums: &[f64], mean: &[T], rstd: &[T], gamma: Option<&[T]>, rows: usize) -> Self {
        let (channels, rows) = (mean.len(), rows as f64);
        GroupGradient {
            mean: mean.to_vec(),
            scale: (0..channels).map(|c| gamma.map_or(rstd[c], |g| g[c] * rstd[c])).collect(),
            offset: (0..channels).map(|c| T::of(sums[c] / rows)).collect(),
            slope: (0..channels).map(|c| T::of(sums[channels + c] * rstd[c].to_f64().powi(2) / rows)).collect(),
        }
    }

    fn input_gradient(&self, d_x: &mut [T], d_y: &[T], x: &[T], y: Option<&[T]>, accumulate: bool) {
        let channels = self.mean.len();
        let chunk = block_rows(x.len() / channels) * channels;
        let (mean, scale) = (&self.mean[..channels], &self.scale[..channels]);
        let (offset, slope) = (&self.offset[..channels], &self.slope[..channels]);
        d_x.par_chunks_mut(chunk).enumerate().for_each(|(i, d_x)| {
            for (row, d_x) in d_x.chunks_exact_mut(channels).enumerate() {
                let span = i * chunk + row * channels..i * chunk + (row + 1) * channels;
                let (x, d_y) = (&x[span.clone()], &d_y[span.clone()]);
                let y = y.map(|y| &y[span]);
                for c in 0..channels {
                    let open = y.is_none_or(|y| y[c] > T::ZERO);
                    let g = if open { d_y[c] } else { T::ZERO };
                    let value = scale[c] * (g - offset[c] - (x[c] - mean[c]) * slope[c]);
                    d_x[c] = if accumulate { d_x[c] + value } else { value };
                }
            }
        });
    }
}

/// `d_residual = d_y` where y > 0, else 0 (everywhere `d_y` without a ReLU).
fn masked<T: Real>(d_residual: &mut [T], d_y: &[T], y: Option<&[T]>, accumulate: bool) {
    let chunk = d_y.len().div_ceil(BLOCKS).max(1);
    d_residual.par_chunks_mut(chunk).enumerate().for_each(|(i, d_residual)| {
        let span = i * chunk..i * chunk + d_residual.len();
        let d_y = &d_y[span.clone()];
        let y = y.map(|y| &y[span]);
        for (j, d) in d_residual.iter_mut().enumerate() {
            let open = y.is_none_or(|y| y[j] > T::ZERO);
            let value = if open { d_y[j] } else { T::ZERO };
            *d = if accumulate { *d + value } else { value };
        }
    });
}
