//! What may be fused with a convolution changes how a step is computed, not what: statistics from the convolution instead of a
//! pass of batch norm's own, and the three ways to add the gradient of a residual branch.

mod steps;

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::error::Result;
use simsiam_engine::exec::Device;
use simsiam_engine::graph::budget::{MemoryBudget, fit};
use simsiam_engine::graph::plan::Target;
use simsiam_engine::graph::{Node, Plan, Role, Tape, ValueId, backward, dump};
use simsiam_engine::nn::epilogues::{Epilogues, Layers};
use simsiam_engine::nn::resnet::{Block, Stem};
use simsiam_engine::nn::simsiam::{StepShape, TrainGraph, ViewSource};
use simsiam_engine::nn::views::Views;
use simsiam_engine::ops::batch_norm::{BatchNorm, Fusion, channel_desc};
use simsiam_engine::ops::conv2d::{Conv2d, Join, gradient_dtype};
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::{DType, TensorDesc};
use simsiam_engine::train::state::write_initial;
use steps::{Setting, model};

fn cpu() -> Device {
    Device::Cpu(Tier::Direct)
}

#[cfg(feature = "emulator")]
fn emulated(seed: u64) -> Device {
    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
    Device::Cuda(std::sync::Arc::new(Emulator::new(Options { threads: 2, seed }).unwrap()))
}

/// A convolution and the batch norm after it; with a residual the input goes around both.
#[derive(Debug, Clone, Copy)]
struct Pair {
    /// n, h, w, c_in, c_out.
    sizes: [usize; 5],
    /// Kernel, stride, padding.
    shape: [usize; 3],
    groups: usize,
    residual: bool,
    relu: bool,
}

const PAIRS: [Pair; 4] = [
    Pair { sizes: [6, 7, 5, 8, 8], shape: [3, 1, 1], groups: 2, residual: true, relu: true },
    Pair { sizes: [6, 9, 6, 3, 7], shape: [3, 2, 1], groups: 3, residual: false, relu: true },
    Pair { sizes: [4, 5, 8, 16, 5], shape: [1, 1, 0], groups: 2, residual: false, relu: false },
    Pair { sizes: [5, 11, 3, 5, 5], shape: [1, 1, 0], groups: 1, residual: true, relu: false },
];

/// What a pair computes: results and gradients by name, and the groups' sums where they are an output.
struct Computed {
    values: Vec<(&'static str, Vec<f64>)>,
    sums: Option<Vec<f64>>,
    /// y of the convolution, `[n][oh][ow][c_out]`.
    convolved: Vec<f64>,
}

impl Pair {
    fn compute(&self, device: &Device, dtype: DType, statistics: bool, join: Join) -> Computed {
        let [n, h, w, c_in, c_out] = self.sizes;
        let [kernel, stride, padding] = self.shape;
        let mut tape = Tape::new();
        let x = tape.leaf("x", TensorDesc::new([n, h, w, c_in], dtype), Role::Input, true);
        let weight = tape.leaf("w", TensorDesc::new([c_out, kernel, kernel, c_in], dtype), Role::Input, true);
        let parameter = channel_desc(c_out, dtype);
        let [gamma, beta] = ["gamma", "beta"].map(|name| tape.leaf(name, parameter.clone(), Role::Input, true));
        let [mean, var] = ["running_mean", "running_var"].map(|n| tape.leaf(n, parameter.clone(), Role::State, false));
        let tracked = tape.leaf("num_batches_tracked", TensorDesc::new([], DType::I64), Role::State, false);

        let statistics = statistics.then_some(self.groups);
        let op = Conv2d { statistics, join, ..Conv2d::new([stride; 2], [padding; 2]) };
        let convolved = tape.record(op, &[x, weight]).unwrap();
        let sums = convolved.get(1).copied();
        let fusion = Fusion { affine: true, residual: self.residual, relu: self.relu };
        let sums_given = sums.is_some();
        let op = BatchNorm { groups: self.groups, eps: 1e-5, momentum: 0.1, fusion, sums_given, means: false };
        let inputs = [convolved[0], gamma, beta].into_iter().chain(self.residual.then_some(x)).chain(sums);
        let y = tape.record_updating(op, &inputs.collect::<Vec<_>>(), &[mean, var, tracked]).unwrap();
        let desc = tape.desc(y[0]).clone();
        let d_y = tape.leaf("d_y", desc, Role::Input, false);
        let gradients = backward(&mut tape, &[(y[0], d_y)]).unwrap();
        let named = [("y", y[0]), ("mean", y[1]), ("rstd", y[2]), ("running_mean", mean), ("running_var", var)];
        let leaves = [("d_x", x), ("d_w", weight), ("d_gamma", gamma), ("d_beta", beta)];
        let named: Vec<_> = named.into_iter().chain(leaves.map(|(name, leaf)| (name, gradients[&leaf]))).collect();
        for value in named.iter().map(|(_, value)| *value).chain(convolved.iter().copied()) {
            tape.keep(value);
        }

        let mut exec = device.poisoned_executor(tape).unwrap();
        for (stream, leaf) in (0..).zip([x, weight, gamma, beta, d_y, mean, var]) {
            let desc = exec.tape().desc(leaf).clone();
            exec.write(leaf, &desc.dtype.encode(&numbers(leaf == x, stream, &desc))).unwrap();
        }
        exec.write(tracked, &3i64.to_le_bytes()).unwrap();
        exec.run_step().unwrap();
        assert_eq!(exec.overrun().unwrap(), None, "{self:?}");
        assert_eq!(exec.read(tracked).unwrap().to_f64(), [(3 + self.groups) as f64]);
        let read = |value| exec.read(value).unwrap().to_f64();
        Computed {
            values: named.into_iter().map(|(name, value)| (name, read(value))).collect(),
            sums: sums.map(read),
            convolved: read(convolved[0]),
        }
    }

