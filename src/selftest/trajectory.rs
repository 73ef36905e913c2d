//! Trajectories: whole training steps against PyTorch's float64, with tolerances relative to PyTorch's own float32 errors
//! (training from random weights is ill-conditioned, so a constant would be too loose or too strict).

use super::{Golden, Variant, Worst};
use crate::error::{Error, Result};
use crate::exec::{Device, Executor, Options};
use crate::graph::ValueId;
use crate::graph::plan::Target;
use crate::nn::ParamInfo;
use crate::nn::epilogues::Epilogues;
use crate::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use crate::nn::resnet::{Block, ResNet, Stem};
use crate::nn::simsiam::{LOSS_SCALE, SimSiam, StepShape, TrainGraph, ViewSource};
use crate::ops::sgd::StepParam;
use crate::ops::similarity::Kind;
use crate::tensor::{DType, HostTensor};
use crate::train::epilogues::Processor;
use crate::train::state::{read_params, to_torch, write_initial, write_params};

/// Replays a file in each of `dtypes` that PyTorch's own error is known for; returns what was compared and the worst error.
pub(super) fn replay(golden: &Golden, device: &Device, dtypes: &[DType], variant: &Variant) -> Result<(String, Worst)> {
    if let Some(error) = device.missing_libraries() {
        return Ok((format!("not run: {error}"), Worst::default()));
    }
    let (mut worst, mut compared) = (Worst::default(), String::from("no element type in common"));
    let known: Vec<DType> = dtypes.iter().copied().filter(|dtype| matches!(dtype, DType::F32 | DType::Bf16)).collect();
    for &dtype in &known {
        let check = Check { golden, dtype, worst };
        (compared, worst) = replay_in(check, device, variant)?;
    }
    let dtypes: Vec<String> = known.iter().map(DType::to_string).collect();
    Ok((format!("{compared} in {}", dtypes.join(", ")), worst))
}

/// A trajectory before its first step.
pub(super) struct Start {
    pub exec: Box<dyn Executor>,
    pub views: ValueId,
    pub loss: ValueId,
    z_std: ValueId,
    params: Vec<ParamInfo>,
    gradients: Vec<(String, ValueId)>,
}

impl Start {
    /// Writes the views of a step.
    pub fn write_views(&mut self, golden: &Golden, step: usize) -> Result<()> {
        let dtype = self.exec.tape().desc(self.views).dtype;
        self.exec.write(self.views, &dtype.encode(&both_views(golden, step)?))
    }
}

/// How a trajectory is computed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step<'a> {
    /// The stem is as such devices have it.
    pub target: Target,
    pub dtype: DType,
    pub variant: &'a Variant,
}

/// The network of a file on `device` with its start values and hyper-parameters.
pub(super) fn start(golden: &Golden, device: &Device, step: Step<'_>, options: Options) -> Result<Start> {
    let Step { target, dtype, variant } = step;
    let source = ViewSource::Given { padded: target == Target::Cuda };
    let (batch, image_size) = (golden.parse("batch")?, golden.parse("image_size")?);
    let epilogues = Epilogues { gram: variant.bn.layers(Processor::Gpu(None)), ..Epilogues::default() };
    let plain = StepShape::new(batch, image_size, dtype, source);
    let shape = StepShape { keep_gradients: true, views: variant.views, epilogues, ..plain };
    let TrainGraph { tape, views, step_params, loss, z_std, params, gradients, .. } =
        model(golden)?.record_step(&shape)?;
    let mut exec = device.executor_with(tape, options)?;
    // What only float16 has is in no file.
    let (scaling, params): (Vec<_>, Vec<_>) = params.into_iter().partition(|p| p.name.starts_with(LOSS_SCALE));
    write_initial(&mut *exec, &scaling, 0)?;
    write_params(&mut *exec, &params, |name, _| golden.tensor(&format!("init/{name}")).cloned())?;
    exec.write(step_params, bytemuck::cast_slice(&hyper_parameters(golden)?))?;
    Ok(Start { exec, views, loss, z_std, params, gradients })
}

