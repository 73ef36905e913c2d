//! `demo`: the whole main job on embedded data, without download or preparation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::export::{self, ExportArgs};
use super::output::print;
use super::signals;
use crate::backend::cpu::Tier;
use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::import::idx::Idx;
use crate::data::import::{self, Options, Store};
use crate::error::{Error, Result};
use crate::eval::features::{FeatureExtractor, KnnProbe};
use crate::eval::knn::Knn;
use crate::exec::Device;
use crate::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use crate::nn::resnet::{Block, ResNet, Stem};
use crate::nn::simsiam::SimSiam;
use crate::ops::similarity::Kind;
use crate::report::chart::{Panel, Series, write_chart};
use crate::tensor::DType;
use crate::train::config::{KnnMonitor, Logging, Machine, Recipe, RunConfig};
use crate::train::metrics::{self, Line};
use crate::train::run::{Run, RunFolder, Summary};
use crate::train::trainer::Trainer;

/// 6,000 training and 1,000 test images of Fashion-MNIST (MIT licence, see assets/fashion-mnist).
const FILES: [(&str, &[u8]); 4] = [
    ("train-images-idx3-ubyte.gz", include_bytes!("../../assets/fashion-mnist/train-images-idx3-ubyte.gz")),
    ("train-labels-idx1-ubyte.gz", include_bytes!("../../assets/fashion-mnist/train-labels-idx1-ubyte.gz")),
    ("test-images-idx3-ubyte.gz", include_bytes!("../../assets/fashion-mnist/test-images-idx3-ubyte.gz")),
    ("test-labels-idx1-ubyte.gz", include_bytes!("../../assets/fashion-mnist/test-labels-idx1-ubyte.gz")),
];

const SEED: u64 = 1;
const KNN: Knn = Knn { k: 20, temperature: 0.1 };
/// After these the kNN accuracy has levelled off.
const EPOCHS: u64 = 12;
/// The collapse is there within the first epoch; the others show that it stays.
const COLLAPSE_EPOCHS: u64 = 4;
/// Small, because 6,000 images make few steps: 93 an epoch.
const BATCH: usize = 64;
/// At batch 256, as always. Higher than the paper's 0.03 to 0.05, for a run of a dozen epochs instead of hundreds.
const BASE_LR: f64 = 0.2;

#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// New directory for the runs, the chart and the backbone [default: runs/demo, or runs/demo-2, ...].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Show the collapse: the same short run with and without the stop-gradient.
    #[arg(long)]
    no_stop_gradient: bool,
    /// Epochs of each run [default: 12; with --no-stop-gradient 4].
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
}

pub fn run(args: DemoArgs) -> Result<()> {
    let started = Instant::now();
    let interrupt = signals::install()?;
    let demo = Demo::prepare(args.out)?;
    let floors = demo.floors()?;
    let finished = match args.no_stop_gradient {
        false => demo.pretrain(args.epochs.unwrap_or(EPOCHS), &floors, &|| interrupt.interrupted())?,
        true => demo.collapse(args.epochs.unwrap_or(COLLAPSE_EPOCHS), &floors, &|| interrupt.interrupted())?,
    };
    match finished {
        true => what_next(started.elapsed().as_secs_f64()),
        false => Ok(()),
    }
}

/// kNN accuracy that needs no training, in per cent.
struct Floors {
    pixels: f64,
    untrained: f64,
}

/// The embedded data as dataset files in an output directory.
struct Demo {
    out: PathBuf,
    train: Arc<Dataset>,
    test: Arc<Dataset>,
}

impl Demo {
    fn prepare(out: Option<PathBuf>) -> Result<Demo> {
        let out = out.unwrap_or_else(free_directory);
        std::fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
        let mut entries = std::fs::read_dir(&out).map_err(Error::io("read", &out))?;
        if entries.next().is_some() {
            let what = format!("{} is not empty", out.display());
            return Err(Error::config("--out", what).with_hint("name a new directory"));
        }
        let source = tempfile::tempdir().map_err(Error::io("create a directory in", &std::env::temp_dir()))?;
        for (name, bytes) in FILES {
            let path = source.path().join(name);
            std::fs::write(&path, bytes).map_err(Error::io("write", &path))?;
        }
        let train = prepare_split(source.path(), "train", &out)?;
        let test = prepare_split(source.path(), "test", &out)?;
        Ok(Demo { out, train, test })
    }

    fn floors(&self) -> Result<Floors> {
        let mut probe = self.probe(&model(HeadNorm::Default, true))?;
        let pixels = probe.raw_pixels()?.top1 * 100.0;
        let untrained = probe.untrained(SEED)?.top1 * 100.0;
        print(|out| {
            writeln!(
                out,
                "Fashion-MNIST: {} training images and {} test images of 28 x 28 pixels, 10 kinds of clothing.\n\n\
                 How well do features tell the kinds apart? Every test image takes the kind of its {} nearest training\n\
                 images (kNN, T = {}). This measures, and is the only use of labels. Accuracy before training:\n\n  \
                 raw pixels         {pixels:5.1} %\n  \
                 untrained network  {untrained:5.1} %\n",
                self.train.len(),
                self.test.len(),
                KNN.k,
                KNN.temperature
            )
        })?;
        Ok(Floors { pixels, untrained })
    }

