//! The first convolution of an ImageNet ResNet on an emulated CUDA device, against the CPU's plain loops in float64 on the
//! same rounded numbers, and a whole step that goes through it.
#![cfg(feature = "emulator")]

mod common;

use std::sync::Arc;

use common::sanitizer::{Sanitizer, emulator_library, sanitized};

use half::{bf16, f16};
use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
use simsiam_engine::exec::Device;
use simsiam_engine::graph::{Role, Tape, ValueId, backward};
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::{SimSiam, StepShape, TrainGraph, ViewSource};
use simsiam_engine::ops::conv2d::Conv2d;
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::{DType, TensorDesc};
use simsiam_engine::train::state::write_initial;

const STEM: Conv2d = Conv2d::new([2; 2], [3; 2]);

fn emulated(seed: u64) -> Device {
    Device::Cuda(Arc::new(Emulator::new(Options { threads: 2, seed }).unwrap()))
}

/// Normal numbers that `narrow` holds exactly.
fn rounded(seed: u64, n: usize, narrow: DType) -> Vec<f64> {
    let mut stream = Stream::new(seed, 5, 0);
    let round = |v: f32| if narrow == DType::Bf16 { bf16::from_f32(v).to_f64() } else { f16::from_f32(v).to_f64() };
    (0..n).map(|_| round(stream.normal() as f32)).collect()
}

/// Convolutions of batches of several sizes `[n, h, w]` with the same weights, whose gradients thus add up. Returns the
/// results, and the gradient last.
fn convolve(device: &Device, sizes: &[[usize; 3]], c_out: usize, dtype: DType, narrow: DType) -> Vec<Vec<f64>> {
    let mut tape = Tape::new();
    let w = tape.leaf("w", TensorDesc::new([c_out, 7, 7, 4], dtype), Role::Input, true);
    let mut seeds = vec![];
    for &[n, h, width] in sizes {
        let x = tape.leaf("x", TensorDesc::new([n, h, width, 4], dtype), Role::Input, false);
        let y = tape.record_one(STEM, &[x, w]).unwrap();
        tape.keep(y);
        let desc = tape.desc(y).clone();
        seeds.push((y, tape.leaf("d_y", desc, Role::Input, false)));
    }
    let d_w = backward(&mut tape, &seeds).unwrap()[&w];
    tape.keep(d_w);
    if matches!(device, Device::Cuda(_)) {
        for node in tape.nodes() {
            let descs: Vec<&TensorDesc> = node.inputs.iter().map(|&id| tape.desc(id)).collect();
            assert!(node.op.library_work(&descs).is_none(), "{} is left to a library", node.name);
        }
    }
    let leaves: Vec<(ValueId, TensorDesc)> =
        tape.with_role(Role::Input).map(|(id, value)| (id, value.desc.clone())).collect();
    let mut exec = device.poisoned_executor(tape).unwrap();
    for (id, desc) in leaves {
        exec.write(id, &dtype.encode(&rounded(id.index() as u64, desc.shape.len(), narrow))).unwrap();
    }
    exec.run_step().unwrap();
    assert_eq!(exec.overrun().unwrap(), None);
    seeds.iter().map(|(y, _)| *y).chain([d_w]).map(|value| exec.read(value).unwrap().to_f64()).collect()
}

/// Compares with the CPU: results may be off by half a unit of the last place and a little, gradients by float32's error.
fn check(sizes: &[[usize; 3]], c_out: usize, dtype: DType, seed: u64) {
    let expected = convolve(&Device::Cpu(Tier::Reference), sizes, c_out, DType::F64, dtype);
    let got = convolve(&emulated(seed), sizes, c_out, dtype, dtype);
    assert_eq!(got.len(), sizes.len() + 1);
    for (i, (expected, got)) in expected.iter().zip(&got).enumerate() {
        let half_unit = match (i == sizes.len(), dtype) {
            (true, _) => 0.0,
            (false, DType::Bf16) => 2f64.powi(-8),
            (false, _) => 2f64.powi(-11),
        };
        let scale = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        assert!(scale > 1.0 && expected.len() == got.len());
        for (place, (e, g)) in expected.iter().zip(got).enumerate() {
            let allowed = half_unit * e.abs() + 2e-6 * scale;
            let what = if i == sizes.len() { "d_w".into() } else { format!("y of {:?}", sizes[i]) };
            assert!((e - g).abs() <= allowed, "{what} in {dtype}, {c_out} channels, at {place}: expected {e}, got {g}");
        }
    }
}

#[test]
fn small_and_odd_images() {
    // Even and odd widths, single rows, columns and pixels, and tiles that the image ends in; one batch after the other.
    let sizes = [[3, 7, 9], [1, 30, 31], [1, 1, 1], [2, 1, 40], [1, 50, 1], [2, 16, 2]];
    check(&sizes, 64, DType::Bf16, 0);
    check(&sizes[1..], 64, DType::F16, 7);
}

