//! Batch norm and pooling on an emulated CUDA device against the CPU, where goldens of single ops do not reach: gradients
//! that add up in one tensor, and NaN.
#![cfg(feature = "emulator")]

use std::sync::Arc;

use half::{bf16, f16};
use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
use simsiam_engine::exec::Device;
use simsiam_engine::graph::{Role, Tape, ValueId, backward};
use simsiam_engine::ops::batch_norm::pair::BatchNormPair;
use simsiam_engine::ops::batch_norm::pooled::BatchNormMaxPool;
use simsiam_engine::ops::batch_norm::{BatchNorm, BatchNormStatistics, Fusion, channel_desc};
use simsiam_engine::ops::pool::{GlobalAvgPool, MaxPool};
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::{DType, TensorDesc};

fn cpu() -> Device {
    Device::Cpu(Tier::Direct)
}

fn emulated(seed: u64) -> Device {
    Device::Cuda(Arc::new(Emulator::new(Options { threads: 2, seed }).unwrap()))
}

fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Runs a step on poisoned memory and returns the kept values; leaves are drawn from `seed`.
fn run(device: &Device, tape: Tape, results: &[ValueId], seed: u64) -> Vec<Vec<f64>> {
    let leaves: Vec<(ValueId, TensorDesc)> = [Role::Input, Role::State]
        .iter()
        .flat_map(|&role| tape.with_role(role).map(|(id, value)| (id, value.desc.clone())))
        .collect();
    let mut exec = device.poisoned_executor(tape).unwrap();
    for (id, desc) in leaves {
        let mut stream = Stream::new(seed, 3, id.index() as u64);
        let values: Vec<f32> = (0..desc.shape.len()).map(|_| stream.normal() as f32).collect();
        let bytes = if desc.dtype == DType::I64 { vec![0; 8] } else { encode(&values, desc.dtype) };
        exec.write(id, &bytes).unwrap();
    }
    exec.run_step().unwrap();
    assert_eq!(exec.overrun().unwrap(), None);
    results.iter().map(|&value| exec.read(value).unwrap().to_f64()).collect()
}

/// Several consumers of x, of the residual and of gamma and beta: every gradient but the first of each is added to what is
/// there. Returns the gradients of all four.
fn consumers(channels: usize, groups: usize) -> (Tape, Vec<ValueId>) {
    let mut tape = Tape::new();
    let image = TensorDesc::new([6, 7, 9, channels], DType::F32);
    let parameter = channel_desc(channels, DType::F32);
    let x = tape.leaf("x", image.clone(), Role::Input, true);
    let residual = tape.leaf("residual", image, Role::Input, true);
    let [gamma, beta, gamma_r, beta_r] =
        ["gamma", "beta", "gamma_r", "beta_r"].map(|name| tape.leaf(name, parameter.clone(), Role::Input, true));
    let state = ["running_mean", "running_var"].map(|name| tape.leaf(name, parameter.clone(), Role::State, false));
    let tracked = tape.leaf("num_batches_tracked", TensorDesc::new([], DType::I64), Role::State, false);

    let mut outputs = Vec::new();
    for (relu, with_residual) in [(true, true), (false, true), (true, false), (false, false)] {
        let fusion = Fusion { affine: true, residual: with_residual, relu };
        let mut inputs = vec![x, gamma, beta];
        inputs.extend(with_residual.then_some(residual));
        let op = BatchNorm { groups, eps: 1e-5, momentum: 0.1, fusion, sums_given: false, means: false };
        outputs.push(tape.record_updating(op, &inputs, &[state[0], state[1], tracked]).unwrap()[0]);
    }
    let updates = [state[0], state[1], tracked];
    let statistics = BatchNormStatistics::new(groups, 1e-5, 0.1, false);
    let of_r = tape.record_updating(statistics, &[residual], &updates).unwrap();
    let inputs = [x, gamma, beta, residual, of_r[0], of_r[1], gamma_r, beta_r];
    outputs.push(tape.record_updating(BatchNormPair::new(groups, 1e-5, 0.1, false), &inputs, &updates).unwrap()[0]);
    for (kernel, stride, padding) in [(3, 2, 1), (4, 3, 2)] {
        outputs.push(tape.record_one(MaxPool { kernel, stride, padding, taken: true }, &[x]).unwrap());
    }
    outputs.push(tape.record_one(GlobalAvgPool, &[x]).unwrap());
    outputs.push(tape.record_one(MaxPool { kernel: 2, stride: 2, padding: 0, taken: true }, &[residual]).unwrap());
    // Walked backwards, this one comes first and overwrites; the ones above add.
    outputs.push(tape.record_one(MaxPool { kernel: 3, stride: 1, padding: 1, taken: true }, &[x]).unwrap());

    let seeds: Vec<(ValueId, ValueId)> = outputs
        .iter()
        .map(|&y| {
            let desc = tape.desc(y).clone();
            (y, tape.leaf("d_y", desc, Role::Input, false))
        })
        .collect();
    let gradients = backward(&mut tape, &seeds).unwrap();
    let leaves = [x, residual, gamma, beta, gamma_r, beta_r];
    let results: Vec<ValueId> = leaves.iter().map(|leaf| tape.keep(gradients[leaf])).collect();
    (tape, results)
}

