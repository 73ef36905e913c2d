//! kNN accuracy for many k and T in one search: neighbours are found once for the largest k, and vote in every setting.

use rayon::prelude::*;
use serde::Serialize;

use crate::data::dataset::Dataset;
use crate::error::{Error, Result};
use crate::eval::features::{FeatureSource, check_same_classes, labels};
use crate::eval::scores::{Accuracy, Confusion};
use crate::eval::search::{Search, SearchShape};
use crate::exec::Device;
use crate::ops::knn::{MAX_NEIGHBOURS, Neighbour};

/// Below it the weight of a vote, exp((cos - 1) / T), could underflow.
const LOWEST_TEMPERATURE: f64 = 0.003;

/// The settings to try: every k with every T.
#[derive(Debug, Clone, PartialEq)]
pub struct Sweep {
    ks: Vec<usize>,
    temperatures: Vec<f64>,
}

/// One setting and its accuracy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Setting {
    /// Neighbours that vote.
    pub k: usize,
    /// T of the votes' weights, exp(cos / T).
    pub temperature: f64,
    /// Of the queries. Among the first five are only classes that were voted for.
    #[serde(flatten)]
    pub accuracy: Accuracy,
}

/// What a sweep found.
#[derive(Debug, Clone, PartialEq)]
pub struct SweepResult {
    /// By k, then by T.
    pub settings: Vec<Setting>,
    /// The place of the setting with the best top-1 accuracy, the first of equal ones.
    pub best: usize,
    /// The predicted class of each query in each setting.
    pub predictions: Vec<Vec<u32>>,
    /// Which class is taken for which in the best setting.
    pub confusion: Confusion,
}

impl SweepResult {
    /// The setting with the best top-1 accuracy.
    pub fn best(&self) -> &Setting {
        &self.settings[self.best]
    }
}

impl Sweep {
    /// Every one of `ks` with every one of `temperatures`, sorted, each once.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option that makes no sense.
    pub fn new(ks: &[usize], temperatures: &[f64]) -> Result<Sweep> {
        if let Some(k) = ks.iter().find(|k| !(1..=MAX_NEIGHBOURS).contains(k)) {
            return Err(Error::config("--k", format!("expected 1 to {MAX_NEIGHBOURS} neighbours, got {k}")));
        }
        if let Some(t) = temperatures.iter().find(|t| !(t.is_finite() && **t >= LOWEST_TEMPERATURE)) {
            let what = format!("expected {LOWEST_TEMPERATURE} or more, got {t}");
            return Err(Error::config("--temperature", what));
        }
        if ks.is_empty() || temperatures.is_empty() {
            let option = if ks.is_empty() { "--k" } else { "--temperature" };
            return Err(Error::config(option, "expected at least one value, got none"));
        }
        let (mut ks, mut temperatures) = (ks.to_vec(), temperatures.to_vec());
        ks.sort_unstable();
        ks.dedup();
        temperatures.sort_by(f64::total_cmp);
        temperatures.dedup();
        Ok(Sweep { ks, temperatures })
    }

    /// The largest k.
    pub fn most_neighbours(&self) -> usize {
        self.ks.last().copied().unwrap_or(0)
    }

    /// The settings as (k, T), in the order of all results.
    pub fn settings(&self) -> impl Iterator<Item = (usize, f64)> {
        self.ks.iter().flat_map(|&k| self.temperatures.iter().map(move |&t| (k, t)))
    }

    /// The votes of one query's neighbours, nearest first: prediction, and rank of `label` among the classes that were voted
    /// for, by setting.
    fn vote(&self, nearest: &[Neighbour], bank_labels: &[u32], classes: usize, label: u32) -> Vec<Vote> {
        let mut votes = vec![Vote::default(); self.ks.len() * self.temperatures.len()];
        for (t, temperature) in self.temperatures.iter().enumerate() {
            let mut weights = vec![0.0; classes];
            let mut counted = 0;
            for (i, k) in self.ks.iter().enumerate() {
                for neighbour in &nearest[counted..*k] {
                    let class = bank_labels[neighbour.row() as usize] as usize;
                    weights[class] += ((f64::from(neighbour.cosine()) - 1.0) / temperature).exp();
                }
                counted = *k;
                votes[i * self.temperatures.len() + t] = Vote::of(&weights, label);
            }
        }
        votes
    }
}

