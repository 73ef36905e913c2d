//! The program as a user meets it: what it prints, and that every fault is one line that says what, where and what to do.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::data::augment::AugmentConfig;
use simsiam_engine::exec::CpuExecutor;
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::SimSiam;
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::tensor::safetensors::{self, NamedTensors};
use simsiam_engine::tensor::{DType, HostTensor};
use simsiam_engine::train::checkpoint;
use simsiam_engine::train::config::{Logging, Machine, Recipe, RunConfig};
use simsiam_engine::train::state::{read_params, write_initial};

fn command(args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_simsiam-engine"));
    command.args(args.split_whitespace()).env_remove("RUST_LOG");
    command
}

fn run(args: &str) -> Output {
    command(args).output().unwrap()
}

/// What a run that has to succeed prints.
fn stdout(args: &str) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of a run that has to fail with exit code 1.
fn failure(args: &str) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args}: {stderr}");
    let line = stderr.strip_prefix("error: ").unwrap_or_else(|| panic!("{args}: {stderr}")).trim_end();
    assert!(!line.is_empty() && !line.contains('\n'), "{args}: {stderr}");
    line.to_string()
}

#[test]
fn plan_tells_parameters_and_memory() {
    let text = stdout("plan --arch resnet50 --batch 512 --top 3");
    let row = |label: &str| text.lines().find(|line| line.trim_start().starts_with(label)).unwrap().to_string();
    assert!(row("trainable parameters").ends_with(" 38,199,360"), "{text}");
    assert!(row("backbone parameters").ends_with(" 23,508,032"), "{text}");
    // 38,199,360 float32 values, momenta likewise; padding to the arena's alignment is less than a thousandth.
    assert!(row("parameters").ends_with(" 152.80") && row("optimiser state").ends_with(" 152.80"), "{text}");
    assert!(
        text.starts_with("resnet50, imagenet stem, 224x224 pixels, batch 512 (1024 views, together), f32\n"),
        "{text}"
    );
    let buffers = text.lines().skip_while(|line| !line.starts_with("largest buffers")).count();
    assert_eq!(buffers, 1 + 3, "{text}");
}

#[test]
fn plan_as_json_adds_up() {
    let json: serde_json::Value = serde_json::from_str(&stdout(
        "plan --json --arch custom --block basic --depths 1,2 --width 8 --stem cifar --dim 32 --batch 6 --image-size 20",
    ))
    .unwrap();
    let memory = |key: &str| json["memory"][key].as_u64().unwrap();
    let parts = ["parameters", "state", "optimiser", "inputs", "transient"];
    assert_eq!(parts.map(memory).iter().sum::<u64>(), memory("total"));
    assert!(memory("transient") >= memory("transient_peak"));
    let sizes: Vec<u64> =
        json["largest_buffers"].as_array().unwrap().iter().map(|b| b["bytes"].as_u64().unwrap()).collect();
    assert!(sizes.len() == 10 && sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
    assert_eq!(sizes[0], 2 * 6 * 20 * 20 * 8 * 4, "the first activation is among the largest");
}

#[test]
fn smaller_activations_take_less_memory() {
    // A batch so large that the copies of the weights in bf16 hardly count.
    let saved = |dtype: &str| {
        let text = stdout(&format!("plan --json --preset cifar --batch 512 --dtype {dtype}"));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["memory"]["saved_activations"].as_f64().unwrap()
    };
    let (bf16, f32, f64) = (saved("bf16"), saved("f32"), saved("f64"));
    assert!((1.9..2.1).contains(&(f32 / bf16)) && (1.9..2.1).contains(&(f64 / f32)), "{bf16} {f32} {f64}");
}

#[test]
fn plan_writes_graphviz() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tape.dot");
    stdout(&format!("plan --preset cifar --batch 2 --dot {}", path.display()));
    let dot = fs::read_to_string(&path).unwrap();
    assert!(dot.starts_with("digraph tape {") && dot.ends_with("}\n"));
    assert!(dot.contains("encoder.layer4.1.conv2") && dot.contains("predictor.3"));
}

