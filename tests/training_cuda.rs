//! Whole training runs of the binary on an emulated CUDA device: the executor, streams and graphs that a GPU gets.
#![cfg(feature = "emulator")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use simsiam_engine::train::metrics::{self, Line};

/// A run of 12 steps in 4 epochs on 100 images.
const OPTIONS: &str = "--preset cifar --arch custom --block basic --depths 1,1 --width 8 --dim 24 --image-size 14 \
                       --epochs 4 --log-every 1 --rank-every 5 --checkpoint-steps 2 \
                       --knn-k 5 --knn-temperature 0.1 --knn-every 2 --seed 3";

struct Bench {
    folder: tempfile::TempDir,
    train: PathBuf,
    test: PathBuf,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let train = common::fashion(folder.path(), "train", 100);
        let test = common::fashion(folder.path(), "test", 30);
        Bench { folder, train, test }
    }

    fn run_path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `train` into run directory `name`, or its continuation where the run exists.
    fn command(&self, name: &str, options: &str) -> Command {
        let mut command = common::engine();
        let run = self.run_path(name);
        command.arg("train").stdout(Stdio::piped()).stderr(Stdio::piped());
        if run.join("config.toml").exists() {
            command.arg("--resume").arg(run);
        } else {
            command.arg(&self.train).arg("--run").arg(run).args(OPTIONS.split_whitespace());
            for (option, value) in [("--batch", "32"), ("--base-lr", "0.2")] {
                if !options.contains(option) {
                    command.args([option, value]);
                }
            }
            command.arg("--knn-bank").arg(&self.train).arg("--knn-queries").arg(&self.test);
        }
        command.args(options.split_whitespace());
        command
    }

    fn finish(&self, name: &str, options: &str) -> Vec<Line> {
        let output = self.command(name, options).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.lines(name)
    }

    fn lines(&self, name: &str) -> Vec<Line> {
        let lines = metrics::read(&self.run_path(name).join("metrics.jsonl")).unwrap();
        lines.iter().map(Line::without_timing).collect()
    }

    fn last_checkpoint(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.run_path(name).join("checkpoints/step-00000012.safetensors")).unwrap()
    }

    /// Kills the run with SIGKILL when it has logged `lines` steps.
    fn kill_after(&self, name: &str, options: &str, lines: usize) {
        let mut child = self.command(name, options).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let metrics = self.run_path(name).join("metrics.jsonl");
        let deadline = Instant::now() + Duration::from_secs(300);
        while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
            if std::fs::read_to_string(&metrics).unwrap_or_default().lines().count() >= lines {
                break;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        let _ = child.kill();
        child.wait().unwrap();
    }
}

fn error_of(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !stderr.contains("panicked"), "{stderr}");
    stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or(&stderr).to_string()
}

#[test]
fn killed_and_resumed_equals_uninterrupted_in_bf16() {
    let bench = Bench::new();
    let options = "--device cuda-emulated";
    let whole = bench.finish("whole", options);
    assert_eq!(whole.len(), 12);
    let config = std::fs::read_to_string(bench.run_path("whole/config.toml")).unwrap();
    assert!(config.contains("dtype = \"bf16\"") && config.contains("device = \"cuda-emulated\""), "{config}");
    for lines in [1, 4, 11] {
        bench.kill_after("killed", options, lines);
    }
    assert_eq!(bench.finish("killed", ""), whole);
    assert!(bench.last_checkpoint("killed") == bench.last_checkpoint("whole"), "the last checkpoints differ");
}

/// A device has not run a step when it was given one: what counts is when it is done.
#[test]
fn the_speed_is_that_of_steps_that_are_done() {
    let bench = Bench::new();
    bench.finish("speed", "--device cuda-emulated");
    let lines = metrics::read(&bench.run_path("speed").join("metrics.jsonl")).unwrap();
    let mut seconds: Vec<f64> = lines.iter().map(|line| 32.0 / line.timing.images_per_s).collect();
    seconds.sort_by(f64::total_cmp);
    // However busy the machine is, none of them takes next to nothing beside the one in the middle.
    assert!(seconds.len() == 12 && seconds[0] > seconds[6] / 30.0, "{seconds:?}");
}

