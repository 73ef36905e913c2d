//! Batch norm from the covariance of a 1x1 convolution's input against the convolution and batch norm after it: outputs,
//! statistics and gradients, and how precise both are at scale.

mod steps;

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::exec::Device;
use simsiam_engine::graph::{Role, Tape, ValueId, backward};
use simsiam_engine::nn::epilogues::{Epilogues, Layers};
use simsiam_engine::nn::resnet::{Block, Stem};
use simsiam_engine::nn::simsiam::{StepShape, TrainGraph, ViewSource};
use simsiam_engine::nn::views::Views;
use simsiam_engine::ops::batch_norm::{BatchNorm, Fusion, channel_desc};
use simsiam_engine::ops::conv2d::{Conv2d, gradient_dtype};
use simsiam_engine::ops::gram_norm::{self, Layer, Operands};
use simsiam_engine::ops::subsample::Subsample;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::{DType, TensorDesc};
use simsiam_engine::train::state::write_initial;
use steps::model;

fn cpu() -> Device {
    Device::Cpu(Tier::Direct)
}

#[cfg(feature = "emulator")]
fn emulated(seed: u64) -> Device {
    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
    Device::Cuda(std::sync::Arc::new(Emulator::new(Options { threads: 2, seed }).unwrap()))
}

/// How the layer is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Standard,
    Gram,
}

/// A 1x1 convolution and its batch norm.
#[derive(Debug, Clone, Copy)]
struct Case {
    /// n, h, w, c_in, c_out.
    sizes: [usize; 5],
    stride: usize,
    groups: usize,
    residual: bool,
    relu: bool,
}

const CASES: [Case; 6] = [
    Case { sizes: [6, 7, 5, 8, 32], stride: 1, groups: 2, residual: true, relu: true },
    Case { sizes: [6, 9, 6, 3, 7], stride: 2, groups: 3, residual: false, relu: false },
    Case { sizes: [4, 5, 8, 24, 40], stride: 1, groups: 2, residual: false, relu: true },
    Case { sizes: [5, 11, 3, 5, 9], stride: 3, groups: 1, residual: true, relu: false },
    Case { sizes: [2, 3, 2, 2, 4], stride: 1, groups: 1, residual: true, relu: true },
    // Parts of each group are summed apart.
    Case { sizes: [4, 52, 50, 6, 11], stride: 1, groups: 2, residual: true, relu: true },
];

