//! Fine-tuning: a step against PyTorch, and whole runs of the binary.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use image::{Rgb, RgbImage};
use serde_json::Value;
use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::data::augment::AugmentConfig;
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::exec::{CpuExecutor, Device, Executor, Options};
use simsiam_engine::nn::classifier::{Classifier, ClassifierGraph};
use simsiam_engine::nn::resnet::{Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::{StepShape, ViewSource};
use simsiam_engine::ops::sgd::StepParam;
use simsiam_engine::tensor::safetensors::{self, NamedTensors};
use simsiam_engine::tensor::{DType, HostTensor};
use simsiam_engine::train::epilogues::EpilogueChoice;
use simsiam_engine::train::memory::MemoryChoice;
use simsiam_engine::train::state::{to_engine, to_torch};
use simsiam_engine::train::subset::{Fraction, Subset};
use simsiam_engine::train::supervised::{Place, Supervised};

const CLASSES: usize = 7;
const BATCH: usize = 6;
const SIZE: usize = 9;

/// A tensor of the golden as float64, which counters are not.
fn wide(tensor: &HostTensor) -> HostTensor {
    match tensor.desc().dtype {
        DType::I64 => tensor.clone(),
        _ => {
            let desc = simsiam_engine::tensor::TensorDesc { dtype: DType::F64, ..tensor.desc().clone() };
            HostTensor::from_bytes(desc, DType::F64.encode(&tensor.to_f64())).unwrap()
        }
    }
}

fn assert_close(what: &str, got: &HostTensor, expected: &HostTensor) {
    assert_eq!(got.desc().shape, expected.desc().shape, "{what}");
    let (got, expected) = (got.to_f64(), expected.to_f64());
    let scale = expected.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
    for (i, (a, b)) in got.iter().zip(&expected).enumerate() {
        assert!((a - b).abs() <= 1e-10 * scale, "{what}, element {i}: expected {b}, got {a}");
    }
}

#[test]
fn a_step_is_pytorchs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/finetune.safetensors");
    let (golden, metadata) = safetensors::read(&path).unwrap();
    let number = |name: &str| metadata[name].parse::<f64>().unwrap();
    let backbone = ResNet { block: Block::Basic, depths: vec![1, 1], width: 3, stem: Stem::Cifar };
    assert_eq!(Classifier::layers(&backbone), ["conv1", "layer1", "layer2", "fc"]);
    for (case, frozen, trained) in [("whole", 0, 20), ("layer2", 2, 11)] {
        let model = Classifier { backbone: backbone.clone(), classes: CLASSES, frozen };
        let source = ViewSource::Given { padded: false };
        let shape = StepShape { keep_gradients: true, ..StepShape::new(BATCH, SIZE, DType::F64, source) };
        let graph = model.record_step(&shape).unwrap();
        let ClassifierGraph { tape, views, labels, step_params, loss, correct, params, gradients, .. } = graph;
        assert_eq!(gradients.len(), trained, "{case}");
        let mut exec = CpuExecutor::poisoned(tape, Tier::Direct).unwrap();
        for param in &params {
            let tensor = to_engine(wide(&golden[&format!("init/{}", param.name)])).unwrap();
            exec.write(param.value, tensor.bytes()).unwrap();
        }
        for param in &params {
            if !param.trainable {
                continue;
            }
            let (_, momentum) = graph.momenta.iter().find(|(name, _)| *name == param.name).unwrap();
            exec.write(*momentum, &vec![0; param.desc.bytes()]).unwrap();
        }
        let nhwc = to_engine(wide(&golden["images"])).unwrap(); // the same reordering as of convolution weights
        exec.write(views, nhwc.bytes()).unwrap();
        exec.write(labels, golden["labels"].bytes()).unwrap();
        let mut rates = [0.0; StepParam::COUNT];
        rates[StepParam::Lr as usize] = number("lr");
        rates[StepParam::PredictorLr as usize] = number("head_lr");
        rates[StepParam::Momentum as usize] = number("momentum");
        rates[StepParam::WeightDecay as usize] = number("weight_decay");
        exec.write(step_params, bytemuck::cast_slice(&rates)).unwrap();
        exec.run_step().unwrap();
        assert_eq!(exec.overrun().unwrap(), None);

        assert_close(&format!("{case}: loss"), &exec.read(loss).unwrap(), &golden[&format!("{case}/loss")]);
        assert_eq!(exec.read(correct).unwrap().bytes(), golden[&format!("{case}/correct")].bytes(), "{case}");
        for (name, gradient) in &gradients {
            let got = to_torch(exec.read(*gradient).unwrap()).unwrap();
            assert_close(&format!("{case}: d_{name}"), &got, &golden[&format!("{case}/grad/{name}")]);
        }
        for param in &params {
            let got = to_torch(exec.read(param.value).unwrap()).unwrap();
            let expected = &golden[&format!("{case}/final/{}", param.name)];
            assert_close(&format!("{case}: {} after the step", param.name), &got, expected);
        }
    }
}

