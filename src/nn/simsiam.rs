//! SimSiam (Chen and He 2021): two views, one encoder, a predictor, a stop-gradient.

use crate::error::{Error, Result};
use crate::graph::builtin::Constant;
use crate::graph::recompute::recompute;
use crate::graph::{Role, Tape, ValueId, backward};
use crate::nn::builder::{Builder, Mode};
use crate::nn::epilogues::Epilogues;
use crate::nn::heads::Heads;
use crate::nn::params::{Init, ParamGroup, ParamInfo};
use crate::nn::resnet::ResNet;
use crate::nn::views::{Recorded, Views};
use crate::ops::augment::{AugmentViews, Augmentation};
use crate::ops::conv2d::gradient_dtype;
use crate::ops::cosine_loss::CosineLoss;
use crate::ops::loss_scale::{LossScaleUpdate, LossScaling};
use crate::ops::pad_channels::PadChannels;
use crate::ops::sgd::{Guard, SgdUpdate, StepParam};
use crate::ops::similarity::{Kind, Similarity};
use crate::ops::z_std::ZStd;
use crate::tensor::{DType, TensorDesc};

/// The whole model and the method's switches.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SimSiam {
    /// The backbone.
    pub backbone: ResNet,
    /// Projector and predictor.
    pub heads: Heads,
    /// The distance between prediction and target.
    pub similarity: Kind,
    /// Whether the target is a constant. Without it the solution collapses.
    pub stop_gradient: bool,
    /// Whether both views predict each other, or only view 1 predicts view 2.
    pub symmetric: bool,
}

/// Name of the loss's scale, and prefix of the names of all that belongs to it.
pub const LOSS_SCALE: &str = "loss_scale";

/// Where the views of a step come from.
#[derive(Debug, Clone)]
pub enum ViewSource {
    /// The caller writes them, normalised, in 3 channels.
    Given {
        /// Whether the network sees them in [`ResNet::padded_channels`].
        padded: bool,
    },
    /// The step makes them of stored images, as `augmentation` says: the caller writes pixels and descriptors.
    Stored {
        /// How.
        augmentation: Augmentation,
        /// Room for the pixels of a batch, in bytes.
        pixel_bytes: usize,
    },
}

/// What a step takes besides the model.
#[derive(Debug, Clone)]
pub struct StepShape {
    /// Source images; each gives two views.
    pub batch: usize,
    /// Height and width of a view.
    pub image_size: usize,
    /// Element type of the activations.
    pub dtype: DType,
    /// Whether the parameters' gradients stay readable after the step.
    pub keep_gradients: bool,
    /// Where the views come from.
    pub source: ViewSource,
    /// How the loss is scaled against underflow, if it is.
    pub scaling: Option<LossScaling>,
    /// What is fused with convolutions.
    pub epilogues: Epilogues,
    /// Whether the views go through the network together.
    pub views: Views,
}

impl StepShape {
    /// A step that keeps no gradients, fuses nothing, has the views together, and scales the loss in float16.
    pub fn new(batch: usize, image_size: usize, dtype: DType, source: ViewSource) -> StepShape {
        let scaling = (dtype == DType::F16).then(LossScaling::default);
        let (epilogues, views) = (Epilogues::default(), Views::default());
        StepShape { batch, image_size, dtype, keep_gradients: false, source, scaling, epilogues, views }
    }
}

/// Inputs that views are made of, see [`ViewSource::Stored`].
#[derive(Debug, Clone, Copy)]
pub struct StoredInputs {
    /// The pixels of all images.
    pub pixels: ValueId,
    /// A `ViewDescriptor` for each view.
    pub descriptors: ValueId,
}

/// A recorded training step.
#[derive(Debug)]
pub struct TrainGraph {
    /// The tape: forward, backward, update.
    pub tape: Tape,
    /// Both views, view 1 of every image first: an input `[2n][h][w][3]`, or what is made of `stored`.
    pub views: ValueId,
    /// Inputs that the views are made of, where they are no input themselves.
    pub stored: Option<StoredInputs>,
    /// Input: learning rates and the like, indexed by [`StepParam`].
    pub step_params: ValueId,
    /// Scalar loss before the update.
    pub loss: ValueId,
    /// Scalar z std (see [`ZStd`]).
    pub z_std: ValueId,
    /// z of both views, `[2n][dim]`.
    pub z: ValueId,
    /// Parameters and buffers under PyTorch names.
    pub params: Vec<ParamInfo>,
    /// Momentum buffers of the trainable parameters: name and value.
    pub momenta: Vec<(String, ValueId)>,
    /// Gradients of the trainable parameters, in the same order; times the loss scale, if there is one.
    pub gradients: Vec<(String, ValueId)>,
    /// The scalar that scales the loss of the next step, if gradients are scaled. It is among `params`.
    pub loss_scale: Option<ValueId>,
}

