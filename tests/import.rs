//! Weights of other programs: files that PyTorch wrote, the training that goes on from them, and what is refused.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{fail, succeed};
use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::error::Error;
use simsiam_engine::exec::{CpuExecutor, Executor};
use simsiam_engine::import::{self, Foreign, Format, Network};
use simsiam_engine::nn::resnet::{Arch, ResNet, Stem};
use simsiam_engine::nn::simsiam::TrainGraph;
use simsiam_engine::ops::sgd::StepParam;
use simsiam_engine::tensor::safetensors::{self, NamedTensors};
use simsiam_engine::tensor::{DType, HostTensor, TensorDesc};
use simsiam_engine::train::checkpoint::{self, Checkpoint};
use simsiam_engine::train::config::RunConfig;
use simsiam_engine::train::run::TrainState;
use simsiam_engine::train::state::{read_params, to_engine, write_params};

/// The options of `train` for the network in reference.pth.tar.
const NETWORK: &str = "--arch custom --block basic --depths 1,1 --width 4 --stem cifar --dim 24 --projector-hidden 8 \
                       --projector-layers 3 --predictor-hidden 6";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/import").join(name)
}

fn open(name: &str) -> Foreign {
    import::open(&fixture(name)).unwrap()
}

fn golden() -> (NamedTensors, BTreeMap<String, String>) {
    safetensors::read(&fixture("continuation.safetensors")).unwrap()
}

/// The tensors whose names begin with `prefix`, without it.
fn part(tensors: &NamedTensors, prefix: &str) -> NamedTensors {
    let named =
        tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_string(), tensor.clone())));
    named.collect()
}

#[test]
fn the_references_checkpoint_arrives_bit_for_bit() {
    let (golden, _) = golden();
    let foreign = open("reference.pth.tar");
    assert_eq!(
        (foreign.format, foreign.origin.epoch, foreign.arch.as_deref()),
        (Format::Torch, Some(3), Some("resnet_of_the_tests"))
    );
    let weights = import::fit(&foreign, None, false).unwrap();
    let report = &weights.report;
    assert!(report.fits() && report.missing.is_empty() && report.skipped.is_empty(), "{report:?}");
    assert_eq!(report.options, NETWORK);
    assert_eq!(report.prefix, "module.encoder.");
    let mut expected = part(&golden, "init/");
    assert_eq!(report.matched, expected.len());
    let momenta = part(&golden, "momentum/");
    assert_eq!(report.momenta, momenta.len());
    assert!(!momenta.contains_key("encoder.fc.6.bias") && expected.contains_key("encoder.fc.6.bias"), "a frozen bias");
    expected.extend(momenta.into_iter().map(|(name, tensor)| (format!("momentum/{name}"), tensor)));
    assert_eq!(weights.tensors, expected);
    let optimiser = report.optimiser.as_ref().unwrap();
    assert_eq!((&optimiser.lr[..], optimiser.momentum, optimiser.weight_decay), (&[0.05, 0.03][..], 0.9, 1e-4));
}

/// Both views of a step, from NCHW to NHWC.
fn views(golden: &NamedTensors, step: usize) -> Vec<f32> {
    let mut views = Vec::new();
    for view in [1, 2] {
        let tensor = &golden[&format!("view{view}/{step}")];
        let [_, c, h, w] = tensor.desc().shape.dims().try_into().unwrap();
        for image in tensor.to_f32().unwrap().chunks_exact(c * h * w) {
            views.extend((0..h * w).flat_map(|pixel| (0..c).map(move |channel| image[channel * h * w + pixel])));
        }
    }
    views
}