    fn probe(&self, model: &SimSiam) -> Result<KnnProbe> {
        let extractor = FeatureExtractor::new(model, &augment(), &Device::Cpu(Tier::Direct), DType::F32)?;
        KnnProbe::new(extractor, Arc::clone(&self.train), Arc::clone(&self.test), KNN)
    }

    /// The main job; false when interrupted.
    fn pretrain(&self, epochs: u64, floors: &Floors, interrupted: &dyn Fn() -> bool) -> Result<bool> {
        print(|out| writeln!(out, "SimSiam for {epochs} epochs, without labels:\n"))?;
        let model = model(HeadNorm::Default, true);
        let Some((summary, lines)) = self.train("run", &model, epochs, interrupted)? else { return Ok(false) };
        let knn = summary.knn.unwrap_or(f64::NAN) * 100.0;
        print(|out| {
            writeln!(
                out,
                "\nkNN accuracy on the test images:\n\n  \
                 raw pixels         {:5.1} %\n  \
                 untrained network  {:5.1} %\n  \
                 after SimSiam      {knn:5.1} %  ({:+.1} points by training)\n",
                floors.pixels,
                floors.untrained,
                knn - floors.untrained
            )
        })?;
        self.chart("SimSiam on 6,000 images of Fashion-MNIST", &[("SimSiam", lines)], floors)?;
        export::run(ExportArgs::new(self.out.join("run"), self.out.join("backbone.safetensors")))?;
        Ok(true)
    }

    /// The same run with and without the stop-gradient, without batch norm at the projector's output: batch norm there would
    /// keep the spread of z up by force while its rank collapses, which takes longer to show. False when interrupted.
    fn collapse(&self, epochs: u64, floors: &Floors, interrupted: &dyn Fn() -> bool) -> Result<bool> {
        print(|out| {
            writeln!(
                out,
                "SimSiam for {epochs} epochs twice, with and without its stop-gradient. (Neither has batch norm at the\n\
                 projector's output, as by --head-bn hidden: it would hide the collapse from z std for a while.)"
            )
        })?;
        let runs = [("with", "with stop-gradient", true), ("without", "without stop-gradient", false)];
        let mut rows = String::new();
        let mut curves = Vec::new();
        for (name, title, stop_gradient) in runs {
            print(|out| writeln!(out, "\n{title}:\n"))?;
            let model = model(HeadNorm::Hidden, stop_gradient);
            let Some((summary, lines)) = self.train(name, &model, epochs, interrupted)? else { return Ok(false) };
            rows += &row(title, &summary);
            curves.push((title, lines));
        }
        print(|out| {
            writeln!(out, "\n  {:22}{:>8}{:>18}{:>17}{:>10}", "", "loss", "z std * sqrt(d)", "effective rank", "kNN")?;
            writeln!(out, "{rows}  {:22}{:>51.1} %\n", "untrained network", floors.untrained)?;
            writeln!(
                out,
                "Without the stop-gradient the network cheats: the loss falls to its minimum of -1 because every image gets\n\
                 nearly the same z (z std falls towards 0), in few directions (effective rank). Its features gain nothing.\n"
            )
        })?;
        self.chart("SimSiam with and without the stop-gradient", &curves, floors)?;
        Ok(true)
    }