/// A place in the network whose outputs serve as features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Layer {
    /// The backbone's pooled feature: what other tasks use.
    #[default]
    Pooled,
    /// The projector's output z.
    Projector,
}

/// A recorded forward pass in evaluation mode.
#[derive(Debug)]
pub struct FeatureGraph {
    /// The tape.
    pub tape: Tape,
    /// Input: images `[n][h][w][3]`, normalised.
    pub images: ValueId,
    /// Output: features `[n][dim]` of the layer that was asked for.
    pub features: ValueId,
    /// Parameters and buffers up to there under PyTorch names.
    pub params: Vec<ParamInfo>,
}

/// A recorded forward pass in evaluation mode, to the heads if wished.
#[derive(Debug)]
pub struct EvalGraph {
    /// The tape.
    pub tape: Tape,
    /// Input: images `[n][h][w][3]`, normalised.
    pub images: ValueId,
    /// Outputs by name: `features` `[n][feature_dim]`; with heads `projection` (z) `[n][dim]`, and `prediction` (p) `[n][dim]`
    /// where there is a predictor.
    pub outputs: Vec<(&'static str, ValueId)>,
    /// Parameters and buffers under PyTorch names.
    pub params: Vec<ParamInfo>,
}

impl SimSiam {
    /// Checks what a user can get wrong.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn validate(&self) -> Result<()> {
        self.backbone.validate()?;
        self.heads.validate()
    }

