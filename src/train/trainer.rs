//! A model in training: the recorded step on an executor, its learning rates and its parameters.

use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::loader::{Batch, Output, Room, steps_per_epoch};
use crate::error::{Error, Result};
use crate::exec::{Device, Executor};
use crate::graph::{Phase, Plan, ValueId};
use crate::nn::ParamInfo;
use crate::nn::resnet::ResNet;
use crate::nn::simsiam::{StepShape, StoredInputs, TrainGraph, ViewSource};
use crate::ops::augment::{Augmentation, ViewDescriptor};
use crate::ops::sgd::StepParam;
use crate::tensor::DType;
use crate::tensor::safetensors::NamedTensors;
use crate::train::checkpoint::Checkpoint;
use crate::train::config::RunConfig;
use crate::train::monitor::effective_rank;
use crate::train::schedule::Schedule;
use crate::train::state::{read_momenta, read_params, restore, write_initial};

/// What a step found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Loss before the update.
    pub loss: f64,
    /// z std times sqrt(d): 1 when z is spread evenly, 0 when collapsed.
    pub z_std: f64,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq)]
pub enum StepOutcome {
    /// The weights are updated.
    Done(StepReport),
    /// Something was not finite; the weights are not updated.
    NonFinite {
        /// What was found.
        what: String,
        /// The first node (or weight) that is not finite.
        node: String,
    },
}

/// Steps that a device may have before it while the host waits for an older one.
const IN_FLIGHT: usize = 1;
/// Smallest batch that batch norm can do with.
const SMALLEST_BATCH: usize = 2;

/// The model, its optimiser state and the number of steps done.
#[derive(Debug)]
pub struct Trainer {
    exec: Box<dyn Executor>,
    device: Device,
    source: Source,
    step_params: ValueId,
    z: ValueId,
    params: Vec<ParamInfo>,
    momenta: Vec<(String, ValueId)>,
    schedule: Schedule,
    momentum: f64,
    weight_decay: f64,
    check: bool,
    /// The phases that `--check` looks at: a scaled loss is meant to overflow now and then on the way back.
    checked: &'static [Phase],
    /// Steps whose outcome is known.
    step: u64,
    /// Steps that were started.
    started: u64,
    /// What `--check` found in the newest step.
    bad_node: Option<String>,
}

/// How the images of a batch reach the executor.
#[derive(Debug)]
pub(super) enum Source {
    /// As views that the loader made.
    Views(ValueId),
    /// As they are stored, with descriptors of what the device makes of them.
    Stored { inputs: StoredInputs, augmentation: Augmentation, descriptors: Vec<ViewDescriptor> },
}

/// Where the views of `batch` images of `dataset` come from on a device, for a network with this backbone.
pub(super) fn view_source(
    device: &Device,
    (augment, backbone): (&AugmentConfig, &ResNet),
    dtype: DType,
    dataset: &Dataset,
    batch: usize,
) -> Result<ViewSource> {
    Ok(match device {
        Device::Cpu(_) => ViewSource::Given { padded: false },
        Device::Cuda(_) => {
            let Room { pixel_bytes, longest_side } = Room::of(dataset, batch)?;
            let augmentation = Augmentation::new(augment, dtype, backbone.padded_channels(dtype), longest_side)?;
            ViewSource::Stored { augmentation, pixel_bytes }
        }
    })
}

impl Source {
    /// That of a graph with these views and inputs, recorded for `source`.
    pub(super) fn of(views: ValueId, stored: Option<StoredInputs>, source: ViewSource) -> Source {
        match (stored, source) {
            (Some(inputs), ViewSource::Stored { augmentation, .. }) => {
                Source::Stored { inputs, augmentation, descriptors: Vec::new() }
            }
            _ => Source::Views(views),
        }
    }

    /// Gives the executor the images of a batch; of those that are stored both views are described, or the first alone.
    pub(super) fn stage(&mut self, exec: &mut dyn Executor, batch: &Batch, both: bool) -> Result<()> {
        match self {
            Source::Views(views) => exec.stage(*views, bytemuck::cast_slice(batch.views())),
            Source::Stored { inputs, augmentation, descriptors } => {
                let (images, params, bytes) = (batch.images(), batch.params(), batch.pixels().len());
                match both {
                    true => augmentation.describe(images, params, bytes, descriptors)?,
                    false => augmentation.describe_first(images, params, bytes, descriptors)?,
                }
                exec.stage(inputs.pixels, batch.pixels())?;
                exec.stage(inputs.descriptors, bytemuck::cast_slice(descriptors))
            }
        }
    }
}

