//! A training step that is measured by itself: what `profile` and `bench step` share.

use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::gpu_args::GpuArgs;
use super::memory_args::MemoryArgs;
use super::model_args::{ModelArgs, arch_name};
use super::peaks::Peaks;
use super::plan::name_of;
use super::preset::Preset;
use crate::backend::cpu::Tier;
use crate::error::{Error, Result};
use crate::exec::{Device, DeviceChoice, Executor, Opened, Options, Precision, room};
use crate::graph::budget::MemoryBudget;
use crate::graph::ledger::flops;
use crate::graph::{Plan, ValueId};
use crate::nn::epilogues::Epilogues;
use crate::nn::simsiam::{SimSiam, StepShape, TrainGraph, ViewSource};
use crate::ops::sgd::StepParam;
use crate::rng::Stream;
use crate::tensor::TensorDesc;
use crate::train::epilogues::EpilogueChoice;
use crate::train::memory::MemoryChoice;
use crate::train::state::write_initial;

const MAX_BATCH: usize = 1 << 16;
const MAX_IMAGE_SIZE: usize = 8192;
/// Random values that views are filled with, again and again; a prime, so that no row is like the last.
const RANDOM_VALUES: usize = 1_000_003;
/// `--batch largest` is a multiple of it.
const BATCH_STEP: usize = 8;
/// Learning rate at batch 256, momentum and weight decay: the reference recipe's. They decide no time, but keep the weights
/// finite.
const LR: f64 = 0.05;
const MOMENTUM: f64 = 0.9;
const WEIGHT_DECAY: f64 = 1e-4;

/// Source images per step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchChoice {
    Images(usize),
    /// As many as fit into the memory of the device.
    Largest,
}

impl FromStr for BatchChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<BatchChoice, String> {
        match text {
            "largest" => Ok(BatchChoice::Largest),
            _ => text.parse().map(BatchChoice::Images).map_err(|_| "expected a number of images, or largest".into()),
        }
    }
}

#[derive(Debug, clap::Args)]
pub struct WorkloadArgs {
    /// Recipe that the defaults come from.
    #[arg(long, value_enum, default_value_t)]
    preset: Preset,
    /// Where to compute: auto (the first NVIDIA GPU if there is one, else the CPU), cpu, cuda, cuda:N, or cuda-emulated,
    /// whose times say nothing about a GPU.
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// Source images per step, each of two views; largest: as many as a CUDA device has memory for [default: 256, 32 on the
    /// CPU, 2 emulated].
    #[arg(long, value_name = "N|largest")]
    batch: Option<BatchChoice>,
    /// Height and width of a view in pixels [default: imagenet 224, cifar 32].
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// In what to train [default: bf16, f32 on the CPU].
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    #[command(flatten)]
    gpu: GpuArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Implementation of the CPU's convolutions.
    #[arg(long, value_enum, default_value_t)]
    cpu_conv: Tier,
    /// What the device can do at best in this element type, to compute a second MFU from, e.g. the maker's figure.
    #[arg(long, value_name = "TFLOPS")]
    peak_tflops: Option<f64>,
    #[command(flatten)]
    model: ModelArgs,
}

/// What is to be measured, and on what.
pub struct Workload {
    pub preset: Preset,
    pub device: Device,
    pub choice: DeviceChoice,
    pub precision: Precision,
    pub options: Options,
    pub asked_epilogues: EpilogueChoice,
    /// What that comes to on the device.
    pub epilogues: Epilogues,
    pub memory: MemoryChoice,
    pub cpu_conv: Tier,
    pub model: SimSiam,
    pub batch: usize,
    pub image_size: usize,
    /// Floating-point operations of a step of the model; channels that a device pads with zeros do not count.
    pub flops: u64,
    pub peaks: Peaks,
}