    /// A run; `None` when interrupted.
    fn train(
        &self,
        name: &str,
        model: &SimSiam,
        epochs: u64,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<Option<(Summary, Vec<Line>)>> {
        let config = self.config(model, epochs);
        let folder = RunFolder::create(&self.out.join(name), &config)?;
        let probe = self.probe(model)?;
        let trainer = Trainer::new(&config, &Device::Cpu(Tier::Direct), &self.train)?;
        let run = Run::new(&folder, &config, trainer, Arc::clone(&self.train), Some(Box::new(probe)))?;
        let summary = run.train(interrupted)?;
        if !summary.finished {
            let (step, path) = (summary.step, folder.path().display());
            print(|out| {
                writeln!(
                    out,
                    "\nInterrupted after step {step}, which is saved. Continue this run with:\n  \
                     simsiam-engine train --resume {path}"
                )
            })?;
            return Ok(None);
        }
        Ok(Some((summary, metrics::read(&folder.metrics())?)))
    }

    fn config(&self, model: &SimSiam, epochs: u64) -> RunConfig {
        RunConfig {
            data: self.train.path().to_path_buf(),
            seed: SEED,
            shuffle_window: 0,
            init: None,
            recipe: Recipe {
                epochs,
                batch: BATCH,
                base_lr: BASE_LR,
                warmup_epochs: 0,
                per_step: true, // so few epochs would make coarse stairs
                fix_predictor_lr: true,
                momentum: 0.9,
                weight_decay: 5e-4,
            },
            model: model.clone(),
            augment: augment(),
            log: Logging { every: 5, rank_every: 20, checkpoint_epochs: 1, checkpoint_steps: 0, keep_last: 1 },
            knn: Some(KnnMonitor {
                bank: self.train.path().to_path_buf(),
                queries: self.test.path().to_path_buf(),
                k: KNN.k,
                temperature: KNN.temperature,
                every_epochs: 1,
            }),
            machine: Machine::default(),
        }
    }

    fn chart(&self, title: &str, curves: &[(&str, Vec<Line>)], floors: &Floors) -> Result<()> {
        let path = self.out.join("chart.png");
        write_chart(&path, title, &format!("training step ({BATCH} images each)"), &panels(curves, floors))?;
        print(|out| writeln!(out, "{}: loss, z std, effective rank and kNN step by step", path.display()))
    }
}

/// The end of a run as a row of the collapse table.
fn row(title: &str, summary: &Summary) -> String {
    let Some(last) = &summary.last else { return String::new() };
    let rank = last.effective_rank.unwrap_or(f64::NAN);
    let knn = summary.knn.unwrap_or(f64::NAN) * 100.0;
    format!("  {title:22}{:>8.3}{:>18.2}{rank:>17.1}{knn:>8.1} %\n", last.loss, last.z_std)
}

/// `runs/demo`, or the first of `runs/demo-2`, `runs/demo-3`, ... that does not exist.
fn free_directory() -> PathBuf {
    let first = PathBuf::from("runs/demo");
    let mut others = (2..).map(|i| PathBuf::from(format!("runs/demo-{i}")));
    if !first.exists() { first } else { others.find(|p| !p.exists()).unwrap_or(first) }
}

/// A split as a dataset file, opened under its absolute path, so that a run on it can be continued from any directory.
fn prepare_split(source: &Path, split: &str, out: &Path) -> Result<Arc<Dataset>> {
    let images = source.join(format!("{split}-images-idx3-ubyte.gz"));
    let idx = Idx::open(&images, None, None, out)?;
    let options = Options { shuffle: Some(SEED), ..Options::new(Store::Native) };
    let out = out.canonicalize().map_err(Error::io("open", out))?;
    let path = out.join(format!("fashion-{split}.ssds"));
    import::prepare(&idx, source, &path, &options, &mut |_| true)?;
    Ok(Arc::new(Dataset::open(&path)?))
}

/// Three stages of one block behind the stem that goes down to a quarter of the image's side: 28, 7, 4, 2. An epoch costs a
/// quarter of one at full resolution with 16 channels in four stages; 32 channels fill the tiles of the convolution.
fn model(norm: HeadNorm, stop_gradient: bool) -> SimSiam {
    SimSiam {
        backbone: ResNet { block: Block::Basic, depths: vec![1, 1, 1], width: 32, stem: Stem::Imagenet },
        heads: Heads {
            dim: 512,
            projector_hidden: 128,
            predictor_hidden: 128,
            projector_layers: 2,
            projector_out_affine: false,
            projector_out_bias: OutBias::None,
            norm,
            predictor: PredictorKind::Mlp,
        },
        similarity: Kind::Cosine,
        stop_gradient,
        symmetric: true,
    }
}

/// Clothes on black in grey: milder crops than for photographs.
fn augment() -> AugmentConfig {
    AugmentConfig {
        image_size: 28,
        crop_scale: [0.5, 1.0],
        mean: [0.286; 3],
        std: [0.353; 3],
        ..AugmentConfig::cifar()
    }
}

fn panels(curves: &[(&str, Vec<Line>)], floors: &Floors) -> Vec<Panel> {
    let panel = |title: &str, value: &dyn Fn(&Line) -> Option<f64>| Panel {
        title: title.into(),
        series: curves
            .iter()
            .map(|(name, lines)| Series {
                name: name.to_string(),
                points: lines.iter().filter_map(|l| Some((l.step as f64, value(l)?))).collect(),
            })
            .collect(),
        ..Panel::default()
    };
    let mut loss = panel("loss (its minimum is -1)", &|l| Some(l.loss));
    loss.y_range = Some((-1.05, 0.1));
    let mut std = panel("spread of the outputs: z std * sqrt(d), 0 when collapsed", &|l| Some(l.z_std));
    std.y_range = Some((0.0, 1.1));
    let mut knn = panel("kNN accuracy on the test images (%)", &|l| l.knn.map(|k| k * 100.0));
    knn.reference_lines = vec![("raw pixels".into(), floors.pixels), ("untrained network".into(), floors.untrained)];
    vec![loss, std, panel("directions that the outputs use: effective rank of z", &|l| l.effective_rank), knn]
}

fn what_next(seconds: f64) -> Result<()> {
    print(|out| {
        writeln!(
            out,
            "\nDone in {seconds:.0} s. Next, your own images (a folder of class folders, or just a folder):\n\n  \
             simsiam-engine prepare PHOTOS photos.ssds\n  \
             simsiam-engine augment-preview photos.ssds views.png\n  \
             simsiam-engine train photos.ssds --run runs/first --arch resnet18 --batch 128\n  \
             simsiam-engine export runs/first backbone.safetensors"
        )
    })
}
