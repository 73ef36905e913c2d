//! `profile` and `bench step` as a user meets them: figures that add up, a picture, and faults in one line.

mod common;

use std::fs;
use std::path::Path;

use common::{fail, succeed};
use serde_json::Value;

/// A step small enough to be run some times: one block a stage, odd sizes.
const TINY: &str = "--arch custom --block basic --depths 1,1 --width 8 --stem cifar --dim 24 --projector-hidden 20 \
                    --predictor-hidden 12 --batch 6 --image-size 18";

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

fn numbers(json: &Value, list: &str, key: &str) -> Vec<f64> {
    json[list].as_array().unwrap().iter().map(|entry| entry[key].as_f64().unwrap()).collect()
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

/// Runs `profile` on the tiny step; returns what it printed and its JSON, once that was held against itself.
fn profile(folder: &Path, more: &str) -> (String, Value) {
    let (json, png) = (folder.join("profile.json"), folder.join("profile.png"));
    let files = ["--json", json.to_str().unwrap(), "--png", png.to_str().unwrap()];
    let text = succeed(&[&words(&format!("profile {TINY} --steps 3 --top 5 {more}"))[..], &files].concat());
    let report: Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    for list in ["nodes", "ops", "phases"] {
        let of_total = |key: &str| numbers(&report, list, key).iter().sum::<f64>();
        assert!(near(of_total("share"), 1.0), "{list}");
        for key in ["time_s", "floor_s", "bytes", "flops"] {
            assert!(near(of_total(key), report["total"][key].as_f64().unwrap()), "{list} {key}");
        }
    }
    let picture = image::open(png).unwrap().to_rgb8();
    let colourful = picture.pixels().filter(|p| p.0.iter().max().unwrap() - p.0.iter().min().unwrap() > 60).count();
    assert!(colourful > 5_000, "{colourful} pixels of bars");
    (text, report)
}

#[test]
fn a_profile_of_the_cpu_adds_up() {
    let folder = tempfile::tempdir().unwrap();
    let (text, report) = profile(folder.path(), "--device cpu --peak-tflops 2.5");
    let plan: Value = serde_json::from_str(&succeed(&words(&format!("plan --json {TINY}")))).unwrap();
    assert_eq!(report["flops_per_step"], plan["flops_per_step"]);
    assert_eq!(report["total"]["flops"], plan["flops_per_step"]);

    let node = |name: &str, op: &str| {
        let nodes = report["nodes"].as_array().unwrap();
        let found = nodes.iter().find(|n| n["name"] == name && n["op"] == op);
        found.unwrap_or_else(|| panic!("no {name} ({op})")).clone()
    };
    // 12 views of 18 x 18 pixels, 3 channels to 8 by a window of 3 x 3, in float32.
    let stem = node("encoder.conv1", "conv2d");
    assert_eq!(stem["flops"], 2 * 12 * 18 * 18 * 8 * 3 * 3 * 3);
    assert_eq!(stem["bytes"], 4 * (12 * 18 * 18 * (3 + 8) + 8 * 3 * 3 * 3));
    assert_eq!(stem["phase"], "forward");
    let (time, peak) = (stem["time_s"].as_f64().unwrap(), report["ceilings"]["peak_tflop_per_s"].as_f64().unwrap());
    let copy = report["ceilings"]["copy_gb_per_s"].as_f64().unwrap();
    let (flops, bytes) = (stem["flops"].as_f64().unwrap(), stem["bytes"].as_f64().unwrap());
    assert!(near(stem["gb_per_s"].as_f64().unwrap(), bytes / time / 1e9));
    assert!(near(stem["floor_s"].as_f64().unwrap(), f64::max(flops / peak / 1e12, bytes / copy / 1e9)));
    assert_eq!(node("sgd", "sgd")["phase"], "update");

    let (step, flops) = (report["step_s"].as_f64().unwrap(), report["flops_per_step"].as_f64().unwrap());
    assert!(near(report["images_per_s"].as_f64().unwrap(), 6.0 / step));
    assert!(near(report["mfu"].as_f64().unwrap(), flops / step / peak / 1e12));
    assert!(near(report["mfu_of_given_peak"].as_f64().unwrap(), flops / step / 2.5e12));
    // The nodes of a round ran one after the other while the host waited for them, however busy the machine was.
    let [nodes, wall, steps] = ["nodes_s", "wall_s", "step_s"].map(|key| numbers(&report, "rounds", key));
    assert_eq!(nodes.len(), 3);
    let fastest: f64 = numbers(&report, "nodes", "fastest_s").iter().sum();
    for (nodes, wall) in nodes.iter().zip(&wall) {
        assert!(0.0 < fastest && fastest <= nodes * (1.0 + 1e-9) && nodes <= wall, "{fastest} {nodes} {wall}");
    }
    assert!(steps.contains(&step), "of three rounds one is in the middle: {step} of {steps:?}");
    // And they are the step, which followed at once: on a machine that is busy with something else at least in one round.
    let least = |times: &[f64]| times.iter().copied().fold(f64::INFINITY, f64::min);
    let ratio = least(&nodes) / least(&steps);
    assert!((0.2..5.0).contains(&ratio), "nodes {nodes:?}, steps {steps:?}");

    let rows = |heading: &str| {
        let below = text.lines().skip_while(|line| !line.starts_with(heading)).skip(1);
        below.take_while(|line| !line.is_empty()).count()
    };
    assert_eq!([rows("phase"), rows("slowest 5 of ")], [3, 5], "{text}");
    assert!(text.contains(" of the given 2.5 TFLOP/s"), "{text}");
}

#[test]
#[cfg(feature = "emulator")]
fn an_emulated_device_is_profiled_too() {
    let folder = tempfile::tempdir().unwrap();
    let (_, report) = profile(folder.path(), "--device cuda-emulated --warmup 0");
    assert_eq!((&report["dtype"], &report["on_gpu"]), (&"bf16".into(), &false.into()));
    assert!(report["ceilings"]["bf16_mma_tflop_per_s"].as_f64().unwrap() > 0.0);
}

#[test]
fn steps_are_timed_in_rounds() {
    let text = succeed(&words(&format!("bench step --json {TINY} --device cpu --warmup 1 --steps 2 --rounds 5")));
    let report: Value = serde_json::from_str(&text).unwrap();
    let value = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key} in {text}"));
    let rounds: Vec<f64> = report["round_step_s"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect();
    assert!(rounds.len() == 5 && rounds.is_sorted() && rounds[0] > 0.0, "{text}");
    let keys = ["step_min_s", "step_lower_quartile_s", "step_s", "step_upper_quartile_s"];
    assert_eq!(keys.map(value), [rounds[0], rounds[1], rounds[2], rounds[3]]);
    assert!(near(value("images_per_s"), 6.0 / rounds[2]) && near(value("views_per_s"), 12.0 / rounds[2]));
    assert!((-1.0..1.0).contains(&value("loss")), "{text}");
    assert!(value("planned_bytes") > 1e4 && report["device_bytes_in_use"].is_null(), "{text}");
    assert_eq!((&report["data"], &report["steps"], &report["dtype"]), (&"synthetic".into(), &2.into(), &"f32".into()));

    let text = succeed(&words(&format!("bench step {TINY} --device cpu --warmup 0 --rounds 1")));
    for line in ["speed", "step", "MFU", "memory", "loss"] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line} in {text}");
    }
}

