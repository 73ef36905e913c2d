//! The op table: every op and gradient alone against PyTorch's float64; in float64 and float32 on the CPU, in float32,
//! bfloat16 and float16 on CUDA devices.

mod generated;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use self::generated::Generated;
use super::{Golden, Worst};
use crate::error::{Error, Result};
use crate::exec::Device;
use crate::graph::{Role, Tape, ValueId, backward, builtin};
use crate::ops::batch_norm::pair::BatchNormPair;
use crate::ops::batch_norm::{BatchNorm, BatchNormEval, BatchNormStatistics, Fusion};
use crate::ops::bias::AddBias;
use crate::ops::conv2d::{Conv2d, gradient_dtype};
use crate::ops::cosine_loss::CosineLoss;
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::gram_norm::{self, Layer, Operands};
use crate::ops::lars::LarsUpdate;
use crate::ops::layout::{NchwToNhwc, NhwcToNchw};
use crate::ops::linear::Linear;
use crate::ops::matmul::{Factor, Matmul};
use crate::ops::pad_channels::PadChannels;
use crate::ops::pool::{GlobalAvgPool, MaxPool};
use crate::ops::relu::Relu;
use crate::ops::sgd::{Guard, SgdUpdate, StepParam};
use crate::ops::similarity::{Kind, Similarity};
use crate::ops::slice_rows::SliceRows;
use crate::ops::subsample::Subsample;
use crate::ops::z_std::ZStd;
use crate::tensor::{DType, TensorDesc};

/// Error allowed in float64, relative to the largest value of the tensor.
const F64_RTOL: f64 = 1e-11;
/// Error allowed in float32 beyond three times PyTorch's own, relative to the largest value of the tensor.
const F32_RTOL: f64 = 1e-6;
/// Tensors that are parameters, statistics or losses, whatever the op.
const MASTER: &[&str] = &["gamma", "beta", "running_mean", "running_var", "loss", "bias"];

/// One row of the table, as the file describes it.
#[derive(Debug, Deserialize)]
struct Case {
    #[serde(flatten)]
    op: OpCase,
    /// PyTorch's own float32 error (largest absolute), by tensor.
    #[serde(default)]
    err32: HashMap<String, f64>,
    /// The same of its bfloat16 run; none for an op that only knows float32.
    #[serde(default)]
    err16: HashMap<String, f64>,
    /// The same of its float16 run, but for tensors that overflow in it.
    #[serde(default)]
    err_f16: HashMap<String, f64>,
    /// Tensors that are not in the file but made from random numbers; those that result are in the file as samples.
    #[serde(default)]
    generated: HashMap<String, Generated>,
}

impl Case {
    /// Whether `device` computes the op in `dtype`.
    fn runs(&self, device: &Device, dtype: DType) -> bool {
        let by_library = matches!(
            self.op,
            OpCase::Conv2d { .. } | OpCase::Linear { .. } | OpCase::Matmul(_) | OpCase::ConvNorm { .. }
        );
        (!by_library || device.has_libraries()) && (matches!(dtype, DType::F64 | DType::F32) || !self.err16.is_empty())
    }

    /// The error allowed in a tensor whose largest value is `scale`: a multiple of PyTorch's own, and rounding.
    fn tolerance(&self, tensor: &str, dtype: DType, scale: f64) -> f64 {
        let of = |errors: &HashMap<String, f64>| errors.get(tensor).copied();
        match dtype {
            DType::F64 => F64_RTOL * scale,
            DType::F32 => 3.0 * of(&self.err32).unwrap_or(0.0) + F32_RTOL * scale,
            DType::F16 => 2.0 * of(&self.err_f16).unwrap_or(f64::INFINITY) + F32_RTOL * scale,
            _ => 2.0 * of(&self.err16).unwrap_or(0.0) + F32_RTOL * scale,
        }
    }

