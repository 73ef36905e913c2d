//! Linear classifiers trained side by side: one tape with one input of features, and for each head a product, a loss and an
//! update of its own. No value of one head reaches another, and all have the shapes that one alone would have, so each is
//! what it would be alone, bit for bit.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::exec::{Device, Executor};
use crate::graph::autodiff::Gradients;
use crate::graph::builtin::Constant;
use crate::graph::{Role, Tape, ValueId, backward};
use crate::nn::ParamInfo;
use crate::nn::params::{Init, ParamGroup};
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::lars::LarsUpdate;
use crate::ops::linear::Linear;
use crate::ops::sgd::{Guard, SgdUpdate, StepParam};
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, HostTensor, TensorDesc};
use crate::train::state::{write_initial, write_params};

/// Standard deviation of the weights at the start (recipe).
const INIT_STD: f64 = 0.01;
/// Momentum (recipe).
const MOMENTUM: f64 = 0.9;
/// Trust coefficient of LARS (recipe), and what apex keeps its ratio finite with.
const TRUST: f64 = 0.001;
const EPS: f64 = 1e-8;
/// A label that is no class: its row counts as wrong.
const NO_LABEL: i64 = -1;

/// How a head is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimiser {
    /// LARS around SGD with momentum 0.9, trust coefficient 0.001, no clipping.
    Lars,
    /// SGD with momentum 0.9.
    Sgd,
}

impl Optimiser {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Optimiser::Lars => "lars",
            Optimiser::Sgd => "sgd",
        }
    }
}

/// One head of many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// How it is trained.
    pub optimiser: Optimiser,
    /// Learning rate at the start, as it is.
    pub lr: f64,
}

/// The sizes of a head's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Features of a step.
    pub batch: usize,
    /// Length of a feature.
    pub dim: usize,
    /// Classes.
    pub classes: usize,
}

/// What a step found of one head before its update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadReport {
    /// Mean loss.
    pub loss: f64,
    /// Rows whose class came first, and rows whose class was among the first five.
    pub right: [u64; 2],
}

/// A head on a tape.
#[derive(Debug)]
struct HeadValues {
    head: Head,
    /// Weight and bias, named as in the checkpoint.
    params: [ParamInfo; 2],
    /// Their momenta, likewise.
    momenta: [ParamInfo; 2],
    step_params: ValueId,
    loss: ValueId,
    right: ValueId,
}

/// The inputs that all heads share.
#[derive(Debug, Clone, Copy)]
struct Inputs {
    features: ValueId,
    labels: ValueId,
}

impl Inputs {
    fn record(tape: &mut Tape, shape: HeadShape) -> Inputs {
        let features = TensorDesc::new([shape.batch, shape.dim], DType::F32);
        let labels = TensorDesc::new([shape.batch], DType::I64);
        Inputs {
            features: tape.leaf("features", features, Role::Input, false),
            labels: tape.leaf("labels", labels, Role::Input, false),
        }
    }

    /// Gives the next step these rows, of which there may be fewer than there is room for, and labels for all.
    fn stage(self, exec: &mut dyn Executor, features: &[f32], labels: &[i64]) -> Result<()> {
        exec.stage(self.features, bytemuck::cast_slice(features))?;
        exec.stage(self.labels, bytemuck::cast_slice(labels))
    }
}

/// Weight and bias of head `name`, or what is kept beside them under `prefix`.
fn leaves(tape: &mut Tape, prefix: &str, name: &str, shape: HeadShape, role: Role, std: f64) -> [ParamInfo; 2] {
    let HeadShape { dim, classes, .. } = shape;
    let parts = [("weight", vec![classes, dim], Init::Normal(std)), ("bias", vec![classes], Init::Constant(0.0))];
    parts.map(|(part, dims, init)| {
        let (name, desc) = (format!("{prefix}{name}.{part}"), TensorDesc::new(&dims[..], DType::F32));
        let trainable = role == Role::Parameter;
        let value = tape.leaf(&name, desc.clone(), role, trainable);
        ParamInfo { name, value, desc, trainable, group: ParamGroup::Encoder, init }
    })
}

/// Loss, and how many rows are right, of a head.
fn record_head(tape: &mut Tape, name: &str, inputs: Inputs, params: &[ParamInfo; 2]) -> Result<[ValueId; 2]> {
    let [weight, bias] = params.each_ref().map(|p| p.value);
    let logits = tape.scoped(name, |tape| tape.record_one(Linear, &[inputs.features, weight, bias]))?;
    let outputs = tape.scoped(&format!("{name}.loss"), |tape| tape.record(CrossEntropy, &[logits, inputs.labels]))?;
    Ok([tape.keep(outputs[0]), tape.keep(outputs[1])])
}