#[test]
#[cfg(feature = "emulator")]
fn the_emulated_device_tells_its_memory() {
    let text = succeed(&words(&format!("bench step --json {TINY} --device cuda-emulated --warmup 0 --rounds 1")));
    let report: Value = serde_json::from_str(&text).unwrap();
    assert!(report["device_bytes_in_use"].as_u64() >= report["planned_bytes"].as_u64(), "{text}");
}

#[test]
fn options_that_make_no_sense_are_named() {
    for (args, expected) in [
        ("profile --batch 1", "error: --batch: expected 2 to 65536, got 1"),
        ("profile --batch 2 --image-size 0", "error: --image-size: expected 1 to 8192, got 0"),
        ("profile --steps 0", "error: --steps: expected 1 to 10000, got 0"),
        ("bench step --rounds 0", "error: --rounds: expected 1 to 100000, got 0"),
        (
            "bench step --device cpu --batch largest",
            "error: --batch: largest: only CUDA devices have a memory of their own to fill",
        ),
        (
            "--threads 2 bench step --device cpu --dtype bf16",
            "error: --dtype bf16: the CPU does not train in it; hint: use --dtype f32",
        ),
        ("profile --peak-tflops 0", "error: --peak-tflops: expected more than 0, got 0"),
        ("bench step --arch custom", "error: --block: expected with --arch custom, got none; hint: e.g. --block basic"),
    ] {
        assert_eq!(fail(&words(args)), expected, "{args}");
    }
    let folder = tempfile::tempdir().unwrap();
    let lost = folder.path().join("no/such/profile.json");
    let args = format!("profile {TINY} --steps 1 --json {}", lost.display());
    assert!(fail(&words(&args)).contains("no/such"), "{args}");
    for args in ["bench step --batch many", "profile --device abacus", "profile --batch=-4"] {
        let output = common::run(&words(args));
        assert_eq!(output.status.code(), Some(2), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn steps_on_a_dataset_take_the_whole_way() {
    let folder = tempfile::tempdir().unwrap();
    let data = common::fashion(folder.path(), "train", 40);
    let data = data.to_str().unwrap();
    let text = succeed(&words(&format!(
        "bench step --json {TINY} --device cpu --data {data} --warmup 1 --steps 3 --rounds 3"
    )));
    let report: Value = serde_json::from_str(&text).unwrap();
    // 3 x 3 + 1 steps of 6 images: more than an epoch of 40.
    assert_eq!(report["data"], data);
    let wait = report["data_wait_share"].as_f64().unwrap();
    assert!((0.0..1.0).contains(&wait) && (-1.0..1.0).contains(&report["loss"].as_f64().unwrap()), "{text}");

    let batch = TINY.replace("--batch 6", "--batch 41");
    let error = fail(&words(&format!("bench step {batch} --device cpu --data {data}")));
    assert!(error.starts_with("error: --batch: the dataset holds no full batch of 41 images"), "{error}");
    let error = fail(&words(&format!("bench step {TINY} --device cpu --data {data} --workers 0")));
    assert_eq!(error, "error: --workers: expected at least 1, got 0");
    assert!(fail(&words(&format!("bench step {TINY} --device cpu --data no.ssds"))).contains("no.ssds"));
}

#[test]
#[cfg(feature = "emulator")]
fn the_largest_batch_fills_the_memory() {
    /// Room for the scratch of libraries, the matrices that the ceilings are measured with, and some images. An emulated device
    /// keeps nothing back.
    const ROOM: usize = 60_000_000;
    let bench = |batch: &str, memory: usize| {
        let args = format!("bench step --json {TINY} --device cuda-emulated --warmup 0 --rounds 1")
            .replace("--batch 6", &format!("--batch {batch}"));
        common::engine().args(words(&args)).env("SIMSIAM_EMULATOR_MEMORY", memory.to_string()).output().unwrap()
    };
    let output = bench("largest", ROOM);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let largest: Value = serde_json::from_slice(&output.stdout).unwrap();
    let batch = largest["batch"].as_u64().unwrap();
    assert!(batch.is_multiple_of(8) && largest["planned_bytes"].as_u64().unwrap() <= ROOM as u64, "{largest}");
    let next = bench(&(batch + 8).to_string(), ROOM);
    let error = String::from_utf8(next.stderr).unwrap();
    assert!(!next.status.success() && error.contains("out of memory"), "{error}");

    let error = String::from_utf8(bench("largest", 1000).stderr).unwrap();
    assert!(error.contains("out of memory") && error.contains("not even a batch of 8 fits"), "{error}");
}
