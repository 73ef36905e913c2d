//! `eval linear`: linear classifiers on the frozen encoder.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::{Value, json};

use super::super::meter::Meter;
use super::super::output::print;
use super::super::signals;
use super::{Network, NetworkArgs, dataset_facts, percent};
use crate::atomic::write_atomic;
use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::error::{Error, Result};
use crate::eval::features::FeatureSource;
use crate::eval::heads::{Head, Optimiser};
use crate::eval::linear::{HeadResult, Keep, LinearConfig, LinearResult, LinearTask};
use crate::eval::scores::Accuracy;

/// The views of the recipe: crops from so much of the area on, and flips.
const CROP_SCALE: [f64; 2] = [0.08, 1.0];
const FLIP: f64 = 0.5;
/// The result in a run directory.
const RESULT: &str = "linear.json";

/// Which optimisers are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Optimizers {
    /// LARS around SGD (trust coefficient 0.001, no clipping).
    Lars,
    /// SGD with momentum 0.9.
    Sgd,
    /// Every learning rate with each of the two.
    #[default]
    Both,
}

#[derive(Debug, clap::Args)]
pub struct LinearArgs {
    #[command(flatten)]
    network: NetworkArgs,
    /// Labelled dataset file that classifiers are trained and chosen on.
    #[arg(long, value_name = "FILE")]
    train: PathBuf,
    /// Labelled dataset file that the best of them is measured on.
    #[arg(long, value_name = "FILE")]
    test: PathBuf,
    /// Learning rates at the start, as they are (not times the batch); each is a classifier of its own.
    #[arg(long, value_name = "LR,...", value_delimiter = ',', default_value = "0.01,0.03,0.1,0.3,1,3,10,30,100")]
    lr: Vec<f64>,
    /// How classifiers are trained.
    #[arg(long, value_enum, default_value_t)]
    optimizer: Optimizers,
    /// Epochs; the learning rate follows a cosine, epoch by epoch.
    #[arg(long, value_name = "N", default_value_t = 90)]
    epochs: u64,
    /// Most images of a step; steps are of equal size.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    batch: usize,
    /// Share of the training images, of every class, on which the best classifier is chosen; 0 with a single one.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    holdout: f64,
    /// Compute features once, of each image's centre, instead of a random crop in every epoch: much faster, a little worse.
    #[arg(long)]
    cached: bool,
    /// Range of a random crop's area as a fraction of the image's [default: 0.08,1].
    #[arg(long, value_name = "LOW,HIGH", value_delimiter = ',', num_args = 2, conflicts_with = "cached")]
    crop_scale: Option<Vec<f64>>,
    /// Measure the same network at its random start instead: what a trained one has to beat.
    #[arg(long)]
    untrained: bool,
    /// Seed of the split, the order, the crops and the first weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Directory that keeps the classifiers after every epoch, and the result.
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Go on where the same command stopped, bit for bit as if it had not.
    #[arg(long, requires = "run")]
    resume: bool,
}

pub fn run(args: &LinearArgs) -> Result<()> {
    let (train, test) = (args.network.dataset(&args.train)?, args.network.dataset(&args.test)?);
    let mut network = args.network.open()?;
    if args.untrained {
        network.extractor.initialise(network.seed)?;
        network.facts["untrained"] = true.into();
        network.title += ", at its random start";
    }
    let config = config(args, &network)?;
    let task = LinearTask::new(&config, &train, &test, network.extractor.dim())?;
    eprintln!("{}", network.title);
    eprintln!("{} classifiers, {} epochs, {} images a step", config.heads.len(), config.epochs, task.shape().batch);
    let Some(result) = train_and_measure(args, &task, &mut network)? else {
        let again = "repeat the command with --resume to go on";
        return print(|out| writeln!(out, "interrupted; the epochs that were done are kept: {again}"));
    };
    let report = report(&network, &config, [&train, &test], &result);
    if let Some(folder) = &args.run {
        let path = folder.join(RESULT);
        write_atomic(&path, |out| out.write_all(format!("{report:#}\n").as_bytes()))?;
    }
    print(|out| match args.network.json {
        true => writeln!(out, "{report:#}"),
        false => print_result(&result, &config, out),
    })
}

