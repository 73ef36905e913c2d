//! A ResNet with a linear classifier on its pooled feature: what a pretrained backbone is fine-tuned as.

use crate::error::{Error, Result};
use crate::graph::{Role, Tape, ValueId};
use crate::nn::builder::{Builder, Mode};
use crate::nn::params::{Init, ParamGroup, ParamInfo};
use crate::nn::resnet::ResNet;
use crate::nn::simsiam::{
    Named, Scaler, StepShape, StoredInputs, ViewSource, pad, record_seed, record_update, record_views,
};
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::sgd::StepParam;
use crate::tensor::{DType, TensorDesc};

/// The head's name, torchvision's.
pub const HEAD: &str = "fc";
/// Standard deviation of the head's start weights; its bias starts at 0.
const HEAD_STD: f64 = 0.01;

/// The network. Its tensors have torchvision's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classifier {
    /// The backbone.
    pub backbone: ResNet,
    /// Classes that are told apart.
    pub classes: usize,
    /// How many of [`ResNet::layers`] are constants, with their batch norm in evaluation mode; the head never is.
    pub frozen: usize,
}

/// A recorded training step: one view of every image, cross-entropy against its label.
#[derive(Debug)]
pub struct ClassifierGraph {
    /// The tape: forward, backward, update.
    pub tape: Tape,
    /// The views `[n][h][w][3]`: an input, or what is made of `stored`.
    pub views: ValueId,
    /// Inputs that the views are made of, where they are no input themselves.
    pub stored: Option<StoredInputs>,
    /// Input: the class of every image, `[n]` (I64).
    pub labels: ValueId,
    /// Input: learning rates and the like, indexed by [`StepParam`]; the head takes that of the predictor.
    pub step_params: ValueId,
    /// Scalar loss before the update.
    pub loss: ValueId,
    /// Images whose class comes first, and whose class is among the first five, `[2]` (I64).
    pub correct: ValueId,
    /// Parameters and buffers under torchvision's names.
    pub params: Vec<ParamInfo>,
    /// Momentum buffers of the trainable parameters: name and value.
    pub momenta: Named,
    /// Gradients of the trainable parameters, in the same order; times the loss scale, if there is one.
    pub gradients: Named,
    /// The scalar that scales the loss of the next step, if gradients are scaled. It is among `params`.
    pub loss_scale: Option<ValueId>,
}

/// A recorded forward pass in evaluation mode.
#[derive(Debug)]
pub struct LogitGraph {
    /// The tape.
    pub tape: Tape,
    /// Input: images `[n][h][w][3]`, normalised.
    pub images: ValueId,
    /// Output: logits `[n][classes]`.
    pub logits: ValueId,
    /// Parameters and buffers under torchvision's names.
    pub params: Vec<ParamInfo>,
}

impl Classifier {
    /// The layers that training can begin at: those of the backbone, and the head.
    pub fn layers(backbone: &ResNet) -> Vec<String> {
        backbone.layers().into_iter().chain([HEAD.to_string()]).collect()
    }

    /// Records one training step.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn record_step(&self, shape: &StepShape) -> Result<ClassifierGraph> {
        let &StepShape { batch, dtype, keep_gradients, scaling, .. } = shape;
        self.backbone.validate()?;
        if batch < 2 {
            let what = format!("expected at least 2 images (batch norm needs them), got {batch}");
            return Err(Error::config("--batch", what));
        }
        let mut tape = Tape::new();
        let (views, stored) = record_views(&mut tape, shape, batch)?;
        let labels = tape.leaf("labels", TensorDesc::new([batch], DType::I64), Role::Input, false);
        let step_params = tape.leaf("step_params", StepParam::desc(), Role::Input, false);
        let scaler = scaling.map(|scaling| Scaler::record(&mut tape, scaling, dtype));
        let d_loss = record_seed(&mut tape, scaler.as_ref(), dtype)?;
        let mut b = Builder::new(&mut tape, Mode::Train { groups: 1 }, dtype);
        b.epilogues = shape.epilogues.clone();
        let images = match shape.source {
            ViewSource::Given { padded: true } => pad(&mut b, &self.backbone, views)?,
            _ => views,
        };
        let logits = self.record(&mut b, images)?;
        let mut params = b.params;
        let outputs = tape.scoped("loss", |tape| tape.record(CrossEntropy, &[logits, labels]))?;
        let [loss, correct] = [tape.keep(outputs[0]), tape.keep(outputs[1])];
        let (momenta, gradients) =
            record_update(&mut tape, (loss, d_loss), step_params, &params, keep_gradients, scaler.as_ref())?;
        shape.epilogues.check(&tape)?;
        let loss_scale = scaler.as_ref().map(Scaler::scale);
        params.extend(scaler.into_iter().flat_map(|scaler| scaler.state));
        let graph = ClassifierGraph {
            tape,
            views,
            stored,
            labels,
            step_params,
            loss,
            correct,
            params,
            momenta,
            gradients,
            loss_scale,
        };
        Ok(graph)
    }

    /// Records the network in evaluation mode for `batch` images; with `padded` it sees them in
    /// [`ResNet::padded_channels`].
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn record_logits(&self, batch: usize, image_size: usize, dtype: DType, padded: bool) -> Result<LogitGraph> {
        self.backbone.validate()?;
        let mut tape = Tape::new();
        let images = TensorDesc::new([batch, image_size, image_size, 3], dtype);
        let images = tape.leaf("images", images, Role::Input, false);
        let mut b = Builder::new(&mut tape, Mode::Eval, dtype);
        let seen = if padded { pad(&mut b, &self.backbone, images)? } else { images };
        let logits = self.record(&mut b, seen)?;
        let params = b.params;
        tape.keep(logits);
        Ok(LogitGraph { tape, images, logits, params })
    }

    fn record(&self, b: &mut Builder<'_>, images: ValueId) -> Result<ValueId> {
        let features = self.backbone.record_frozen(b, "", images, self.frozen)?;
        b.group = ParamGroup::Predictor;
        let head = b.params.len();
        let logits = b.linear(HEAD, features, self.classes, true)?;
        for (param, init) in b.params[head..].iter_mut().zip([Init::Normal(HEAD_STD), Init::Constant(0.0)]) {
            param.init = init;
        }
        Ok(logits)
    }
}
