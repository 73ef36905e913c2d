//! The threads that fill a slot together: what a batch holds is planned from the index, then every image is made by one
//! of them.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rayon::prelude::*;

use super::batch::{Slot, StoredImage};
use super::config::{LoaderConfig, Output, Position};
use super::stats::Counters;
use crate::data::augment::{Augmenter, ViewParams};
use crate::data::dataset::Dataset;
use crate::data::decode::Decoder;
use crate::data::format::{Codec, Entry};
use crate::data::reader::decode;
use crate::error::{Error, Result};

/// Channels that a JPEG decodes to, whatever it holds.
const JPEG_CHANNELS: usize = 3;

pub(super) struct Workers {
    dataset: Arc<Dataset>,
    config: LoaderConfig,
    pool: rayon::ThreadPool,
    /// One for each thread of the pool.
    tools: Vec<Mutex<Tools>>,
    counters: Arc<Counters>,
    stop: Arc<AtomicBool>,
}

/// What a thread has of its own.
struct Tools {
    bytes: Vec<u8>,
    decoder: Decoder,
    /// Where views are made.
    augmenter: Option<Augmenter>,
}

/// An image to be made.
struct Task<'a> {
    sample: u64,
    planned: StoredImage,
    params: &'a [ViewParams; 2],
    out: Out<'a>,
}

/// Where an image goes.
enum Out<'a> {
    Views([Option<&'a mut [f32]>; 2]),
    Pixels(&'a mut [u8]),
}

impl Workers {
    pub fn new(
        dataset: Arc<Dataset>,
        config: LoaderConfig,
        counters: Arc<Counters>,
        stop: Arc<AtomicBool>,
    ) -> Result<Workers> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(config.workers)
            .thread_name(|i| format!("loader-{i}"))
            .build()
            .map_err(super::no_thread)?;
        let tools = || {
            let augmenter = (config.output != Output::Records).then(|| Augmenter::new(&config.augment)).transpose()?;
            Ok(Mutex::new(Tools { bytes: Vec::new(), decoder: Decoder::default(), augmenter }))
        };
        let tools = (0..config.workers).map(|_| tools()).collect::<Result<_>>()?;
        Ok(Workers { dataset, config, pool, tools, counters, stop })
    }

    /// Makes the batch at `position`.
    pub fn fill(&self, position: Position, slot: &mut Slot) -> Result<()> {
        self.plan(position, slot)?;
        let tasks = self.tasks(slot)?;
        self.pool.install(|| {
            tasks.into_par_iter().try_for_each(|task| match self.stop.load(Ordering::Relaxed) {
                true => Ok(()), // The batch will not be delivered.
                false => self.guarded(task),
            })
        })
    }

    /// Which images the batch has, and what is drawn for them.
    fn plan(&self, position: Position, slot: &mut Slot) -> Result<()> {
        let LoaderConfig { augment, seed, .. } = &self.config;
        let order = self.config.order(self.dataset.len(), position.epoch);
        slot.sample_ids.clear();
        slot.sample_ids.extend(self.config.places(position.step).map(|place| order.at(place)));
        slot.labels.clear();
        slot.images.clear();
        slot.params.clear();
        for &sample in &slot.sample_ids {
            let entry = self.dataset.entry(sample as usize)?;
            let (width, height) = (entry.original_width.into(), entry.original_height.into());
            let draw = |view| ViewParams::draw(augment, *seed, position.epoch, sample, view, width, height);
            slot.labels.push(entry.label());
            slot.images.push(StoredImage::planned(&entry));
            slot.params.push([draw(0), draw(1)]);
        }
        Ok(())
    }

    /// Cuts the memory of the slot into that of its images.
    fn tasks<'a>(&self, slot: &'a mut Slot) -> Result<Vec<Task<'a>>> {
        if self.config.output == Output::Records {
            slot.place_images()?;
        }
        let len = self.config.augment.view_len();
        let Slot { views, pixels, images, params, sample_ids, .. } = slot;
        let first_views = (images.len() * len).min(views.len());
        let (views_1, views_2) = views.split_at_mut(first_views);
        let (mut views_1, mut views_2) = (views_1.chunks_exact_mut(len), views_2.chunks_exact_mut(len));
        let mut pixels = &mut pixels[..];
        // Of views and pixels one is empty.
        let mut out = |image: &StoredImage| match (views_1.next(), views_2.next()) {
            (Some(view_1), view_2) => Out::Views([Some(view_1), view_2]),
            (None, _) => {
                let (own, rest) = std::mem::take(&mut pixels).split_at_mut(image.len());
                pixels = rest;
                Out::Pixels(own)
            }
        };
        let tasks = images.iter().zip(params).zip(sample_ids);
        let task = |((planned, params), sample): ((&StoredImage, &'a mut _), &mut u64)| Task {
            sample: *sample,
            planned: *planned,
            params,
            out: out(planned),
        };
        Ok(tasks.map(task).collect())
    }

    /// Makes an image; a panic is an error that says at which.
    fn guarded(&self, task: Task) -> Result<()> {
        let sample = task.sample;
        guard(&self.dataset, sample, || {
            let thread = rayon::current_thread_index().unwrap_or(0);
            let mut tools = self.tools[thread].lock().unwrap_or_else(PoisonError::into_inner);
            self.make(task, &mut tools)
        })
    }

    fn make(&self, Task { sample, planned, params, out }: Task, tools: &mut Tools) -> Result<()> {
        let fault = |what| Error::format(self.dataset.path(), None, format!("record {sample}: {what}"));
        let start = Instant::now();
        let record = self.dataset.record(sample as usize, &mut tools.bytes)?;
        let fetched = Instant::now();
        let image = decode(&record, &mut tools.decoder).map_err(fault)?;
        let decoded = Instant::now();
        // The index lies on disk, where it may have changed since the batch was planned.
        let original = (planned.original_width as u32, planned.original_height as u32);
        if image.original_size() != original || image.pixels().len() != planned.len() {
            return Err(fault("its size has changed while it was read".into()));
        }
        match (out, &mut tools.augmenter) {
            (Out::Pixels(out), _) => out.copy_from_slice(image.pixels()),
            (Out::Views(views), Some(augmenter)) => {
                let views = views.into_iter().flatten().zip(params);
                views.for_each(|(view, params)| augmenter.view(&image, params, view));
            }
            (Out::Views(_), None) => unreachable!("views are made by an augmenter"),
        }
        self.counters.add(record.bytes.len(), [start, fetched, decoded, Instant::now()]);
        Ok(())
    }
}

impl StoredImage {
    /// What the index says of an image.
    pub(super) fn planned(entry: &Entry) -> StoredImage {
        StoredImage {
            offset: 0,
            width: entry.width.into(),
            height: entry.height.into(),
            channels: if entry.codec() == Some(Codec::Jpeg) { JPEG_CHANNELS } else { entry.channels.into() },
            original_width: entry.original_width.into(),
            original_height: entry.original_height.into(),
        }
    }
}

/// Runs the work on a record; a panic becomes an error that names it.
pub(super) fn guard(dataset: &Dataset, sample: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = format!("record {sample} of {}: {}", dataset.path().display(), message(&*panic));
        Err(Error::Internal { thread: "loader".into(), message })
    })
}

/// What a panic says.
pub(super) fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("panicked")
}
