//! The resolved configuration of a run: everything that decides its result, stored as `config.toml` in the run directory.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::atomic::write_atomic;
use crate::backend::cpu::Tier;
use crate::data::augment::AugmentConfig;
use crate::data::mapped::Access;
use crate::error::{Error, Result};
use crate::exec::{DeviceChoice, Options, Precision};
use crate::nn::simsiam::SimSiam;
use crate::train::epilogues::EpilogueChoice;
use crate::train::memory::MemoryChoice;
use crate::train::schedule::Schedule;

/// Name of the file in the run directory.
pub const FILE_NAME: &str = "config.toml";

/// A training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The dataset file.
    pub data: PathBuf,
    /// Seed of initialisation, order and augmentation.
    pub seed: u64,
    /// Images are shuffled within windows of so many consecutive records; 0: all at once.
    #[serde(default)]
    pub shuffle_window: u64,
    /// The file that its weights began from; none: they were drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<InitFrom>,
    /// How it is trained.
    pub recipe: Recipe,
    /// The network and the method.
    pub model: SimSiam,
    /// The views.
    pub augment: AugmentConfig,
    /// What is written and how often.
    pub log: Logging,
    /// The kNN monitor, where there is labelled data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub knn: Option<KnnMonitor>,
    /// What the machine is asked for; `workers`, `io`, `graph` and `check` change no result.
    pub machine: Machine,
}

/// Weights that a run begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitFrom {
    /// The file.
    pub file: PathBuf,
    /// BLAKE3 of the file.
    pub blake3: String,
    /// Whether its heads were left out.
    pub backbone_only: bool,
    /// Epochs that it had behind it, where the run goes on from there with its momenta.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continued_after: Option<u64>,
}

/// Optimiser and schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Epochs of the whole run.
    pub epochs: u64,
    /// Source images per step; each gives two views.
    pub batch: usize,
    /// Learning rate at batch 256.
    pub base_lr: f64,
    /// Epochs of linear warm-up.
    pub warmup_epochs: u64,
    /// Decay every step instead of every epoch.
    pub per_step: bool,
    /// Keep the predictor's learning rate at the scaled start value.
    pub fix_predictor_lr: bool,
    /// SGD momentum.
    pub momentum: f64,
    /// Weight decay, on all trainable parameters.
    pub weight_decay: f64,
}

/// Metrics and checkpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logging {
    /// A line of `metrics.jsonl` every so many steps.
    pub every: u64,
    /// The effective rank is measured every so many steps, at step 0 and at the end of every epoch.
    pub rank_every: u64,
    /// A checkpoint every so many epochs.
    pub checkpoint_epochs: u64,
    /// A checkpoint every so many steps as well; 0 for none.
    pub checkpoint_steps: u64,
    /// Checkpoints kept.
    pub keep_last: usize,
}

/// Weighted kNN on pooled features, measured at the end of epochs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnnMonitor {
    /// Labelled dataset file of the bank.
    pub bank: PathBuf,
    /// Labelled dataset file of the queries.
    pub queries: PathBuf,
    /// Neighbours that vote.
    pub k: usize,
    /// Temperature of the votes, exp(cos / T).
    pub temperature: f64,
    /// Measured every so many epochs, and after the last.
    pub every_epochs: u64,
}

/// Devices, threads and implementations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Where it is trained.
    #[serde(default)]
    pub device: DeviceChoice,
    /// In what it is trained.
    #[serde(default)]
    pub dtype: Precision,
    /// On CUDA devices: capture the step and replay it.
    #[serde(default = "yes")]
    pub graph: bool,
    /// On CUDA devices: NVTX ranges for a profiler.
    #[serde(default, skip_serializing)]
    pub nvtx: bool,
    /// On CUDA devices: time every candidate of the libraries.
    #[serde(default)]
    pub autotune: bool,
    /// Loader threads.
    pub workers: usize,
    /// How records are read.
    #[serde(default)]
    pub io: Access,
    /// Tier of the CPU's convolutions.
    pub cpu_conv: Tier,
    /// Look at the output of every node for NaN and infinity, every step.
    pub check: bool,
    /// What is fused with convolutions; runs of older versions have no such table.
    #[serde(default)]
    pub epilogues: EpilogueChoice,
    /// How the memory of a step is kept small; of runs without such a table it is not.
    #[serde(default, skip_serializing_if = "MemoryChoice::is_default")]
    pub memory: MemoryChoice,
}

fn yes() -> bool {
    true
}

impl Default for Machine {
    fn default() -> Machine {
        Machine {
            device: DeviceChoice::Cpu,
            dtype: Precision::F32,
            graph: true,
            autotune: false,
            nvtx: false,
            workers: 1,
            io: Access::Auto,
            cpu_conv: Tier::Direct,
            check: false,
            epilogues: EpilogueChoice::default(),
            memory: MemoryChoice::default(),
        }
    }
}

impl Machine {
    /// How the executor works on a CUDA device.
    pub fn options(&self) -> Options {
        Options { graph: self.graph && !self.check, choice: self.dtype.choice(self.autotune), nvtx: self.nvtx }
    }
}

impl RunConfig {
    /// The schedule on a dataset with `steps_per_epoch` full batches.
    pub fn schedule(&self, steps_per_epoch: u64) -> Schedule {
        let r = &self.recipe;
        Schedule {
            base_lr: r.base_lr,
            batch: r.batch,
            epochs: r.epochs,
            steps_per_epoch,
            warmup_epochs: r.warmup_epochs,
            per_step: r.per_step,
            fix_predictor_lr: r.fix_predictor_lr,
        }
    }

    /// Checks what a user can get wrong and needs no data to see.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.augment.validate()?;
        let (r, log) = (&self.recipe, &self.log);
        if !(0.0..1.0).contains(&r.momentum) {
            return Err(Error::config("--momentum", format!("expected 0 up to 1, got {}", r.momentum)));
        }
        if !(r.weight_decay.is_finite() && r.weight_decay >= 0.0) {
            return Err(Error::config("--weight-decay", format!("expected 0 or more, got {}", r.weight_decay)));
        }
        for (option, value) in [
            ("--log-every", log.every),
            ("--rank-every", log.rank_every),
            ("--checkpoint-epochs", log.checkpoint_epochs),
            ("--knn-every", self.knn.as_ref().map_or(1, |k| k.every_epochs)),
            ("--workers", self.machine.workers as u64),
        ] {
            if value == 0 {
                return Err(Error::config(option, "expected at least 1, got 0"));
            }
        }
        Ok(())
    }

    /// Writes `config.toml` into `folder`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        let text = toml::to_string(self).map_err(|e| Error::Internal {
            thread: "config".into(),
            message: format!("cannot be written as TOML: {e}"),
        })?;
        write_atomic(&path, |out| out.write_all(text.as_bytes()))
    }

    /// Reads `config.toml` from `folder`.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Format`] when it is not a run's configuration.
    pub fn read(folder: &Path) -> Result<RunConfig> {
        let path = folder.join(FILE_NAME);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let config: RunConfig = toml::from_str(&text).map_err(|e| {
            let offset = e.span().map(|s| s.start as u64);
            Error::format(&path, offset, e.message().to_string())
        })?;
        config.validate()?;
        Ok(config)
    }
}
