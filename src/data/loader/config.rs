//! What a loader makes, and places in a training run.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use super::batch::StoredImage;
use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::order::EpochOrder;
use crate::error::{Error, Result};

/// What a batch holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Finished views, normalised.
    Views,
    /// The same of the first view of every image, and no second.
    FirstViews,
    /// The stored pixels and what was drawn for both views, for an augmentation that runs elsewhere.
    Records,
}

/// What a loader makes and with what means.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderConfig {
    /// Images in a batch, over all ranks; each gives two views.
    pub batch: usize,
    /// Seed of the order and of the augmentation.
    pub seed: u64,
    /// The distribution of the views.
    pub augment: AugmentConfig,
    /// What is made.
    pub output: Output,
    /// Records are shuffled within windows of so many, in which they are read from disk; 0: all at once.
    pub shuffle_window: u64,
    /// Which slice of every batch is made: that of rank `rank` of `world_size`.
    pub rank: usize,
    /// Ranks that share a batch. What all of them make together does not depend on it.
    pub world_size: usize,
    /// Threads that read, decode and make views.
    pub workers: usize,
    /// Batches in memory: at least one in use and one in the making.
    pub slots: usize,
    /// Number of epochs after which no batch is made; `None` goes on for ever.
    pub epochs: Option<u32>,
}

impl LoaderConfig {
    /// Images of a batch that this rank makes.
    pub fn local_batch(&self) -> usize {
        self.batch / self.world_size
    }

    /// Number of values in the views of this rank's images.
    pub(super) fn views_len(&self) -> usize {
        let views = match self.output {
            Output::Views => 2,
            Output::FirstViews => 1,
            Output::Records => 0,
        };
        views * self.local_batch() * self.augment.view_len()
    }

    /// The places in the epoch's order of the images that this rank makes at step `step`.
    pub(super) fn places(&self, step: u64) -> std::ops::Range<u64> {
        let first = step * self.batch as u64 + (self.rank * self.local_batch()) as u64;
        first..first + self.local_batch() as u64
    }

    /// The order of an epoch of `images` images.
    pub(super) fn order(&self, images: usize, epoch: u32) -> EpochOrder {
        EpochOrder::new(images as u64, self.seed, epoch).in_windows(self.shuffle_window)
    }

    pub(super) fn validate(&self, dataset: &Dataset) -> Result<()> {
        self.augment.validate()?;
        if self.batch == 0 {
            return Err(Error::config("--batch", "expected at least 1 image, got 0"));
        }
        if self.batch > dataset.len() {
            let (path, images) = (dataset.path().display(), dataset.len());
            let what = format!("{path} has {images} images, fewer than a batch of {}", self.batch);
            return Err(Error::config("--batch", what).with_hint(format!("--batch {images} or less, or more images")));
        }
        if self.world_size == 0 || !self.batch.is_multiple_of(self.world_size) {
            let what = format!("{} images cannot be shared equally by {} ranks", self.batch, self.world_size);
            return Err(Error::config("--batch", what).with_hint("make it a multiple of the number of ranks"));
        }
        if self.rank >= self.world_size {
            let what = format!("expected a rank below the number of ranks, {}, got {}", self.world_size, self.rank);
            return Err(Error::config("--rank", what));
        }
        if self.workers == 0 {
            return Err(Error::config("--workers", "expected at least 1 thread, got 0"));
        }
        if self.slots < 2 {
            let what = format!("expected at least 2 (one in use, one in the making), got {}", self.slots);
            return Err(Error::config("--loader-slots", what));
        }
        Ok(())
    }
}

/// A place in the training run: the batch that comes next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Epoch, from 0.
    pub epoch: u32,
    /// Batch within the epoch, from 0.
    pub step: u64,
}

impl Position {
    pub(super) fn next(self, steps_per_epoch: u64) -> Position {
        match self.step + 1 < steps_per_epoch {
            true => Position { epoch: self.epoch, step: self.step + 1 },
            false => Position { epoch: self.epoch + 1, step: 0 },
        }
    }

    /// The same place within an epoch of `steps_per_epoch`: the end of an epoch is the start of the next.
    pub(super) fn within(self, steps_per_epoch: u64) -> Result<Position> {
        let Position { epoch, step } = self;
        if step > steps_per_epoch {
            let what = format!("step {step} lies outside an epoch of {steps_per_epoch} steps");
            let hint = "the run was started with another --batch or another dataset";
            return Err(Error::config("--resume", what).with_hint(hint));
        }
        Ok(if step == steps_per_epoch { Position { epoch: epoch + 1, step: 0 } } else { self })
    }
}

/// What the images of any batch need under [`Output::Records`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of the pixels of a batch of the largest images.
    pub pixel_bytes: usize,
    /// The longest side of any image, in pixels.
    pub longest_side: usize,
}

impl Room {
    /// For batches of `batch` images of `dataset`.
    ///
    /// # Errors
    /// A damaged index.
    pub fn of(dataset: &Dataset, batch: usize) -> Result<Room> {
        let mut sizes = Vec::with_capacity(dataset.len());
        let mut longest_side = 0;
        for i in 0..dataset.len() {
            let image = StoredImage::planned(&dataset.entry(i)?);
            sizes.push(image.len());
            longest_side = longest_side.max(image.width).max(image.height);
        }
        let batch = batch.min(sizes.len());
        if let Some(last) = batch.checked_sub(1) {
            sizes.select_nth_unstable_by_key(last, |&bytes| Reverse(bytes));
        }
        Ok(Room { pixel_bytes: sizes[..batch].iter().sum(), longest_side })
    }
}

/// Batches in an epoch of `images` images.
pub fn steps_per_epoch(images: usize, batch: usize) -> u64 {
    (images / batch.max(1)) as u64
}