    /// Whether a tensor stays in float32 when activations are in bfloat16 or float16.
    fn is_master(&self, tensor: &str) -> bool {
        let has_bias = matches!(self.op, OpCase::Linear { .. } | OpCase::AddBias);
        let has_weight = matches!(self.op, OpCase::ConvNorm { .. });
        // What is added to a product is like its result.
        let widened = matches!(self.op, OpCase::Matmul(MatmulCase { widened: true, .. }));
        let others = [("b", has_bias), ("w", has_weight), ("addend", widened)];
        let of_either_branch = tensor.strip_suffix("_r").unwrap_or(tensor);
        MASTER.contains(&of_either_branch) || others.contains(&(tensor, true))
    }
}

#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum OpCase {
    Conv2d { stride: [usize; 2], padding: [usize; 2] },
    BatchNorm { groups: usize, eps: f64, momentum: f64, relu: bool, residual: bool, affine: bool },
    ConvNorm { groups: usize, eps: f64, momentum: f64, relu: bool, residual: bool, stride: usize },
    BatchNormPair { groups: usize, eps: f64, momentum: f64 },
    BatchNormEval { eps: f64, relu: bool, residual: bool, affine: bool },
    Relu,
    MaxPool { kernel: usize, stride: usize, padding: usize },
    GlobalAvgPool,
    Linear { bias: bool },
    Matmul(MatmulCase),
    NegativeCosine { z_shift: usize },
    SoftmaxXent { z_shift: usize },
    CosineLoss { z_shift: usize },
    CrossEntropy,
    ZStd,
    Sgd { lr: f64, momentum: f64, weight_decay: f64 },
    Lars { lr: f64, momentum: f64, weight_decay: f64, trust: f64, eps: f64, adapted: Vec<bool> },
    AddBias,
    PadChannels { channels: usize },
    NchwToNhwc { channels: usize },
    NhwcToNchw { channels: usize },
    SliceRows { start: usize, len: usize },
    Add,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct MatmulCase {
    groups: usize,
    a: FactorCase,
    b: FactorCase,
    /// Whether A is B as well.
    same: bool,
    bias: bool,
    addend: bool,
    relu: bool,
    widened: bool,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct FactorCase {
    transposed: bool,
    shared: bool,
}

impl From<FactorCase> for Factor {
    fn from(FactorCase { transposed, shared }: FactorCase) -> Factor {
        Factor { transposed, shared }
    }
}

/// Replays all cases; returns what was compared and the worst error.
pub(super) fn replay(golden: &Golden, device: &Device, dtypes: &[DType]) -> Result<(String, Worst)> {
    let cases: BTreeMap<String, Case> = serde_json::from_str(golden.meta("cases")?)
        .map_err(|e| Error::format(&golden.path, None, format!("metadata: cases: {e}")))?;
    let (mut worst, mut tensors, mut ran) = (Worst::default(), 0, 0);
    for (name, case) in &cases {
        let mut compared = 0;
        for &dtype in dtypes.iter().filter(|&&dtype| case.runs(device, dtype)) {
            let (tape, leaves, results) = (Tape::new(), Vec::new(), Vec::new());
            compared += Replay { golden, name, case, dtype, device, tape, leaves, results }.run(&mut worst)?;
        }
        tensors += compared;
        ran += usize::from(compared > 0);
    }
    let dtypes: Vec<String> = dtypes.iter().map(DType::to_string).collect();
    Ok((format!("{ran} of {} ops cases, {tensors} tensors in {}", cases.len(), dtypes.join(", ")), worst))
}

/// One case in one precision.
struct Replay<'a> {
    golden: &'a Golden,
    name: &'a str,
    case: &'a Case,
    dtype: DType,
    device: &'a Device,
    tape: Tape,
    /// Leaves and the values they start from.
    leaves: Vec<(ValueId, Vec<f64>)>,
    /// Values to compare, by tensor name after the case's (`out/y`, `d_in/x`).
    results: Vec<(String, ValueId)>,
}

