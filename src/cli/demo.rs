//! `demo`: the whole main job on embedded data, without download or preparation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::signals;
use crate::backend::cpu::Tier;
use crate::data::augment::AugmentConfig;
use crate::data::import::idx::Idx;
use crate::data::import::{self, Options, Store};
use crate::data::mapped::Dataset;
use crate::error::{Error, Result};
use crate::eval::features::{FeatureExtractor, KnnProbe};
use crate::eval::knn::Knn;
use crate::export::torchvision::write_backbone;
use crate::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use crate::nn::resnet::{Block, ResNet, Stem};
use crate::nn::simsiam::SimSiam;
use crate::ops::similarity::Kind;
use crate::report::chart::{Panel, Series, write_chart};
use crate::train::config::{KnnMonitor, Logging, Machine, Recipe, RunConfig};
use crate::train::metrics::{self, Line};
use crate::train::run::{Run, RunFolder, Summary};

/// 6,000 training and 1,000 test images of Fashion-MNIST (MIT licence, see assets/fashion-mnist).
const FILES: [(&str, &[u8]); 4] = [
    ("train-images-idx3-ubyte.gz", include_bytes!("../../assets/fashion-mnist/train-images-idx3-ubyte.gz")),
    ("train-labels-idx1-ubyte.gz", include_bytes!("../../assets/fashion-mnist/train-labels-idx1-ubyte.gz")),
    ("test-images-idx3-ubyte.gz", include_bytes!("../../assets/fashion-mnist/test-images-idx3-ubyte.gz")),
    ("test-labels-idx1-ubyte.gz", include_bytes!("../../assets/fashion-mnist/test-labels-idx1-ubyte.gz")),
];

const SEED: u64 = 1;
const KNN: Knn = Knn { k: 20, temperature: 0.1 };

#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Directory for the runs, the chart and the backbone (default: runs/demo, runs/demo-2, ...).
    #[arg(long)]
    out: Option<PathBuf>,
    /// Show the collapse: the same short run with and without the stop-gradient.
    #[arg(long)]
    no_stop_gradient: bool,
    /// Epochs of each run (default: 12; 4 with --no-stop-gradient).
    #[arg(long)]
    epochs: Option<u64>,
}

pub fn run(args: DemoArgs) -> Result<()> {
    let started = Instant::now();
    let interrupt = signals::install()?;
    let demo = Demo::prepare(args.out)?;
    let floors = demo.floors()?;
    let finished = match args.no_stop_gradient {
        false => demo.pretrain(args.epochs.unwrap_or(12), &floors, &|| interrupt.interrupted())?,
        true => demo.collapse(args.epochs.unwrap_or(4), &floors, &|| interrupt.interrupted())?,
    };
    if !finished {
        println!("\nInterrupted. Continue with: simsiam-engine train --resume RUN, RUN being a run directory above.");
        return Ok(());
    }
    println!("\nDone in {:.0} s.", started.elapsed().as_secs_f64());
    what_next();
    Ok(())
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
        let source = tempfile::tempdir().map_err(Error::io("create a directory in", &std::env::temp_dir()))?;
        for (name, bytes) in FILES {
            let path = source.path().join(name);
            std::fs::write(&path, bytes).map_err(Error::io("write", &path))?;
        }
        let train = prepare_split(source.path(), "train", &out)?;
        let test = prepare_split(source.path(), "test", &out)?;
        println!(
            "Fashion-MNIST subset: {} training and {} test images of 28x28 pixels, labels used for kNN alone.",
            train.len(),
            test.len()
        );
        Ok(Demo { out, train, test })
    }

    fn floors(&self) -> Result<Floors> {
        let mut probe = self.probe(&model(HeadNorm::Default, true))?;
        let pixels = probe.raw_pixels()?.top1 * 100.0;
        let untrained = probe.untrained(SEED)?.top1 * 100.0;
        println!("kNN (k = {}, T = {}) on the test images:", KNN.k, KNN.temperature);
        println!("  raw pixels         {pixels:5.1} %");
        println!("  untrained network  {untrained:5.1} %");
        Ok(Floors { pixels, untrained })
    }

    fn probe(&self, model: &SimSiam) -> Result<KnnProbe> {
        let extractor = FeatureExtractor::new(model, &augment(), Tier::Direct)?;
        KnnProbe::new(extractor, Arc::clone(&self.train), Arc::clone(&self.test), KNN)
    }

    /// The main job; false when interrupted.
    fn pretrain(&self, epochs: u64, floors: &Floors, interrupted: &dyn Fn() -> bool) -> Result<bool> {
        let model = model(HeadNorm::Default, true);
        println!("\nPretraining SimSiam for {epochs} epochs, no labels:");
        let Some((summary, lines)) = self.train("run", &model, epochs, interrupted)? else { return Ok(false) };
        let knn = summary.knn.unwrap_or(0.0) * 100.0;
        println!("\n  raw pixels         {:5.1} %", floors.pixels);
        println!("  untrained network  {:5.1} %", floors.untrained);
        println!("  SimSiam            {knn:5.1} %  ({:+.1} against untrained)", knn - floors.untrained);
        self.export(&model, &summary)?;
        self.chart("SimSiam on Fashion-MNIST (6,000 images)", vec![("SimSiam", lines)], floors)?;
        Ok(true)
    }

    /// The same run with and without the stop-gradient, without batch norm at the projector's output: batch norm there would
    /// keep the spread of z up by force while its rank collapses, which takes longer to show.
    fn collapse(&self, epochs: u64, floors: &Floors, interrupted: &dyn Fn() -> bool) -> Result<bool> {
        println!("\nTwo runs of {epochs} epochs without batch norm at the projector's output (--head-bn hidden).");
        let mut curves = Vec::new();
        let mut ends = Vec::new();
        for (name, title, stop_gradient) in
            [("with", "with stop-gradient", true), ("without", "without stop-gradient", false)]
        {
            println!("\n{title}:");
            let model = model(HeadNorm::Hidden, stop_gradient);
            let Some((summary, lines)) = self.train(name, &model, epochs, interrupted)? else { return Ok(false) };
            let last = lines.iter().rfind(|l| l.effective_rank.is_some()).cloned();
            ends.push((title, summary.knn.unwrap_or(0.0) * 100.0, last));
            curves.push((title, lines));
        }
        println!("\n  {:24}{:>8}{:>22}{:>17}{:>8}", "", "loss", "z std * sqrt(d)", "effective rank", "kNN");
        for (title, knn, last) in ends {
            let Some(last) = last else { continue };
            let rank = last.effective_rank.unwrap_or(f64::NAN);
            println!("  {title:24}{:>8.3}{:>22.2}{rank:>17.1}{knn:>6.1} %", last.loss, last.z_std);
        }
        println!("  {:24}{:>53.1} %", "untrained network", floors.untrained);
        println!(
            "Without the stop-gradient the loss falls faster, towards its minimum of -1: all images get the same z."
        );
        self.chart("SimSiam with and without the stop-gradient", curves, floors)?;
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
        let run = Run::new(&folder, &config, Arc::clone(&self.train), Some(Box::new(probe)))?;
        let summary = run.train(interrupted)?;
        let lines = metrics::read(&folder.metrics())?;
        Ok(summary.finished.then_some((summary, lines)))
    }

    fn config(&self, model: &SimSiam, epochs: u64) -> RunConfig {
        RunConfig {
            data: self.train.path().to_path_buf(),
            seed: SEED,
            recipe: Recipe {
                epochs,
                batch: 128,
                base_lr: 0.1,
                warmup_epochs: 0,
                per_step: true,
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
                every_epochs: 2,
            }),
            machine: Machine { workers: 1, cpu_conv: Tier::Direct, check: false },
        }
    }

    fn export(&self, model: &SimSiam, summary: &Summary) -> Result<()> {
        let checkpoint = crate::train::checkpoint::load::<crate::train::run::TrainState>(&summary.checkpoint)?;
        let path = self.out.join("backbone.safetensors");
        let metadata = [
            ("arch".to_string(), format!("{:?}", model.backbone)),
            ("engine".into(), env!("CARGO_PKG_VERSION").into()),
        ];
        write_backbone(&path, checkpoint.tensors().clone(), &metadata.into_iter().collect())?;
        println!("\nBackbone with torchvision's names: {}", path.display());
        Ok(())
    }

    fn chart(&self, title: &str, curves: Vec<(&str, Vec<Line>)>, floors: &Floors) -> Result<()> {
        let path = self.out.join("chart.png");
        write_chart(&path, title, "step", &panels(&curves, floors))?;
        println!("Loss, z std, effective rank and kNN over the steps: {}", path.display());
        Ok(())
    }
}

