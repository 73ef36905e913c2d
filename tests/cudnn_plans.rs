//! cuDNN makes plans for a described device, without one: every convolution of the ResNets has one that may be taken, on
//! every generation of devices that the kernels are compiled for.
//!
//! Needs cuDNN (`tools/install-cuda-libs.sh`); with `SIMSIAM_REQUIRE_CUDNN=1` its absence is a failure.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use simsiam_engine::backend::cuda::library::cudnn::{Cudnn, Epilogue, Graph, Plan, Target};
use simsiam_engine::backend::cuda::library::{Choice, Convolution, Direction, Fused, SCRATCH, Work, graph, limits};
use simsiam_engine::graph::{Node, Tape};
use simsiam_engine::nn::classifier::Classifier;
use simsiam_engine::nn::epilogues::Epilogues;
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Arch, ResNet, Stem};
use simsiam_engine::nn::simsiam::{SimSiam, StepShape, ViewSource};
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::tensor::{DType, TensorDesc};

/// The descriptions of devices, one for each generation.
const DEVICES: [(&str, &str); 6] = [
    ("sm_80", include_str!("../tools/devices/a100.json")),
    ("sm_86", include_str!("../tools/devices/rtx3090.json")),
    ("sm_89", include_str!("../tools/devices/rtx4090.json")),
    ("sm_90", include_str!("../tools/devices/h100.json")),
    ("sm_100", include_str!("../tools/devices/b200.json")),
    ("sm_120", include_str!("../tools/devices/rtx5090.json")),
];
const ARCHS: [Arch; 4] = [Arch::Resnet18, Arch::Resnet34, Arch::Resnet50, Arch::Resnet101];
const SIZES: [(usize, Stem); 4] =
    [(32, Stem::Cifar), (96, Stem::Imagenet), (160, Stem::Imagenet), (224, Stem::Imagenet)];
/// `--dtype` in its four forms: element type, and whether float32 may be rounded to TF32.
const PRECISIONS: [(&str, DType, bool); 4] =
    [("bf16", DType::Bf16, false), ("fp16", DType::F16, false), ("f32", DType::F32, false), ("tf32", DType::F32, true)];