#[test]
fn neither_graph_nor_check_nor_unlucky_order_changes_a_bit() {
    let bench = Bench::new();
    let expected = bench.finish("graph", "--device cuda-emulated --dtype bf16");
    let scaled = bench.finish("scaled", "--device cuda-emulated --dtype fp16");
    assert_eq!(bench.finish("scaled check", "--device cuda-emulated --dtype fp16 --check"), scaled);
    for (name, options) in [("eager", "--no-graph"), ("check", "--check"), ("workers", "--workers 2")] {
        let options = format!("--device cuda-emulated --dtype bf16 {options}");
        assert_eq!(bench.finish(name, &options), expected, "{name}");
        assert!(bench.last_checkpoint(name) == bench.last_checkpoint("graph"), "{name}");
    }
    for seed in ["1", "77"] {
        let mut command = bench.command(seed, "--device cuda-emulated --dtype bf16");
        let output = command.env("SIMSIAM_EMULATOR_SEED", seed).env("SIMSIAM_EMULATOR_THREADS", "3").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(bench.last_checkpoint(seed) == bench.last_checkpoint("graph"), "seed {seed}");
    }
}

#[test]
fn the_emulated_device_trains_as_the_cpu_does() {
    let bench = Bench::new();
    let cpu = bench.finish("cpu", "--device cpu");
    for (dtype, tolerance) in [("f32", 2e-3), ("bf16", 5e-2), ("fp16", 5e-2)] {
        let device = bench.finish(dtype, &format!("--device cuda-emulated --dtype {dtype}"));
        assert_eq!(device.len(), cpu.len());
        for (a, b) in cpu.iter().zip(&device) {
            assert!((a.loss - b.loss).abs() < tolerance, "{dtype}, step {}: {} and {}", a.step, a.loss, b.loss);
            assert!((a.z_std - b.z_std).abs() < tolerance, "{dtype}, step {}: {} and {}", a.step, a.z_std, b.z_std);
        }
    }
}

#[test]
fn what_is_fused_changes_how_and_not_what() {
    let bench = Bench::new();
    let fused = "--fuse-statistics all --residual-gradient fused";
    for (dtype, tolerance) in [("f32", 2e-3), ("fp16", 5e-2)] {
        let device = format!("--device cuda-emulated --dtype {dtype}");
        let plain = bench.finish(&format!("plain {dtype}"), &device);
        let fused = bench.finish(&format!("fused {dtype}"), &format!("{device} {fused}"));
        assert_eq!((plain.len(), fused.len()), (12, 12));
        // Sums without a shift round differently: were nothing fused, no bit would differ.
        assert_ne!(plain, fused, "{dtype}");
        for (a, b) in plain.iter().zip(&fused) {
            assert!((a.loss - b.loss).abs() < tolerance, "{dtype}, step {}: {} and {}", a.step, a.loss, b.loss);
            assert!((a.z_std - b.z_std).abs() < tolerance, "{dtype}, step {}: {} and {}", a.step, a.z_std, b.z_std);
        }
    }
    // It is part of the run: neither a kill nor launching node by node changes a bit.
    let whole = bench.lines("fused fp16");
    let options = format!("--device cuda-emulated --dtype fp16 {fused}");
    bench.kill_after("killed", &options, 5);
    assert_eq!(bench.finish("killed", "--no-graph"), whole);
    assert!(bench.last_checkpoint("killed") == bench.last_checkpoint("fused fp16"), "the last checkpoints differ");
    let config = std::fs::read_to_string(bench.run_path("killed/config.toml")).unwrap();
    assert!(config.contains("fuse_statistics = \"all\"\nresidual_gradient = \"fused\""), "{config}");
}