#[test]
fn gradients_of_several_consumers_add_up() {
    for (channels, groups) in [(3, 1), (7, 2), (8, 3), (24, 2), (64, 1)] {
        let run_on = |device: &Device| {
            let (tape, results) = consumers(channels, groups);
            run(device, tape, &results, channels as u64)
        };
        let expected = run_on(&cpu());
        for device in [emulated(0), emulated(5)] {
            let names = ["x", "residual", "gamma", "beta", "gamma_r", "beta_r"];
            for (name, (got, expected)) in names.iter().zip(run_on(&device).iter().zip(&expected)) {
                let scale = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                let close = got.iter().zip(expected).all(|(g, e)| (g - e).abs() <= 1e-6 * scale);
                assert!(scale > 0.1 && close, "d_{name} with {channels} channels in {groups} groups");
            }
        }
    }
}

/// Checks by search what was taken of `x`, `[n][h][w][c]`: the first position of each window whose value is that of y, or 255
/// where y is NaN.
fn assert_first_maxima(
    pool: MaxPool,
    [n, h, w, c]: [usize; 4],
    x: &[f64],
    y: &TensorDesc,
    [values, taken]: [&[f64]; 2],
) {
    let [oh, ow] = [y.shape.dims()[1], y.shape.dims()[2]];
    for element in 0..n * oh * ow * c {
        let (image, oy, ox, channel) =
            (element / (oh * ow * c), element / (ow * c) % oh, element / c % ow, element % c);
        let at = |position: usize| {
            let pixel = |o: usize, within: usize, size: usize| {
                (o * pool.stride + within).checked_sub(pool.padding).filter(|&i| i < size)
            };
            let (iy, ix) = (pixel(oy, position / pool.kernel, h)?, pixel(ox, position % pool.kernel, w)?);
            Some(x[((image * h + iy) * w + ix) * c + channel])
        };
        let first = (0..pool.kernel * pool.kernel).find(|&position| at(position) == Some(values[element]));
        assert_eq!(taken[element], first.unwrap_or(255) as f64, "element {element} of {y} by {pool:?}");
    }
}

#[test]
fn nan_wins_a_max_pool_and_takes_no_gradient() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for (channels, kernel, stride, padding) in
            [(8, 3, 2, 1), (3, 3, 2, 1), (8, 2, 1, 0), (5, 4, 2, 1), (4, 3, 1, 1), (16, 7, 3, 3)]
        {
            let pool = MaxPool { kernel, stride, padding, taken: true };
            let pooled = |device: &Device, dtype: DType| {
                let mut tape = Tape::new();
                let x = tape.leaf("x", TensorDesc::new([2, 9, 8, channels], dtype), Role::Input, true);
                let [y, taken] = tape.record(pool, &[x]).unwrap()[..] else { panic!("two outputs") };
                let alone = tape.record_one(MaxPool { taken: false, ..pool }, &[x]).unwrap();
                for value in [y, taken, alone] {
                    tape.keep(value);
                }
                let desc = tape.desc(y).clone();
                let d_y = tape.leaf("d_y", desc.clone(), Role::Input, false);
                let d_x = backward(&mut tape, &[(y, d_y)]).unwrap()[&x];
                tape.keep(d_x);
                let mut exec = device.poisoned_executor(tape).unwrap();
                // Whole numbers with many ties, exact in every type; about one in nine is NaN. Four rows are -infinity.
                let mut stream = Stream::new(17, 3, 0);
                let mut values = |n: usize, nan: u32| -> Vec<f32> {
                    let value = |word: u32| if word % 9 < nan { f32::NAN } else { (word >> 8 & 7) as f32 - 3.0 };
                    (0..n).map(|_| value(stream.word())).collect()
                };
                let mut image = values(2 * 9 * 8 * channels, 1);
                image[9 * 8 * channels..][..4 * 8 * channels].fill(f32::NEG_INFINITY);
                exec.write(x, &encode(&image, dtype)).unwrap();
                exec.write(d_y, &encode(&values(desc.shape.len(), 0), dtype)).unwrap();
                exec.run_step().unwrap();
                let results = [y, d_x, taken, alone].map(|value| exec.read(value).unwrap().to_f64());
                let image: Vec<f64> = image.into_iter().map(f64::from).collect();
                assert_first_maxima(pool, [2, 9, 8, channels], &image, &desc, [&results[0], &results[2]]);
                results
            };
            let (expected, got) = (pooled(&cpu(), DType::F32), pooled(&emulated(2), dtype));
            for (i, what) in ["y", "d_x", "taken", "y alone"].into_iter().enumerate() {
                let same = |(e, g): (&f64, &f64)| e == g || e.is_nan() && g.is_nan();
                let both = expected[i].iter().zip(&got[i]);
                assert!(both.clone().all(same), "{what} of {kernel}x{kernel} over {channels} channels in {dtype}");
            }
            assert!(expected[0].iter().zip(&expected[3]).all(|(y, alone)| y == alone || y.is_nan() && alone.is_nan()));
            let nans = expected[0].iter().filter(|v| v.is_nan()).count();
            assert!(nans > 0 && nans < expected[0].len() && expected[1].iter().all(|v| !v.is_nan()));
        }
    }
}

