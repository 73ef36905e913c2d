//! kNN and linear classifiers against scikit-learn and PyTorch (tests/fixtures/eval.safetensors, made by
//! tools/eval_golden.py), heads side by side against heads alone, and interrupted evaluations against whole ones.

mod common;

use std::cell::Cell;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::data::augment::AugmentConfig;
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::import::idx::Idx;
use simsiam_engine::data::import::{self, Options, Store};
use simsiam_engine::error::Result;
use simsiam_engine::eval::features::{FeatureExtractor, FeatureSource, Receiver};
use simsiam_engine::eval::heads::{Head, HeadBank, HeadReport, HeadShape, Optimiser, Scorer};
use simsiam_engine::eval::linear::{Keep, LinearConfig, LinearResult, LinearTask};
use simsiam_engine::eval::sweep::{KnnTask, Sweep, SweepResult};
use simsiam_engine::exec::Device;
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::SimSiam;
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::safetensors::{self, NamedTensors};
use simsiam_engine::tensor::{DType, HostTensor};

const CPU: Device = Device::Cpu(Tier::Direct);

fn devices() -> Vec<Device> {
    #[cfg(feature = "emulator")]
    {
        use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
        vec![CPU, Device::Cuda(std::sync::Arc::new(Emulator::new(Options { threads: 2, seed: 5 }).unwrap()))]
    }
    #[cfg(not(feature = "emulator"))]
    vec![CPU]
}

#[derive(Debug, Deserialize)]
struct Facts {
    ks: Vec<usize>,
    temperatures: Vec<f64>,
    heads: Vec<(String, f64)>,
    epochs: usize,
    logistic_right: u64,
}

struct Golden {
    tensors: NamedTensors,
    facts: Facts,
}

impl Golden {
    fn open() -> Golden {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/eval.safetensors");
        let (tensors, metadata) = safetensors::read(&path).unwrap();
        Golden { tensors, facts: serde_json::from_str(&metadata["facts"]).unwrap() }
    }

    /// Features, and the length of one.
    fn features(&self, name: &str) -> (Vec<f32>, usize) {
        let tensor = &self.tensors[name];
        (tensor.bytes().iter().map(|&byte| (f32::from(byte) - 128.0) / 32.0).collect(), tensor.desc().shape.channels())
    }

    fn labels(&self, name: &str) -> Vec<u32> {
        self.tensors[name].bytes().iter().map(|&label| label.into()).collect()
    }
}

/// A dataset of images of one pixel with these labels.
fn labelled(folder: &Path, name: &str, labels: &[u32]) -> Dataset {
    let [images, classes] = ["images-idx3-ubyte", "labels-idx1-ubyte"].map(|end| folder.join(format!("{name}-{end}")));
    let count = (labels.len() as u32).to_be_bytes();
    let one = 1u32.to_be_bytes();
    let header = [&[0, 0, 8, 3][..], &count, &one, &one].concat();
    std::fs::write(&images, [header, vec![7; labels.len()]].concat()).unwrap();
    let bytes: Vec<u8> = labels.iter().map(|&label| label as u8).collect();
    std::fs::write(&classes, [&[0, 0, 8, 1][..], &count, &bytes].concat()).unwrap();
    let idx = Idx::open(&images, Some(&classes), None, folder).unwrap();
    let path = folder.join(format!("{name}.ssds"));
    import::prepare(&idx, folder, &path, &Options::new(Store::Native), &mut |_| true).unwrap();
    Dataset::open(&path).unwrap()
}

/// Features from memory, by the name of the dataset.
struct Given<'a>(Vec<(&'a Path, Vec<f32>)>, usize);

impl FeatureSource for Given<'_> {
    fn dim(&self) -> usize {
        self.1
    }

    fn centres(
        &mut self,
        dataset: &Dataset,
        records: &mut dyn Iterator<Item = usize>,
        receive: &mut Receiver<'_>,
    ) -> Result<()> {
        let (_, values) = self.0.iter().find(|(path, _)| *path == dataset.path()).unwrap();
        for records in records.collect::<Vec<_>>().chunks(37) {
            let rows: Vec<f32> = records.iter().flat_map(|i| values[i * self.1..][..self.1].to_vec()).collect();
            receive(records, &rows)?;
        }
        Ok(())
    }
}

