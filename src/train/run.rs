//! A run: a directory with the resolved configuration, metrics and checkpoints, and the loop that fills it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::data::dataset::Dataset;
use crate::data::loader::{Loader, LoaderConfig, Position};
use crate::error::{Error, Result};
use crate::tensor::safetensors::NamedTensors;
use crate::train::checkpoint::Checkpoints;
use crate::train::config::{self, RunConfig};
use crate::train::metrics::{Line, MetricsWriter, Timing};
use crate::train::monitor::CollapseMonitor;
use crate::train::progress::{Progress, Snapshot};
use crate::train::schedule::Schedule;
use crate::train::trainer::{StepOutcome, StepReport, Trainer};

/// The checkpoints' folder in a run directory.
pub const CHECKPOINTS: &str = "checkpoints";
/// The metrics' file in a run directory.
pub const METRICS: &str = "metrics.jsonl";
/// Batches in memory: one in use, the others being made.
const LOADER_SLOTS: usize = 3;
/// Weight of the newest step in the displayed speed.
const SPEED_SMOOTHING: f64 = 0.1;

/// A figure of merit measured between steps; training does not know what it is.
pub trait Probe {
    /// The figure, in 0..1, for parameters under PyTorch names.
    ///
    /// # Errors
    /// Faults of its data.
    fn measure(&mut self, params: &NamedTensors) -> Result<f64>;
}

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Identity of the dataset: a run must go on with the one it began with.
    pub dataset: String,
    /// Window of the shuffle, which decides the order of the images as the seed does.
    #[serde(default)]
    pub shuffle_window: u64,
    /// The collapse monitor.
    pub monitor: CollapseMonitor,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Whether all steps are done; otherwise it was interrupted.
    pub finished: bool,
    /// Steps done.
    pub step: u64,
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// The last step's metrics.
    pub last: Option<Line>,
    /// The last measurement of the probe.
    pub knn: Option<f64>,
}

/// A run directory, held by this process alone.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Makes a new run directory holding `config`.
    ///
    /// # Errors
    /// [`Error::Config`] when there is a run already.
    pub fn create(path: &Path, config: &RunConfig) -> Result<RunFolder> {
        config.validate()?;
        RunFolder::check_new(path)?;
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let folder = RunFolder::lock(path)?;
        config.write(path)?;
        Ok(folder)
    }

    /// Checks that there is no run in a directory yet.
    ///
    /// # Errors
    /// [`Error::Config`] when there is.
    pub fn check_new(path: &Path) -> Result<()> {
        if path.join(config::FILE_NAME).exists() {
            let what = format!("{} holds a run already", path.display());
            return Err(Error::config("--run", what).with_hint("continue it with --resume, or name another directory"));
        }
        Ok(())
    }

    /// Opens the run directory at `path` and its configuration.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no run, or another process holds it.
    pub fn open(path: &Path) -> Result<(RunFolder, RunConfig)> {
        if !path.join(config::FILE_NAME).is_file() {
            let what = format!("{} holds no run: there is no {} in it", path.display(), config::FILE_NAME);
            return Err(Error::config("--resume", what).with_hint("name the directory that was given to --run"));
        }
        Ok((RunFolder::lock(path)?, RunConfig::read(path)?))
    }

    /// Holds the directory at `path`, which exists.
    pub(super) fn lock(path: &Path) -> Result<RunFolder> {
        let lock_path = path.join(".lock");
        let lock = File::create(&lock_path).map_err(Error::io("create", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(RunFolder { path: path.to_path_buf(), _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => {
                let what = format!("{} is in use by another process", path.display());
                Err(Error::config("--run", what).with_hint("wait for it to end, or stop it"))
            }
            Err(fs::TryLockError::Error(e)) => Err(Error::io("lock", &lock_path)(e)),
        }
    }

    /// Where the run lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metrics file.
    pub fn metrics(&self) -> PathBuf {
        self.path.join(METRICS)
    }

    /// The checkpoints, the newest `keep_last` of which are kept.
    ///
    /// # Errors
    /// [`Error::Config`] when `keep_last` is 0.
    pub fn checkpoints(&self, keep_last: usize) -> Result<Checkpoints> {
        Checkpoints::new(self.path.join(CHECKPOINTS), keep_last)
    }

    /// Writes the checkpoint that a run begins with whose weights are not drawn: `tensors` of `trainer`'s network, after `step`
    /// steps.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn begin_with(
        &self,
        config: &RunConfig,
        trainer: &Trainer,
        dataset: &Dataset,
        (step, tensors): (u64, &NamedTensors),
    ) -> Result<PathBuf> {
        let (rows, dim) = trainer.z_shape();
        let state = TrainState {
            step,
            dataset: dataset_identity(dataset),
            shuffle_window: config.shuffle_window,
            monitor: CollapseMonitor::new(rows, dim),
        };
        self.checkpoints(config.log.keep_last)?.save(step, tensors, &state)
    }
}

/// A run in progress.
pub struct Run<'a> {
    config: &'a RunConfig,
    dataset: Arc<Dataset>,
    schedule: Schedule,
    trainer: Trainer,
    checkpoints: Checkpoints,
    newest: Option<PathBuf>,
    metrics: MetricsWriter,
    monitor: CollapseMonitor,
    probe: Option<Box<dyn Probe + 'a>>,
    clock: Clock,
    last: Option<Line>,
    knn: Option<f64>,
}