/// The step that `config` asks for with `batch` images of `dataset`.
fn record(config: &RunConfig, device: &Device, dataset: &Dataset, batch: usize) -> Result<(TrainGraph, Source)> {
    let (dtype, image_size) = (config.machine.dtype.dtype(), config.augment.image_size);
    let source = view_source(device, (&config.augment, &config.model.backbone), dtype, dataset, batch)?;
    let epilogues = config.machine.epilogues.resolve(device, dtype);
    let memory = config.machine.memory;
    let plain = StepShape::new(batch, image_size, dtype, source.clone());
    let mut graph = config.model.record_step(&StepShape { epilogues, views: memory.views, ..plain })?;
    (graph.tape, _) = memory.fit(graph.tape, device.target())?;
    let source = Source::of(graph.views, graph.stored, source);
    Ok((graph, source))
}

/// What would fit where a plan does not.
fn largest_batch(config: &RunConfig, device: &Device, dataset: &Dataset, needed: usize, free: usize) -> Result<String> {
    let bytes = |batch| {
        let (graph, _) = record(config, device, dataset, batch)?;
        Ok::<_, Error>(Plan::new(&graph.tape, device.target())?.memory.total)
    };
    // What is needed besides the plan stays the same.
    let besides = needed.saturating_sub(bytes(config.recipe.batch)?);
    let (mut fits, mut too_large) = (SMALLEST_BATCH - 1, config.recipe.batch);
    while too_large - fits > 1 {
        let middle = fits.midpoint(too_large);
        match bytes(middle)? + besides <= free {
            true => fits = middle,
            false => too_large = middle,
        }
    }
    Ok(match fits {
        SMALLEST_BATCH.. => format!("the largest batch that fits is --batch {fits}"),
        _ => "no batch fits: use a smaller --image-size or --arch, or --dtype bf16".into(),
    })
}

impl Trainer {
    /// Records, plans and reserves memory on `device`; the weights take their start values for the run's seed.
    ///
    /// # Errors
    /// Settings that do not fit together; [`Error::OutOfMemory`] with the largest batch that fits.
    pub fn new(config: &RunConfig, device: &Device, dataset: &Dataset) -> Result<Trainer> {
        let schedule = config.schedule(steps_per_epoch(dataset.len(), config.recipe.batch));
        schedule.validate()?;
        config.machine.dtype.check_trainable_on(device)?;
        let (graph, source) = record(config, device, dataset, config.recipe.batch)?;
        let TrainGraph { tape, step_params, loss, z_std, z, params, momenta, loss_scale, .. } = graph;
        let mut exec = match device.executor_with(tape, config.machine.options()) {
            Err(Error::OutOfMemory { needed, free, .. }) => {
                let hint = largest_batch(config, device, dataset, needed, free)?;
                return Err(Error::OutOfMemory { device: device.name(), needed, free, hint: Some(hint) });
            }
            other => other?,
        };
        exec.watch(&[loss, z_std])?;
        write_initial(&mut *exec, &params, config.seed)?;
        let (momentum, weight_decay) = (config.recipe.momentum, config.recipe.weight_decay);
        Ok(Trainer {
            exec,
            device: device.clone(),
            source,
            step_params,
            z,
            params,
            momenta,
            schedule,
            momentum,
            weight_decay,
            check: config.machine.check,
            checked: if loss_scale.is_some() { &[Phase::Forward] } else { &Phase::ALL },
            step: 0,
            started: 0,
            bad_node: None,
        })
    }

    /// Its learning rates and epochs.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// What the loader is to make for it.
    pub fn loader_output(&self) -> Output {
        match self.source {
            Source::Views(_) => Output::Views,
            Source::Stored { .. } => Output::Records,
        }
    }

    /// Where it trains.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Steps whose outcome is known.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Steps that were started; the number of the next step.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// Steps that may be under way while the next one is prepared: none where starting one means running it.
    pub fn pipeline(&self) -> usize {
        match self.device {
            Device::Cpu(_) => 0,
            Device::Cuda(_) => IN_FLIGHT,
        }
    }

