//! kNN by tiles of the bank, on the CPU and on the emulated CUDA device, against the classifier that sees the bank
//! whole.

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::eval::knn::{Knn, Labelled};
use simsiam_engine::exec::{Device, Executor};
use simsiam_engine::graph::{Role, Tape, ValueId};
use simsiam_engine::ops::knn::{KnnMerge, KnnVote, MAX_NEIGHBOURS};
use simsiam_engine::ops::linear::Linear;
use simsiam_engine::rng::{Stream, below};
use simsiam_engine::tensor::{DType, TensorDesc};

fn devices() -> Vec<Device> {
    #[cfg(feature = "emulator")]
    {
        use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
        let emulator = |seed| Device::Cuda(std::sync::Arc::new(Emulator::new(Options { threads: 2, seed }).unwrap()));
        vec![Device::Cpu(Tier::Direct), emulator(0), emulator(7)]
    }
    #[cfg(not(feature = "emulator"))]
    {
        assert!(!std::env::var("SIMSIAM_REQUIRE_NVCC").is_ok_and(|value| value == "1"), "built without `emulator`");
        vec![Device::Cpu(Tier::Direct)]
    }
}

/// Features of small whole numbers, whose products are exact in whatever order they are added, with labels.
struct Set {
    features: Vec<f32>,
    labels: Vec<u32>,
}

const DIM: usize = 5;
const CLASSES: usize = 7;

impl Set {
    /// With `spread` 1 many rows are equal, opposite or zero, and most cosines are ties.
    fn new(rows: usize, spread: u32, seed: u64) -> Set {
        let mut stream = Stream::new(seed, 41, 0);
        let value = |word| below(word, 2 * spread + 1) as f32 - spread as f32;
        let features = (0..rows * DIM).map(|_| value(stream.word())).collect();
        Set { features, labels: (0..rows).map(|_| below(stream.word(), CLASSES as u32)).collect() }
    }

    fn labelled(&self) -> Labelled<'_> {
        Labelled { features: &self.features, labels: &self.labels }
    }

    /// Reciprocal norms, 0 for a zero row.
    fn scale(&self) -> Vec<f32> {
        let norm = |row: &[f32]| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        self.features.chunks(DIM).map(norm).map(|norm| if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 }).collect()
    }
}

/// A tape that multiplies, merges and votes, and its leaves.
struct Search {
    exec: Box<dyn Executor>,
    tile: usize,
    bank: ValueId,
    bank_scale: ValueId,
    range: ValueId,
    predictions: ValueId,
}

impl Search {
    fn new(device: &Device, knn: Knn, queries: &Set, labels: &[i64], tile: usize) -> Search {
        let rows = queries.labels.len();
        let mut tape = Tape::new();
        let mut leaf = |name, dims: &[usize], dtype, role| tape.leaf(name, TensorDesc::new(dims, dtype), role, false);
        let features = leaf("queries", &[rows, DIM], DType::F32, Role::Input);
        let query_scale = leaf("query_scale", &[rows], DType::F32, Role::Input);
        let bank = leaf("bank", &[tile, DIM], DType::F32, Role::Input);
        let bank_scale = leaf("bank_scale", &[tile], DType::F32, Role::Input);
        let range = leaf("range", &[2], DType::I64, Role::Input);
        let all_labels = leaf("labels", &[labels.len()], DType::I64, Role::Input);
        let best = leaf("best", &[rows, knn.k], DType::I64, Role::State);
        let products = tape.record_one(Linear, &[features, bank]).unwrap();
        tape.record_updating(KnnMerge, &[products, query_scale, bank_scale, range], &[best]).unwrap();
        let vote = KnnVote { temperature: knn.temperature, classes: CLASSES };
        let predictions = tape.record_one(vote, &[best, all_labels]).unwrap();
        tape.keep(predictions);
        let mut exec = device.poisoned_executor(tape).unwrap();
        exec.write(features, bytemuck::cast_slice(&queries.features)).unwrap();
        exec.write(query_scale, bytemuck::cast_slice(&queries.scale())).unwrap();
        exec.write(all_labels, bytemuck::cast_slice(labels)).unwrap();
        Search { exec, tile, bank, bank_scale, range, predictions }
    }

