//! Batches of augmented views, made ahead of the consumer: a ring of preallocated slots, filled by background threads.
//! What is in a batch depends on (seed, epoch, step) alone, so these three are all a resumed run needs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::augment::{AugmentConfig, Augmenter, ViewParams};
use crate::data::dataset::Dataset;
use crate::data::order::EpochOrder;
use crate::data::reader::ImageReader;
use crate::error::{Error, Result};

/// How many samples ahead the kernel is asked to read.
const READ_AHEAD: u64 = 64;

/// What a loader makes and with what means.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderConfig {
    /// Images in a batch; each gives two views.
    pub batch: usize,
    /// Seed of the order and of the augmentation.
    pub seed: u64,
    /// The distribution of the views.
    pub augment: AugmentConfig,
    /// Threads that make views.
    pub workers: usize,
    /// Batches in memory: at least one in use and one in the making.
    pub slots: usize,
    /// Number of epochs after which no batch is made; `None` goes on for ever.
    pub epochs: Option<u32>,
}

impl LoaderConfig {
    /// Bytes of the ring.
    pub fn memory(&self) -> usize {
        self.slots * self.views_len() * size_of::<f32>()
    }

    /// Number of values in both views of a batch.
    fn views_len(&self) -> usize {
        2 * self.batch * self.augment.view_len()
    }