    /// Number of values that the optimiser changes.
    pub fn trainable_parameters(&self) -> usize {
        self.params.iter().filter(|p| p.trainable).map(|p| p.desc.shape.len()).sum()
    }

    /// The memory that the plan takes, in bytes.
    pub fn planned_memory(&self) -> usize {
        self.exec.plan().memory.total
    }

    /// Rows and dimension of z.
    pub fn z_shape(&self) -> (usize, usize) {
        let shape = &self.exec.tape().desc(self.z).shape;
        (shape.rows(), shape.channels())
    }

    /// Starts a step on a batch of [`Trainer::loader_output`]; a device may still be at work when this returns.
    ///
    /// # Errors
    /// Images that cannot be augmented; faults of the executor.
    pub fn start_step(&mut self, batch: &Batch) -> Result<()> {
        self.source.stage(&mut *self.exec, batch, true)?;
        self.exec.stage(self.step_params, bytemuck::cast_slice(&self.step_parameters()))?;
        match self.check {
            true => self.bad_node = self.exec.check_step(self.checked)?,
            false => self.exec.run_step()?,
        }
        self.started += 1;
        Ok(())
    }

    /// The number and the outcome of the oldest step that was started and not finished, if more than `in_flight` are; waits
    /// for it.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn finish_step(&mut self, in_flight: usize) -> Result<Option<(u64, StepOutcome)>> {
        let step = self.step;
        // The steps before the bad one come first: it is the newest.
        let in_flight = if self.bad_node.is_some() { 0 } else { in_flight };
        let Some(watched) = self.exec.collect(in_flight)? else {
            let bad = |node| (step, StepOutcome::NonFinite { what: "an output".into(), node });
            return Ok(self.bad_node.take().map(bad));
        };
        let scalar = |index: usize| watched.get(index).and_then(|t| t.to_f64().first().copied()).unwrap_or(f64::NAN);
        let (_, dim) = self.z_shape();
        let report = StepReport { loss: scalar(0), z_std: scalar(1) * (dim as f64).sqrt() };
        if !report.loss.is_finite() {
            let node = self.exec.first_non_finite(Phase::Forward)?.unwrap_or_else(|| "loss".into());
            return Ok(Some((step, StepOutcome::NonFinite { what: format!("the loss ({})", report.loss), node })));
        }
        self.step += 1;
        Ok(Some((step, StepOutcome::Done(report))))
    }

    fn step_parameters(&self) -> [f64; StepParam::COUNT] {
        let mut params = [0.0; StepParam::COUNT];
        params[StepParam::Lr as usize] = self.schedule.lr(self.started);
        params[StepParam::PredictorLr as usize] = self.schedule.predictor_lr(self.started);
        params[StepParam::Momentum as usize] = self.momentum;
        params[StepParam::WeightDecay as usize] = self.weight_decay;
        params
    }

    /// Effective rank of z in the step that was run last.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn effective_rank(&self) -> Result<f64> {
        let (rows, dim) = self.z_shape();
        let z: Vec<f32> = self.exec.read(self.z)?.to_f64().into_iter().map(|v| v as f32).collect();
        Ok(effective_rank(&z, rows, dim))
    }

    /// Parameters and buffers under PyTorch names, in PyTorch's layout.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn parameters(&self) -> Result<NamedTensors> {
        read_params(&*self.exec, &self.params)
    }

    /// All that training goes on from: parameters, buffers and momenta.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn tensors(&self) -> Result<NamedTensors> {
        let mut tensors = self.parameters()?;
        tensors.extend(read_momenta(&*self.exec, &self.momenta)?);
        Ok(tensors)
    }

    /// Goes back to where `checkpoint` was taken after `step` steps. It may come from another device and element type: the
    /// scale of the loss, which only float16 has, starts anew then.
    ///
    /// # Errors
    /// [`Error::Format`] about missing or ill-shaped tensors.
    pub fn restore<S>(&mut self, step: u64, checkpoint: &mut Checkpoint<S>) -> Result<()> {
        restore(&mut *self.exec, &self.params, &self.momenta, checkpoint)?;
        (self.step, self.started) = (step, step);
        Ok(())
    }
}