    /// Shows the whole bank, tile by tile; the last one is filled up with what would be nearest to everything.
    fn run(&mut self, bank: &Set) -> Vec<i64> {
        let scale = bank.scale();
        for (i, (rows, part)) in bank.features.chunks(self.tile * DIM).zip(scale.chunks(self.tile)).enumerate() {
            let (mut rows, mut part) = (rows.to_vec(), part.to_vec());
            let range = [(i * self.tile) as i64, (i * self.tile + part.len()) as i64];
            rows.resize(self.tile * DIM, f32::INFINITY);
            part.resize(self.tile, 1.0);
            self.exec.write(self.bank, bytemuck::cast_slice(&rows)).unwrap();
            self.exec.write(self.bank_scale, bytemuck::cast_slice(&part)).unwrap();
            self.exec.write(self.range, bytemuck::cast_slice(&range)).unwrap();
            self.exec.run_step().unwrap();
            assert_eq!(self.exec.overrun().unwrap(), None);
        }
        self.exec.read(self.predictions).unwrap().to_f64().into_iter().map(|class| class as i64).collect()
    }
}

fn wide(labels: &[u32]) -> Vec<i64> {
    labels.iter().map(|&label| i64::from(label)).collect()
}

#[test]
fn tiles_give_the_predictions_of_the_whole_bank() {
    //            bank  queries spread  k    tile  temperature
    let table = [
        (1003, 9, 1, 20, 128, 0.07),
        (1003, 9, 50, MAX_NEIGHBOURS, 127, 0.2),
        (2500, 5, 2, 200, 1200, 0.07),
        (4000, 3, 50, 200, 4096, 0.1),
        (257, 33, 1, 1, 31, 1e-4), // exp(1 / T) would overflow, and most votes are 0
        (40, 1, 3, 40, 1, 0.5),
    ];
    for (bank_rows, rows, spread, k, tile, temperature) in table {
        let (bank, queries) = (Set::new(bank_rows, spread, 1), Set::new(rows, spread, 2));
        let other = Set::new(bank_rows, spread, 3);
        let knn = Knn { k, temperature };
        for device in devices() {
            let mut search = Search::new(&device, knn, &queries, &wide(&bank.labels), tile);
            // A new search forgets the one before.
            search.run(&other);
            let expected = knn.evaluate(bank.labelled(), queries.labelled(), DIM, CLASSES).unwrap().predictions;
            assert_eq!(search.run(&bank), wide(&expected), "{bank_rows} rows, k {k}, tiles of {tile} on {device:?}");
        }
    }
}

#[test]
fn what_cannot_be_counted_is_no_class() {
    let (bank, queries) = (Set::new(30, 9, 4), Set::new(6, 9, 5));
    for device in devices() {
        // Every query sees every row, so one bad label spoils all of them.
        for bad in [-1, CLASSES as i64, i64::MIN, i64::MAX] {
            let mut labels = wide(&bank.labels);
            labels[17] = bad;
            let knn = Knn { k: 30, temperature: 0.1 };
            assert_eq!(Search::new(&device, knn, &queries, &labels, 16).run(&bank), [-1; 6], "label {bad}");
        }
        let labels = wide(&bank.labels);
        let too_many = Knn { k: 31, temperature: 0.1 };
        assert_eq!(Search::new(&device, too_many, &queries, &labels, 16).run(&bank), [-1; 6], "fewer rows than k");
        let all = Knn { k: 30, temperature: 0.1 };
        assert_eq!(Search::new(&device, all, &queries, &labels[..29], 16).run(&bank), [-1; 6], "a row without label");
    }
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let mut tape = Tape::new();
    let mut leaf = |dims: &[usize], dtype| tape.leaf("x", TensorDesc::new(dims, dtype), Role::Input, false);
    let products = leaf(&[3, 8], DType::F32);
    let (three, eight, range) = (leaf(&[3], DType::F32), leaf(&[8], DType::F32), leaf(&[2], DType::I64));
    let (best, labels) = (leaf(&[3, MAX_NEIGHBOURS + 1], DType::I64), leaf(&[9], DType::I64));
    let mut refused = |inputs: &[ValueId]| tape.record(KnnMerge, inputs).unwrap_err().to_string();
    assert!(refused(&[products, eight, eight, range]).contains("query_scale"));
    assert!(refused(&[products, three, three, range]).contains("bank_scale"));
    assert!(refused(&[products, three, eight, labels]).contains("range"));
    let vote = KnnVote { temperature: 0.1, classes: 2 };
    assert!(tape.record(vote, &[best, labels]).unwrap_err().to_string().contains("1 to 256"));
}