/// A dataset of three classes that a colour tells apart, 14 pixels wide; `per_class` images each, with noise.
fn toy(folder: &Path, name: &str, per_class: usize, shuffle_seed: &str) -> PathBuf {
    let source = folder.join(format!("{name} images"));
    for (class, title) in ["amber", "blue", "cyan"].into_iter().enumerate() {
        std::fs::create_dir_all(source.join(title)).unwrap();
        for i in 0..per_class {
            let noise = |x: u32, y: u32, c: usize| {
                let mixed = (x * 31 + y * 57 + c as u32 * 101 + i as u32 * 977 + name.len() as u32 * 13)
                    .wrapping_mul(2_654_435_761);
                (mixed >> 26) as u8
            };
            let pixel = |x, y| Rgb(std::array::from_fn(|c| noise(x, y, c) + if c == class { 150 } else { 40 }));
            let image = RgbImage::from_fn(14, 12, pixel);
            image.save(source.join(title).join(format!("{i}.png"))).unwrap();
        }
    }
    let out = folder.join(format!("{name}.ssds"));
    let (source, file) = (source.to_str().unwrap(), out.to_str().unwrap());
    common::succeed(&["prepare", source, file, "--store", "raw", "--seed", shuffle_seed]);
    out
}

/// A pretraining of a few steps, and datasets to fine-tune on.
struct Bench {
    folder: tempfile::TempDir,
    train: PathBuf,
    test: PathBuf,
}

const PRETRAINING: &str = "--preset cifar --arch custom --block basic --depths 1,1 --width 6 --dim 24 --image-size 10 \
                           --batch 24 --epochs 1 --base-lr 0.2 --seed 3 --device cpu";
const RECIPE: &str = "--epochs 5 --batch 24 --lr 0.5 --head-lr 2 --baseline-lr 1 --crop-scale 0.5,1 --seed 7";

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let train = toy(folder.path(), "train", 40, "1");
        let test = toy(folder.path(), "test", 11, "1");
        let bench = Bench { folder, train, test };
        let run = bench.path("pretrained");
        let mut args = vec!["train", bench.train.to_str().unwrap(), "--run", run.to_str().unwrap()];
        args.extend(PRETRAINING.split_whitespace());
        common::succeed(&args);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn args(&self, name: &str, options: &str) -> Vec<String> {
        let path = |path: &Path| path.to_str().unwrap().to_string();
        let mut args: Vec<String> = ["finetune".into(), path(&self.path("pretrained"))].into();
        args.extend(["--run".into(), path(&self.path(name))]);
        args.extend(["--train".into(), path(&self.train), "--test".into(), path(&self.test)]);
        args.extend(RECIPE.split_whitespace().map(String::from));
        args.extend(["--device".into(), "cpu".into()]);
        // What is asked for takes the place of what is given already.
        let mut asked = options.split_whitespace().peekable();
        while let Some(option) = asked.next() {
            let value = asked.next_if(|next| !next.starts_with("--"));
            match (args.iter().position(|arg| arg == option), value) {
                (Some(at), Some(value)) => args[at + 1] = value.into(),
                _ => args.extend([option].into_iter().chain(value).map(String::from)),
            }
        }
        args
    }

    fn json(&self, name: &str, options: &str) -> Value {
        let args = self.args(name, &format!("--json {options}"));
        serde_json::from_str(&common::succeed(&args.iter().map(String::as_str).collect::<Vec<_>>())).unwrap()
    }

    fn error(&self, name: &str, options: &str) -> String {
        let args = self.args(name, options);
        common::fail(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn classifier(&self, name: &str) -> NamedTensors {
        safetensors::read(&self.path(name).join("finetuned/classifier.safetensors")).unwrap().0
    }

    /// The backbone that fine-tuning begins with.
    fn pretrained(&self) -> NamedTensors {
        let folder = self.path("pretrained/checkpoints");
        let newest = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).max().unwrap();
        safetensors::read(&newest).unwrap().0
    }
}

