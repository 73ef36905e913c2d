//! `eval`: what a trained encoder is worth.

mod knn;
mod linear;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::model_args::arch_name;
use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::mapped::Access;
use crate::error::{Error, Result};
use crate::eval::features::FeatureExtractor;
use crate::exec::{Device, DeviceChoice, Opened, Precision};
use crate::train::trained;

#[derive(Debug, clap::Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Let the nearest labelled images vote (kNN), for many k and T at once.
    Knn(knn::KnnArgs),
    /// Train linear classifiers on the frozen encoder, for many learning rates at once.
    Linear(linear::LinearArgs),
}

pub fn run(args: EvalArgs) -> Result<()> {
    match args.what {
        What::Knn(args) => knn::run(&args),
        What::Linear(args) => linear::run(&args),
    }
}

/// The network, and where it runs.
#[derive(Debug, clap::Args)]
struct NetworkArgs {
    /// Run directory, whose newest checkpoint is taken, a checkpoint file in one, or a file of `import --out`.
    #[arg(value_name = "RUN_OR_CHECKPOINT")]
    source: PathBuf,
    /// Where to compute: auto (the first NVIDIA GPU if there is one, else the CPU), cpu, cuda, cuda:N, or cuda-emulated (the
    /// CUDA kernels on the CPU, for finding faults).
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// In what the encoder computes; classifiers are in float32 always [default: bf16 on a GPU, f32 on the CPU].
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// How records are read.
    #[arg(long, value_enum, default_value_t)]
    io: Access,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A trained encoder on its device.
struct Network {
    augment: AugmentConfig,
    /// Seed of its random start.
    seed: u64,
    extractor: FeatureExtractor,
    device: Device,
    /// Path, architecture and steps, for people and as JSON.
    title: String,
    facts: Value,
}

impl NetworkArgs {
    fn open(&self) -> Result<Network> {
        let mut trained = trained::open(&self.source)?;
        let Opened { device, instead_of_gpu } = self.device.open(trained.origin.cpu_conv())?;
        if let Some(error) = instead_of_gpu {
            tracing::info!("on the CPU, because there is no GPU to be used: {error}");
        }
        let precision = self.dtype.unwrap_or_else(|| Precision::default_on(&device));
        check_precision(precision, &device)?;
        let (model, augment) = (&trained.model, &trained.augment);
        let tensors = trained::backbone(model, augment.image_size, &mut trained.checkpoint)?;
        let mut extractor = FeatureExtractor::new(model, augment, &device, precision.dtype())?;
        extractor.load(&tensors)?;
        let arch = arch_name(&model.backbone);
        let title = format!(
            "{}: {arch} {}, {}-dimensional features in {precision}, on {}",
            self.source.display(),
            trained.history(),
            model.backbone.feature_dim(),
            device.name()
        );
        let facts = json!({
            "checkpoint": trained.checkpoint.path(),
            "arch": arch,
            "step": trained.step(),
            "feature_dim": model.backbone.feature_dim(),
            "image_size": augment.image_size,
            "dtype": precision,
            "device": device.name(),
        });
        let (augment, seed) = (augment.clone(), trained.origin.seed());
        Ok(Network { augment, seed, extractor, device, title, facts })
    }

    fn dataset(&self, path: &Path) -> Result<Dataset> {
        Dataset::open_with(path, self.io)
    }
}

/// Checks that the encoder can run in it.
fn check_precision(precision: Precision, device: &Device) -> Result<()> {
    let takes = match device {
        Device::Cpu(_) => &[Precision::F32][..],
        Device::Cuda(_) => &[Precision::F32, Precision::Bf16, Precision::Fp16],
    };
    if takes.contains(&precision) {
        return Ok(());
    }
    let names: Vec<String> = takes.iter().map(Precision::to_string).collect();
    let what = format!("expected {} on {}, got {precision}", names.join(", "), device.name());
    Err(Error::config("--dtype", what))
}

/// What JSON says of a dataset.
fn dataset_facts(dataset: &Dataset) -> Value {
    json!({ "path": dataset.path(), "images": dataset.len(), "uuid": dataset.uuid() })
}

/// A share as people read it.
fn percent(share: f64) -> String {
    format!("{:.2} %", share * 100.0)
}
