//! Exported files: what is in them, that a fault leaves none, and that other programs compute the same with them.
//!
//! With a Python that has torch, torchvision, timm, onnx and onnxruntime (`SIMSIAM_PYTHON`, else `python3`) the libraries
//! themselves load every format, detectron2 from a checkout in `SIMSIAM_DETECTRON2`; with `SIMSIAM_REQUIRE_PYTHON=1` the absence
//! of Python is a failure. Without, what they said once of the files in `tests/fixtures/export` still holds: the files are
//! compared byte by byte.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{fail, run, succeed};
use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::data::augment::AugmentConfig;
use simsiam_engine::export::{Format, detectron2, onnx, torch};
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Arch, Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::{EvalGraph, SimSiam};
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::safetensors::{self, NamedTensors};
use simsiam_engine::tensor::{DType, HostTensor, TensorDesc};
use simsiam_engine::train::checkpoint;
use simsiam_engine::train::config::{Logging, Machine, Recipe, RunConfig};
use simsiam_engine::train::metrics::{Line, MetricsWriter, Timing};

const STEPS: u64 = 17;

fn model(backbone: ResNet) -> SimSiam {
    let heads = Heads {
        dim: 6,
        projector_hidden: 7,
        predictor_hidden: 3,
        projector_layers: 3,
        projector_out_affine: false,
        projector_out_bias: OutBias::Frozen,
        norm: HeadNorm::Default,
        predictor: PredictorKind::Mlp,
    };
    SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true }
}

/// As in tools/export_fixtures.py.
fn tiny() -> SimSiam {
    model(ResNet { block: Block::Bottleneck, depths: vec![2, 1], width: 5, stem: Stem::Imagenet })
}

/// Weights as after training: nothing is what it starts as, and no two channels are alike. Exact on every machine.
fn weights(model: &SimSiam) -> NamedTensors {
    let EvalGraph { params, .. } = model.eval_graph(1, 64, DType::F32, true).unwrap();
    let tensor = |(i, param): (usize, &simsiam_engine::nn::ParamInfo)| {
        let shape = param.torch_shape();
        let mut stream = Stream::new(11, 1, i as u64);
        let (lo, hi) = match param.name.rsplit('.').next().unwrap() {
            "running_var" => (0.3, 2.0),
            "weight" if shape.rank() == 1 => (-0.4, 1.6),
            "weight" => {
                let bound = (3.0 / shape.dims()[1..].iter().product::<usize>() as f64).sqrt();
                (-bound, bound)
            }
            _ => (-0.5, 0.5),
        };
        let tensor = match param.desc.dtype {
            DType::I64 => HostTensor::from_bytes(param.desc.clone(), (STEPS as i64).to_le_bytes().to_vec()),
            _ => {
                let values: Vec<f32> = (0..shape.len()).map(|_| stream.uniform(lo, hi) as f32).collect();
                HostTensor::from_f32(shape, &values)
            }
        };
        (param.name.clone(), tensor.unwrap())
    };
    params.iter().enumerate().map(tensor).collect()
}

/// A run directory with one checkpoint of these weights, and metrics that go on after it.
fn run_folder(folder: &Path, model: &SimSiam, image_size: usize) -> NamedTensors {
    let config = RunConfig {
        init: None,
        data: "/secret/place/images.ssds".into(),
        seed: 5,
        shuffle_window: 0,
        recipe: Recipe {
            epochs: 3,
            batch: 2,
            base_lr: 0.0625,
            warmup_epochs: 0,
            per_step: false,
            fix_predictor_lr: true,
            momentum: 0.9,
            weight_decay: 1e-4,
        },
        model: model.clone(),
        augment: AugmentConfig { image_size, ..AugmentConfig::imagenet() },
        log: Logging { every: 1, rank_every: 1, checkpoint_epochs: 1, checkpoint_steps: 0, keep_last: 2 },
        knn: None,
        machine: Machine { cpu_conv: Tier::Direct, ..Machine::default() },
    };
    config.write(folder).unwrap();
    let mut metrics = MetricsWriter::create(&folder.join("metrics.jsonl")).unwrap();
    for step in 0..STEPS + 2 {
        let line = Line {
            step,
            epoch: 0,
            loss: -(step as f64) / 32.0,
            z_std: 0.875,
            effective_rank: None,
            lr: 0.1,
            predictor_lr: 0.1,
            knn: (step == 9).then_some(0.4375),
            timing: Timing::default(),
        };
        metrics.append(&line).unwrap();
    }
    let tensors = weights(model);
    let mut stored = tensors.clone();
    stored.insert("momentum/encoder.conv1.weight".into(), HostTensor::from_f32([1], &[1.0]).unwrap());
    fs::create_dir(folder.join("checkpoints")).unwrap();
    let state = serde_json::json!({ "step": STEPS, "dataset": "0f5a" });
    checkpoint::save(&folder.join("checkpoints/step-00000017.safetensors"), &stored, &state).unwrap();
    tensors
}

