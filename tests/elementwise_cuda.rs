//! Element-wise kernels, optimisers, checks and ceilings on an emulated CUDA device, where goldens of single ops do not
//! reach: copies of many weights, more parameters than one launch takes, gradients that add up, long columns.
#![cfg(feature = "emulator")]

use std::sync::Arc;

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
use simsiam_engine::backend::cuda::{DevicePtr, DeviceTensor, Driver, ceilings, check};
use simsiam_engine::exec::Device;
use simsiam_engine::graph::{Role, Tape, ValueId, backward, builtin};
use simsiam_engine::ops::bias::AddBias;
use simsiam_engine::ops::cast::Cast;
use simsiam_engine::ops::lars::LarsUpdate;
use simsiam_engine::ops::layout::{NchwToNhwc, NhwcToNchw};
use simsiam_engine::ops::pad_channels::PadChannels;
use simsiam_engine::ops::sgd::{Guard, SgdUpdate, StepParam};
use simsiam_engine::ops::slice_rows::SliceRows;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::{DType, HostTensor, TensorDesc};

fn cpu() -> Device {
    Device::Cpu(Tier::Direct)
}

fn emulator(seed: u64) -> Arc<dyn Driver> {
    Arc::new(Emulator::new(Options { threads: 2, seed }).unwrap())
}

fn emulated(seed: u64) -> Device {
    Device::Cuda(emulator(seed))
}

fn normal(seed: u64, n: usize) -> Vec<f64> {
    let mut stream = Stream::new(seed, 5, 0);
    (0..n).map(|_| f64::from(stream.normal() as f32)).collect()
}

/// Runs a step on poisoned memory and returns the kept values. Leaves are drawn by their number, but for `step_params`.
fn run(device: &Device, tape: Tape, results: &[ValueId]) -> Vec<HostTensor> {
    let leaves: Vec<(ValueId, TensorDesc)> = [Role::Input, Role::Parameter, Role::Optimiser]
        .iter()
        .flat_map(|&role| tape.with_role(role).map(|(id, value)| (id, value.desc.clone())))
        .collect();
    let mut exec = device.poisoned_executor(tape).unwrap();
    for (id, desc) in leaves {
        let values = match desc == StepParam::desc() {
            true => vec![0.3, 0.07, 0.9, 0.01],
            false => normal(id.index() as u64, desc.shape.len()),
        };
        exec.write(id, &desc.dtype.encode(&values)).unwrap();
    }
    exec.run_step().unwrap();
    assert_eq!(exec.overrun().unwrap(), None);
    results.iter().map(|&value| exec.read(value).unwrap()).collect()
}

/// A tape of an optimiser over parameters of these sizes; returns all that it updates.
fn optimiser<O: simsiam_engine::graph::Op + 'static>(
    sizes: &[usize],
    op: impl Fn(Vec<StepParam>) -> O,
) -> (Tape, Vec<ValueId>) {
    let mut tape = Tape::new();
    let lr = (0..sizes.len()).map(|i| if i % 3 == 1 { StepParam::PredictorLr } else { StepParam::Lr });
    let step_params = tape.leaf("step_params", StepParam::desc(), Role::Input, false);
    let mut leaves = |name: &str, role| {
        let leaf = |&n: &usize| tape.leaf(name, TensorDesc::new([n], DType::F32), role, false);
        sizes.iter().map(leaf).collect::<Vec<_>>()
    };
    let [gradients, weights] = [("d_w", Role::Input), ("w", Role::Parameter)].map(|(name, role)| leaves(name, role));
    let momenta = leaves("v", Role::Optimiser);
    let inputs: Vec<ValueId> = [step_params].into_iter().chain(gradients).collect();
    let updates = [weights, momenta].concat();
    tape.update(op(lr.collect()), &inputs, &updates).unwrap();
    (tape, updates)
}

#[test]
fn sgd_has_the_bits_of_the_cpu() {
    let few = vec![1, 3, 4097, 31, 24, 100_003, 4096, 8];
    let many = (0..600).map(|i| 1 + i % 37).collect::<Vec<usize>>(); // two launches
    for sizes in [few, many] {
        let step = |device: &Device| {
            let (tape, updates) = optimiser(&sizes, |lr| SgdUpdate { lr, guard: Guard::None });
            run(device, tape, &updates)
        };
        let (expected, got) = (step(&cpu()), step(&emulated(3)));
        for (i, (expected, got)) in expected.iter().zip(&got).enumerate() {
            assert!(expected.bytes() == got.bytes(), "tensor {i} of {}", sizes.len());
        }
    }
}