/// How far the steps after the checkpoint are from PyTorch's, as a multiple of the tolerance: losses and last tensors.
fn continued(weights: &NamedTensors, network: &Network) -> (f64, f64) {
    let (golden, metadata) = golden();
    let number = |key: &str| metadata[key].parse::<f64>().unwrap();
    let (steps, batch, size) = (number("steps") as usize, number("batch") as usize, number("image_size") as usize);
    let TrainGraph { tape, views: input, step_params, loss, params, momenta, .. } =
        network.model().train_graph(batch, size, DType::F32, false).unwrap();
    let mut exec = CpuExecutor::new(tape, Tier::Direct).unwrap();
    let find = |name: &str, _: &TensorDesc| Ok::<_, Error>(weights[name].clone());
    write_params(&mut exec, &params, find).unwrap();
    for (name, value) in &momenta {
        let momentum = to_engine(weights[&format!("momentum/{name}")].clone()).unwrap();
        exec.write(*value, momentum.bytes()).unwrap();
    }
    let mut hyper = [0.0; StepParam::COUNT];
    for (param, key) in [
        (StepParam::Lr, "lr"),
        (StepParam::PredictorLr, "predictor_lr"),
        (StepParam::Momentum, "momentum"),
        (StepParam::WeightDecay, "weight_decay"),
    ] {
        hyper[param as usize] = number(key);
    }
    exec.write(step_params, bytemuck::cast_slice(&hyper)).unwrap();
    let (expected, own) = (golden["loss"].to_f64(), golden["err32/loss"].to_f64());
    let (mut worst_loss, mut worst_tensor, mut own_max): (f64, f64, f64) = (0.0, 0.0, 0.0);
    for step in 0..steps {
        exec.write(input, bytemuck::cast_slice(&views(&golden, step))).unwrap();
        exec.run_step().unwrap();
        own_max = own_max.max(own[step]);
        let tolerance = 3.0 * own_max + 2e-6 + 1e-5 * step as f64;
        worst_loss = worst_loss.max((exec.read(loss).unwrap().to_f64()[0] - expected[step]).abs() / tolerance);
    }
    for (name, tensor) in read_params(&exec, &params).unwrap() {
        let (expected, init) = (golden[&format!("final/{name}")].to_f64(), golden[&format!("init/{name}")].to_f64());
        let own = golden.get(&format!("err32/final/{name}")).map_or(0.0, |own| own.to_f64()[0]);
        let size = distance(&expected, &vec![0.0; expected.len()]);
        let rounding = 1e-6 * size + 1e-6 * (expected.len() as f64).sqrt();
        let tolerance = 3.0 * own + 1e-2 * distance(&expected, &init) + rounding;
        worst_tensor = worst_tensor.max(distance(&tensor.to_f64(), &expected) / tolerance);
    }
    (worst_loss, worst_tensor)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn training_goes_on_as_pytorchs_does_and_not_without_the_momenta() {
    let import::Weights { mut tensors, network, .. } = import::fit(&open("reference.pth.tar"), None, false).unwrap();
    let (losses, last) = continued(&tensors, &network);
    println!("losses {losses:.3}, tensors {last:.3} of the tolerance");
    assert!(losses <= 1.0 && last <= 1.0, "losses {losses}, tensors {last}");
    for (name, tensor) in &mut tensors {
        if name.starts_with("momentum/") {
            *tensor = HostTensor::from_bytes(tensor.desc().clone(), vec![0; tensor.bytes().len()]).unwrap();
        }
    }
    let (losses, last) = continued(&tensors, &network);
    assert!(losses > 3.0 && last > 3.0, "without momenta: losses {losses}, tensors {last}");
}

#[test]
fn legacy_files_and_every_element_type_give_pytorchs_values() {
    let (values, _) = safetensors::read(&fixture("values.safetensors")).unwrap();
    for (file, prefix, format, skipped) in
        [("classifier-legacy.pth", "classifier/", Format::TorchLegacy, 2), ("moco.pth", "moco/", Format::Torch, 6)]
    {
        let foreign = open(file);
        let weights = import::fit(&foreign, None, false).unwrap();
        assert_eq!(foreign.format, format);
        assert!(weights.report.fits() && weights.report.missing.is_empty(), "{:?}", weights.report);
        assert_eq!(weights.report.skipped.len(), skipped, "{:?}", weights.report.skipped);
        assert!(weights.network.heads.is_none() && weights.report.momenta == 0);
        assert_eq!(part(&weights.tensors, "encoder."), part(&values, prefix), "{file}");
    }
}

/// A safetensors file with the tensors of a list of torchvision's, `fc` added.
fn torchvision(arch: &str, folder: &Path) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/torchvision-names/{arch}.txt"));
    let text = fs::read_to_string(path).unwrap() + "fc.weight [1000, 512]\nfc.bias [1000]\n";
    let mut tensors = NamedTensors::new();
    for (i, line) in text.lines().filter(|line| !line.starts_with('#')).enumerate() {
        let (name, shape) = line.split_once(' ').unwrap();
        let shape: Vec<usize> = serde_json::from_str(shape).unwrap();
        let dtype = if name.ends_with("num_batches_tracked") { DType::I64 } else { DType::F32 };
        let desc = TensorDesc::new(&shape[..], dtype);
        let values: Vec<f64> = (0..desc.shape.len()).map(|k| ((k * 7 + i) % 31) as f64).collect();
        tensors.insert(name.into(), HostTensor::from_bytes(desc, dtype.encode(&values)).unwrap());
    }
    let path = folder.join(format!("{arch}.safetensors"));
    safetensors::write(&path, &tensors, &BTreeMap::new()).unwrap();
    path
}