impl WorkloadArgs {
    /// Opens the device and measures what it can do.
    ///
    /// # Errors
    /// Options that make no sense; a device that is not there.
    pub fn resolve(&self) -> Result<Workload> {
        let model = self.model.resolve(self.preset)?;
        let image_size = self.image_size.unwrap_or(self.preset.image_size());
        check("--image-size", image_size, 1, MAX_IMAGE_SIZE)?;
        if let Some(BatchChoice::Images(batch)) = self.batch {
            check("--batch", batch, 2, MAX_BATCH)?;
        }
        if let Some(peak) = self.peak_tflops.filter(|peak| !(peak.is_finite() && *peak > 0.0)) {
            return Err(Error::config("--peak-tflops", format!("expected more than 0, got {peak}")));
        }
        let Opened { device, instead_of_gpu } = self.device.open(self.cpu_conv)?;
        if let Some(error) = instead_of_gpu {
            eprintln!("measuring the CPU, because there is no GPU to be used: {error}");
        }
        let precision = self.dtype.unwrap_or(Precision::default_on(&device));
        precision.check_trainable_on(&device)?;
        let source = ViewSource::Given { padded: matches!(device, Device::Cuda(_)) };
        let asked_epilogues = self.gpu.epilogues(EpilogueChoice::default());
        let epilogues = asked_epilogues.resolve(&device, precision.dtype());
        let mut memory = self.memory.choose(MemoryChoice::default());
        let views = memory.views;
        let step = |batch| StepShape {
            epilogues: epilogues.clone(),
            views,
            ..StepShape::new(batch, image_size, precision.dtype(), source.clone())
        };
        let batch = match self.batch {
            Some(BatchChoice::Images(batch)) => batch,
            Some(BatchChoice::Largest) => largest_batch(&device, &model, &mut memory, &step)?,
            None => default_batch(&device),
        };
        let flops = flops(&model.train_graph(batch, image_size, precision.dtype(), false)?.tape);
        let GpuArgs { no_graph, autotune, nvtx, .. } = self.gpu;
        let options = Options { graph: !no_graph, choice: precision.choice(autotune), nvtx };
        // Before the step takes the memory.
        let peaks = Peaks::measure(&device, precision, self.peak_tflops)?;
        let (preset, choice, cpu_conv) = (self.preset, self.device, self.cpu_conv);
        Ok(Workload {
            preset,
            device,
            choice,
            precision,
            options,
            asked_epilogues,
            epilogues,
            memory,
            cpu_conv,
            model,
            batch,
            image_size,
            flops,
            peaks,
        })
    }
}

impl Workload {
    /// Prepares the step on random views that stay on the device.
    ///
    /// # Errors
    /// A device that has not enough memory, or no library; [`Error::OutOfMemory`].
    pub fn synthetic(&self) -> Result<Synthetic> {
        let source = ViewSource::Given { padded: matches!(self.device, Device::Cuda(_)) };
        let plain = StepShape::new(self.batch, self.image_size, self.precision.dtype(), source);
        let shape = StepShape { epilogues: self.epilogues.clone(), views: self.memory.views, ..plain };
        let graph = self.model.record_step(&shape)?;
        let TrainGraph { tape, views, step_params, loss, params, .. } = graph;
        let (tape, _) = self.memory.fit(tape, self.device.target())?;
        let mut executor = self.device.executor_with(tape, self.options)?;
        write_initial(&mut *executor, &params, 0)?;
        executor.write(step_params, bytemuck::cast_slice(&step_parameters(self.batch)))?;
        let views_desc = executor.tape().desc(views).clone();
        executor.write(views, &random_views(&views_desc))?;
        Ok(Synthetic { executor, loss })
    }

    /// What is measured, in one line.
    pub fn title(&self) -> String {
        let (size, views, backbone) = (self.image_size, 2 * self.batch, &self.model.backbone);
        let (arch, stem) = (arch_name(backbone), name_of(backbone.stem));
        format!("{arch}, {stem} stem, {size}x{size} pixels, batch {} ({views} views), {}", self.batch, self.precision)
    }

    /// The fields that every report has.
    pub fn json(&self) -> Value {
        json!({
            "device": self.device.name(), "on_gpu": self.device.is_gpu(), "arch": arch_name(&self.model.backbone),
            "model": self.model, "batch": self.batch, "image_size": self.image_size,
            "dtype": self.precision.to_string(), "graph": self.options.graph, "autotune": self.options.choice.autotune,
            "fuse_statistics": self.epilogues.statistics.to_string(),
            "bn_gram": self.epilogues.gram.to_string(),
            "residual_gradient": self.epilogues.residual_gradient.to_string(),
            "fuse_pooling": self.epilogues.pooling, "fuse_shortcut": self.epilogues.shortcut,
            "views": self.memory.views, "memory_budget": self.memory.budget,
            "flops_per_step": self.flops, "ceilings": self.peaks.json(),
        })
    }
}

/// Steps that can be timed.
pub trait Steps {
    /// Runs steps back to back; returns how long until the last has ended.
    ///
    /// # Errors
    /// Faults of the executor or of the data.
    fn run(&mut self, steps: usize) -> Result<Duration>;

    /// The loss of the last step.
    ///
    /// # Errors
    /// Faults of the executor.
    fn loss(&mut self) -> Result<f64>;

    /// Bytes of the plan.
    fn planned_bytes(&self) -> usize;

    /// The loss, which must have been a number: a device may be faster on others.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when it is not finite.
    fn finite_loss(&mut self) -> Result<f64> {
        let loss = self.loss()?;
        match loss.is_finite() {
            true => Ok(loss),
            false => Err(Error::Mismatch(format!("the loss became {loss}: the time of such steps says nothing"))),
        }
    }
}

/// Steps on the same random views.
pub struct Synthetic {
    pub executor: Box<dyn Executor>,
    loss: ValueId,
}

