//! Where the workers' time goes. Two clock readings a stage and four relaxed additions an image: nothing beside the work.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the workers of a loader have done since it started. The difference of two says what was done in between.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Images made.
    pub images: u64,
    /// Bytes of their records.
    pub bytes: u64,
    /// Time of all workers together in fetching records and verifying their checksums.
    pub read: Duration,
    /// Time in decoding JPEG records.
    pub decode: Duration,
    /// Time in what comes last: making views, or copying pixels into the batch.
    pub finish: Duration,
}

impl Work {
    /// Time in all stages.
    pub fn total(&self) -> Duration {
        self.read + self.decode + self.finish
    }
}

impl Add for Work {
    type Output = Work;

    fn add(self, other: Work) -> Work {
        Work {
            images: self.images + other.images,
            bytes: self.bytes + other.bytes,
            read: self.read + other.read,
            decode: self.decode + other.decode,
            finish: self.finish + other.finish,
        }
    }
}

impl Sub for Work {
    type Output = Work;

    fn sub(self, before: Work) -> Work {
        Work {
            images: self.images - before.images,
            bytes: self.bytes - before.bytes,
            read: self.read - before.read,
            decode: self.decode - before.decode,
            finish: self.finish - before.finish,
        }
    }
}

/// [`Work`] in the making, shared by the workers.
#[derive(Debug, Default)]
pub(super) struct Counters {
    images: AtomicU64,
    bytes: AtomicU64,
    read: AtomicU64,
    decode: AtomicU64,
    finish: AtomicU64,
}

impl Counters {
    /// Adds an image of `bytes` bytes, given the moments at which its stages began, and that at which the last ended.
    pub fn add(&self, bytes: usize, [start, fetched, decoded, finished]: [Instant; 4]) {
        self.images.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let stages =
            [(&self.read, start, fetched), (&self.decode, fetched, decoded), (&self.finish, decoded, finished)];
        for (counter, from, to) in stages {
            counter.fetch_add((to - from).as_nanos() as u64, Ordering::Relaxed);
        }
    }

    pub fn snapshot(&self) -> Work {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let time = |counter| Duration::from_nanos(load(counter));
        Work {
            images: load(&self.images),
            bytes: load(&self.bytes),
            read: time(&self.read),
            decode: time(&self.decode),
            finish: time(&self.finish),
        }
    }
}