/// `runs/demo`, or the first of `runs/demo-2`, `runs/demo-3`, ... that does not exist.
fn free_directory() -> PathBuf {
    let first = PathBuf::from("runs/demo");
    let mut others = (2..).map(|i| PathBuf::from(format!("runs/demo-{i}")));
    if !first.exists() { first } else { others.find(|p| !p.exists()).unwrap_or(first) }
}

fn prepare_split(source: &Path, split: &str, out: &Path) -> Result<Arc<Dataset>> {
    let images = source.join(format!("{split}-images-idx3-ubyte.gz"));
    let idx = Idx::open(&images, None, None)?;
    let options = Options {
        store: Store::Native,
        shuffle: Some(SEED),
        limit: None,
        threads: 1,
        strict: true,
        max_bad: 0.0,
        force: true,
    };
    let path = out.join(format!("fashion-{split}.ssds"));
    import::prepare(&idx, source, &path, &options, &mut |_| true)?;
    Ok(Arc::new(Dataset::open(&path)?))
}

/// A small ResNet of basic blocks, one a stage.
fn model(norm: HeadNorm, stop_gradient: bool) -> SimSiam {
    SimSiam {
        backbone: ResNet { block: Block::Basic, depths: vec![1, 1, 1, 1], width: 16, stem: Stem::Cifar },
        heads: Heads {
            dim: 512,
            projector_hidden: 512,
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
    let mut std = panel("z std * sqrt(d)", &|l| Some(l.z_std));
    std.y_range = Some((0.0, 1.1));
    let mut knn = panel("kNN accuracy on test images (%)", &|l| l.knn.map(|k| k * 100.0));
    knn.reference_lines = vec![("raw pixels".into(), floors.pixels), ("untrained network".into(), floors.untrained)];
    vec![panel("loss", &|l| Some(l.loss)), std, panel("effective rank of z", &|l| l.effective_rank), knn]
}

fn what_next() {
    println!(
        "\nYour own images (a folder of class folders, or just a folder):\n  \
         simsiam-engine prepare PHOTOS photos.ssds\n  \
         simsiam-engine augment-preview photos.ssds views.png\n  \
         simsiam-engine train photos.ssds --run runs/first\n  \
         simsiam-engine export runs/first backbone.safetensors"
    );
}