/// Heads in training.
#[derive(Debug)]
pub struct HeadBank {
    exec: Box<dyn Executor>,
    shape: HeadShape,
    inputs: Inputs,
    heads: Vec<HeadValues>,
}

impl HeadBank {
    /// Records and plans the step of `heads` on `device`; weights are drawn with the standard deviation of the recipe, the same
    /// for every head, and biases are 0.
    ///
    /// # Errors
    /// [`Error::Config`] without heads, and for learning rates that are not positive numbers; memory that the device refuses.
    pub fn new(heads: &[Head], shape: HeadShape, seed: u64, device: &Device) -> Result<HeadBank> {
        if heads.is_empty() {
            return Err(Error::config("--lr", "expected at least one learning rate, got none"));
        }
        if let Some(head) = heads.iter().find(|head| !(head.lr.is_finite() && head.lr > 0.0)) {
            return Err(Error::config("--lr", format!("expected positive numbers, got {}", head.lr)));
        }
        let mut tape = Tape::new();
        let inputs = Inputs::record(&mut tape, shape);
        let d_loss = Constant { value: 1.0, dtype: DType::F32 };
        let d_loss = tape.scoped("d_loss", |tape| tape.record_one(d_loss, &[]))?;
        let head = |(number, head): (usize, &Head)| {
            let name = format!("head{number}");
            let params = leaves(&mut tape, "", &name, shape, Role::Parameter, INIT_STD);
            let momenta = leaves(&mut tape, "momentum/", &name, shape, Role::Optimiser, 0.0);
            let step_params = tape.leaf(&format!("step_params{number}"), StepParam::desc(), Role::Input, false);
            let [loss, right] = record_head(&mut tape, &name, inputs, &params)?;
            Ok(HeadValues { head: *head, params, momenta, step_params, loss, right })
        };
        let heads = heads.iter().enumerate().map(head).collect::<Result<Vec<_>>>()?;
        let seeds: Vec<_> = heads.iter().map(|head| (head.loss, d_loss)).collect();
        let gradients = backward(&mut tape, &seeds)?;
        for head in &heads {
            record_update(&mut tape, head, &gradients)?;
        }
        let mut exec = device.executor(tape)?;
        exec.watch(&heads.iter().flat_map(|head| [head.loss, head.right]).collect::<Vec<_>>())?;
        for head in &heads {
            write_initial(&mut *exec, &head.params.each_ref().map(start_alike), seed)?;
            write_initial(&mut *exec, &head.momenta, seed)?;
        }
        Ok(HeadBank { exec, shape, inputs, heads })
    }

    /// Their sizes.
    pub fn shape(&self) -> HeadShape {
        self.shape
    }

    /// Gives every head `factor` times its own learning rate from the next step on.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn scale_learning_rates(&mut self, factor: f64) -> Result<()> {
        self.exec.finish()?;
        for head in &self.heads {
            let mut params = [0.0; StepParam::COUNT];
            params[StepParam::Lr as usize] = head.head.lr * factor;
            params[StepParam::Momentum as usize] = MOMENTUM;
            self.exec.write(head.step_params, bytemuck::cast_slice(&params))?;
        }
        Ok(())
    }

    /// Starts a step of all heads on one batch: `features` row by row and a class for each.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of rows; faults of the executor.
    pub fn step(&mut self, features: &[f32], labels: &[u32]) -> Result<()> {
        let HeadShape { batch, dim, .. } = self.shape;
        if labels.len() != batch || features.len() != batch * dim {
            let got = format!("{} values, {} labels", features.len(), labels.len());
            return Err(Error::shape("heads", "batch", format!("{batch} rows of {dim}, {batch} labels"), got));
        }
        let labels: Vec<i64> = labels.iter().map(|&label| label.into()).collect();
        self.inputs.stage(&mut *self.exec, features, &labels)?;
        self.exec.run_step()
    }

    /// What the oldest step found that was not asked for yet, head by head, when more than `in_flight` are; waits for it.
    ///
    /// # Errors
    /// A fault of the step.
    pub fn collect(&mut self, in_flight: usize) -> Result<Option<Vec<HeadReport>>> {
        Ok(self.exec.collect(in_flight)?.map(|watched| watched.chunks(2).map(report).collect()))
    }

    /// Weights, biases and momenta of all heads.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn tensors(&self) -> Result<NamedTensors> {
        let all = self.heads.iter().flat_map(|head| head.params.iter().chain(&head.momenta));
        all.map(|p| Ok((p.name.clone(), self.exec.read(p.value)?))).collect()
    }

    /// Weight `[classes][dim]` and bias of head `number`.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn weights(&self, number: usize) -> Result<[HostTensor; 2]> {
        let [weight, bias] = self.heads[number].params.each_ref().map(|p| self.exec.read(p.value));
        Ok([weight?, bias?])
    }

    /// Puts back what [`HeadBank::tensors`] gave; `find` looks a tensor up by name.
    ///
    /// # Errors
    /// What `find` reports; [`Error::Shape`] for another shape.
    pub fn restore(&mut self, mut find: impl FnMut(&str, &TensorDesc) -> Result<HostTensor>) -> Result<()> {
        for head in &self.heads {
            write_params(&mut *self.exec, &head.params, &mut find)?;
            write_params(&mut *self.exec, &head.momenta, &mut find)?;
        }
        Ok(())
    }
}

