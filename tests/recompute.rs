//! Activations that are computed again: no bit of a result changes, the memory is what was asked for, and no more is repeated
//! than that takes.

mod steps;

use std::collections::BTreeSet;

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::exec::Device;
use simsiam_engine::graph::budget::{MemoryBudget, Trade, fit, repetitions};
use simsiam_engine::graph::plan::Target;
use simsiam_engine::graph::recompute::recompute;
use simsiam_engine::graph::{Node, Phase, Plan, Tape};
use simsiam_engine::nn::epilogues::Layers;
use simsiam_engine::nn::heads::HeadNorm;
use simsiam_engine::nn::resnet::{Arch, Block, ResNet, Stem};
use simsiam_engine::nn::views::Views;
use simsiam_engine::tensor::DType;
use steps::{Setting, Trained, model};

fn settings(dtype: DType) -> Vec<Setting> {
    let bottleneck = Setting::new(model(Block::Bottleneck, Stem::Imagenet), [5, 13], dtype);
    let mut basic = Setting::new(model(Block::Basic, Stem::Cifar), [8, 16], dtype);
    basic.model.heads.norm = HeadNorm::None;
    let mut fused = Setting { padded: true, ..bottleneck.clone() };
    (fused.epilogues.pooling, fused.epilogues.statistics) = (true, "all".parse().unwrap());
    let mut gram = bottleneck.clone();
    gram.epilogues.gram = Layers::All;
    vec![bottleneck, basic, fused, gram]
}

fn least(target: Target) -> impl Fn(Tape) -> Tape {
    move |tape| {
        let (fitted, trade) = fit(&tape, target, MemoryBudget::Least).unwrap();
        assert!(trade.nodes > 3 && trade.bytes_with < trade.bytes_without, "{trade:?}");
        fitted
    }
}

/// Everything that can be had again is, whether that saves memory or not.
fn all(mut tape: Tape) -> Tape {
    let forward: BTreeSet<usize> =
        positions(&tape, |node| node.phase == Phase::Forward && !node.op.is_view()).collect();
    recompute(&mut tape, &forward).unwrap();
    tape
}

fn positions(tape: &Tape, keep: impl Fn(&Node) -> bool) -> impl Iterator<Item = usize> {
    tape.nodes().iter().enumerate().filter(move |(_, node)| keep(node)).map(|(index, _)| index)
}

fn no_bit_changes(device: &Device, settings: &[Setting], steps: usize) {
    for setting in settings {
        for views in [Views::Together, Views::Sequential] {
            let expected = setting.train(device, views, steps, |tape| tape);
            let same = |got: Trained, what: &str| {
                let different = got.differences(&expected);
                assert!(different.is_empty(), "{what}, {views} {setting:?}: {different:?}");
            };
            same(setting.train(device, views, steps, least(device.target())), "least memory");
            same(setting.train(device, views, steps, all), "all again");
        }
    }
}

#[test]
fn no_bit_changes_on_the_cpu() {
    no_bit_changes(&Device::Cpu(Tier::Direct), &settings(DType::F32), 3);
}

#[cfg(feature = "emulator")]
#[test]
fn no_bit_changes_on_an_emulated_device() {
    let [first, last] = [DType::Bf16, DType::F16].map(settings);
    no_bit_changes(&steps::emulated(3), &first[..1], 2);
    no_bit_changes(&steps::emulated(4), &last[2..], 2);
}

/// The premise of the tests above: they would see it if a repetition computed something else.
#[test]
fn another_input_shows() {
    let setting = &settings(DType::F32)[0];
    let expected = setting.train(&Device::Cpu(Tier::Direct), Views::Together, 1, |tape| tape);
    let other = Setting { size: setting.size, ..setting.clone() };
    let two = other.train(&Device::Cpu(Tier::Direct), Views::Together, 2, |tape| tape);
    let shared: Vec<_> = two.0.iter().filter(|(name, _)| !name.starts_with("step 1")).cloned().collect();
    assert!(Trained(shared).differences(&expected).iter().any(|name| name.contains("conv1.weight")));
}

#[test]
fn what_is_repeated_stands_right_before_its_first_reader_and_is_shared() {
    let tape = settings(DType::Bf16)[0].record(Views::Together).tape;
    let (tape, trade) = fit(&tape, Target::Cuda, MemoryBudget::Least).unwrap();
    assert_eq!(trade.nodes, repetitions(&tape).nodes);
    let mut shared = 0;
    for index in positions(&tape, |node| node.again) {
        let node = &tape.nodes()[index];
        assert!(node.phase == Phase::Backward && node.updates.is_empty(), "{}", node.name);
        let reads = |other: &Node| other.inputs.iter().any(|input| node.outputs.contains(input));
        let readers: Vec<usize> = positions(&tape, reads).collect();
        let first = readers[0];
        assert!(tape.nodes()[index..first].iter().all(|other| other.again), "{} waits for {first}", node.name);
        shared += usize::from(readers.len() > 1);
    }
    assert!(shared > 0, "an output that several nodes of the way back read");
    let names: BTreeSet<&str> = tape.nodes().iter().filter(|n| n.again).map(|n| n.name.as_str()).collect();
    assert_eq!(names.len(), trade.nodes, "nothing is repeated twice");
}

