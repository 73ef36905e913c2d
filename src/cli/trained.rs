//! A trained network, named by its run directory or by a checkpoint in one.

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::nn::simsiam::SimSiam;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, TensorDesc};
use crate::train::checkpoint::{self, Checkpoint, Checkpoints};
use crate::train::config::{FILE_NAME, RunConfig};
use crate::train::run::CHECKPOINTS;

/// What is told of the training state.
#[derive(Debug, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
}

/// The configuration and the checkpoint that `source` names: of a run directory the newest one.
pub fn open(source: &Path) -> Result<(RunConfig, Checkpoint<State>)> {
    if source.is_dir() {
        let config = RunConfig::read(source)?;
        let folder = source.join(CHECKPOINTS);
        let latest = Checkpoints::new(&folder, config.log.keep_last)?.latest()?;
        let checkpoint = latest.ok_or_else(|| {
            Error::format(&folder, None, "expected a checkpoint, found none").with_hint("train the run first")
        })?;
        return Ok((config, checkpoint));
    }
    let checkpoint = checkpoint::load(source)?;
    let above = |levels: usize| source.ancestors().nth(levels).filter(|p| p.join(FILE_NAME).is_file());
    let run = above(1).or_else(|| above(2)).ok_or_else(|| {
        Error::format(source, None, format!("expected {FILE_NAME} beside the checkpoint or one folder up, found none"))
            .with_hint("leave checkpoints in their run directory")
    })?;
    Ok((RunConfig::read(run)?, checkpoint))
}

/// The backbone's tensors of a checkpoint, which must be those of `model`.
pub fn backbone(model: &SimSiam, image_size: usize, checkpoint: &mut Checkpoint<State>) -> Result<NamedTensors> {
    let graph = model.feature_graph(1, image_size, DType::F32)?;
    let tensor = |param: &crate::nn::ParamInfo| {
        let expected = TensorDesc { shape: param.torch_shape(), dtype: param.desc.dtype };
        Ok((param.name.clone(), checkpoint.take(&param.name, &expected)?))
    };
    graph.params.iter().map(tensor).collect()
}
