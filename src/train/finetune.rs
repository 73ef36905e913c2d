//! Fine-tuning: a pretrained backbone and a new linear head, trained on labels, all or a fraction of them; and, for
//! comparison, the same network from its random start on the same labels and schedule.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::atomic::write_atomic;
use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::loader::{Loader, LoaderConfig, Position, steps_per_epoch};
use crate::error::{Error, Result};
use crate::exec::Device;
use crate::nn::classifier::Classifier;
use crate::nn::resnet::ResNet;
use crate::nn::views::Views;
use crate::tensor::safetensors::{self, NamedTensors};
use crate::train::checkpoint::Checkpoints;
use crate::train::config::Machine;
use crate::train::run::{CHECKPOINTS, RunFolder};
use crate::train::schedule::Schedule;
use crate::train::subset::{Fraction, Subset};
use crate::train::supervised::{Place, Rates, Scores, Supervised, Tester, check_labelled};

/// Name of the configuration in the run directory.
pub const FILE_NAME: &str = "finetune.toml";
/// Metrics of a training in its folder: a line of JSON for every epoch.
pub const METRICS: &str = "metrics.jsonl";
/// The trained network in its folder, with torchvision's names.
pub const CLASSIFIER: &str = "classifier.safetensors";
/// Batches in memory: one in use, the others being made.
const LOADER_SLOTS: usize = 3;
/// Area of the crops as a fraction of the image's: torchvision's default for supervised training.
pub const CROP_SCALE: [f64; 2] = [0.08, 1.0];

/// Everything that decides the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneConfig {
    /// The pretraining run, or a checkpoint of it.
    pub source: PathBuf,
    /// Dataset file with the labels to learn from.
    pub train: PathBuf,
    /// Dataset file that accuracy is measured on.
    pub test: PathBuf,
    /// How many of the labels are used.
    pub labels: Fraction,
    /// Which ones: the same seed chooses the same ones.
    pub subset_seed: u64,
    /// The first layer that is trained; those before it are constants.
    pub from_layer: String,
    /// Train the whole network from its random start too.
    pub baseline: bool,
    /// Seed of the head, the order and the crops.
    pub seed: u64,
    /// Optimiser and schedule.
    pub recipe: FinetuneRecipe,
    /// The network.
    pub backbone: ResNet,
    /// The crops; normalisation is that of the pretraining.
    pub augment: AugmentConfig,
    /// What the machine is asked for.
    pub machine: Machine,
}

/// SGD under a cosine that falls with every step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneRecipe {
    /// Passes over the chosen labels.
    pub epochs: u64,
    /// Images per step.
    pub batch: usize,
    /// Learning rate of the pretrained layers at batch 256.
    pub lr: f64,
    /// Learning rate of the head at batch 256.
    pub head_lr: f64,
    /// Learning rate of all layers of the baseline at batch 256.
    pub baseline_lr: f64,
    /// SGD momentum.
    pub momentum: f64,
    /// Weight decay, on all trainable parameters.
    pub weight_decay: f64,
}

/// An epoch of a training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EpochLine {
    /// Its number, from 1.
    pub epoch: u64,
    /// Learning rate of the backbone in its first step.
    pub lr: f64,
    /// Learning rate of the head in its first step.
    pub head_lr: f64,
    /// Mean loss of its steps, on augmented images.
    pub loss: f64,
    /// Share of these images whose class came first, in 0..1.
    pub train_top1: f64,
    /// On the test images, after the epoch.
    pub test: Scores,
    /// Training images per second.
    pub images_per_s: f64,
}

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    /// Steps done.
    step: u64,
    /// Identity of the chosen training images.
    dataset: String,
    /// The epochs done.
    lines: Vec<EpochLine>,
}

/// What is told of a training as it goes.
#[derive(Debug)]
pub enum Event<'a> {
    /// A training begins, or goes on after some epochs.
    Start {
        /// Which.
        arm: Arm,
        /// Epochs that were done before.
        epochs_done: u64,
        /// Images that one epoch trains on.
        epoch_images: u64,
        /// Number of values that are trained.
        parameters: usize,
        /// Memory of its steps in bytes.
        memory: usize,
    },
    /// Images trained on so far.
    Images(u64),
    /// An epoch is done.
    Epoch(&'a EpochLine),
    /// The training is done, or was interrupted.
    End,
}

/// Which training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arm {
    /// From the pretrained backbone.
    Finetuned,
    /// From a random start.
    Scratch,
}

impl Arm {
    /// Its folder in the run directory.
    pub fn folder(self) -> &'static str {
        match self {
            Arm::Finetuned => "finetuned",
            Arm::Scratch => "scratch",
        }
    }
}