#[test]
fn knn_predicts_what_scikit_learn_predicts() {
    let (golden, folder) = (Golden::open(), tempfile::tempdir().unwrap());
    let [bank_labels, query_labels] = ["knn/bank_labels", "knn/query_labels"].map(|name| golden.labels(name));
    let (bank, queries) =
        (labelled(folder.path(), "bank", &bank_labels), labelled(folder.path(), "queries", &query_labels));
    let ((bank_rows, dim), (query_rows, _)) = (golden.features("knn/bank"), golden.features("knn/queries"));
    let mut source = Given(vec![(bank.path(), bank_rows), (queries.path(), query_rows)], dim);
    let Facts { ks, temperatures, .. } = &golden.facts;
    let task = KnnTask::new(&bank, &queries, Sweep::new(ks, temperatures).unwrap()).unwrap();
    let [expected, among_five] = ["knn/predictions", "knn/among_five"].map(|name| golden.labels(name));
    for device in devices() {
        let mut seen = Vec::new();
        // All queries at once, and so few that there are several passes.
        for memory in [1 << 30, 40_000] {
            let mut images = 0;
            let result = task.evaluate(&mut source, &device, memory, &mut |more| images += more).unwrap();
            assert_eq!(images, task.images(dim, memory));
            for (place, setting) in result.settings.iter().enumerate() {
                let range = place * query_labels.len()..(place + 1) * query_labels.len();
                assert_eq!(result.predictions[place], expected[range.clone()], "{setting:?} on {device:?}");
                let share = |right: usize| right as f64 / query_labels.len() as f64;
                let right = expected[range.clone()].iter().zip(&query_labels).filter(|(a, b)| a == b).count();
                assert_eq!(setting.accuracy.top1, share(right), "{setting:?}");
                assert_eq!(setting.accuracy.top5, share(among_five[range].iter().sum::<u32>() as usize), "{setting:?}");
            }
            assert!(result.settings.iter().all(|s| s.accuracy.top1 <= result.best().accuracy.top1));
            seen.push(result);
        }
        assert_eq!(seen[0], seen[1]);
        check_confusion(&seen[0], &query_labels);
    }
}

fn check_confusion(result: &SweepResult, labels: &[u32]) {
    let trace: u64 = result.confusion.rows().enumerate().map(|(class, row)| row[class]).sum();
    assert_eq!(trace as f64 / labels.len() as f64, result.best().accuracy.top1);
    for (class, (images, _)) in result.confusion.per_class().into_iter().enumerate() {
        assert_eq!(images as usize, labels.iter().filter(|&&label| label as usize == class).count());
    }
}

#[test]
fn features_that_are_not_finite_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let labels = [0, 1, 1, 0];
    let data = labelled(folder.path(), "data", &labels);
    let task = KnnTask::new(&data, &data, Sweep::new(&[3], &[0.1]).unwrap()).unwrap();
    let mut source = Given(vec![(data.path(), vec![1.0, 2.0, f32::INFINITY, 4.0])], 1);
    let error = task.evaluate(&mut source, &CPU, 1 << 20, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("expected finite features") && error.contains("row 2"), "{error}");
}

fn heads_of(facts: &Facts) -> Vec<Head> {
    let optimiser = |name: &str| if name == "lars" { Optimiser::Lars } else { Optimiser::Sgd };
    facts.heads.iter().map(|(name, lr)| Head { optimiser: optimiser(name), lr: *lr }).collect()
}

fn cosine(epoch: usize, epochs: usize) -> f64 {
    0.5 * (1.0 + (std::f64::consts::PI * epoch as f64 / epochs as f64).cos())
}

fn reports(bank: &mut HeadBank) -> Vec<HeadReport> {
    bank.collect(0).unwrap().unwrap()
}

#[test]
fn heads_learn_as_pytorch_with_sgd_and_apex_larc() {
    let golden = Golden::open();
    let ((features, dim), labels) = (golden.features("steps/features"), golden.labels("steps/labels"));
    let start = &golden.tensors["steps/weight"];
    let classes = start.desc().shape.rows();
    let shape = HeadShape { batch: labels.len(), dim, classes };
    for device in devices() {
        let mut bank = HeadBank::new(&heads_of(&golden.facts), shape, 0, &device).unwrap();
        bank.restore(|name, desc| {
            let zeros = HostTensor::from_bytes(desc.clone(), vec![0; desc.bytes()])?;
            Ok(if name.starts_with("head") && name.ends_with("weight") { start.clone() } else { zeros })
        })
        .unwrap();
        for epoch in 0..golden.facts.epochs {
            bank.scale_learning_rates(cosine(epoch, golden.facts.epochs)).unwrap();
            bank.step(&features, &labels).unwrap();
            for (number, report) in reports(&mut bank).iter().enumerate() {
                let expected = golden.tensors[&format!("steps/{number}/losses")].to_f64()[epoch];
                let difference = (report.loss - expected).abs();
                assert!(difference < 1e-4 * expected, "head {number}, epoch {epoch}: {} {expected}", report.loss);
            }
        }
        for number in 0..golden.facts.heads.len() {
            for (tensor, part) in bank.weights(number).unwrap().iter().zip(["weight", "bias"]) {
                let expected = golden.tensors[&format!("steps/{number}/{part}")].to_f64();
                let largest = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
                for (got, expected) in tensor.to_f64().iter().zip(&expected) {
                    assert!((got - expected).abs() < 1e-4 * largest, "head {number}, {part}: {got} {expected}");
                }
            }
        }
    }
}