impl Steps for Synthetic {
    fn run(&mut self, steps: usize) -> Result<Duration> {
        let start = Instant::now();
        (0..steps).try_for_each(|_| self.executor.run_step())?;
        self.executor.finish()?;
        Ok(start.elapsed())
    }

    fn loss(&mut self) -> Result<f64> {
        Ok(self.executor.read(self.loss)?.to_f64()[0])
    }

    fn planned_bytes(&self) -> usize {
        self.executor.plan().memory.total
    }
}

/// An object with the entries of another added.
pub fn merged(mut json: Value, more: Value) -> Value {
    if let (Some(json), Value::Object(more)) = (json.as_object_mut(), more) {
        json.extend(more);
    }
    json
}

/// Checks that a number lies in `min..=max`.
///
/// # Errors
/// [`Error::Config`] naming the option.
pub fn check(option: &str, value: usize, min: usize, max: usize) -> Result<()> {
    match (min..=max).contains(&value) {
        true => Ok(()),
        false => Err(Error::config(option, format!("expected {min} to {max}, got {value}"))),
    }
}

/// The value in the middle of sorted ones, and those at the quarters, by linear interpolation.
pub fn quartiles(sorted: &[f64]) -> [f64; 3] {
    [0.25, 0.5, 0.75].map(|share| {
        let place = share * (sorted.len() - 1) as f64;
        let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
        low + (high - low) * place.fract()
    })
}

fn default_batch(device: &Device) -> usize {
    match device {
        Device::Cpu(_) => 32,
        _ if device.is_gpu() => 256,
        _ => 2,
    }
}

/// The most images, in multiples of [`BATCH_STEP`], whose step can be planned into the memory that is free; a budget is lowered to
/// that.
fn largest_batch(
    device: &Device,
    model: &SimSiam,
    memory: &mut MemoryChoice,
    step: &dyn Fn(usize) -> StepShape,
) -> Result<usize> {
    let Device::Cuda(driver) = device else {
        return Err(Error::config("--batch", "largest: only CUDA devices have a memory of their own to fill"));
    };
    let room = room(&**driver)?;
    let room = match &mut memory.budget {
        MemoryBudget::Bytes(bytes) => {
            *bytes = (*bytes).min(room as u64);
            *bytes as usize
        }
        _ => room,
    };
    let budget = match memory.budget {
        MemoryBudget::Unlimited => MemoryBudget::Unlimited,
        MemoryBudget::Bytes(_) | MemoryBudget::Least => MemoryBudget::Least,
    };
    let least = MemoryChoice { budget, ..*memory };
    let planned = |batch| {
        let graph = model.record_step(&step(batch))?;
        let (tape, _) = least.fit(graph.tape, device.target())?;
        Ok::<_, Error>(Plan::new(&tape, device.target())?.memory.total)
    };
    let smallest = planned(BATCH_STEP)?;
    if smallest > room {
        let hint = Some(format!("not even a batch of {BATCH_STEP} fits: use a smaller --image-size or --arch"));
        return Err(Error::OutOfMemory { device: driver.name(), needed: smallest, free: room, hint });
    }
    // Memory grows with the batch: halve the range between one that fits and one that does not.
    let (mut fits, mut too_large) = (1, MAX_BATCH / BATCH_STEP + 1);
    while too_large - fits > 1 {
        let middle = fits.midpoint(too_large);
        match planned(middle * BATCH_STEP)? <= room {
            true => fits = middle,
            false => too_large = middle,
        }
    }
    Ok(fits * BATCH_STEP)
}

fn step_parameters(batch: usize) -> [f64; StepParam::COUNT] {
    let lr = LR * batch as f64 / 256.0;
    let mut params = [0.0; StepParam::COUNT];
    params[StepParam::Lr as usize] = lr;
    params[StepParam::PredictorLr as usize] = lr;
    params[StepParam::Momentum as usize] = MOMENTUM;
    params[StepParam::WeightDecay as usize] = WEIGHT_DECAY;
    params
}

/// Views of normal random numbers, as normalised pixels are: zeros would move and multiply at less energy, and a device at
/// its power limit would run faster than on images.
fn random_views(desc: &TensorDesc) -> Vec<u8> {
    let mut stream = Stream::new(5, 0, 0);
    let normal: Vec<f64> = (0..RANDOM_VALUES).map(|_| stream.normal()).collect();
    desc.dtype.encode(&normal).iter().copied().cycle().take(desc.bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated() {
        assert_eq!(quartiles(&[3.0]), [3.0; 3]);
        assert_eq!(quartiles(&[1.0, 2.0, 3.0, 10.0]), [1.75, 2.5, 4.75]);
    }

    #[test]
    fn a_batch_is_a_number_or_largest() {
        assert_eq!("48".parse(), Ok(BatchChoice::Images(48)));
        assert_eq!("largest".parse(), Ok(BatchChoice::Largest));
        assert!("many".parse::<BatchChoice>().is_err());
    }
}