impl FinetuneConfig {
    /// Checks what a user can get wrong and needs no data to see.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn validate(&self) -> Result<()> {
        self.backbone.validate()?;
        self.augment.validate()?;
        self.frozen()?;
        let r = &self.recipe;
        for (option, rate) in [("--lr", r.lr), ("--head-lr", r.head_lr), ("--baseline-lr", r.baseline_lr)] {
            if !(rate.is_finite() && rate > 0.0) {
                return Err(Error::config(option, format!("expected a positive number, got {rate}")));
            }
        }
        if !(0.0..1.0).contains(&r.momentum) {
            return Err(Error::config("--momentum", format!("expected 0 up to 1, got {}", r.momentum)));
        }
        if !(r.weight_decay.is_finite() && r.weight_decay >= 0.0) {
            return Err(Error::config("--weight-decay", format!("expected 0 or more, got {}", r.weight_decay)));
        }
        if self.machine.workers == 0 {
            return Err(Error::config("--workers", "expected at least 1, got 0"));
        }
        if self.machine.memory.views != Views::Together {
            return Err(Error::config("views", "expected together: fine-tuning has one view of each image"));
        }
        Ok(())
    }

    /// How many layers are constants.
    ///
    /// # Errors
    /// [`Error::Config`] with the layers that there are.
    pub fn frozen(&self) -> Result<usize> {
        let layers = Classifier::layers(&self.backbone);
        layers.iter().position(|layer| *layer == self.from_layer).ok_or_else(|| {
            let what = format!("the network has no layer \"{}\"", self.from_layer);
            Error::config("--from-layer", what).with_hint(format!("it has {}", layers.join(", ")))
        })
    }

    fn schedule(&self, base_lr: f64, batch: usize, steps_per_epoch: u64) -> Schedule {
        Schedule {
            base_lr,
            batch,
            epochs: self.recipe.epochs,
            steps_per_epoch,
            warmup_epochs: 0,
            per_step: true,
            fix_predictor_lr: false,
        }
    }

    fn write(&self, folder: &Path) -> Result<()> {
        let text = toml::to_string(self).map_err(|e| Error::Internal {
            thread: "config".into(),
            message: format!("cannot be written as TOML: {e}"),
        })?;
        write_atomic(&folder.join(FILE_NAME), |out| out.write_all(text.as_bytes()))
    }

    /// Reads the configuration of the run in `folder`.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no such run, [`Error::Format`] when it cannot be understood.
    pub fn read(folder: &Path) -> Result<FinetuneConfig> {
        let path = folder.join(FILE_NAME);
        if !path.is_file() {
            let what = format!("{} holds no fine-tuning: there is no {FILE_NAME} in it", folder.display());
            return Err(Error::config("--resume", what).with_hint("name the directory that was given to --run"));
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let config: FinetuneConfig = toml::from_str(&text).map_err(|e| {
            let offset = e.span().map(|s| s.start as u64);
            Error::format(&path, offset, e.message().to_string())
        })?;
        config.validate()?;
        Ok(config)
    }
}

/// The images of a fine-tuning.
#[derive(Debug)]
pub struct Images {
    train: Arc<Dataset>,
    test: Dataset,
    /// The choice of training images.
    pub subset: Subset,
    /// Images per step: what was asked for, or all where there are fewer.
    pub batch: usize,
}

impl Images {
    /// Opens both datasets and chooses the labels.
    ///
    /// # Errors
    /// Datasets that cannot be opened, have no labels or other classes than each other.
    pub fn open(config: &FinetuneConfig) -> Result<Images> {
        let train = Dataset::open_with(&config.train, config.machine.io)?;
        let test = Dataset::open_with(&config.test, config.machine.io)?;
        let subset = Subset::choose(&train, config.labels, config.subset_seed)?;
        check_labelled(&test)?;
        if train.classes() != test.classes() {
            let (own, others) = (test.classes().len(), train.classes().len());
            let what = format!("its {own} classes are not the {others} of {}", train.path().display());
            return Err(Error::format(test.path(), None, what).with_hint("prepare both from folders of the same names"));
        }
        let batch = config.recipe.batch.min(subset.records.len());
        Ok(Images { train: Arc::new(train.select(&subset.records)?), test, subset, batch })
    }

    /// Names of the classes.
    pub fn classes(&self) -> &[String] {
        self.test.classes()
    }

    /// Number of test images.
    pub fn test_images(&self) -> usize {
        self.test.len()
    }
}

/// Makes a new run directory that holds `config`.
///
/// # Errors
/// [`Error::Config`] when there is something at `path` already.
pub fn create(path: &Path, config: &FinetuneConfig) -> Result<RunFolder> {
    check_new(path)?;
    std::fs::create_dir_all(path).map_err(Error::io("create", path))?;
    let folder = RunFolder::lock(path)?;
    config.write(path)?;
    Ok(folder)
}