#[test]
fn a_head_gets_right_what_logistic_regression_does() {
    let golden = Golden::open();
    let ((train, dim), labels) = (golden.features("logistic/train"), golden.labels("logistic/train_labels"));
    let ((test, _), test_labels) = (golden.features("logistic/test"), golden.labels("logistic/test_labels"));
    let shape = HeadShape { batch: labels.len(), dim, classes: 5 };
    let head = Head { optimiser: Optimiser::Sgd, lr: 0.5 };
    let mut bank = HeadBank::new(&[head], shape, 3, &CPU).unwrap();
    for epoch in 0..600 {
        bank.scale_learning_rates(cosine(epoch, 600)).unwrap();
        bank.step(&train, &labels).unwrap();
        reports(&mut bank);
    }
    // In batches that do not divide the test set, whose last is padded.
    let shape = HeadShape { batch: 64, ..shape };
    for device in devices() {
        let mut scorer = Scorer::new(&[bank.weights(0).unwrap()], shape, &device).unwrap();
        scorer.push(&test, &test_labels).unwrap();
        let [top1, top5] = scorer.finish().unwrap()[0];
        assert!(top1.abs_diff(golden.facts.logistic_right) <= 2, "{top1} instead of {}", golden.facts.logistic_right);
        assert_eq!(top5, 1000, "there are five classes");
    }
}

#[test]
fn a_head_among_others_is_the_head_alone() {
    let shape = HeadShape { batch: 70, dim: 33, classes: 6 };
    let mut stream = Stream::new(9, 77, 0);
    let steps: Vec<(Vec<f32>, Vec<u32>)> = (0..6)
        .map(|_| {
            let features = (0..shape.batch * shape.dim).map(|_| stream.normal() as f32).collect();
            (features, (0..shape.batch).map(|_| stream.word() % 6).collect())
        })
        .collect();
    let head = |optimiser, lr| Head { optimiser, lr };
    // The second diverges at once.
    let heads = [
        head(Optimiser::Lars, 3.0),
        head(Optimiser::Sgd, 1e39),
        head(Optimiser::Sgd, 0.3),
        head(Optimiser::Lars, 0.01),
        head(Optimiser::Sgd, 30.0),
    ];
    let train = |heads: &[Head], device: &Device| {
        let mut bank = HeadBank::new(heads, shape, 4, device).unwrap();
        let mut all = Vec::new();
        for (epoch, (features, labels)) in steps.iter().enumerate() {
            bank.scale_learning_rates(cosine(epoch / 2, 3)).unwrap();
            bank.step(features, labels).unwrap();
            all.push(reports(&mut bank));
        }
        let weights: Vec<_> = (0..heads.len()).map(|number| bank.weights(number).unwrap()).collect();
        (all, weights)
    };
    for device in devices() {
        let (together, weights) = train(&heads, &device);
        for (number, head) in heads.iter().enumerate() {
            let (alone, own) = train(&[*head], &device);
            assert_eq!(own[0], weights[number], "{head:?} on {device:?}");
            for (together, alone) in together.iter().zip(&alone) {
                assert_eq!(together[number].loss.to_bits(), alone[0].loss.to_bits());
                assert_eq!(together[number].right, alone[0].right);
            }
        }
        assert!(together.last().unwrap()[1].loss.is_nan());
        assert!([0, 2, 3].iter().all(|&number| together.last().unwrap()[number].loss.is_finite()));
    }
}

/// Images of clothes, and a small network at its start.
struct Small {
    folder: tempfile::TempDir,
    train: Dataset,
    test: Dataset,
}