/// ResNet-50 at 224 pixels in bf16.
fn resnet50(batch: usize, views: Views) -> Tape {
    let small = Setting::new(model(Block::Basic, Stem::Cifar), [batch, 224], DType::Bf16);
    let mut setting = Setting { padded: true, ..small };
    setting.model.backbone = ResNet::named(Arch::Resnet50, Stem::Imagenet).unwrap();
    setting.record(views).tape
}

#[test]
fn a_budget_is_kept_with_no_more_traffic_than_a_larger_one_takes_less() {
    for views in [Views::Together, Views::Sequential] {
        let tape = resnet50(8, views);
        let trade = |budget| fit(&tape, Target::Cuda, budget).unwrap().1;
        let floor = trade(MemoryBudget::Least);
        let without = Plan::new(&tape, Target::Cuda).unwrap().memory.total;
        assert_eq!(floor.bytes_without, without);
        assert!(floor.bytes_with * 5 < without * 4, "{floor:?}");
        assert_eq!(floor.extra_flops, 0, "no product is computed again");
        let mut before = Trade { extra_traffic: u64::MAX, ..floor };
        for tenth in 0..=10 {
            let budget = floor.bytes_with + (without - floor.bytes_with) * tenth / 10;
            let (fitted, now) = fit(&tape, Target::Cuda, MemoryBudget::Bytes(budget as u64)).unwrap();
            let memory = Plan::new(&fitted, Target::Cuda).unwrap().memory;
            assert!(memory.total <= budget, "{} of {budget}", memory.total);
            assert_eq!((now.bytes_with, now.saved_with), (memory.total, memory.saved_activations));
            assert!(now.extra_traffic <= before.extra_traffic, "{tenth}: {now:?} after {before:?}");
            before = now;
        }
        assert_eq!((before.nodes, before.extra_traffic), (0, 0), "nothing is repeated where all fits");
    }
}

#[test]
fn a_budget_that_cannot_be_met_is_refused_with_the_least_that_can() {
    let tape = settings(DType::F32)[0].record(Views::Together).tape;
    let floor = fit(&tape, Target::Cpu, MemoryBudget::Least).unwrap().1.bytes_with;
    let ask = |bytes: usize| fit(&tape, Target::Cpu, MemoryBudget::Bytes(bytes as u64));
    assert!(ask(floor).is_ok());
    let message = ask(floor - 1).map(|_| ()).unwrap_err().to_string();
    let expected = format!("--memory-budget: expected at least {:.1} MB", floor as f64 / 1e6);
    assert!(message.starts_with(&expected) && message.contains("hint: use --views sequential"), "{message}");
}

/// Of each bottleneck the outputs of its two inner batch norms with ReLU, 2 bytes an element: 6.6 MB a view.
#[test]
fn the_inner_norms_of_resnet50_save_what_they_take() {
    let (batch, mut tape) = (4, resnet50(4, Views::Together));
    let saved = |tape: &Tape| Plan::new(tape, Target::Cuda).unwrap().memory.saved_activations;
    let before = saved(&tape);
    let inner = |node: &Node| {
        let name = &node.name;
        node.op.name() == "batch_norm" && name.contains("layer") && (name.ends_with("bn1") || name.ends_with("bn2"))
    };
    let dropped: BTreeSet<usize> = positions(&tape, inner).collect();
    assert_eq!(dropped.len(), 32);
    recompute(&mut tape, &dropped).unwrap();
    let mut expected = 0;
    for (stage, blocks) in [3, 4, 6, 3].into_iter().enumerate() {
        let (side, channels) = (56 >> stage, 64 << stage);
        let map = |side: usize| side * side * channels * 2;
        // The first block's first convolution is in front of the stride, except in the first stage.
        let first = if stage == 0 { map(side) } else { map(2 * side) };
        expected += first + (2 * blocks - 1) * map(side);
    }
    assert!((6.5e6..6.7e6).contains(&(expected as f64)), "{expected}");
    assert_eq!(before - saved(&tape), 2 * batch * expected);
    assert_eq!(repetitions(&tape).nodes, 32);
}
