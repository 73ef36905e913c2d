//! The projector and the predictor, named as PyTorch's `Sequential` numbers them.

use crate::error::{Error, Result};
use crate::graph::ValueId;
use crate::nn::builder::{Builder, Norm};
use crate::ops::relu::Relu;

/// Where the heads have batch norm (paper, table 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HeadNorm {
    /// Nowhere.
    None,
    /// After hidden layers only.
    Hidden,
    /// After hidden layers, and after the projector's output.
    #[default]
    Default,
    /// Everywhere, the predictor's output included.
    All,
}

/// What predicts one view from the other (paper, table 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PredictorKind {
    /// The identity.
    None,
    /// The MLP at its random start, never trained.
    FixedRandom,
    /// The trained MLP.
    #[default]
    Mlp,
}

/// The bias of the projector's last linear layer, where a batch norm follows and subtracts it again: it changes no output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OutBias {
    /// There is none.
    #[default]
    None,
    /// It stays at its start value, as in the reference's files.
    Frozen,
    /// It is trained.
    Trained,
}

/// Both heads.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heads {
    /// Dimension of z and p.
    pub dim: usize,
    /// Hidden width of the projector.
    pub projector_hidden: usize,
    /// Hidden width of the predictor.
    pub predictor_hidden: usize,
    /// Layers of the projector: 2 or 3.
    pub projector_layers: usize,
    /// Whether the projector's last batch norm has gamma and beta (the paper's; the reference has none).
    pub projector_out_affine: bool,
    /// Whether the linear layer before that batch norm has a bias.
    pub projector_out_bias: OutBias,
    /// Where there is batch norm.
    pub norm: HeadNorm,
    /// The predictor.
    pub predictor: PredictorKind,
}

impl Heads {
    /// Checks what a user can get wrong.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn validate(&self) -> Result<()> {
        for (option, value) in [
            ("--dim", self.dim),
            ("--projector-hidden", self.projector_hidden),
            ("--predictor-hidden", self.predictor_hidden),
        ] {
            if value == 0 || value > 65_536 {
                return Err(Error::config(option, format!("expected 1 to 65536, got {value}")));
            }
        }
        if !(2..=3).contains(&self.projector_layers) {
            return Err(Error::config("--projector-layers", format!("expected 2 or 3, got {}", self.projector_layers)));
        }
        Ok(())
    }

    /// Records the projector from features to z `[n][dim]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn projector(&self, b: &mut Builder<'_>, prefix: &str, features: ValueId) -> Result<ValueId> {
        let mut x = features;
        for layer in 0..self.projector_layers - 1 {
            x = self.hidden(b, prefix, layer, x, self.projector_hidden)?;
        }
        let index = (self.projector_layers - 1) * 3;
        let normed = matches!(self.norm, HeadNorm::Default | HeadNorm::All);
        let bias = !normed || self.projector_out_bias != OutBias::None;
        x = b.linear(&format!("{prefix}{index}"), x, self.dim, bias)?;
        if normed {
            if self.projector_out_bias == OutBias::Frozen {
                b.freeze(&format!("{prefix}{index}.bias"));
            }
            let norm = Norm { affine: self.projector_out_affine, ..Norm::PLAIN };
            x = b.batch_norm(&format!("{prefix}{}", index + 1), x, norm)?;
        }
        Ok(x)
    }

    /// Records the predictor from z to p `[n][dim]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn predictor(&self, b: &mut Builder<'_>, prefix: &str, z: ValueId) -> Result<ValueId> {
        if self.predictor == PredictorKind::None {
            return Ok(z);
        }
        let x = self.hidden(b, prefix, 0, z, self.predictor_hidden)?;
        let normed = self.norm == HeadNorm::All;
        let x = b.linear(&format!("{prefix}3"), x, self.dim, !normed)?;
        if normed { b.batch_norm(&format!("{prefix}4"), x, Norm::PLAIN) } else { Ok(x) }
    }

    /// Linear, batch norm, ReLU; a bias takes the place of a batch norm that is left out.
    fn hidden(&self, b: &mut Builder<'_>, prefix: &str, layer: usize, x: ValueId, width: usize) -> Result<ValueId> {
        let normed = self.norm != HeadNorm::None;
        let x = b.linear(&format!("{prefix}{}", layer * 3), x, width, !normed)?;
        if normed {
            return b.batch_norm(&format!("{prefix}{}", layer * 3 + 1), x, Norm::RELU);
        }
        b.tape.scoped(&format!("{prefix}{}", layer * 3 + 2), |tape| tape.record_one(Relu, &[x]))
    }
}