impl Small {
    fn new() -> Small {
        let folder = tempfile::tempdir().unwrap();
        let [train, test] = [("train", 150), ("test", 70)]
            .map(|(split, limit)| Dataset::open(&common::fashion(folder.path(), split, limit)).unwrap());
        Small { folder, train, test }
    }

    fn augment() -> AugmentConfig {
        AugmentConfig { image_size: 14, ..AugmentConfig::cifar() }
    }

    fn extractor(device: &Device) -> FeatureExtractor {
        let model = SimSiam {
            backbone: ResNet { block: Block::Basic, depths: vec![1, 1], width: 8, stem: Stem::Cifar },
            heads: Heads {
                dim: 24,
                projector_hidden: 16,
                predictor_hidden: 8,
                projector_layers: 2,
                projector_out_affine: false,
                projector_out_bias: OutBias::None,
                norm: HeadNorm::Default,
                predictor: PredictorKind::Mlp,
            },
            similarity: Kind::Cosine,
            stop_gradient: true,
            symmetric: true,
        };
        let mut extractor = FeatureExtractor::new(&model, &Small::augment(), device, DType::F32).unwrap();
        extractor.initialise(11).unwrap();
        extractor
    }

    fn config(cached: bool) -> LinearConfig {
        let heads = [(Optimiser::Lars, 10.0), (Optimiser::Sgd, 1.0), (Optimiser::Sgd, 1e38)];
        LinearConfig {
            heads: heads.map(|(optimiser, lr)| Head { optimiser, lr }).to_vec(),
            epochs: 5,
            batch: 48,
            holdout: 0.2,
            seed: 6,
            cached,
            augment: AugmentConfig { crop_scale: [0.08, 1.0], jitter_probability: 0.0, ..Small::augment() },
        }
    }

    /// Interrupted at the `stop`-th question.
    fn run(
        &self,
        config: &LinearConfig,
        device: &Device,
        keep: Option<(&str, bool)>,
        stop: u64,
    ) -> Option<LinearResult> {
        let mut extractor = Small::extractor(device);
        let task = LinearTask::new(config, &self.train, &self.test, extractor.dim()).unwrap();
        let folder = self.folder.path().join(keep.map_or("", |(name, _)| name));
        let keep = keep.map(|(_, resume)| Keep { folder: &folder, resume });
        let (asked, images) = (Cell::new(0), Cell::new(0));
        let interrupted = || {
            asked.set(asked.get() + 1);
            asked.get() > stop
        };
        let progress = &mut |more| images.set(images.get() + more);
        let result = task.run(&mut extractor, device, keep, progress, &interrupted).unwrap();
        if result.is_some() {
            // A network that diverged leaves the last pass, over the test set, out; here one stays.
            let resumed_cache = if config.cached { 120 } else { 0 };
            let missing = task.images(0) - images.get();
            assert!(missing == 0 || missing == resumed_cache, "{missing} images were not told of");
        }
        result
    }
}

#[test]
fn an_interrupted_evaluation_goes_on_bit_for_bit() {
    let small = Small::new();
    for cached in [false, true] {
        let config = Small::config(cached);
        let whole = small.run(&config, &CPU, None, u64::MAX).unwrap();
        assert_eq!(whole.images, [120, 30, 70]);
        assert_eq!((whole.batch, whole.steps_per_epoch), (40, 3));
        assert_eq!(whole.heads.iter().map(|head| head.diverged).collect::<Vec<_>>(), [false, false, true]);
        let best = whole.best.unwrap();
        assert!(best < 2 && whole.heads[best].holdout.unwrap().top1 > 0.2, "{whole:?}");
        assert!(whole.test.unwrap().top1 > 0.1, "{whole:?}");
        let name = if cached { "cached" } else { "drawn" };
        let mut calls = 0;
        let resumed = loop {
            calls += 1;
            // With new crops every image is asked for, else every step.
            let stop = if cached { 7 } else { 200 };
            if let Some(result) = small.run(&config, &CPU, Some((name, calls > 1)), stop) {
                break result;
            }
        };
        assert!(calls > 1, "never interrupted");
        assert_eq!(resumed, whole);
    }
}

