//! The CUDA emulator: that it computes what a device would, and that it catches kernels which only seem to work.
#![cfg_attr(feature = "emulator", allow(unsafe_code))] // launches

#[cfg(feature = "emulator")]
mod common;

/// Whether this run may not pass by skipping.
fn required() -> bool {
    std::env::var("SIMSIAM_REQUIRE_NVCC").is_ok_and(|value| value == "1")
}

#[cfg(not(feature = "emulator"))]
#[test]
fn the_emulator() {
    assert!(!required(), "SIMSIAM_REQUIRE_NVCC=1, but built without the feature `emulator`");
    println!("skipped: built without the feature `emulator`");
}

#[cfg(feature = "emulator")]
mod emulator {
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Output;
    use std::sync::OnceLock;

    use bytemuck::{Pod, Zeroable};
    use half::{bf16, f16};
    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
    use simsiam_engine::backend::cuda::{Call, CudaIo, DeviceOutput, DevicePtr, DeviceTensor, Driver, Grid, Kernel};
    use simsiam_engine::error::{Error, Result};
    use simsiam_engine::graph::Op;
    use simsiam_engine::ops::relu::Relu;
    use simsiam_engine::rng::Stream;
    use simsiam_engine::tensor::{DType, Shape, TensorDesc};

    use super::required;
    use crate::common::sanitizer::{REPORTED, Sanitizer, emulator_library, sanitized};

    const NATURAL: Options = Options { threads: 2, seed: 0 };

    const PTR: usize = size_of::<DevicePtr>();

