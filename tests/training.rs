//! Training runs of the binary: interruption, resumption, thread counts, faults.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use simsiam_engine::train::metrics::{self, Line};

/// A run of 24 steps in 4 epochs on 200 images: a few seconds.
const OPTIONS: &str = "--preset cifar --arch custom --block basic --depths 1,1 --width 6 --dim 24 --image-size 14 \
                       --batch 32 --epochs 4 --base-lr 0.2 --log-every 1 --rank-every 4 --checkpoint-steps 5 \
                       --knn-k 5 --knn-temperature 0.1 --knn-every 2 --keep-last 2 --seed 3";

struct Bench {
    folder: tempfile::TempDir,
    train: PathBuf,
    test: PathBuf,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let train = common::fashion(folder.path(), "train", 200);
        let test = common::fashion(folder.path(), "test", 50);
        Bench { folder, train, test }
    }

    fn run_path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `train` into run directory `name`, or its continuation where the run exists.
    fn command(&self, name: &str) -> Command {
        let mut command = common::engine();
        let run = self.run_path(name);
        command.arg("train").stdout(Stdio::piped()).stderr(Stdio::piped());
        if run.join("config.toml").exists() {
            command.arg("--resume").arg(run);
        } else {
            command.arg(&self.train).arg("--run").arg(run).args(OPTIONS.split_whitespace());
            command.arg("--knn-bank").arg(&self.train).arg("--knn-queries").arg(&self.test);
        }
        command
    }

    fn finish(&self, name: &str) {
        let output = self.command(name).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn result(&self, name: &str) -> (Vec<Line>, Vec<u8>) {
        result_of(&self.run_path(name))
    }
}

/// Metrics without timing, and the bytes of the last checkpoint.
fn result_of(run: &Path) -> (Vec<Line>, Vec<u8>) {
    let lines = metrics::read(&run.join("metrics.jsonl")).unwrap().iter().map(Line::without_timing).collect();
    (lines, std::fs::read(run.join("checkpoints/step-00000024.safetensors")).unwrap())
}

fn assert_equal(left: &(Vec<Line>, Vec<u8>), right: &(Vec<Line>, Vec<u8>)) {
    assert_eq!(left.0, right.0, "metrics");
    assert!(left.1 == right.1, "the last checkpoints differ");
}

/// Waits until the run has logged `lines` steps, or has ended.
fn wait_for_lines(child: &mut Child, run: &Path, lines: usize) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
        if text.lines().count() >= lines {
            return;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

#[test]
fn killed_and_resumed_equals_uninterrupted() {
    let bench = Bench::new();
    bench.finish("whole");
    let whole = bench.result("whole");
    assert_eq!(whole.0.len(), 24);
    assert!(whole.0.iter().filter(|l| l.knn.is_some()).count() == 2, "kNN after epochs 2 and 4");
    // Killed at awkward steps: before the first checkpoint, just after one, in the middle of an epoch, near the end.
    for stop in [2, 6, 9, 16, 23] {
        let mut child = bench.command("killed").spawn().unwrap();
        wait_for_lines(&mut child, &bench.run_path("killed"), stop);
        let _ = child.kill(); // SIGKILL
        child.wait().unwrap();
    }
    bench.finish("killed");
    assert_equal(&whole, &bench.result("killed"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_and_sigterm_write_a_checkpoint_and_the_run_goes_on_bit_identically() {
    let bench = Bench::new();
    bench.finish("whole");
    for (signal, stop) in [("-INT", 3), ("-TERM", 13)] {
        let mut child = bench.command("stopped").spawn().unwrap();
        wait_for_lines(&mut child, &bench.run_path("stopped"), stop);
        Command::new("kill").arg(signal).arg(child.id().to_string()).status().unwrap();
        let output = child.wait_with_output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{stderr}");
        assert!(stdout.contains("continue with: simsiam-engine train --resume"), "{stdout}{stderr}");
    }
    bench.finish("stopped");
    assert_equal(&bench.result("whole"), &bench.result("stopped"));
}

#[test]
fn results_do_not_depend_on_threads_or_loader_workers() {
    let bench = Bench::new();
    for (name, threads, workers) in [("one", "1", "1"), ("three", "3", "2")] {
        let output =
            bench.command(name).env("RAYON_NUM_THREADS", threads).args(["--workers", workers]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let (one, three) = (bench.result("one"), bench.result("three"));
    assert_equal(&one, &three);
}

#[test]
fn a_loss_that_is_not_finite_names_step_node_and_checkpoint() {
    let bench = Bench::new();
    let options = OPTIONS.replace("--base-lr 0.2", "--base-lr 1e30");
    let run = bench.run_path("diverged");
    let mut command = common::engine();
    command.arg("train").arg(&bench.train).arg("--run").arg(&run).args(options.split_whitespace());
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let error = stderr.lines().find(|l| l.starts_with("error: ")).unwrap_or_else(|| panic!("no error: {stderr}"));
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("is not finite; first bad node: encoder.bn1 (batch_norm)"), "{error}");
    let last = metrics::read(&run.join("metrics.jsonl")).unwrap().len();
    assert!(error.contains(&format!("step {last}:")), "{error} after {last} lines");
}

#[test]
fn a_run_is_not_overwritten_and_not_shared() {
    let bench = Bench::new();
    let run = bench.run_path("first");
    let mut child = bench.command("first").spawn().unwrap();
    wait_for_lines(&mut child, &run, 1);
    let path = run.to_str().unwrap();
    if child.try_wait().unwrap().is_none() {
        assert!(common::fail(&["train", "--resume", path]).contains("in use by another process"));
    }
    child.wait_with_output().unwrap();
    let data = bench.train.to_str().unwrap();
    let again: Vec<&str> = ["train", data, "--run", path].into_iter().chain(OPTIONS.split_whitespace()).collect();
    assert!(common::fail(&again).contains("holds a run already"));
}

#[test]
fn a_run_refuses_another_dataset() {
    let bench = Bench::new();
    bench.finish("first");
    let other = common::fashion(bench.folder.path(), "train", 150);
    std::fs::rename(other, &bench.train).unwrap();
    let error = common::fail(&["train", "--resume", bench.run_path("first").to_str().unwrap()]);
    assert!(error.contains("the run began with dataset"), "{error}");
}