impl<'a> Run<'a> {
    /// Prepares a run in `folder`: at the newest checkpoint if there is one, else at the start.
    ///
    /// # Errors
    /// Faults of configuration, data or checkpoint.
    pub fn new(
        folder: &RunFolder,
        config: &'a RunConfig,
        mut trainer: Trainer,
        dataset: Arc<Dataset>,
        probe: Option<Box<dyn Probe + 'a>>,
    ) -> Result<Run<'a>> {
        let schedule = *trainer.schedule();
        let (rows, dim) = trainer.z_shape();
        let mut monitor = CollapseMonitor::new(rows, dim);
        let checkpoints = folder.checkpoints(config.log.keep_last)?;
        let mut newest = None;
        if let Some(mut checkpoint) = checkpoints.latest::<TrainState>()? {
            check_dataset(&checkpoint.state, &dataset)?;
            check_order(&checkpoint.state, config)?;
            monitor = checkpoint.state.monitor.clone();
            newest = Some(checkpoint.path().to_path_buf());
            let step = checkpoint.state.step;
            trainer.restore(step, &mut checkpoint)?;
            checkpoint.finish()?;
        } else if let Some(init) = &config.init {
            let what =
                format!("the run began with weights of {}, and there is no checkpoint left", init.file.display());
            return Err(Error::config("--resume", what).with_hint("begin it again with --init in another directory"));
        }
        let metrics = match folder.metrics().exists() {
            true => MetricsWriter::resume(&folder.metrics(), trainer.step())?,
            false => MetricsWriter::create(&folder.metrics())?,
        };
        let clock = Clock::new();
        let (last, knn) = (None, None);
        Ok(Run { config, dataset, schedule, trainer, checkpoints, newest, metrics, monitor, probe, clock, last, knn })
    }

    /// The model.
    pub fn trainer(&self) -> &Trainer {
        &self.trainer
    }

    /// Trains to the end, or until `interrupted` says so; a checkpoint is written in both cases.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when the loss is not finite; faults of data, disk or memory.
    pub fn train(mut self, interrupted: &dyn Fn() -> bool) -> Result<Summary> {
        let total = self.schedule.total_steps();
        let mut progress = Progress::new(self.schedule.epochs, total, self.trainer.step());
        let mut saved = self.newest.is_some();
        if self.trainer.step() < total {
            let mut loader = self.start_loader()?;
            while self.trainer.started() < total && !interrupted() {
                saved = self.step(&mut loader, &mut progress)?;
            }
            self.finish_steps(0, &mut progress)?;
        }
        if !saved {
            self.save()?;
        }
        progress.finish();
        Ok(Summary {
            finished: self.trainer.step() == total,
            step: self.trainer.step(),
            checkpoint: self.newest.unwrap_or_default(),
            last: self.last,
            knn: self.knn,
        })
    }

    fn start_loader(&self) -> Result<Loader> {
        let epochs = u32::try_from(self.schedule.epochs).map_err(|_| {
            Error::config("--epochs", format!("expected at most {}, got {}", u32::MAX, self.schedule.epochs))
        })?;
        let loader = LoaderConfig {
            batch: self.config.recipe.batch,
            seed: self.config.seed,
            augment: self.config.augment.clone(),
            output: self.trainer.loader_output(),
            shuffle_window: self.config.shuffle_window,
            rank: 0,
            world_size: 1,
            workers: self.config.machine.workers,
            slots: LOADER_SLOTS,
            epochs: Some(epochs),
        };
        let step = self.trainer.step();
        let position = Position { epoch: self.schedule.epoch(step) as u32, step: step % self.schedule.steps_per_epoch };
        Loader::start(Arc::clone(&self.dataset), loader, position)
    }

    /// Starts a step, and finishes those that are to be finished by then; returns whether a checkpoint was written.
    fn step(&mut self, loader: &mut Loader, progress: &mut Progress) -> Result<bool> {
        let step = self.trainer.started();
        let batch = loader.next_batch()?;
        self.trainer.start_step(&batch)?;
        self.clock.waited += batch.wait;
        drop(batch);
        let save = self.checkpoint_due();
        let looked_at = save || self.rank_due(step) || self.ends_epoch(step);
        self.finish_steps(if looked_at { 0 } else { self.trainer.pipeline() }, progress)?;
        if save {
            self.save()?;
        }
        Ok(save)
    }

    /// Finishes all started steps but `in_flight`, with all that is measured and shown of them.
    fn finish_steps(&mut self, in_flight: usize, progress: &mut Progress) -> Result<()> {
        while let Some((step, outcome)) = self.trainer.finish_step(in_flight)? {
            match outcome {
                StepOutcome::Done(report) => self.observe(step, report, progress)?,
                StepOutcome::NonFinite { what, node } => {
                    self.metrics.sync()?;
                    let checkpoint = self.newest.as_ref().map_or("none".into(), |path| path.display().to_string());
                    return Err(Error::NonFinite { step, what, node, checkpoint });
                }
            }
        }
        Ok(())
    }

    /// Measures, shows and logs a finished step.
    fn observe(&mut self, step: u64, report: StepReport, progress: &mut Progress) -> Result<()> {
        self.clock.step(self.config.recipe.batch);
        let rank = self.rank_due(step).then(|| self.trainer.effective_rank()).transpose()?;
        for warning in self.monitor.observe(report.z_std, rank) {
            progress.note(&format!("warning: step {step}: {warning}"));
        }
        progress.update(&self.snapshot(step, report));
        let knn = self.measure_probe(step, progress)?;
        if step.is_multiple_of(self.config.log.every) || rank.is_some() || knn.is_some() {
            self.log(step, report, rank, knn)?;
        }
        Ok(())
    }

    fn ends_epoch(&self, step: u64) -> bool {
        (step + 1).is_multiple_of(self.schedule.steps_per_epoch)
    }

    fn rank_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.config.log.rank_every) || self.ends_epoch(step)
    }

    /// Whether the steps that were started are to be kept.
    fn checkpoint_due(&self) -> bool {
        let done = self.trainer.started();
        let log = &self.config.log;
        let by_epoch = done.is_multiple_of(self.schedule.steps_per_epoch)
            && (done / self.schedule.steps_per_epoch).is_multiple_of(log.checkpoint_epochs);
        let by_step = log.checkpoint_steps > 0 && done.is_multiple_of(log.checkpoint_steps);
        by_epoch || by_step || done == self.schedule.total_steps()
    }

    fn measure_probe(&mut self, step: u64, progress: &Progress) -> Result<Option<f64>> {
        let (Some(probe), Some(monitor)) = (&mut self.probe, &self.config.knn) else { return Ok(None) };
        let epochs_done = (step + 1) / self.schedule.steps_per_epoch;
        let due = epochs_done.is_multiple_of(monitor.every_epochs) || epochs_done == self.schedule.epochs;
        if !(due && (step + 1).is_multiple_of(self.schedule.steps_per_epoch)) {
            return Ok(None);
        }
        let accuracy = probe.measure(&self.trainer.parameters()?)?;
        progress.note(&format!(
            "epoch {epochs_done}: kNN {:.2} % (k = {}, T = {})",
            accuracy * 100.0,
            monitor.k,
            monitor.temperature
        ));
        self.clock.pause();
        self.knn = Some(accuracy);
        Ok(self.knn)
    }

    fn snapshot(&self, step: u64, report: StepReport) -> Snapshot {
        Snapshot {
            steps_done: step + 1,
            epoch: self.schedule.epoch(step),
            loss: report.loss,
            z_std: report.z_std,
            images_per_s: self.clock.images_per_s(),
            data_wait_share: self.clock.wait_share(),
        }
    }

    fn log(&mut self, step: u64, report: StepReport, rank: Option<f64>, knn: Option<f64>) -> Result<()> {
        let line = Line {
            step,
            epoch: self.schedule.epoch(step),
            loss: report.loss,
            z_std: report.z_std,
            effective_rank: rank,
            lr: self.schedule.lr(step),
            predictor_lr: self.schedule.predictor_lr(step),
            knn,
            timing: self.clock.since_last_line(),
        };
        self.metrics.append(&line)?;
        self.last = Some(line);
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.metrics.sync()?;
        let state = TrainState {
            step: self.trainer.step(),
            dataset: dataset_identity(&self.dataset),
            shuffle_window: self.config.shuffle_window,
            monitor: self.monitor.clone(),
        };
        self.newest = Some(self.checkpoints.save(state.step, &self.trainer.tensors()?, &state)?);
        self.clock.pause();
        Ok(())
    }
}