/// Exports the run in `folder` to `name` beside it; returns the file.
fn export(folder: &Path, name: &str, options: &[&str]) -> PathBuf {
    let out = folder.join(name);
    let mut args = vec!["export", folder.to_str().unwrap(), out.to_str().unwrap()];
    args.extend(options);
    succeed(&args);
    out
}

/// The tensors of the backbone under the names that `format` gives them.
fn backbone(tensors: &NamedTensors, format: Format) -> NamedTensors {
    let of_backbone = |name: &str| name.starts_with("encoder.") && !name.starts_with("encoder.fc.");
    let kept = tensors.iter().filter(|(name, _)| of_backbone(name));
    kept.map(|(name, tensor)| (format.rename(name), tensor.clone())).collect()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn every_format_holds_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let tensors = run_folder(folder, &tiny(), 37);
    let plain = backbone(&tensors, Format::Torchvision);
    assert_eq!(plain.len(), 6 + (18 + 6) + 18 + (18 + 6), "conv and batch norm have 6 tensors");

    let file = fs::read(export(folder, "a.pth.tar", &[])).unwrap();
    assert_eq!(torch::read(Path::new("x.pth"), file).unwrap(), plain);
    let (read, metadata) = safetensors::read(&export(folder, "b.safetensors", &[])).unwrap();
    assert_eq!((read, metadata["loss"].as_str()), (plain, "-0.5000"));
    let (read, _) = safetensors::read(&export(folder, "c.safetensors", &["--to", "safetensors"])).unwrap();
    assert_eq!(read, backbone(&tensors, Format::Safetensors));
    let (read, metadata) =
        safetensors::read(&export(folder, "d.safetensors", &["--to", "safetensors", "--heads"])).unwrap();
    assert_eq!(read, tensors, "all but the momentum");
    assert_eq!((metadata["dim"].as_str(), metadata["knn_top1"].as_str()), ("6", "0.4375 at step 9"));
    let file = fs::read(export(folder, "e.pkl", &["--to", "detectron2"])).unwrap();
    assert_eq!(detectron2::read(Path::new("x.pkl"), &file).unwrap(), backbone(&tensors, Format::Detectron2));

    let outputs = folder.join("outputs.safetensors");
    let options = ["--to", "onnx", "--heads", "--features", outputs.to_str().unwrap()];
    let path = export(folder, "f.onnx", &options);
    let (mut expected, _) = safetensors::read(&outputs).unwrap();
    let images = expected.remove("input").unwrap();
    assert_eq!(expected.keys().collect::<Vec<_>>(), ["features", "prediction", "projection"]);
    let found = onnx::run(&path, &fs::read(&path).unwrap(), &images, Tier::Direct).unwrap();
    assert!(largest_difference(&expected, &found) < 1e-5);
}

/// Relative to the largest value of each output.
fn largest_difference(expected: &NamedTensors, found: &NamedTensors) -> f64 {
    assert!(expected.keys().eq(found.keys()));
    let differences = expected.iter().map(|(name, expected)| {
        assert_eq!(expected.desc(), found[name].desc(), "{name}");
        let (expected, found) = (expected.to_f64(), found[name].to_f64());
        let scale = expected.iter().fold(0f64, |scale, value| scale.max(value.abs()));
        assert!(scale > 0.05, "{name} is nothing to compare with: {scale}");
        expected.iter().zip(found).fold(0f64, |most, (a, b)| most.max((a - b).abs() / scale))
    });
    differences.fold(0.0, f64::max)
}

