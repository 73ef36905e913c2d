//! `finetune`: a pretrained network trained on labels, beside one from scratch.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::augment_args::numbers;
use super::machine_args::MachineArgs;
use super::memory_args::BudgetArgs;
use super::meter::Meter;
use super::model_args::arch_name;
use super::output::print;
use super::signals;
use super::train::absolute;
use crate::data::augment::AugmentConfig;
use crate::error::{Error, Result};
use crate::exec::{Device, DeviceChoice};
use crate::tensor::safetensors::NamedTensors;
use crate::train::config::Machine;
use crate::train::finetune::{
    self, Arm, CLASSIFIER, CROP_SCALE, EpochLine, Event, FinetuneConfig, FinetuneRecipe, Images, Training,
};
use crate::train::run::RunFolder;
use crate::train::subset::{Fraction, Subset};
use crate::train::trained::{self, Trained};

/// Classes whose counts are printed; --json has all.
const CLASSES_SHOWN: usize = 40;

/// Trains the backbone of a pretraining and a new linear head on labels, with cross-entropy: random resized crops and
/// flips, SGD, a learning rate that falls to 0 along a cosine with every step. After every epoch accuracy is measured on
/// the centre crops of the test images; the figure to report is that of the last epoch, never the best of many.
#[derive(Debug, clap::Args)]
pub struct FinetuneArgs {
    /// Run directory of the pretraining, whose newest checkpoint is taken, a checkpoint file in one, or a file of
    /// `import --out`.
    #[arg(value_name = "RUN_OR_CHECKPOINT", required_unless_present = "resume", conflicts_with = "resume")]
    source: Option<PathBuf>,
    /// Dataset file with labels to learn from.
    #[arg(long, value_name = "FILE", required_unless_present = "resume", conflicts_with = "resume")]
    train: Option<PathBuf>,
    /// Dataset file with labels to measure accuracy on.
    #[arg(long, value_name = "FILE", required_unless_present = "resume", conflicts_with = "resume")]
    test: Option<PathBuf>,
    /// New directory for configuration, metrics, checkpoints and the trained networks.
    #[arg(long, value_name = "DIR", required_unless_present = "resume", conflicts_with = "resume")]
    run: Option<PathBuf>,
    /// Continue the run in DIR after its last whole epoch, bit for bit as if it had not stopped.
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// How many of the labels are used: as many of every class, chosen by a hash of --subset-seed and the images' content;
    /// 1% lies within 10%.
    #[arg(long, value_name = "PERCENT", default_value_t = Fraction::ALL)]
    labels: Fraction,
    /// Chooses another subset of the labels.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    subset_seed: u64,
    /// First layer that is trained: conv1 (all), layer1, layer2, ..., or fc (the head alone). Those before it are constants,
    /// with their batch norms in evaluation mode.
    #[arg(long, value_name = "LAYER", default_value = "conv1")]
    from_layer: String,
    /// Also train the whole network from its random start, on the same labels and schedule, for comparison.
    #[arg(long)]
    baseline: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    budget: BudgetArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Recipe")]
struct RecipeArgs {
    /// Passes over the chosen labels.
    #[arg(long, value_name = "N", default_value_t = 20)]
    epochs: u64,
    /// Images per step; fewer where there are fewer labels.
    #[arg(long, value_name = "N", default_value_t = 256)]
    batch: usize,
    /// Learning rate of the pretrained layers at batch 256; all rates grow in proportion to the batch.
    #[arg(long, value_name = "LR", default_value_t = 0.005)]
    lr: f64,
    /// Learning rate of the head at batch 256.
    #[arg(long, value_name = "LR", default_value_t = 0.5)]
    head_lr: f64,
    /// Learning rate of all layers of --baseline at batch 256.
    #[arg(long, value_name = "LR", default_value_t = 0.1)]
    baseline_lr: f64,
    /// Momentum of SGD.
    #[arg(long, default_value_t = 0.9)]
    momentum: f64,
    /// Weight decay, on all trainable parameters.
    #[arg(long, value_name = "DECAY", default_value_t = 1e-4)]
    weight_decay: f64,
    /// Range of a crop's area as a fraction of the image's [default: 0.08,1].
    #[arg(long, value_name = "LOW,HIGH", value_parser = numbers::<f64, 2>)]
    crop_scale: Option<[f64; 2]>,
    /// Seed of the head, the order and the crops.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// What is to be trained, and where.
struct Asked {
    config: FinetuneConfig,
    /// That of a run that exists.
    folder: Option<RunFolder>,
    device: Device,
    /// The pretrained tensors.
    pretrained: NamedTensors,
}

pub fn run(args: &FinetuneArgs) -> Result<()> {
    let interrupt = signals::install()?;
    let Asked { config, folder, device, pretrained } = match &args.resume {
        Some(path) => resume(args, path)?,
        None => start(args)?,
    };
    let images = Images::open(&config)?;
    describe(&config, &images, &device);
    let first = Training::prepare(Arm::Finetuned, &config, &images, &device)?;
    let folder = match (folder, &args.run) {
        (Some(folder), _) => folder,
        (None, run) => finetune::create(run.as_deref().unwrap_or(Path::new("")), &config)?,
    };
    let interrupted = || interrupt.interrupted();
    let mut watch = Watch { meter: None, epochs: config.recipe.epochs };
    let (lines, finished) = first.train(&folder, Some(&pretrained), &interrupted, &mut |event| watch.see(event))?;
    let mut results = vec![(Arm::Finetuned, lines)];
    let mut finished = finished;
    if config.baseline && finished {
        let second = Training::prepare(Arm::Scratch, &config, &images, &device)?;
        let (lines, whole) = second.train(&folder, None, &interrupted, &mut |event| watch.see(event))?;
        finished = whole;
        results.push((Arm::Scratch, lines));
    }
    if !finished {
        let path = folder.path().display();
        return print(|out| writeln!(out, "interrupted; continue with: simsiam-engine finetune --resume {path}"));
    }
    print(|out| match args.json {
        true => writeln!(out, "{:#}", as_json(&config, &images, &results)),
        false => table(&folder, &images, &results, out),
    })
}

/// A new run. Everything that can be wrong is looked at before the directory is made.
fn start(args: &FinetuneArgs) -> Result<Asked> {
    let (Some(source), Some(train), Some(test), Some(run)) = (&args.source, &args.train, &args.test, &args.run) else {
        let what = "expected RUN_OR_CHECKPOINT, --train, --test and --run, or --resume DIR";
        return Err(Error::config("finetune", what));
    };
    finetune::check_new(run)?;
    let mut machine = Machine { device: DeviceChoice::Auto, ..Machine::default() };
    machine.memory = args.budget.choose(machine.memory);
    let device = args.machine.open(&mut machine, true)?;
    let Trained { model, augment, checkpoint, .. } = trained::open(source)?;
    let recipe = &args.recipe;
    let config = FinetuneConfig {
        source: absolute(source)?,
        train: absolute(train)?,
        test: absolute(test)?,
        labels: args.labels,
        subset_seed: args.subset_seed,
        from_layer: args.from_layer.clone(),
        baseline: args.baseline,
        seed: recipe.seed,
        recipe: FinetuneRecipe {
            epochs: recipe.epochs,
            batch: recipe.batch,
            lr: recipe.lr,
            head_lr: recipe.head_lr,
            baseline_lr: recipe.baseline_lr,
            momentum: recipe.momentum,
            weight_decay: recipe.weight_decay,
        },
        backbone: model.backbone,
        augment: AugmentConfig {
            image_size: augment.image_size,
            mean: augment.mean,
            std: augment.std,
            crop_scale: recipe.crop_scale.unwrap_or(CROP_SCALE),
            jitter_probability: 0.0,
            grayscale_probability: 0.0,
            blur_probability: 0.0,
            ..AugmentConfig::imagenet()
        },
        machine,
    };
    config.validate()?;
    Ok(Asked { config, folder: None, device, pretrained: checkpoint.tensors().clone() })
}

fn resume(args: &FinetuneArgs, path: &Path) -> Result<Asked> {
    let mut config = FinetuneConfig::read(path)?;
    let folder = finetune::hold(path)?;
    config.machine.memory = args.budget.choose(config.machine.memory);
    let device = args.machine.open(&mut config.machine, false)?;
    let checkpoint = trained::open(&config.source)?.checkpoint;
    Ok(Asked { config, folder: Some(folder), device, pretrained: checkpoint.tensors().clone() })
}

fn describe(config: &FinetuneConfig, images: &Images, device: &Device) {
    eprintln!(
        "{} from {}, trained from {} on, {} on {}",
        arch_name(&config.backbone),
        config.source.display(),
        config.from_layer,
        config.machine.dtype,
        device.name(),
    );
    let Subset { records, counts } = &images.subset;
    eprintln!(
        "{} of the labels of {}: {} images, {}",
        config.labels,
        config.train.display(),
        records.len(),
        per_class(images.classes(), counts)
    );
    if images.batch < config.recipe.batch {
        eprintln!("batch {}: there are no more images", images.batch);
    }
}

/// How many images there are of each class, in as few words as will do.
fn per_class(classes: &[String], counts: &[usize]) -> String {
    let (least, most) = (counts.iter().min().copied().unwrap_or(0), counts.iter().max().copied().unwrap_or(0));
    if least == most {
        return format!("{most} of each of {} classes", classes.len());
    }
    if classes.len() > CLASSES_SHOWN {
        return format!("{least} to {most} of each of {} classes", classes.len());
    }
    let each: Vec<String> = classes.iter().zip(counts).map(|(class, count)| format!("{class} {count}")).collect();
    each.join(", ")
}

/// Shows trainings as they go.
struct Watch {
    meter: Option<Meter>,
    epochs: u64,
}

impl Watch {
    fn see(&mut self, event: Event<'_>) {
        match event {
            Event::Start { arm, epochs_done, epoch_images, parameters, memory } => {
                let what = match arm {
                    Arm::Finetuned => "fine-tuning",
                    Arm::Scratch => "from scratch",
                };
                eprintln!("{what}: {parameters} trainable parameters, {:.0} MB planned", memory as f64 / 1e6);
                if epochs_done > 0 {
                    eprintln!("continuing after epoch {epochs_done}");
                }
                self.meter = Some(Meter::new(what, epoch_images * self.epochs));
            }
            Event::Images(done) => self.meter.iter_mut().for_each(|meter| meter.set(done)),
            Event::Epoch(line) => {
                let text = format!(
                    "epoch {}/{}: loss {:.4}, top-1 {:.2} %; test: loss {:.4}, top-1 {:.2} %, top-5 {:.2} %, {:.0} images/s",
                    line.epoch,
                    self.epochs,
                    line.loss,
                    100.0 * line.train_top1,
                    line.test.loss,
                    100.0 * line.test.top1,
                    100.0 * line.test.top5,
                    line.images_per_s,
                );
                self.meter.iter().for_each(|meter| meter.note(&text));
            }
            Event::End => _ = self.meter.take().map(Meter::finish),
        }
    }
}

fn as_json(config: &FinetuneConfig, images: &Images, results: &[(Arm, Vec<EpochLine>)]) -> serde_json::Value {
    let mut value = json!({
        "config": config,
        "classes": images.classes(),
        "images_per_class": images.subset.counts,
        "train_images": images.subset.records.len(),
        "test_images": images.test_images(),
        "batch": images.batch,
    });
    for (arm, lines) in results {
        value[arm.folder()] = json!({ "epochs": lines, "final": lines.last().map(|line| line.test) });
    }
    value
}

fn table(
    folder: &RunFolder,
    images: &Images,
    results: &[(Arm, Vec<EpochLine>)],
    out: &mut dyn Write,
) -> io::Result<()> {
    writeln!(out, "{:14}{:>10}{:>10}{:>10}", "", "top-1", "top-5", "loss")?;
    for (arm, lines) in results {
        let Some(EpochLine { test, .. }) = lines.last() else { continue };
        let (name, [top1, top5]) = (arm.folder(), [test.top1, test.top5].map(|share| 100.0 * share));
        writeln!(out, "{name:14}{top1:>8.2} %{top5:>8.2} %{:>10.4}", test.loss)?;
    }
    let (labels, test) = (images.subset.records.len(), images.test_images());
    writeln!(out, "on {test} test images after the last epoch, {labels} labels seen")?;
    let network = folder.path().join(Arm::Finetuned.folder()).join(CLASSIFIER);
    writeln!(out, "network with torchvision's names: {}", network.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_told_in_as_few_words_as_will_do() {
        let classes: Vec<String> = ["cat", "dog", "eel"].map(String::from).into();
        assert_eq!(per_class(&classes, &[5, 5, 5]), "5 of each of 3 classes");
        assert_eq!(per_class(&classes, &[5, 5, 2]), "cat 5, dog 5, eel 2");
        let many: Vec<String> = (0..41).map(|i| i.to_string()).collect();
        let counts: Vec<usize> = (0..41).map(|i| 3 + i % 7).collect();
        assert_eq!(per_class(&many, &counts), "3 to 9 of each of 41 classes");
    }
}