fn dataset_identity(dataset: &Dataset) -> String {
    dataset.uuid().to_string()
}

fn check_dataset(state: &TrainState, dataset: &Dataset) -> Result<()> {
    let identity = dataset_identity(dataset);
    if state.dataset == identity {
        return Ok(());
    }
    let what = format!("the run began with dataset {}, this file is dataset {identity}", state.dataset);
    Err(Error::format(dataset.path(), None, what).with_hint("put the dataset file back that the run began with"))
}

fn check_order(state: &TrainState, config: &RunConfig) -> Result<()> {
    if state.shuffle_window == config.shuffle_window {
        return Ok(());
    }
    let (began, now) = (state.shuffle_window, config.shuffle_window);
    let what = format!("the run began with a shuffle window of {began}, its configuration says {now}");
    let hint = format!("put shuffle_window = {began} back into {}", config::FILE_NAME);
    Err(Error::config("shuffle_window", what).with_hint(hint))
}

/// Speed and waiting, without the pauses for checkpoints and probes. Steps count when they are finished: a device is given the
/// next one long before.
#[derive(Debug)]
struct Clock {
    last_step: Instant,
    /// Of late, of an image; none before the first step.
    seconds: Option<f64>,
    images: usize,
    busy: Duration,
    waited: Duration,
}