#[test]
fn another_evaluation_is_not_gone_on_with() {
    let small = Small::new();
    let config = LinearConfig { epochs: 1, ..Small::config(true) };
    small.run(&config, &CPU, Some(("dir", false)), u64::MAX).unwrap();
    let path = small.folder.path().join("dir");
    let fault = |config: &LinearConfig, resume| {
        let mut extractor = Small::extractor(&CPU);
        let task = LinearTask::new(config, &small.train, &small.test, extractor.dim()).unwrap();
        let keep = Some(Keep { folder: &path, resume });
        task.run(&mut extractor, &CPU, keep, &mut |_| (), &|| false).unwrap_err().to_string()
    };
    let error = fault(&config, false);
    assert!(error.contains("--run: ") && error.contains("holds an evaluation already"), "{error}");
    let error = fault(&LinearConfig { epochs: 2, ..config.clone() }, true);
    assert!(error.contains("was begun with another epochs: 1, now it is 2"), "{error}");
}

#[test]
fn settings_that_do_not_fit_are_named() {
    let small = Small::new();
    let good = Small::config(true);
    let fault = |config: LinearConfig| {
        LinearTask::new(&config, &small.train, &small.test, 16).map(|_| ()).unwrap_err().to_string()
    };
    assert!(fault(LinearConfig { epochs: 0, ..good.clone() }).starts_with("--epochs: expected at least 1"));
    assert!(fault(LinearConfig { batch: 0, ..good.clone() }).starts_with("--batch: expected at least 1"));
    assert!(fault(LinearConfig { holdout: 1.0, ..good.clone() }).starts_with("--holdout: expected a number between"));
    assert!(fault(LinearConfig { holdout: 0.0, ..good }).contains("nothing to choose the best of 3 heads by"));
    let shape = HeadShape { batch: 4, dim: 3, classes: 2 };
    let head = |lr| [Head { optimiser: Optimiser::Sgd, lr }];
    for lr in [0.0, -1.0, f64::NAN] {
        let error = HeadBank::new(&head(lr), shape, 0, &CPU).unwrap_err().to_string();
        assert!(error.starts_with("--lr: expected positive numbers"), "{error}");
    }
}

#[test]
#[cfg(feature = "emulator")]
fn the_emulated_device_finds_the_same() {
    let small = Small::new();
    let devices = devices();
    for cached in [true, false] {
        let config = LinearConfig { epochs: 2, ..Small::config(cached) };
        let results = [0, 1].map(|device| small.run(&config, &devices[device], None, u64::MAX).unwrap());
        for head in 0..2 {
            let [cpu, cuda] = results.each_ref().map(|result| result.history[1][head].loss.unwrap());
            assert!((cpu - cuda).abs() < 1e-3 * cpu, "head {head}: {cpu} {cuda}");
        }
        assert_eq!(results[0].heads[2].diverged, results[1].heads[2].diverged);
        // One of 70 images may be on the edge.
        let [cpu, cuda] = results.each_ref().map(|result| result.test.unwrap().top1);
        assert!((cpu - cuda).abs() < 0.03, "{cpu} {cuda}");
    }
}

/// Whole commands, on a run of two steps.
struct Commands {
    folder: tempfile::TempDir,
    train: PathBuf,
    test: PathBuf,
}