#[test]
fn torchvisions_resnet18_matches_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = torchvision("resnet18", folder.path());
    let foreign = import::open(&path).unwrap();
    let import::Weights { tensors, report, network } = import::fit(&foreign, None, false).unwrap();
    assert_eq!(network, Network { backbone: ResNet::named(Arch::Resnet18, Stem::Imagenet).unwrap(), heads: None });
    assert!(report.fits() && report.missing.is_empty() && report.missing_counters == 0, "{report:?}");
    // 20 batch norms have two running statistics of as many values as they have channels: 4,800 each.
    assert_eq!((report.matched, report.values), (120, 11_176_512 + 2 * 4_800));
    let skipped: Vec<&str> = report.skipped.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(skipped, ["fc.bias", "fc.weight"]);
    let stored = safetensors::read(&path).unwrap().0;
    assert_eq!(tensors["encoder.layer3.1.conv2.weight"], stored["layer3.1.conv2.weight"]);

    let file = path.to_str().unwrap();
    let text = succeed(&["import", file, "--arch", "resnet18"]);
    assert!(text.contains("matched      120 tensors") && text.contains("unexpected   0"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&succeed(&["import", file, "--json"])).unwrap();
    assert_eq!(
        (json["matched"].as_u64(), json["options"].as_str()),
        (Some(120), Some("--arch resnet18 --stem imagenet"))
    );
    let error = fail(&["import", file, "--arch", "resnet34"]);
    assert!(
        error.contains("does not fit resnet34, imagenet stem; no heads: 80 missing (encoder.layer1.2.conv1.weight,"),
        "{error}"
    );
    assert!(error.contains("--arch resnet18 --stem imagenet"), "{error}");
}

#[test]
fn wrong_shapes_and_foreign_layers_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = torchvision("resnet18", folder.path());
    let (mut tensors, _) = safetensors::read(&path).unwrap();
    let moved = tensors.remove("layer4.1.bn2.bias").unwrap();
    tensors.insert("layer4.1.se.bias".into(), moved);
    tensors.insert("layer2.0.bn1.weight".into(), HostTensor::from_f32([64], &[1.0; 64]).unwrap());
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    safetensors::write(&path, &tensors, &BTreeMap::new()).unwrap();
    let report = import::fit(&import::open(&path).unwrap(), None, false).unwrap().report;
    assert!(!report.fits() && report.missing_counters == 20);
    assert_eq!(
        (&report.missing[..], &report.unexpected[..]),
        (&["encoder.layer4.1.bn2.bias".into()][..], &["layer4.1.se.bias".into()][..])
    );
    let wrong = &report.wrong_shape[0];
    assert_eq!(
        (wrong.name.as_str(), &wrong.expected[..], &wrong.got[..]),
        ("layer2.0.bn1.weight", &[128][..], &[64][..])
    );
    let error = fail(&["import", path.to_str().unwrap(), "--out", folder.path().join("x").to_str().unwrap()]);
    assert!(
        error.contains("1 missing (encoder.layer4.1.bn2.bias), 1 unexpected (layer4.1.se.bias), 1 of another shape"),
        "{error}"
    );
    assert!(!folder.path().join("x").exists());
    // A diverged training.
    tensors.insert("conv1.weight".into(), HostTensor::from_f32([64, 3, 7, 7], &[f32::NAN; 64 * 147]).unwrap());
    safetensors::write(&path, &tensors, &BTreeMap::new()).unwrap();
    assert!(fail(&["import", path.to_str().unwrap()]).contains("conv1.weight is not finite"));
}