    /// The sums of the values of each channel and group, and of their squares.
    fn sums_of(&self, y: &[f64]) -> Vec<f64> {
        let channels = self.sizes[4];
        let mut sums = vec![0.0; self.groups * 2 * channels];
        for (group, y) in y.chunks(y.len() / self.groups).enumerate() {
            for (i, v) in y.iter().enumerate() {
                sums[group * 2 * channels + i % channels] += v;
                sums[(group * 2 + 1) * channels + i % channels] += v * v;
            }
        }
        sums
    }
}

/// Normal numbers; those of an image are around a mean of its own, so that no group's statistics are another's.
fn numbers(images: bool, stream: u64, desc: &TensorDesc) -> Vec<f64> {
    let mut stream = Stream::new(11, 3, stream);
    let (len, first) = (desc.shape.len(), desc.shape.dims().first().copied().unwrap_or(1));
    let mean = |i: usize| if images { 1.5 - 2.5 * (i / (len / first)) as f64 / first as f64 } else { 0.0 };
    (0..len).map(|i| mean(i) + 0.7 * stream.normal()).collect()
}

fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let scale = a.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs())) / scale
}

fn agree(pair: Pair, device: &Device, dtype: DType, tolerance: f64) {
    let expected = pair.compute(device, dtype, false, Join::Accumulate);
    for (statistics, join) in
        [(true, Join::Accumulate), (false, Join::Separate), (true, Join::Fused), (true, Join::Separate)]
    {
        let got = pair.compute(device, dtype, statistics, join);
        for ((name, a), (_, b)) in expected.values.iter().zip(&got.values) {
            let error = difference(a, b);
            assert!(error <= tolerance, "{name} of {pair:?} in {dtype}, {statistics} {join:?}: off by {error:.1e}");
        }
        let Some(sums) = got.sums else { continue };
        let error = difference(&pair.sums_of(&got.convolved), &sums);
        assert!(error <= tolerance, "sums of {pair:?} in {dtype}: off by {error:.1e}");
        // Were the groups alike, one's statistics could stand for another's.
        let of_groups: Vec<&[f64]> = sums.chunks(sums.len() / pair.groups).collect();
        let apart = of_groups.windows(2).all(|two| difference(two[0], two[1]) > 0.1);
        assert!(apart, "the groups of {pair:?} do not differ");
    }
}

#[test]
fn a_fused_pair_computes_what_the_plain_one_does_on_the_cpu() {
    for pair in PAIRS {
        agree(pair, &cpu(), DType::F64, 1e-11);
        agree(pair, &cpu(), DType::F32, 2e-5);
        agree(pair, &Device::Cpu(Tier::Reference), DType::F32, 2e-5);
    }
}

#[cfg(feature = "emulator")]
#[test]
fn a_fused_pair_computes_what_the_plain_one_does_on_an_emulated_device() {
    for (pair, seed) in PAIRS.into_iter().zip(0..) {
        agree(pair, &emulated(seed), DType::F32, 2e-5);
        // In 16 bits results close to zero would round to either side of the ReLU's corner.
        let pair = Pair { relu: false, ..pair };
        agree(pair, &emulated(seed), DType::F16, 6e-3);
        agree(pair, &emulated(seed), DType::Bf16, 5e-2);
    }
}