#[test]
fn switches_of_the_method_change_the_step() {
    // Nodes of the forward and of the backward pass.
    let nodes = |args: &str| -> [i32; 2] {
        let text = stdout(&format!("plan --preset cifar --batch 4 {args}"));
        let line = text.lines().find(|line| line.contains("nodes of a step")).unwrap();
        let (_, counts) = line.split_once('(').unwrap();
        let mut counts = counts.split_whitespace().filter_map(|word| word.parse().ok());
        [counts.next().unwrap(), counts.next().unwrap()]
    };
    let [forward, backward] = nodes("");
    // The loss behind a stop-gradient brings p's gradient with it; without, p and the target have a node each, and d_loss
    // is one of the backward pass.
    assert_eq!(nodes("--stop-gradient false")[1], backward + 2, "the gradients of p and of the target");
    assert!(nodes("--predictor fixed-random")[1] < backward, "no gradients of the predictor's weights");
    assert!(nodes("--predictor none")[0] < forward);
    assert!(nodes("--symmetric false")[0] > forward, "view 1 is cut out");
    assert!(nodes("--head-bn none")[0] < forward && nodes("--head-bn all")[0] > forward);
}

#[test]
fn selftest_passes_and_tells_each_file() {
    let text = stdout("selftest --threads 2");
    let passes: Vec<&str> = text.lines().filter(|line| line.starts_with("pass  ")).collect();
    assert_eq!(passes.len(), 6, "{text}");
    assert!(passes.iter().all(|line| line.contains(" of the tolerance: ")), "{text}");
    assert!(text.ends_with("all 6 files agree with PyTorch\n"), "{text}");
}

#[test]
fn selftest_fails_on_another_truth() {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/basic-cifar-2layer.safetensors");
    let (mut tensors, metadata) = safetensors::read(&source).unwrap();
    let name = tensors.keys().find(|name| name.starts_with("init/") && name.ends_with("conv1.weight")).unwrap().clone();
    let old = &tensors[&name];
    let values: Vec<f32> = old.to_f32().unwrap().iter().map(|v| v * 1.5).collect();
    let new = HostTensor::from_f32(old.desc().shape.clone(), &values).unwrap();
    tensors.insert(name, new);
    safetensors::write(&folder.path().join("wrong.safetensors"), &tensors, &metadata).unwrap();
    let args = format!("selftest --golden {}", folder.path().display());
    assert_eq!(failure(&args), "selftest: 1 of 1 files failed: wrong.safetensors");
    assert!(String::from_utf8(run(&args).stdout).unwrap().starts_with("FAIL  wrong.safetensors: "));
}

#[test]
fn faults_are_one_line_with_what_where_and_hint() {
    let missing = "No such file or directory (os error 2); hint: check the name, and the folder that it is relative to";
    for (args, expected) in [
        ("plan --batch 0", "--batch: expected 1 to 65536, got 0"),
        ("plan --batch 1", "--batch: expected at least 2 images (batch norm needs them), got 1"),
        ("plan --image-size 100000", "--image-size: expected 1 to 8192, got 100000"),
        ("plan --arch custom", "--block: expected with --arch custom, got none; hint: e.g. --block basic"),
        (
            "plan --width 8",
            "--width: shapes a network of your own, not a named one; hint: add --arch custom, or leave it out",
        ),
        (
            "plan --arch custom --block basic --depths 1,0",
            "--depths: expected 1 to 8 stages of 1 to 1000 blocks, got [1, 0]",
        ),
        ("plan --projector-layers 5", "--projector-layers: expected 2 or 3, got 5"),
        ("plan --threads 0", "--threads: must be at least 1"),
        (
            "train x --run /nowhere/run --device cpu --dtype bf16",
            "--dtype bf16: the CPU does not train in it; hint: use --dtype f32",
        ),
        ("plan --device auto", "--device: expected cpu or cuda, got auto: a plan opens no device"),
        ("selftest --replay 3", "--replay: expected --device cuda or cuda-emulated, got the CPU"),
        ("selftest --lockstep", "--lockstep: expected --device cuda or cuda-emulated, got the CPU"),
        ("selftest --dtype bf16", "--dtype bf16: not computed on this device; hint: use one of f64, f32"),
        ("selftest --golden /nowhere", &format!("cannot list /nowhere: {missing}")),
        ("export /nowhere /nowhere/out", "/nowhere/out: there is no folder /nowhere"),
        ("inspect /nowhere.ssds", &format!("cannot open /nowhere.ssds: {missing}")),
    ] {
        assert_eq!(failure(args), expected, "{args}");
    }
    let message = failure("plan --preset cifar --batch 2 --dot /nowhere/x.dot");
    assert!(message.starts_with("cannot create a file in /nowhere: No such file"), "{message}");
    let empty = tempfile::tempdir().unwrap();
    let folder = empty.path().display();
    assert_eq!(
        failure(&format!("selftest --golden {folder}")),
        format!("{folder}: expected *.safetensors files, found none; hint: tools/golden.py writes them")
    );
    assert_eq!(
        failure(&format!("export {folder} {folder}/out")),
        format!("cannot read {folder}/config.toml: {missing}")
    );
    assert_eq!(fs::read_dir(empty.path()).unwrap().count(), 0, "a failed command leaves nothing behind");
}