fn cudnn() -> Option<Arc<Cudnn>> {
    match Cudnn::load() {
        Ok(cudnn) => Some(cudnn),
        Err(error) => {
            assert!(!std::env::var("SIMSIAM_REQUIRE_CUDNN").is_ok_and(|value| value == "1"), "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// The convolutions of a training step, forward and backward, as its tape says.
fn convolutions(arch: Arch, size: (usize, Stem), views: usize, dtype: DType) -> Vec<Convolution> {
    convolutions_with(arch, size, views, dtype, Epilogues::default())
}

fn convolutions_with(
    arch: Arch,
    (size, stem): (usize, Stem),
    views: usize,
    dtype: DType,
    epilogues: Epilogues,
) -> Vec<Convolution> {
    let backbone = ResNet::named(arch, stem).unwrap();
    let heads = Heads {
        dim: 64,
        projector_hidden: 64,
        predictor_hidden: 16,
        projector_layers: 2,
        projector_out_affine: false,
        projector_out_bias: OutBias::None,
        norm: HeadNorm::Hidden,
        predictor: PredictorKind::Mlp,
    };
    let model = SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true };
    let source = ViewSource::Given { padded: true };
    let shape = StepShape { epilogues, ..StepShape::new(views / 2, size, dtype, source) };
    let tape = model.record_step(&shape).unwrap().tape;
    tape.nodes().iter().filter_map(|node| convolution(&tape, node)).collect()
}

fn convolution(tape: &Tape, node: &Node) -> Option<Convolution> {
    let descs: Vec<&TensorDesc> = node.inputs.iter().map(|&id| tape.desc(id)).collect();
    match node.op.library_work(&descs)? {
        Work::Convolution(convolution) => Some(convolution),
        Work::Product(_) => None,
    }
}

/// All different ones of all networks at all sizes.
fn all_convolutions(views: usize, dtype: DType) -> Vec<Convolution> {
    let mut all = BTreeMap::new();
    for (arch, size) in ARCHS.into_iter().flat_map(|arch| SIZES.map(|size| (arch, size))) {
        all.extend(convolutions(arch, size, views, dtype).into_iter().map(|one| (format!("{one:?}"), one)));
    }
    all.into_values().collect()
}

/// The plan that is taken without timing.
fn first_plan(cudnn: &Arc<Cudnn>, target: &Target, one: &Convolution, accumulate: bool, tf32: bool) -> Option<Plan> {
    let choice = Choice { tf32, ..Choice::default() };
    let graph = graph(cudnn, target, one, accumulate).unwrap();
    graph.plans(limits(one, choice), 1).unwrap().pop()
}

/// What was found for one device and precision.
#[derive(Debug, Default)]
struct Tally {
    works: usize,
    tensor_cores: usize,
    workspace: usize,
    without: Vec<String>,
}

fn tally(cudnn: &Arc<Cudnn>, target: &Target, works: &[Convolution], tf32: bool) -> Tally {
    let mut tally = Tally::default();
    for one in works {
        // Gradients are added to others as well.
        let modes: &[bool] = if one.direction == Direction::Forward { &[false] } else { &[false, true] };
        for &accumulate in modes {
            tally.works += 1;
            match first_plan(cudnn, target, one, accumulate, tf32) {
                Some(plan) => {
                    assert!(plan.workspace <= SCRATCH && !plan.compiled, "{plan:?}");
                    assert!(one.dtype != DType::F32 || tf32 || !plan.tensor_cores, "{plan:?}");
                    tally.tensor_cores += usize::from(plan.tensor_cores);
                    tally.workspace = tally.workspace.max(plan.workspace);
                }
                None => tally.without.push(format!("{one:?}, accumulate: {accumulate}")),
            }
        }
    }
    tally
}

#[test]
fn every_convolution_of_the_resnets_has_a_plan_on_every_device() {
    let Some(cudnn) = cudnn() else { return };
    let jobs: Vec<_> = DEVICES.into_iter().flat_map(|device| PRECISIONS.map(|precision| (device, precision))).collect();
    let tallies: Vec<_> = jobs
        .par_iter()
        .map(|((_, json), (_, dtype, tf32))| {
            let target = Target::described(&cudnn, json).unwrap();
            tally(&cudnn, &target, &all_convolutions(256, *dtype), *tf32)
        })
        .collect();
    let mut without = vec![];
    for (((device, _), (precision, ..)), tally) in jobs.iter().zip(&tallies) {
        let Tally { works, tensor_cores, workspace, .. } = tally;
        println!(
            "{device:<7} {precision:<5} {works} works, {tensor_cores} on tensor cores, workspace up to {workspace} bytes"
        );
        assert!(*works > 300, "{works} works only: the tape was not read");
        without.extend(tally.without.iter().map(|one| format!("{device} {precision}: {one}")));
        // In 16 bits nothing else is fast enough.
        let enough = *precision == "f32" || *precision == "tf32" || tensor_cores * 50 >= works * 49;
        assert!(enough, "{device} {precision}: {tensor_cores} of {works} on tensor cores");
    }
    assert!(without.is_empty(), "{} without a plan:\n{}", without.len(), without.join("\n"));
}

#[test]
fn a_large_batch_has_plans_as_well() {
    let Some(cudnn) = cudnn() else { return };
    let works = convolutions(Arch::Resnet50, (224, Stem::Imagenet), 1024, DType::Bf16);
    for (device, json) in [DEVICES[0], DEVICES[3], DEVICES[4]] {
        let target = Target::described(&cudnn, json).unwrap();
        let tally = tally(&cudnn, &target, &works, false);
        println!("{device}: {tally:?}");
        assert_eq!(tally.without, [""; 0]);
    }
}

/// The head of a classifier has as many rows as there are classes, be they odd: its weight gradient is a convolution that
/// cuDNN may refuse, but then it has to be a product as well, and the refusal no error.
#[test]
fn heads_of_any_number_of_classes_can_be_trained() {
    let Some(cudnn) = cudnn() else { return };
    let backbone = ResNet::named(Arch::Resnet18, Stem::Cifar).unwrap();
    for ((device, json), (precision, dtype, tf32)) in
        DEVICES.into_iter().flat_map(|device| PRECISIONS.map(|precision| (device, precision)))
    {
        let target = Target::described(&cudnn, json).unwrap();
        let mut without = vec![];
        for (classes, batch) in [(2, 256), (3, 7), (10, 256), (37, 100), (100, 13), (1000, 256)] {
            let model = Classifier { backbone: backbone.clone(), classes, frozen: 0 };
            let shape = StepShape::new(batch, 32, dtype, ViewSource::Given { padded: true });
            let tape = model.record_step(&shape).unwrap().tape;
            let of_head = tape.nodes().iter().filter(|node| node.name.starts_with("fc"));
            let works: Vec<Convolution> = of_head.filter_map(|node| convolution(&tape, node)).collect();
            assert_eq!(works.len(), 1, "the weight gradient of the head");
            assert!(works[0].as_product().is_some(), "{:?}", works[0]);
            if first_plan(&cudnn, &target, &works[0], false, tf32).is_none() {
                without.push(classes);
            }
        }
        println!("{device} {precision}: left to cuBLASLt: heads of {without:?} classes");
    }
}

#[test]
fn an_engine_that_was_chosen_is_found_again() {
    let Some(cudnn) = cudnn() else { return };
    let target = Target::described(&cudnn, DEVICES[3].1).unwrap();
    let works = convolutions(Arch::Resnet18, (96, Stem::Imagenet), 64, DType::Bf16);
    for one in works.iter().take(12) {
        let graph = graph(&cudnn, &target, one, false).unwrap();
        let limits = limits(one, Choice::default());
        let plans = graph.plans(limits, 12).unwrap();
        assert!(plans.len() > 3, "{one:?}: {} candidates", plans.len());
        for plan in &plans {
            let again = graph.plan_of(&plan.engine, limits).unwrap().unwrap();
            assert_eq!((&again.engine, again.workspace), (&plan.engine, plan.workspace));
        }
        let mut other = plans[0].engine.clone();
        other.knobs.push([-1, -1]);
        assert!(graph.plan_of(&other, limits).unwrap().is_none());
    }
}

#[test]
fn statistics_come_out_of_the_convolution_in_float16_on_hopper() {
    let Some(cudnn) = cudnn() else { return };
    let target = Target::described(&cudnn, DEVICES[3].1).unwrap();
    let works = convolutions(Arch::Resnet50, (224, Stem::Imagenet), 256, DType::F16);
    let one = works.iter().find(|one| one.direction == Direction::Forward && one.geometry.kernel == [3, 3]).unwrap();
    let graph = Graph::new(&cudnn, &target, one, Epilogue::Statistics).unwrap();
    let plans = graph.plans(limits(one, Choice::default()), 4).unwrap();
    assert!(plans.iter().any(|plan| !plan.compiled), "{plans:?}");
    let gradient = Convolution { direction: Direction::DataGradient, ..*one };
    assert!(Graph::new(&cudnn, &target, &gradient, Epilogue::Statistics).is_err());
    // The addition is a graph as well; its engines are compiled at run time, which takes a device's driver.
    Graph::new(&cudnn, &target, &gradient, Epilogue::Add).unwrap();
}

/// Those that have something fused, in every network at every size.
fn fused_convolutions(views: usize, dtype: DType) -> Vec<Convolution> {
    let epilogues = Epilogues {
        statistics: "all".parse().unwrap(),
        residual_gradient: "fused".parse().unwrap(),
        ..Epilogues::default()
    };
    let mut all = BTreeMap::new();
    for (arch, size) in ARCHS.into_iter().flat_map(|arch| SIZES.map(|size| (arch, size))) {
        let found = convolutions_with(arch, size, views, dtype, epilogues.clone());
        let fused = found.into_iter().filter(|one| one.fused != Fused::Nothing);
        all.extend(fused.map(|one| (format!("{one:?}"), one)));
    }
    all.into_values().collect()
}

#[test]
fn every_forward_convolution_has_a_precompiled_plan_with_statistics_where_the_default_takes_it() {
    let Some(cudnn) = cudnn() else { return };
    for ((name, json), views) in [DEVICES[0], DEVICES[3]].into_iter().flat_map(|device| [(device, 64), (device, 512)]) {
        let target = Target::described(&cudnn, json).unwrap();
        let works = fused_convolutions(views, DType::F16);
        let (mut engines, mut workspace, mut without) = (BTreeMap::new(), 0, vec![]);
        // What the default takes: all but the stems' 7x7.
        let forward = works.iter().filter(|one| one.direction == Direction::Forward);
        let (with_statistics, stems): (Vec<&Convolution>, Vec<&Convolution>) =
            forward.partition(|one| one.geometry.kernel[0] <= 3);
        for one in &stems {
            let plan = first_plan(&cudnn, &target, one, false, false).map(|plan| plan.engine);
            println!("{name}, {views} views: {:?}: {plan:?}", one.geometry);
        }
        assert!(with_statistics.len() > 100, "{} works only: the tape was not read", with_statistics.len());
        for one in with_statistics {
            assert_eq!(one.fused, Fused::Statistics { groups: 2 });
            match first_plan(&cudnn, &target, one, false, false) {
                Some(plan) if !plan.compiled => {
                    assert!(plan.workspace <= SCRATCH, "{plan:?}");
                    workspace = workspace.max(plan.workspace);
                    *engines.entry(plan.engine.index).or_insert(0) += 1;
                }
                other => without.push(format!("{one:?}: {other:?}")),
            }
        }
        println!("{name}, {views} views: engines {engines:?}, workspace up to {workspace} bytes");
        assert!(without.is_empty(), "{name}: {} without a plan:\n{}", without.len(), without.join("\n"));
        // The sum with another gradient is a graph as well; its engines are compiled at run time, by a device's driver.
        let sums: Vec<_> = works.iter().filter(|one| one.fused == Fused::Addition).collect();
        assert!(sums.len() > 20, "{}", sums.len());
        sums.iter().for_each(|one| _ = graph(&cudnn, &target, one, false).unwrap());
    }
}

#[test]
fn parts_that_lie_where_no_engine_looks_are_refused() {
    let Some(cudnn) = cudnn() else { return };
    let target = Target::described(&cudnn, DEVICES[3].1).unwrap();
    let works = fused_convolutions(64, DType::F16);
    let mut one = *works.iter().find(|one| one.direction == Direction::Forward).unwrap();
    one.geometry.c_out = 34;
    let message = graph(&cudnn, &target, &one, false).unwrap_err().to_string();
    assert!(message.contains("multiples of 16 bytes, got 136"), "{message}");
}

#[test]
fn what_cudnn_does_not_take_is_said() {
    let Some(cudnn) = cudnn() else { return };
    let error = Target::described(&cudnn, "{\"maxGridSize\": 3}").unwrap_err().to_string();
    assert!(error.starts_with("cuDNN cannot read the description of a device: "), "{error}");
    let target = Target::described(&cudnn, DEVICES[0].1).unwrap();
    let one = convolutions(Arch::Resnet18, SIZES[0], 4, DType::F32)[0];
    let error = graph(&cudnn, &target, &Convolution { dtype: DType::F64, ..one }, false).unwrap_err().to_string();
    assert!(error.contains("expected f32, bf16 or f16, got f64"), "{error}");
}

#[test]
fn the_described_devices_are_those_of_the_names() {
    for (name, json) in DEVICES {
        let device: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(format!("sm_{}", device["deviceVer"].as_u64().unwrap() / 10), name);
    }
    let files = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/devices")).unwrap().count();
    assert_eq!(files, DEVICES.len());
}
