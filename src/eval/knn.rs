//! Weighted kNN classifier on features: the labelled bank rows nearest in cosine vote for their class.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;

use crate::backend::cpu::{Mat, gemm};
use crate::error::{Error, Result};
use crate::ops::knn::{Neighbour, elect};

/// Queries of one parallel task and bank rows of one matrix product. Fixed, so that no result depends on the number of
/// threads; a task's similarities take 256 KiB.
const QUERY_BLOCK: usize = 64;
const BANK_BLOCK: usize = 1024;

/// The neighbours kept so far, the farthest on top.
type Nearest = BinaryHeap<Reverse<Neighbour>>;

/// Features with one label a row.
#[derive(Debug, Clone, Copy)]
pub struct Labelled<'a> {
    /// Row-major, `labels.len()` rows. They need not be normalised.
    pub features: &'a [f32],
    /// The class of each row.
    pub labels: &'a [u32],
}

/// The classifier: `k` neighbours, each voting with weight exp(cos / `temperature`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Knn {
    /// Neighbours that vote.
    pub k: usize,
    /// How fast a vote's weight falls with distance.
    pub temperature: f64,
}

/// Predictions for queries of known class.
#[derive(Debug, Clone, PartialEq)]
pub struct KnnResult {
    /// The predicted class of each query.
    pub predictions: Vec<u32>,
    /// Share of right predictions, in 0..1.
    pub top1: f64,
}

impl Knn {
    /// Checks the options against the number of bank rows.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option at fault.
    pub fn validate(&self, bank_rows: usize) -> Result<()> {
        if self.k == 0 || self.k > bank_rows {
            let what = format!("expected 1 to {bank_rows}, the number of labelled training images, got {}", self.k);
            return Err(Error::config("--knn-k", what));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            let what = format!("expected a positive number, got {}", self.temperature);
            return Err(Error::config("--knn-temperature", what));
        }
        Ok(())
    }

    /// Predicts the queries' classes (below `classes`) from the bank and compares them with their labels. Features have
    /// `dim` columns; an all-zero row has cosine 0 with every other. Equal cosines rank by bank row, equal votes go to the
    /// lower class.
    ///
    /// # Errors
    /// [`Error::Config`] for options that do not fit, [`Error::Shape`] for features and labels that do not fit together,
    /// labels out of range or features that are not finite.
    pub fn evaluate(&self, bank: Labelled, queries: Labelled, dim: usize, classes: usize) -> Result<KnnResult> {
        self.validate(bank.labels.len())?;
        let bank_scale = check("bank", bank, dim, classes)?;
        let query_scale = check("queries", queries, dim, classes)?;
        let block_of = |(block, features): (usize, &[f32])| {
            let scale = &query_scale[block * QUERY_BLOCK..][..features.len() / dim];
            let neighbours = self.neighbours((bank.features, &bank_scale), (features, scale), dim);
            neighbours.into_iter().map(|nearest| self.vote(nearest, bank.labels, classes)).collect::<Vec<u32>>()
        };
        let blocks: Vec<_> = queries.features.par_chunks(QUERY_BLOCK * dim).enumerate().map(block_of).collect();
        let predictions = blocks.concat();
        let right = predictions.iter().zip(queries.labels).filter(|(predicted, label)| predicted == label).count();
        Ok(KnnResult { top1: right as f64 / predictions.len() as f64, predictions })
    }

    /// The `k` nearest bank rows of each query of a block; matrices come with their rows' reciprocal norms.
    fn neighbours(&self, bank: (&[f32], &[f32]), queries: (&[f32], &[f32]), dim: usize) -> Vec<Nearest> {
        let rows = queries.1.len();
        let mut nearest = vec![BinaryHeap::with_capacity(self.k + 1); rows];
        let mut products = vec![0.0; rows * BANK_BLOCK];
        for (block, features) in bank.0.chunks(BANK_BLOCK * dim).enumerate() {
            let first = block * BANK_BLOCK;
            let cols = features.len() / dim;
            let result = Mat::row_major(&mut products[..rows * cols], rows, cols);
            gemm(result, Mat::row_major(queries.0, rows, dim), Mat::row_major(features, cols, dim).t(), false);
            for (row, heap) in nearest.iter_mut().enumerate() {
                let row_products = &products[row * cols..][..cols];
                for (col, product) in row_products.iter().enumerate() {
                    let cosine = product * queries.1[row] * bank.1[first + col];
                    keep_nearest(heap, self.k, Neighbour::new(cosine, (first + col) as u32));
                }
            }
        }
        nearest
    }

