//! The loader through the binary: `bench loader`, and the options of `train` that concern it.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{fail, run, succeed};
use serde_json::Value;
use simsiam_engine::train::metrics::{self, Line};

fn bench(data: &Path, options: &str) -> Value {
    let mut args = vec!["bench", "loader", data.to_str().unwrap(), "--json", "--warm-up", "0.1"];
    args.extend(options.split_whitespace());
    serde_json::from_str(&succeed(&args)).unwrap()
}

#[test]
fn bench_adds_up_and_names_the_bottleneck() {
    let folder = tempfile::tempdir().unwrap();
    let data = common::fashion(folder.path(), "train", 600);
    for io in ["map", "pread", "memory"] {
        let options = format!("--augment cifar --workers 2 --seconds 0.5 --shuffle-window 100 --io {io}");
        let report = bench(&data, &options);
        let number = |key: &str| report[key].as_f64().unwrap();
        assert_eq!((report["io"].as_str(), number("records"), number("batch")), (Some(io), 600.0, 256.0));
        assert!((number("images") / number("seconds") / number("images_per_s") - 1.0).abs() < 1e-9);
        assert_eq!(number("views_per_s"), 2.0 * number("images_per_s"));
        // 28x28 bytes an image; of the batches in the making some are counted that were not delivered.
        let bytes_per_image = number("mb_per_s") * 1e6 / number("images_per_s");
        assert!((500.0..1200.0).contains(&bytes_per_image), "{report:#}");
        let stages = report["stages"].as_object().unwrap();
        assert_eq!(stages.keys().collect::<Vec<_>>(), ["augment", "decode", "read"]);
        let sum: f64 = stages.values().map(|stage| stage["share"].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-9, "{sum}");
        assert_eq!(report["bottleneck"], "augment", "{report:#}");
        assert!((0.5..=1.0).contains(&number("wait_share")), "nothing but waiting: {report:#}");
        assert!(number("peak_anonymous_bytes") > 1e6 && report["machine"]["cores"].as_u64().unwrap() >= 1);
    }
}

#[test]
fn a_paced_consumer_waits_only_for_a_loader_that_is_too_slow() {
    let folder = tempfile::tempdir().unwrap();
    let data = common::fashion(folder.path(), "train", 600);
    let fed = bench(&data, "--augment none --batch 50 --ranks 2 --workers 1 --seconds 1 --consume 500");
    assert_eq!(fed["bottleneck"], "consumer", "{fed:#}");
    assert!(fed["wait_share"].as_f64().unwrap() < 0.05 && fed["workers_needed"].as_f64().unwrap() < 1.0, "{fed:#}");
    assert!((350.0..650.0).contains(&fed["images_per_s"].as_f64().unwrap()), "{fed:#}");
    let starved = bench(&data, "--augment imagenet --batch 8 --workers 1 --seconds 0.5 --consume 1e6");
    assert_eq!(starved["bottleneck"], "augment", "{starved:#}");
    assert!(starved["wait_share"].as_f64().unwrap() > 0.5, "{starved:#}");
    assert!(starved["workers_needed"].as_f64().unwrap() > 1.0, "{starved:#}");
}

#[test]
fn bench_tells_it_in_words_too() {
    let folder = tempfile::tempdir().unwrap();
    let data = common::fashion(folder.path(), "train", 300);
    let args = ["bench", "loader", data.to_str().unwrap(), "--augment", "none", "--seconds", "0.2", "--warm-up", "0"];
    let text = succeed(&args);
    for line in [
        "data",
        "machine",
        "speed",
        "records",
        "consumer",
        "workers",
        "  read",
        "  decode",
        "  copy",
        "memory",
        "bottleneck",
    ] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line} is missing:\n{text}");
    }
}