fn losses(result: &Value, arm: &str) -> Vec<f64> {
    let epochs = result[arm]["epochs"].as_array().unwrap();
    epochs.iter().flat_map(|e| [e["loss"].as_f64().unwrap(), e["test"]["loss"].as_f64().unwrap()]).collect()
}

#[test]
fn a_separable_set_is_learned_beside_a_network_from_scratch() {
    let bench = Bench::new();
    let result = bench.json("run", "--baseline");
    for arm in ["finetuned", "scratch"] {
        let last = &result[arm]["final"];
        assert!(last["top1"].as_f64().unwrap() > 0.95, "{arm}: {last}");
        assert_eq!(last["top5"].as_f64().unwrap(), 1.0, "three classes are all among the first five");
        let losses = losses(&result, arm);
        assert!(losses.len() == 10 && losses[8] < losses[0] / 2.0, "{arm}: {losses:?}");
        let lines = std::fs::read_to_string(bench.path("run").join(arm).join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 5, "{lines}");
    }
    assert_eq!(result["images_per_class"], serde_json::json!([40, 40, 40]));
    assert_ne!(losses(&result, "finetuned"), losses(&result, "scratch"));
    let tensors = bench.classifier("run");
    assert_eq!(tensors["fc.weight"].desc().shape.dims(), [3, 12]);
    assert!(tensors.contains_key("layer2.0.downsample.1.running_var") && !tensors.contains_key("labels"));
}

#[test]
fn frozen_layers_do_not_change_a_bit_and_the_others_do() {
    let bench = Bench::new();
    let pretrained = bench.pretrained();
    for (layer, frozen) in [("layer2", &["conv1.", "bn1.", "layer1."][..]), ("fc", &["conv1.", "bn1.", "layer"])] {
        bench.json(layer, &format!("--from-layer {layer} --epochs 2"));
        for (name, tensor) in bench.classifier(layer) {
            let Some(before) = pretrained.get(&format!("encoder.{name}")) else {
                assert!(name.starts_with("fc."), "{name}");
                continue;
            };
            let is_frozen = frozen.iter().any(|prefix| name.starts_with(prefix));
            assert_eq!(tensor == *before, is_frozen, "{name} with --from-layer {layer}");
        }
    }
}

#[test]
fn labels_are_balanced_nested_and_the_same_in_any_order() {
    let bench = Bench::new();
    let reordered = bench.path("reordered");
    std::fs::create_dir(&reordered).unwrap();
    let other = toy(&reordered, "train", 40, "99");
    /// What was chosen, by content: CRC and label.
    fn chosen(path: &Path, fraction: &str, seed: u64) -> Vec<(u32, u32)> {
        let dataset = Dataset::open(path).unwrap();
        let subset = Subset::choose(&dataset, fraction.parse::<Fraction>().unwrap(), seed).unwrap();
        let each = subset.records.iter().map(|&i| dataset.entry(i).unwrap()).map(|e| (e.crc, e.label().unwrap()));
        let mut all: Vec<_> = each.collect();
        all.sort_unstable();
        all
    }
    let crcs = |path: &Path| {
        let dataset = Dataset::open(path).unwrap();
        (0..dataset.len()).map(|i| dataset.entry(i).unwrap().crc).collect::<Vec<_>>()
    };
    assert_ne!(crcs(&bench.train), crcs(&other), "the records stand in another order");
    let mut before: Vec<(u32, u32)> = Vec::new();
    for (fraction, each) in [("1%", 1), ("10%", 4), ("50%", 20), ("100%", 40)] {
        let now = chosen(&bench.train, fraction, 5);
        assert_eq!(now, chosen(&other, fraction, 5), "{fraction}");
        for class in 0..3 {
            assert_eq!(now.iter().filter(|c| c.1 == class).count(), each, "{fraction} of class {class}");
        }
        assert!(before.iter().all(|c| now.contains(c)), "{fraction} does not hold what is smaller");
        before = now;
    }
    assert_ne!(chosen(&bench.train, "10%", 5), chosen(&bench.train, "10%", 6));
    let result = bench.json("few", "--labels 10%");
    assert_eq!((&result["images_per_class"], &result["batch"]), (&serde_json::json!([4, 4, 4]), &12.into()));
}

