//! Weights from elsewhere: files of `torch.save` (torchvision, timm, checkpoints in the layout of SimSiam's reference release),
//! safetensors files and the engine's own checkpoints, as parameters under the engine's names. Nothing in a file is executed.
//!
//! ```text
//! zip, pickle, globals -> torch --+
//!                     safetensors --+-> Foreign (names as in the file) -> names -> network -> fit -> Weights and Report
//!                 own checkpoints --+
//! ```

pub mod fit;
pub mod foreign;
pub mod globals;
pub mod names;
pub mod network;
pub mod pickle;
pub mod report;
pub mod torch;
pub mod zip;

use serde::{Deserialize, Serialize};

pub use fit::{Weights, adopt_bias, complete, fit};
pub use foreign::{Foreign, open};
pub use network::Network;
pub use report::Report;

use crate::train::trained::Imported;

/// What kind of file weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `torch.save` since PyTorch 1.6.
    Torch,
    /// `torch.save` before that.
    TorchLegacy,
    /// A safetensors file.
    Safetensors,
    /// A checkpoint of this engine.
    Checkpoint,
}

impl Format {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Format::Torch => "PyTorch",
            Format::TorchLegacy => "PyTorch, legacy format",
            Format::Safetensors => "safetensors",
            Format::Checkpoint => "checkpoint of this engine",
        }
    }
}

/// What an imported checkpoint knows of the training that it comes from, beside its tensors; of a run's own checkpoint it is
/// the part that matters here.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Steps of this engine's runs; 0 in an imported checkpoint.
    #[serde(default)]
    pub step: u64,
    /// Epochs done, where the file said so.
    #[serde(default)]
    pub epoch: Option<u64>,
    /// The optimiser's settings, where there were momenta.
    #[serde(default)]
    pub optimiser: Option<OptimiserFacts>,
    /// The network and its images, which a run has in its configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub imported: Option<Imported>,
}

/// The settings of SGD in a file, for comparison with a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimiserFacts {
    /// Learning rates of the groups of parameters.
    pub lr: Vec<f64>,
    /// Momentum.
    pub momentum: f64,
    /// Weight decay.
    pub weight_decay: f64,
}