/// Distance of neighbouring numbers, as a share of them.
fn ulp(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 2.0f64.powi(-7),
        DType::F16 => 2.0f64.powi(-10),
        _ => 2.0f64.powi(-23),
    }
}

/// Batch norm, ReLU and max pooling, fused or not: y, running statistics and all gradients, that of x added to what another
/// consumer left there.
fn stem(fused: bool, [n, h, w, channels]: [usize; 4], groups: usize, dtype: DType) -> (Tape, Vec<ValueId>) {
    let mut tape = Tape::new();
    let parameter = channel_desc(channels, dtype);
    let x = tape.leaf("x", TensorDesc::new([n, h, w, channels], dtype), Role::Input, true);
    let [gamma, beta] = ["gamma", "beta"].map(|name| tape.leaf(name, parameter.clone(), Role::Input, true));
    let state = ["running_mean", "running_var"].map(|name| tape.leaf(name, parameter.clone(), Role::State, false));
    let tracked = tape.leaf("num_batches_tracked", TensorDesc::new([], DType::I64), Role::State, false);
    let pooled = TensorDesc::new([n, h.div_ceil(2), w.div_ceil(2), channels], dtype);
    let d_y = tape.leaf("d_y", pooled, Role::Input, false);
    let d_other = tape.leaf("d_other", TensorDesc::new([n, channels], dtype), Role::Input, false);

    let (inputs, updates) = ([x, gamma, beta], [state[0], state[1], tracked]);
    let y = match fused {
        true => tape.record_updating(BatchNormMaxPool::new(groups, 1e-5, 0.1, false), &inputs, &updates).unwrap()[0],
        false => {
            let fusion = Fusion { affine: true, residual: false, relu: true };
            let norm = BatchNorm { groups, eps: 1e-5, momentum: 0.1, fusion, sums_given: false, means: false };
            let y = tape.record_updating(norm, &inputs, &updates).unwrap()[0];
            tape.record_one(MaxPool { kernel: 3, stride: 2, padding: 1, taken: true }, &[y]).unwrap()
        }
    };
    // Recorded last, it is the first on the way back: the batch norm adds to its d_x.
    let other = tape.record_one(GlobalAvgPool, &[x]).unwrap();
    let seeds = [(y, d_y), (other, d_other)];
    let gradients = backward(&mut tape, &seeds).unwrap();
    let results = [y, state[0], state[1], gradients[&x], gradients[&gamma], gradients[&beta]];
    let results = results.map(|value| tape.keep(value)).to_vec();
    (tape, results)
}

#[test]
fn the_fused_stem_is_batch_norm_and_max_pool() {
    let shapes = [([4, 7, 9, 3], 2), ([6, 8, 5, 8], 3), ([2, 1, 6, 64], 1), ([2, 33, 30, 24], 2)];
    for (shape, groups) in shapes {
        for (device, dtype) in
            [(cpu(), DType::F32), (emulated(0), DType::F32), (emulated(3), DType::Bf16), (emulated(0), DType::F16)]
        {
            let run_it = |fused: bool| {
                let (tape, results) = stem(fused, shape, groups, dtype);
                run(&device, tape, &results, 11)
            };
            let (expected, got) = (run_it(false), run_it(true));
            let names = ["y", "running mean", "running var", "d_x", "d_gamma", "d_beta"];
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let what = format!("{} of {shape:?} in {groups} groups of {dtype}", names[i]);
                assert!(expected.iter().any(|v| v.abs() > 0.01), "{what} says nothing");
                // Gradients sum over pixels, in another order: float32's rounding, and where that tips it the result's own.
                let largest = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                let rounding = if names[i] == "d_x" { ulp(dtype) } else { ulp(DType::F32) };
                let allowed = if i < 3 { 0.0 } else { 8.0 * ulp(DType::F32) + rounding } * largest;
                let off = got.iter().zip(expected).fold(0.0, |m: f64, (g, e)| m.max((g - e).abs()));
                assert!(off <= allowed, "{what} is off by {off:.2e}, allowed {allowed:.2e}");
            }
        }
    }
}
