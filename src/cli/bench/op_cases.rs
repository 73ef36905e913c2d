//! What `bench ops` measures: each case a tape with one op and its gradient.

use clap::Parser;

use crate::cli::model_args::ModelArgs;
use crate::cli::preset::Preset;
use crate::error::Result;
use crate::graph::{Op, Role, Tape, ValueId, backward, builtin};
use crate::ops::batch_norm::pair::BatchNormPair;
use crate::ops::batch_norm::{BatchNorm, BatchNormStatistics, Fusion, channel_desc};
use crate::ops::cast::Cast;
use crate::ops::conv2d::stem::image_channels;
use crate::ops::conv2d::{Conv2d, gradient_dtype};
use crate::ops::cosine_loss::CosineLoss;
use crate::ops::pool::{GlobalAvgPool, MaxPool};
use crate::ops::sgd::{Guard, SgdUpdate, StepParam};
use crate::ops::similarity::{Kind, Similarity};
use crate::ops::z_std::ZStd;
use crate::tensor::{DType, TensorDesc};

/// One op at one shape.
pub(super) struct Case {
    pub name: String,
    pub shape: String,
    /// Records it.
    pub make: Box<dyn Fn() -> Result<Tape>>,
}

impl Case {
    fn new(name: &str, shape: &[usize], make: impl Fn() -> Result<Tape> + 'static) -> Case {
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        Case { name: name.into(), shape, make: Box::new(make) }
    }
}

/// The cases for `batch` images with activations of `dtype`: the largest, a middle and the smallest shape of each kind that
/// ResNet-50 has at 224 pixels.
pub(super) fn all(batch: usize, dtype: DType) -> Result<Vec<Case>> {
    let views = 2 * batch;
    let mut cases = Vec::new();
    for (shape, residual) in [
        ([views, 112, 112, 64], false),
        ([views, 56, 56, 64], false),
        ([views, 56, 56, 256], true),
        ([views, 14, 14, 256], false),
        ([views, 14, 14, 1024], true),
        ([views, 7, 7, 2048], true),
        ([views, 1, 1, 2048], false),
    ] {
        cases.push(batch_norm(shape, residual, dtype));
    }
    cases.push(batch_norm_pair([views, 56, 56, 256], dtype));
    if dtype != DType::F32 {
        cases.push(stem_convolution(views, dtype)); // in float32 it is the library's
    }
    let pool = MaxPool { kernel: 3, stride: 2, padding: 1, taken: true };
    cases.push(simple("max_pool", pool, vec![vec![views, 112, 112, 64]], dtype));
    cases.push(simple("global_avg_pool", GlobalAvgPool, vec![vec![views, 7, 7, 2048]], dtype));
    let wide = vec![views, 56, 56, 256];
    cases.push(simple("add", builtin::Add, vec![wide.clone(), wide], dtype));
    let heads = vec![views, 2048];
    for (name, kind) in [("negative_cosine", Kind::Cosine), ("softmax_xent", Kind::SoftmaxXent)] {
        cases.push(simple(name, Similarity { kind, z_shift: batch }, vec![heads.clone(), heads.clone()], dtype));
    }
    cases.push(simple("z_std", ZStd, vec![heads.clone()], dtype));
    cases.push(cosine_loss(heads, batch, dtype));
    if dtype != DType::F32 {
        cases.push(simple("cast", Cast { to: dtype }, vec![vec![25_557_032]], DType::F32));
    }
    cases.push(sgd()?);
    Ok(cases)
}

/// An op over activations, with gradients where it has them.
fn simple(name: &'static str, op: impl Op + Copy + 'static, shapes: Vec<Vec<usize>>, dtype: DType) -> Case {
    let shape = shapes[0].clone();
    Case::new(name, &shape, move || {
        let mut tape = Tape::new();
        let leaf = |shape: &Vec<usize>| tape.leaf("x", TensorDesc::new(&shape[..], dtype), Role::Input, true);
        let inputs: Vec<_> = shapes.iter().map(leaf).collect();
        let y = tape.record_one(op, &inputs)?;
        if op.differentiable() {
            seed(&mut tape, y)?;
        }
        Ok(tape)
    })
}

/// ResNet's first convolution, whose images have no gradient.
fn stem_convolution(views: usize, dtype: DType) -> Case {
    let (op, kernel, c_out) = (Conv2d::new([2; 2], [3; 2]), [7; 2], 64);
    let channels = image_channels(&op, kernel, c_out, dtype);
    let shape = [views, 224, 224, channels];
    Case::new("stem_convolution", &shape, move || {
        let mut tape = Tape::new();
        let x = tape.leaf("x", TensorDesc::new(shape, dtype), Role::Input, false);
        let w = tape.leaf("w", TensorDesc::new([c_out, 7, 7, channels], dtype), Role::Input, true);
        let y = tape.record_one(op, &[x, w])?;
        seed(&mut tape, y)?;
        Ok(tape)
    })
}