    fn vote(&self, nearest: Nearest, labels: &[u32], classes: usize) -> u32 {
        let nearest = nearest.into_sorted_vec().into_iter();
        let votes = nearest.map(|Reverse(near)| (near.cosine(), labels[near.row() as usize] as usize));
        elect(votes, self.temperature, classes) as u32
    }
}

/// Bytes as features, for kNN on raw pixels.
pub fn pixel_features(pixels: &[u8]) -> Vec<f32> {
    pixels.iter().map(|&p| f32::from(p)).collect()
}

fn keep_nearest(heap: &mut Nearest, k: usize, candidate: Neighbour) {
    if heap.len() < k {
        heap.push(Reverse(candidate));
    } else if let Some(mut farthest) = heap.peek_mut()
        && candidate > farthest.0
    {
        *farthest = Reverse(candidate);
    }
}

/// Checks features and labels; the rows' reciprocal norms, 0 for a zero row.
fn check(what: &str, set: Labelled, dim: usize, classes: usize) -> Result<Vec<f32>> {
    let rows = set.labels.len();
    if rows == 0 || dim == 0 || set.features.len() != rows * dim {
        let expected = format!("{rows} labels x {dim} features, at least one of each");
        return Err(Error::shape("kNN", what, expected, format!("{} features", set.features.len())));
    }
    if let Some(row) = set.labels.iter().position(|&label| label as usize >= classes) {
        let got = format!("{} in row {row}", set.labels[row]);
        return Err(Error::shape("kNN", what, format!("labels below {classes}"), got));
    }
    reciprocal_norms(what, set.features, dim, 0)
}

