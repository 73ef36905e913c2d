//! A trained network, named by its run directory, by a checkpoint in one, or by an imported checkpoint.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::backend::cpu::Tier;
use crate::data::augment::AugmentConfig;
use crate::error::{Error, Result};
use crate::nn::simsiam::SimSiam;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, TensorDesc};

use super::checkpoint::{self, Checkpoint, Checkpoints};
use super::config::{FILE_NAME, RunConfig};
use super::run::CHECKPOINTS;

/// What is told of the training state.
#[derive(Debug, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// Identity of the dataset, where it is known.
    #[serde(default)]
    pub dataset: Option<String>,
    /// Of an imported checkpoint, what a run's configuration would say.
    #[serde(default)]
    pub imported: Option<Imported>,
}

/// What a checkpoint that stands alone says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Imported {
    /// Name of the file that its weights come from.
    pub file: String,
    /// BLAKE3 of that file.
    pub blake3: String,
    /// The network; heads that the file does not have are arbitrary.
    pub model: SimSiam,
    /// Size and normalisation of its images, beside the crops of the recipe for such a network.
    pub augment: AugmentConfig,
}

/// What a path to a trained network leads to.
#[derive(Debug)]
pub struct Trained {
    /// The network.
    pub model: SimSiam,
    /// Its images.
    pub augment: AugmentConfig,
    /// Where it comes from.
    pub origin: Origin,
    /// The checkpoint.
    pub checkpoint: Checkpoint<State>,
}

/// Where a trained network comes from.
#[derive(Debug)]
pub enum Origin {
    /// A run of this engine: its directory and configuration.
    Run(PathBuf, Box<RunConfig>),
    /// A file of another program: its name and BLAKE3.
    File {
        /// Its name.
        name: String,
        /// Its BLAKE3.
        blake3: String,
    },
}

impl Trained {
    fn of_run(run: &Path, config: RunConfig, checkpoint: Checkpoint<State>) -> Trained {
        let (model, augment) = (config.model.clone(), config.augment.clone());
        Trained { model, augment, origin: Origin::Run(run.to_path_buf(), Box::new(config)), checkpoint }
    }

    /// Steps that the run has done.
    pub fn step(&self) -> Option<u64> {
        matches!(self.origin, Origin::Run(..)).then_some(self.checkpoint.state.step)
    }

    /// How it came about, in words: "after step 90", "from resnet50.pth".
    pub fn history(&self) -> String {
        match &self.origin {
            Origin::Run(..) => format!("after step {}", self.checkpoint.state.step),
            Origin::File { name, .. } => format!("from {name}"),
        }
    }
}

impl Origin {
    /// The seed of the run.
    pub fn seed(&self) -> u64 {
        self.run().map_or(0, |config| config.seed)
    }

    /// The tier of the CPU's convolutions that the run used.
    pub fn cpu_conv(&self) -> Tier {
        self.run().map_or_else(Tier::default, |config| config.machine.cpu_conv)
    }

    /// The run's configuration.
    pub fn run(&self) -> Option<&RunConfig> {
        match self {
            Origin::Run(_, config) => Some(config),
            Origin::File { .. } => None,
        }
    }
}

/// Opens the newest checkpoint of a run directory, a checkpoint file in one, or an imported checkpoint.
///
/// # Errors
/// [`Error::Io`] and [`Error::Format`] for what cannot be read or is not what it should be.
pub fn open(source: &Path) -> Result<Trained> {
    if source.is_dir() {
        let config = RunConfig::read(source)?;
        let folder = source.join(CHECKPOINTS);
        let latest = Checkpoints::new(&folder, config.log.keep_last)?.latest()?;
        let checkpoint = latest.ok_or_else(|| {
            Error::format(&folder, None, "expected a checkpoint, found none").with_hint("train the run first")
        })?;
        return Ok(Trained::of_run(source, config, checkpoint));
    }
    let mut checkpoint: Checkpoint<State> = checkpoint::load(source)?;
    if let Some(Imported { file, blake3, model, augment }) = checkpoint.state.imported.take() {
        let fault = |error: Error| Error::format(source, None, error.to_string());
        model.validate().and_then(|()| augment.validate()).map_err(fault)?;
        return Ok(Trained { model, augment, origin: Origin::File { name: file, blake3 }, checkpoint });
    }
    let above = |levels: usize| source.ancestors().nth(levels).filter(|p| p.join(FILE_NAME).is_file());
    let run = above(1).or_else(|| above(2)).ok_or_else(|| {
        Error::format(source, None, format!("expected {FILE_NAME} beside the checkpoint or one folder up, found none"))
            .with_hint("leave checkpoints in their run directory, and make those of other files with import --out")
    })?;
    Ok(Trained::of_run(run, RunConfig::read(run)?, checkpoint))
}

/// The backbone's tensors of a checkpoint, which must be those of `model`.
///
/// # Errors
/// A tensor that is missing or of another shape.
pub fn backbone(model: &SimSiam, image_size: usize, checkpoint: &mut Checkpoint<State>) -> Result<NamedTensors> {
    let graph = model.feature_graph(1, image_size, DType::F32)?;
    let tensor = |param: &crate::nn::ParamInfo| {
        let expected = TensorDesc { shape: param.torch_shape(), dtype: param.desc.dtype };
        Ok((param.name.clone(), checkpoint.take(&param.name, &expected)?))
    };
    graph.params.iter().map(tensor).collect()
}
