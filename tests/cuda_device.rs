//! The code that drives a real device, without one: on a driver for tests that runs the kernels on the CPU, as late as CUDA
//! allows, and refuses what CUDA refuses (`tests/fake_cuda/`).
#![cfg(feature = "emulator")]
#![allow(unsafe_code)] // launches, and copies that run later

mod common;

use std::ffi::{CStr, c_char};
use std::sync::Arc;
use std::time::Duration;

use common::fake_cuda::{compiled, under_fake_cuda, with_fake_cuda, without_cuda};
use cudarc::driver::result;
use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::backend::cuda::{
    Call, CudaDevice, DevicePtr, DeviceTensor, Driver, Event, Grid, Kernel, Nvtx, Pinned, Stream, compiled_modules,
    random,
};
use simsiam_engine::error::Result;
use simsiam_engine::exec::{Device, Options};
use simsiam_engine::graph::{Role, Tape};
use simsiam_engine::ops::cuda_kernels;
use simsiam_engine::ops::relu::Relu;
use simsiam_engine::ops::sgd::{Guard, SgdUpdate, StepParam};
use simsiam_engine::selftest::{self, Variant};
use simsiam_engine::tensor::{DType, HostTensor, TensorDesc};

/// No multiple of a pack, a warp or a block.
const N: usize = 1003;
const BYTES: usize = 4 * N;

fn kernel(variant: &str) -> &'static Kernel {
    let is_it = |kernel: &&Kernel| kernel.variants.iter().any(|(_, name)| *name == variant);
    cuda_kernels().into_iter().find(is_it).unwrap()
}

/// Neither symmetric nor of one sign.
fn numbers(seed: u32) -> Vec<f32> {
    (0..N as u32).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 64.0 - 5.0).collect()
}

fn upload(device: &CudaDevice, values: &[f32]) -> DevicePtr {
    let memory = device.allocate(size_of_val(values)).unwrap();
    device.upload(memory, bytemuck::cast_slice(values)).unwrap();
    memory
}