#[test]
fn sums_of_the_wrong_groups_are_refused() {
    let mut tape = Tape::new();
    let x = tape.leaf("x", TensorDesc::new([6, 4, 4, 3], DType::F32), Role::Input, true);
    let w = tape.leaf("w", TensorDesc::new([5, 3, 3, 3], DType::F32), Role::Input, true);
    let conv = |statistics| Conv2d { statistics: Some(statistics), ..Conv2d::new([1; 2], [1; 2]) };
    let message = tape.record(conv(4), &[x, w]).unwrap_err().to_string();
    assert!(message.contains("expected a multiple of 4 groups, got 6"), "{message}");
    let y = tape.record(conv(3), &[x, w]).unwrap();
    assert_eq!(tape.desc(y[1]), &TensorDesc::new([3, 2, 5], DType::F32));
    let fusion = Fusion { affine: false, residual: false, relu: false };
    let norm = BatchNorm { groups: 2, eps: 1e-5, momentum: 0.1, fusion, sums_given: true, means: false };
    let message = tape.record(norm, &y).unwrap_err().to_string();
    assert!(message.contains("sums: expected f32[2, 2, 5], got f32[3, 2, 5]"), "{message}");
}

#[test]
fn statistics_that_something_else_uses_have_no_silent_gradient() {
    let mut tape = Tape::new();
    let x = tape.leaf("x", TensorDesc::new([4, 4, 4, 3], DType::F32), Role::Input, true);
    let w = tape.leaf("w", TensorDesc::new([5, 3, 3, 3], DType::F32), Role::Input, true);
    let op = Conv2d { statistics: Some(2), ..Conv2d::new([1; 2], [1; 2]) };
    let y = tape.record(op, &[x, w]).unwrap();
    let seeds = y.iter().map(|&y| (y, tape.leaf("d", tape.desc(y).clone(), Role::Input, false))).collect::<Vec<_>>();
    let message = backward(&mut tape, &seeds).unwrap_err().to_string();
    assert!(message.contains("the statistics have no gradient of their own"), "{message}");
}

// ---------------------------------------------------------------------------------------------------------------------
// Whole steps.

const BATCH: usize = 5;
const SIZE: usize = 12;

fn epilogues(statistics: &str, residual_gradient: &str) -> Epilogues {
    let (statistics, residual_gradient) = (statistics.parse().unwrap(), residual_gradient.parse().unwrap());
    Epilogues { statistics, residual_gradient, ..Epilogues::default() }
}

fn record(epilogues: Epilogues, dtype: DType) -> Result<TrainGraph> {
    record_with(Stem::Cifar, epilogues, dtype)
}

/// With the stem of ImageNet in what devices want; its batch norm and max pooling may be one op, which takes sums as well.
fn record_with(stem: Stem, epilogues: Epilogues, dtype: DType) -> Result<TrainGraph> {
    let source = ViewSource::Given { padded: stem == Stem::Imagenet };
    let plain = StepShape::new(BATCH, SIZE, dtype, source);
    model(Block::Bottleneck, stem).record_step(&StepShape { keep_gradients: true, epilogues, ..plain })
}

fn with_sums(tape: &Tape) -> Vec<&str> {
    let sums = |node: &&Node| node.op.name() == "conv2d" && node.outputs.len() == 2;
    tape.nodes().iter().filter(sums).map(|node| node.name.as_str()).collect()
}

/// The gradients of all parameters after one step, by name.
fn gradients(device: &Device, dtype: DType, stem: Stem, epilogues: Epilogues) -> Vec<(String, Vec<f64>)> {
    let TrainGraph { tape, views, params, gradients, .. } = record_with(stem, epilogues, dtype).unwrap();
    let mut exec = device.poisoned_executor(tape).unwrap();
    write_initial(&mut *exec, &params, 5).unwrap();
    // The last gamma of a block starts at 0, which would hide everything before it.
    for param in params.iter().filter(|param| param.name.contains(".bn") && param.name.ends_with("weight")) {
        exec.write(param.value, &param.desc.dtype.encode(&vec![0.8; param.desc.shape.len()])).unwrap();
    }
    let desc = exec.tape().desc(views).clone();
    exec.write(views, &desc.dtype.encode(&numbers(true, 0, &desc))).unwrap();
    exec.run_step().unwrap();
    assert_eq!(exec.overrun().unwrap(), None);
    gradients.into_iter().map(|(name, value)| (name, exec.read(value).unwrap().to_f64())).collect()
}