#[test]
fn bench_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let data = common::fashion(folder.path(), "train", 300);
    let data = data.to_str().unwrap();
    for (options, expected) in [
        ("--batch 301", "300 images, fewer than a batch of 301"),
        ("--batch 10 --ranks 3", "--batch: 10 images cannot be shared equally by 3 ranks"),
        ("--ranks 0", "--ranks: expected at least 1, got 0"),
        ("--consume 0", "--consume: expected a number above 0, got 0"),
        ("--seconds nan", "--seconds: expected a number above 0, got NaN"),
        ("--workers 0", "--workers: expected at least 1 thread, got 0"),
        ("--loader-slots 1", "--loader-slots: expected at least 2"),
    ] {
        let mut args = vec!["bench", "loader", data];
        args.extend(options.split_whitespace());
        let message = fail(&args);
        assert!(message.contains(expected), "{options}: {message}");
    }
    // As large as no memory is, without taking space on the disk.
    let huge = folder.path().join("huge.ssds");
    fs::File::create(&huge).unwrap().set_len(1 << 43).unwrap();
    let message = fail(&["bench", "loader", huge.to_str().unwrap(), "--io", "memory"]);
    assert!(message.contains("huge.ssds of 8796093 MB does not fit into memory; hint: --io map"), "{message}");
    // A damaged record stops it.
    let mut bytes = fs::read(data).unwrap();
    bytes[4096 + 20] ^= 4;
    fs::write(data, bytes).unwrap();
    let message = fail(&["bench", "loader", data, "--batch", "100", "--seconds", "5"]);
    assert!(message.contains("record 0") && message.contains("checksum mismatch"), "{message}");
}

/// A run of 12 steps in 2 epochs: a few seconds.
const TRAIN: &str = "--preset cifar --arch custom --block basic --depths 1,1 --width 6 --dim 24 --image-size 14 --batch 32 \
                     --epochs 2 --log-every 1 --checkpoint-steps 4 --keep-last 9 --seed 3";

fn train(data: &Path, run: PathBuf, options: &str) -> PathBuf {
    let mut args = vec!["train", data.to_str().unwrap(), "--run", run.to_str().unwrap()];
    args.extend(TRAIN.split_whitespace().chain(options.split_whitespace()));
    succeed(&args);
    run
}

/// Metrics without timing, and the bytes of the last checkpoint.
fn result(run: &Path) -> (Vec<Line>, Vec<u8>) {
    let lines = metrics::read(&run.join("metrics.jsonl")).unwrap().iter().map(Line::without_timing).collect();
    (lines, fs::read(run.join("checkpoints/step-00000012.safetensors")).unwrap())
}

#[test]
fn training_does_not_depend_on_how_bytes_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let data = common::fashion(folder.path(), "train", 200);
    let results = ["map", "pread", "memory"].map(|io| {
        let run = train(&data, folder.path().join(io), &format!("--io {io}"));
        assert!(fs::read_to_string(run.join("config.toml")).unwrap().contains(&format!("io = \"{io}\"")));
        result(&run)
    });
    assert!(results[1..].iter().all(|other| *other == results[0]));
}

#[test]
fn the_shuffle_window_belongs_to_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let data = common::fashion(folder.path(), "train", 200);
    let plain = result(&train(&data, folder.path().join("plain"), ""));
    let run_path = train(&data, folder.path().join("windows"), "--shuffle-window 50");
    let whole = result(&run_path);
    assert_ne!(plain.0, whole.0, "another order");
    // Resumed in the middle of an epoch it goes on in the same order.
    for step in [8, 12] {
        fs::remove_file(run_path.join(format!("checkpoints/step-{step:08}.safetensors"))).unwrap();
    }
    let path = run_path.to_str().unwrap();
    succeed(&["train", "--resume", path, "--io", "pread", "--workers", "2"]);
    assert!(result(&run_path) == whole);
    // Another window is another run.
    assert_eq!(run(&["train", "--resume", path, "--shuffle-window", "40"]).status.code(), Some(2));
    let config = run_path.join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("shuffle_window = 50\n"), "{text}");
    fs::write(&config, text.replace("shuffle_window = 50", "shuffle_window = 40")).unwrap();
    let message = fail(&["train", "--resume", path]);
    assert!(message.contains("began with a shuffle window of 50, its configuration says 40"), "{message}");
}