    /// A kernel of planted.cu.
    const fn planted(
        name: &'static [(Option<DType>, &'static str)],
        threads: u32,
        parameters: &'static [usize],
    ) -> Kernel {
        Kernel { file: "emulator/planted", variants: name, threads, parameters }
    }

    static CORRECT: Kernel = planted(&[(None, "correct")], 64, &[PTR, PTR]);
    static NARROW: Kernel = planted(&[(None, "narrow")], 256, &[PTR, PTR, PTR, 8]);
    static WIDEN: Kernel = planted(&[(None, "widen")], 256, &[PTR, PTR, PTR, PTR, 8]);
    static WARP_FUNCTIONS: Kernel = planted(&[(None, "warp_functions")], 64, &[PTR, PTR]);
    static ATOMICS: Kernel = planted(&[(None, "atomics")], 64, &[PTR, PTR, PTR]);
    static GLOBAL_OVERRUN: Kernel = planted(&[(None, "global_overrun")], 64, &[PTR, PTR]);
    static MISALIGNED_ACCESS: Kernel = planted(&[(None, "misaligned_access")], 64, &[PTR, PTR]);
    /// Those that take an output alone.
    static FAULTY: [Kernel; 11] = [
        planted(&[(None, "missing_barrier")], 64, &[PTR]),
        planted(&[(None, "shuffle_for_barrier")], 64, &[PTR]),
        planted(&[(None, "static_shared_overrun")], 64, &[PTR]),
        planted(&[(None, "dynamic_shared_overrun")], 64, &[PTR]),
        planted(&[(None, "uninitialised_shared")], 64, &[PTR]),
        planted(&[(None, "diverged_barrier")], 64, &[PTR]),
        planted(&[(None, "barrier_after_return")], 64, &[PTR]),
        planted(&[(None, "shuffle_after_return")], 64, &[PTR]),
        planted(&[(None, "masks_disagree")], 64, &[PTR]),
        planted(&[(None, "operations_disagree")], 64, &[PTR]),
        planted(&[(None, "race_between_blocks")], 64, &[PTR]),
    ];

    const PLANTED: &str = "emulator/planted.cu";

    fn with_planted(options: Options) -> Emulator {
        static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
        let library = LIBRARY.get_or_init(|| emulator_library("planted", None, &[PLANTED]));
        Emulator::with_library(library, options).unwrap()
    }

    /// Device memory with these elements.
    fn upload<T: Pod>(device: &Emulator, elements: &[T]) -> DevicePtr {
        let memory = device.allocate(size_of_val(elements)).unwrap();
        device.upload(memory, bytemuck::cast_slice(elements)).unwrap();
        memory
    }

    fn download<T: Pod + Zeroable>(device: &Emulator, memory: DevicePtr, n: usize) -> Vec<T> {
        let mut elements = vec![T::zeroed(); n];
        device.download(memory, bytemuck::cast_slice_mut(&mut elements)).unwrap();
        elements
    }

    fn launch(device: &Emulator, grid: Grid, kernel: &'static Kernel, arguments: &[u64]) -> Result<()> {
        let mut call = Call::new(kernel, None);
        arguments.iter().for_each(|&argument| call.push(argument));
        // SAFETY: memory of the emulator; where a kernel leaves it on purpose, a sanitizer ends the process.
        unsafe { device.launch(grid, call) }
    }

    fn blocks(n: u32) -> Grid {
        Grid::new([n, 1, 1])
    }

    /// Floats from everywhere: random bits, and small multiples of what rounds to subnormal halves.
    fn floats(n: usize) -> Vec<f32> {
        let mut words = Stream::new(4, 1, 1);
        let corners = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, 1e-45]
            .into_iter()
            .chain([65504.0, 65519.996, 65520.0, 6.1e-5, 5.96e-8, 2.98e-8, 2.9802325e-8, 2.9802322e-8]);
        let near_half =
            |word: u32| f32::from_bits(word & 0x8000_0000 | (0x3200_0000 + (word & 0x1fff_ffff) % 0x1600_0000));
        corners
            .chain((0..).map(|i| if i % 2 == 0 { f32::from_bits(words.word()) } else { near_half(words.word()) }))
            .take(n)
            .collect()
    }

    #[test]
    fn conversions_are_those_of_the_half_crate() {
        let device = with_planted(NATURAL);
        let x = floats(1 << 18);
        let n = x.len();
        let (b, h) = (device.allocate(2 * n).unwrap(), device.allocate(2 * n).unwrap());
        launch(&device, blocks(13), &NARROW, &[upload(&device, &x).0, b.0, h.0, n as u64]).unwrap();
        let (b, h): (Vec<u16>, Vec<u16>) = (download(&device, b, n), download(&device, h, n));
        for ((x, b), h) in x.into_iter().zip(b).zip(h) {
            let same = |got: u16, want: u16, is_nan: bool| if x.is_nan() { is_nan } else { got == want };
            assert!(same(b, bits_of_bf16(x), bf16::from_bits(b).is_nan()), "{x:e} as bf16: {b:#06x}");
            assert!(same(h, bits_of_f16(x), f16::from_bits(h).is_nan()), "{x:e} as f16: {h:#06x}");
        }
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let n = all.len();
        let (bits, b, h) = (upload(&device, &all), device.allocate(4 * n).unwrap(), device.allocate(4 * n).unwrap());
        launch(&device, blocks(7), &WIDEN, &[bits.0, bits.0, b.0, h.0, n as u64]).unwrap();
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        for (i, (b, h)) in download::<f32>(&device, b, n).into_iter().zip(download::<f32>(&device, h, n)).enumerate() {
            assert!(same(b, bf16::from_bits(i as u16).to_f32()), "bf16 {i:#06x}: {b:e}");
            assert!(same(h, f16::from_bits(i as u16).to_f32()), "f16 {i:#06x}: {h:e}");
        }
    }

    #[test]
    fn warp_functions_are_as_documented() {
        let device = with_planted(NATURAL);
        let x: Vec<i32> = (0..64).map(|i| i * 37 % 101 - 48).collect();
        let out = device.allocate(64 * 12 * 4).unwrap();
        launch(&device, blocks(1), &WARP_FUNCTIONS, &[upload(&device, &x).0, out.0]).unwrap();
        let results: Vec<i32> = download(&device, out, 64 * 12);
        for (i, got) in results.chunks(12).enumerate() {
            let (warp, lane) = (&x[i / 32 * 32..][..32], i % 32);
            let parity = warp.iter().skip(lane % 2).step_by(2);
            let want = [
                warp[5],
                warp[lane / 8 * 8 + 3],
                warp[lane ^ 9],
                warp[if lane < 3 { lane } else { lane - 3 }],
                warp[if lane % 16 + 7 < 16 { lane + 7 } else { lane }],
                warp.iter().rev().fold(0, |bits, &x| bits << 1 | i32::from(x > 0)),
                warp.contains(&x[17]).into(),
                warp.iter().all(|&x| x > -50).into(),
                warp.iter().sum(),
                *warp.iter().min().unwrap(),
                *parity.max().unwrap(),
                3,
            ];
            assert_eq!(got, want, "thread {i}");
        }
    }

    #[test]
    fn atomics_see_every_thread() {
        let device = with_planted(Options { threads: 3, seed: 5 });
        let (count, last, sum) = (upload(&device, &[0u32]), upload(&device, &[0u64]), upload(&device, &[0f32]));
        launch(&device, Grid::new([7, 5, 3]), &ATOMICS, &[count.0, last.0, sum.0]).unwrap();
        let threads = 7 * 5 * 3 * 64;
        assert_eq!(download::<u32>(&device, count, 1), [threads]);
        assert_eq!(download::<u64>(&device, last, 1), [(7 * 64 - 1) << 32]);
        assert_eq!(download::<f32>(&device, sum, 1), [threads as f32 / 2.0]);
    }

    /// Runs `correct` on 7 blocks; returns what it should compute, and what it has.
    fn run_correct(device: &Emulator) -> (Vec<f32>, Vec<f32>) {
        let mut words = Stream::new(4, 2, 1);
        let x: Vec<f32> = (0..7 * 64).map(|_| (words.word() % 201) as f32 - 100.0).collect();
        let want = x.chunks(64).flat_map(|x| {
            let (sum, positive) = (x.iter().sum::<f32>(), x.iter().filter(|&&x| x > 0.0).count() as f32);
            let other = |i: usize| if i % 32 < 15 { i + 1 } else { i };
            (0..64).map(move |i| sum + x[63 - other(i)] + positive)
        });
        let out = device.allocate(7 * 64 * 4).unwrap();
        launch(device, blocks(7).with_shared(256), &CORRECT, &[upload(device, &x).0, out.0]).unwrap();
        (want.collect(), download(device, out, 7 * 64))
    }

    #[test]
    fn order_and_threads_change_nothing() {
        for threads in [1, 2, 5] {
            for seed in 0..8 {
                let (want, got) = run_correct(&with_planted(Options { threads, seed }));
                assert_eq!(got, want, "{threads} threads, seed {seed}");
            }
        }
    }

    #[test]
    fn an_op_runs_in_every_dtype() {
        let device = Emulator::new(Options { threads: 2, seed: 3 }).unwrap();
        let n = 1003;
        let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let run = |dtype: DType, bytes: &[u8]| {
            let desc = TensorDesc { shape: Shape::from([17, 59]), dtype };
            let (ptr, out) = (upload(&device, bytes), device.allocate(bytes.len()).unwrap());
            let io = CudaIo {
                inputs: vec![DeviceTensor { desc: &desc, ptr }],
                outputs: vec![DeviceOutput { desc: &desc, ptr: out, accumulate: false }],
                updates: vec![],
                workspace: DevicePtr::NULL,
                driver: &device,
            };
            Relu.cuda(&io).unwrap();
            download::<u8>(&device, out, bytes.len())
        };
        let y = run(DType::F32, bytemuck::cast_slice(&x));
        let want: Vec<f32> = x.iter().map(|x| x.max(0.0)).collect();
        assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&y), want);
        for (dtype, bits) in [(DType::Bf16, bits_of_bf16 as fn(f32) -> u16), (DType::F16, bits_of_f16)] {
            let bits_of_all = |x: &[f32]| x.iter().map(|&x| bits(x)).collect::<Vec<u16>>();
            let y = run(dtype, bytemuck::cast_slice(&bits_of_all(&x)));
            assert_eq!(bytemuck::pod_collect_to_vec::<u8, u16>(&y), bits_of_all(&want), "{dtype:?}");
        }
    }

    fn bits_of_bf16(x: f32) -> u16 {
        bf16::from_f32(x).to_bits()
    }

    fn bits_of_f16(x: f32) -> u16 {
        f16::from_f32(x).to_bits()
    }

    #[test]
    fn bad_launches_and_copies_are_errors() {
        let device = with_planted(NATURAL);
        let memory = upload(&device, &[1.0f32; 64]);
        let message = |result: Result<()>| match result.unwrap_err() {
            Error::Internal { thread, message } => format!("{thread}: {message}"),
            other => other.to_string(),
        };
        let refused = |grid, kernel, arguments: &[u64]| message(launch(&device, grid, kernel, arguments));

        static UNKNOWN: Kernel = planted(&[(None, "unknown")], 64, &[]);
        static FEWER: Kernel = planted(&[(None, "correct")], 64, &[PTR]);
        static SMALLER: Kernel = planted(&[(None, "correct")], 64, &[PTR, 4]);
        static LARGER_BLOCKS: Kernel = planted(&[(None, "correct")], 128, &[PTR, PTR]);
        assert_eq!(refused(blocks(1), &UNKNOWN, &[]), "kernel unknown: the emulator's library lacks it");
        let parameters = "parameters of [8] bytes, but compiled with [8, 8]";
        assert_eq!(refused(blocks(1), &FEWER, &[memory.0]), format!("kernel correct: declared with {parameters}"));
        assert!(refused(blocks(1), &SMALLER, &[memory.0, 0]).contains("[8, 4] bytes, but compiled with [8, 8]"));
        assert!(refused(blocks(1), &LARGER_BLOCKS, &[memory.0; 2]).contains("128 threads, but compiled for 64"));
        assert!(refused(Grid::new([1, 0, 1]), &CORRECT, &[memory.0; 2]).contains("0 blocks along y"));
        assert!(refused(Grid::new([1, 1, 65536]), &CORRECT, &[memory.0; 2]).contains("65536 blocks along z"));
        let too_much = blocks(1).with_shared((227 << 10) + 1);
        assert!(refused(too_much, &CORRECT, &[memory.0; 2]).contains("232449 bytes of dynamic shared memory"));
        assert!(refused(blocks(1), &CORRECT, &[memory.0; 2]).contains("launched with none"));

        assert!(message(device.upload(memory, &[0; 257])).contains("256 bytes are reserved"));
        assert!(message(device.download(memory.offset(8), &mut [0; 249])).contains("248 bytes are reserved"));
        assert!(message(device.upload(DevicePtr::NULL, &[0])).contains("0 bytes are reserved"));
        device.free(memory).unwrap();
        assert!(message(device.upload(memory, &[0])).contains("0 bytes are reserved"));
        assert!(device.free(memory).is_err());
        let (want, got) = run_correct(&device);
        assert_eq!(got, want, "the device works on");
    }

    /// The fault that a launch of the kernel ends with, if it does.
    fn run_faulty(device: &Emulator, name: &str) -> Result<Vec<f32>> {
        let out = upload(device, &[0.0f32; 64]);
        let input = || upload(device, &[1.0f32; 64]).0;
        match name {
            "global_overrun" => launch(device, blocks(1), &GLOBAL_OVERRUN, &[input(), out.0])?,
            "misaligned_access" => launch(device, blocks(1), &MISALIGNED_ACCESS, &[input(), out.0])?,
            _ => {
                let kernel = FAULTY.iter().find(|kernel| kernel.variants[0].1 == name).unwrap();
                let grid = blocks(if name == "race_between_blocks" { 8 } else { 1 });
                let shared = if name == "dynamic_shared_overrun" { 256 } else { 0 };
                launch(device, grid.with_shared(shared), kernel, &[out.0])?;
            }
        }
        Ok(download(device, out, 64))
    }

    #[test]
    fn threads_that_wait_in_vain_are_faults() {
        for (name, expected) in [
            ("diverged_barrier", "diverged barrier: other threads of the block wait at planted.cu:"),
            ("barrier_after_return", "32 threads of the block have ended and never come to it"),
            ("shuffle_after_return", "__shfl_xor_sync: lanes 00000020 of its mask ffffffff have ended"),
            ("masks_disagree", "lanes disagree on the mask, "),
            ("operations_disagree", "other lanes of its mask are in "),
        ] {
            for seed in 0..4 {
                let device = with_planted(Options { threads: 2, seed });
                let message = run_faulty(&device, name).unwrap_err().to_string();
                let is_deadlock = name == "shuffle_after_return" && message.contains("of which 00000020 have ended");
                assert!(message.contains(expected) || is_deadlock, "{name}, seed {seed}: {message}");
                assert!(message.contains("(block (0, 0, 0), thread ("), "{name}: {message}");
                let (want, got) = run_correct(&device);
                assert_eq!(got, want, "the device works on after {name}");
            }
        }
    }

    #[test]
    fn what_nobody_wrote_is_nan() {
        let device = with_planted(NATURAL);
        let out = run_faulty(&device, "uninitialised_shared").unwrap();
        assert!(out[63].is_nan() && out[..63].iter().all(|&x| x == 1.0), "{out:?}");
        let fresh = device.allocate(4 * 5).unwrap();
        assert!(download::<f32>(&device, fresh, 5).iter().all(|x| x.is_nan()));
    }

    /// Runs a planted kernel in a process of its own: started by the tests below, which watch it.
    #[test]
    fn under_watch() {
        let Ok(name) = env::var("SIMSIAM_PLANTED") else { return };
        let device = Emulator::new(Options::from_environment().unwrap()).unwrap();
        match name.as_str() {
            "correct" => {
                let (want, got) = run_correct(&device);
                assert_eq!(got, want);
            }
            "guard" => {
                // The second half of the input is a gap, and touched.
                let x = upload(&device, &[1.0f32; 128]);
                device.guard(x.offset(256), 256);
                device.upload(x, bytemuck::cast_slice(&[2.0f32; 128])).unwrap();
                launch(&device, blocks(1), &GLOBAL_OVERRUN, &[x.0, x.0]).unwrap();
            }
            "unguard" => {
                let x = upload(&device, &[1.0f32; 128]);
                device.guard(x.offset(256), 256);
                device.unguard(x.offset(256), 256);
                launch(&device, blocks(1), &GLOBAL_OVERRUN, &[x.0, device.allocate(256).unwrap().0]).unwrap();
            }
            name => _ = run_faulty(&device, name),
        }
    }

    fn watch(sanitizer: Sanitizer, library: &Path, planted: &str) -> Option<Output> {
        let mut command = sanitized(sanitizer, library, &env::current_exe().unwrap())?;
        command.args(["--exact", "emulator::under_watch", "--nocapture"]).env("SIMSIAM_PLANTED", planted);
        Some(command.output().unwrap())
    }

    /// Runs planted kernels under a sanitizer. The report of each contains the second text; without one it passes.
    fn watch_all(sanitizer: Sanitizer, planted: &[(&str, Option<&str>)]) {
        let library = emulator_library("planted", Some(sanitizer), &[PLANTED]);
        for &(name, expected) in planted {
            let Some(output) = watch(sanitizer, &library, name) else { return skip(sanitizer) };
            let report = text(&output);
            let Some(expected) = expected else {
                assert!(output.status.success(), "{name} failed: {}\n{report}", output.status);
                assert!(report.contains("1 passed"), "{name} did not run\n{report}");
                continue;
            };
            assert_eq!(output.status.code(), Some(REPORTED), "{name} was not reported: {}\n{report}", output.status);
            assert!(report.contains(expected), "{name}: no {expected:?} in\n{report}");
            assert!(report.contains("planted.cu:"), "{name}: no line in\n{report}");
        }
    }

    fn skip(sanitizer: Sanitizer) {
        assert!(!required(), "SIMSIAM_REQUIRE_NVCC=1, but the {sanitizer:?} sanitizer is not installed");
        println!("skipped: the {sanitizer:?} sanitizer is not installed");
    }

    /// All that a process has printed.
    fn text(output: &Output) -> String {
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
    }

    /// The ops of these golden files on the emulated device, in every element type, under a sanitizer.
    fn run_op_table(sanitizer: Sanitizer, golden: &[&str]) {
        let folder = tempfile::tempdir().unwrap();
        for file in golden {
            let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file);
            std::fs::copy(from, folder.path().join(file)).unwrap();
        }
        let library = emulator_library("planted", Some(sanitizer), &[PLANTED]);
        let engine = Path::new(env!("CARGO_BIN_EXE_simsiam-engine"));
        let Some(mut command) = sanitized(sanitizer, &library, engine) else { return skip(sanitizer) };
        command.args(["selftest", "--device", "cuda-emulated", "--golden"]).arg(folder.path());
        let output = command.env("SIMSIAM_EMULATOR_SEED", "20").output().unwrap();
        assert!(output.status.success(), "{}\n{}", output.status, text(&output));
        assert!(text(&output).contains("agree with PyTorch"), "{}", text(&output));
    }

    #[test]
    fn all_ops_stay_in_bounds() {
        run_op_table(Sanitizer::Address, &["ops.safetensors", "shapes.safetensors"]);
    }

    #[test]
    fn no_op_has_a_race() {
        run_op_table(Sanitizer::Thread, &["ops.safetensors"]);
    }

    #[test]
    fn the_address_sanitizer_reports_accesses_out_of_bounds() {
        watch_all(
            Sanitizer::Address,
            &[
                ("correct", None),
                ("unguard", None),
                ("diverged_barrier", None), // abandoned without a false report
                ("global_overrun", Some("heap-buffer-overflow")),
                ("static_shared_overrun", Some("global-buffer-overflow")),
                ("dynamic_shared_overrun", Some("heap-buffer-overflow")),
                ("guard", Some("use-after-poison")),
                ("misaligned_access", Some("misaligned address")),
            ],
        );
    }

    #[test]
    fn the_thread_sanitizer_reports_races() {
        watch_all(
            Sanitizer::Thread,
            &[
                ("correct", None),
                ("missing_barrier", Some("data race")),
                ("shuffle_for_barrier", Some("data race")),
                ("race_between_blocks", Some("data race")),
            ],
        );
    }
}
