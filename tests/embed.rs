//! `embed`: the same features in every format, maps and galleries, and nothing half-written.

mod common;

use std::path::{Path, PathBuf};

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::eval::features::FeatureExtractor;
use simsiam_engine::exec::Device;
use simsiam_engine::tensor::{DType, safetensors};
use simsiam_engine::train::config::RunConfig;

const IMAGES: usize = 150;
const DIM: usize = 12;

struct Bench {
    folder: tempfile::TempDir,
    data: PathBuf,
}

impl Bench {
    /// A network trained for a few steps.
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let data = common::fashion(folder.path(), "train", IMAGES);
        let run = folder.path().join("run");
        let options = "--preset cifar --arch custom --block basic --depths 1,1 --width 6 --dim 20 --image-size 14 --batch 50 \
                       --epochs 1 --device cpu";
        let mut args = vec!["train", data.to_str().unwrap(), "--run", run.to_str().unwrap()];
        args.extend(options.split_whitespace());
        common::succeed(&args);
        Bench { folder, data }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn args(&self, options: &[&str]) -> Vec<String> {
        let run = self.path("run");
        let fixed = ["embed", run.to_str().unwrap(), self.data.to_str().unwrap(), "--device", "cpu"];
        fixed.iter().chain(options).map(|arg| arg.to_string()).collect()
    }

