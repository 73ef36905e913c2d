//! Linear evaluation: classifiers on features of a frozen backbone, for many learning rates at once.
//!
//! A part of the training set, balanced over the classes, is held out. All heads are trained on the rest, compared on the part
//! that was held out, and the best of them, as it is, is measured on the test set.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::mapped::available_memory;
use crate::data::order::EpochOrder;
use crate::data::views::View;
use crate::error::{Error, Result};
use crate::eval::features::{FeatureExtractor, FeatureSource, check_same_classes, labels};
use crate::eval::heads::{Head, HeadBank, HeadReport, HeadShape, Scorer};
use crate::eval::scores::Accuracy;
use crate::eval::split::{Split, draw_balanced};
use crate::exec::Device;
use crate::tensor::HostTensor;
use crate::train::checkpoint::Checkpoints;
use crate::train::schedule::Schedule;

/// Rows that finished heads look at in one step.
const SCORED_ROWS: usize = 1024;
/// Steps that a device may have before it.
const IN_FLIGHT: usize = 1;
/// States kept in a run directory.
const KEPT_STATES: usize = 2;

/// What decides the result besides network and data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinearConfig {
    /// The heads.
    pub heads: Vec<Head>,
    /// Epochs.
    pub epochs: u64,
    /// Most features of a step. Steps are of equal size: as few as do with so many features each.
    pub batch: usize,
    /// Share of the training images that is held out.
    pub holdout: f64,
    /// Seed of the split, the order, the views and the first weights.
    pub seed: u64,
    /// Train on the features of each image's centre, computed once, instead of those of a new view in every epoch.
    pub cached: bool,
    /// The views.
    pub augment: AugmentConfig,
}

impl LinearConfig {
    fn validate(&self) -> Result<()> {
        for (option, value) in [("--epochs", self.epochs), ("--batch", self.batch as u64)] {
            if value == 0 {
                return Err(Error::config(option, "expected at least 1, got 0"));
            }
        }
        if u32::try_from(self.epochs).is_err() {
            return Err(Error::config("--epochs", format!("expected at most {}, got {}", u32::MAX, self.epochs)));
        }
        self.augment.validate()
    }
}

/// The mean of an epoch of one head.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EpochReport {
    /// Mean loss; none when it was not finite.
    pub loss: Option<f64>,
    /// Share of right answers, each before the step that learns from it.
    pub top1: f64,
}

/// What a run directory keeps besides tensors.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    settings: serde_json::Value,
    /// By epoch, then by head.
    history: Vec<Vec<EpochReport>>,
}

/// A head at the end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadResult {
    /// Which.
    #[serde(flatten)]
    pub head: Head,
    /// Whether its loss or its weights are no finite numbers any more.
    pub diverged: bool,
    /// Its last epoch.
    pub train: EpochReport,
    /// On the images that were held out.
    pub holdout: Option<Accuracy>,
}

/// What linear evaluation found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinearResult {
    /// All heads, in the order of the configuration.
    pub heads: Vec<HeadResult>,
    /// The place of the one that is best on the images that were held out, the first of equal ones; none when all diverged.
    pub best: Option<usize>,
    /// Its accuracy on the test set.
    pub test: Option<Accuracy>,
    /// Images that heads were trained on, that were held out, and of the test set.
    pub images: [usize; 3],
    /// Features of a step.
    pub batch: usize,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// By epoch, then by head.
    pub history: Vec<Vec<EpochReport>>,
}

/// Where the state is kept after every epoch.
#[derive(Debug, Clone, Copy)]
pub struct Keep<'a> {
    /// The directory.
    pub folder: &'a Path,
    /// Go on with what is there, instead of insisting that there is nothing.
    pub resume: bool,
}

/// A linear evaluation.
#[derive(Debug)]
pub struct LinearTask<'a> {
    config: &'a LinearConfig,
    train: &'a Dataset,
    train_labels: Vec<u32>,
    test: &'a Dataset,
    test_labels: Vec<u32>,
    split: Split,
    shape: HeadShape,
    schedule: Schedule,
}