#[test]
fn detectron2_gets_its_own_names() {
    for (arch, file) in [(Arch::Resnet18, "resnet18"), (Arch::Resnet50, "resnet50"), (Arch::Resnet101, "resnet101")] {
        let model = model(ResNet::named(arch, Stem::Imagenet).unwrap());
        let EvalGraph { params, .. } = model.eval_graph(1, 32, DType::F32, false).unwrap();
        let mut names: Vec<String> = params
            .iter()
            .map(|param| format!("{} {}", Format::Detectron2.rename(&param.name), param.torch_shape()))
            .collect();
        names.sort();
        let mut expected: Vec<String> = fs::read_to_string(fixture(&format!("detectron2-names/{file}.txt")))
            .unwrap()
            .lines()
            .map(String::from)
            .collect();
        expected.sort();
        assert_eq!(names, expected, "{file}");
    }
}

/// The files that the libraries were seen to load are those that are written today, and the engine's reader of ONNX computes
/// what onnxruntime did.
#[test]
fn fixtures_that_other_programs_have_read() {
    let tensors = weights(&tiny());
    let graph = tiny().eval_graph(1, 37, DType::F32, true).unwrap();
    let mut files = BTreeMap::from([
        ("tiny.onnx", onnx::encode(&graph, &tensors, &BTreeMap::from([("arch".into(), "custom".into())])).unwrap()),
        ("tiny.pth", Vec::new()),
        ("tiny.pkl", Vec::new()),
    ]);
    torch::write(&backbone(&tensors, Format::Torchvision), files.get_mut("tiny.pth").unwrap()).unwrap();
    detectron2::write(&backbone(&tensors, Format::Detectron2), files.get_mut("tiny.pkl").unwrap()).unwrap();
    for (name, file) in &files {
        let path = fixture("export").join(name);
        if std::env::var("SIMSIAM_WRITE_FIXTURES").is_ok_and(|value| value == "1") {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, file).unwrap();
        }
        assert!(fs::read(&path).unwrap() == *file, "{name} is no longer what other programs were seen to read");
    }
    let (mut expected, _) = safetensors::read(&fixture("export/outputs.safetensors")).unwrap();
    let images = expected.remove("input").unwrap();
    let by_torch = expected.remove("torch_features").unwrap();
    let found = onnx::run(Path::new("tiny.onnx"), &files["tiny.onnx"], &images, Tier::Direct).unwrap();
    assert!(largest_difference(&expected, &found) < 1e-5, "{}", largest_difference(&expected, &found));
    let narrow: Vec<f32> = by_torch.to_f64().iter().map(|&value| value as f32).collect();
    let by_torch = HostTensor::from_f32(by_torch.desc().shape.clone(), &narrow).unwrap();
    let features = |tensor: &HostTensor| NamedTensors::from([("features".to_string(), tensor.clone())]);
    assert!(largest_difference(&features(&by_torch), &features(&found["features"])) < 1e-5);
}

#[test]
fn damaged_onnx_files_are_errors() {
    let graph = tiny().eval_graph(1, 37, DType::F32, false).unwrap();
    let file = onnx::encode(&graph, &weights(&tiny()), &BTreeMap::new()).unwrap();
    let images = |size: usize| {
        let desc = TensorDesc::new([1, size, size, 3], DType::F32);
        HostTensor::from_bytes(desc.clone(), vec![0; desc.bytes()]).unwrap()
    };
    let run = |file: &[u8], size| onnx::run(Path::new("x.onnx"), file, &images(size), Tier::Direct);
    assert!(run(&file, 37).is_ok());
    assert!(run(&file, 38).unwrap_err().to_string().starts_with("x.onnx: input images: expected images of float32"));
    for cut in (0..file.len()).step_by(509) {
        assert!(run(&file[..cut], 37).is_err(), "cut at {cut}");
    }
    let conv = file.windows(4).position(|window| window == b"Conv").unwrap();
    let mut other = file.clone();
    other[conv..conv + 4].copy_from_slice(b"Cone");
    assert!(run(&other, 37).unwrap_err().to_string().contains("node encoder.conv1: an operator Cone of 2 inputs"));
}