#[test]
fn usage_errors_exit_with_2() {
    for args in
        ["", "fly", "plan --nonsense", "plan --arch resnet51", "plan --batch many", "plan --stop-gradient maybe"]
    {
        let output = run(args);
        assert_eq!(output.status.code(), Some(2), "{args}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args}");
    }
}

#[test]
fn version_tells_where_the_program_comes_from() {
    let text = stdout("--version");
    let labels: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(labels, ["simsiam-engine", "commit", "target", "CUDA"]);
    assert!(text.starts_with(&format!("simsiam-engine {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn global_options_go_anywhere() {
    let expected = stdout("plan --preset cifar --batch 2");
    assert_eq!(stdout("--threads 2 plan --preset cifar --batch 2"), expected);
    assert_eq!(stdout("plan --preset cifar --batch 2 -vv --threads 1"), expected);
    // prepare has --threads of its own.
    assert!(stdout("prepare --help").contains("Threads that decode"));
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_error() {
    for args in ["plan --preset cifar --batch 2 --json --top 1000", "selftest", "--help"] {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A run directory with one checkpoint of an untrained network, and the checkpoint's tensors.
fn run_folder(folder: &Path) -> NamedTensors {
    let backbone = ResNet { block: Block::Bottleneck, depths: vec![1, 2], width: 6, stem: Stem::Imagenet };
    let heads = Heads {
        dim: 16,
        projector_hidden: 12,
        predictor_hidden: 4,
        projector_layers: 2,
        projector_out_affine: false,
        projector_out_bias: OutBias::None,
        norm: HeadNorm::Default,
        predictor: PredictorKind::Mlp,
    };
    let model = SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true };
    let graph = model.train_graph(2, 32, DType::F32, false).unwrap();
    let mut exec = CpuExecutor::new(graph.tape, Tier::Direct).unwrap();
    write_initial(&mut exec, &graph.params, 5).unwrap();
    let mut tensors = read_params(&exec, &graph.params).unwrap();
    // As after training: running statistics and the last gamma of each block are no longer what they start as.
    for (name, tensor) in tensors.iter_mut().filter(|(name, t)| t.desc().dtype == DType::F32 && name.contains("bn")) {
        let shape = tensor.desc().shape.clone();
        let values: Vec<f32> = (0..shape.len()).map(|i| 0.5 + ((i * 7 + name.len()) % 11) as f32 / 16.0).collect();
        *tensor = HostTensor::from_f32(shape, &values).unwrap();
    }
    let config = RunConfig {
        data: "images.ssds".into(),
        seed: 5,
        shuffle_window: 0,
        init: None,
        recipe: Recipe {
            epochs: 3,
            batch: 2,
            base_lr: 0.05,
            warmup_epochs: 0,
            per_step: false,
            fix_predictor_lr: true,
            momentum: 0.9,
            weight_decay: 1e-4,
        },
        model,
        augment: AugmentConfig { image_size: 40, ..AugmentConfig::imagenet() },
        log: Logging { every: 1, rank_every: 1, checkpoint_epochs: 1, checkpoint_steps: 0, keep_last: 2 },
        knn: None,
        machine: Machine::default(),
    };
    config.write(folder).unwrap();
    fs::create_dir(folder.join("checkpoints")).unwrap();
    let state = serde_json::json!({ "step": 17, "dataset": "of no matter here" });
    checkpoint::save(&folder.join("checkpoints/step-00000017.safetensors"), &tensors, &state).unwrap();
    tensors
}

#[test]
fn export_writes_the_backbone_of_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = run_folder(folder.path());
    let (run_path, out) = (folder.path().display(), folder.path().join("backbone.safetensors"));
    let features = folder.path().join("features.safetensors");
    let args = format!("export {run_path} {} --features {}", out.display(), features.display());
    let text = stdout(&args);
    assert!(text.contains("custom after step 17") && text.contains("load_state_dict"), "{text}");

    let (backbone, metadata) = safetensors::read(&out).unwrap();
    let expected: NamedTensors = tensors
        .iter()
        .filter(|(name, _)| name.starts_with("encoder.") && !name.starts_with("encoder.fc."))
        .map(|(name, tensor)| (name["encoder.".len()..].to_string(), tensor.clone()))
        .collect();
    assert!(backbone.len() > 30 && backbone == expected);
    let facts = ["arch", "block", "depths", "width", "stem", "step", "image_size", "mean", "dataset"];
    let expected = ["custom", "bottleneck", "1,2", "6", "imagenet", "17", "40", "0.485,0.456,0.406", "images.ssds"];
    assert_eq!(facts.map(|key| metadata[key].as_str()), expected);

    let (stored, _) = safetensors::read(&features).unwrap();
    assert_eq!(stored["input"].desc().shape.dims(), [4, 40, 40, 3]);
    assert_eq!(stored["features"].desc().shape.dims(), [4, 6 * 2 * 4]);
    let rows = stored["features"].to_f32().unwrap();
    assert!(rows.iter().all(|v| v.is_finite()) && rows[..48] != rows[48..96], "each image has features of its own");

    let message = failure(&args);
    assert!(message.ends_with("backbone.safetensors: exists already; hint: --force replaces it"), "{message}");
    let first = fs::read(&out).unwrap();
    let checkpoint = folder.path().join("checkpoints/step-00000017.safetensors");
    stdout(&format!("export {} {} --force", checkpoint.display(), out.display()));
    assert_eq!(fs::read(&out).unwrap(), first, "the checkpoint file and its run are the same export");
}

#[test]
fn export_names_what_is_wrong_with_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = run_folder(folder.path());
    let (run_path, checkpoints) = (folder.path(), folder.path().join("checkpoints"));
    let args = format!("export {} {}/out.safetensors", run_path.display(), run_path.display());
    let checkpoint = checkpoints.join("step-00000017.safetensors");

    let mut other = tensors.clone();
    other.remove("encoder.layer2.1.conv3.weight");
    checkpoint::save(&checkpoint, &other, &serde_json::json!({ "step": 17 })).unwrap();
    let message = failure(&args);
    assert!(message.contains("tensor encoder.layer2.1.conv3.weight is missing"), "{message}");

    let mut bytes = fs::read(&checkpoint).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&checkpoint, bytes).unwrap();
    let output = run(&args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && stderr.contains("does not match its checksum"), "{stderr}");

    let elsewhere = run_path.join("elsewhere/deep");
    fs::create_dir_all(&elsewhere).unwrap();
    let moved = elsewhere.join("step-00000017.safetensors");
    checkpoint::save(&moved, &tensors, &serde_json::json!({ "step": 17 })).unwrap();
    let message = failure(&format!("export {} {}/out.safetensors", moved.display(), run_path.display()));
    assert!(message.contains("expected config.toml beside the checkpoint or one folder up, found none"), "{message}");

    fs::remove_dir_all(&checkpoints).unwrap();
    let message = failure(&args);
    assert!(message.contains("checkpoints: expected a checkpoint, found none; hint: train the run first"), "{message}");
    assert!(!run_path.join("out.safetensors").exists());
}
