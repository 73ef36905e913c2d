//! The memory of a batch, and how the consumer sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::config::{LoaderConfig, Output, Position};
use crate::data::augment::ViewParams;
use crate::error::{Error, Result};

/// Where the pixels of an image lie in [`Batch::pixels`], and the size of the original that its views were drawn for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoredImage {
    /// First byte.
    pub offset: usize,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Width of the original, in whose pixels crops are given.
    pub original_width: usize,
    /// Height of the original.
    pub original_height: usize,
}

impl StoredImage {
    /// Bytes of the pixels.
    pub fn len(&self) -> usize {
        self.width * self.height * self.channels
    }

    /// Whether there are no pixels, which no dataset allows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The memory of one batch. Of views and pixels one is empty, by [`Output`].
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub views: Vec<f32>,
    pub pixels: Vec<u8>,
    pub images: Vec<StoredImage>,
    pub params: Vec<[ViewParams; 2]>,
    pub labels: Vec<Option<u32>>,
    pub sample_ids: Vec<u64>,
}

impl Slot {
    /// Takes the memory that is needed whatever the images.
    pub fn allocate(config: &LoaderConfig) -> Result<Slot> {
        let images = config.local_batch();
        let mut slot = Slot { labels: vec![None; images], sample_ids: vec![0; images], ..Slot::default() };
        if config.output != Output::Records {
            grow(&mut slot.views, config.views_len(), images)?;
        }
        Ok(slot)
    }

    /// Makes room for the pixels of `self.images`, which lie one after the other.
    pub fn place_images(&mut self) -> Result<()> {
        let mut offset = 0;
        for image in &mut self.images {
            image.offset = offset;
            offset += image.len();
        }
        let images = self.images.len();
        grow(&mut self.pixels, offset, images)
    }
}

/// Gives `values` the length `len`. Memory that was taken stays taken: the next batch will want it.
fn grow<T: Copy + Default>(values: &mut Vec<T>, len: usize, images: usize) -> Result<()> {
    if values.try_reserve_exact(len.saturating_sub(values.len())).is_err() {
        let what = format!("there is no memory for a batch of {images} images ({} MiB)", (len * size_of::<T>()) >> 20);
        return Err(Error::Unsupported { what, hint: Some("lower --batch".into()) });
    }
    values.resize(len, T::default());
    Ok(())
}

/// The way of slots back to the producer. `None` tells it to stop.
#[derive(Debug)]
pub(super) struct Return {
    pub slots: Sender<Option<Slot>>,
    pub lent: AtomicUsize,
}

/// The images of a step. Dropping it gives its memory back to the loader.
#[derive(Debug)]
pub struct Batch {
    /// Which batch this is.
    pub position: Position,
    /// How long the consumer waited for it.
    pub wait: Duration,
    pub(super) slot: Slot,
    pub(super) owner: Arc<Return>,
}

impl Batch {
    /// `[2 x batch][size][size][3]`: the first view of every image, then the second of every image, in the same order.
    /// Under [`Output::FirstViews`] the first half of that, empty under [`Output::Records`].
    pub fn views(&self) -> &[f32] {
        &self.slot.views
    }

    /// The stored pixels of every image, without gaps: `[batch][height][width][channels]` when all have the same size,
    /// else as [`Batch::images`] says. Empty but under [`Output::Records`].
    pub fn pixels(&self) -> &[u8] {
        &self.slot.pixels
    }

    /// Size of every image, and its place in [`Batch::pixels`] (0 where there are none).
    pub fn images(&self) -> &[StoredImage] {
        &self.slot.images
    }

    /// What was drawn for the two views of every image.
    pub fn params(&self) -> &[[ViewParams; 2]] {
        &self.slot.params
    }

    /// The label of every image, where it has one.
    pub fn labels(&self) -> &[Option<u32>] {
        &self.slot.labels
    }

    /// The number in the dataset of every image.
    pub fn sample_ids(&self) -> &[u64] {
        &self.slot.sample_ids
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.owner.lent.fetch_sub(1, Ordering::Relaxed);
        // Without a producer there is nobody to give it back to.
        let _ = self.owner.slots.send(Some(std::mem::take(&mut self.slot)));
    }
}
