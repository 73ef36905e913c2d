//! The views one after the other: the same losses, gradients and running statistics as together, in half the memory.

mod common;
mod steps;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::error::Result;
use simsiam_engine::exec::Device;
use simsiam_engine::graph::plan::Target;
use simsiam_engine::graph::{Node, Phase, Plan, Role, Tape, ValueId};
use simsiam_engine::nn::heads::{HeadNorm, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Arch, Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::{SimSiam, StepShape, ViewSource};
use simsiam_engine::nn::views::Views;
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::ops::slice_rows::{SliceRows, StackRows, record_rows};
use simsiam_engine::tensor::{DType, TensorDesc};
use simsiam_engine::train::metrics::{self, Line};
use steps::{Setting, Trained, model};

fn cpu() -> Device {
    Device::Cpu(Tier::Direct)
}

fn both(setting: &Setting, device: &Device, steps: usize) -> [Trained; 2] {
    [Views::Together, Views::Sequential].map(|views| setting.train(device, views, steps, |tape| tape))
}

/// Every way that the heads and the loss can be, each with one of the networks.
fn models() -> Vec<SimSiam> {
    let bottleneck = model(Block::Bottleneck, Stem::Imagenet);
    let basic = model(Block::Basic, Stem::Cifar);
    let with = |model: &SimSiam, change: &dyn Fn(&mut SimSiam)| {
        let mut model = model.clone();
        change(&mut model);
        model
    };
    vec![
        bottleneck.clone(),
        basic.clone(),
        with(&bottleneck, &|m| m.symmetric = false),
        with(&basic, &|m| (m.symmetric, m.heads.norm) = (false, HeadNorm::All)),
        with(&basic, &|m| (m.heads.norm, m.heads.projector_layers) = (HeadNorm::None, 3)),
        with(&bottleneck, &|m| m.heads.norm = HeadNorm::Hidden),
        with(&basic, &|m| (m.heads.norm, m.heads.projector_out_affine) = (HeadNorm::All, true)),
        with(&basic, &|m| m.heads.projector_out_bias = OutBias::Frozen),
        with(&basic, &|m| m.heads.projector_out_bias = OutBias::Trained),
        with(&basic, &|m| m.heads.predictor = PredictorKind::FixedRandom),
        with(&basic, &|m| m.heads.predictor = PredictorKind::None),
        with(&basic, &|m| m.similarity = Kind::SoftmaxXent),
    ]
}

/// With 5 images of 13 pixels, view 2 begins where no value may, and is copied; with 8 of 16 it is seen in place.
const SIZES: [[usize; 2]; 2] = [[5, 13], [8, 16]];

#[test]
fn in_float64_every_figure_is_the_same() {
    for (model, size) in models().into_iter().flat_map(|model| SIZES.map(|size| (model.clone(), size))) {
        let setting = Setting::new(model, size, DType::F64);
        let [together, sequential] = both(&setting, &cpu(), 3);
        sequential.agrees(&together, 1e-10, &format!("{setting:?}"));
    }
}

#[test]
fn in_float32_only_rounding_differs() {
    for (model, size) in
        [model(Block::Bottleneck, Stem::Imagenet), model(Block::Basic, Stem::Cifar)].into_iter().zip(SIZES)
    {
        let setting = Setting::new(model, size, DType::F32);
        let [together, sequential] = both(&setting, &cpu(), 2);
        sequential.agrees(&together, 2e-3, &format!("{setting:?}"));
        assert_eq!(
            together.get("step 0: loss"),
            sequential.get("step 0: loss"),
            "the way forward is the same to the bit"
        );
    }
}

#[test]
fn fused_stems_and_statistics_are_repeated_too() {
    for statistics in ["none", "all"] {
        let mut setting = Setting::new(model(Block::Bottleneck, Stem::Imagenet), [5, 13], DType::F64);
        (setting.epilogues.pooling, setting.epilogues.statistics) = (true, statistics.parse().unwrap());
        setting.padded = true;
        let [together, sequential] = both(&setting, &cpu(), 2);
        sequential.agrees(&together, 1e-9, &format!("statistics {statistics}"));
    }
}

/// The test's own premise: were the views taken in the other order, running statistics would be others.
#[test]
fn running_statistics_take_view_1_before_view_2() {
    let setting = Setting::new(model(Block::Basic, Stem::Cifar), [8, 16], DType::F64);
    let [together, sequential] = both(&setting, &cpu(), 1);
    for name in ["encoder.bn1.running_mean", "encoder.bn1.running_var", "predictor.1.running_var"] {
        let [got, expected] = [sequential.get(name), together.get(name)];
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{name}");
    }
    assert_eq!(sequential.get("encoder.bn1.num_batches_tracked"), [2.0]);
    // r2 = 0.9 (0.9 r + 0.1 s1) + 0.1 s2: with the views' means of opposite signs the order shows in the sign of the sum.
    let swapped = |means: [f64; 2]| 0.9 * 0.1 * means[0] + 0.1 * means[1];
    assert!((swapped([0.9, -0.4]) - swapped([-0.4, 0.9])).abs() > 0.01);
}

#[test]
fn what_is_repeated_updates_nothing_and_stands_before_the_way_back_of_view_1() {
    let setting = Setting::new(model(Block::Bottleneck, Stem::Imagenet), [8, 16], DType::Bf16);
    let [together, sequential] = [Views::Together, Views::Sequential].map(|views| setting.record(views).tape);
    assert!(together.nodes().iter().all(|node| !node.again));
    let again: Vec<usize> = positions(&sequential, |node| node.again);
    let before_and_after = positions(&sequential, |node| node.name.starts_with("encoder.layer") && !node.again);
    let backbone = positions(&sequential, |node| node.again && node.name.starts_with("encoder.layer"));
    let stretch = backbone[0]..backbone[backbone.len() - 1];
    assert!(!before_and_after.iter().any(|index| stretch.contains(index)), "the backbone is repeated in one stretch");
    let late = |before: bool| {
        let beside = |&&index: &&usize| sequential.nodes()[index].is_late() && (index < stretch.start) == before;
        before_and_after.iter().filter(beside).count()
    };
    assert_eq!(late(true), late(false), "between the way back of view 2 and that of view 1");
    for node in again.iter().map(|&index| &sequential.nodes()[index]) {
        assert!(node.phase == Phase::Backward && node.updates.is_empty(), "{}", node.name);
        assert!(node.op.name() != "batch_norm" && node.op.name() != "cast", "{}", node.name);
    }
    // Each norm of each view changes its running statistics once.
    let norms = |tape: &Tape| positions(tape, |node| node.op.name() == "batch_norm").len();
    assert_eq!(norms(&sequential), 2 * norms(&together));
    // Weights are converted once, and every parameter is there once.
    let casts = |tape: &Tape| positions(tape, |node| node.op.name() == "cast").len();
    assert_eq!([casts(&sequential), casts(&together)], [1, 1]);
    let names: Vec<&str> = sequential.with_role(Role::Parameter).map(|(_, value)| value.name.as_str()).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    assert_eq!(names, together.with_role(Role::Parameter).map(|(_, value)| value.name.as_str()).collect::<Vec<_>>());
}

fn positions(tape: &Tape, keep: impl Fn(&Node) -> bool) -> Vec<usize> {
    tape.nodes().iter().enumerate().filter(|(_, node)| keep(node)).map(|(index, _)| index).collect()
}

#[test]
fn without_a_prediction_of_view_1_nothing_is_repeated() {
    let mut asymmetric = model(Block::Basic, Stem::Cifar);
    asymmetric.symmetric = false;
    let tape = Setting::new(asymmetric, [8, 16], DType::F32).record(Views::Sequential).tape;
    assert!(tape.nodes().iter().all(|node| !node.again));
}

#[test]
fn a_target_that_is_no_constant_is_refused() {
    let mut model = model(Block::Basic, Stem::Cifar);
    model.stop_gradient = false;
    let shape = StepShape::new(8, 16, DType::F32, ViewSource::Given { padded: false });
    let refused = model.record_step(&StepShape { views: Views::Sequential, ..shape });
    let message = refused.map(|_| ()).unwrap_err().to_string();
    assert!(message.starts_with("--views: expected together with --stop-gradient false"), "{message}");
}

/// ResNet-50 at 224 pixels in bf16 on a CUDA device.
#[test]
fn half_the_activations_for_a_sixth_more_work() {
    let resnet = Setting::new(model(Block::Basic, Stem::Cifar), [16, 224], DType::Bf16);
    let mut resnet = Setting { padded: true, ..resnet };
    resnet.model.backbone = ResNet::named(Arch::Resnet50, Stem::Imagenet).unwrap();
    let [together, sequential] = [Views::Together, Views::Sequential].map(|views| resnet.record(views).tape);
    let [plain, halved] = [&together, &sequential].map(|tape| Plan::new(tape, Target::Cuda).unwrap().memory);
    let share = halved.saved_activations as f64 / plain.saved_activations as f64;
    // The copies of the weights in bf16 are shared.
    assert!((0.5..0.56).contains(&share), "{share:.3} of the saved activations");
    let flops = |tape: &Tape| {
        let descs = |node: &Node| node.inputs.iter().map(|&v| tape.desc(v).clone()).collect::<Vec<_>>();
        let of = |node: &Node| node.op.flops(&descs(node).iter().collect::<Vec<_>>());
        tape.nodes().iter().map(of).sum::<u64>() as f64
    };
    let more = flops(&sequential) / flops(&together);
    assert!((1.15..1.18).contains(&more), "{more:.3} times the work");
}

/// Both ways to have rows, and rows stacked, forward and backward.
fn rows_arrive(device: &Device, dtype: DType) {
    // Rows of 128 elements begin at multiples of 256 bytes in 16 bits and more, those of 5 do not.
    for (columns, [n, m]) in [(128, [3, 2]), (5, [4, 3]), (8, [1, 5])] {
        let mut tape = Tape::new();
        let all = tape.leaf("all", TensorDesc::new([n + m, columns], dtype), Role::Input, true);
        let a = record_rows(&mut tape, SliceRows { start: 0, len: n }, all).unwrap();
        let b = record_rows(&mut tape, SliceRows { start: n, len: m }, all).unwrap();
        let aligned = (n * columns * dtype.size()).is_multiple_of(256);
        assert_eq!(tape.value(b).alias_of.is_some(), aligned, "{columns}");
        let swapped = tape.record_one(StackRows, &[b, a]).unwrap();
        let d = tape.leaf("d", TensorDesc::new([n + m, columns], dtype), Role::Input, false);
        let gradients = simsiam_engine::graph::backward(&mut tape, &[(swapped, d)]).unwrap();
        let d_all = gradients[&all];
        [swapped, d_all].into_iter().for_each(|value| _ = tape.keep(value));
        let mut exec = device.poisoned_executor(tape).unwrap();
        let values = |salt: usize| (0..(n + m) * columns).map(move |i| ((i * 7 + salt) % 101) as f64 - 50.0);
        let (x, d_y): (Vec<f64>, Vec<f64>) = (values(0).collect(), values(13).collect());
        for (leaf, values) in [(all, &x), (d, &d_y)] {
            exec.write(leaf, &dtype.encode(values)).unwrap();
        }
        exec.run_step().unwrap();
        assert_eq!(exec.overrun().unwrap(), None);
        let read = |value: ValueId| exec.read(value).unwrap().to_f64();
        let rotated = |of: &[f64], by: usize| [&of[by * columns..], &of[..by * columns]].concat();
        assert_eq!(read(swapped), rotated(&x, n), "{columns} columns in {dtype}");
        assert_eq!(read(d_all), rotated(&d_y, m), "{columns} columns in {dtype}");
    }
}

#[test]
fn rows_are_seen_copied_and_stacked() {
    rows_arrive(&cpu(), DType::F32);
    rows_arrive(&cpu(), DType::F64);
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let mut tape = Tape::new();
    let x = tape.leaf("x", TensorDesc::new([3, 64], DType::F32), Role::Input, true);
    let other = tape.leaf("other", TensorDesc::new([3, 65], DType::F32), Role::Input, true);
    let message = |result: Result<ValueId>| result.unwrap_err().to_string();
    let rows = message(record_rows(&mut tape, SliceRows { start: 2, len: 2 }, x));
    assert!(rows.contains("expected at least 4 rows, got f32[3, 64]"), "{rows}");
    let stacked = message(tape.record_one(StackRows, &[x, other]));
    assert!(stacked.contains("b: expected rows like those of f32[3, 64], got f32[3, 65]"), "{stacked}");
}

#[cfg(feature = "emulator")]
mod emulated {
    use super::*;
    use crate::steps::emulated;

    #[test]
    fn rows_are_seen_copied_and_stacked() {
        for (seed, dtype) in [DType::F32, DType::Bf16, DType::F16].into_iter().enumerate() {
            rows_arrive(&emulated(seed as u64), dtype);
        }
    }

    /// Libraries round what a call adds to a weight's gradient to 16 bits (see `Work::staging`), so of each view or of both once.
    /// All else has the bits that it has together, but for sums in float32: the norms' gradients say it of the way back.
    #[test]
    fn devices_agree_with_themselves() {
        let dtypes = [(DType::F32, 1e-5), (DType::Bf16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))];
        for (seed, (dtype, rounding)) in dtypes.into_iter().enumerate() {
            let mut setting = Setting::new(model(Block::Bottleneck, Stem::Imagenet), [5, 13], dtype);
            setting.padded = true;
            let [together, sequential] = both(&setting, &emulated(seed as u64), 1);
            sequential.agrees(&together, rounding, &format!("{dtype}"));
            let exact = |of: &Trained| {
                let is_norm = |name: &str| [".bn", ".downsample.1.", "fc.1."].iter().any(|part| name.contains(part));
                let gradient = |name: &str| name.starts_with("step 0: gradient") && is_norm(name);
                let forward = |name: &str| ["step 0: loss", "step 0: z std", "step 0: z"].contains(&name);
                let kept = of.0.iter().filter(|(name, _)| gradient(name) || forward(name));
                Trained(kept.cloned().collect())
            };
            assert!(exact(&together).0.len() > 20);
            exact(&sequential).agrees(&exact(&together), 1e-6, &format!("{dtype}"));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The binary.

const OPTIONS: &str = "--preset cifar --arch custom --block basic --depths 1,1 --width 6 --dim 24 --image-size 14 \
                       --batch 32 --base-lr 0.2 --log-every 1 --checkpoint-steps 2 --keep-last 9 --seed 3";

struct Bench {
    folder: tempfile::TempDir,
    data: PathBuf,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let data = common::fashion(folder.path(), "train", 100);
        Bench { folder, data }
    }

    fn run_path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Trains 2 epochs of 3 steps in run `name`.
    fn train(&self, name: &str, options: &str) -> Vec<Line> {
        let (data, run) = (self.data.to_str().unwrap(), self.run_path(name));
        let options = format!("{OPTIONS} --epochs 2 {options}");
        let args = ["train", data, "--run", run.to_str().unwrap()];
        common::succeed(&args.into_iter().chain(options.split_whitespace()).collect::<Vec<_>>());
        self.lines(name)
    }

    /// Takes the checkpoints from step `step` on away from run `name`, and continues it.
    fn resume_from(&self, name: &str, step: u64, options: &str) -> Vec<Line> {
        let run = self.run_path(name);
        for entry in std::fs::read_dir(run.join("checkpoints")).unwrap() {
            let path = entry.unwrap().path();
            let number = path.file_stem().unwrap().to_str().unwrap().trim_start_matches("step-").parse::<u64>();
            if number.is_ok_and(|number| number > step) {
                std::fs::remove_file(path).unwrap();
            }
        }
        let args = ["train", "--resume", run.to_str().unwrap()];
        common::succeed(&args.into_iter().chain(options.split_whitespace()).collect::<Vec<_>>());
        self.lines(name)
    }

    fn lines(&self, name: &str) -> Vec<Line> {
        metrics::read(&self.run_path(name).join("metrics.jsonl")).unwrap().iter().map(Line::without_timing).collect()
    }

    fn config(&self, name: &str) -> String {
        std::fs::read_to_string(self.run_path(name).join("config.toml")).unwrap()
    }

    fn weights(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.run_path(name).join("checkpoints/step-00000006.safetensors")).unwrap()
    }
}

fn losses_agree(a: &[Line], b: &[Line], tolerance: f64) {
    assert_eq!((a.len(), b.len()), (6, 6));
    for (a, b) in a.iter().zip(b) {
        assert!((a.loss - b.loss).abs() < tolerance, "step {}: {} and {}", a.step, a.loss, b.loss);
    }
}

#[test]
fn a_run_keeps_its_mode_and_its_checkpoints_go_on_in_the_other() {
    let bench = Bench::new();
    let together = bench.train("together", "--device cpu");
    let sequential = bench.train("sequential", "--device cpu --views sequential --memory-budget min");
    losses_agree(&together, &sequential, 1e-3);
    assert!(!bench.config("together").contains("[machine.memory]"), "{}", bench.config("together"));
    assert!(bench.config("sequential").contains("views = \"sequential\"\nbudget = \"min\""));
    let (bits, of_together) = (bench.weights("sequential"), bench.weights("together"));
    assert!(bits != of_together, "the modes round differently");
    // As it was, with nothing said again.
    assert_eq!(bench.resume_from("sequential", 2, ""), sequential);
    assert!(bench.weights("sequential") == bits);
    losses_agree(&bench.resume_from("sequential", 2, "--views together"), &together, 1e-3);
    losses_agree(&bench.resume_from("together", 4, "--views sequential"), &together, 1e-3);
}

#[test]
fn a_budget_can_be_taken_off_a_run_that_goes_on() {
    let bench = Bench::new();
    let lines = bench.train("run", "--device cpu --memory-budget min");
    let bits = bench.weights("run");
    // What no recomputation can meet: only without a budget is there a plan.
    let config = bench.config("run");
    for budget in ["1kB", "none"] {
        let changed = config.replace("budget = \"min\"", &format!("budget = \"{budget}\""));
        assert_ne!(changed, config);
        std::fs::write(bench.run_path("run").join("config.toml"), changed).unwrap();
        let resume = ["train", "--resume", bench.run_path("run").to_str().unwrap()].map(String::from);
        let options = if budget == "1kB" {
            let message = common::fail(&resume.each_ref().map(String::as_str));
            assert!(message.contains("--memory-budget: expected at least"), "{message}");
            "--memory-budget none"
        } else {
            ""
        };
        assert_eq!(bench.resume_from("run", 2, options), lines, "{budget}");
        assert!(bench.weights("run") == bits, "{budget}");
    }
}

#[test]
fn the_command_line_says_what_it_cannot_do() {
    let bench = Bench::new();
    let run = bench.run_path("refused");
    let args = |options: &'static str| {
        let args = ["train", bench.data.to_str().unwrap(), "--run", run.to_str().unwrap()];
        args.map(String::from)
            .into_iter()
            .chain(OPTIONS.split_whitespace().chain(options.split_whitespace()).map(String::from))
    };
    let fail =
        |options| common::fail(&args(options).collect::<Vec<_>>().iter().map(String::as_str).collect::<Vec<_>>());
    let message = fail("--device cpu --views sequential --stop-gradient false");
    assert!(message.contains("--views: expected together with --stop-gradient false"), "{message}");
    let message = fail("--device cpu --memory-budget 1kB");
    assert!(
        message.contains("--memory-budget: expected at least") && message.contains("--views sequential"),
        "{message}"
    );
    assert!(!Path::new(&run).join("config.toml").exists());
}

#[cfg(feature = "emulator")]
#[test]
fn a_run_on_an_emulated_device_in_bf16() {
    let bench = Bench::new();
    let together = bench.train("together", "--device cuda-emulated --dtype bf16");
    let sequential = bench.train("sequential", "--device cuda-emulated --dtype bf16 --views sequential");
    losses_agree(&together, &sequential, 0.05);
    assert_eq!(together[0].loss, sequential[0].loss, "the way forward is the same to the bit");
    let least = bench.train("least", "--device cuda-emulated --dtype bf16 --views sequential --memory-budget min");
    assert_eq!(least, sequential);
    assert!(bench.weights("least") == bench.weights("sequential"));
}