#[test]
fn the_card_tells_what_the_weights_are() {
    let folder = tempfile::tempdir().unwrap();
    let named = ResNet { width: 64, depths: vec![1, 1, 1, 1], block: Block::Basic, stem: Stem::Imagenet };
    run_folder(folder.path(), &model(named), 37);
    export(folder.path(), "weights.v1.pkl", &["--to", "detectron2"]);
    let card = fs::read_to_string(folder.path().join("weights.v1.md")).unwrap();
    for part in [
        "# custom after 17 steps of SimSiam\n",
        "PIXEL_MEAN: [123.675, 116.280, 103.530]",
        "PIXEL_STD: [58.395, 57.120, 57.375]",
        "FORMAT: \"RGB\"",
        "RES2_OUT_CHANNELS: 64",
        "| dataset | images.ssds |",
        "| dataset_id | 0f5a |",
        "| loss | -0.5000 |",
        "| knn_top1 | 0.4375 at step 9 |",
        "base_lr = 0.0625",
        "The licence of the weights is yours to choose",
    ] {
        assert!(card.contains(part), "no {part:?} in {card}");
    }
    assert!(!card.contains("secret"), "where the data lies is nobody's business: {card}");

    fs::remove_file(folder.path().join("metrics.jsonl")).unwrap();
    export(folder.path(), "weights.v1.pth", &["--force"]);
    let card = fs::read_to_string(folder.path().join("weights.v1.md")).unwrap();
    assert!(
        card.contains("metrics were not found") && card.contains("torch.load(\"weights.v1.pth\", weights_only=True)")
    );
    assert!(card.contains("torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])"), "{card}");
}

#[test]
fn faults_are_one_sentence_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("run");
    fs::create_dir(&source).unwrap();
    let small = ResNet { stem: Stem::Cifar, ..tiny().backbone };
    run_folder(&source, &model(small), 12);
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    let message = |name: &str, options: &[&str]| {
        let path = out.join(name);
        let mut args = vec!["export", source.to_str().unwrap(), path.to_str().unwrap()];
        args.extend(options);
        fail(&args)
    };
    let (onnx, to_detectron2) = (["--to", "onnx"], ["--to", "detectron2"]);
    for (name, options, expected) in [
        (
            "x.pth",
            &["--heads"][..],
            "--heads: projector and predictor have no place in a file for torchvision; hint: add --to",
        ),
        ("x.onnx", &[], "OUT: a file for --to torchvision ends in .safetensors, .pth, .pt or .pth.tar, got"),
        ("x.pth", &onnx, "OUT: a file for --to onnx ends in .onnx, got"),
        (
            "x.pkl",
            &to_detectron2,
            "detectron2's ResNets have a 7x7 stem, this one is for small images (--stem cifar); hint:",
        ),
        ("x.pth", &["--to", "timm"], "timm's ResNets have a 7x7 stem"),
        ("x.md", &[], "OUT: "),
        ("no/x.pth", &[], "there is no folder"),
        ("", &[], "is a folder; the output is one file"),
    ] {
        assert!(message(name, options).contains(expected), "{}", message(name, options));
    }
    let unknown = run(&["export", source.to_str().unwrap(), "x.pth", "--to", "tensorflow"]);
    let text = String::from_utf8(unknown.stderr).unwrap();
    assert!(
        unknown.status.code() == Some(2) && text.contains("possible values: torchvision, timm, safetensors"),
        "{text}"
    );
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "a failed export leaves nothing behind");

    fs::write(out.join("x.md"), "mine").unwrap();
    assert!(message("x.onnx", &onnx).contains("x.md: exists already; hint: --force replaces it"));
    let checkpoint = source.join("checkpoints/step-00000017.safetensors");
    let whole = fs::read(&checkpoint).unwrap();
    fs::write(&checkpoint, &whole[..whole.len() / 2]).unwrap();
    assert!(message("y.onnx", &onnx).contains("the file is cut"));
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(out.join("x.md")).unwrap(), "mine");
}

