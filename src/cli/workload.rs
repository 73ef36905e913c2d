//! A training step that is measured by itself, on random views that stay on the device: what `profile` and `bench step` share.

use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bench::ceilings::{Ceilings, matrix_product};
use super::device::{Device, Precision};
use super::model_args::{ModelArgs, arch_name};
use super::plan::flops;
use super::preset::Preset;
use crate::backend::cpu::Tier;
use crate::error::{Error, Result};
use crate::exec::{self, Executor};
use crate::graph::plan::Target;
use crate::graph::{Plan, ValueId};
use crate::nn::simsiam::{SimSiam, TrainGraph};
use crate::ops::sgd::StepParam;
use crate::rng::Stream;
use crate::tensor::{DType, TensorDesc};
use crate::train::state::write_initial;

const MAX_BATCH: usize = 1 << 16;
const MAX_IMAGE_SIZE: usize = 8192;
/// Colour channels of a view; a device may want more of them, which are zero then.
const COLOURS: usize = 3;
/// Random values that views are filled with, again and again; a prime, so that no row is like the last.
const RANDOM_VALUES: usize = 1_000_003;
/// Runs of which the fastest is a ceiling: on a CPU, and on a GPU, whose clock has to rise first.
const PEAK_RUNS: [usize; 2] = [3, 40];
/// Bytes of a device that `--batch largest` leaves alone: the captured graph, handles and kernels of the libraries.
const LEFT_FREE: usize = 512 << 20;
/// `--batch largest` is a multiple of it.
const BATCH_STEP: usize = 8;
/// Learning rate at batch 256, momentum and weight decay: the reference recipe's. They decide no time, but keep the weights
/// finite.
const LR: f64 = 0.05;
const MOMENTUM: f64 = 0.9;
const WEIGHT_DECAY: f64 = 1e-4;

/// Source images per step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batch {
    Images(usize),
    /// As many as fit into the memory of the device.
    Largest,
}

impl FromStr for Batch {
    type Err = String;

    fn from_str(text: &str) -> Result<Batch, String> {
        match text {
            "largest" => Ok(Batch::Largest),
            _ => text.parse().map(Batch::Images).map_err(|_| "expected a number of images, or largest".into()),
        }
    }
}

#[derive(Debug, clap::Args)]
pub struct WorkloadArgs {
    /// Recipe that the defaults come from.
    #[arg(long, value_enum, default_value_t)]
    preset: Preset,
    /// Where to compute. Emulated kernels are timed too, which says nothing about a GPU.
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    /// Source images per step, each of two views; largest: as many as a CUDA device has memory for [default: 256, 32 on the
    /// CPU, 2 emulated].
    #[arg(long, value_name = "N|largest")]
    batch: Option<Batch>,
    /// Height and width of a view in pixels [default: imagenet 224, cifar 32].
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// Element type of the activations [default: bf16, f32 on the CPU].
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Implementation of the CPU's convolutions.
    #[arg(long, value_enum, default_value_t)]
    cpu_conv: Tier,
    /// What the device can do at best in this element type, to compute a second MFU from, e.g. the maker's figure.
    #[arg(long, value_name = "TFLOPS")]
    peak_tflops: Option<f64>,
    #[command(flatten)]
    model: ModelArgs,
}

/// The step on its device, with start weights and random views.
pub struct Workload {
    pub device: exec::Device,
    pub executor: Box<dyn Executor>,
    pub batch: usize,
    pub dtype: DType,
    model: SimSiam,
    image_size: usize,
    /// Floating-point operations of a step.
    pub flops: u64,
    loss: ValueId,
    pub peaks: Peaks,
}