impl<'a> LinearTask<'a> {
    /// Checks the configuration against both datasets; `dim` is the length of a feature.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Format`] naming what does not fit.
    pub fn new(config: &'a LinearConfig, train: &'a Dataset, test: &'a Dataset, dim: usize) -> Result<LinearTask<'a>> {
        config.validate()?;
        check_same_classes(test, train)?;
        let (train_labels, test_labels) = (labels(train)?, labels(test)?);
        let split = match config.holdout {
            0.0 if config.heads.len() == 1 => Split { rest: (0..train.len()).collect(), drawn: Vec::new() },
            0.0 => {
                let what = format!("with 0 there is nothing to choose the best of {} heads by", config.heads.len());
                return Err(Error::config("--holdout", what).with_hint("name one --lr and one --optimizer"));
            }
            holdout => draw_balanced("--holdout", &train_labels, holdout, config.seed)?,
        };
        if config.holdout > 0.0 && split.drawn.is_empty() {
            let what = format!("no class of {} has two images, so none can be held out", train.path().display());
            return Err(Error::config("--holdout", what));
        }
        let steps_per_epoch = split.rest.len().div_ceil(config.batch);
        let shape = HeadShape { batch: split.rest.len() / steps_per_epoch, dim, classes: train.classes().len() };
        // The factor of every learning rate: a schedule from 1 down to 0, epoch by epoch.
        let (batch, base_lr, steps_per_epoch) = (256, 1.0, steps_per_epoch as u64);
        let (warmup_epochs, per_step, fix_predictor_lr) = (0, false, false);
        let epochs = config.epochs;
        let schedule = Schedule { base_lr, batch, epochs, steps_per_epoch, warmup_epochs, per_step, fix_predictor_lr };
        schedule.validate()?;
        Ok(LinearTask { config, train, train_labels, test, test_labels, split, shape, schedule })
    }

    /// The sizes of a step.
    pub fn shape(&self) -> HeadShape {
        self.shape
    }

    /// Images that a run from epoch `epoch` on looks at.
    pub fn images(&self, epoch: u64) -> u64 {
        let once = if self.config.cached { self.split.rest.len() } else { 0 };
        let images = once + self.split.drawn.len() + self.test.len();
        images as u64 + (self.schedule.epochs - epoch.min(self.schedule.epochs)) * self.images_per_epoch()
    }

    fn images_per_epoch(&self) -> u64 {
        self.schedule.steps_per_epoch * self.shape.batch as u64
    }

    /// Trains all heads and measures them; `progress` hears how many images more were looked at. `None` when `interrupted` said
    /// so: the epochs that were done are in the directory of `keep`.
    ///
    /// # Errors
    /// Damaged records; a directory that holds another run, or nothing to go on with; faults of the device.
    pub fn run(
        &self,
        extractor: &mut FeatureExtractor,
        device: &Device,
        keep: Option<Keep<'_>>,
        progress: &mut dyn FnMut(u64),
        interrupted: &dyn Fn() -> bool,
    ) -> Result<Option<LinearResult>> {
        let mut bank = HeadBank::new(&self.config.heads, self.shape, self.config.seed, device)?;
        let states = keep.map(|keep| Checkpoints::new(keep.folder, KEPT_STATES)).transpose()?;
        let settings = self.settings(extractor)?;
        let mut history = match (keep, &states) {
            (Some(keep), Some(states)) => self.restore(keep, states, &settings, &mut bank)?,
            _ => Vec::new(),
        };
        let done = history.len() as u64;
        progress(self.images(0) - self.images(done));
        let cache = match self.config.cached && done < self.config.epochs {
            true => Some(self.cache(extractor, progress)?),
            false => None,
        };
        for epoch in done..self.config.epochs {
            bank.scale_learning_rates(self.schedule.lr(epoch * self.schedule.steps_per_epoch))?;
            let mut pass = Pass::new(self, &mut bank, progress, interrupted);
            match &cache {
                Some(cache) => self.cached_epoch(epoch as u32, cache, &mut pass)?,
                None => self.drawn_epoch(epoch as u32, extractor, &mut pass)?,
            }
            let Some(report) = pass.finish()? else { return Ok(None) };
            history.push(report);
            if let Some(states) = &states {
                let state = State { settings: settings.clone(), history: history.clone() };
                states.save(epoch + 1, &bank.tensors()?, &state)?;
            }
        }
        self.measure(extractor, device, &bank, history, progress).map(Some)
    }

    /// What must be the same for a run to go on.
    fn settings(&self, extractor: &FeatureExtractor) -> Result<serde_json::Value> {
        let internal = |e: serde_json::Error| Error::Internal { thread: "settings".into(), message: e.to_string() };
        let mut settings = serde_json::to_value(self.config).map_err(internal)?;
        settings["network"] = extractor.fingerprint()?.into();
        settings["train"] = self.train.uuid().to_string().into();
        // As it is read back: numbers that JSON writes alike are alike.
        serde_json::from_str(&settings.to_string()).map_err(internal)
    }

    /// Puts back what an earlier run left, and returns its epochs.
    fn restore(
        &self,
        keep: Keep<'_>,
        states: &Checkpoints,
        settings: &serde_json::Value,
        bank: &mut HeadBank,
    ) -> Result<Vec<Vec<EpochReport>>> {
        let folder = keep.folder.display();
        let Some(mut found) = states.latest::<State>()? else { return Ok(Vec::new()) };
        if !keep.resume {
            let what = format!("{folder} holds an evaluation already");
            return Err(Error::config("--run", what).with_hint("continue it with --resume, or name another directory"));
        }
        if let Some((name, was, is)) = first_difference(&found.state.settings, settings) {
            let what = format!("the evaluation in {folder} was begun with another {name}: {was}, now it is {is}");
            return Err(Error::config("--resume", what).with_hint("repeat the command that began it, with --resume"));
        }
        bank.restore(|name, desc| found.take(name, desc))?;
        let history = std::mem::take(&mut found.state.history);
        found.finish()?;
        Ok(history)
    }

    /// The features of the centres of all images that heads are trained on.
    fn cache(&self, extractor: &mut FeatureExtractor, progress: &mut dyn FnMut(u64)) -> Result<Vec<f32>> {
        let values = self.split.rest.len() * self.shape.dim;
        let bytes = (values * size_of::<f32>()) as u64;
        if let Some(available) = available_memory().filter(|&available| available < bytes) {
            let (needed, free) = (bytes as f64 / 1e9, available as f64 / 1e9);
            let what = format!("--cached: the features take {needed:.1} GB, {free:.1} GB are free");
            return Err(Error::Unsupported { what, hint: Some("leave out --cached".into()) });
        }
        let mut cache = Vec::with_capacity(values);
        extractor.centres(self.train, &mut self.split.rest.iter().copied(), &mut |seen, features| {
            cache.extend_from_slice(features);
            progress(seen.len() as u64);
            Ok(())
        })?;
        Ok(cache)
    }

    /// The places in the rest of the training set that an epoch visits.
    fn order(&self, epoch: u32) -> impl Iterator<Item = usize> {
        let order = EpochOrder::new(self.split.rest.len() as u64, self.config.seed, epoch);
        (0..self.images_per_epoch()).map(move |place| order.at(place) as usize)
    }

    fn cached_epoch(&self, epoch: u32, cache: &[f32], pass: &mut Pass<'_>) -> Result<()> {
        let dim = self.shape.dim;
        let places: Vec<usize> = self.order(epoch).collect();
        let mut rows = vec![0.0; self.shape.batch * dim];
        for places in places.chunks(self.shape.batch) {
            rows.par_chunks_mut(dim)
                .zip(places)
                .for_each(|(row, &place)| row.copy_from_slice(&cache[place * dim..][..dim]));
            let records: Vec<usize> = places.iter().map(|&place| self.split.rest[place]).collect();
            pass.push(&records, &rows)?;
        }
        Ok(())
    }

    fn drawn_epoch(&self, epoch: u32, extractor: &mut FeatureExtractor, pass: &mut Pass<'_>) -> Result<()> {
        let stopped = pass.interrupted;
        let mut records = self.order(epoch).map(|place| self.split.rest[place]).take_while(|_| !stopped());
        let view = View::Drawn { augment: &self.config.augment, seed: self.config.seed, epoch };
        extractor.stream(self.train, &mut records, view, &mut |records, rows| pass.push(records, rows))
    }

    /// Compares the heads, and measures the best.
    fn measure(
        &self,
        extractor: &mut FeatureExtractor,
        device: &Device,
        bank: &HeadBank,
        history: Vec<Vec<EpochReport>>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<LinearResult> {
        let weights = (0..self.config.heads.len()).map(|head| bank.weights(head)).collect::<Result<Vec<_>>>()?;
        let held_out = match self.split.drawn.is_empty() {
            true => vec![None; weights.len()],
            false => {
                let records = (self.train, &self.split.drawn[..], &self.train_labels[..]);
                self.score(extractor, device, &weights, records, progress)?.into_iter().map(Some).collect()
            }
        };
        let last = history.last().cloned().unwrap_or_default();
        let heads: Vec<HeadResult> = (self.config.heads.iter().zip(&weights).zip(last).zip(held_out))
            .map(|(((head, weights), train), holdout)| {
                let diverged = train.loss.is_none() || !weights.iter().all(finite);
                HeadResult { head: *head, diverged, train, holdout: holdout.filter(|_| !diverged) }
            })
            .collect();
        let best = best_of(&heads);
        let test = match best {
            None => None,
            Some(best) => {
                let records: Vec<usize> = (0..self.test.len()).collect();
                let records = (self.test, &records[..], &self.test_labels[..]);
                self.score(extractor, device, &weights[best..=best], records, progress)?.first().copied()
            }
        };
        Ok(LinearResult {
            heads,
            best,
            test,
            images: [self.split.rest.len(), self.split.drawn.len(), self.test.len()],
            batch: self.shape.batch,
            steps_per_epoch: self.schedule.steps_per_epoch,
            history,
        })
    }

    /// The accuracy of finished heads on the centres of some records of a dataset with these labels.
    fn score(
        &self,
        extractor: &mut FeatureExtractor,
        device: &Device,
        weights: &[[HostTensor; 2]],
        (dataset, records, labels): (&Dataset, &[usize], &[u32]),
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<Accuracy>> {
        let shape = HeadShape { batch: SCORED_ROWS.min(records.len()), ..self.shape };
        let mut scorer = Scorer::new(weights, shape, device)?;
        extractor.centres(dataset, &mut records.iter().copied(), &mut |seen, features| {
            progress(seen.len() as u64);
            let labels: Vec<u32> = seen.iter().map(|&record| labels[record]).collect();
            scorer.push(features, &labels)
        })?;
        Ok(scorer.finish()?.into_iter().map(|right| Accuracy::of(right, records.len())).collect())
    }
}

/// One epoch under way.
struct Pass<'p> {
    bank: &'p mut HeadBank,
    labels: &'p [u32],
    progress: &'p mut dyn FnMut(u64),
    interrupted: &'p dyn Fn() -> bool,
    steps: u64,
    /// Rows that wait for a whole batch, and their labels.
    rows: Vec<f32>,
    row_labels: Vec<u32>,
    /// By head: sums of losses and of right answers.
    sums: Vec<(f64, u64)>,
    seen_steps: u64,
    stopped: bool,
}

impl<'p> Pass<'p> {
    fn new(
        task: &'p LinearTask<'_>,
        bank: &'p mut HeadBank,
        progress: &'p mut dyn FnMut(u64),
        interrupted: &'p dyn Fn() -> bool,
    ) -> Pass<'p> {
        let (steps, sums) = (task.schedule.steps_per_epoch, vec![(0.0, 0); task.config.heads.len()]);
        let labels = &task.train_labels;
        let (rows, row_labels) = (Vec::new(), Vec::new());
        Pass { bank, labels, progress, interrupted, steps, rows, row_labels, sums, seen_steps: 0, stopped: false }
    }

    /// Takes features of some records of the training set; steps when there are enough.
    fn push(&mut self, records: &[usize], rows: &[f32]) -> Result<()> {
        let HeadShape { batch, dim, .. } = self.bank.shape();
        for (&record, row) in records.iter().zip(rows.chunks(dim)) {
            self.rows.extend_from_slice(row);
            self.row_labels.push(self.labels[record]);
            if self.row_labels.len() == batch {
                self.step()?;
            }
        }
        (self.progress)(records.len() as u64);
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        self.stopped |= (self.interrupted)();
        if !self.stopped {
            self.bank.step(&self.rows, &self.row_labels)?;
            self.collect(IN_FLIGHT)?;
        }
        self.rows.clear();
        self.row_labels.clear();
        Ok(())
    }

    fn collect(&mut self, in_flight: usize) -> Result<()> {
        while let Some(reports) = self.bank.collect(in_flight)? {
            for ((loss, right), HeadReport { loss: new, right: [top1, _] }) in self.sums.iter_mut().zip(reports) {
                *loss += new;
                *right += top1;
            }
            self.seen_steps += 1;
        }
        Ok(())
    }

    /// The means of the epoch by head; none when it was interrupted.
    fn finish(mut self) -> Result<Option<Vec<EpochReport>>> {
        self.collect(0)?;
        if self.seen_steps < self.steps {
            return Ok(None);
        }
        let images = self.steps * self.bank.shape().batch as u64;
        let mean = |&(loss, right): &(f64, u64)| EpochReport {
            loss: Some(loss / self.steps as f64).filter(|loss| loss.is_finite()),
            top1: right as f64 / images as f64,
        };
        Ok(Some(self.sums.iter().map(mean).collect()))
    }
}

fn finite(tensor: &HostTensor) -> bool {
    tensor.to_f64().iter().all(|value| value.is_finite())
}

/// The best of the heads that did not diverge, the first of equal ones; without held-out images there is one.
fn best_of(heads: &[HeadResult]) -> Option<usize> {
    let top1 = |i: usize| heads[i].holdout.map_or(0.0, |accuracy| accuracy.top1);
    let alive = (0..heads.len()).filter(|&i| !heads[i].diverged);
    alive.fold(None, |best, i| match best {
        Some(best) if top1(i) <= top1(best) => Some(best),
        _ => Some(i),
    })
}

/// The first entry in which two JSON objects differ, with both values.
fn first_difference(was: &serde_json::Value, is: &serde_json::Value) -> Option<(String, String, String)> {
    let names = is.as_object().into_iter().chain(was.as_object()).flat_map(|object| object.keys());
    let mut differing = names.filter(|name| was.get(name) != is.get(name));
    let text = |value: Option<&serde_json::Value>| value.map_or("nothing".into(), ToString::to_string);
    differing.next().map(|name| (name.clone(), text(was.get(name)), text(is.get(name))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::heads::Optimiser;

    fn head(top1: f64, diverged: bool) -> HeadResult {
        HeadResult {
            head: Head { optimiser: Optimiser::Sgd, lr: 1.0 },
            diverged,
            train: EpochReport { loss: Some(0.5), top1 },
            holdout: (!diverged).then_some(Accuracy { top1, top5: 1.0 }),
        }
    }

    #[test]
    fn the_first_of_the_best_living_heads_is_chosen() {
        assert_eq!(best_of(&[head(0.2, false), head(0.9, true), head(0.4, false), head(0.4, false)]), Some(2));
        assert_eq!(best_of(&[head(0.0, false)]), Some(0));
        assert_eq!(best_of(&[head(0.9, true)]), None);
    }

    #[test]
    fn differing_settings_are_named() {
        let of = |epochs, seed| serde_json::json!({ "epochs": epochs, "seed": seed });
        assert_eq!(first_difference(&of(3, 1), &of(3, 1)), None);
        assert_eq!(first_difference(&of(3, 1), &of(3, 2)), Some(("seed".into(), "1".into(), "2".into())));
        let (less, more) = (serde_json::json!({}), serde_json::json!({ "cached": true }));
        assert_eq!(first_difference(&less, &more), Some(("cached".into(), "nothing".into(), "true".into())));
    }
}