#[test]
fn a_network_that_is_not_finite_is_not_exported() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = run_folder(folder.path(), &tiny(), 37);
    let bias = tensors["encoder.layer2.0.bn3.bias"].desc().shape.clone();
    tensors.insert("encoder.layer2.0.bn3.bias".into(), HostTensor::from_f32(bias, &[f32::NAN; 40]).unwrap());
    let checkpoint = folder.path().join("checkpoints/step-00000018.safetensors");
    checkpoint::save(&checkpoint, &tensors, &serde_json::json!({ "step": 18 })).unwrap();
    let out = folder.path().join("x.onnx");
    let error = fail(&["export", folder.path().to_str().unwrap(), out.to_str().unwrap(), "--to", "onnx"]);
    assert!(error.contains("step-00000018.safetensors: tensor encoder.layer2.0.bn3.bias is not finite"), "{error}");
    assert!(!out.exists());
}

/// A Python that has what tools/check_export.py needs.
fn python() -> Option<String> {
    let python = std::env::var("SIMSIAM_PYTHON").unwrap_or_else(|_| "python3".into());
    let packages = "import onnx, onnxruntime, safetensors, timm, torch, torchvision";
    let found = Command::new(&python).args(["-c", packages]).output();
    if found.as_ref().is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    let why = format!("{python} cannot {packages}; hint: name one that can in SIMSIAM_PYTHON");
    assert!(!std::env::var("SIMSIAM_REQUIRE_PYTHON").is_ok_and(|value| value == "1"), "{why}");
    println!("skipped: {why}");
    None
}

/// Exports a network and has tools/check_export.py load it and compute the same.
fn check_with(python: &str, arch: Arch, image_size: usize, files: &[(&str, &[&str])]) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run_folder(folder, &model(ResNet::named(arch, Stem::Imagenet).unwrap()), image_size);
    for (name, options) in files {
        let outputs = folder.join(format!("{name}.outputs"));
        let options = [options, &["--features", outputs.to_str().unwrap()][..]].concat();
        let file = export(folder, name, &options);
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/check_export.py");
        let mut check = Command::new(python);
        check
            .arg(tool)
            .arg(&file)
            .args(["--arch", &arch.to_string(), options[0], options[1], "--features"])
            .arg(&outputs);
        if let (Ok(checkout), "detectron2") = (std::env::var("SIMSIAM_DETECTRON2"), options[1]) {
            check.args(["--detectron2", &checkout]);
        }
        let output = check.output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}: {told}{}", String::from_utf8_lossy(&output.stderr));
        println!("{told}");
    }
}

#[test]
fn other_programs_load_every_format_and_compute_the_same() {
    let Some(python) = python() else { return };
    let files: [(&str, &[&str]); 8] = [
        ("a.pth", &["--to", "torchvision"]),
        ("b.safetensors", &["--to", "torchvision"]),
        ("c.safetensors", &["--to", "timm"]),
        ("d.pth.tar", &["--to", "timm"]),
        ("e.safetensors", &["--to", "safetensors", "--heads"]),
        ("f.pkl", &["--to", "detectron2"]),
        ("g.onnx", &["--to", "onnx"]),
        ("h.onnx", &["--to", "onnx", "--heads"]),
    ];
    check_with(&python, Arch::Resnet18, 53, &files);
}

#[test]
fn other_programs_load_a_resnet50() {
    let Some(python) = python() else { return };
    let files: [(&str, &[&str]); 5] = [
        ("a.pth", &["--to", "torchvision"]),
        ("b.safetensors", &["--to", "timm"]),
        ("c.safetensors", &["--to", "safetensors"]),
        ("d.pkl", &["--to", "detectron2"]),
        ("e.onnx", &["--to", "onnx", "--heads"]),
    ];
    check_with(&python, Arch::Resnet50, 96, &files);
}