#[test]
fn several_groups_of_channels() {
    check(&[[1, 33, 64], [3, 7, 9]], 128, DType::Bf16, 3);
    check(&[[2, 9, 12]], 192, DType::F16, 4);
}

#[test]
fn blocks_with_several_tiles() {
    // 7 tiles across, so that both stages of shared memory are filled again.
    check(&[[1, 13, 224], [5, 21, 70]], 64, DType::F16, 11);
    check(&[[2, 40, 100]], 64, DType::Bf16, 12);
}

/// Runs the tests above under a sanitizer.
fn watched(sanitizer: Sanitizer) {
    let library = emulator_library("planted", Some(sanitizer), &["emulator/planted.cu"]);
    let Some(mut command) = sanitized(sanitizer, &library, &std::env::current_exe().unwrap()) else {
        let required = std::env::var("SIMSIAM_REQUIRE_NVCC").is_ok_and(|value| value == "1");
        assert!(!required, "SIMSIAM_REQUIRE_NVCC=1, but the {sanitizer:?} sanitizer is not installed");
        return println!("skipped: the {sanitizer:?} sanitizer is not installed");
    };
    command.args(["--exact", "small_and_odd_images", "several_groups_of_channels", "blocks_with_several_tiles"]);
    let output = command.output().unwrap();
    let report = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && report.contains("3 passed"), "{}\n{report}", output.status);
}

#[test]
fn the_kernels_stay_in_bounds() {
    watched(Sanitizer::Address);
}

#[test]
fn the_kernels_have_no_race() {
    watched(Sanitizer::Thread);
}

fn model(width: usize, stem: Stem) -> SimSiam {
    let backbone = ResNet { block: Block::Basic, depths: vec![1], width, stem };
    let heads = Heads {
        dim: 32,
        projector_hidden: 32,
        predictor_hidden: 16,
        projector_layers: 2,
        projector_out_affine: false,
        projector_out_bias: OutBias::None,
        norm: HeadNorm::Hidden,
        predictor: PredictorKind::Mlp,
    };
    SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true }
}

/// A step on views of noise; returns the loss and the gradient of the first convolution.
fn step(dtype: DType, padded: bool) -> (f64, Vec<f64>) {
    let shape =
        StepShape { keep_gradients: true, scaling: None, ..StepShape::new(5, 21, dtype, ViewSource::Given { padded }) };
    let TrainGraph { tape, views, step_params, loss, params, gradients, .. } =
        model(64, Stem::Imagenet).record_step(&shape).unwrap();
    let stem = |node: &&simsiam_engine::graph::Node| node.name.contains("conv1") && node.op.name() == "conv2d";
    let node = tape.nodes().iter().find(stem).unwrap();
    let descs: Vec<&TensorDesc> = node.inputs.iter().map(|&id| tape.desc(id)).collect();
    assert_eq!(
        (descs[0].shape.channels(), node.op.library_work(&descs).is_none()),
        (if padded { 4 } else { 3 }, padded)
    );
    let len = tape.desc(views).shape.len();
    let mut exec = emulated(5).poisoned_executor(tape).unwrap();
    write_initial(&mut *exec, &params, 3).unwrap();
    exec.write(step_params, bytemuck::cast_slice(&[0.05, 0.05, 0.9, 1e-4f64])).unwrap();
    exec.write(views, &dtype.encode(&rounded(1, len, dtype))).unwrap();
    exec.run_step().unwrap();
    assert_eq!(exec.overrun().unwrap(), None);
    let (name, d_w) = &gradients[0];
    assert_eq!(name, "encoder.conv1.weight");
    let read = |value: ValueId| exec.read(value).unwrap().to_f64();
    (read(loss)[0], read(*d_w))
}

#[test]
fn a_step_is_that_of_the_library() {
    for dtype in [DType::Bf16, DType::F16] {
        let ((loss, d_w), (library_loss, library_d_w)) = (step(dtype, true), step(dtype, false));
        assert!((loss - library_loss).abs() <= 2e-3, "{loss} and {library_loss}");
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let error =
            norm(&mut d_w.iter().zip(&library_d_w).map(|(a, b)| a - b)) / norm(&mut library_d_w.iter().copied());
        println!("{dtype}: loss {loss} and {library_loss}, d_w off by {error:.2e}");
        assert_eq!(d_w.len(), 64 * 7 * 7 * 3);
        assert!(error < 2e-2, "d_w in {dtype}: off by {error}");
    }
}

#[test]
fn what_the_kernels_do_not_take_has_the_librarys_channels() {
    let channels = |width, stem, dtype| model(width, stem).backbone.padded_channels(dtype);
    assert_eq!([DType::Bf16, DType::F16, DType::F32].map(|dtype| channels(64, Stem::Imagenet, dtype)), [4, 4, 8]);
    assert_eq!(channels(128, Stem::Imagenet, DType::F16), 4);
    assert_eq!(channels(48, Stem::Imagenet, DType::Bf16), 8);
    assert_eq!(channels(64, Stem::Cifar, DType::Bf16), 8);
}