struct Trained {
    folder: tempfile::TempDir,
    data: PathBuf,
}

impl Trained {
    fn new() -> Trained {
        let folder = tempfile::tempdir().unwrap();
        let data = common::fashion(folder.path(), "train", 64);
        Trained { folder, data }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().into()
    }

    /// The arguments of a run on 64 images in batches of 16: 4 steps an epoch.
    fn args(&self, run: &str, more: &str) -> Vec<String> {
        let size = if more.contains("--image-size") { "" } else { "--image-size 10" };
        let (data, run) = (self.data.display(), self.path(run));
        let args = format!("train {data} --run {run} --preset cifar {size} --batch 16 --device cpu {more}");
        args.split_whitespace().map(String::from).collect()
    }

    fn run(&self, run: &str, more: &str) {
        let args = self.args(run, more);
        succeed(&args.iter().map(String::as_str).collect::<Vec<_>>());
    }

    fn fail(&self, run: &str, more: &str) -> String {
        let args = self.args(run, more);
        let error = fail(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(!self.folder.path().join(run).exists(), "{error}");
        error
    }

    fn checkpoint(&self, run: &str, step: u64) -> Checkpoint<TrainState> {
        checkpoint::load(&self.folder.path().join(run).join(format!("checkpoints/step-{step:08}.safetensors"))).unwrap()
    }
}

#[test]
fn a_run_goes_on_from_the_references_checkpoint() {
    let bench = Trained::new();
    let file = fixture("reference.pth.tar");
    let options = format!("--init {} --continue --epochs 4 --keep-last 9 {NETWORK}", file.display());
    bench.run("direct", &options);
    let first = bench.checkpoint("direct", 12);
    assert_eq!(first.state.step, 12, "three epochs of four steps");
    let expected = import::fit(&open("reference.pth.tar"), None, false).unwrap().tensors;
    assert_eq!(first.tensors(), &expected);
    let last = bench.checkpoint("direct", 16);
    assert_ne!(last.tensors()["encoder.conv1.weight"], expected["encoder.conv1.weight"]);
    assert_eq!(last.tensors()["encoder.fc.6.bias"], expected["encoder.fc.6.bias"], "a frozen bias");
    let config = RunConfig::read(&bench.folder.path().join("direct")).unwrap();
    let from = config.init.unwrap();
    assert_eq!((from.continued_after, from.backbone_only, from.file), (Some(3), false, file.canonicalize().unwrap()));
    assert_eq!(from.blake3, blake3::hash(&fs::read(&file).unwrap()).to_string());

    // By way of a checkpoint of ours it is the same training.
    let converted = bench.path("converted.safetensors");
    let text = succeed(&["import", file.to_str().unwrap(), "--out", &converted]);
    assert!(text.contains("epochs done  3") && text.contains("or --continue it"), "{text}");
    bench.run("converted", &format!("--init {converted} --continue --epochs 4 --keep-last 9 {NETWORK}"));
    assert_eq!(bench.checkpoint("converted", 16).tensors(), last.tensors());

    // Killed before its first own checkpoint, it goes on from the same weights.
    fs::remove_file(bench.path("direct/checkpoints/step-00000016.safetensors")).unwrap();
    succeed(&["train", "--resume", &bench.path("direct")]);
    assert_eq!(bench.checkpoint("direct", 16).tensors(), last.tensors());
    fs::remove_dir_all(bench.path("direct/checkpoints")).unwrap();
    assert!(fail(&["train", "--resume", &bench.path("direct")]).contains("there is no checkpoint left"));
}

#[test]
fn a_new_run_begins_with_weights_and_draws_what_is_not_there() {
    let bench = Trained::new();
    let reference = fixture("reference.pth.tar");
    bench.run("weights", &format!("--init {} --epochs 1 --keep-last 9 {NETWORK}", reference.display()));
    let expected = import::fit(&open("reference.pth.tar"), None, false).unwrap().tensors;
    let (_, start) = bench.checkpoint("weights", 0).into_parts();
    for (name, tensor) in &start {
        match name.starts_with("momentum/") {
            true => assert!(tensor.bytes().iter().all(|byte| *byte == 0), "{name}"),
            false => assert_eq!(tensor, &expected[name], "{name}"),
        }
    }

    let backbone = format!("--init {} --init-backbone --epochs 1 --keep-last 9 --seed 4", reference.display());
    bench.run("backbone", &format!("{backbone} {}", NETWORK.replace("--dim 24", "--dim 20")));
    let (_, start) = bench.checkpoint("backbone", 0).into_parts();
    assert_eq!(start["encoder.layer2.0.conv1.weight"], expected["encoder.layer2.0.conv1.weight"]);
    assert_eq!(start["encoder.fc.6.weight"].desc().shape.dims(), [20, 8]);
    let drawn = start["encoder.fc.0.weight"].to_f32().unwrap();
    assert!(drawn.iter().any(|v| *v != 0.0) && start["encoder.fc.0.weight"] != expected["encoder.fc.0.weight"]);

    // The last checkpoint of a run begins another one.
    bench.run("again", &format!("--init {} --epochs 1 --keep-last 9 {NETWORK}", bench.path("weights")));
    let (_, again) = bench.checkpoint("again", 0).into_parts();
    let (_, last) = bench.checkpoint("weights", 4).into_parts();
    assert_eq!(again["predictor.3.bias"], last["predictor.3.bias"]);
}

#[test]
fn what_cannot_begin_a_run_is_one_sentence_and_leaves_nothing() {
    let bench = Trained::new();
    let (reference, moco) = (fixture("reference.pth.tar"), fixture("moco.pth"));
    let (reference, moco) = (reference.display(), moco.display());
    let bottleneck = "--arch custom --block bottleneck --depths 1,1 --width 2 --stem imagenet --dim 24";
    for (options, expected) in [
        (format!("--init {reference} --epochs 1"), "does not fit resnet18, cifar stem; projector 512-512-2048"),
        (
            format!("--init {reference} --epochs 1 {}", NETWORK.replace("--dim 24", "--dim 20")),
            "or take only the backbone with --init-backbone",
        ),
        (
            format!("--init {reference} --continue --epochs 3 {NETWORK}"),
            "--epochs: expected more than the 3 epochs that --init has behind it, got 3",
        ),
        (format!("--init {moco} --continue --epochs 9 {bottleneck}"), "--continue: "),
        ("--init /nonexistent/x.pth".into(), "cannot read /nonexistent/x.pth"),
    ] {
        let error = bench.fail("run", &options);
        assert!(error.contains(expected), "{options}: {error}");
    }
    assert!(bench.fail("run", &format!("--init {moco} --continue --epochs 9 {bottleneck}")).contains("has no momenta"));
    bench.run("heads", &format!("--init {moco} --epochs 1 {bottleneck}"));
    bench.run("own", &format!("--epochs 1 {NETWORK}"));
    let own = bench.path("own");
    assert!(
        bench
            .fail("run", &format!("--init {own} --continue {NETWORK}"))
            .contains("belongs to a run; hint: continue that with --resume")
    );
}

/// Whatever takes a run takes an imported checkpoint.
#[test]
fn an_imported_checkpoint_stands_for_a_run() {
    let bench = Trained::new();
    let (values, _) = safetensors::read(&fixture("values.safetensors")).unwrap();
    let (file, imported) = (fixture("classifier-legacy.pth"), bench.path("imported.safetensors"));
    let images = ["--image-size", "20", "--mean", "0.3,0.4,0.5", "--std", "0.2,0.25,0.125"];
    succeed(&[&["import", file.to_str().unwrap(), "--out", &imported], &images[..]].concat());
    // Out again, the tensors are PyTorch's.
    let exported = bench.path("exported.safetensors");
    let said = succeed(&["export", &imported, &exported]);
    assert!(said.contains("custom from classifier-legacy.pth, "), "{said}");
    let (tensors, metadata) = safetensors::read(Path::new(&exported)).unwrap();
    assert_eq!(tensors, part(&values, "classifier/"));
    let digest = blake3::hash(&fs::read(&file).unwrap()).to_string();
    let fact = |name: &str| metadata.get(name).map(String::as_str);
    assert_eq!((fact("imported_from"), fact("blake3")), (Some("classifier-legacy.pth"), Some(digest.as_str())));
    assert_eq!((fact("mean"), fact("image_size"), fact("step")), (Some("0.3,0.4,0.5"), Some("20"), None));
    let card = fs::read_to_string(bench.path("exported.md")).unwrap();
    assert!(card.starts_with("# custom from classifier-legacy.pth\n") && !card.contains("[recipe]"), "{card}");
    assert!(
        fail(&["export", &imported, &bench.path("h.safetensors"), "--to", "safetensors", "--heads"])
            .contains("tensor encoder.fc.0.weight is missing")
    );

    // Features are those of a run that begins with it, to the bit.
    let options =
        "--arch custom --block bottleneck --depths 1,1 --width 2 --stem imagenet --dim 24 --epochs 1 --keep-last 9";
    bench.run("run", &format!("--init {imported} {options} {}", images.join(" ")));
    let data = bench.data.to_str().unwrap();
    let features = |source: &str, name: &str| {
        let out = bench.path(name);
        succeed(&["embed", source, data, "--out", &out, "--device", "cpu"]);
        safetensors::read(Path::new(&out)).unwrap().0["features"].clone()
    };
    let direct = features(&imported, "a.safetensors");
    assert_eq!(direct.desc().shape.dims(), [64, 16]);
    assert_eq!(direct, features(&bench.path("run/checkpoints/step-00000000.safetensors"), "b.safetensors"));

    let knn = ["eval", "knn", &imported, "--bank", data, "--queries", data, "--k", "5", "--device", "cpu", "--json"];
    let knn: serde_json::Value = serde_json::from_str(&succeed(&knn)).unwrap();
    assert_eq!(knn["network"]["step"], serde_json::Value::Null, "{knn}");
    let tuned = bench.path("tuned");
    let finetune = ["finetune", &imported, "--train", data, "--test", data, "--run", &tuned, "--epochs", "1"];
    succeed(&[&finetune[..], &["--from-layer", "fc", "--device", "cpu"]].concat());
    let (tuned, _) = safetensors::read(&bench.folder.path().join("tuned/finetuned/classifier.safetensors")).unwrap();
    assert_eq!(tuned["conv1.weight"], values["classifier/conv1.weight"]);
}

#[test]
fn counters_that_a_file_lacks_are_zero_in_the_checkpoint() {
    let bench = Trained::new();
    let (values, _) = safetensors::read(&fixture("values.safetensors")).unwrap();
    let mut tensors = part(&values, "classifier/");
    tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
    let file = bench.path("bare.safetensors");
    safetensors::write(Path::new(&file), &tensors, &BTreeMap::new()).unwrap();
    let (imported, exported) = (bench.path("imported.safetensors"), bench.path("exported.safetensors"));
    succeed(&["import", &file, "--out", &imported, "--image-size", "20"]);
    succeed(&["export", &imported, &exported]);
    let (whole, _) = safetensors::read(Path::new(&exported)).unwrap();
    assert!(tensors.iter().all(|(name, tensor)| whole[name] == *tensor));
    assert_eq!(whole["bn1.num_batches_tracked"].bytes(), [0; 8]);
    // A checkpoint that was taken from its run knows nothing of its network.
    checkpoint::save(Path::new(&imported), &whole, &serde_json::json!({ "step": 7 })).unwrap();
    assert!(fail(&["export", &imported, &bench.path("x")]).contains("make those of other files with import --out"));
}