/// The rows' reciprocal norms, 0 for a zero row; the first row is number `first` in messages about `what`.
///
/// # Errors
/// [`Error::Shape`] naming a row that is not finite.
pub(super) fn reciprocal_norms(what: &str, features: &[f32], dim: usize, first: usize) -> Result<Vec<f32>> {
    let norms = features.par_chunks(dim).map(|row| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt());
    let norms: Vec<f64> = norms.collect();
    if let Some(row) = norms.iter().position(|norm| !norm.is_finite()) {
        let got = format!("a value in row {} that is not", first + row);
        return Err(Error::shape("kNN", what, "finite features", got));
    }
    Ok(norms.into_iter().map(|norm| if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 }).collect())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::rng::Stream;

    #[derive(Deserialize)]
    struct Golden {
        dim: usize,
        classes: usize,
        bank: Vec<f32>,
        bank_labels: Vec<u32>,
        queries: Vec<f32>,
        query_labels: Vec<u32>,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        k: usize,
        temperature: f64,
        predictions: Vec<u32>,
        correct: usize,
    }

    fn predict(knn: Knn, bank: (&[f32], &[u32]), queries: &[f32], dim: usize, classes: usize) -> Vec<u32> {
        let labels = vec![0; queries.len() / dim];
        let bank = Labelled { features: bank.0, labels: bank.1 };
        knn.evaluate(bank, Labelled { features: queries, labels: &labels }, dim, classes).unwrap().predictions
    }

    #[test]
    fn matches_numpy() {
        let golden: Golden = serde_json::from_str(include_str!("../../tests/fixtures/knn.json")).unwrap();
        let bank = Labelled { features: &golden.bank, labels: &golden.bank_labels };
        let queries = Labelled { features: &golden.queries, labels: &golden.query_labels };
        for Case { k, temperature, predictions, correct } in golden.cases {
            let result = Knn { k, temperature }.evaluate(bank, queries, golden.dim, golden.classes).unwrap();
            assert_eq!(result.predictions, predictions, "k {k}, T {temperature}");
            assert_eq!(result.top1, correct as f64 / predictions.len() as f64);
        }
    }

    #[test]
    fn blocks_are_seamless_and_threads_do_not_matter() {
        // More rows than a block on both sides, against a plain search in float64.
        let (dim, classes, bank_rows, query_rows) = (9, 5, 2 * BANK_BLOCK + 37, 2 * QUERY_BLOCK + 3);
        let mut stream = Stream::new(3, 9, 0);
        let bank: Vec<f32> = (0..bank_rows * dim).map(|_| stream.normal() as f32).collect();
        let queries: Vec<f32> = (0..query_rows * dim).map(|_| stream.normal() as f32).collect();
        let labels: Vec<u32> = (0..bank_rows).map(|_| stream.word() % classes as u32).collect();
        let norm = |v: &[f32]| v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let plain = |query: &[f32]| {
            let dot = |row: &[f32]| row.iter().zip(query).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
            let mut cosines: Vec<(f64, u32)> =
                bank.chunks(dim).zip(&labels).map(|(row, &l)| (dot(row) / norm(row) / norm(query), l)).collect();
            cosines.sort_by(|a, b| b.0.total_cmp(&a.0));
            let mut votes = vec![0.0; classes];
            cosines[..30].iter().for_each(|&(cosine, label)| votes[label as usize] += (cosine / 0.07).exp());
            (0..classes as u32).max_by(|&a, &b| votes[a as usize].total_cmp(&votes[b as usize])).unwrap()
        };
        let expected: Vec<u32> = queries.chunks(dim).map(plain).collect();
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let knn = Knn { k: 30, temperature: 0.07 };
            assert_eq!(pool.install(|| predict(knn, (&bank, &labels), &queries, dim, classes)), expected);
        }
    }

    #[test]
    fn ties_are_settled_the_same_way_always() {
        // Four equal rows: the lower two vote; then the vote of two classes is equal.
        let bank = [0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 1.0, 0.0];
        let (labels, query) = ([2, 1, 0, 0, 0], [0.0, 5.0]);
        assert_eq!(predict(Knn { k: 1, temperature: 0.1 }, (&bank, &labels), &query, 2, 3), [2]);
        assert_eq!(predict(Knn { k: 2, temperature: 0.1 }, (&bank, &labels), &query, 2, 3), [1]);
        assert_eq!(predict(Knn { k: 4, temperature: 0.1 }, (&bank, &labels), &query, 2, 3), [0]);
    }

    #[test]
    fn tiny_temperatures_and_zero_rows_are_harmless() {
        let bank = [1.0, 0.0, 0.0, 0.0, 0.8, 0.6];
        let knn = Knn { k: 3, temperature: 1e-4 }; // exp(1 / T) would overflow
        assert_eq!(predict(knn, (&bank, &[1, 0, 2]), &[0.8, 0.6, 9.0, 0.1], 2, 3), [2, 1]);
        assert_eq!(predict(knn, (&bank, &[1, 0, 2]), &[0.0, 0.0], 2, 3), [0]);
    }

    #[test]
    fn pixels_classify_too() {
        let bank = pixel_features(&[250, 3, 1, 0, 90, 200]);
        let queries = pixel_features(&[25, 1, 0, 2, 100, 255]);
        assert_eq!(predict(Knn { k: 1, temperature: 0.1 }, (&bank, &[7, 4]), &queries, 3, 8), [7, 4]);
    }

    #[test]
    fn bad_input_is_named() {
        let (features, labels) = ([1.0, 0.0, 0.0, 1.0], [0, 1]);
        let good = Labelled { features: &features, labels: &labels };
        let evaluate = |k, temperature, bank, queries| {
            Knn { k, temperature }.evaluate(bank, queries, 2, 2).unwrap_err().to_string()
        };
        let cases = [
            (evaluate(0, 0.1, good, good), "--knn-k: expected 1 to 2"),
            (evaluate(3, 0.1, good, good), "--knn-k: expected 1 to 2"),
            (evaluate(1, 0.0, good, good), "--knn-temperature: expected a positive number"),
            (evaluate(1, f64::NAN, good, good), "--knn-temperature"),
            (evaluate(1, 0.1, good, Labelled { features: &features[..3], ..good }), "got 3 features"),
            (evaluate(1, 0.1, good, Labelled { features: &[], labels: &[] }), "queries: expected 0 labels"),
            (evaluate(1, 0.1, Labelled { labels: &[0, 2], ..good }, good), "labels below 2, got 2 in row 1"),
            (evaluate(1, 0.1, Labelled { features: &[1.0, 0.0, f32::NAN, 1.0], ..good }, good), "row 1 that is not"),
        ];
        for (message, expected) in cases {
            assert!(message.contains(expected), "{message}");
        }
    }
}
