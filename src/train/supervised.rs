//! A classifier in training and its accuracy: the recorded step and the forward pass of [`Classifier`] on executors.

use serde::{Deserialize, Serialize};

use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::loader::{Batch, Output};
use crate::data::views::{View, make_views};
use crate::error::{Error, Result};
use crate::exec::{Device, Executor, Options};
use crate::graph::plan::Target;
use crate::graph::{Phase, Tape, ValueId};
use crate::nn::ParamInfo;
use crate::nn::classifier::{Classifier, ClassifierGraph, HEAD, LogitGraph};
use crate::nn::simsiam::{LOSS_SCALE, StepShape};
use crate::ops::sgd::StepParam;
use crate::tensor::DType;
use crate::tensor::safetensors::NamedTensors;
use crate::train::checkpoint::Checkpoint;
use crate::train::epilogues::EpilogueChoice;
use crate::train::memory::MemoryChoice;
use crate::train::state::{read_momenta, read_params, restore, write_initial, write_params};
use crate::train::trainer::{Source, view_source};

/// Steps that a device may have before it while the host waits for an older one.
const IN_FLIGHT: usize = 1;
/// Images of a forward pass in evaluation.
const TEST_BATCH: usize = 64;
/// Of a pretraining checkpoint, the backbone.
const ENCODER: &str = "encoder.";

/// What the optimiser takes in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Learning rate of the backbone.
    pub lr: f64,
    /// Learning rate of the head.
    pub head_lr: f64,
    /// SGD momentum.
    pub momentum: f64,
    /// Weight decay, on all trainable parameters.
    pub weight_decay: f64,
}

/// What a step found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepResult {
    /// Mean cross-entropy before the update.
    pub loss: f64,
    /// Images of the batch whose class came first.
    pub correct: u64,
}

/// A figure of a classifier on a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Mean cross-entropy.
    pub loss: f64,
    /// Share of images whose class comes first, in 0..1.
    pub top1: f64,
    /// Share of images whose class is among the first five, in 0..1.
    pub top5: f64,
}

/// Where and in what a classifier is computed.
#[derive(Debug, Clone)]
pub struct Place<'a> {
    /// The device.
    pub device: &'a Device,
    /// Element type of the activations.
    pub dtype: DType,
    /// How executors work on CUDA devices.
    pub options: Options,
    /// What training steps fuse with convolutions.
    pub epilogues: EpilogueChoice,
    /// What a training step may take.
    pub memory: MemoryChoice,
}

impl Place<'_> {
    fn executor(&self, tape: Tape) -> Result<Box<dyn Executor>> {
        self.device.executor_with(tape, self.options).map_err(|error| match error {
            Error::OutOfMemory { .. } => error.with_hint("use a smaller --batch, --memory-budget or --dtype bf16"),
            other => other,
        })
    }

    /// `tape` within the budget. There is one view, so `--views` is of no help.
    fn fit(&self, tape: Tape) -> Result<Tape> {
        let fitted = self.memory.fit(tape, self.device.target());
        fitted.map(|(tape, _)| tape).map_err(|error| error.with_hint("use a smaller --batch, or --from-layer"))
    }
}

/// A classifier, its optimiser state and the steps under way.
#[derive(Debug)]
pub struct Supervised {
    exec: Box<dyn Executor>,
    source: Source,
    labels: ValueId,
    step_params: ValueId,
    params: Vec<ParamInfo>,
    momenta: Vec<(String, ValueId)>,
    in_flight: usize,
}

impl Supervised {
    /// Records, plans and reserves memory for steps of `batch` images of `dataset`. [`Supervised::start`] or
    /// [`Supervised::restore`] gives it its weights.
    ///
    /// # Errors
    /// Settings that do not fit together; [`Error::OutOfMemory`].
    pub fn new(
        model: &Classifier,
        augment: &AugmentConfig,
        place: &Place<'_>,
        dataset: &Dataset,
        batch: usize,
    ) -> Result<Supervised> {
        let (graph, source) = record(model, augment, place, dataset, batch)?;
        let ClassifierGraph { tape, labels, step_params, loss, correct, params, momenta, .. } = graph;
        let mut exec = place.executor(tape)?;
        exec.watch(&[loss, correct])?;
        let in_flight = if place.device.target() == Target::Cuda { IN_FLIGHT } else { 0 };
        Ok(Supervised { exec, source, labels, step_params, params, momenta, in_flight })
    }

    /// Whether [`Supervised::new`] can record and plan these steps; takes no memory of the device.
    ///
    /// # Errors
    /// As [`Supervised::new`], but for [`Error::OutOfMemory`].
    pub fn check(
        model: &Classifier,
        augment: &AugmentConfig,
        place: &Place<'_>,
        dataset: &Dataset,
        batch: usize,
    ) -> Result<()> {
        record(model, augment, place, dataset, batch).map(drop)
    }