impl Commands {
    fn new() -> Commands {
        let folder = tempfile::tempdir().unwrap();
        let train = common::fashion(folder.path(), "train", 120);
        let test = common::fashion(folder.path(), "test", 50);
        let commands = Commands { folder, train, test };
        let options = "--preset cifar --arch custom --block basic --depths 1,1 --width 8 --dim 24 --image-size 14 \
                       --epochs 1 --batch 60 --device cpu";
        let (data, run) = (commands.train.display().to_string(), commands.path("run"));
        common::succeed(
            &[&["train", &data, "--run", &run], &options.split(' ').filter(|o| !o.is_empty()).collect::<Vec<_>>()[..]]
                .concat(),
        );
        commands
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// `eval` with words in which {run}, {train}, {test} and {dir} stand for paths.
    fn words(&self, command: &str) -> Vec<String> {
        let paths = [("{run}", self.path("run")), ("{dir}", self.path(""))];
        let data = [("{train}", self.train.display().to_string()), ("{test}", self.test.display().to_string())];
        let replaced =
            |word: &str| paths.iter().chain(&data).fold(word.to_string(), |w, (from, to)| w.replace(from, to));
        ["eval"].into_iter().chain(command.split_whitespace()).map(replaced).collect()
    }

    fn succeed(&self, command: &str) -> String {
        common::succeed(&self.words(command).iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn fail(&self, command: &str) -> String {
        common::fail(&self.words(command).iter().map(String::as_str).collect::<Vec<_>>())
    }
}

#[test]
fn the_commands_measure_and_report() {
    let commands = Commands::new();
    let knn = "knn {run} --bank {train} --queries {test} --device cpu --k 1,20 --temperature 0.1,0.2";
    let text = commands.succeed(&format!("{knn} --compare --confusion {{dir}}/confusion.png"));
    for part in ["trained network", "untrained network", "raw pixels", "accuracy by class", "row: true class"] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    assert!(image::open(commands.path("confusion.png")).unwrap().width() > 300);
    let json: serde_json::Value = serde_json::from_str(&commands.succeed(&format!("{knn} --compare --json"))).unwrap();
    assert_eq!(json["trained"]["settings"].as_array().unwrap().len(), 4);
    let counts = json["trained"]["confusion"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
    assert_eq!(counts.map(|count| count.as_u64().unwrap()).sum::<u64>(), 50);
    assert!(json["raw_pixels"]["best"]["top1"].as_f64().unwrap() > 0.3, "{json}");
    // A checkpoint by its name is the run's newest one.
    let checkpoint = knn.replace("{run}", "{run}/checkpoints/step-00000002.safetensors");
    let by_file: serde_json::Value = serde_json::from_str(&commands.succeed(&format!("{checkpoint} --json"))).unwrap();
    assert_eq!(by_file["trained"], json["trained"]);

    let linear =
        "linear {run} --train {train} --test {test} --device cpu --cached --epochs 3 --lr 0.1,1,1e38 --run {dir}/lin";
    let text = commands.succeed(linear);
    for part in ["lars", "sgd", "diverged", "<- best", "test set: top-1"] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    let kept = std::fs::read_to_string(commands.path("lin/linear.json")).unwrap();
    let kept: serde_json::Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(kept["result"]["heads"].as_array().unwrap().len(), 6);
    let again: serde_json::Value =
        serde_json::from_str(&commands.succeed(&format!("{linear} --resume --json"))).unwrap();
    assert_eq!(again, kept);
    // Another network is another evaluation.
    let error = commands.fail(&format!("{linear} --resume --untrained"));
    assert!(error.contains("was begun with another network"), "{error}");
}

#[test]
fn bad_input_is_one_sentence() {
    let commands = Commands::new();
    let folder = commands.folder.path();
    labelled(folder, "three", &[0, 1, 2, 0]);
    let unlabelled = folder.join("plain");
    std::fs::create_dir(&unlabelled).unwrap();
    image::RgbImage::new(20, 20).save(unlabelled.join("a.png")).unwrap();
    let out = commands.path("plain.ssds");
    common::succeed(&["prepare", unlabelled.to_str().unwrap(), &out]);
    std::fs::write(folder.join("empty.ssds"), "").unwrap();
    let config = folder.join("run/config.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let knn = "knn {run} --device cpu --bank";
    for (command, expected) in [
        (format!("{knn} {{dir}}/plain.ssds --queries {{dir}}/plain.ssds --k 1"), "record 0 has no label"),
        (format!("{knn} {{train}} --queries {{dir}}/three.ssds"), "it has 3 classes, but"),
        (format!("{knn} {{dir}}/empty.ssds --queries {{test}}"), "empty.ssds"),
        (format!("{knn} {{train}} --queries {{test}} --k 5,121"), "--k: 121 neighbours were asked for, but"),
        (format!("{knn} {{train}} --queries {{test}} --k 300"), "--k: expected 1 to 256 neighbours, got 300"),
        (format!("{knn} {{train}} --queries {{test}} --k 5 --temperature 0"), "--temperature: expected 0.003 or more"),
        (format!("{knn} {{train}} --queries {{test}} --k 5 --memory 0"), "--memory: expected at least 1 MiB"),
        (format!("{knn} {{train}} --queries {{test}} --k 5 --dtype bf16"), "--dtype: expected f32 on the CPU"),
        ("knn {dir}/nothing --bank {train} --queries {test} --k 5".into(), "nothing"),
        ("linear {run} --device cpu --train {train} --test {dir}/three.ssds".into(), "it has 3 classes, but"),
        ("linear {run} --device cpu --train {train} --test {test} --lr 0".into(), "--lr: expected positive numbers"),
        ("linear {run} --device cpu --train {train} --test {test} --holdout 2".into(), "--holdout: expected a number"),
    ] {
        let error = commands.fail(&command);
        assert!(error.contains(expected), "{command}: {error}");
    }
    std::fs::write(&config, text.replace("width = 8", "width = 12")).unwrap();
    let error = commands.fail(&format!("{knn} {{train}} --queries {{test}} --k 5"));
    assert!(error.contains("belongs to another network"), "{error}");
}
