//! Batch norm of a 1x1 convolution whose output is never formed ("Gram-BN"), with an optional residual and ReLU.
//!
//! Of y = W z, for z with C channels in K rows of a statistics group, batch norm needs only the mean m of z and its covariance
//! S (C x C), because y is linear in z:
//!
//! - mean of y_k: w_k m; its variance: w_k S w_k, which is the product of w_k with row k of T = W S;
//! - out = act(z F^T + b + residual) with the folded weight F = A o W (A_k = gamma_k rstd_k), rounded to the activations'
//!   type, and b = beta - F m: one matrix product with an epilogue ([`Matmul`]).
//!
//! Backward, with g the gradient behind the ReLU, s = sum g and R' = g^T z - s m^T, per group:
//!
//! - d_beta = s, d_gamma_k = rstd_k (R'_k w_k), and d_W_k = A_k (R'_k - rstd_k d_gamma_k T_k), summed over groups;
//! - d_z = (g - s / K) F + (z - m) M, with M = -W^T diag(A rstd d_gamma / K) W (C x C).
//!
//! No pass over the wide y is left: not to sum, to apply or to differentiate it. All is centred (S, R', z - m): nothing cancels
//! but what the covariance takes off the sums of squares. In float32 z is centred before all else, for a pass of its own: its
//! mean is then part of neither products nor biases.
//!
//! The ops that compute the statistics have no gradients of their own: [`GramNorm`], the last one, has all of it.

mod covariance;
mod cuda;
mod fold;
mod fold_backward;
mod masked;
mod shift;

pub(super) use cuda::KERNELS;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::library::Work;
use crate::error::{Error, Result};
use crate::graph::{GradBuilder, Op, Tape, Tensors, Traffic, ValueId};
use crate::ops::conv2d::gradient_dtype;
use crate::ops::group_sums::GroupSums;
use crate::ops::matmul::{Factor, Matmul};
use crate::tensor::{DType, TensorDesc};

use covariance::{Centre, Covariance};
use fold::Fold;
use fold_backward::FoldBackward;
use masked::Masked;
use shift::Shift;

/// Attributes of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layer {
    /// Statistics groups: equal parts of the outermost dimension.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// PyTorch's momentum of the running statistics.
    pub momentum: f64,
    /// Whether the activation is ReLU (else the identity).
    pub relu: bool,
}

/// The tensors of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Operands {
    /// Its input, `[n, h, w, c_in]`.
    pub z: ValueId,
    /// The means of its columns over the rows of each group, `[groups, c_in]`, where who made it has them.
    pub mean: Option<ValueId>,
    /// The convolution's weight, `[c_out, 1, 1, c_in]` in float32 (float64 of float64).
    pub w: ValueId,
    /// Batch norm's gamma, `[c_out]`.
    pub gamma: ValueId,
    /// Batch norm's beta, `[c_out]`.
    pub beta: ValueId,
    /// Added before the activation, like the result.
    pub residual: Option<ValueId>,
    /// running_mean `[c_out]`, running_var `[c_out]` and num_batches_tracked, updated as by `BatchNorm`.
    pub running: [ValueId; 3],
}

/// Records the layer; returns its output `[n, h, w, c_out]`.
///
/// # Errors
/// Shapes that do not fit together.
pub fn record(tape: &mut Tape, layer: Layer, of: &Operands) -> Result<ValueId> {
    let Layer { groups, eps, momentum, relu } = layer;
    let (desc, c_out) = (tape.desc(of.z).clone(), tape.desc(of.w).shape.rows());
    let rows = check_rows(&desc, groups)?;
    let mean = match of.mean {
        Some(mean) => mean,
        None => tape.record_one(GroupSums { groups, means: true }, &[of.z])?,
    };
    let centred = is_centred(desc.dtype);
    let z = if centred { tape.record_one(Centre { groups }, &[of.z, mean])? } else { of.z };
    let splits = splits(rows, groups, [desc.shape.channels(); 2]);
    let sums = tape.record_one(long_product(groups * splits), &[z, z])?;
    let covariance = tape.record_one(Covariance { groups, rows, centred }, &[sums, mean])?;
    let t = tape.record_one(
        Matmul { exact: true, ..Matmul::new(groups, Factor::PLAIN.shared(), Factor::PLAIN) },
        &[of.w, covariance],
    )?;
    let fold = Fold { groups, rows, centred, eps, momentum, to: desc.dtype };
    let folded = tape.record_updating(fold, &[of.w, t, mean, of.gamma, of.beta], &of.running)?;
    let op = GramNorm { groups, centred, relu, residual: of.residual.is_some(), c_out };
    let inputs = [z, folded[0], folded[1]].into_iter().chain(of.residual);
    let inputs: Vec<ValueId> = inputs.chain([of.w, of.gamma, of.beta, t, mean, folded[2]]).collect();
    tape.record_one(op, &inputs)
}