    /// Records one training step for `batch` images of `image_size` pixels. With `keep_gradients` the parameters' gradients
    /// stay readable after the step. In float16, whose range gradients leave, the loss is scaled as PyTorch's `GradScaler`
    /// does by default.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn train_graph(
        &self,
        batch: usize,
        image_size: usize,
        dtype: DType,
        keep_gradients: bool,
    ) -> Result<TrainGraph> {
        let source = ViewSource::Given { padded: false };
        self.record_step(&StepShape { keep_gradients, ..StepShape::new(batch, image_size, dtype, source) })
    }

    /// Records one training step.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn record_step(&self, shape: &StepShape) -> Result<TrainGraph> {
        let &StepShape { batch, dtype, keep_gradients, scaling, .. } = shape;
        self.validate()?;
        if batch < 2 {
            return Err(Error::config(
                "--batch",
                format!("expected at least 2 images (batch norm needs them), got {batch}"),
            ));
        }
        let mut tape = Tape::new();
        let (views, stored) = record_views(&mut tape, shape, 2 * shape.batch)?;
        let step_params = tape.leaf("step_params", StepParam::desc(), Role::Input, false);
        let scaler = scaling.map(|scaling| Scaler::record(&mut tape, scaling, dtype));
        let d_loss = record_seed(&mut tape, scaler.as_ref(), dtype)?;
        let mut b = Builder::new(&mut tape, Mode::Train { groups: 2 }, dtype);
        b.epilogues = shape.epilogues.clone();
        let Recorded { p, z, repeated } = self.record_pair(&mut b, shape, views)?;
        let mut params = b.params;
        let [loss, z_std] = self.record_loss(&mut tape, [p, z], batch, d_loss)?;
        for kept in [loss, z, z_std] {
            tape.keep(kept);
        }
        let seed = (loss, d_loss);
        let (momenta, gradients) =
            record_update(&mut tape, seed, step_params, &params, keep_gradients, scaler.as_ref())?;
        shape.epilogues.check(&tape)?;
        recompute(&mut tape, &repeated)?;
        let loss_scale = scaler.as_ref().map(Scaler::scale);
        params.extend(scaler.into_iter().flat_map(|scaler| scaler.state));
        Ok(TrainGraph { tape, views, stored, step_params, loss, z_std, z, params, momenta, gradients, loss_scale })
    }

    /// Loss and z std.
    fn record_loss(
        &self,
        tape: &mut Tape,
        [p, z]: [ValueId; 2],
        batch: usize,
        d_loss: ValueId,
    ) -> Result<[ValueId; 2]> {
        let target = if self.stop_gradient { tape.scoped("target", |tape| tape.stop_gradient(z))? } else { z };
        if self.stop_gradient && self.similarity == Kind::Cosine {
            let fused = CosineLoss { z_shift: batch };
            let outputs = tape.scoped("loss", |tape| tape.record(fused, &[p, target, d_loss]))?;
            return Ok([outputs[0], outputs[1]]);
        }
        let similarity = Similarity { kind: self.similarity, z_shift: batch };
        let loss = tape.scoped("loss", |tape| tape.record_one(similarity, &[p, target]))?;
        Ok([loss, tape.scoped("z_std", |tape| tape.record_one(ZStd, &[z]))?])
    }

    /// Records the backbone in evaluation mode for `batch` images.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn feature_graph(&self, batch: usize, image_size: usize, dtype: DType) -> Result<FeatureGraph> {
        self.record_features(batch, image_size, dtype, false)
    }

    /// The same; with `padded` the network sees the images in [`ResNet::padded_channels`].
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn record_features(&self, batch: usize, image_size: usize, dtype: DType, padded: bool) -> Result<FeatureGraph> {
        self.record_layer(Layer::Pooled, batch, image_size, dtype, padded)
    }

    /// The same with the outputs of `layer` as features.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn record_layer(
        &self,
        layer: Layer,
        batch: usize,
        image_size: usize,
        dtype: DType,
        padded: bool,
    ) -> Result<FeatureGraph> {
        self.validate()?;
        let mut tape = Tape::new();
        let images = TensorDesc::new([batch, image_size, image_size, 3], dtype);
        let images = tape.leaf("images", images, Role::Input, false);
        let mut b = Builder::new(&mut tape, Mode::Eval, dtype);
        let seen = if padded { pad(&mut b, &self.backbone, images)? } else { images };
        let mut features = self.backbone.record(&mut b, "encoder.", seen)?;
        if layer == Layer::Projector {
            features = self.heads.projector(&mut b, "encoder.fc.", features)?;
        }
        let params = b.params;
        tape.keep(features);
        Ok(FeatureGraph { tape, images, features, params })
    }

    /// Records the network in evaluation mode for `batch` images, with projector and predictor if `heads`.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub fn eval_graph(&self, batch: usize, image_size: usize, dtype: DType, heads: bool) -> Result<EvalGraph> {
        self.validate()?;
        let mut tape = Tape::new();
        let images = TensorDesc::new([batch, image_size, image_size, 3], dtype);
        let images = tape.leaf("images", images, Role::Input, false);
        let mut b = Builder::new(&mut tape, Mode::Eval, dtype);
        let features = self.backbone.record(&mut b, "encoder.", images)?;
        let mut outputs = vec![("features", features)];
        if heads {
            let z = self.heads.projector(&mut b, "encoder.fc.", features)?;
            outputs.push(("projection", z));
            let p = self.heads.predictor(&mut b, "predictor.", z)?;
            outputs.extend((p != z).then_some(("prediction", p)));
        }
        let params = b.params;
        outputs.iter().for_each(|(_, value)| _ = tape.keep(*value));
        Ok(EvalGraph { tape, images, outputs, params })
    }
}

/// Images in the [`ResNet::padded_channels`] of `backbone`.
pub(super) fn pad(b: &mut Builder<'_>, backbone: &ResNet, images: ValueId) -> Result<ValueId> {
    let channels = backbone.padded_channels(b.dtype());
    b.tape.scoped("pad", |tape| tape.record_one(PadChannels { channels }, &[images]))
}

/// A number of views, and the inputs that they are made of.
pub(super) fn record_views(
    tape: &mut Tape,
    shape: &StepShape,
    views: usize,
) -> Result<(ValueId, Option<StoredInputs>)> {
    let size = shape.image_size;
    let ViewSource::Stored { augmentation, pixel_bytes } = &shape.source else {
        let desc = TensorDesc::new([views, size, size, 3], shape.dtype);
        return Ok((tape.leaf("views", desc, Role::Input, false), None));
    };
    let op = AugmentViews { augmentation: augmentation.clone(), views, pixel_bytes: *pixel_bytes };
    let [pixels, descriptors] = op.inputs();
    let pixels = tape.leaf("pixels", pixels, Role::Input, false);
    let descriptors = tape.leaf("descriptors", descriptors, Role::Input, false);
    let views = tape.scoped("views", |tape| tape.record_one(op, &[pixels, descriptors]))?;
    Ok((views, Some(StoredInputs { pixels, descriptors })))
}