fn every_gradient_agrees(device: &Device, dtype: DType, tolerance: f64, choices: &[(&str, &str)]) {
    for stem in [Stem::Cifar, Stem::Imagenet] {
        let expected = gradients(&cpu(), DType::F64, stem, Epilogues::default());
        assert!(expected.iter().all(|(_, values)| values.iter().any(|v| v.abs() > 1e-9)), "{stem:?}");
        for ((statistics, residual), pooling) in choices.iter().flat_map(|choice| [(choice, false), (choice, true)]) {
            let choice = Epilogues { pooling, ..epilogues(statistics, residual) };
            let got = gradients(device, dtype, stem, choice.clone());
            for ((name, a), (_, b)) in expected.iter().zip(&got) {
                let error = difference(a, b);
                assert!(error < tolerance, "{name} with {stem:?}, {choice:?}: off by {error:.1e}");
            }
        }
    }
}

#[test]
fn every_gradient_of_a_step_is_the_same() {
    let named = ("encoder.layer1.1,encoder.conv1", "separate:encoder.layer2");
    let choices = [("all", "accumulate"), ("none", "separate"), ("none", "fused"), ("all", "fused"), named];
    every_gradient_agrees(&cpu(), DType::F64, 1e-9, &choices);
}

/// Three steps with the shortcuts' batch norms in ops of their own, and in one with the block's last: everything that a training
/// leaves has the same bits, also from sums that convolutions made, and with views in turn and what is not kept made again.
fn the_shortcut_changes_no_bit(device: &Device, dtype: DType) {
    let pairs = |tape: &Tape| tape.nodes().iter().filter(|node| node.op.name() == "batch_norm_pair").count();
    for (block, stem, statistics) in [
        (Block::Bottleneck, Stem::Cifar, "none"),
        (Block::Basic, Stem::Imagenet, "all"),
        (Block::Bottleneck, Stem::Imagenet, "all"),
    ] {
        let setting = Setting {
            padded: stem == Stem::Imagenet,
            epilogues: epilogues(statistics, "accumulate"),
            ..Setting::new(model(block, stem), [BATCH, SIZE], dtype)
        };
        let apart =
            Setting { epilogues: Epilogues { shortcut: false, ..setting.epilogues.clone() }, ..setting.clone() };
        for views in [Views::Together, Views::Sequential] {
            let least = |tape: Tape| fit(&tape, device.target(), MemoryBudget::Least).unwrap().0;
            assert_eq!(pairs(&apart.record(views).tape), 0);
            assert!(pairs(&setting.record(views).tape) > 0);
            let expected = apart.train(device, views, 3, |tape| tape);
            for (got, about) in [
                (setting.train(device, views, 3, |tape| tape), "kept"),
                (setting.train(device, views, 3, least), "again"),
            ] {
                let differences = got.differences(&expected);
                assert!(differences.is_empty(), "{block:?} {stem:?} {dtype} {views} {about}: {differences:?}");
            }
        }
    }
}

#[test]
fn the_shortcut_s_batch_norm_in_the_same_op_changes_no_bit() {
    the_shortcut_changes_no_bit(&cpu(), DType::F32);
    the_shortcut_changes_no_bit(&cpu(), DType::F64);
}

#[cfg(feature = "emulator")]
#[test]
fn the_shortcut_s_batch_norm_in_the_same_op_changes_no_bit_on_an_emulated_device() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        the_shortcut_changes_no_bit(&emulated(3), dtype);
    }
}