fn replay_in(mut check: Check<'_>, device: &Device, variant: &Variant) -> Result<(String, Worst)> {
    let (golden, dtype) = (check.golden, check.dtype);
    let steps: usize = golden.parse("steps")?;
    let mut run = start(golden, device, Step { target: device.target(), dtype, variant }, Options::default())?;
    let (mut losses, mut stds) = (Vec::new(), Vec::new());
    for step in 0..steps {
        run.write_views(golden, step)?;
        let Start { exec, loss, z_std, gradients, .. } = &mut run;
        exec.run_step()?;
        losses.push(scalar(&exec.read(*loss)?));
        stds.push(scalar(&exec.read(*z_std)?));
        if step == 0 {
            let named = gradients.iter().map(|(name, value)| Ok((name.clone(), to_torch(exec.read(*value)?)?)));
            check.gradients(&named.collect::<Result<Vec<_>>>()?)?;
        }
    }
    check.losses(&losses, &stds)?;
    let last = read_params(&*run.exec, &run.params)?;
    for (name, tensor) in &last {
        check.last(name, tensor, steps)?;
    }
    let compared = format!("{steps} steps, {} gradients, {} final tensors", run.gradients.len(), last.len());
    Ok((compared, check.worst))
}

fn scalar(tensor: &HostTensor) -> f64 {
    tensor.to_f64()[0]
}

/// The network a file describes. What the metadata leaves open shows in the tensors.
fn model(golden: &Golden) -> Result<SimSiam> {
    let unknown =
        |key: &str, got: &str| Error::format(&golden.path, None, format!("metadata: {key} cannot be {got:?}"));
    let block = match golden.meta("block")? {
        "basic" => Block::Basic,
        "bottleneck" => Block::Bottleneck,
        other => return Err(unknown("block", other)),
    };
    let stem = match golden.meta("stem")? {
        "imagenet" => Stem::Imagenet,
        "cifar" => Stem::Cifar,
        other => return Err(unknown("stem", other)),
    };
    let depths = golden.meta("depths")?;
    let depths: std::result::Result<Vec<usize>, _> = depths.split(',').map(|d| d.trim().parse()).collect();
    let depths = depths.map_err(|_| unknown("depths", golden.metadata["depths"].as_str()))?;
    let projector_layers: usize = golden.parse("projector_layers")?;
    let last = projector_layers.saturating_sub(1) * 3;
    let has = |name: String| golden.tensors.contains_key(&name);
    let projector_out_bias = match has(format!("init/encoder.fc.{last}.bias")) {
        false => OutBias::None,
        true if has(format!("grad0/encoder.fc.{last}.bias")) => OutBias::Trained,
        true => OutBias::Frozen,
    };
    let heads = Heads {
        dim: golden.parse("dim")?,
        projector_hidden: golden.tensor("init/encoder.fc.0.weight")?.desc().shape.dims()[0],
        predictor_hidden: golden.parse("pred_dim")?,
        projector_layers,
        projector_out_affine: has(format!("init/encoder.fc.{}.weight", last + 1)),
        projector_out_bias,
        norm: HeadNorm::Default,
        predictor: PredictorKind::Mlp,
    };
    let backbone = ResNet { block, depths, width: golden.parse("width")?, stem };
    Ok(SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true })
}

fn hyper_parameters(golden: &Golden) -> Result<[f64; StepParam::COUNT]> {
    let mut params = [0.0; StepParam::COUNT];
    params[StepParam::Lr as usize] = golden.parse("lr")?;
    params[StepParam::PredictorLr as usize] = golden.parse("predictor_lr")?;
    params[StepParam::Momentum as usize] = golden.parse("momentum")?;
    params[StepParam::WeightDecay as usize] = golden.parse("weight_decay")?;
    Ok(params)
}

/// Both views of a step, from two NCHW tensors to one NHWC tensor.
fn both_views(golden: &Golden, step: usize) -> Result<Vec<f64>> {
    let mut views = Vec::new();
    for view in ["view1", "view2"] {
        let tensor = golden.tensor(&format!("{view}/{step}"))?;
        let [_, c, h, w] = tensor.desc().shape.expect("golden", view)?;
        for image in tensor.to_f64().chunks_exact(c * h * w) {
            views.extend((0..h * w).flat_map(|pixel| (0..c).map(move |channel| image[channel * h * w + pixel])));
        }
    }
    Ok(views)
}