impl WorkloadArgs {
    /// Records the step and prepares it.
    ///
    /// # Errors
    /// Options that make no sense; a device that is not there, or has not enough memory.
    pub fn prepare(&self) -> Result<Workload> {
        let model = self.model.resolve(self.preset)?;
        let image_size = self.image_size.unwrap_or(self.preset.image_size());
        check("--image-size", image_size, 1, MAX_IMAGE_SIZE)?;
        if let Some(Batch::Images(batch)) = self.batch {
            check("--batch", batch, 2, MAX_BATCH)?;
        }
        if let Some(peak) = self.peak_tflops.filter(|peak| !(peak.is_finite() && *peak > 0.0)) {
            return Err(Error::config("--peak-tflops", format!("expected more than 0, got {peak}")));
        }
        let dtype = self.dtype()?;
        let device = self.device.open(self.cpu_conv)?;
        // Before the step takes the memory.
        let peaks = Peaks::measure(&device, dtype, self.peak_tflops)?;
        let batch = match self.batch {
            Some(Batch::Images(batch)) => batch,
            Some(Batch::Largest) => largest_batch(&device, &model, image_size, dtype)?,
            None => default_batch(&device),
        };
        let TrainGraph { tape, views, step_params, loss, params, .. } =
            model.train_graph(batch, image_size, dtype, false)?;
        let flops = flops(&tape);
        let mut executor = device.executor(tape)?;
        write_initial(&mut *executor, &params, 0)?;
        executor.write(step_params, bytemuck::cast_slice(&step_parameters(batch)))?;
        let views_desc = executor.tape().desc(views).clone();
        executor.write(views, &random_views(&views_desc))?;
        Ok(Workload { device, executor, batch, dtype, model, image_size, flops, loss, peaks })
    }

    fn dtype(&self) -> Result<DType> {
        match (self.device, self.dtype) {
            (Device::Cpu, None | Some(Precision::F32)) => Ok(DType::F32),
            (Device::Cpu, Some(_)) => Err(Error::config("--dtype", "the CPU computes in f32")),
            (_, dtype) => Ok(dtype.unwrap_or(Precision::Bf16).dtype()),
        }
    }
}

impl Workload {
    /// Runs steps back to back; returns how long until the last has ended.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn run(&mut self, steps: usize) -> Result<Duration> {
        let start = Instant::now();
        (0..steps).try_for_each(|_| self.executor.run_step())?;
        self.executor.finish()?;
        Ok(start.elapsed())
    }

    /// The loss of the last step. What was computed must have been numbers: a device may be faster on others.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when it is not finite.
    pub fn loss(&self) -> Result<f64> {
        let loss = self.executor.read(self.loss)?.to_f64()[0];
        match loss.is_finite() {
            true => Ok(loss),
            false => Err(Error::Mismatch(format!("the loss became {loss}: the time of such steps says nothing"))),
        }
    }

    /// What is measured, in one line.
    pub fn title(&self) -> String {
        let (size, views, backbone) = (self.image_size, 2 * self.batch, &self.model.backbone);
        let stem = super::plan::name_of(backbone.stem);
        let arch = arch_name(backbone);
        format!("{arch}, {stem} stem, {size}x{size} pixels, batch {} ({views} views), {}", self.batch, self.dtype)
    }

    pub fn device_name(&self) -> String {
        self.device.name()
    }

    /// The fields that every report has.
    pub fn json(&self) -> Value {
        json!({
            "device": self.device_name(), "on_gpu": self.device.is_gpu(), "arch": arch_name(&self.model.backbone),
            "model": self.model, "batch": self.batch, "image_size": self.image_size, "dtype": self.dtype,
            "flops_per_step": self.flops, "planned_bytes": self.executor.plan().memory.total,
        })
    }
}

/// What a device can do at best.
pub struct Peaks {
    pub ceilings: Ceilings,
    /// TFLOP/s of a large matrix product.
    product: f64,
    dtype: DType,
    given: Option<f64>,
}

impl Peaks {
    fn measure(device: &exec::Device, dtype: DType, given: Option<f64>) -> Result<Peaks> {
        let repeat = PEAK_RUNS[usize::from(device.is_gpu())];
        let ceilings = Ceilings::measure(device, repeat)?;
        Ok(Peaks { ceilings, product: matrix_product(device, dtype, repeat)?, dtype, given })
    }

    /// The most floating-point operations a second that anything reached here, in TFLOP/s.
    pub fn measured(&self) -> f64 {
        self.ceilings.arithmetic(self.dtype).unwrap_or(0.0).max(self.product)
    }

    /// Model FLOPs utilisation: of what was measured to be possible, and of `--peak-tflops`.
    pub fn mfu(&self, flops: u64, seconds: f64) -> (f64, Option<f64>) {
        let speed = flops as f64 / seconds / 1e12;
        (speed / self.measured(), self.given.map(|peak| speed / peak))
    }