fn download(device: &CudaDevice, memory: DevicePtr) -> Vec<f32> {
    let mut values = vec![0.0; N];
    device.download(memory, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

/// y = a + b
fn add(device: &CudaDevice, [a, b, y]: [DevicePtr; 3]) -> Result<()> {
    let mut call = Call::new(kernel("add_f32"), Some(DType::F32));
    [a, b, y].into_iter().for_each(|pointer| call.push(pointer));
    call.push(N as i64);
    // SAFETY: each has N floats.
    unsafe { device.launch(Grid::packs(N, DType::F32), call) }
}

/// y = max(x, 0), with so much dynamic shared memory, which it does not need.
fn relu(device: &CudaDevice, [x, y]: [DevicePtr; 2], shared: usize) -> Result<()> {
    let mut call = Call::new(kernel("relu_f32"), Some(DType::F32));
    [x, y].into_iter().for_each(|pointer| call.push(pointer));
    call.push(N as i64);
    // SAFETY: each has N floats.
    unsafe { device.launch(Grid::packs(N, DType::F32).with_shared(shared), call) }
}

fn upload_later(device: &CudaDevice, to: DevicePtr, from: &dyn Pinned) {
    // SAFETY: the tests keep `from` until the copy has run; those that change it before want to see that.
    unsafe { device.upload_later(to, from.bytes()).unwrap() }
}

fn pinned(device: &CudaDevice, values: &[f32]) -> Box<dyn Pinned> {
    let mut memory = device.pinned(size_of_val(values)).unwrap();
    memory.bytes_mut().copy_from_slice(bytemuck::cast_slice(values));
    memory
}

fn recorded(device: &CudaDevice, stream: Stream) -> Event {
    let event = device.event().unwrap();
    device.record(&event, stream).unwrap();
    event
}

fn sums(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

under_fake_cuda! {
    fn kernels_run("") {
        let device = CudaDevice::open(0).unwrap();
        assert_eq!((device.name().as_str(), device.emulated()), ("Fake GPU", false));
        let (x, y) = (upload(&device, &numbers(1)), device.allocate(BYTES).unwrap());
        device.fill(y, BYTES, 0x7f).unwrap();
        assert_eq!(download(&device, y)[N - 1].to_bits(), 0x7f7f_7f7f);
        let expected: Vec<f32> = numbers(1).iter().map(|x| x.max(0.0)).collect();
        // More shared memory than a kernel has without asking, then less, then more again.
        for shared in [0, 100 << 10, 50 << 10, 227 << 10] {
            device.fill(y, BYTES, 0xff).unwrap();
            relu(&device, [x, y], shared).unwrap();
            assert_eq!(download(&device, y), expected, "{shared} bytes of shared memory");
        }
        let refused = message(relu(&device, [x, y], (227 << 10) + 1));
        assert!(refused.contains("give a kernel 232449 bytes of shared memory: CUDA_ERROR_INVALID_VALUE"), "{refused}");
        assert!(message(device.upload(y.offset(4), &[1; BYTES])).contains("cannot upload 4012 bytes"));
        device.free(x).unwrap();
        assert!(message(device.download(x, &mut [0; 4])).contains("cannot download 4 bytes"));
        assert!(message(device.free(x)).contains("nothing is reserved there"));
    }

    fn a_copy_runs_when_something_waits_for_it("") {
        let device = CudaDevice::open(0).unwrap();
        let (old, new) = (numbers(2), numbers(3));
        let (x, b, y) = (upload(&device, &old), upload(&device, &numbers(4)), device.allocate(BYTES).unwrap());

        // Nothing waits: the kernel reads what was there before.
        let staging = pinned(&device, &new);
        upload_later(&device, x, &*staging);
        add(&device, [x, b, y]).unwrap();
        assert_eq!(download(&device, y), sums(&old, &numbers(4)), "the driver for tests does not see a missing wait");
        device.synchronize().unwrap();
        assert_eq!(download(&device, x), new, "`synchronize` waits for both streams");

        // The kernel waits for the copy.
        let mut staging = pinned(&device, &old);
        upload_later(&device, x, &*staging);
        device.wait(Stream::Compute, &recorded(&device, Stream::Copy)).unwrap();
        add(&device, [x, b, y]).unwrap();
        assert_eq!(download(&device, y), sums(&old, &numbers(4)));

        // Host memory that is changed before the copy has run: that is what the copy finds.
        staging.bytes_mut().copy_from_slice(bytemuck::cast_slice(&new));
        upload_later(&device, x, &*staging);
        staging.bytes_mut().copy_from_slice(bytemuck::cast_slice(&numbers(5)));
        device.finish(&recorded(&device, Stream::Copy)).unwrap();
        assert_eq!(download(&device, x), numbers(5));
    }

    /// The copy stream may also be quicker than everything else.
    fn a_copy_overwrites_what_is_still_to_be_read_unless_it_waits("hurry=2") {
        let device = CudaDevice::open(0).unwrap();
        let (old, new) = (numbers(2), numbers(3));
        let (b, y) = (upload(&device, &numbers(4)), device.allocate(BYTES).unwrap());
        for waits in [false, true] {
            let x = upload(&device, &old);
            let staging = pinned(&device, &new);
            add(&device, [x, b, y]).unwrap();
            if waits {
                device.wait(Stream::Copy, &recorded(&device, Stream::Compute)).unwrap();
            }
            upload_later(&device, x, &*staging);
            let read = if waits { &old } else { &new };
            assert_eq!(download(&device, y), sums(read, &numbers(4)), "waits: {waits}");
            assert_eq!(download(&device, x), new);
        }
    }

    fn results_come_back_while_the_host_goes_on("") {
        let device = CudaDevice::open(0).unwrap();
        let [a, b] = [6, 7].map(|seed| upload(&device, &numbers(seed)));
        let y = device.allocate(BYTES).unwrap();
        let mut results = device.pinned(BYTES).unwrap();
        assert!(results.bytes().iter().all(|&byte| byte == 0), "pinned memory starts as zeros");
        add(&device, [a, b, y]).unwrap();
        // SAFETY: the memory has so many bytes, and is looked at after the event.
        unsafe { device.download_later(y, results.bytes_mut().as_mut_ptr(), BYTES).unwrap() };
        let there = recorded(&device, Stream::Compute);
        add(&device, [y, y, y]).unwrap();
        device.finish(&there).unwrap();
        assert_eq!(bytemuck::cast_slice::<u8, f32>(results.bytes()), sums(&numbers(6), &numbers(7)));
        assert!(device.pinned(0).unwrap().bytes().is_empty());
    }

    fn events_tell_the_time("") {
        let device = CudaDevice::open(0).unwrap();
        let x = upload(&device, &numbers(8));
        let never = device.event().unwrap();
        device.finish(&never).unwrap();
        device.wait(Stream::Copy, &never).unwrap();
        let start = recorded(&device, Stream::Compute);
        for _ in 0..20 {
            add(&device, [x, x, x]).unwrap();
        }
        let end = recorded(&device, Stream::Compute);
        let early = message(device.elapsed(&start, &end));
        assert!(early.contains("not both passed was asked for: CUDA_ERROR_NOT_READY"), "{early}");
        device.finish(&end).unwrap();
        let whole = device.elapsed(&start, &end).unwrap();
        assert!(whole > Duration::ZERO && whole < Duration::from_secs(60), "{whole:?}");
        assert!(message(device.elapsed(&start, &never)).contains("CUDA_ERROR_INVALID_HANDLE"));
        let timed = device.time(&mut || add(&device, [x, x, x])).unwrap();
        assert!(timed > Duration::ZERO && timed < whole + Duration::from_secs(1), "{timed:?} and {whole:?}");
        let failed = device.time(&mut || Err(simsiam_engine::error::Error::Mismatch("planned".into())));
        assert_eq!(message(failed), "planned");

        let other = CudaDevice::open(0).unwrap();
        let refused = message(other.record(&start, Stream::Compute));
        assert!(refused.contains("an event of another device"), "{refused}");
    }

    fn a_replay_has_the_bits_of_launches("") {
        let device = CudaDevice::open(0).unwrap();
        let run = |captured: bool| {
            let [a, b] = [9, 10].map(|seed| upload(&device, &numbers(seed)));
            let y = device.allocate(BYTES).unwrap();
            let step = || {
                add(&device, [a, b, y])?;
                relu(&device, [y, y], 60 << 10)?;
                add(&device, [y, b, a])
            };
            step().unwrap();
            device.synchronize().unwrap();
            let graph = captured.then(|| {
                let before = download(&device, a);
                device.begin_capture().unwrap();
                step().unwrap();
                let graph = device.end_capture().unwrap();
                assert_eq!(download(&device, a), before, "a capture runs nothing");
                graph
            });
            for _ in 0..5 {
                match &graph {
                    Some(graph) => device.replay(graph).unwrap(),
                    None => step().unwrap(),
                }
            }
            [download(&device, a), download(&device, y)]
        };
        let eager = run(false);
        assert_ne!(eager[0], numbers(9));
        assert_eq!(run(true), eager);
    }

    fn all_that_is_handed_out_is_counted("") {
        let device = CudaDevice::open(0).unwrap();
        let mut last = device.allocations();
        let mut made = |what: &str, expected: u64| {
            let now = device.allocations();
            assert_eq!(now - std::mem::replace(&mut last, now), expected, "{what}");
        };
        let [x, y] = [upload(&device, &numbers(8)), device.allocate(BYTES).unwrap()];
        made("memory", 2);
        let staging = pinned(&device, &numbers(9));
        made("page-locked memory", 1);
        let event = device.event().unwrap();
        made("an event", 1);
        relu(&device, [x, y], 0).unwrap();
        device.begin_capture().unwrap();
        relu(&device, [x, y], 0).unwrap();
        let graph = device.end_capture().unwrap();
        made("a graph", 1);
        upload_later(&device, x, &*staging);
        device.record(&event, Stream::Copy).unwrap();
        device.wait(Stream::Compute, &event).unwrap();
        device.replay(&graph).unwrap();
        relu(&device, [x, y], 0).unwrap();
        device.synchronize().unwrap();
        device.free(x).unwrap();
        made("work", 0);
    }

    fn a_capture_refuses_what_a_graph_cannot_hold("") {
        let device = CudaDevice::open(0).unwrap();
        let [a, b] = [11, 12].map(|seed| upload(&device, &numbers(seed)));
        let y = device.allocate(BYTES).unwrap();
        add(&device, [a, b, y]).unwrap();
        assert!(message(device.end_capture()).contains("cannot end a capture: none has begun"));
        let event = recorded(&device, Stream::Compute);
        let mut pinned = device.pinned(BYTES).unwrap();
        let target = pinned.bytes_mut().as_mut_ptr();
        device.begin_capture().unwrap();
        let empty = device.end_capture().unwrap();

        // SAFETY: the copy is refused.
        let later = || unsafe { device.download_later(y, target, BYTES) };
        let calls: [(&str, &dyn Fn() -> Result<()>); 14] = [
            ("allocate memory", &|| device.allocate(64).map(drop)),
            ("free memory", &|| device.free(y)),
            ("fill memory", &|| device.fill(y, BYTES, 0)),
            ("upload memory", &|| device.upload(y, &[0; BYTES])),
            ("download memory", &|| device.download(y, &mut [0; BYTES])),
            ("download memory", &later),
            ("measure time", &|| device.time(&mut || Ok(())).map(drop)),
            ("measure time", &|| device.elapsed(&event, &event).map(drop)),
            ("synchronise", &|| device.synchronize()),
            ("allocate page-locked memory", &|| device.pinned(64).map(drop)),
            ("record an event", &|| device.record(&event, Stream::Compute)),
            ("wait for an event", &|| device.wait(Stream::Compute, &event)),
            ("wait for an event", &|| device.finish(&event)),
            ("replay a graph", &|| device.replay(&empty)),
        ];
        for (action, call) in calls {
            device.begin_capture().unwrap();
            add(&device, [a, b, y]).unwrap();
            let refused = message(call());
            assert!(refused.contains(&format!("cannot {action} while a graph is captured")), "{refused}");
            let lost = message(device.end_capture());
            assert!(lost.contains(&format!("the capture was lost when something tried to {action}")), "{lost}");
        }

        device.begin_capture().unwrap();
        assert!(message(device.begin_capture()).contains("cannot begin a capture: one goes on already"));
        let elsewhere = std::thread::scope(|scope| scope.spawn(|| message(device.end_capture())).join().unwrap());
        assert!(elsewhere.contains("on another thread than it was begun on"), "{elsewhere}");
        add(&device, [a, b, y]).unwrap();
        let graph = device.end_capture().unwrap();
        device.replay(&graph).unwrap();
        assert_eq!(download(&device, y), sums(&numbers(11), &numbers(12)), "the device works again");
        let other = CudaDevice::open(0).unwrap();
        assert!(message(other.replay(&graph)).contains("a graph of another device"));
    }

    /// What CUDA itself throws a capture away for: calls past the driver trait, and kernels that were never launched before.
    fn a_capture_that_the_driver_loses_is_ended("") {
        let device = CudaDevice::open(0).unwrap();
        let [a, b] = [13, 14].map(|seed| upload(&device, &numbers(seed)));
        let y = device.allocate(BYTES).unwrap();
        add(&device, [a, b, y]).unwrap();

        device.begin_capture().unwrap();
        // SAFETY: nothing is reserved.
        let refused = unsafe { result::malloc_sync(64) }.unwrap_err();
        assert!(format!("{refused:?}").contains("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"), "{refused:?}");
        assert!(add(&device, [a, b, y]).is_err());
        let lost = message(device.end_capture());
        assert!(lost.contains("the capture was lost: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), "{lost}");

        device.begin_capture().unwrap();
        assert!(message(relu(&device, [a, y], 0)).contains("cannot find kernel relu_f32"));
        assert!(device.end_capture().is_err());

        relu(&device, [a, y], 0).unwrap();
        device.begin_capture().unwrap();
        add(&device, [y, b, y]).unwrap();
        let graph = device.end_capture().unwrap();
        device.replay(&graph).unwrap();
        let expected: Vec<f32> = numbers(13).iter().map(|x| x.max(0.0)).collect();
        assert_eq!(download(&device, y), sums(&expected, &numbers(14)));

        // Forgotten: the device ends it.
        device.begin_capture().unwrap();
    }

    fn what_is_made_on_a_device_may_outlive_it("") {
        let device = CudaDevice::open(0).unwrap();
        let x = upload(&device, &numbers(15));
        add(&device, [x, x, x]).unwrap();
        let event = recorded(&device, Stream::Compute);
        let pinned = pinned(&device, &numbers(16));
        device.begin_capture().unwrap();
        add(&device, [x, x, x]).unwrap();
        let graph = device.end_capture().unwrap();
        drop(device);
        assert_eq!(bytemuck::cast_slice::<u8, f32>(pinned.bytes()), numbers(16));
        drop((event, graph));
        std::thread::spawn(move || drop(pinned)).join().unwrap();
    }

    fn memory_runs_out_with_a_sentence("memory=50000000") {
        let device = CudaDevice::open(0).unwrap();
        let before = device.memory().unwrap();
        assert_eq!((before.free, before.total), (50_000_000, 50_000_000));
        let first = device.allocate(30_000_000).unwrap();
        assert_eq!(device.memory().unwrap().free, 20_000_000);
        let refused = message(device.allocate(20_000_001));
        assert!(refused.starts_with("Fake GPU: out of memory: 0.02 GB asked for, 0.02 GB free; hint: "), "{refused}");
        device.allocate(20_000_000).unwrap();
        device.free(first).unwrap();
        assert_eq!(device.memory().unwrap().free, 30_000_000);
    }

    fn devices_are_listed("capability=75,memory=123456") {
        let devices = CudaDevice::list().unwrap();
        let [facts] = &devices[..] else { panic!("{devices:?}") };
        assert_eq!((facts.ordinal, facts.name.as_str(), facts.code), (0, "Fake GPU", None));
        assert_eq!((facts.capability, facts.multiprocessors, facts.memory), ([7, 5], 7, 123_456));
        assert_eq!(CudaDevice::driver_version().unwrap(), [13, 0]);
        let archs = compiled_modules()[0].archs.join(", ");
        let expected = format!("Fake GPU: this build has no code for it, only for {archs}; hint: build with ");
        let refused = message(CudaDevice::open(0));
        assert!(refused.starts_with(&expected), "{refused}");
        let refused = message(CudaDevice::open(1));
        assert!(refused.starts_with("there is no CUDA device 1: the driver shows 1, counted from 0; hint: "), "{refused}");
    }

    /// The code for the right generation of devices.
    fn the_code_for_a_device_is_named("capability=90") {
        let code = CudaDevice::list().unwrap()[0].code;
        assert!(code.is_some_and(|code| compiled_modules()[0].archs.contains(&code)), "{code:?}");
    }

    fn random_words_are_those_of_the_host("") {
        let device = CudaDevice::open(0).unwrap();
        let desc = TensorDesc::new([BYTES], DType::U8);
        let ptr = device.allocate(BYTES).unwrap();
        random::fill(&device, DeviceTensor { desc: &desc, ptr }, 17, 18, 19).unwrap();
        let mut host = simsiam_engine::rng::Stream::new(17, 18, 19);
        let words: Vec<u32> = download(&device, ptr).into_iter().map(f32::to_bits).collect();
        assert_eq!(words, (0..N).map(|_| host.word()).collect::<Vec<_>>());
    }

    fn ranges_reach_the_profiler("") {
        let nvtx = Nvtx::load().unwrap();
        {
            let _step = nvtx.range("step 17");
            drop(nvtx.range("forward: conv1"));
            drop(Nvtx::load().unwrap().range("cut\0off"));
        }
        let path = std::env::var_os("NVTX_INJECTION64_PATH").unwrap();
        // SAFETY: the library is loaded already; the function returns a string that ends with 0 and is not changed here.
        let seen = unsafe {
            let library = libloading::Library::new(path).unwrap();
            let seen = library.get::<unsafe extern "C" fn() -> *const c_char>(b"profiler_seen").unwrap();
            CStr::from_ptr(seen()).to_str().unwrap().to_string()
        };
        assert_eq!(seen, "push step 17\npush forward: conv1\npop\npush cut\npop\npop\n");
    }

    /// Inputs that travel beside the kernels, steps from a graph and results that are fetched a step later, with copies that
    /// come as late as they may.
    fn pipelined_steps_have_the_bits_of_the_cpu("") {
        steps_have_the_bits_of_the_cpu();
    }

    /// The same with copies that come as early as they may.
    fn pipelined_steps_have_the_bits_of_the_cpu_when_copies_hurry("hurry=2") {
        steps_have_the_bits_of_the_cpu();
    }

    /// The memory of an executor starts as zeros, written on one stream; inputs come on another, here as early as they may.
    fn the_first_inputs_are_not_zeroed("hurry=2") {
        let device = Device::Cuda(Arc::new(CudaDevice::open(0).unwrap()));
        let mut tape = Tape::new();
        let x = tape.leaf("x", TensorDesc::new([N], DType::F32), Role::Input, false);
        let y = tape.record(Relu, &[x]).unwrap()[0];
        tape.keep(y);
        let mut exec = device.executor(tape).unwrap();
        exec.stage(x, bytemuck::cast_slice(&numbers(5))).unwrap();
        exec.run_step().unwrap();
        let expected: Vec<f64> = numbers(5).iter().map(|x| f64::from(x.max(0.0))).collect();
        assert_eq!(exec.read(y).unwrap().to_f64(), expected);
    }

    /// Every op that has kernels of its own, through the executor.
    fn the_op_table_passes("") {
        let device = Device::Cuda(Arc::new(CudaDevice::open(0).unwrap()));
        let outcomes = selftest::run(None, &device, &[DType::F32, DType::Bf16, DType::F16], &Variant::default(), |_| ()).unwrap();
        let tables: Vec<_> = outcomes.iter().filter(|o| o.compared.contains("ops cases")).collect();
        assert!(!tables.is_empty());
        for outcome in tables {
            println!("{}: {}", outcome.name, outcome.compared);
            assert!(outcome.passed(), "{}: {}", outcome.name, outcome.worst.what);
            assert!(outcome.worst.ratio > 0.0, "{}: nothing was compared", outcome.name);
        }
    }
}

/// Weights after each of several steps of w -= lr (momentum v + relu(x)), with another x every time.
fn weights(device: &Device, options: Options) -> Vec<HostTensor> {
    let mut tape = Tape::new();
    let desc = TensorDesc::new([N], DType::F32);
    let step_params = tape.leaf("step_params", StepParam::desc(), Role::Input, false);
    let x = tape.leaf("x", desc.clone(), Role::Input, false);
    let [w, v] = ["w", "v"].map(|name| tape.leaf(name, desc.clone(), Role::Parameter, false));
    let gradient = tape.record(Relu, &[x]).unwrap()[0];
    let sgd = SgdUpdate { lr: vec![StepParam::Lr], guard: Guard::None };
    tape.update(sgd, &[step_params, gradient], &[w, v]).unwrap();

    let mut exec = device.executor_with(tape, options).unwrap();
    exec.write(w, bytemuck::cast_slice(&numbers(20))).unwrap();
    exec.write(v, bytemuck::cast_slice(&numbers(21))).unwrap();
    exec.watch(&[w]).unwrap();
    let mut after = Vec::new();
    for step in 0..9 {
        exec.stage(step_params, bytemuck::cast_slice(&[0.1 / f64::from(step + 1), 0.0, 0.9, 1e-4])).unwrap();
        exec.stage(x, bytemuck::cast_slice(&numbers(30 + step))).unwrap();
        exec.run_step().unwrap();
        after.extend(exec.collect(1).unwrap());
    }
    after.extend(exec.collect(0).unwrap());
    assert_eq!(after.len(), 9);
    after.into_iter().flatten().collect()
}

fn steps_have_the_bits_of_the_cpu() {
    let expected = weights(&Device::Cpu(Tier::Direct), Options::default());
    assert_ne!(expected[0].bytes(), expected[8].bytes());
    let device = Device::Cuda(Arc::new(CudaDevice::open(0).unwrap()));
    for graph in [true, false] {
        let got = weights(&device, Options { graph, ..Options::default() });
        for (step, (expected, got)) in expected.iter().zip(&got).enumerate() {
            assert!(expected.bytes() == got.bytes(), "step {step}, graph: {graph}");
        }
    }
}

/// What `selftest --device cuda` says, which ends with code 1.
fn refusal(prepare: impl FnOnce(&mut std::process::Command)) -> String {
    let mut command = common::engine();
    command.args(["selftest", "--device", "cuda"]);
    prepare(&mut command);
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    errors[0].to_string()
}

#[test]
fn each_reason_for_no_device_has_its_sentence() {
    if !compiled() {
        return;
    }
    const DRIVER: &str = "hint: install NVIDIA's driver 580 or newer, or use --device cpu";
    const LISTED: &str = "hint: `nvidia-smi` lists them; CUDA_VISIBLE_DEVICES can hide them, and so can a container";
    let fake = |words: &str| {
        refusal(|command| {
            with_fake_cuda(command, words);
        })
    };
    assert_eq!(fake("no-device"), format!("error: there is no CUDA device: the driver shows none; {LISTED}"));
    let old = "error: the CUDA driver is too old: it supports CUDA 12.8, the kernels need 13.0";
    assert_eq!(fake("old-driver"), format!("{old}; {DRIVER}"));
    let small = fake("memory=1000000");
    assert!(small.starts_with("error: out of memory: the plan needs "), "{small}");
    assert!(small.contains("MB, Fake GPU has 1.0 MB free"), "{small}");
    let broken = fake("broken");
    assert!(
        broken.starts_with("error: the CUDA device cannot start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (said"),
        "{broken}"
    );
}

#[test]
fn no_library_has_its_sentence() {
    if !compiled() {
        return;
    }
    let mut installed = false;
    let refused = refusal(|command| {
        installed = !without_cuda(command);
        if installed {
            with_fake_cuda(command, "no-device");
        }
    });
    if installed {
        println!("skipped: this machine has a CUDA driver");
        return;
    }
    let expected = "error: no CUDA driver: libcuda.so.1: cannot open shared object file: No such file or directory; \
                    hint: install NVIDIA's driver 580 or newer, or use --device cpu";
    assert_eq!(refused, expected);
}