impl Replay<'_> {
    fn run(mut self, worst: &mut Worst) -> Result<usize> {
        self.record(&self.case.op)?;
        let compared = self.results.len();
        for (_, value) in &self.results {
            self.tape.keep(*value);
        }
        let mut exec = self.device.poisoned_executor(self.tape)?;
        for (leaf, values) in &self.leaves {
            let dtype = exec.tape().desc(*leaf).dtype;
            exec.write(*leaf, &dtype.encode(values))?;
        }
        exec.run_step()?;
        if let Some(buffer) = exec.overrun()? {
            return Err(Error::Mismatch(format!("{}: a node wrote behind buffer {buffer}", self.name)));
        }
        for (tensor, value) in &self.results {
            let expected = self.golden.values(&format!("{}/{tensor}", self.name))?;
            let mut got = exec.read(*value)?.to_f64();
            if !self.case.generated.is_empty() {
                got = generated::samples(&got);
            }
            let scale = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            let tolerance = self.case.tolerance(tensor, self.dtype, scale) + f64::MIN_POSITIVE;
            let label = || format!("{}/{tensor} in {}", self.name, self.dtype);
            // Where the type overflows there is nothing to compare.
            if tolerance.is_finite() {
                worst.observe(label, largest_difference(&got, &expected), tolerance);
            }
        }
        Ok(compared)
    }

    fn record(&mut self, op: &OpCase) -> Result<()> {
        match *op {
            OpCase::Conv2d { stride, padding } => self.op(Conv2d::new(stride, padding), &["x", "w"], &["y"]),
            OpCase::BatchNorm { groups, eps, momentum, relu, residual, affine } => {
                let fusion = Fusion { affine, residual, relu };
                self.batch_norm(BatchNorm { groups, eps, momentum, fusion, sums_given: false, means: false })
            }
            OpCase::BatchNormPair { groups, eps, momentum } => self.batch_norm_pair(groups, eps, momentum),
            OpCase::ConvNorm { groups, eps, momentum, relu, residual, stride } => {
                self.conv_norm(Layer { groups, eps, momentum, relu }, stride, residual)
            }
            OpCase::BatchNormEval { eps, relu, residual, affine } => {
                let names = ["x", "running_mean", "running_var"].into_iter();
                let names: Vec<&str> = names.chain(optional_names(affine, residual)).collect();
                self.op(BatchNormEval { eps, fusion: Fusion { affine, residual, relu } }, &names, &["y"])
            }
            OpCase::Relu => self.op(Relu, &["x"], &["y"]),
            OpCase::MaxPool { kernel, stride, padding } => {
                self.op(MaxPool { kernel, stride, padding, taken: true }, &["x"], &["y"])
            }
            OpCase::GlobalAvgPool => self.op(GlobalAvgPool, &["x"], &["y"]),
            OpCase::Linear { bias } => self.op(Linear, if bias { &["x", "w", "b"] } else { &["x", "w"] }, &["y"]),
            OpCase::Matmul(case) => self.matmul(case),
            OpCase::NegativeCosine { z_shift } => {
                self.op(Similarity { kind: Kind::Cosine, z_shift }, &["p", "z"], &["loss"])
            }
            OpCase::SoftmaxXent { z_shift } => {
                self.op(Similarity { kind: Kind::SoftmaxXent, z_shift }, &["p", "z"], &["loss"])
            }
            OpCase::CosineLoss { z_shift } => self.cosine_loss(z_shift),
            OpCase::CrossEntropy => self.cross_entropy(),
            OpCase::ZStd => self.op(ZStd, &["z"], &["z_std"]),
            OpCase::Sgd { lr, momentum, weight_decay } => {
                let op = SgdUpdate { lr: vec![StepParam::Lr], guard: Guard::None };
                self.optimiser(op, [lr, lr, momentum, weight_decay], &["g"], &["w"], &["v"])
            }
            OpCase::Lars { lr, momentum, weight_decay, trust, eps, ref adapted } => {
                let names = |prefix: &str| (0..adapted.len()).map(|i| format!("{prefix}{i}")).collect::<Vec<_>>();
                let op = LarsUpdate { lr: vec![StepParam::Lr; adapted.len()], adapted: adapted.clone(), trust, eps };
                let [g, w, v] = ["g", "w", "v"].map(names);
                let [g, w, v] = [&g, &w, &v].map(|names| names.iter().map(String::as_str).collect::<Vec<_>>());
                self.optimiser(op, [lr, lr, momentum, weight_decay], &g, &w, &v)
            }
            OpCase::AddBias => self.op(AddBias, &["x", "b"], &["y"]),
            OpCase::PadChannels { channels } => self.op(PadChannels { channels }, &["x"], &["y"]),
            OpCase::NchwToNhwc { channels } => self.op(NchwToNhwc { channels, to: self.dtype }, &["x"], &["y"]),
            OpCase::NhwcToNchw { channels } => self.op(NhwcToNchw { channels }, &["x"], &["y"]),
            OpCase::SliceRows { start, len } => self.op(SliceRows { start, len }, &["x"], &["y"]),
            OpCase::Add => self.op(builtin::Add, &["a", "b"], &["y"]),
        }
    }

    /// Records an op over named inputs, its backward pass where the file has upstream gradients, and what to compare.
    fn op(&mut self, op: impl crate::graph::Op + 'static, inputs: &[&str], outputs: &[&str]) -> Result<()> {
        let inputs = self.inputs(inputs, Role::Input)?;
        let recorded = self.tape.record(op, &inputs.iter().map(|(_, v)| *v).collect::<Vec<_>>())?;
        self.differentiate(&inputs, outputs, &recorded)
    }

    fn matmul(&mut self, case: MatmulCase) -> Result<()> {
        let MatmulCase { groups, a, b, same, bias, addend, relu, widened } = case;
        let added = [("bias", bias), ("addend", addend)].into_iter().filter(|(_, given)| *given);
        let names: Vec<&str> =
            ["a"].into_iter().chain((!same).then_some("b")).chain(added.map(|(name, _)| name)).collect();
        let mut inputs: Vec<ValueId> = self.inputs(&names, Role::Input)?.into_iter().map(|(_, value)| value).collect();
        if same {
            inputs.insert(1, inputs[0]);
        }
        let op = Matmul { bias, addend, relu, widened, ..Matmul::new(groups, a.into(), b.into()) };
        let recorded = self.tape.record(op, &inputs)?;
        self.compare_outputs(&["c"], &recorded);
        Ok(())
    }

    fn batch_norm(&mut self, op: BatchNorm) -> Result<()> {
        let names: Vec<&str> = ["x"].into_iter().chain(optional_names(op.fusion.affine, op.fusion.residual)).collect();
        let inputs = self.inputs(&names, Role::Input)?;
        let mut state = self.inputs(&["running_mean", "running_var"], Role::State)?;
        let tracked = self.tracked();
        let updates = [state[0].1, state[1].1, tracked];
        let inputs_only: Vec<ValueId> = inputs.iter().map(|(_, v)| *v).collect();
        let recorded = self.tape.record_updating(op, &inputs_only, &updates)?;
        self.results.extend(state.drain(..).map(|(name, value)| (format!("out/{name}"), value)));
        self.differentiate(&inputs, &["y", "mean", "rstd"], &recorded)
    }

    /// The sum of two batch norms, of which the second one's statistics are an op of their own.
    fn batch_norm_pair(&mut self, groups: usize, eps: f64, momentum: f64) -> Result<()> {
        let inputs = self.inputs(&["x", "gamma", "beta", "r", "gamma_r", "beta_r"], Role::Input)?;
        let state = self.inputs(&["running_mean", "running_var", "running_mean_r", "running_var_r"], Role::State)?;
        let [x, gamma, beta, r, gamma_r, beta_r] = [0, 1, 2, 3, 4, 5].map(|i| inputs[i].1);
        let [of_x, of_r] = [0, 2].map(|first| [state[first].1, state[first + 1].1, self.tracked()]);
        let statistics = BatchNormStatistics::new(groups, eps, momentum, false);
        let of_r = self.tape.record_updating(statistics, &[r], &of_r)?;
        let op = BatchNormPair::new(groups, eps, momentum, false);
        let recorded = self.tape.record_updating(op, &[x, gamma, beta, r, of_r[0], of_r[1], gamma_r, beta_r], &of_x)?;
        self.results.extend(state.into_iter().map(|(name, value)| (format!("out/{name}"), value)));
        self.compare_outputs(&["mean_r", "rstd_r"], &of_r);
        self.differentiate(&inputs, &["y", "mean", "rstd"], &recorded)
    }

    /// The number of batches that a batch norm has seen.
    fn tracked(&mut self) -> ValueId {
        let tracked = self.tape.leaf("num_batches_tracked", TensorDesc::new([], DType::I64), Role::State, false);
        self.leaves.push((tracked, vec![0.0]));
        tracked
    }

    /// A 1x1 convolution and its batch norm, by the covariance of the input.
    fn conv_norm(&mut self, layer: Layer, stride: usize, residual: bool) -> Result<()> {
        let names: Vec<&str> = ["x", "w", "gamma", "beta"].into_iter().chain(residual.then_some("residual")).collect();
        let inputs = self.inputs(&names, Role::Input)?;
        let state = self.inputs(&["running_mean", "running_var"], Role::State)?;
        let tracked = self.tracked();
        let [x, w, gamma, beta] = [0, 1, 2, 3].map(|i| inputs[i].1);
        let z = if stride == 1 { x } else { self.tape.record_one(Subsample { stride }, &[x])? };
        let (residual, running) = (inputs.get(4).map(|(_, value)| *value), [state[0].1, state[1].1, tracked]);
        let operands = Operands { z, mean: None, w, gamma, beta, residual, running };
        let y = gram_norm::record(&mut self.tape, layer, &operands)?;
        self.results.extend(state.into_iter().map(|(name, value)| (format!("out/{name}"), value)));
        self.differentiate(&inputs, &["y"], &[y])
    }

    /// The target is a constant, and the gradient of the loss an input.
    fn cosine_loss(&mut self, z_shift: usize) -> Result<()> {
        let p = self.inputs(&["p"], Role::Input)?;
        let z = self.leaf("in", "z", Role::Input, false)?;
        let d_loss = self.leaf("d_out", "loss", Role::Input, false)?;
        let recorded = self.tape.record(CosineLoss { z_shift }, &[p[0].1, z, d_loss])?;
        self.compare_outputs(&["loss", "z_std"], &recorded);
        self.compare_gradients(&p, &[(recorded[0], d_loss)])
    }

    fn cross_entropy(&mut self) -> Result<()> {
        let logits = self.inputs(&["logits"], Role::Input)?;
        let labels = self.golden.tensor(&format!("{}/in/labels", self.name))?;
        let desc = TensorDesc::new(labels.desc().shape.dims(), DType::I64);
        let leaf = self.tape.leaf("labels", desc, Role::Input, false);
        self.leaves.push((leaf, labels.to_f64()));
        let recorded = self.tape.record(CrossEntropy, &[logits[0].1, leaf])?;
        self.differentiate(&logits, &["loss", "correct"], &recorded)
    }

    /// Records an optimiser over named gradients, weights and momenta.
    fn optimiser(
        &mut self,
        op: impl crate::graph::Op + 'static,
        step_params: [f64; StepParam::COUNT],
        gradients: &[&str],
        weights: &[&str],
        momenta: &[&str],
    ) -> Result<()> {
        let params = self.tape.leaf("step_params", StepParam::desc(), Role::Input, false);
        self.leaves.push((params, step_params.to_vec()));
        let gradients = self.inputs(gradients, Role::Input)?;
        let state = self.inputs(&[weights, momenta].concat(), Role::Parameter)?;
        let inputs: Vec<ValueId> = [params].into_iter().chain(gradients.iter().map(|(_, g)| *g)).collect();
        self.tape.update(op, &inputs, &state.iter().map(|(_, value)| *value).collect::<Vec<_>>())?;
        self.results.extend(state.into_iter().map(|(name, value)| (format!("out/{name}"), value)));
        Ok(())
    }

    /// Leaves holding the case's `in/<name>` tensors.
    fn inputs(&mut self, names: &[&str], role: Role) -> Result<Vec<(String, ValueId)>> {
        let leaf = |name: &&str| Ok((name.to_string(), self.leaf("in", name, role, role == Role::Input)?));
        names.iter().map(leaf).collect()
    }

    fn leaf(&mut self, folder: &str, name: &str, role: Role, requires_grad: bool) -> Result<ValueId> {
        let key = format!("{folder}/{name}");
        let (shape, values) = match self.case.generated.get(&key) {
            Some(generated) => (Cow::Borrowed(&generated.shape[..]), generated.values(self.name, &key)),
            None => {
                let tensor = self.golden.tensor(&format!("{}/{key}", self.name))?;
                (Cow::Owned(tensor.desc().shape.dims().to_vec()), tensor.to_f64())
            }
        };
        let dtype = if self.case.is_master(name) { gradient_dtype(self.dtype) } else { self.dtype };
        let value = self.tape.leaf(name, TensorDesc::new(&shape[..], dtype), role, requires_grad);
        self.leaves.push((value, values));
        Ok(value)
    }

    /// Whether the case has this tensor.
    fn has(&self, folder: &str, name: &str) -> bool {
        let key = format!("{folder}/{name}");
        self.case.generated.contains_key(&key) || self.golden.tensors.contains_key(&format!("{}/{key}", self.name))
    }

    fn differentiate(&mut self, inputs: &[(String, ValueId)], outputs: &[&str], recorded: &[ValueId]) -> Result<()> {
        self.compare_outputs(outputs, recorded);
        let mut seeds = Vec::new();
        for (name, &value) in outputs.iter().zip(recorded) {
            if self.has("d_out", name) {
                seeds.push((value, self.leaf("d_out", name, Role::Input, false)?));
            }
        }
        self.compare_gradients(inputs, &seeds)
    }

    fn compare_outputs(&mut self, names: &[&str], recorded: &[ValueId]) {
        let named = names.iter().zip(recorded);
        self.results.extend(named.map(|(name, &value)| (format!("out/{name}"), value)));
    }

    fn compare_gradients(&mut self, inputs: &[(String, ValueId)], seeds: &[(ValueId, ValueId)]) -> Result<()> {
        let gradients = backward(&mut self.tape, seeds)?;
        for (name, value) in inputs {
            if self.has("d_in", name) {
                let gradient = gradients.get(value).ok_or_else(|| {
                    Error::Mismatch(format!("{}: the engine computes no gradient for {name}", self.name))
                })?;
                self.results.push((format!("d_in/{name}"), *gradient));
            }
        }
        Ok(())
    }
}

fn optional_names(affine: bool, residual: bool) -> impl Iterator<Item = &'static str> {
    let affine: &[&str] = if affine { &["gamma", "beta"] } else { &[] };
    affine.iter().copied().chain(residual.then_some("residual"))
}

/// Infinite where the lengths differ, NaN where a value is.
fn largest_difference(got: &[f64], expected: &[f64]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    // f64::max would drop a NaN.
    got.iter().zip(expected).map(|(g, e)| (g - e).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}