    fn validate(&self, dataset: &Dataset) -> Result<()> {
        self.augment.validate()?;
        if self.batch == 0 {
            return Err(Error::config("--batch", "expected at least 1 image, got 0"));
        }
        if self.batch > dataset.len() {
            let (path, images) = (dataset.path().display(), dataset.len());
            let what = format!("{path} has {images} images, fewer than a batch of {}", self.batch);
            return Err(Error::config("--batch", what).with_hint(format!("--batch {images} or less, or more images")));
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
    fn next(self, steps_per_epoch: u64) -> Position {
        match self.step + 1 < steps_per_epoch {
            true => Position { epoch: self.epoch, step: self.step + 1 },
            false => Position { epoch: self.epoch + 1, step: 0 },
        }
    }
}

/// The memory of one batch.
#[derive(Debug, Default)]
struct Slot {
    views: Vec<f32>,
    labels: Vec<Option<u32>>,
    sample_ids: Vec<u64>,
}

impl Slot {
    fn allocate(config: &LoaderConfig) -> Result<Slot> {
        let mut views = Vec::new();
        if views.try_reserve_exact(config.views_len()).is_err() {
            let (slots, total) = (config.slots, config.memory() >> 20);
            let what = format!("there is no memory for {slots} batches of {} images ({total} MiB)", config.batch);
            let hint = Some("lower --batch or --loader-slots".into());
            return Err(Error::Unsupported { what, hint });
        }
        views.resize(config.views_len(), 0.0);
        Ok(Slot { views, labels: vec![None; config.batch], sample_ids: vec![0; config.batch] })
    }
}

/// The way of slots back to the producer. `None` tells it to stop.
#[derive(Debug)]
struct Return {
    slots: Sender<Option<Slot>>,
    lent: AtomicUsize,
}

/// Two views of some images. Dropping it gives its memory back to the loader.
#[derive(Debug)]
pub struct Batch {
    /// Which batch this is.
    pub position: Position,
    /// How long the consumer waited for it.
    pub wait: Duration,
    slot: Slot,
    owner: Arc<Return>,
}

impl Batch {
    /// `[2 x batch][size][size][3]`: the first view of every image, then the second of every image, in the same order.
    pub fn views(&self) -> &[f32] {
        &self.slot.views
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

/// A batch, or why there is none.
type Filled = Result<(Position, Slot)>;

/// Makes batches in the background, in order, without end or up to the last epoch.
#[derive(Debug)]
pub struct Loader {
    filled: Receiver<Filled>,
    owner: Arc<Return>,
    stop: Arc<AtomicBool>,
    producer: Option<JoinHandle<()>>,
    slots: usize,
    steps_per_epoch: u64,
}

impl Loader {
    /// Starts making batches from `position` on. A step just past the end of an epoch is the start of the next.
    ///
    /// # Errors
    /// [`Error::Config`] when the configuration does not fit the dataset or `position` lies outside an epoch,
    /// [`Error::Unsupported`] when there is no memory or no thread for it.
    pub fn start(dataset: Arc<Dataset>, config: LoaderConfig, position: Position) -> Result<Loader> {
        config.validate(&dataset)?;
        let steps = steps_per_epoch(dataset.len(), config.batch);
        let position = match position {
            Position { epoch, step } if step == steps => Position { epoch: epoch + 1, step: 0 },
            Position { step, .. } if step > steps => {
                let what = format!("step {step} lies outside an epoch of {steps} steps");
                let hint = "the run was started with another --batch or another dataset";
                return Err(Error::config("--resume", what).with_hint(hint));
            }
            inside => inside,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let slots = (0..config.slots).map(|_| Slot::allocate(&config)).collect::<Result<Vec<_>>>()?;
        let epochs = config.epochs;
        let positions = std::iter::successors(Some(position), move |last| Some(last.next(steps)))
            .take_while(move |position| epochs.is_none_or(|epochs| position.epoch < epochs));
        let workers = Workers::new(dataset, config, stop.clone())?;
        Loader::spawn(slots, steps, positions, stop, move |position, slot| workers.fill(position, slot))
    }

    /// Starts a thread that fills `slots` with batch after batch.
    fn spawn(
        slots: Vec<Slot>,
        steps_per_epoch: u64,
        positions: impl Iterator<Item = Position> + Send + 'static,
        stop: Arc<AtomicBool>,
        fill: impl Fn(Position, &mut Slot) -> Result<()> + Send + 'static,
    ) -> Result<Loader> {
        let (empty_sender, empty) = channel();
        let (filled_sender, filled) = channel();
        let count = slots.len();
        for slot in slots {
            // Cannot fail: the receiver is still here.
            let _ = empty_sender.send(Some(slot));
        }
        let owner = Arc::new(Return { slots: empty_sender, lent: AtomicUsize::new(0) });
        let stopped = stop.clone();
        let producer = std::thread::Builder::new()
            .name("loader".into())
            .spawn(move || produce(positions, &empty, &filled_sender, &stopped, fill))
            .map_err(no_thread)?;
        Ok(Loader { filled, owner, stop, producer: Some(producer), slots: count, steps_per_epoch })
    }

    /// Batches in an epoch. Images that do not fill a batch are left out; which ones changes with every epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    /// The next batch; waits until it is made.
    ///
    /// # Errors
    /// What went wrong while the batch was made (batches before it are delivered), and [`Error::Internal`] when there
    /// cannot be another batch: after an error, after the last epoch, or while every slot is held by the caller.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let internal = |message: &str| Error::Internal { thread: "loader".into(), message: message.into() };
        if self.owner.lent.load(Ordering::Relaxed) == self.slots {
            return Err(internal("every slot is still in use by the consumer"));
        }
        let start = Instant::now();
        let filled = self.filled.recv().map_err(|_| internal("a batch was asked for after the last one"))?;
        let (position, slot) = filled?;
        self.owner.lent.fetch_add(1, Ordering::Relaxed);
        Ok(Batch { position, wait: start.elapsed(), slot, owner: self.owner.clone() })
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.owner.slots.send(None);
        if let Some(producer) = self.producer.take() {
            // Its panics were delivered as errors.
            let _ = producer.join();
        }
    }
}

/// Batches in an epoch of `images` images.
pub fn steps_per_epoch(images: usize, batch: usize) -> u64 {
    (images / batch.max(1)) as u64
}

/// The body of the producer thread: ends when told to stop, after the last position, or after a fault.
fn produce(
    positions: impl Iterator<Item = Position>,
    empty: &Receiver<Option<Slot>>,
    filled: &Sender<Filled>,
    stop: &AtomicBool,
    fill: impl Fn(Position, &mut Slot) -> Result<()>,
) {
    for position in positions {
        let Ok(Some(mut slot)) = empty.recv() else { return };
        let result = catch_unwind(AssertUnwindSafe(|| fill(position, &mut slot)));
        let result = result.unwrap_or_else(|panic| Err(panicked(&*panic)));
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let failed = result.is_err();
        if filled.send(result.map(|()| (position, slot))).is_err() || failed {
            return;
        }
    }
}

/// What a thread keeps from image to image.
struct Worker {
    reader: ImageReader,
    augmenter: Augmenter,
}

/// The threads that fill a slot together.
struct Workers {
    dataset: Arc<Dataset>,
    config: LoaderConfig,
    pool: rayon::ThreadPool,
    /// One for each thread of the pool.
    workers: Vec<Mutex<Worker>>,
    stop: Arc<AtomicBool>,
}

impl Workers {
    fn new(dataset: Arc<Dataset>, config: LoaderConfig, stop: Arc<AtomicBool>) -> Result<Workers> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(config.workers)
            .thread_name(|i| format!("loader-{i}"))
            .build()
            .map_err(no_thread)?;
        let worker =
            |_| Ok(Mutex::new(Worker { reader: ImageReader::default(), augmenter: Augmenter::new(&config.augment)? }));
        let workers = (0..config.workers).map(worker).collect::<Result<Vec<_>>>()?;
        Ok(Workers { dataset, config, pool, workers, stop })
    }

    fn fill(&self, position: Position, slot: &mut Slot) -> Result<()> {
        let view_len = self.config.augment.view_len();
        let order = EpochOrder::new(self.dataset.len() as u64, self.config.seed, position.epoch);
        let first = position.step * self.config.batch as u64;
        let (views_1, views_2) = slot.views.split_at_mut(self.config.batch * view_len);
        self.pool.install(|| {
            views_1
                .par_chunks_exact_mut(view_len)
                .zip(views_2.par_chunks_exact_mut(view_len))
                .zip(&mut slot.labels)
                .zip(&mut slot.sample_ids)
                .enumerate()
                .try_for_each(|(i, (((view_1, view_2), label), sample_id))| {
                    if self.stop.load(Ordering::Relaxed) {
                        return Ok(()); // The batch will not be delivered.
                    }
                    let place = first + i as u64;
                    self.read_ahead(&order, position.epoch, place + READ_AHEAD);
                    *sample_id = order.at(place);
                    *label = self.make_views(position.epoch, *sample_id, [view_1, view_2])?;
                    Ok(())
                })
        })
    }

    /// Makes both views of a sample; gives its label.
    fn make_views(&self, epoch: u32, sample: u64, views: [&mut [f32]; 2]) -> Result<Option<u32>> {
        let LoaderConfig { seed, augment, .. } = &self.config;
        let thread = rayon::current_thread_index().unwrap_or(0);
        let mut worker = self.workers[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let Worker { reader, augmenter } = &mut *worker;
        let (image, label) = reader.read(&self.dataset, sample as usize)?;
        let (width, height) = image.original_size();
        for (view, out) in views.into_iter().enumerate() {
            let params = ViewParams::draw(augment, *seed, epoch, sample, view as u32, width, height);
            augmenter.view(&image, &params, out);
        }
        Ok(label)
    }

    /// Asks for the sample at `place` of the epoch; places past its end belong to the next one.
    fn read_ahead(&self, order: &EpochOrder, epoch: u32, place: u64) {
        let LoaderConfig { batch, seed, .. } = self.config;
        let len = steps_per_epoch(self.dataset.len(), batch) * batch as u64;
        let sample = match place.checked_sub(len) {
            None => order.at(place),
            Some(place) => EpochOrder::new(self.dataset.len() as u64, seed, epoch + 1).at(place % len),
        };
        self.dataset.prefetch(sample as usize);
    }
}

fn no_thread(error: impl std::fmt::Display) -> Error {
    Error::Unsupported { what: format!("cannot start the loader's threads: {error}"), hint: None }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Error::Internal { thread: "loader".into(), message: text.unwrap_or("panicked").into() }
}

#[cfg(test)]
#[path = "loader_tests.rs"]
mod tests;