#[test]
fn lars_over_several_launches() {
    let sizes: Vec<usize> = (0..530).map(|i| if i == 517 { 20_001 } else { 1 + i % 53 }).collect();
    let step = |device: &Device| {
        let op = |lr: Vec<StepParam>| {
            let adapted = (0..lr.len()).map(|i| i % 5 != 3).collect();
            LarsUpdate { lr, adapted, trust: 0.02, eps: 1e-8 }
        };
        let (tape, updates) = optimiser(&sizes, op);
        run(device, tape, &updates)
    };
    let (expected, got) = (step(&cpu()), step(&emulated(4)));
    for (i, (expected, got)) in expected.iter().zip(&got).enumerate() {
        let (expected, got) = (expected.to_f64(), got.to_f64());
        // The order of the sums may move a ratio by one rounding.
        let close = expected.iter().zip(&got).all(|(e, g)| (e - g).abs() <= 2e-7 * e.abs().max(1.0));
        assert!(close, "tensor {i}");
    }
}

/// Each of x and the bias has several consumers, so that every gradient but the first is added to what is there.
fn consumers(columns: usize) -> (Tape, Vec<ValueId>) {
    let mut tape = Tape::new();
    let x = tape.leaf("x", TensorDesc::new([33, columns], DType::F32), Role::Input, true);
    let bias = tape.leaf("b", TensorDesc::new([columns], DType::F32), Role::Input, true);
    let mut outputs = vec![];
    for _ in 0..2 {
        outputs.push(tape.record_one(AddBias, &[x, bias]).unwrap());
    }
    for (start, len) in [(0, 33), (5, 7), (8, 16), (32, 1)] {
        outputs.push(tape.record_one(SliceRows { start, len }, &[x]).unwrap());
    }
    for channels in [columns, columns + 1, columns.next_multiple_of(8)] {
        outputs.push(tape.record_one(PadChannels { channels }, &[x]).unwrap());
    }
    outputs.push(tape.record_one(builtin::Add, &[x, x]).unwrap());
    // Walked backwards, this one comes first and overwrites.
    outputs.push(tape.record_one(SliceRows { start: 3, len: 29 }, &[x]).unwrap());
    let seed = |&y: &ValueId| {
        let desc = tape.desc(y).clone();
        (y, tape.leaf("d_y", desc, Role::Input, false))
    };
    let seeds: Vec<(ValueId, ValueId)> = outputs.iter().map(seed).collect();
    let gradients = backward(&mut tape, &seeds).unwrap();
    let results = [x, bias].iter().map(|leaf| tape.keep(gradients[leaf])).collect();
    (tape, results)
}

#[test]
fn gradients_of_several_consumers_add_up() {
    for columns in [1, 3, 7, 8, 24, 31, 33, 264] {
        let run_on = |device: &Device| {
            let (tape, results) = consumers(columns);
            run(device, tape, &results)
        };
        let (expected, got) = (run_on(&cpu()), run_on(&emulated(columns as u64)));
        assert!(
            expected[0].bytes() == got[0].bytes(),
            "d_x with {columns} columns: the same additions in the same order"
        );
        let (expected, got) = (expected[1].to_f64(), got[1].to_f64());
        let scale = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        let close = expected.iter().zip(&got).all(|(e, g)| (e - g).abs() <= 5e-7 * scale);
        assert!(scale > 0.1 && close, "d_b with {columns} columns");
    }
}

#[test]
fn the_gradient_of_a_bias_is_precise_over_many_rows() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for (rows, columns) in [(100_003, 3), (100_003, 8), (1, 2048), (4099, 31)] {
            let mut tape = Tape::new();
            let x = tape.leaf("x", TensorDesc::new([rows, columns], dtype), Role::Input, true);
            let bias = tape.leaf("b", TensorDesc::new([columns], DType::F32), Role::Input, true);
            let y = tape.record_one(AddBias, &[x, bias]).unwrap();
            let desc = tape.desc(y).clone();
            let d_y = tape.leaf("d_y", desc, Role::Input, false);
            let d_bias = backward(&mut tape, &[(y, d_y)]).unwrap()[&bias];
            tape.keep(d_bias);
            let results = run(&emulated(1), tape, &[d_bias, d_y]);
            let (got, d_y) = (results[0].to_f64(), results[1].to_f64());
            let expected: Vec<f64> = (0..columns).map(|c| d_y.iter().skip(c).step_by(columns).sum()).collect();
            let scale = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            let close = got.iter().zip(&expected).all(|(g, e)| (g - e).abs() <= 5e-7 * scale);
            assert!(close, "{rows} rows of {columns} in {dtype}");
        }
    }
}