    /// Gives it start values for `seed`, and then the backbone of a pretraining's tensors, if there are any.
    ///
    /// # Errors
    /// [`Error::Shape`] about missing or ill-shaped tensors.
    pub fn start(&mut self, seed: u64, pretrained: Option<&NamedTensors>) -> Result<()> {
        write_initial(&mut *self.exec, &self.params, seed)?;
        let Some(pretrained) = pretrained else { return Ok(()) };
        let own =
            |name: &str| name.starts_with(LOSS_SCALE) || name.strip_prefix(HEAD).is_some_and(|n| n.starts_with('.'));
        let backbone: Vec<ParamInfo> = self.params.iter().filter(|p| !own(&p.name)).cloned().collect();
        write_params(&mut *self.exec, &backbone, |name, desc| {
            let tensor = pretrained.get(&format!("{ENCODER}{name}")).cloned();
            tensor.ok_or_else(|| Error::shape("load", name, desc, "no such tensor"))
        })
    }

    /// Goes back to where `checkpoint` was taken.
    ///
    /// # Errors
    /// [`Error::Format`] about missing or ill-shaped tensors.
    pub fn restore<S>(&mut self, checkpoint: &mut Checkpoint<S>) -> Result<()> {
        restore(&mut *self.exec, &self.params, &self.momenta, checkpoint)
    }

    /// What the loader is to make for it.
    pub fn loader_output(&self) -> Output {
        match self.source {
            Source::Views(_) => Output::FirstViews,
            Source::Stored { .. } => Output::Records,
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

    /// Steps that may be under way while the next one is prepared.
    pub fn pipeline(&self) -> usize {
        self.in_flight
    }

    /// Starts a step on a batch of [`Supervised::loader_output`], all of it labelled.
    ///
    /// # Errors
    /// Images that cannot be augmented; faults of the executor.
    pub fn start_step(&mut self, batch: &Batch, rates: Rates) -> Result<()> {
        self.source.stage(&mut *self.exec, batch, false)?;
        let labels: Vec<i64> = batch.labels().iter().map(|label| label.map_or(-1, i64::from)).collect();
        self.exec.stage(self.labels, bytemuck::cast_slice(&labels))?;
        let mut params = [0.0; StepParam::COUNT];
        params[StepParam::Lr as usize] = rates.lr;
        params[StepParam::PredictorLr as usize] = rates.head_lr;
        params[StepParam::Momentum as usize] = rates.momentum;
        params[StepParam::WeightDecay as usize] = rates.weight_decay;
        self.exec.stage(self.step_params, bytemuck::cast_slice(&params))?;
        self.exec.run_step()
    }

    /// What the oldest step found that was started and not finished, if more than `in_flight` are; waits for it.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first bad node when the loss is not finite (the weights stay what they were); faults of
    /// the executor.
    pub fn finish_step(&mut self, in_flight: usize) -> Result<Option<StepResult>> {
        let Some(watched) = self.exec.collect(in_flight)? else { return Ok(None) };
        let first = |index: usize| watched.get(index).and_then(|t| t.to_f64().first().copied()).unwrap_or(f64::NAN);
        let loss = first(0);
        if !loss.is_finite() {
            let node = self.exec.first_non_finite(Phase::Forward)?.unwrap_or_else(|| "loss".into());
            let what = format!("the loss is not finite ({loss}); first bad node: {node}");
            return Err(Error::config("--lr", what).with_hint("lower --lr and --head-lr (or --baseline-lr)"));
        }
        Ok(Some(StepResult { loss, correct: first(1) as u64 }))
    }

    /// Parameters and buffers under torchvision's names, in PyTorch's layout; that of a loss scaling too.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn parameters(&self) -> Result<NamedTensors> {
        read_params(&*self.exec, &self.params)
    }

    /// All that training goes on from.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn tensors(&self) -> Result<NamedTensors> {
        let mut tensors = self.parameters()?;
        tensors.extend(read_momenta(&*self.exec, &self.momenta)?);
        Ok(tensors)
    }
}

/// A step of `batch` images of `dataset`, within the budget of `place`.
fn record(
    model: &Classifier,
    augment: &AugmentConfig,
    place: &Place<'_>,
    dataset: &Dataset,
    batch: usize,
) -> Result<(ClassifierGraph, Source)> {
    let source = view_source(place.device, (augment, &model.backbone), place.dtype, dataset, batch)?;
    let epilogues = place.epilogues.resolve(place.device, place.dtype);
    let shape = StepShape { epilogues, ..StepShape::new(batch, augment.image_size, place.dtype, source.clone()) };
    let mut graph = model.record_step(&shape)?;
    graph.tape = place.fit(graph.tape)?;
    let source = Source::of(graph.views, graph.stored, source);
    Ok((graph, source))
}

