//! `train`: pretraining on a dataset file, and its continuation.

use std::path::PathBuf;
use std::sync::Arc;

use super::augment_args::AugmentArgs;
use super::import::{InitArgs, Start};
use super::machine_args::MachineArgs;
use super::memory_args::MemoryArgs;
use super::model_args::ModelArgs;
use super::preset::Preset;
use super::recipe_args::RecipeArgs;
use super::signals;
use crate::data::dataset::Dataset;
use crate::data::loader::steps_per_epoch;
use crate::error::{Error, Result};
use crate::eval::features::{FeatureExtractor, KnnProbe};
use crate::eval::knn::Knn;
use crate::exec::{Device, DeviceChoice};
use crate::train::config::{KnnMonitor, Logging, Machine, RunConfig};
use crate::train::run::{Probe, Run, RunFolder, Summary};
use crate::train::trainer::Trainer;

#[derive(Debug, clap::Args)]
pub struct TrainArgs {
    /// Dataset file, as `prepare` writes it.
    #[arg(required_unless_present = "resume", conflicts_with = "resume")]
    data: Option<PathBuf>,
    /// New directory for configuration, metrics and checkpoints.
    #[arg(long, value_name = "DIR", required_unless_present = "resume", conflicts_with = "resume")]
    run: Option<PathBuf>,
    /// Continue the run in DIR at its newest checkpoint, bit for bit as if it had not stopped.
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Recipe that the defaults come from.
    #[arg(long, value_enum, default_value_t)]
    preset: Preset,
    /// Seed of initialisation, order and augmentation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Shuffle within windows of N consecutive records, each read from its start to its end: for slow disks [default: 0,
    /// all at once].
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    shuffle_window: Option<u64>,
    #[command(flatten)]
    init: InitArgs,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    augment: AugmentArgs,
    #[command(flatten)]
    log: LogArgs,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Look for NaN and infinity in the output of every node, every step (slower); with --resume too.
    #[arg(long, help_heading = "Machine")]
    check: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Metrics and checkpoints")]
struct LogArgs {
    /// Log a line every N steps.
    #[arg(long, value_name = "N", default_value_t = 10)]
    log_every: u64,
    /// Measure the effective rank of z every N steps, and at the end of every epoch.
    #[arg(long, value_name = "N", default_value_t = 500)]
    rank_every: u64,
    /// Write a checkpoint every N epochs, and at the end.
    #[arg(long, value_name = "N", default_value_t = 1)]
    checkpoint_epochs: u64,
    /// Write a checkpoint every N steps as well; 0: no.
    #[arg(long, value_name = "N", default_value_t = 0)]
    checkpoint_steps: u64,
    /// Keep the newest N checkpoints.
    #[arg(long, value_name = "N", default_value_t = 3)]
    keep_last: usize,
    /// Labelled dataset file whose images vote in the kNN figure.
    #[arg(long, value_name = "FILE", requires = "knn_queries")]
    knn_bank: Option<PathBuf>,
    /// Labelled dataset file whose images are classified in the kNN figure.
    #[arg(long, value_name = "FILE", requires = "knn_bank")]
    knn_queries: Option<PathBuf>,
    /// Neighbours that vote.
    #[arg(long, value_name = "K", default_value_t = 200)]
    knn_k: usize,
    /// Temperature T of the votes, exp(cos / T).
    #[arg(long, value_name = "T", default_value_t = 0.2)]
    knn_temperature: f64,
    /// Measure the kNN figure every N epochs, and at the end.
    #[arg(long, value_name = "N", default_value_t = 1)]
    knn_every: u64,
}

pub fn run(args: TrainArgs) -> Result<()> {
    let interrupt = signals::install()?;
    let Asked { config, folder, dataset, device, init } = match &args.resume {
        Some(path) => resume(&args, path)?,
        None => start(&args)?,
    };
    // The probe first: what is free after it is the trainer's.
    let probe = config.knn.as_ref().map(|knn| probe(&config, knn, &device)).transpose()?;
    let trainer = Trainer::new(&config, &device, &dataset)?;
    let folder = match folder {
        Some(folder) => folder,
        None => RunFolder::create(&args.run.unwrap_or_default(), &config)?,
    };
    if let Some(start) = &init {
        // On disk before the first step: a run that is killed goes on from the same weights.
        folder.begin_with(&config, &trainer, &dataset, (first_step(&config, &dataset), &start.tensors))?;
        start.describe();
    }
    let run = Run::new(&folder, &config, trainer, dataset, probe)?;
    describe(&folder, &config, &run);
    let summary = run.train(&|| interrupt.interrupted())?;
    conclude(&folder, &summary);
    Ok(())
}

/// What is to be trained, and where.
struct Asked {
    config: RunConfig,
    /// That of a run that exists.
    folder: Option<RunFolder>,
    dataset: Arc<Dataset>,
    device: Device,
    /// What a new run begins with, if not with drawn weights.
    init: Option<Start>,
}

/// A new run. Everything that can be wrong is looked at before the directory is made.
fn start(args: &TrainArgs) -> Result<Asked> {
    let (Some(data), Some(path)) = (&args.data, &args.run) else {
        return Err(Error::config("train", "expected a dataset file and --run DIR, or --resume DIR"));
    };
    RunFolder::check_new(path)?;
    let mut machine = Machine { device: DeviceChoice::Auto, check: args.check, ..Machine::default() };
    machine.memory = args.memory.choose(machine.memory);
    let device = args.machine.open(&mut machine, true)?;
    let mut model = args.model.resolve(args.preset)?;
    let init = args.init.start(&mut model, args.seed)?;
    let config = RunConfig {
        data: absolute(data)?,
        seed: args.seed,
        shuffle_window: args.shuffle_window.unwrap_or(0),
        init: init.as_ref().map(|start| start.from.clone()),
        recipe: args.recipe.resolve(args.preset),
        model,
        augment: args.augment.resolve(args.preset)?,
        log: Logging {
            every: args.log.log_every,
            rank_every: args.log.rank_every,
            checkpoint_epochs: args.log.checkpoint_epochs,
            checkpoint_steps: args.log.checkpoint_steps,
            keep_last: args.log.keep_last,
        },
        knn: knn_monitor(&args.log)?,
        machine,
    };
    config.validate()?;
    check_epochs(&config)?;
    let dataset = Arc::new(Dataset::open_with(data, config.machine.io)?);
    Ok(Asked { config, folder: None, dataset, device, init })
}

/// A training that is continued must have epochs left.
fn check_epochs(config: &RunConfig) -> Result<()> {
    let (done, epochs) = (epochs_done(config), config.recipe.epochs);
    if done > 0 && done >= epochs {
        let what = format!("expected more than the {done} epochs that --init has behind it, got {epochs}");
        return Err(Error::config("--epochs", what).with_hint("name the epochs of the whole training"));
    }
    Ok(())
}

/// Epochs that a run had behind it when it began.
fn epochs_done(config: &RunConfig) -> u64 {
    config.init.as_ref().and_then(|init| init.continued_after).unwrap_or(0)
}

/// The step that a run begins with.
fn first_step(config: &RunConfig, dataset: &Dataset) -> u64 {
    epochs_done(config) * steps_per_epoch(dataset.len(), config.recipe.batch)
}

fn resume(args: &TrainArgs, path: &std::path::Path) -> Result<Asked> {
    let (folder, mut config) = RunFolder::open(path)?;
    config.machine.check |= args.check;
    config.machine.memory = args.memory.choose(config.machine.memory);
    let device = args.machine.open(&mut config.machine, false)?;
    config.validate()?;
    let dataset = Arc::new(Dataset::open_with(&config.data, config.machine.io)?);
    Ok(Asked { config, folder: Some(folder), dataset, device, init: None })
}

/// The path from the root, so that a run can be continued from any directory.
pub(super) fn absolute(path: &std::path::Path) -> Result<PathBuf> {
    path.canonicalize().map_err(Error::io("open", path))
}

fn knn_monitor(args: &LogArgs) -> Result<Option<KnnMonitor>> {
    let (Some(bank), Some(queries)) = (&args.knn_bank, &args.knn_queries) else { return Ok(None) };
    Ok(Some(KnnMonitor {
        bank: absolute(bank)?,
        queries: absolute(queries)?,
        k: args.knn_k,
        temperature: args.knn_temperature,
        every_epochs: args.knn_every,
    }))
}

fn probe(config: &RunConfig, knn: &KnnMonitor, device: &Device) -> Result<Box<dyn Probe>> {
    let dtype = config.machine.dtype.dtype();
    let extractor = FeatureExtractor::new(&config.model, &config.augment, device, dtype)?;
    let open = |path| Ok::<_, Error>(Arc::new(Dataset::open(path)?));
    let settings = Knn { k: knn.k, temperature: knn.temperature };
    Ok(Box::new(KnnProbe::new(extractor, open(&knn.bank)?, open(&knn.queries)?, settings)?))
}

fn describe(folder: &RunFolder, config: &RunConfig, run: &Run<'_>) {
    let trainer = run.trainer();
    let recipe = &config.recipe;
    eprintln!(
        "{}: {} trainable parameters, batch {}, {} epochs, {}x{} pixels, {}, {:.0} MB planned on {}",
        folder.path().display(),
        trainer.trainable_parameters(),
        recipe.batch,
        recipe.epochs,
        config.augment.image_size,
        config.augment.image_size,
        config.machine.dtype,
        trainer.planned_memory() as f64 / 1e6,
        trainer.device().name(),
    );
    if trainer.step() > 0 {
        eprintln!("continuing at step {}", trainer.step());
    }
}

fn conclude(folder: &RunFolder, summary: &Summary) {
    let path = folder.path().display();
    println!("checkpoint of step {}: {}", summary.step, summary.checkpoint.display());
    if !summary.finished {
        println!("interrupted; continue with: simsiam-engine train --resume {path}");
        return;
    }
    if let Some(last) = &summary.last {
        println!("loss {:.4}, z std * sqrt(d) {:.3}", last.loss, last.z_std);
    }
    if let Some(knn) = summary.knn {
        println!("kNN {:.2} %", knn * 100.0);
    }
    println!("backbone for PyTorch: simsiam-engine export {path} backbone.safetensors");
}