#[test]
fn neither_the_default_nor_auto_fuses_without_a_gpu_and_old_runs_go_on() {
    let bench = Bench::new();
    let expected = bench.finish("default", "--device cuda-emulated --dtype fp16");
    let auto = "--fuse-statistics auto --residual-gradient accumulate";
    assert_eq!(bench.finish("auto", &format!("--device cuda-emulated --dtype fp16 {auto}")), expected);
    // A run of a version that knew of no choice.
    bench.kill_after("old", "--device cuda-emulated --dtype fp16", 4);
    let path = bench.run_path("old/config.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let (before, after) = config.split_once("[machine.epilogues]\n").unwrap();
    assert!(after.starts_with("fuse_statistics = \"none\"\n"), "{config}");
    let rest = after.find("\n[").map_or("", |at| &after[at..]);
    std::fs::write(&path, format!("{before}{rest}")).unwrap();
    assert_eq!(bench.finish("old", ""), expected);
}

#[test]
fn a_layer_that_is_not_there_is_named_before_anything_is_made() {
    let bench = Bench::new();
    for (option, value) in [("--fuse-statistics", "encoder.layer7"), ("--residual-gradient", "fused:encoder.layer7")] {
        let options = format!("--device cuda-emulated {option} {value}");
        let message = error_of(&bench.command("no such layer", &options).output().unwrap());
        assert!(message.starts_with(&format!("error: {option}: expected names of layers")), "{message}");
        assert!(message.contains("encoder.layer2.0.conv1") && message.ends_with("got encoder.layer7"), "{message}");
        assert!(!bench.run_path("no such layer").exists());
    }
}

#[test]
fn a_run_moves_between_devices_and_element_types() {
    let bench = Bench::new();
    let cpu = bench.finish("cpu", "--device cpu");
    bench.kill_after("moved", "--device cpu", 4);
    bench.kill_after("moved", "--device cuda-emulated --dtype bf16", 7);
    bench.kill_after("moved", "--device cuda-emulated --dtype fp16", 10);
    let moved = bench.finish("moved", "--device cpu --dtype f32");
    assert_eq!(moved.len(), 12);
    for (a, b) in cpu.iter().zip(&moved) {
        assert!((a.loss - b.loss).abs() < 5e-2, "step {}: {} and {}", a.step, a.loss, b.loss);
    }
}

#[test]
fn too_little_memory_names_the_batch_that_fits_and_leaves_nothing() {
    let bench = Bench::new();
    let limited = |name: &str, batch: usize| {
        let mut command = bench.command(name, &format!("--device cuda-emulated --batch {batch}"));
        command.env("SIMSIAM_EMULATOR_MEMORY", "74000000").output().unwrap()
    };
    let output = limited("large", 100);
    let message = error_of(&output);
    let (before, after) = message.split_once("; hint: the largest batch that fits is --batch ").unwrap_or_else(|| {
        panic!("{message}");
    });
    assert!(before.starts_with("error: out of memory: the plan needs 40."), "{message}");
    assert!(before.contains(" MB, emulated on ") && before.ends_with(" MB free"), "{message}");
    assert!(!bench.run_path("large").exists());
    let fits: usize = after.parse().unwrap();
    assert!((2..100).contains(&fits), "{message}");
    let output = limited("fits", fits);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(error_of(&limited("one more", fits + 1)).contains("out of memory"));
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_with_one_sentence() {
    let bench = Bench::new();
    let mut steps = Vec::new();
    for options in ["", "--no-graph", "--check"] {
        let run = format!("diverges{options}");
        let options = format!("--device cuda-emulated --dtype bf16 --base-lr 1e30 {options}");
        let message = error_of(&bench.command(&run, &options).output().unwrap());
        assert!(message.contains("is not finite; first bad node: ") && message.contains("hint: lower"), "{message}");
        weights_are_finite(&bench.run_path(&run));
        steps.push(message.split_once("step ").map(|(_, rest)| rest.split(' ').next().unwrap_or("").to_string()));
    }
    assert!(steps[0].is_some() && steps.iter().all(|step| *step == steps[0]), "{steps:?}");
}

/// Every checkpoint that was written can be gone on from.
fn weights_are_finite(run: &Path) {
    for entry in std::fs::read_dir(run.join("checkpoints")).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let (tensors, _) = simsiam_engine::tensor::safetensors::read(&path).unwrap();
            assert!(tensors.values().all(|tensor| tensor.to_f64().iter().all(|v| v.is_finite())), "{}", path.display());
        }
    }
}

#[test]
fn every_node_agrees_with_the_cpu_and_every_replay_with_a_launch() {
    let lockstep = common::succeed(&["selftest", "--device", "cuda-emulated", "--lockstep"]);
    assert!(lockstep.ends_with("all 7 checks passed: steps and augmentation agree with the CPU\n"), "{lockstep}");
    let replay = common::succeed(&["selftest", "--device", "cuda-emulated", "--replay", "5"]);
    let passed = |what: &str| replay.lines().filter(|line| line.starts_with("pass ") && line.contains(what)).count();
    // In three element types, replayed and launched.
    assert_eq!((passed("every bit is the same"), passed("no allocation after step 2 (3 steps), ")), (3, 6), "{replay}");
}
