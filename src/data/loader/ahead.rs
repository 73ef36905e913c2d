//! Asks the kernel for records before they are needed, from a thread of its own: when the queue of a slow disk is full, it
//! alone waits.

use std::iter::successors;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use super::config::{LoaderConfig, Position, steps_per_epoch};

/// Images, at least, between the one being made and the one being asked for.
pub(super) const READ_AHEAD: usize = 64;

/// Where windows are: an epoch and a place in its order.
type Place = (u32, u64);

pub(super) struct ReadAhead<Ask> {
    images: usize,
    ask: Ask,
    config: LoaderConfig,
    stop: Arc<AtomicBool>,
    steps: u64,
    /// All batches before this one were asked for.
    next_batch: Position,
    /// The start of the newest window that was asked for, and of the one after it.
    newest_window: Place,
    next_window: Place,
}

impl<Ask: FnMut(u64)> ReadAhead<Ask> {
    /// `ask` asks for one of `images` records.
    pub fn new(images: usize, config: LoaderConfig, stop: Arc<AtomicBool>, ask: Ask) -> ReadAhead<Ask> {
        let steps = steps_per_epoch(images, config.batch);
        let (next_batch, newest_window, next_window) = (Position::default(), (0, 0), (0, 0));
        ReadAhead { images, ask, config, stop, steps, next_batch, newest_window, next_window }
    }

    /// Keeps ahead of `positions`, the batches being made.
    pub fn run(mut self, positions: Receiver<Position>) {
        positions.into_iter().for_each(|position| self.keep_ahead_of(position));
    }

    /// Asks for what is wanted when the batch at `position` is being made, and was not asked for before.
    pub fn keep_ahead_of(&mut self, position: Position) {
        let batches = READ_AHEAD.div_ceil(self.config.local_batch());
        let ahead = Vec::from_iter(successors(Some(position), |p| Some(p.next(self.steps))).take(batches + 1));
        match self.config.shuffle_window {
            0 => ahead.into_iter().for_each(|position| self.ask_for_batch(position)),
            _ => self.ask_for_windows(position, ahead[batches]),
        }
    }

    fn ask_for_batch(&mut self, position: Position) {
        if position < self.next_batch || self.is_over(position.epoch) {
            return;
        }
        let order = self.config.order(self.images, position.epoch);
        self.ask_for(self.config.places(position.step).map(|place| order.at(place)));
        self.next_batch = position.next(self.steps);
    }

    /// Asks for every window that the batches from `first` to `last` touch, and for the one after them: all of it, in the
    /// order of the file.
    fn ask_for_windows(&mut self, first: Position, last: Position) {
        self.next_window = self.next_window.max((first.epoch, self.config.places(first.step).start));
        let end = (last.epoch, self.config.places(last.step).end);
        while self.newest_window < end && !self.is_over(self.next_window.0) {
            let (epoch, place) = self.next_window;
            let order = self.config.order(self.images, epoch);
            let Some((samples, next)) = order.window(place) else { return };
            self.ask_for(samples);
            self.newest_window = self.next_window;
            let used = self.steps * self.config.batch as u64;
            self.next_window = if next < used { (epoch, next) } else { (epoch + 1, 0) };
        }
    }

    fn ask_for(&mut self, samples: impl Iterator<Item = u64>) {
        samples.take_while(|_| !self.stop.load(Ordering::Relaxed)).for_each(&mut self.ask);
    }

    fn is_over(&self, epoch: u32) -> bool {
        self.config.epochs.is_some_and(|epochs| epoch >= epochs)
    }
}