/// Under a name that all heads share, and so with the same start value.
fn start_alike(param: &ParamInfo) -> ParamInfo {
    let part = param.name.rsplit('.').next().unwrap_or_default();
    ParamInfo { name: format!("fc.{part}"), ..param.clone() }
}

fn report(watched: &[HostTensor]) -> HeadReport {
    let values: Vec<Vec<f64>> = watched.iter().map(HostTensor::to_f64).collect();
    let value = |tensor: usize, i: usize| values.get(tensor).and_then(|t| t.get(i)).copied().unwrap_or(f64::NAN);
    HeadReport { loss: value(0, 0), right: [0, 1].map(|i| value(1, i) as u64) }
}

fn record_update(tape: &mut Tape, head: &HeadValues, gradients: &Gradients) -> Result<()> {
    let inputs: Vec<ValueId> =
        [head.step_params].into_iter().chain(head.params.iter().map(|p| gradients[&p.value])).collect();
    let updates: Vec<ValueId> = head.params.iter().chain(&head.momenta).map(|p| p.value).collect();
    let lr = vec![StepParam::Lr; head.params.len()];
    let name = format!("{}.update", head.params[0].name.split('.').next().unwrap_or_default());
    tape.scoped(&name, |tape| match head.head.optimiser {
        Optimiser::Sgd => tape.update(SgdUpdate { lr, guard: Guard::None }, &inputs, &updates),
        Optimiser::Lars => {
            let adapted = vec![true; head.params.len()];
            tape.update(LarsUpdate { lr, adapted, trust: TRUST, eps: EPS }, &inputs, &updates)
        }
    })?;
    Ok(())
}

/// Counts how many rows finished heads get right.
#[derive(Debug)]
pub struct Scorer {
    exec: Box<dyn Executor>,
    shape: HeadShape,
    inputs: Inputs,
    features: Vec<f32>,
    labels: Vec<i64>,
    right: Vec<[u64; 2]>,
}

impl Scorer {
    /// For heads with these weights and biases, `shape.batch` rows at a time.
    ///
    /// # Errors
    /// [`Error::Shape`] for weights of another shape; memory that the device refuses.
    pub fn new(weights: &[[HostTensor; 2]], shape: HeadShape, device: &Device) -> Result<Scorer> {
        let mut tape = Tape::new();
        let inputs = Inputs::record(&mut tape, shape);
        let (mut params, mut right) = (Vec::new(), Vec::new());
        for number in 0..weights.len() {
            let name = format!("head{number}");
            let leaves = leaves(&mut tape, "", &name, shape, Role::State, 0.0);
            right.push(record_head(&mut tape, &name, inputs, &leaves)?[1]);
            params.push(leaves);
        }
        let mut exec = device.executor(tape)?;
        exec.watch(&right)?;
        for (params, tensors) in params.iter().zip(weights) {
            for (param, tensor) in params.iter().zip(tensors) {
                exec.write(param.value, tensor.bytes())?;
            }
        }
        let right = vec![[0; 2]; weights.len()];
        Ok(Scorer { exec, shape, inputs, features: Vec::new(), labels: Vec::new(), right })
    }

    /// Looks at more rows and their classes.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn push(&mut self, features: &[f32], labels: &[u32]) -> Result<()> {
        for (row, &label) in features.chunks(self.shape.dim).zip(labels) {
            self.features.extend_from_slice(row);
            self.labels.push(label.into());
            if self.labels.len() == self.shape.batch {
                self.count()?;
            }
        }
        Ok(())
    }

    /// Rows whose class came first, and was among the first five, of each head.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn finish(mut self) -> Result<Vec<[u64; 2]>> {
        if !self.labels.is_empty() {
            self.count()?;
        }
        Ok(self.right)
    }

    fn count(&mut self) -> Result<()> {
        self.labels.resize(self.shape.batch, NO_LABEL);
        self.inputs.stage(&mut *self.exec, &self.features, &self.labels)?;
        self.exec.run_step()?;
        let counts = self.exec.collect(0)?.unwrap_or_default();
        for (total, counts) in self.right.iter_mut().zip(counts) {
            total.iter_mut().zip(counts.to_f64()).for_each(|(total, count)| *total += count as u64);
        }
        self.features.clear();
        self.labels.clear();
        Ok(())
    }
}