/// The outcome of one election.
#[derive(Debug, Clone, Copy, Default)]
struct Vote {
    prediction: u32,
    /// The place of the true class, from 0, if anybody voted for it.
    rank: Option<usize>,
}

impl Vote {
    /// Equal weights go to the lower class.
    fn of(weights: &[f64], label: u32) -> Vote {
        let best = (1..weights.len()).fold(0, |best, class| if weights[class] > weights[best] { class } else { best });
        let label = label as usize;
        let before =
            |&(class, weight): &(usize, &f64)| *weight > weights[label] || (*weight == weights[label] && class < label);
        let rank = (weights[label] > 0.0).then(|| weights.iter().enumerate().filter(before).count());
        Vote { prediction: best as u32, rank }
    }
}

/// Two datasets of the same classes: images that vote, and images to be classified.
#[derive(Debug)]
pub struct KnnTask<'a> {
    bank: &'a Dataset,
    bank_labels: Vec<u32>,
    queries: &'a Dataset,
    query_labels: Vec<u32>,
    sweep: Sweep,
}

impl<'a> KnnTask<'a> {
    /// Checks that both datasets are labelled with the same classes, and the bank large enough.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Format`] naming what does not fit.
    pub fn new(bank: &'a Dataset, queries: &'a Dataset, sweep: Sweep) -> Result<KnnTask<'a>> {
        check_same_classes(queries, bank)?;
        let (k, images) = (sweep.most_neighbours(), bank.len());
        if k > images {
            let what = format!("{k} neighbours were asked for, but {} has {images} images", bank.path().display());
            return Err(Error::config("--k", what).with_hint(format!("name values up to {images}")));
        }
        let (bank_labels, query_labels) = (labels(bank)?, labels(queries)?);
        Ok(KnnTask { bank, bank_labels, queries, query_labels, sweep })
    }

    /// How many queries are searched for at a time when features may take `memory` bytes, and in how many passes over the
    /// bank that makes.
    pub fn passes(&self, dim: usize, memory: usize) -> (SearchShape, usize) {
        let shape = SearchShape::within(memory, self.queries.len(), dim, self.sweep.most_neighbours());
        (shape, self.queries.len().div_ceil(shape.queries))
    }

    /// Images that [`KnnTask::evaluate`] looks at.
    pub fn images(&self, dim: usize, memory: usize) -> u64 {
        let (_, passes) = self.passes(dim, memory);
        (self.queries.len() + passes * self.bank.len()) as u64
    }

    /// The accuracy of every setting on features of `source`, found on `device` with about `memory` bytes for features;
    /// `progress` hears how many images more were looked at. The bank passes by once for as many queries as fit.
    ///
    /// # Errors
    /// Damaged records; features that are not finite; faults of the device.
    pub fn evaluate(
        &self,
        source: &mut dyn FeatureSource,
        device: &Device,
        memory: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SweepResult> {
        let (shape, _) = self.passes(source.dim(), memory);
        let mut search = Search::new(shape, device)?;
        let mut votes = Vec::with_capacity(self.queries.len());
        for first in (0..self.queries.len()).step_by(shape.queries) {
            let records = first..self.queries.len().min(first + shape.queries);
            let mut rows = Vec::with_capacity(records.len() * shape.dim);
            source.centres(self.queries, &mut records.clone(), &mut |seen, features| {
                rows.extend_from_slice(features);
                progress(seen.len() as u64);
                Ok(())
            })?;
            search.start(&rows, first)?;
            drop(rows);
            source.centres(self.bank, &mut (0..self.bank.len()), &mut |seen, features| {
                progress(seen.len() as u64);
                search.push(features)
            })?;
            votes.extend(self.votes(&search.finish()?, &self.query_labels[records]));
        }
        Ok(self.count(&votes))
    }

    /// The votes of a pass: by query, then by setting.
    fn votes(&self, nearest: &[Neighbour], labels: &[u32]) -> Vec<Vec<Vote>> {
        let classes = self.bank.classes().len();
        let queries = nearest.par_chunks(self.sweep.most_neighbours()).zip(labels);
        queries.map(|(nearest, &label)| self.sweep.vote(nearest, &self.bank_labels, classes, label)).collect()
    }

    fn count(&self, votes: &[Vec<Vote>]) -> SweepResult {
        let of_setting = |(place, (k, temperature)): (usize, (usize, f64))| {
            let within = |top: usize| {
                votes.iter().filter(|votes| votes[place].rank.is_some_and(|rank| rank < top)).count() as u64
            };
            let right = votes.iter().zip(&self.query_labels).filter(|(v, label)| v[place].prediction == **label);
            let accuracy = Accuracy::of([right.count() as u64, within(5)], votes.len());
            Setting { k, temperature, accuracy }
        };
        let settings: Vec<Setting> = self.sweep.settings().enumerate().map(of_setting).collect();
        let better = |best: usize, i: usize| settings[i].accuracy.top1 > settings[best].accuracy.top1;
        let best = (1..settings.len()).fold(0, |best, i| if better(best, i) { i } else { best });
        let predictions: Vec<Vec<u32>> =
            (0..settings.len()).map(|place| votes.iter().map(|votes| votes[place].prediction).collect()).collect();
        let confusion = Confusion::of(&self.query_labels, &predictions[best], self.bank.classes().len());
        SweepResult { settings, best, predictions, confusion }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_add_up_over_k_and_zero_votes_are_no_place_among_five() {
        let sweep = Sweep::new(&[3, 1, 3], &[0.1, 1.0]).unwrap();
        assert_eq!(Vec::from_iter(sweep.settings()), [(1, 0.1), (1, 1.0), (3, 0.1), (3, 1.0)]);
        // The nearest is of class 2, two of class 1 come close behind it.
        let nearest = [(0.9, 4), (0.8, 0), (0.7, 1)].map(|(cosine, row)| Neighbour::new(cosine, row));
        let votes = sweep.vote(&nearest, &[1, 1, 0, 0, 2], 4, 1);
        assert_eq!(votes.iter().map(|v| v.prediction).collect::<Vec<_>>(), [2, 2, 2, 1]);
        assert_eq!(votes.iter().map(|v| v.rank).collect::<Vec<_>>(), [None, None, Some(1), Some(0)]);
    }

    #[test]
    fn senseless_settings_are_named() {
        let message = |ks: &[usize], ts: &[f64]| Sweep::new(ks, ts).unwrap_err().to_string();
        assert!(message(&[5, 0], &[0.1]).contains("--k: expected 1 to 256 neighbours, got 0"));
        assert!(message(&[257], &[0.1]).contains("--k: expected 1 to 256 neighbours, got 257"));
        assert!(message(&[5], &[0.1, f64::NAN]).contains("--temperature: expected 0.003 or more, got NaN"));
        assert!(message(&[5], &[0.0]).contains("--temperature"));
        assert!(message(&[], &[0.1]).contains("--k: expected at least one value"));
    }

    #[test]
    fn memory_bounds_the_queries_of_a_pass() {
        let of = |memory| SearchShape::within(memory, 50_000, 2048, 200).queries;
        assert_eq!((of(0), of(usize::MAX)), (1, 50_000));
        assert_eq!(of(1 << 28), (1 << 28) / (2 * 2048 * 4 + 200 * 8 + 64 * 4));
    }
}