/// Rows of a group.
fn check_rows(z: &TensorDesc, groups: usize) -> Result<usize> {
    let n = z.shape.dims().first().copied().unwrap_or(0);
    if z.shape.rank() < 2 || !n.is_multiple_of(groups) || z.shape.rows() / groups < 2 {
        let expected = format!("a multiple of {groups} groups with at least 2 values per channel and group");
        return Err(Error::shape("gram_norm", "first dimension of z", expected, &z.shape));
    }
    Ok(z.shape.rows() / groups)
}

/// Whether z is centred before all else, which takes a pass of its own. In 16 bits it is not: there the mean is taken off the
/// float32 sums, whose error is below that of rounding y to 16 bits, as the usual route does (tests/gram_norm.rs).
fn is_centred(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64)
}

/// `a^T b` over the rows of each of so many parts, in float32.
fn long_product(parts: usize) -> Matmul {
    Matmul { widened: true, ..Matmul::new(parts, Factor::TRANSPOSED, Factor::PLAIN) }
}

/// Tiles of this side are what one block of a device multiplies at a time.
const TILE: usize = 128;
/// Blocks that keep a large device busy.
const BLOCKS: usize = 132;
/// Rows that are worth a part of their own.
const LEAST_ROWS: usize = 2048;

/// Parts that the `rows` rows of each group are summed in, for a result of this many rows and columns: a sum of hundreds of
/// thousands of products is more precise in parts, and few results fill a device only in parts. The sums of the parts are
/// added by who takes them.
fn splits(rows: usize, groups: usize, [m, n]: [usize; 2]) -> usize {
    let tiles = groups * m.div_ceil(TILE) * n.div_ceil(TILE);
    let wanted = BLOCKS.div_ceil(tiles).min(rows / LEAST_ROWS).max(1);
    (1..=wanted).rev().find(|parts| rows.is_multiple_of(*parts)).unwrap_or(1)
}

/// A description of `[groups, dims...]` in the type of weights.
fn master_desc(dims: &[usize], dtype: DType) -> TensorDesc {
    TensorDesc::new(dims, gradient_dtype(dtype))
}

/// Checks input `i` of an op.
fn expect(op: &str, what: &str, got: &TensorDesc, expected: &TensorDesc) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::shape(op, what, expected, got)) }
}

/// The output of a layer: `act(z F^T + b + residual)`.
///
/// Inputs z, F `[groups, c_out, c_in]`, b `[groups, c_out]` and the residual if there is one; for the gradient alone then w,
/// gamma, beta, T `[groups, c_out, c_in]`, mean `[groups, c_in]`, rstd `[groups, c_out]`. Output like z with c_out channels.
#[derive(Debug, Clone, Copy)]
pub struct GramNorm {
    groups: usize,
    /// Whether z has a mean of 0.
    centred: bool,
    relu: bool,
    residual: bool,
    c_out: usize,
}

impl GramNorm {
    fn product(&self) -> Matmul {
        let (bias, addend, relu) = (true, self.residual, self.relu);
        Matmul { bias, addend, relu, ..Matmul::new(self.groups, Factor::PLAIN, Factor::TRANSPOSED) }
    }

    /// How many of the inputs the product takes.
    fn operands(&self) -> usize {
        3 + usize::from(self.residual)
    }
}