/// Checks that there is nothing at `path` but an empty directory.
///
/// # Errors
/// [`Error::Config`] when there is.
pub fn check_new(path: &Path) -> Result<()> {
    let taken = match std::fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => path.exists(),
    };
    if taken {
        let what = format!("{} exists already", path.display());
        return Err(Error::config("--run", what).with_hint("continue it with --resume, or name another directory"));
    }
    Ok(())
}

/// Holds the directory of a run that exists.
///
/// # Errors
/// [`Error::Config`] when another process holds it.
pub fn hold(path: &Path) -> Result<RunFolder> {
    RunFolder::lock(path)
}

/// A training that is ready to start.
pub struct Training<'a> {
    arm: Arm,
    config: &'a FinetuneConfig,
    images: &'a Images,
    trainer: Supervised,
    tester: Tester,
    rates: [Schedule; 2],
}

impl<'a> Training<'a> {
    /// Prepares a training: everything that can be wrong before a file is written.
    ///
    /// # Errors
    /// Settings that do not fit together; [`Error::OutOfMemory`].
    pub fn prepare(arm: Arm, config: &'a FinetuneConfig, images: &'a Images, device: &Device) -> Result<Training<'a>> {
        let steps = steps_per_epoch(images.train.len(), images.batch);
        let base = match arm {
            Arm::Finetuned => [config.recipe.lr, config.recipe.head_lr],
            Arm::Scratch => [config.recipe.baseline_lr; 2],
        };
        let rates = base.map(|lr| config.schedule(lr, images.batch, steps));
        rates[0].validate()?;
        config.machine.dtype.check_trainable_on(device)?;
        let whole = Classifier { backbone: config.backbone.clone(), classes: images.classes().len(), frozen: 0 };
        let model = match arm {
            Arm::Finetuned => Classifier { frozen: config.frozen()?, ..whole.clone() },
            Arm::Scratch => whole.clone(),
        };
        let Machine { dtype, epilogues, memory, .. } = &config.machine;
        let (options, epilogues) = (config.machine.options(), epilogues.clone());
        let place = Place { device, dtype: dtype.dtype(), options, epilogues, memory: *memory };
        if config.baseline && arm == Arm::Finetuned && model.frozen > 0 {
            // Its steps take more than these: that they do not fit must not come out when these are done.
            Supervised::check(&whole, &config.augment, &place, &images.train, images.batch)?;
        }
        // The tester first: what is free after it is the trainer's.
        let tester = Tester::new(&model, &config.augment, &place)?;
        let trainer = Supervised::new(&model, &config.augment, &place, &images.train, images.batch)?;
        Ok(Training { arm, config, images, trainer, tester, rates })
    }

    /// Trains to the end, or until `interrupted` says so, in which case the epoch under way is lost; goes on from the last
    /// whole epoch in `run`, if there is one. Returns the epochs, and whether these are all.
    ///
    /// # Errors
    /// A loss that is not finite; faults of data, disk or memory.
    pub fn train(
        mut self,
        run: &RunFolder,
        pretrained: Option<&NamedTensors>,
        interrupted: &dyn Fn() -> bool,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<(Vec<EpochLine>, bool)> {
        let folder = run.path().join(self.arm.folder());
        std::fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let checkpoints = Checkpoints::new(folder.join(CHECKPOINTS), 1)?;
        let mut lines = self.begin(&checkpoints, pretrained)?;
        let schedule = self.rates[0];
        let epoch_images = schedule.steps_per_epoch * self.images.batch as u64;
        tell(Event::Start {
            arm: self.arm,
            epochs_done: lines.len() as u64,
            epoch_images,
            parameters: self.trainer.trainable_parameters(),
            memory: self.trainer.planned_memory(),
        });
        write_lines(&folder, &lines)?;
        let mut loader =
            (lines.len() < schedule.epochs as usize).then(|| self.loader(lines.len() as u64)).transpose()?;
        while let Some(loader) = loader.as_mut().filter(|_| lines.len() < schedule.epochs as usize) {
            let Some(line) = self.epoch(lines.len() as u64, loader, interrupted, tell)? else { break };
            tell(Event::Epoch(&line));
            lines.push(line);
            let step = lines.len() as u64 * schedule.steps_per_epoch;
            let state = State { step, dataset: self.images.train.uuid().to_string(), lines: lines.clone() };
            checkpoints.save(step, &self.trainer.tensors()?, &state)?;
            write_lines(&folder, &lines)?;
        }
        let finished = lines.len() as u64 == schedule.epochs;
        if finished {
            self.export(&folder)?;
        }
        tell(Event::End);
        Ok((lines, finished))
    }

    /// Gives the trainer its weights: those of the newest checkpoint with its epochs, or the start values.
    fn begin(&mut self, checkpoints: &Checkpoints, pretrained: Option<&NamedTensors>) -> Result<Vec<EpochLine>> {
        let Some(mut checkpoint) = checkpoints.latest::<State>()? else {
            self.trainer.start(self.config.seed, pretrained)?;
            return Ok(Vec::new());
        };
        let (began, now) = (&checkpoint.state.dataset, self.images.train.uuid().to_string());
        if *began != now {
            let what = format!("the run began with images {began}, this file gives images {now}");
            return Err(Error::format(&self.config.train, None, what)
                .with_hint("put the dataset file back that the run began with"));
        }
        self.trainer.restore(&mut checkpoint)?;
        let lines = std::mem::take(&mut checkpoint.state.lines);
        checkpoint.finish()?;
        Ok(lines)
    }

    fn loader(&self, epoch: u64) -> Result<Loader> {
        let number = |epoch: u64| {
            u32::try_from(epoch)
                .map_err(|_| Error::config("--epochs", format!("expected at most {}, got {epoch}", u32::MAX)))
        };
        let loader = LoaderConfig {
            batch: self.images.batch,
            seed: self.config.seed,
            augment: self.config.augment.clone(),
            output: self.trainer.loader_output(),
            shuffle_window: 0,
            rank: 0,
            world_size: 1,
            workers: self.config.machine.workers,
            slots: LOADER_SLOTS,
            epochs: Some(number(self.config.recipe.epochs)?),
        };
        Loader::start(Arc::clone(&self.images.train), loader, Position { epoch: number(epoch)?, step: 0 })
    }

    /// An epoch and its test; `None` when interrupted.
    fn epoch(
        &mut self,
        epoch: u64,
        loader: &mut Loader,
        interrupted: &dyn Fn() -> bool,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<EpochLine>> {
        let [schedule, head] = self.rates;
        let (steps, batch) = (schedule.steps_per_epoch, self.images.batch as u64);
        let first = epoch * steps;
        let (mut loss, mut correct, mut done) = (0.0, 0, first * batch);
        let started = Instant::now();
        for step in first..first + steps {
            if interrupted() {
                return Ok(None);
            }
            let rates = Rates {
                lr: schedule.lr(step),
                head_lr: head.lr(step),
                momentum: self.config.recipe.momentum,
                weight_decay: self.config.recipe.weight_decay,
            };
            self.trainer.start_step(&loader.next_batch()?, rates)?;
            let in_flight = if step + 1 == first + steps { 0 } else { self.trainer.pipeline() };
            while let Some(result) = self.trainer.finish_step(in_flight)? {
                loss += result.loss;
                correct += result.correct;
                done += batch;
                tell(Event::Images(done));
            }
        }
        let images = (steps * batch) as f64;
        let images_per_s = images / started.elapsed().as_secs_f64().max(1e-9);
        self.tester.load(&self.trainer.parameters()?)?;
        Ok(Some(EpochLine {
            epoch: epoch + 1,
            lr: schedule.lr(first),
            head_lr: head.lr(first),
            loss: loss / steps as f64,
            train_top1: correct as f64 / images,
            test: self.tester.evaluate(&self.images.test)?,
            images_per_s,
        }))
    }

    /// Writes the network for torchvision.
    fn export(&self, folder: &Path) -> Result<()> {
        let mut tensors = self.trainer.parameters()?;
        tensors.retain(|name, _| !name.starts_with(crate::nn::simsiam::LOSS_SCALE));
        let AugmentConfig { image_size, mean, std, .. } = &self.config.augment;
        let metadata = [
            ("format", "pt".to_string()),
            ("classes", serde_json::to_string(self.images.classes()).unwrap_or_default()),
            ("image_size", image_size.to_string()),
            ("mean", format!("{mean:?}")),
            ("std", format!("{std:?}")),
            ("labels", self.config.labels.to_string()),
            ("engine", format!("simsiam-engine {}", env!("CARGO_PKG_VERSION"))),
        ];
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        safetensors::write(&folder.join(CLASSIFIER), &tensors, &metadata)
    }
}

/// Replaces the metrics as a whole: they are a line an epoch.
fn write_lines(folder: &Path, lines: &[EpochLine]) -> Result<()> {
    let path = folder.join(METRICS);
    let text: Vec<String> = lines
        .iter()
        .map(|line| serde_json::to_string(line).map(|text| text + "\n"))
        .collect::<Result<_, _>>()
        .map_err(|e| Error::io("encode", &path)(e.into()))?;
    write_atomic(&path, |out| text.iter().try_for_each(|line| out.write_all(line.as_bytes())))
}
