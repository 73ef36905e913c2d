//! Batches, made ahead of the consumer: a ring of slots, filled by background threads. They hold finished views, or the
//! stored pixels with what was drawn for the views. What is in a batch depends on (seed, epoch, step) alone, so these three
//! are all a resumed run needs.

mod ahead;
mod batch;
mod config;
mod stats;
mod workers;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::data::dataset::Dataset;
use crate::error::{Error, Result};
use ahead::ReadAhead;
pub use batch::{Batch, StoredImage};
use batch::{Return, Slot};
pub use config::{LoaderConfig, Output, Position, Room, steps_per_epoch};
use stats::Counters;
pub use stats::Work;
use workers::Workers;

/// A batch, or why there is none.
type Filled = Result<(Position, Slot)>;

/// Makes batches in the background, in order, without end or up to the last epoch.
#[derive(Debug)]
pub struct Loader {
    filled: Receiver<Filled>,
    owner: Arc<Return>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    slots: usize,
    steps_per_epoch: u64,
    counters: Arc<Counters>,
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
        let position = position.within(steps)?;
        let slots = (0..config.slots).map(|_| Slot::allocate(&config)).collect::<Result<Vec<_>>>()?;
        let epochs = config.epochs;
        let positions = std::iter::successors(Some(position), move |last| Some(last.next(steps)))
            .take_while(move |position| epochs.is_none_or(|epochs| position.epoch < epochs));
        let (stop, counters) = (Arc::new(AtomicBool::new(false)), Arc::new(Counters::default()));
        let read_from = dataset.clone();
        let ask = move |sample| read_from.prefetch(sample as usize);
        let read_ahead = ReadAhead::new(dataset.len(), config.clone(), stop.clone(), ask);
        let workers = Workers::new(dataset, config, counters.clone(), stop.clone())?;
        let (reached, positions_reached) = channel();
        let fill = move |position, slot: &mut Slot| {
            // When it has ended, nothing is read ahead, which costs speed alone.
            let _ = reached.send(position);
            workers.fill(position, slot)
        };
        let mut loader = Loader::spawn(slots, positions, stop, fill)?;
        // It ends with the producer, which holds the sender.
        loader.threads.push(thread("read-ahead", move || read_ahead.run(positions_reached))?);
        (loader.steps_per_epoch, loader.counters) = (steps, counters);
        Ok(loader)
    }

    /// Starts a thread that fills `slots` with batch after batch.
    fn spawn(
        slots: Vec<Slot>,
        positions: impl Iterator<Item = Position> + Send + 'static,
        stop: Arc<AtomicBool>,
        fill: impl FnMut(Position, &mut Slot) -> Result<()> + Send + 'static,
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
        let producer = thread("loader", move || produce(positions, &empty, &filled_sender, &stopped, fill))?;
        let counters = Arc::default();
        Ok(Loader { filled, owner, stop, threads: vec![producer], slots: count, steps_per_epoch: u64::MAX, counters })
    }

    /// Batches in an epoch. Images that do not fill a batch are left out; which ones changes with every epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    /// What the workers have done so far.
    pub fn work(&self) -> Work {
        self.counters.snapshot()
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
        for thread in self.threads.drain(..) {
            // Panics of the producer were delivered as errors.
            let _ = thread.join();
        }
    }
}

/// The body of the producer thread: ends when told to stop, after the last position, or after a fault.
fn produce(
    positions: impl Iterator<Item = Position>,
    empty: &Receiver<Option<Slot>>,
    filled: &Sender<Filled>,
    stop: &AtomicBool,
    mut fill: impl FnMut(Position, &mut Slot) -> Result<()>,
) {
    for position in positions {
        let Ok(Some(mut slot)) = empty.recv() else { return };
        let result = catch_unwind(AssertUnwindSafe(|| fill(position, &mut slot))).unwrap_or_else(|panic| {
            let message = workers::message(&*panic).to_string();
            Err(Error::Internal { thread: "loader".into(), message })
        });
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let failed = result.is_err();
        if filled.send(result.map(|()| (position, slot))).is_err() || failed {
            return;
        }
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(body).map_err(no_thread)
}

fn no_thread(error: impl std::fmt::Display) -> Error {
    Error::Unsupported { what: format!("cannot start the loader's threads: {error}"), hint: None }
}

#[cfg(test)]
mod tests;