#[test]
fn conversions_of_type_and_layout_have_the_bits_of_the_cpu() {
    for narrow in [DType::Bf16, DType::F16] {
        for [n, c, h, w, channels] in [[2, 3, 5, 7, 8], [1, 37, 9, 5, 40], [3, 1, 1, 1, 1], [1, 3, 33, 31, 3]] {
            let convert = |device: &Device| {
                let mut tape = Tape::new();
                let x = tape.leaf("x", TensorDesc::new([n, c, h, w], DType::F32), Role::Input, false);
                let nhwc = tape.record_one(NchwToNhwc { channels, to: narrow }, &[x]).unwrap();
                let cast = tape.record_one(Cast { to: narrow }, &[x]).unwrap();
                let wide = tape.record_one(Cast { to: DType::F32 }, &[cast]).unwrap();
                let results: Vec<ValueId> = [nhwc, cast, wide].iter().map(|&value| tape.keep(value)).collect();
                run(device, tape, &results)
            };
            let (expected, got) = (convert(&cpu()), convert(&emulated(2)));
            assert!(expected.iter().zip(&got).all(|(e, g)| e.bytes() == g.bytes()), "{n}x{c}x{h}x{w} to {narrow}");

            // There and back again is a rounding to the narrow type.
            let mut tape = Tape::new();
            let x = tape.leaf("x", TensorDesc::new([n, c, h, w], DType::F32), Role::Input, false);
            let nhwc = tape.record_one(NchwToNhwc { channels, to: narrow }, &[x]).unwrap();
            let back = tape.record_one(NhwcToNchw { channels: c }, &[nhwc]).unwrap();
            tape.keep(back);
            assert_eq!(run(&emulated(2), tape, &[back])[0], expected[2]);
        }
    }
}

/// Copies of all weights are one node, to which leaves are added one by one: more than a table of the kernel holds, of sizes
/// around a chunk's and a pack's. A gradient goes to the leaves that want one, and only where one has come.
#[test]
fn copies_of_many_weights_have_the_bits_of_the_cpu_and_pass_gradients() {
    let sizes = [4097, 1, 3, 4096, 8191, 5, 12_289].into_iter().chain((0..520).map(|i| 1 + i % 9));
    let sizes: Vec<usize> = sizes.collect();
    for narrow in [DType::Bf16, DType::F16] {
        let convert = |device: &Device| {
            let mut tape = Tape::new();
            let leaf = |tape: &mut Tape, i: usize| {
                tape.leaf("w", TensorDesc::new([sizes[i]], DType::F32), Role::Parameter, i != 2)
            };
            let first = leaf(&mut tape, 0);
            let mut copies = vec![tape.record_one(Cast { to: narrow }, &[first]).unwrap()];
            let mut weights = vec![first];
            for i in 1..sizes.len() {
                weights.push(leaf(&mut tape, i));
                copies.push(tape.extend(0, weights[i]).unwrap());
            }
            assert_eq!(tape.nodes().len(), 1);
            let seeds =
                [1, 2, 4].map(|i| (copies[i], tape.leaf("seed", tape.desc(weights[i]).clone(), Role::Input, false)));
            let gradients = backward(&mut tape, &seeds).unwrap();
            for i in 0..5 {
                let expected = seeds.iter().find(|seed| seed.0 == copies[i]).map(|seed| seed.1).filter(|_| i != 2);
                assert_eq!(gradients.get(&weights[i]).copied(), expected, "gradient of weight {i}");
            }
            copies.iter().for_each(|&copy| _ = tape.keep(copy));
            run(device, tape, &copies)
        };
        let (expected, got) = (convert(&cpu()), convert(&emulated(4)));
        assert!(expected.iter().zip(&got).all(|(e, g)| e.bytes() == g.bytes()), "{narrow}");
    }
}