struct Check<'a> {
    golden: &'a Golden,
    dtype: DType,
    worst: Worst,
}

impl Check<'_> {
    /// How many times PyTorch's own error in the same element type is allowed.
    fn factor(&self) -> f64 {
        if self.dtype == DType::F32 { 3.0 } else { 2.0 }
    }

    /// The name of PyTorch's own error of `tensor`.
    fn own(&self, tensor: &str) -> String {
        let folder = if self.dtype == DType::F32 { "err32" } else { "err16" };
        format!("{folder}/{tensor}")
    }

    fn losses(&mut self, losses: &[f64], stds: &[f64]) -> Result<()> {
        let (expected, own) = (self.golden.values("loss")?, self.golden.values(&self.own("loss"))?);
        let expected_std = self.golden.values("z_std")?;
        if [expected.len(), own.len(), expected_std.len()] != [losses.len(); 3] {
            let what = format!("loss, {} and z_std: expected {} values each", self.own("loss"), losses.len());
            return Err(Error::format(&self.golden.path, None, what));
        }
        let mut own_max: f64 = 0.0;
        for step in 0..losses.len() {
            own_max = own_max.max(own[step]);
            let drift = if step == 0 { 2e-6 } else { 1e-5 * step as f64 };
            let tolerance = self.factor() * own_max + drift;
            self.worst.observe(|| format!("loss of step {step}"), (losses[step] - expected[step]).abs(), tolerance);
            let tolerance = if self.dtype == DType::F32 { 1e-4 } else { 1e-3 };
            self.worst.observe(|| format!("z std of step {step}"), (stds[step] - expected_std[step]).abs(), tolerance);
        }
        Ok(())
    }

    /// Each gradient on its own, and the median of the relative errors.
    fn gradients(&mut self, gradients: &[(String, HostTensor)]) -> Result<()> {
        let (mut errors, mut own_errors) = (Vec::new(), Vec::new());
        for (name, gradient) in gradients {
            let expected = self.golden.values(&format!("grad0/{name}"))?;
            let own = self.golden.scalar_or_zero(&self.own(&format!("grad0/{name}")));
            let (error, size) = (distance(&gradient.to_f64(), &expected), norm(&expected));
            let tolerance = self.factor() * own + 5e-3 * size + f64::MIN_POSITIVE;
            self.worst.observe(|| format!("gradient of {name}"), error, tolerance);
            errors.push(error / size.max(f64::MIN_POSITIVE));
            own_errors.push(own / size.max(f64::MIN_POSITIVE));
        }
        let expected = self.golden.tensors.keys().filter(|name| name.starts_with("grad0/")).count();
        if expected != gradients.len() {
            let what = format!("the file has {expected} gradients, the network {}", gradients.len());
            return Err(Error::format(&self.golden.path, None, what));
        }
        let tolerance = self.factor() * median(&mut own_errors) + 1e-4;
        self.worst.observe(|| "median gradient".into(), median(&mut errors), tolerance);
        Ok(())
    }

    fn last(&mut self, name: &str, tensor: &HostTensor, steps: usize) -> Result<()> {
        let (got, expected) = (tensor.to_f64(), self.golden.values(&format!("final/{name}"))?);
        let init = self.golden.values(&format!("init/{name}"))?;
        if name.ends_with("num_batches_tracked") {
            let error = (got[0] - init[0] - 2.0 * steps as f64).abs() + distance(&got, &expected);
            self.worst.observe(|| format!("final {name}"), error, 0.5);
            return Ok(());
        }
        let own = self.golden.scalar_or_zero(&self.own(&format!("final/{name}")));
        let size = norm(&expected);
        let rounding = 1e-6 * size + 1e-6 * (expected.len() as f64).sqrt();
        let tolerance = self.factor() * own + 1e-2 * distance(&expected, &init) + rounding;
        self.worst.observe(|| format!("final {name}"), distance(&got, &expected), tolerance);
        Ok(())
    }
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Norm of the difference; infinite for different lengths.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