    fn embed(&self, options: &[&str]) -> String {
        common::succeed(&self.args(options).iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn refused(&self, options: &[&str]) -> String {
        common::fail(&self.args(options).iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn file(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Element type, shape and data of a `.npy` file, by NumPy's description of the format (NEP 1).
fn read_npy(path: &Path) -> (String, Vec<usize>, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!((10 + length) % 64, 0, "the data are aligned");
    let header = std::str::from_utf8(&bytes[10..10 + length]).unwrap();
    assert!(header.ends_with('\n') && header.contains("'fortran_order': False"), "{header}");
    let after = |key: &str| header.split_once(key).unwrap().1;
    let descr = after("'descr': '").split_once('\'').unwrap().0.to_string();
    let shape = after("'shape': (").split_once(')').unwrap().0;
    let shape = shape.split(',').map(str::trim).filter(|dim| !dim.is_empty()).map(|dim| dim.parse().unwrap()).collect();
    (descr, shape, bytes[10 + length..].to_vec())
}

/// The features that the library computes.
fn expected(bench: &Bench) -> (Vec<f32>, Vec<u32>) {
    let config = RunConfig::read(&bench.path("run")).unwrap();
    let mut extractor =
        FeatureExtractor::new(&config.model, &config.augment, &Device::Cpu(Tier::Direct), DType::F32).unwrap();
    let checkpoint = std::fs::read_dir(bench.path("run/checkpoints")).unwrap().next().unwrap().unwrap().path();
    extractor.load(&safetensors::read(&checkpoint).unwrap().0).unwrap();
    let features = extractor.extract(&Dataset::open(&bench.data).unwrap()).unwrap();
    (features.values, features.labels)
}

#[test]
fn every_format_holds_the_same_bits() {
    let bench = Bench::new();
    let (features, labels) = expected(&bench);
    let labels: Vec<i64> = labels.into_iter().map(i64::from).collect();
    let ids: Vec<i64> = (0..IMAGES as i64).collect();
    let bytes: &[u8] = bytemuck::cast_slice(&features);

    let said = bench.embed(&["--out", &bench.file("a.npy")]);
    assert!(said.contains("pooled features [150, 12]") && said.contains("a.labels.npy"), "{said}");
    assert_eq!(read_npy(&bench.path("a.npy")), ("<f4".into(), vec![IMAGES, DIM], bytes.to_vec()));
    for (name, values) in [("a.labels.npy", &labels), ("a.ids.npy", &ids)] {
        let column = bytemuck::cast_slice::<i64, u8>(values).to_vec();
        assert_eq!(read_npy(&bench.path(name)), ("<i8".into(), vec![IMAGES], column), "{name}");
    }

    bench.embed(&["--out", &bench.file("a.safetensors")]);
    let raw = std::fs::read(bench.path("a.safetensors")).unwrap();
    let stored = ::safetensors::SafeTensors::deserialize(&raw).unwrap();
    for (name, shape, data) in [
        ("features", vec![IMAGES, DIM], bytes),
        ("labels", vec![IMAGES], bytemuck::cast_slice(&labels)),
        ("ids", vec![IMAGES], bytemuck::cast_slice(&ids)),
    ] {
        let tensor = stored.tensor(name).unwrap();
        assert!(tensor.shape() == shape && tensor.data() == data, "{name}");
    }
    let (_, metadata) = safetensors::read(&bench.path("a.safetensors")).unwrap();
    assert_eq!(
        (metadata["layer"].as_str(), metadata["step"].as_str(), metadata["arch"].as_str()),
        ("pooled", "3", "custom")
    );
    #[cfg(feature = "parquet")]
    parquet_holds(&bench, &features, &labels);
}

#[cfg(feature = "parquet")]
fn parquet_holds(bench: &Bench, features: &[f32], labels: &[i64]) {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::RowAccessor;

    bench.embed(&["--out", &bench.file("a.parquet")]);
    let reader = SerializedFileReader::new(std::fs::File::open(bench.path("a.parquet")).unwrap()).unwrap();
    let dataset = Dataset::open(&bench.data).unwrap();
    let mut rows = 0;
    for (i, row) in reader.get_row_iter(None).unwrap().enumerate() {
        let row = row.unwrap();
        assert_eq!((row.get_long(0).unwrap(), row.get_long(1).unwrap()), (i as i64, labels[i]));
        assert_eq!(*row.get_string(2).unwrap(), dataset.classes()[labels[i] as usize]);
        let list = row.get_list(3).unwrap();
        let values: Vec<f32> = list
            .elements()
            .iter()
            .map(|v| match v {
                parquet::record::Field::Float(value) => *value,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(values, features[i * DIM..][..DIM], "row {i}");
        rows += 1;
    }
    assert_eq!(rows, IMAGES);
}

#[test]
fn rows_can_be_normalised_and_taken_from_the_projector() {
    let bench = Bench::new();
    bench.embed(&["--out", &bench.file("unit.npy"), "--normalize"]);
    let (_, _, data) = read_npy(&bench.path("unit.npy"));
    let unit: Vec<f32> = bytemuck::pod_collect_to_vec(&data);
    let (plain, _) = expected(&bench);
    for (unit, plain) in unit.chunks(DIM).zip(plain.chunks(DIM)) {
        let norm = plain.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        for (a, b) in unit.iter().zip(plain) {
            assert!((f64::from(*a) - f64::from(*b) / norm).abs() < 1e-6);
        }
    }
    bench.embed(&["--out", &bench.file("z.npy"), "--layer", "projector"]);
    let (_, shape, data) = read_npy(&bench.path("z.npy"));
    assert_eq!(shape, [IMAGES, 20]);
    let z: Vec<f32> = bytemuck::pod_collect_to_vec(&data);
    assert!(z.iter().any(|v| *v < 0.0), "z has no ReLU behind it");
}

#[test]
fn maps_and_galleries_are_drawn() {
    let bench = Bench::new();
    for method in ["pca", "tsne"] {
        let (png, csv) = (bench.file(&format!("{method}.png")), bench.file(&format!("{method}.csv")));
        bench.embed(&["--map", &png, "--map-csv", &csv, "--map-method", method, "--map-points", "60"]);
        let text = std::fs::read_to_string(&csv).unwrap();
        let rows: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split(',').collect()).collect();
        assert_eq!((text.lines().next().unwrap(), rows.len()), ("id,x,y,label,class", 60));
        let ids: Vec<usize> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
        assert_eq!(ids, (0..60).map(|i| i * IMAGES / 60).collect::<Vec<_>>());
        let xs: Vec<f64> = rows.iter().map(|row| row[1].parse().unwrap()).collect();
        assert!(xs.iter().any(|x| (x - xs[0]).abs() > 1e-6));
        assert_eq!(image::open(&png).unwrap().width(), 1000);
    }
    let gallery = bench.file("near.png");
    bench.embed(&["--neighbours", &gallery, "--queries", "3", "--k", "4"]);
    assert!(image::open(&gallery).unwrap().height() > 3 * 96);
}

#[test]
fn what_cannot_be_is_one_sentence_and_leaves_nothing() {
    let bench = Bench::new();
    let before = bench.names();
    let message = bench.refused(&["--out", &bench.file("a.csv")]);
    assert!(
        message.contains("--out: cannot tell the format of ") && message.contains("hint: end it in .npy"),
        "{message}"
    );
    let message = bench.refused(&["--map", &bench.file("a.png"), "--neighbours", &bench.file("a.png")]);
    assert!(message.contains("a.png: is named for two outputs"), "{message}");
    let message = bench.refused(&["--map", &bench.file("no/a.png")]);
    assert!(message.contains("there is no folder"), "{message}");
    let message = bench.refused(&["--map", &bench.file("a.png"), "--map-method", "tsne", "--map-points", "9"]);
    assert!(message.contains("--map-method: expected at least 16 images and 2 dimensions, got 9"), "{message}");
    let output = common::run(&bench.args(&[]).iter().map(String::as_str).collect::<Vec<_>>());
    assert!(String::from_utf8_lossy(&output.stderr).contains("--out <FILE>|"), "an output is required");
    assert_eq!(bench.names(), before);

    std::fs::write(bench.path("b.labels.npy"), "mine").unwrap();
    let message = bench.refused(&["--out", &bench.file("b.npy")]);
    assert!(message.contains("b.labels.npy: exists already; hint: --force replaces it"), "{message}");
    assert!(!bench.path("b.npy").exists());

    // A damaged record in the last batch: the features before it were written to a temporary, which is gone.
    let mut bytes = std::fs::read(&bench.data).unwrap();
    let dataset = Dataset::open(&bench.data).unwrap();
    let at = dataset.entry(IMAGES - 3).unwrap().offset as usize + 100;
    bytes[at] ^= 0x40;
    std::fs::write(&bench.data, bytes).unwrap();
    let before = bench.names();
    for name in ["c.npy", "c.parquet", "c.safetensors"] {
        let message = bench.refused(&["--out", &bench.file(name)]);
        assert!(message.contains("checksum"), "{message}");
        assert_eq!(bench.names(), before, "{name}");
    }
}