#[test]
fn only_the_named_layers_are_fused() {
    let names = |text: &str| {
        let graph = record(epilogues(text, "accumulate"), DType::F32).unwrap();
        with_sums(&graph.tape).into_iter().map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(names("none"), [""; 0]);
    let below = ["encoder.layer1.1.conv1", "encoder.layer1.1.conv2", "encoder.layer1.1.conv3"];
    assert_eq!(names("encoder.layer1.1,encoder.conv1"), [&["encoder.conv1"][..], &below].concat());
    // Of 3 and 4 channels none is a multiple of 8; 4 times the width is.
    let eights = Epilogues { statistics: Layers::Ordinary, ..Epilogues::default() };
    let graph = record(eights, DType::F32).unwrap();
    assert_eq!(
        with_sums(&graph.tape),
        ["encoder.layer2.0.conv1", "encoder.layer2.0.conv2", "encoder.layer2.0.conv3", "encoder.layer2.0.downsample.0"]
    );
    // Every convolution of this network has a batch norm after it, which takes the sums.
    let graph = record(epilogues("all", "accumulate"), DType::F32).unwrap();
    let convolutions = graph.tape.nodes().iter().filter(|n| n.op.name() == "conv2d").count();
    assert_eq!((with_sums(&graph.tape).len(), convolutions), (12, 12));
    for node in graph.tape.nodes().iter().filter(|n| n.op.name() == "conv2d") {
        let reads = |n: &&Node| n.op.name().starts_with("batch_norm") && n.inputs.contains(&node.outputs[1]);
        assert_eq!(graph.tape.nodes().iter().filter(reads).count(), 1, "{}", node.name);
    }
}

#[test]
fn residual_gradients_are_added_as_asked() {
    let dgrad = |text: &str, layer: &str| {
        let tape = record(epilogues("none", text), DType::F32).unwrap().tape;
        let index = tape.nodes().iter().position(|n| n.name == format!("{layer}/conv2d_dgrad")).unwrap();
        let (node, next) = (&tape.nodes()[index], &tape.nodes()[index + 1]);
        let earlier = tape.nodes()[..index].iter().any(|n| n.outputs.contains(&node.outputs[0]));
        (node.inputs.len(), earlier, next.name.ends_with("/conv2d_dgrad/add"))
    };
    for (text, named, other) in [
        ("accumulate", (2, true, false), (2, true, false)),
        ("separate", (2, false, true), (2, false, true)),
        ("separate:encoder.layer1.1", (2, false, true), (2, true, false)),
        ("fused:encoder.layer1.1.conv1", (3, false, false), (2, true, false)),
    ] {
        assert_eq!(dgrad(text, "encoder.layer1.1.conv1"), named, "{text}");
        assert_eq!(dgrad(text, "encoder.layer2.0.conv1"), other, "{text}");
        // Nothing is there that this one could be added to.
        assert_eq!(dgrad(text, "encoder.layer1.1.conv2"), (2, false, false), "{text}");
    }
}

#[test]
fn names_of_no_layer_are_refused() {
    let refused = |statistics: &str, residual: &str| {
        record(epilogues(statistics, residual), DType::F32).map(|_| ()).unwrap_err().to_string()
    };
    let message = refused("encoder.conv1,encoder.layer9", "accumulate");
    assert!(message.starts_with("--fuse-statistics: expected names of layers"), "{message}");
    assert!(
        message.contains("encoder.conv1, encoder.layer1.0.conv1") && message.ends_with("got encoder.layer9"),
        "{message}"
    );
    // A convolution whose gradient meets no other one.
    for join in ["separate", "fused"] {
        let message = refused("none", &format!("{join}:encoder.layer1.0.conv2"));
        assert!(
            message.starts_with("--residual-gradient: expected") && message.contains("encoder.layer1.1.conv1"),
            "{message}"
        );
    }
}

#[test]
fn fused_steps_are_planned_and_drawn() {
    let plain = record(Epilogues::default(), DType::Bf16).unwrap().tape;
    let fused = record(epilogues("all", "fused"), DType::Bf16).unwrap().tape;
    for target in [Target::Cpu, Target::Cuda] {
        let [plain, fused] = [&plain, &fused].map(|tape| Plan::new(tape, target).unwrap().memory);
        assert_eq!((plain.parameters, plain.state, plain.inputs), (fused.parameters, fused.state, fused.inputs));
        assert!(fused.transient < 2 * plain.transient, "{plain:?} {fused:?}");
    }
    let sums = |tape: &Tape, id: ValueId| tape.desc(id) == &TensorDesc::new([2, 2, 16], gradient_dtype(DType::Bf16));
    let last = fused.nodes().iter().find(|n| n.name == "encoder.layer1.1.conv3" && n.outputs.len() == 2).unwrap();
    assert!(sums(&fused, last.outputs[1]));
    // An edge for each pair of sums, from a convolution to its batch norm.
    let edges = |tape: &Tape| dump::dot(tape).matches("label=\"f32[2, 2, ").count();
    assert_eq!((edges(&plain), edges(&fused)), (0, 12));
}

#[cfg(feature = "emulator")]
#[test]
fn every_gradient_of_a_step_on_an_emulated_device_is_the_same() {
    let choices = [("all", "fused"), ("all", "separate"), ("none", "accumulate")];
    every_gradient_agrees(&emulated(1), DType::F32, 1e-3, &choices);
}