impl Op for GramNorm {
    fn name(&self) -> &'static str {
        "gram_norm"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let (operands, saved) = inputs.split_at(self.operands().min(inputs.len()));
        let outputs = self.product().infer(operands)?;
        let (z, f) = (inputs[0], inputs[1]);
        let (c_in, c_out, dtype) = (z.shape.channels(), self.c_out, z.dtype);
        let of_groups = |dims: &[usize]| master_desc(&[&[self.groups], dims].concat(), dtype);
        expect("gram_norm", "folded weight", f, &TensorDesc::new([self.groups, c_out, c_in], dtype))?;
        let expected = [
            ("w", master_desc(&[c_out, 1, 1, c_in], dtype)),
            ("gamma", master_desc(&[c_out], dtype)),
            ("beta", master_desc(&[c_out], dtype)),
            ("t", of_groups(&[c_out, c_in])),
            ("mean", of_groups(&[c_in])),
            ("rstd", of_groups(&[c_out])),
        ];
        if saved.len() != expected.len() {
            return Err(Error::shape("gram_norm", "inputs", self.operands() + expected.len(), inputs.len()));
        }
        expected.iter().zip(saved).try_for_each(|((what, desc), got)| expect("gram_norm", what, got, desc))?;
        Ok(outputs)
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        self.product().workspace(&inputs[..self.operands()])
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        self.product().library_work(&inputs[..self.operands()])
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        self.product().flops(&inputs[..self.operands()])
    }

    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let mut operands = tensors.clone();
        operands.inputs.truncate(self.operands());
        self.product().traffic(&operands)
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        io.inputs.truncate(self.operands());
        self.product().cpu(io)
    }

    /// The gradient of the whole layer, see the module.
    fn backward(&self, g: &mut GradBuilder<'_>) -> Result<()> {
        let groups = self.groups;
        let first = self.operands();
        let (z, f) = (g.input(0), g.input(1));
        let [w, gamma, t, mean, rstd] = [0, 1, 3, 4, 5].map(|i| g.input(first + i));
        let (d_out, sums) = self.masked(g)?;
        if self.residual && g.needs(3) {
            g.pass(3, d_out)?;
        }
        let desc = g.tape().desc(z).clone();
        let (rows, c_in) = (desc.shape.rows() / groups, desc.shape.channels());
        let splits = splits(rows, groups, [self.c_out, c_in]);
        let r = g.emit_values(long_product(groups * splits), &[d_out, z], &[None])?[0];
        let op = FoldBackward { groups, rows, centred: self.centred };
        let wanted = |i: usize, g: &GradBuilder<'_>| g.needs(first + i).then_some(first + i);
        let targets = [wanted(0, g), wanted(1, g), wanted(2, g), None];
        let folded = g.emit_values(op, &[r, sums, mean, t, w, gamma, rstd], &targets)?;
        if !g.needs(0) {
            return Ok(());
        }
        let square = Matmul { exact: true, ..Matmul::new(groups, Factor::TRANSPOSED.shared(), Factor::PLAIN) };
        let m = g.emit_values(square, &[w, folded[3]], &[None])?[0];
        let shift = g.emit_values(Shift { groups, rows, centred: self.centred }, &[m, sums, f, mean], &[None, None])?;
        // The small term first: the sum is rounded once more when the large one is added.
        let product = Matmul::new(groups, Factor::PLAIN, Factor::PLAIN);
        g.emit(Matmul { bias: true, ..product }, &[z, shift[0], shift[1]], &[Some(0)])?;
        g.emit(product, &[d_out, f], &[Some(0)])
    }
}

impl GramNorm {
    /// The gradient behind the ReLU, and its sums over the rows of each group.
    fn masked(&self, g: &mut GradBuilder<'_>) -> Result<(ValueId, ValueId)> {
        let d_out = g.d_output(0)?;
        if self.relu {
            let masked = g.emit_values(Masked { groups: self.groups }, &[d_out, g.output(0)], &[None, None])?;
            return Ok((masked[0], masked[1]));
        }
        if let Some(sums) = self.summed_before(g.tape(), d_out) {
            return Ok((d_out, sums));
        }
        let sums = g.emit_values(GroupSums { groups: self.groups, means: false }, &[d_out], &[None])?[0];
        Ok((d_out, sums))
    }

    /// The sums of d_out where it is the masked gradient of another layer as it is: that of a block is that of its projection
    /// shortcut too.
    fn summed_before(&self, tape: &Tape, d_out: ValueId) -> Option<ValueId> {
        let mut writers = tape.nodes().iter().filter(|node| node.outputs.contains(&d_out));
        let (writer, other) = (writers.next()?, writers.next());
        let op: &dyn std::any::Any = &*writer.op;
        let same = op.downcast_ref::<Masked>().is_some_and(|masked| masked.groups == self.groups);
        (same && other.is_none()).then(|| writer.outputs[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_divide_the_rows_and_fill_a_device() {
        // ResNet-50 with 256 pairs: rows of a view, channels.
        for (rows, sides, expected) in [
            (256 * 56 * 56, [64, 64], 64),
            (256 * 56 * 56, [256, 64], 32),
            (256 * 28 * 28, [512, 128], 16),
            (256 * 14 * 14, [1024, 256], 4),
            (256 * 7 * 7, [2048, 512], 2),
            (256 * 7 * 7, [2048, 1024], 1),
        ] {
            let parts = splits(rows, 2, sides);
            assert_eq!(parts, expected, "{rows} {sides:?}");
            assert!(rows.is_multiple_of(parts));
        }
        assert_eq!(splits(2 * 101 * 103, 2, [3, 5]), 2, "only 2, 101 and 103 divide");
        assert_eq!(splits(7, 1, [3, 5]), 1);
    }
}