impl Clock {
    fn new() -> Clock {
        let zero = Duration::ZERO;
        Clock { last_step: Instant::now(), seconds: None, images: 0, busy: zero, waited: zero }
    }

    /// Starts the next step's time now.
    fn pause(&mut self) {
        self.last_step = Instant::now();
    }

    fn step(&mut self, images: usize) {
        let took = self.last_step.elapsed();
        self.last_step = Instant::now();
        self.images += images;
        self.busy += took;
        // The mean is one of times: of speeds, the quickest step would decide it.
        let seconds = took.as_secs_f64() / images as f64;
        self.seconds = Some(self.seconds.map_or(seconds, |before| before + SPEED_SMOOTHING * (seconds - before)));
    }

    fn images_per_s(&self) -> f64 {
        self.seconds.map_or(0.0, |seconds| 1.0 / seconds.max(1e-9))
    }

    fn wait_share(&self) -> f64 {
        self.waited.as_secs_f64() / self.busy.as_secs_f64().max(1e-9)
    }

    fn since_last_line(&mut self) -> Timing {
        let seconds = self.busy.as_secs_f64().max(1e-9);
        let timing = Timing { images_per_s: self.images as f64 / seconds, data_wait_share: self.wait_share().min(1.0) };
        (self.images, self.busy, self.waited) = (0, Duration::ZERO, Duration::ZERO);
        timing
    }
}
