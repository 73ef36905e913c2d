//! Steps on images of a dataset, the whole way that `train` goes: read, decoded, augmented, trained on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cli::workload::{Steps, Workload};
use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::loader::{Loader, LoaderConfig, Position};
use crate::data::mapped::Access;
use crate::error::{Error, Result};
use crate::train::config::{Logging, Machine, Recipe, RunConfig};
use crate::train::trainer::{StepOutcome, Trainer};

/// Batches in memory, as in training: one in use, two in the making.
const SLOTS: usize = 3;
/// Epochs of the schedule, which no measurement comes to the end of.
const EPOCHS: u64 = 1 << 20;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// Train on the images of a dataset file, as `train` does, instead of random views that stay on the device.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Threads that read and augment images.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "data")]
    workers: usize,
    /// How records are read.
    #[arg(long, value_enum, default_value_t, requires = "data")]
    io: Access,
}

/// Training on a dataset.
pub struct OnData {
    trainer: Trainer,
    loader: Loader,
    loss: f64,
    waited: Duration,
    spent: Duration,
}

impl OnData {
    /// Prepares the step, and starts the loader.
    ///
    /// # Errors
    /// Faults of the dataset and of options; a device that has not enough memory.
    pub fn start(path: &Path, args: &DataArgs, workload: &Workload) -> Result<OnData> {
        if args.workers == 0 {
            return Err(Error::config("--workers", "expected at least 1, got 0"));
        }
        let dataset = Arc::new(Dataset::open_with(path, args.io)?);
        let config = configuration(path, args, workload);
        let trainer = Trainer::new(&config, &workload.device, &dataset)?;
        let loader = LoaderConfig {
            batch: workload.batch,
            seed: config.seed,
            augment: config.augment,
            output: trainer.loader_output(),
            shuffle_window: 0,
            rank: 0,
            world_size: 1,
            workers: args.workers,
            slots: SLOTS,
            epochs: None,
        };
        let loader = Loader::start(dataset, loader, Position::default())?;
        Ok(OnData { trainer, loader, loss: f64::NAN, waited: Duration::ZERO, spent: Duration::ZERO })
    }

    /// Share of the time that was spent waiting for images.
    pub fn wait_share(&self) -> f64 {
        self.waited.as_secs_f64() / self.spent.as_secs_f64().max(1e-9)
    }

    /// Takes the outcome of all steps but the newest `in_flight`.
    fn finish(&mut self, in_flight: usize) -> Result<()> {
        while let Some((step, outcome)) = self.trainer.finish_step(in_flight)? {
            match outcome {
                StepOutcome::Done(report) => self.loss = report.loss,
                StepOutcome::NonFinite { what, node } => {
                    return Err(Error::NonFinite { step, what, node, checkpoint: "none".into() });
                }
            }
        }
        Ok(())
    }
}

impl Steps for OnData {
    fn run(&mut self, steps: usize) -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..steps {
            let batch = self.loader.next_batch()?;
            self.waited += batch.wait;
            self.trainer.start_step(&batch)?;
            drop(batch);
            self.finish(self.trainer.pipeline())?;
        }
        self.finish(0)?;
        let time = start.elapsed();
        self.spent += time;
        Ok(time)
    }

    fn loss(&mut self) -> Result<f64> {
        Ok(self.loss)
    }

    fn planned_bytes(&self) -> usize {
        self.trainer.planned_memory()
    }
}

/// The run that is cut short.
fn configuration(path: &Path, args: &DataArgs, workload: &Workload) -> RunConfig {
    RunConfig {
        data: path.to_path_buf(),
        seed: 0,
        shuffle_window: 0,
        init: None,
        recipe: Recipe {
            epochs: EPOCHS,
            batch: workload.batch,
            base_lr: 0.05,
            warmup_epochs: 0,
            per_step: false,
            fix_predictor_lr: true,
            momentum: 0.9,
            weight_decay: 1e-4,
        },
        model: workload.model.clone(),
        augment: AugmentConfig { image_size: workload.image_size, ..workload.preset.augment() },
        log: Logging { every: 1, rank_every: 1, checkpoint_epochs: 1, checkpoint_steps: 0, keep_last: 1 },
        knn: None,
        machine: Machine {
            device: workload.choice,
            dtype: workload.precision,
            graph: workload.options.graph,
            autotune: workload.options.choice.autotune,
            nvtx: workload.options.nvtx,
            workers: args.workers,
            io: args.io,
            cpu_conv: workload.cpu_conv,
            check: false,
            epilogues: workload.asked_epilogues.clone(),
            memory: workload.memory,
        },
    }
}