/// Records the backward pass from an upstream gradient of `y`.
fn seed(tape: &mut Tape, y: crate::graph::ValueId) -> Result<()> {
    let d_y = tape.leaf("d_y", tape.desc(y).clone(), Role::Input, false);
    backward(tape, &[(y, d_y)]).map(|_| ())
}

/// The loss of a step: its gradient comes with it.
fn cosine_loss(shape: Vec<usize>, z_shift: usize, dtype: DType) -> Case {
    Case::new("cosine_loss", &shape.clone(), move || {
        let mut tape = Tape::new();
        let desc = TensorDesc::new(&shape[..], dtype);
        let p = tape.leaf("p", desc.clone(), Role::Input, false);
        let z = tape.leaf("z", desc, Role::Input, false);
        let d_loss = tape.leaf("d_loss", TensorDesc::new([], gradient_dtype(dtype)), Role::Input, false);
        tape.record(CosineLoss { z_shift }, &[p, z, d_loss])?;
        Ok(tape)
    })
}

/// With ReLU, in two groups.
fn batch_norm(shape: [usize; 4], residual: bool, dtype: DType) -> Case {
    let name = if residual { "batch_norm+add+relu" } else { "batch_norm+relu" };
    Case::new(name, &shape, move || {
        let mut tape = Tape::new();
        let channel = channel_desc(shape[3], dtype);
        let mut inputs = vec![tape.leaf("x", TensorDesc::new(shape, dtype), Role::Input, true)];
        for name in ["gamma", "beta"] {
            inputs.push(tape.leaf(name, channel.clone(), Role::Parameter, true));
        }
        if residual {
            inputs.push(tape.leaf("residual", TensorDesc::new(shape, dtype), Role::Input, true));
        }
        let running = running_statistics(&mut tape, &channel);
        let fusion = Fusion { affine: true, residual, relu: true };
        let op = BatchNorm { groups: 2, eps: 1e-5, momentum: 0.1, fusion, sums_given: false, means: false };
        let y = tape.record_updating(op, &inputs, &running)?[0];
        seed(&mut tape, y)?;
        Ok(tape)
    })
}

/// That of a block's end and that of its shortcut, in two groups.
fn batch_norm_pair(shape: [usize; 4], dtype: DType) -> Case {
    Case::new("batch_norm+batch_norm+relu", &shape, move || {
        let mut tape = Tape::new();
        let channel = channel_desc(shape[3], dtype);
        let [x, r] = ["x", "r"].map(|name| tape.leaf(name, TensorDesc::new(shape, dtype), Role::Input, true));
        let [gamma, beta, gamma_r, beta_r] =
            ["gamma", "beta", "gamma_r", "beta_r"].map(|name| tape.leaf(name, channel.clone(), Role::Parameter, true));
        let [of_x, of_r] = [0; 2].map(|_| running_statistics(&mut tape, &channel));
        let statistics = tape.record_updating(BatchNormStatistics::new(2, 1e-5, 0.1, false), &[r], &of_r)?;
        let inputs = [x, gamma, beta, r, statistics[0], statistics[1], gamma_r, beta_r];
        let y = tape.record_updating(BatchNormPair::new(2, 1e-5, 0.1, false), &inputs, &of_x)?[0];
        seed(&mut tape, y)?;
        Ok(tape)
    })
}

/// Running mean and variance, and the number of batches.
fn running_statistics(tape: &mut Tape, channel: &TensorDesc) -> [ValueId; 3] {
    let [mean, variance] = ["running_mean", "running_var"].map(|n| tape.leaf(n, channel.clone(), Role::State, false));
    [mean, variance, tape.leaf("num_batches_tracked", TensorDesc::new([], DType::I64), Role::State, false)]
}

/// The network that `train` trains when no option says otherwise.
#[derive(clap::Parser)]
struct Defaults {
    #[command(flatten)]
    model: ModelArgs,
}

/// All parameters of ResNet-50 with SimSiam's heads.
fn sgd() -> Result<Case> {
    let graph =
        Defaults::parse_from(["bench"]).model.resolve(Preset::Imagenet)?.train_graph(2, 32, DType::F32, false)?;
    let params: Vec<TensorDesc> = graph.params.into_iter().filter(|p| p.trainable).map(|p| p.desc).collect();
    let elements: usize = params.iter().map(|desc| desc.shape.len()).sum();
    Ok(Case::new("sgd", &[params.len(), elements], move || {
        let mut tape = Tape::new();
        let step_params = tape.leaf("step_params", StepParam::desc(), Role::Input, false);
        let mut leaves = |name: &str, role: Role| -> Vec<_> {
            params.iter().map(|desc| tape.leaf(name, desc.clone(), role, false)).collect()
        };
        let (gradients, weights) = (leaves("d_w", Role::Input), leaves("w", Role::Parameter));
        let momenta = leaves("v", Role::Optimiser);
        let op = SgdUpdate { lr: vec![StepParam::Lr; params.len()], guard: Guard::None };
        let inputs: Vec<_> = [step_params].into_iter().chain(gradients).collect();
        let updates: Vec<_> = weights.into_iter().chain(momenta).collect();
        tape.update(op, &inputs, &updates)?;
        Ok(tape)
    }))
}
