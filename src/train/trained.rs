//! A trained network, named by its run directory or by a checkpoint in one.

use std::path::{Path, PathBuf};

use serde::Deserialize;

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
}

/// What a path to a trained network leads to.
#[derive(Debug)]
pub struct Trained {
    /// The run directory.
    pub run: PathBuf,
    /// Its configuration.
    pub config: RunConfig,
    /// The checkpoint.
    pub checkpoint: Checkpoint<State>,
}

/// Opens the newest checkpoint of a run directory, or a checkpoint file in one.
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
        return Ok(Trained { run: source.to_path_buf(), config, checkpoint });
    }
    let checkpoint = checkpoint::load(source)?;
    let above = |levels: usize| source.ancestors().nth(levels).filter(|p| p.join(FILE_NAME).is_file());
    let run = above(1).or_else(|| above(2)).ok_or_else(|| {
        Error::format(source, None, format!("expected {FILE_NAME} beside the checkpoint or one folder up, found none"))
            .with_hint("leave checkpoints in their run directory")
    })?;
    Ok(Trained { run: run.to_path_buf(), config: RunConfig::read(run)?, checkpoint })
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