    /// The least time, in seconds, for so many bytes and operations: the roofline.
    pub fn floor(&self, bytes: u64, flops: u64) -> f64 {
        (bytes as f64 / (self.ceilings.copy * 1e9)).max(flops as f64 / (self.measured() * 1e12))
    }

    pub fn json(&self) -> Value {
        let mut json = self.ceilings.json();
        json["matrix_product_tflop_per_s"] = self.product.into();
        json["peak_tflop_per_s"] = self.measured().into();
        json["given_peak_tflop_per_s"] = self.given.into();
        json
    }

    /// MFU for people.
    pub fn describe_mfu(&self, flops: u64, seconds: f64) -> String {
        let (measured, given) = self.mfu(flops, seconds);
        let mut text = format!("{:.1} % of {} TFLOP/s measured", 100.0 * measured, teraflops(self.measured()));
        if let (Some(share), Some(peak)) = (given, self.given) {
            text += &format!(", {:.1} % of the given {peak} TFLOP/s", 100.0 * share);
        }
        text
    }
}

impl std::fmt::Display for Peaks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} matrix product {} TFLOP/s", self.ceilings, self.dtype, teraflops(self.product))
    }
}

/// TFLOP/s in four digits or so.
pub fn teraflops(speed: f64) -> String {
    let decimals = if speed < 10.0 { 3 } else { 1 };
    format!("{speed:.decimals$}")
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

fn default_batch(device: &exec::Device) -> usize {
    match device {
        exec::Device::Cpu(_) => 32,
        _ if device.is_gpu() => 256,
        _ => 2,
    }
}

/// The most images, in multiples of [`BATCH_STEP`], whose step is planned into the memory that is free.
fn largest_batch(device: &exec::Device, model: &SimSiam, image_size: usize, dtype: DType) -> Result<usize> {
    let exec::Device::Cuda(driver) = device else {
        return Err(Error::config("--batch", "largest: only CUDA devices have a memory of their own to fill"));
    };
    let room = driver.memory()?.free.saturating_sub(LEFT_FREE);
    let planned = |batch| {
        let graph = model.train_graph(batch, image_size, dtype, false)?;
        Ok::<_, Error>(Plan::new(&graph.tape, Target::Cuda)?.memory.total)
    };
    let smallest = planned(BATCH_STEP)?;
    if smallest > room {
        let what =
            format!("a batch of {BATCH_STEP} takes {} MB, of which {} MB can be had", smallest >> 20, room >> 20);
        return Err(Error::Unsupported { what, hint: Some("use a smaller --image-size or --arch".into()) });
    }
    // Memory grows with the batch: halve the range between one that fits and one that does not.
    let (mut fits, mut too_large) = (1, MAX_BATCH / BATCH_STEP + 1);
    while too_large - fits > 1 {
        let middle = fits + (too_large - fits) / 2;
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
    let encoded = desc.dtype.encode(&normal);
    let size = desc.dtype.size();
    let mut values = encoded.chunks_exact(size).cycle();
    let mut bytes = vec![0; desc.bytes()];
    for pixel in bytes.chunks_exact_mut(desc.shape.channels() * size) {
        pixel.chunks_exact_mut(size).take(COLOURS).zip(&mut values).for_each(|(to, value)| to.copy_from_slice(value));
    }
    bytes
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
    fn padding_channels_are_zero_and_colours_are_not() {
        for (channels, dtype) in [(3, DType::F32), (8, DType::Bf16)] {
            let desc = TensorDesc::new([2, 5, 7, channels], dtype);
            let views = crate::tensor::HostTensor::from_bytes(desc.clone(), random_views(&desc)).unwrap().to_f64();
            for pixel in views.chunks(channels) {
                assert!(pixel[..3].iter().all(|v| *v != 0.0) && pixel[3..].iter().all(|v| *v == 0.0), "{pixel:?}");
            }
        }
    }

    #[test]
    fn a_batch_is_a_number_or_largest() {
        assert_eq!("48".parse(), Ok(Batch::Images(48)));
        assert_eq!("largest".parse(), Ok(Batch::Largest));
        assert!("many".parse::<Batch>().is_err());
    }
}
