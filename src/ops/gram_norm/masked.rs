//! A gradient behind a ReLU, and its sums over the rows of each group.

use rayon::prelude::*;

use crate::backend::cpu::{CpuIo, Real};
use crate::backend::cuda::CudaIo;
use crate::error::Result;
use crate::graph::Op;
use crate::graph::op::dispatch_real;
use crate::ops::batch_norm::sums::{CHAIN, block_rows};
use crate::ops::group_sums;
use crate::tensor::TensorDesc;

use super::{cuda, expect};

/// A gradient behind a ReLU and its sums: inputs d_y and y, outputs g (d_y where y > 0, else 0) and the sums of its columns
/// over the rows of each group, `[groups, c]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Masked {
    pub groups: usize,
}

impl Masked {
    pub const NAME: &'static str = "relu_backward_sums";
}

impl Op for Masked {
    fn name(&self) -> &'static str {
        Masked::NAME
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        expect(Masked::NAME, "d_y", inputs[0], inputs[1])?;
        Ok(vec![inputs[0].clone(), group_sums::sums_desc(inputs[0], self.groups)])
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        dispatch_real!(Masked::NAME, io.inputs[0].desc.dtype, T => masked::<T>(io, self.groups));
        Ok(())
    }

    fn cuda_workspace(&self, inputs: &[&TensorDesc]) -> usize {
        group_sums::cuda::partials_bytes(inputs[0], self.groups)
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::masked(io, self.groups)
    }
}

fn masked<T: Real>(io: &mut CpuIo<'_>, groups: usize) {
    let desc = io.inputs[0].desc;
    let (rows, channels) = (desc.shape.rows() / groups, desc.shape.channels());
    let (d_y, y) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
    let (g, sums) = io.outputs.split_at_mut(1);
    let (g, sums) = (g[0].get::<T>(), sums[0].get::<T>());
    let block = block_rows(rows) * channels;
    for (group, (g, sums)) in g.chunks_mut(rows * channels).zip(sums.chunks_mut(channels)).enumerate() {
        let first = group * rows * channels;
        let partials: Vec<Vec<f64>> = g
            .par_chunks_mut(block)
            .enumerate()
            .map(|(i, g)| {
                let span = first + i * block..first + i * block + g.len();
                mask_block(g, &d_y[span.clone()], &y[span], channels)
            })
            .collect();
        for (c, sum) in sums.iter_mut().enumerate() {
            *sum = T::of(partials.iter().map(|partial| partial[c]).sum());
        }
    }
}

/// Masks a block of rows; returns the sums of its columns, of short chains in the tensor's type.
fn mask_block<T: Real>(g: &mut [T], d_y: &[T], y: &[T], channels: usize) -> Vec<f64> {
    let mut sums = vec![0.0; channels];
    let mut chain = vec![T::ZERO; channels];
    for ((g, d_y), y) in
        g.chunks_mut(CHAIN * channels).zip(d_y.chunks(CHAIN * channels)).zip(y.chunks(CHAIN * channels))
    {
        chain.fill(T::ZERO);
        for ((g, d_y), y) in g.chunks_exact_mut(channels).zip(d_y.chunks_exact(channels)).zip(y.chunks_exact(channels))
        {
            let rows = g.iter_mut().zip(d_y).zip(y).zip(&mut chain);
            rows.for_each(|(((g, d_y), y), sum)| {
                *g = d_y.when(*y > T::ZERO);
                *sum += *g;
            });
        }
        sums.iter_mut().zip(&chain).for_each(|(sum, chain)| *sum += chain.to_f64());
    }
    sums
}