type Named = Vec<(&'static str, Vec<f64>)>;

/// The leaves of a case in the order of their random streams.
struct Recorded {
    tape: Tape,
    leaves: Vec<ValueId>,
    running: [ValueId; 3],
    y: ValueId,
}

impl Case {
    fn record(&self, route: Route, dtype: DType) -> Recorded {
        self.record_with(route, dtype, 0.1)
    }

    fn record_with(&self, route: Route, dtype: DType, momentum: f64) -> Recorded {
        let [n, h, w, c_in, c_out] = self.sizes;
        let mut tape = Tape::new();
        let out = [h, w].map(|side| side.div_ceil(self.stride));
        let x = tape.leaf("x", TensorDesc::new([n, h, w, c_in], dtype), Role::Input, true);
        let master = gradient_dtype(dtype);
        let weight_type = if route == Route::Gram { master } else { dtype };
        let weight = tape.leaf("w", TensorDesc::new([c_out, 1, 1, c_in], weight_type), Role::Input, true);
        let parameter = channel_desc(c_out, dtype);
        let [gamma, beta] = ["gamma", "beta"].map(|name| tape.leaf(name, parameter.clone(), Role::Input, true));
        let [mean, var] = ["running_mean", "running_var"].map(|n| tape.leaf(n, parameter.clone(), Role::State, false));
        let tracked = tape.leaf("num_batches_tracked", TensorDesc::new([], DType::I64), Role::State, false);
        let like_y = TensorDesc::new([n, out[0], out[1], c_out], dtype);
        let residual = self.residual.then(|| tape.leaf("residual", like_y, Role::Input, true));
        let running = [mean, var, tracked];
        let (groups, eps, relu) = (self.groups, 1e-5, self.relu);
        let y = match route {
            Route::Standard => {
                let y = tape.record_one(Conv2d::new([self.stride; 2], [0; 2]), &[x, weight]).unwrap();
                let fusion = Fusion { affine: true, residual: self.residual, relu };
                let op = BatchNorm { groups, eps, momentum, fusion, sums_given: false, means: false };
                let inputs: Vec<ValueId> = [y, gamma, beta].into_iter().chain(residual).collect();
                tape.record_updating(op, &inputs, &running).unwrap()[0]
            }
            Route::Gram => {
                let z = match self.stride {
                    1 => x,
                    stride => tape.record_one(Subsample { stride }, &[x]).unwrap(),
                };
                let layer = Layer { groups, eps, momentum, relu };
                let operands = Operands { z, mean: None, w: weight, gamma, beta, residual, running };
                gram_norm::record(&mut tape, layer, &operands).unwrap()
            }
        };
        let leaves = [x, weight, gamma, beta, mean, var].into_iter().chain(residual).collect();
        Recorded { tape, leaves, running, y }
    }

    /// Output, running statistics and gradients.
    fn compute(&self, device: &Device, route: Route, dtype: DType) -> Named {
        let Recorded { mut tape, mut leaves, running, y } = self.record(route, dtype);
        let d_y = tape.leaf("d_y", tape.desc(y).clone(), Role::Input, false);
        let gradients = backward(&mut tape, &[(y, d_y)]).unwrap();
        let mut named = vec![("y", y), ("running_mean", running[0]), ("running_var", running[1])];
        for (name, leaf) in [("d_x", 0), ("d_w", 1), ("d_gamma", 2), ("d_beta", 3), ("d_residual", 6)] {
            named.extend(leaves.get(leaf).map(|leaf| (name, gradients[leaf])));
        }
        named.iter().for_each(|(_, value)| _ = tape.keep(*value));
        leaves.push(d_y);
        let mut exec = device.poisoned_executor(tape).unwrap();
        for leaf in leaves {
            let described = exec.tape().value(leaf).clone();
            exec.write(leaf, &described.desc.dtype.encode(&self.numbers(&described.name, &described.desc))).unwrap();
        }
        exec.write(running[2], &3i64.to_le_bytes()).unwrap();
        exec.run_step().unwrap();
        assert_eq!(exec.overrun().unwrap(), None, "{self:?}");
        assert_eq!(exec.read(running[2]).unwrap().to_f64(), [(3 + self.groups) as f64]);
        named.into_iter().map(|(name, value)| (name, exec.read(value).unwrap().to_f64())).collect()
    }

    /// Normal numbers that bfloat16 has; those of x are around a mean for each channel and image, as what comes from a ReLU is
    /// not around 0, so that no group's statistics are another's.
    fn numbers(&self, name: &str, desc: &TensorDesc) -> Vec<f64> {
        let mut stream = Stream::new(11, 3, name.bytes().map(u64::from).sum());
        let (len, c, n) = (desc.shape.len(), self.sizes[3], self.sizes[0]);
        let mean = |i: usize| match name {
            "x" => 0.5 + 0.3 * (i % c) as f64 / c as f64 - 1.5 * (i * n / len) as f64 / n as f64,
            "gamma" | "running_var" => 1.2,
            _ => 0.0,
        };
        let spread = if name == "gamma" || name == "running_var" { 0.2 } else { 0.7 };
        (0..len).map(|i| rounded(mean(i) + spread * stream.normal())).collect()
    }
}

fn rounded(value: f64) -> f64 {
    half::bf16::from_f64(value).to_f64()
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let scale = a.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / scale
}

fn agree(case: Case, device: &Device, dtype: DType, tolerance: f64) {
    let expected = case.compute(&cpu(), Route::Standard, DType::F64);
    let got = case.compute(device, Route::Gram, dtype);
    for ((name, a), (_, b)) in expected.iter().zip(&got) {
        let error = difference(a, b);
        assert!(error <= tolerance, "{name} of {case:?} in {dtype}: off by {error:.1e}");
    }
}

#[test]
fn a_layer_computes_what_convolution_and_batch_norm_do() {
    for case in CASES {
        agree(case, &cpu(), DType::F64, 1e-10);
        agree(case, &cpu(), DType::F32, 3e-5);
    }
}

#[cfg(feature = "emulator")]
#[test]
fn a_layer_computes_the_same_on_an_emulated_device() {
    for (case, seed) in CASES.into_iter().zip(0..) {
        agree(case, &emulated(seed), DType::F32, 3e-5);
        // In 16 bits results close to zero would round to either side of the ReLU's corner.
        let case = Case { relu: false, ..case };
        agree(case, &emulated(seed), DType::F16, 6e-3);
        agree(case, &emulated(seed), DType::Bf16, 5e-2);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Precision at scale.

/// The rows of a view of 512 images at the first stage of a ResNet-50.
const ROWS: [usize; 3] = [512, 56, 56];
const CHANNELS: [usize; 2] = [6, 8];

/// Means and spreads of the input's channels: as behind a ReLU, far from 0, nearly constant (few values leave the mean, by one
/// step of bfloat16), and constant.
const SPREADS: [[f64; 2]; CHANNELS[0]] = [[0.4, 0.6], [-0.2, 1.0], [30.0, 0.5], [5.0, 0.01], [2.0, 0.0], [0.1, 0.3]];

/// Variance, d_w and d_gamma of a layer whose outputs 0 and 1 read the constant and the nearly constant channel alone.
fn at_scale(device: &Device, route: Route, dtype: DType) -> Named {
    let [n, h, w] = ROWS;
    let [c_in, c_out] = CHANNELS;
    let case = Case { sizes: [n, h, w, c_in, c_out], stride: 1, groups: 1, residual: false, relu: false };
    let Recorded { mut tape, leaves, running, y } = case.record_with(route, dtype, 1.0);
    let d_y = tape.leaf("d_y", tape.desc(y).clone(), Role::Input, false);
    let gradients = backward(&mut tape, &[(y, d_y)]).unwrap();
    let named = [("variance", running[1]), ("d_w", gradients[&leaves[1]]), ("d_gamma", gradients[&leaves[2]])];
    named.iter().for_each(|(_, value)| _ = tape.keep(*value));
    let mut exec = device.executor(tape).unwrap();
    for leaf in leaves.into_iter().chain([d_y]) {
        let described = exec.tape().value(leaf).clone();
        let mut stream = Stream::new(17, 3, described.name.bytes().map(u64::from).sum());
        let mut value = |i: usize| match described.name.as_str() {
            "x" => SPREADS[i % c_in][0] + SPREADS[i % c_in][1] * stream.normal(),
            "w" if i / c_in == 0 && i % c_in != 4 => 0.0,
            "w" if i / c_in == 1 && i % c_in != 3 => 0.0,
            "running_mean" | "running_var" => 0.0,
            "gamma" => 1.0 + 0.1 * stream.normal(),
            _ => stream.normal(),
        };
        let values: Vec<f64> = (0..described.desc.shape.len()).map(|i| rounded(value(i))).collect();
        exec.write(leaf, &described.desc.dtype.encode(&values)).unwrap();
    }
    exec.run_step().unwrap();
    named.into_iter().map(|(name, value)| (name, exec.read(value).unwrap().to_f64())).collect()
}

/// Checks that no channel of the gram route is further from float64 than the usual route is, but for a relative `rounding`:
/// of a channel's variance, and of a sum of as many products as the largest gradient is.
fn no_worse(device: &Device, dtype: DType, rounding: f64) {
    let exact = at_scale(&cpu(), Route::Standard, DType::F64);
    let [standard, gram] = [Route::Standard, Route::Gram].map(|route| at_scale(device, route, dtype));
    let largest = |values: &[f64]| values.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    for (((name, exact), (_, standard)), (_, gram)) in exact.iter().zip(&standard).zip(&gram) {
        let row = exact.len() / CHANNELS[1];
        for (channel, one) in exact.chunks(row).enumerate() {
            let off = |values: &[f64]| {
                let values = &values[channel * row..][..row];
                values.iter().zip(one).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()))
            };
            let size = if *name == "variance" { largest(one) } else { largest(exact) };
            let (of_gram, of_standard) = (off(gram), off(standard));
            println!("{dtype} {name} of channel {channel}: off by {of_gram:.1e}, the usual route by {of_standard:.1e}");
            assert!(
                of_gram <= of_standard + rounding * size + 1e-9,
                "{name} of channel {channel} in {dtype}, of {size:.1e}"
            );
        }
        assert!(*name != "variance" || gram.iter().all(|variance| *variance >= 0.0), "{gram:?}");
    }
}

#[test]
fn a_layer_is_as_precise_as_the_usual_route_over_millions_of_rows() {
    no_worse(&cpu(), DType::F32, 1e-6);
}

#[cfg(feature = "emulator")]
#[test]
fn a_layer_is_as_precise_as_the_usual_route_in_16_bits_too() {
    // Means are taken off float32 sums: a constant channel's d_gamma, which is 0, keeps a millionth or so of what was summed.
    no_worse(&emulated(1), DType::Bf16, 1e-5);
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole steps.

/// Loss, gradients and state after a step on noise, by name. The last gamma of a block starts at `gamma`.
fn step(device: &Device, dtype: DType, gram: Layers, views: Views, seed: u64, gamma: f64) -> Vec<(String, Vec<f64>)> {
    let epilogues = Epilogues { gram, ..Epilogues::default() };
    let plain = StepShape::new(6, 12, dtype, ViewSource::Given { padded: false });
    let shape = StepShape { keep_gradients: true, epilogues, views, ..plain };
    let TrainGraph { tape, views, params, gradients, loss, .. } =
        model(Block::Bottleneck, Stem::Cifar).record_step(&shape).unwrap();
    let mut exec = device.poisoned_executor(tape).unwrap();
    write_initial(&mut *exec, &params, seed).unwrap();
    for param in params.iter().filter(|param| param.name.ends_with(".bn3.weight")) {
        exec.write(param.value, &param.desc.dtype.encode(&vec![gamma; param.desc.shape.len()])).unwrap();
    }
    let desc = exec.tape().desc(views).clone();
    let mut stream = Stream::new(seed, 3, 5);
    let noise: Vec<f64> = (0..desc.shape.len()).map(|_| rounded(stream.normal())).collect();
    exec.write(views, &desc.dtype.encode(&noise)).unwrap();
    exec.run_step().unwrap();
    assert_eq!(exec.overrun().unwrap(), None);
    let state =
        params.iter().filter(|param| param.name.contains("running")).map(|param| (param.name.clone(), param.value));
    let named = gradients.into_iter().chain(state).chain([("loss".to_string(), loss)]);
    named.map(|(name, value)| (name, exec.read(value).unwrap().to_f64())).collect()
}

#[test]
fn a_step_is_the_same_with_gram_in_every_combination() {
    for gamma in [0.0, 0.8] {
        let expected = step(&cpu(), DType::F64, Layers::NONE, Views::Together, 5, gamma);
        let some: Layers = "encoder.layer1.1,encoder.layer2.0.downsample".parse().unwrap();
        for (layers, views) in
            [(Layers::All, Views::Together), (some, Views::Together), (Layers::All, Views::Sequential)]
        {
            let got = step(&cpu(), DType::F64, layers.clone(), views, 5, gamma);
            for ((name, a), (_, b)) in expected.iter().zip(&got) {
                let error = difference(a, b);
                assert!(error < 1e-8, "{name} with {layers}, {views:?}, gamma {gamma}: off by {error:.1e}");
            }
        }
    }
}

#[test]
fn layers_that_are_not_there_are_refused_with_those_that_are() {
    let record = |layers: &str, block| {
        let epilogues = Epilogues { gram: layers.parse().unwrap(), ..Epilogues::default() };
        let plain = StepShape::new(6, 12, DType::F32, ViewSource::Given { padded: false });
        model(block, Stem::Cifar).record_step(&StepShape { epilogues, ..plain })
    };
    let message = record("encoder.layer1,encoder.layer9", Block::Bottleneck).unwrap_err().to_string();
    let some = "encoder.layer1.0.downsample.0, encoder.layer1.0.conv3, encoder.layer1.1.conv3, encoder.layer2.0.conv3";
    assert!(message.contains(some) && message.ends_with("got encoder.layer9"), "{message}");
    // Of 3x3 convolutions none; of the shortcuts that widen, one.
    let message = record("encoder.layer1", Block::Basic).unwrap_err().to_string();
    assert!(message.contains("such as encoder.layer2.0.downsample.0; got encoder.layer1"), "{message}");
    assert!(record("encoder.layer2.0.downsample", Block::Basic).is_ok());
}

/// Of each tensor the norm of the error relative to its own; the median of all tensors and seeds.
#[cfg(feature = "emulator")]
fn median_error(gram: Layers) -> f64 {
    let mut errors = vec![];
    for seed in 0..6 {
        let exact = step(&cpu(), DType::F64, Layers::NONE, Views::Together, seed, 0.8);
        let got = step(&emulated(seed), DType::Bf16, gram.clone(), Views::Together, seed, 0.8);
        for ((_, a), (_, b)) in exact.iter().zip(&got) {
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let off = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
            errors.push(off / norm(&mut a.iter().copied()).max(1e-12));
        }
    }
    errors.sort_unstable_by(f64::total_cmp);
    errors[errors.len() / 2]
}

#[cfg(feature = "emulator")]
#[test]
fn in_bfloat16_a_step_is_no_further_from_float64_than_the_usual_one() {
    let [standard, gram] = [Layers::NONE, Layers::All].map(median_error);
    println!("median error of gradients, statistics and losses: {gram:.2e} with gram, {standard:.2e} without");
    assert!(gram < 1.1 * standard, "{gram:.2e} and {standard:.2e}");
}