/// Memory of a driver that holds `values`.
fn upload(driver: &dyn Driver, desc: &TensorDesc, values: &[f64]) -> DevicePtr {
    let ptr = driver.allocate(desc.bytes()).unwrap();
    driver.upload(ptr, &desc.dtype.encode(values)).unwrap();
    ptr
}

#[test]
fn the_first_element_that_is_not_finite_is_found() {
    let driver = emulator(6);
    let scratch = driver.allocate(check::SCRATCH).unwrap();
    for dtype in [DType::F32, DType::Bf16, DType::F16, DType::F64] {
        for n in [1, 7, 8, 33, 2048, 100_003] {
            let desc = TensorDesc::new([n], dtype);
            let places = [None, Some(0), Some(n / 2), Some(n - 1)];
            for (place, bad) in places.iter().zip([f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::NAN]) {
                let mut values = normal(n as u64, n);
                if let &Some(place) = place {
                    (values[place], values[n - 1]) = (bad, f64::NAN);
                }
                let ptr = upload(&*driver, &desc, &values);
                let found = check::first_non_finite(&*driver, DeviceTensor { desc: &desc, ptr }, scratch).unwrap();
                assert_eq!(found, *place, "{desc}");
                driver.free(ptr).unwrap();
            }
        }
    }
    let desc = TensorDesc::new([3], DType::I64);
    let counters = DeviceTensor { desc: &desc, ptr: upload(&*driver, &desc, &[-1.0; 3]) };
    assert_eq!(check::first_non_finite(&*driver, counters, scratch).unwrap(), None);
    assert!(check::summary(&*driver, counters, scratch).unwrap_err().to_string().contains("a summary of i64[3]"));
}

#[test]
fn a_summary_is_that_of_float64() {
    let driver = emulator(8);
    let scratch = driver.allocate(check::SCRATCH).unwrap();
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for n in [1, 7, 33, 2048, 100_003] {
            let desc = TensorDesc::new([n], dtype);
            let ptr = upload(&*driver, &desc, &normal(n as u64, n));
            let summary = check::summary(&*driver, DeviceTensor { desc: &desc, ptr }, scratch).unwrap();
            let values = HostTensor::from_bytes(desc.clone(), dtype.encode(&normal(n as u64, n))).unwrap().to_f64();
            let squares: f64 = values.iter().map(|v| v * v).sum();
            assert!((summary.sum - values.iter().sum::<f64>()).abs() <= 1e-12 * n as f64, "{desc}: {summary:?}");
            assert!((summary.squares - squares).abs() <= 1e-12 * squares, "{desc}: {summary:?}");
            assert_eq!(summary.largest, values.iter().fold(0.0, |m, v| v.abs().max(m)));
        }
    }
}

#[test]
fn ceilings_do_the_work_that_they_report() {
    let driver = emulator(0);
    let desc = TensorDesc::new([100_003], DType::F32);
    let values = normal(1, 100_003);
    let (from, to) = (upload(&*driver, &desc, &values), driver.allocate(desc.bytes()).unwrap());
    let tensor = |ptr| DeviceTensor { desc: &desc, ptr };
    assert_eq!(ceilings::copy(&*driver, tensor(from), tensor(to)).unwrap(), 800_024);
    let mut copied = vec![0; desc.bytes()];
    driver.download(to, &mut copied).unwrap();
    assert_eq!(copied, DType::F32.encode(&values));

    let desc = TensorDesc::new([700], DType::F32); // two whole blocks
    let read = |ptr| {
        let mut bytes = vec![0; desc.bytes()];
        driver.download(ptr, &mut bytes).unwrap();
        HostTensor::from_bytes(desc.clone(), bytes).unwrap().to_f64()
    };
    let out = upload(&*driver, &desc, &[-1.0; 700]);
    let tensor = DeviceTensor { desc: &desc, ptr: out };
    assert_eq!(ceilings::fma(&*driver, tensor, 40).unwrap(), 512 * 40 * 8 * 2);
    assert!(read(out).iter().enumerate().all(|(i, &v)| v == if i < 512 { 16.0 } else { -1.0 }));
    assert_eq!(ceilings::mma_bf16(&*driver, tensor, 3).unwrap(), 16 * 3 * 8 * 4096);
    assert!(read(out).iter().enumerate().all(|(i, &v)| v == if i < 512 { 192.0 } else { -1.0 }));
    let small = TensorDesc::new([255], DType::F32);
    assert!(ceilings::fma(&*driver, DeviceTensor { desc: &small, ptr: out }, 1).is_err());
}