/// A classifier in evaluation mode.
#[derive(Debug)]
pub struct Tester {
    exec: Box<dyn Executor>,
    images: ValueId,
    logits: ValueId,
    params: Vec<ParamInfo>,
    augment: AugmentConfig,
}

impl Tester {
    /// Prepares the forward pass.
    ///
    /// # Errors
    /// Settings that do not fit together; [`Error::OutOfMemory`].
    pub fn new(model: &Classifier, augment: &AugmentConfig, place: &Place<'_>) -> Result<Tester> {
        let padded = place.device.target() == Target::Cuda;
        let LogitGraph { tape, images, logits, params } =
            model.record_logits(TEST_BATCH, augment.image_size, place.dtype, padded)?;
        Ok(Tester { exec: place.executor(tape)?, images, logits, params, augment: augment.clone() })
    }

    /// Loads parameters under torchvision's names; others among them are left alone.
    ///
    /// # Errors
    /// [`Error::Shape`] for missing or ill-shaped tensors.
    pub fn load(&mut self, params: &NamedTensors) -> Result<()> {
        write_params(&mut *self.exec, &self.params, |name, desc| {
            params.get(name).cloned().ok_or_else(|| Error::shape("load", name, desc, "no such tensor"))
        })
    }

    /// Scores on all records of `dataset`, which must be labelled, by their centre crops.
    ///
    /// # Errors
    /// Damaged records; records without a label.
    pub fn evaluate(&mut self, dataset: &Dataset) -> Result<Scores> {
        let classes = self.exec.tape().desc(self.logits).shape.channels();
        let mut images = vec![0f32; TEST_BATCH * self.augment.view_len()];
        let (mut loss, mut correct) = (0.0, [0u64; 2]);
        for first in (0..dataset.len()).step_by(TEST_BATCH) {
            let records: Vec<usize> = (first..dataset.len().min(first + TEST_BATCH)).collect();
            make_views(&self.augment, dataset, &records, View::Centre, &mut images)?;
            self.exec.write(self.images, &self.exec.tape().desc(self.images).dtype.encode_f32(&images))?;
            self.exec.run_step()?;
            let logits = self.exec.read(self.logits)?.to_f64();
            for (row, &record) in logits.chunks_exact(classes).zip(&records) {
                let label = label_of(dataset, record)?;
                let (row_loss, rank) = judge(row, label);
                loss += row_loss;
                correct[0] += u64::from(rank < 1);
                correct[1] += u64::from(rank < 5);
            }
        }
        let share = |count: u64| count as f64 / dataset.len() as f64;
        Ok(Scores { loss: loss / dataset.len() as f64, top1: share(correct[0]), top5: share(correct[1]) })
    }
}

fn label_of(dataset: &Dataset, record: usize) -> Result<usize> {
    let label = dataset.label(record)?.map(|label| label as usize);
    label.ok_or_else(|| {
        Error::format(dataset.path(), None, format!("record {record} has no label, and accuracy needs one"))
            .with_hint("prepare the images with classes")
    })
}

/// Checks that every record has a label.
///
/// # Errors
/// [`Error::Format`] naming the first that has none.
pub fn check_labelled(dataset: &Dataset) -> Result<()> {
    (0..dataset.len()).try_for_each(|record| label_of(dataset, record).map(drop))
}

/// Cross-entropy of a row of logits, and how many classes come before its label; of equal logits the lower class is first.
fn judge(logits: &[f64], label: usize) -> (f64, usize) {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|v| (v - max).exp()).sum();
    let own = logits[label];
    let rank = logits.iter().enumerate().filter(|&(k, &v)| v > own || v == own && k < label || v.is_nan()).count();
    (sum.ln() - (own - max), rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_judged_as_pytorch_does() {
        // torch.nn.functional.cross_entropy of these logits and labels, in float64.
        let logits = [1.5, -0.25, 3.0, 3.0, 0.5, -2.0, 0.75];
        for (label, loss, rank) in [
            (2, 0.8985855310118338, 0),
            (3, 0.8985855310118338, 1),
            (0, 2.398585531011834, 2),
            (5, 5.898585531011834, 6),
        ] {
            let (got, place) = judge(&logits, label);
            assert!((got - loss).abs() < 1e-12, "label {label}: expected {loss}, got {got}");
            assert_eq!(place, rank, "label {label}");
        }
        assert_eq!(judge(&[f64::NAN, 1.0, 2.0], 2).1, 1, "a NaN is before everything");
    }
}
