//! What is exported: the weights of a run, and what is known of how they came about.

use std::path::Path;

use crate::data::augment::AugmentConfig;
use crate::error::{Error, Result};
use crate::nn::simsiam::{EvalGraph, SimSiam};
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, TensorDesc};
use crate::train::metrics::{self, Line};
use crate::train::run::METRICS;
use crate::train::trained::{Origin, Trained, open};

/// A trained network.
#[derive(Debug)]
pub struct Source {
    /// The network.
    pub model: SimSiam,
    /// Its images.
    pub augment: AugmentConfig,
    /// Where it comes from.
    pub origin: Origin,
    /// That in words: after which step, or from which file.
    pub history: String,
    /// Steps of the run.
    pub step: u64,
    /// Identity of the dataset, where it is known.
    pub dataset: Option<String>,
    /// The lines of the run's metrics up to that step; none where the file is gone.
    pub metrics: Vec<Line>,
    /// Whether projector and predictor are among the tensors.
    pub heads: bool,
    /// The tensors under `state_dict` names, in PyTorch's layouts.
    pub tensors: NamedTensors,
}

impl Source {
    /// Opens the newest checkpoint of a run directory, a checkpoint file in one, or an imported checkpoint; takes the backbone,
    /// and the heads if asked for.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] for what cannot be read or is not what it should be.
    pub fn open(path: &Path, heads: bool) -> Result<Source> {
        let trained = open(path)?;
        let history = trained.history();
        let Trained { model, augment, origin, mut checkpoint } = trained;
        let EvalGraph { params, .. } = model.eval_graph(1, augment.image_size, DType::F32, heads)?;
        let mut tensors = NamedTensors::new();
        for param in &params {
            let expected = TensorDesc { shape: param.torch_shape(), dtype: param.desc.dtype };
            tensors.insert(param.name.clone(), checkpoint.take(&param.name, &expected)?);
        }
        if let Some((name, _)) =
            tensors.iter().find(|(_, tensor)| !tensor.to_f64().iter().all(|value| value.is_finite()))
        {
            let what = format!("tensor {name} is not finite: the network is of no use");
            return Err(Error::format(checkpoint.path(), None, what).with_hint("export an older checkpoint of the run"));
        }
        let (step, dataset) = (checkpoint.state.step, checkpoint.state.dataset);
        let metrics = match &origin {
            Origin::Run(folder, _) if folder.join(METRICS).exists() => metrics::read(&folder.join(METRICS))?,
            _ => Vec::new(),
        };
        let metrics = metrics.into_iter().filter(|line| line.step < step).collect();
        Ok(Source { model, augment, origin, history, step, dataset, metrics, heads, tensors })
    }

    /// How many numbers were trained, or could have been: buffers do not count.
    pub fn parameters(&self) -> usize {
        let is_buffer =
            |name: &str| [".running_mean", ".running_var", ".num_batches_tracked"].iter().any(|b| name.ends_with(b));
        self.tensors.iter().filter(|(name, _)| !is_buffer(name)).map(|(_, tensor)| tensor.desc().shape.len()).sum()
    }
}