fn config(args: &LinearArgs, network: &Network) -> Result<LinearConfig> {
    let optimisers = match args.optimizer {
        Optimizers::Lars => &[Optimiser::Lars][..],
        Optimizers::Sgd => &[Optimiser::Sgd],
        Optimizers::Both => &[Optimiser::Lars, Optimiser::Sgd],
    };
    let heads =
        optimisers.iter().flat_map(|&optimiser| args.lr.iter().map(move |&lr| Head { optimiser, lr })).collect();
    let crop_scale = match args.crop_scale.as_deref() {
        Some(&[low, high]) => [low, high],
        Some(_) => return Err(Error::config("--crop-scale", "expected LOW,HIGH")),
        None => CROP_SCALE,
    };
    let augment = AugmentConfig {
        crop_scale,
        flip_probability: FLIP,
        jitter_probability: 0.0,
        grayscale_probability: 0.0,
        blur_probability: 0.0,
        ..network.augment.clone()
    };
    let LinearArgs { epochs, batch, holdout, seed, cached, .. } = *args;
    Ok(LinearConfig { heads, epochs, batch, holdout, seed, cached, augment })
}

/// The result; none when it was interrupted.
fn train_and_measure(args: &LinearArgs, task: &LinearTask<'_>, network: &mut Network) -> Result<Option<LinearResult>> {
    let keep = args.run.as_ref().map(|folder| Keep { folder, resume: args.resume });
    // Without a directory there is nothing to be kept, and Ctrl-C may end the process as it does any other.
    let interrupt = keep.is_some().then(signals::install).transpose()?;
    let interrupted = || interrupt.as_ref().is_some_and(|interrupt| interrupt.interrupted());
    let mut meter = Meter::new("linear", task.images(0));
    let mut done = 0;
    let mut progress = |images| {
        done += images;
        if images > 0 {
            meter.set(done);
        }
    };
    let result = task.run(&mut network.extractor, &network.device, keep, &mut progress, &interrupted);
    meter.finish();
    result
}

fn report(network: &Network, config: &LinearConfig, [train, test]: [&Dataset; 2], result: &LinearResult) -> Value {
    json!({
        "network": network.facts,
        "train": dataset_facts(train),
        "test": dataset_facts(test),
        "config": config,
        "best": result.best.map(|best| &result.heads[best]),
        "result": result,
    })
}

fn print_result(result: &LinearResult, config: &LinearConfig, out: &mut dyn Write) -> io::Result<()> {
    let [trained, held_out, tested] = result.images;
    let features = if config.cached { "the centre of each image" } else { "a new random crop in every epoch" };
    writeln!(
        out,
        "trained on {trained} images ({features}; {} steps an epoch), chosen on {held_out} held out, tested on {tested}\n",
        result.steps_per_epoch
    )?;
    let (last, held) = ("last epoch", "held out");
    writeln!(out, "{:>9} {:>8}   {last:^21}   {held:^21}", "", "")?;
    writeln!(out, "{:>9} {:>8}   {:>10} {:>10}   {:>10} {:>10}", "optimizer", "lr", "loss", "top-1", "top-1", "top-5")?;
    for (number, head) in result.heads.iter().enumerate() {
        print_head(head, if result.best == Some(number) { "  <- best" } else { "" }, out)?;
    }
    match (result.best, result.test) {
        (Some(best), Some(Accuracy { top1, top5 })) => {
            let Head { optimiser, lr } = result.heads[best].head;
            let (top1, top5) = (percent(top1), percent(top5));
            writeln!(out, "\ntest set: top-1 {top1}, top-5 {top5} ({}, lr {lr})", optimiser.name())
        }
        _ => writeln!(out, "\nevery classifier diverged: use smaller values of --lr"),
    }
}

fn print_head(result: &HeadResult, mark: &str, out: &mut dyn Write) -> io::Result<()> {
    let HeadResult { head: Head { optimiser, lr }, diverged, train, holdout } = result;
    write!(out, "{:>9} {lr:>8}   ", optimiser.name())?;
    if *diverged {
        return writeln!(out, "{:>10}", "diverged");
    }
    let loss = train.loss.map_or("-".into(), |loss| format!("{loss:.4}"));
    let [top1, top5] = holdout.map_or(["-".into(), "-".into()], |a| [a.top1, a.top5].map(percent));
    writeln!(out, "{loss:>10} {:>10}   {top1:>10} {top5:>10}{mark}", percent(train.top1))
}