/// The gradient of the loss: 1, or its scale.
pub(super) fn record_seed(tape: &mut Tape, scaler: Option<&Scaler>, dtype: DType) -> Result<ValueId> {
    match scaler {
        Some(scaler) => Ok(scaler.scale()),
        None => {
            let seed = Constant { value: 1.0, dtype: gradient_dtype(dtype) };
            tape.scoped("d_loss", |tape| tape.record_one(seed, &[]))
        }
    }
}

/// The state of a loss scaling on the tape.
#[derive(Debug)]
pub(super) struct Scaler {
    scaling: LossScaling,
    /// The scale, and good steps since it changed.
    pub(super) state: [ParamInfo; 2],
}

impl Scaler {
    pub(super) fn record(tape: &mut Tape, scaling: LossScaling, dtype: DType) -> Scaler {
        let mut leaf = |name: &str, dtype, start| {
            let desc = TensorDesc::new([], dtype);
            let value = tape.leaf(name, desc.clone(), Role::State, false);
            let (group, init) = (ParamGroup::Encoder, Init::Constant(start));
            ParamInfo { name: name.into(), value, desc, trainable: false, group, init }
        };
        let scale = leaf(LOSS_SCALE, gradient_dtype(dtype), scaling.init);
        Scaler { scaling, state: [scale, leaf(&format!("{LOSS_SCALE}.good_steps"), DType::I64, 0.0)] }
    }

    pub(super) fn scale(&self) -> ValueId {
        self.state[0].value
    }

    /// Appends the change of the scale; returns what gradients are to be multiplied by.
    fn update(&self, tape: &mut Tape, loss: ValueId, gradients: &Named) -> Result<ValueId> {
        let inputs: Vec<ValueId> = [loss].into_iter().chain(gradients.iter().map(|(_, g)| *g)).collect();
        let op = LossScaleUpdate { scaling: self.scaling };
        let state = self.state.each_ref().map(|s| s.value);
        Ok(tape.scoped("loss_scale", |tape| tape.update(op, &inputs, &state))?[0])
    }
}

/// Named values of a graph.
pub(super) type Named = Vec<(String, ValueId)>;

/// Appends the backward pass and the optimiser; returns momenta and gradients of the trainable parameters.
pub(super) fn record_update(
    tape: &mut Tape,
    (loss, d_loss): (ValueId, ValueId),
    step_params: ValueId,
    params: &[ParamInfo],
    keep_gradients: bool,
    scaler: Option<&Scaler>,
) -> Result<(Named, Named)> {
    let all = backward(tape, &[(loss, d_loss)])?;
    let trained: Vec<&ParamInfo> = params.iter().filter(|p| p.trainable && all.contains_key(&p.value)).collect();
    let gradients: Named = trained.iter().map(|p| (p.name.clone(), all[&p.value])).collect();
    if keep_gradients {
        gradients.iter().for_each(|(_, g)| _ = tape.keep(*g));
    }
    let momenta: Named = trained
        .iter()
        .map(|p| (p.name.clone(), tape.leaf(&format!("momentum/{}", p.name), p.desc.clone(), Role::Optimiser, false)))
        .collect();
    let lr = trained.iter().map(|p| match p.group {
        ParamGroup::Encoder => StepParam::Lr,
        ParamGroup::Predictor => StepParam::PredictorLr,
    });
    let (guard, guarded) = match scaler {
        Some(scaler) => (Guard::Unscale, scaler.update(tape, loss, &gradients)?),
        None => (Guard::Finite, loss),
    };
    let op = SgdUpdate { lr: lr.collect(), guard };
    let gradient_values = gradients.iter().map(|(_, g)| *g);
    let inputs: Vec<ValueId> = [step_params].into_iter().chain(gradient_values).chain([guarded]).collect();
    let updates: Vec<ValueId> = trained.iter().map(|p| p.value).chain(momenta.iter().map(|(_, v)| *v)).collect();
    tape.scoped("sgd", |tape| tape.update(op, &inputs, &updates))?;
    Ok((momenta, gradients))
}