#[test]
fn a_killed_run_goes_on_after_its_last_whole_epoch_bit_for_bit() {
    let bench = Bench::new();
    let whole = bench.json("whole", "--epochs 6");
    let args = bench.args("killed", "--epochs 6 --json");
    let metrics = bench.path("killed/finetuned/metrics.jsonl");
    let mut child = common::engine().args(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(300);
    while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
        if std::fs::read_to_string(&metrics).unwrap_or_default().lines().count() >= 2 {
            break;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    let _ = child.kill();
    child.wait().unwrap();
    let resumed = common::succeed(&["finetune", "--resume", bench.path("killed").to_str().unwrap(), "--json"]);
    let resumed: Value = serde_json::from_str(&resumed).unwrap();
    assert_eq!(losses(&resumed, "finetuned"), losses(&whole, "finetuned"));
    assert!(bench.classifier("killed") == bench.classifier("whole"), "the networks differ");
}

/// What a fine-tuning step of the toy network takes on the CPU, in bytes.
fn planned(bench: &Bench, budget: &str, frozen: usize) -> Result<usize, String> {
    let backbone = ResNet { block: Block::Basic, depths: vec![1, 1], width: 6, stem: Stem::Cifar };
    let memory = MemoryChoice { budget: budget.parse().unwrap(), ..MemoryChoice::default() };
    let (device, options, epilogues) = (Device::Cpu(Tier::Direct), Options::default(), EpilogueChoice::default());
    let place = Place { device: &device, dtype: DType::F32, options, epilogues, memory };
    let model = Classifier { backbone, classes: 3, frozen };
    let augment = AugmentConfig { image_size: 10, ..AugmentConfig::imagenet() };
    let dataset = Dataset::open(&bench.train).unwrap();
    let trainer = Supervised::new(&model, &augment, &place, &dataset, 24).map_err(|error| error.to_string())?;
    Ok(trainer.planned_memory())
}

#[test]
fn a_memory_budget_is_kept_and_changes_no_bit() {
    let bench = Bench::new();
    let [free, least] = ["none", "min"].map(|budget| planned(&bench, budget, 0).unwrap());
    let between = (free + least) / 2;
    assert!(least < free && planned(&bench, &format!("{between}B"), 0).unwrap() <= between, "{least} {free}");
    let message = planned(&bench, &format!("{}B", least - 1), 0).unwrap_err();
    assert!(message.starts_with("--memory-budget: expected at least "), "{message}");
    assert!(message.ends_with("; hint: use a smaller --batch, or --from-layer"), "{message}");

    let free = bench.json("free", "--epochs 2 --baseline");
    let tight = bench.json("tight", "--epochs 2 --baseline --memory-budget min");
    assert_eq!(free["config"]["machine"].get("memory"), None);
    assert_eq!(tight["config"]["machine"]["memory"]["budget"], "min");
    for arm in ["finetuned", "scratch"] {
        assert_eq!(losses(&free, arm), losses(&tight, arm), "{arm}");
    }
    assert!(bench.classifier("free") == bench.classifier("tight"), "the networks differ");
    // The head alone takes less than the baseline beside it, which must be seen before the head is trained.
    let head = planned(&bench, "none", 3).unwrap();
    assert!(head < least, "{head} {least}");
    let options = format!("--epochs 1 --from-layer fc --memory-budget {head}B");
    bench.json("head", &options);
    let message = bench.error("both", &format!("{options} --baseline"));
    assert!(message.contains("--memory-budget: expected at least") && !bench.path("both").exists(), "{message}");
}

#[test]
fn a_memory_budget_can_be_taken_off_and_views_are_one() {
    let bench = Bench::new();
    let run = bench.json("run", "--epochs 2 --memory-budget min");
    let path = bench.path("run/finetune.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let resume = ["finetune", "--resume", bench.path("run").to_str().unwrap(), "--json"].map(String::from);
    let resume = resume.each_ref().map(String::as_str);
    std::fs::write(&path, config.replace("budget = \"min\"", "budget = \"1kB\"")).unwrap();
    assert!(common::fail(&resume).contains("--memory-budget: expected at least"));
    let again = common::succeed(&[&resume[..], &["--memory-budget", "none"]].concat());
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(losses(&again, "finetuned"), losses(&run, "finetuned"));
    std::fs::write(&path, config.replace("views = \"together\"", "views = \"sequential\"")).unwrap();
    assert!(common::fail(&resume).contains("views: expected together: fine-tuning has one view of each image"));
}

#[cfg(feature = "emulator")]
#[test]
fn the_emulated_device_learns_as_the_cpu_does() {
    let bench = Bench::new();
    let cpu = bench.json("cpu", "");
    for (dtype, tolerance) in [("f32", 2e-3), ("bf16", 0.1), ("fp16", 0.1)] {
        let device = bench.json(dtype, &format!("--device cuda-emulated --dtype {dtype}"));
        for (i, (a, b)) in losses(&cpu, "finetuned").iter().zip(losses(&device, "finetuned")).enumerate() {
            assert!((a - b).abs() < tolerance, "{dtype}, figure {i}: {a} and {b}");
        }
        assert!(device["finetuned"]["final"]["top1"].as_f64().unwrap() > 0.95, "{dtype}");
    }
    let eager = bench.json("eager", "--device cuda-emulated --dtype bf16 --no-graph --from-layer layer2");
    let graph = bench.json("graph", "--device cuda-emulated --dtype bf16 --from-layer layer2");
    let tight = bench.json("tight", "--device cuda-emulated --dtype bf16 --from-layer layer2 --memory-budget min");
    for other in [("eager", &eager), ("tight", &tight)] {
        assert_eq!(losses(other.1, "finetuned"), losses(&graph, "finetuned"), "{}", other.0);
        assert!(bench.classifier(other.0) == bench.classifier("graph"), "{}", other.0);
    }
}

#[test]
fn what_cannot_be_is_one_sentence_and_leaves_nothing() {
    let bench = Bench::new();
    let flat = bench.path("train images/amber");
    let unlabelled = bench.path("flat.ssds");
    common::succeed(&["prepare", flat.to_str().unwrap(), unlabelled.to_str().unwrap(), "--store", "raw"]);
    let two = bench.path("two.ssds");
    let source = bench.path("train images");
    let only =
        ["prepare", source.to_str().unwrap(), two.to_str().unwrap(), "--store", "raw", "--classes", "amber,blue"];
    common::succeed(&only);
    let cases = [
        (format!("--train {}", unlabelled.display()), "none of its 40 records has a label, and fine-tuning needs them"),
        (format!("--test {}", unlabelled.display()), "record 0 has no label, and accuracy needs one"),
        (format!("--test {}", two.display()), "its 2 classes are not the 3 of "),
        (
            "--from-layer layer3".into(),
            "--from-layer: the network has no layer \"layer3\"; hint: it has conv1, layer1, layer2, fc",
        ),
        ("--lr 0".into(), "--lr: expected a positive number, got 0"),
        ("--epochs 0".into(), "--epochs: expected at least 1, got 0"),
        ("--head-lr 1e38 --lr 1e38".into(), "the loss is not finite"),
    ];
    for (i, (options, expected)) in cases.iter().enumerate() {
        let name = format!("refused {i}");
        let message = bench.error(&name, options);
        assert!(message.contains(expected), "{options}: {message}");
        assert!(*expected == "the loss is not finite" || !bench.path(&name).exists(), "{options}");
    }
    let args = bench.args("bad fraction", "--labels 0.1");
    let output = Command::new(env!("CARGO_BIN_EXE_simsiam-engine")).args(&args).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        message.contains("expected a percentage above 0% and up to 100%, such as 1% or 10%, got \"0.1\""),
        "{message}"
    );
    assert!(!output.status.success() && !bench.path("bad fraction").exists());

    std::fs::create_dir(bench.path("taken")).unwrap();
    std::fs::write(bench.path("taken/file"), "mine").unwrap();
    assert!(bench.error("taken", "").contains("taken exists already; hint: continue it with --resume"));
    let message = common::fail(&["finetune", "--resume", bench.path("taken").to_str().unwrap()]);
    assert!(message.contains("holds no fine-tuning: there is no finetune.toml in it"), "{message}");
    assert_eq!(std::fs::read_dir(bench.path("taken")).unwrap().count(), 1);
}
