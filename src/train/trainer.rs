//! A model in training: the recorded step on an executor, its learning rates and its parameters.

use crate::error::Result;
use crate::exec::{CpuExecutor, Executor};
use crate::graph::{Phase, ValueId};
use crate::nn::ParamInfo;
use crate::nn::simsiam::TrainGraph;
use crate::ops::sgd::StepParam;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, HostTensor, TensorDesc};
use crate::train::config::RunConfig;
use crate::train::monitor::effective_rank;
use crate::train::schedule::Schedule;
use crate::train::state::{read_params, to_engine, to_torch, write_initial, write_params};

/// Prefix of the momentum buffers among a checkpoint's tensors.
const MOMENTUM: &str = "momentum/";

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

/// The model, its optimiser state and the number of steps done.
#[derive(Debug)]
pub struct Trainer {
    exec: CpuExecutor,
    views: ValueId,
    step_params: ValueId,
    loss: ValueId,
    z_std: ValueId,
    z: ValueId,
    params: Vec<ParamInfo>,
    momenta: Vec<(String, ValueId)>,
    schedule: Schedule,
    momentum: f64,
    weight_decay: f64,
    check: bool,
    step: u64,
}

impl Trainer {
    /// Records, plans and reserves memory; the weights take their start values for the run's seed.
    ///
    /// # Errors
    /// Settings that do not fit together; memory that the system refuses.
    pub fn new(config: &RunConfig, schedule: Schedule) -> Result<Trainer> {
        schedule.validate()?;
        let graph = config.model.train_graph(config.recipe.batch, config.augment.image_size, DType::F32, false)?;
        let TrainGraph { tape, views, step_params, loss, z_std, z, params, momenta, .. } = graph;
        let mut exec = CpuExecutor::new(tape, config.machine.cpu_conv)?;
        write_initial(&mut exec, &params, config.seed)?;
        let (momentum, weight_decay) = (config.recipe.momentum, config.recipe.weight_decay);
        let check = config.machine.check;
        Ok(Trainer {
            exec,
            views,
            step_params,
            loss,
            z_std,
            z,
            params,
            momenta,
            schedule,
            momentum,
            weight_decay,
            check,
            step: 0,
        })
    }

    /// Steps done; the number of the next step.
    pub fn step(&self) -> u64 {
        self.step
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

    /// One step on the views `[2n][h][w][3]`.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn run_step(&mut self, views: &[f32]) -> Result<StepOutcome> {
        self.exec.write(self.views, bytemuck::cast_slice(views))?;
        self.exec.write(self.step_params, bytemuck::cast_slice(&self.step_parameters()))?;
        if self.check {
            return self.run_checked();
        }
        self.exec.run_phase(Phase::Forward)?;
        let report = self.report()?;
        if !report.loss.is_finite() {
            let node = self.exec.first_non_finite(Phase::Forward)?.unwrap_or_else(|| "loss".into());
            return Ok(StepOutcome::NonFinite { what: format!("the loss ({})", report.loss), node });
        }
        self.exec.run_phase(Phase::Backward)?;
        self.exec.run_phase(Phase::Update)?;
        self.step += 1;
        Ok(StepOutcome::Done(report))
    }

    /// `--check`: every node's output is looked at.
    fn run_checked(&mut self) -> Result<StepOutcome> {
        for phase in [Phase::Forward, Phase::Backward, Phase::Update] {
            if let Some(node) = self.exec.first_non_finite(phase)? {
                return Ok(StepOutcome::NonFinite { what: "an output".into(), node });
            }
        }
        self.step += 1;
        Ok(StepOutcome::Done(self.report()?))
    }

    fn step_parameters(&self) -> [f64; StepParam::COUNT] {
        let mut params = [0.0; StepParam::COUNT];
        params[StepParam::Lr as usize] = self.schedule.lr(self.step);
        params[StepParam::PredictorLr as usize] = self.schedule.predictor_lr(self.step);
        params[StepParam::Momentum as usize] = self.momentum;
        params[StepParam::WeightDecay as usize] = self.weight_decay;
        params
    }

    fn report(&self) -> Result<StepReport> {
        let scalar = |value| Ok::<f64, crate::error::Error>(self.exec.read(value)?.to_f64()[0]);
        let (_, dim) = self.z_shape();
        Ok(StepReport { loss: scalar(self.loss)?, z_std: scalar(self.z_std)? * (dim as f64).sqrt() })
    }

    /// Effective rank of z in the step that was run last.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn effective_rank(&self) -> Result<f64> {
        let (rows, dim) = self.z_shape();
        Ok(effective_rank(&self.exec.read(self.z)?.to_f32()?, rows, dim))
    }

    /// Parameters and buffers under PyTorch names, in PyTorch's layout.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn parameters(&self) -> Result<NamedTensors> {
        read_params(&self.exec, &self.params)
    }

    /// All that training goes on from: parameters, buffers and momenta.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn tensors(&self) -> Result<NamedTensors> {
        let mut tensors = self.parameters()?;
        for (name, value) in &self.momenta {
            tensors.insert(format!("{MOMENTUM}{name}"), to_torch(self.exec.read(*value)?)?);
        }
        Ok(tensors)
    }

    /// Goes back to where `tensors` was taken after `step` steps; `take` hands out a tensor by name.
    ///
    /// # Errors
    /// What `take` reports about missing or ill-shaped tensors.
    pub fn restore(&mut self, step: u64, mut take: impl FnMut(&str, &TensorDesc) -> Result<HostTensor>) -> Result<()> {
        write_params(&mut self.exec, &self.params, &mut take)?;
        for (name, value) in &self.momenta {
            let Some(param) = self.params.iter().find(|p| p.name == *name) else { continue };
            let desc = TensorDesc { shape: param.torch_shape(), dtype: param.desc.dtype };
            let tensor = to_engine(take(&format!("{MOMENTUM}{name}"), &desc)?)?;
            self.exec.write(*value, tensor.bytes())?;
        }
        self.step = step;
        Ok(())
    }
}
