//! What a step is given and what it gives back, without waiting: inputs of the next step travel beside the kernels of this
//! one, and values of a step are fetched while the next one runs.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use crate::backend::cuda::{DevicePtr, Driver, Event, Pinned, Stream};
use crate::error::Result;
use crate::exec::cuda::capture::SLOTS;
use crate::graph::ValueId;
use crate::tensor::{HostTensor, TensorDesc};

/// A value that is fetched after every step.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    pub desc: TensorDesc,
    pub ptr: DevicePtr,
}

/// Both copies of the inputs, and the steps on the way.
#[derive(Debug)]
pub(super) struct Feed {
    slots: [Slot; SLOTS],
    /// The copy of the inputs that the next step reads.
    next: usize,
    watched: Vec<Watched>,
    /// Copies of the inputs that steps read which were not collected yet, oldest first.
    uncollected: VecDeque<usize>,
    /// That of the step collected last.
    collected: Option<usize>,
}

/// One copy of the inputs on its way to the device and back as results.
#[derive(Debug)]
struct Slot {
    staging: HashMap<ValueId, Box<dyn Pinned>>,
    /// The values whose copies were started since the last step.
    staged: Vec<ValueId>,
    /// The copies are done.
    copied: Event,
    /// The step is done, and its watched values are there.
    done: Event,
    results: Option<Box<dyn Pinned>>,
}

impl Feed {
    pub fn new(driver: &dyn Driver) -> Result<Feed> {
        let slot = || {
            let (copied, done) = (driver.event()?, driver.event()?);
            Ok(Slot { staging: HashMap::new(), staged: Vec::new(), copied, done, results: None })
        };
        let (uncollected, collected) = (VecDeque::new(), None);
        Ok(Feed { slots: [slot()?, slot()?], next: 0, watched: Vec::new(), uncollected, collected })
    }

    /// The copy of the inputs that the next step reads.
    pub fn next(&self) -> usize {
        self.next
    }

    /// That of the step whose results were collected last, or else the next.
    pub fn last_seen(&self) -> usize {
        self.collected.unwrap_or(self.next)
    }

    /// Starts the copy of `bytes` to `to`, the place of `value` in the copy that the next step reads, with room for
    /// `capacity` bytes. Waits for the step that read this copy before.
    pub fn stage(
        &mut self,
        driver: &dyn Driver,
        value: ValueId,
        (to, capacity): (DevicePtr, usize),
        bytes: &[u8],
    ) -> Result<()> {
        let slot = &mut self.slots[self.next];
        driver.finish(&slot.done)?;
        if slot.staged.contains(&value) {
            // Its staging memory is still being read.
            driver.record(&slot.copied, Stream::Copy)?;
            driver.finish(&slot.copied)?;
        }
        let pinned = match slot.staging.entry(value) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(driver.pinned(capacity)?),
        };
        pinned.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        slot.staged.push(value);
        upload(driver, to, &pinned.bytes()[..bytes.len()])
    }

    /// Lets what the compute stream does next wait for the inputs.
    pub fn before_step(&mut self, driver: &dyn Driver) -> Result<()> {
        let slot = &mut self.slots[self.next];
        if slot.staged.is_empty() {
            return Ok(());
        }
        slot.staged.clear();
        driver.record(&slot.copied, Stream::Copy)?;
        driver.wait(Stream::Compute, &slot.copied)
    }

    /// Fetches the watched values behind the step that was just started, and turns to the other copy of the inputs.
    pub fn after_step(&mut self, driver: &dyn Driver) -> Result<()> {
        let bytes: usize = self.watched.iter().map(|w| w.desc.bytes()).sum();
        let slot = &mut self.slots[self.next];
        // A step that was never collected makes room.
        self.uncollected.retain(|&waiting| waiting != self.next);
        if bytes > 0 {
            if slot.results.is_none() {
                slot.results = Some(driver.pinned(bytes)?);
            }
            let Some(results) = &mut slot.results else { return Ok(()) };
            let mut room = results.bytes_mut();
            for watched in &self.watched {
                let (first, rest) = room.split_at_mut(watched.desc.bytes());
                download(driver, watched.ptr, first)?;
                room = rest;
            }
        }
        driver.record(&slot.done, Stream::Compute)?;
        self.uncollected.push_back(self.next);
        self.next = (self.next + 1) % SLOTS;
        Ok(())
    }

    /// Fetches these values after every step from now on; they are the same in both copies.
    pub fn watch(&mut self, watched: Vec<Watched>) {
        self.watched = watched;
        self.slots.iter_mut().for_each(|slot| slot.results = None);
        self.uncollected.clear();
    }

    /// The watched values of the oldest step that was not collected, when more than `in_flight` were not.
    pub fn collect(&mut self, driver: &dyn Driver, in_flight: usize) -> Result<Option<Vec<HostTensor>>> {
        if self.uncollected.len() <= in_flight {
            return Ok(None);
        }
        let Some(number) = self.uncollected.pop_front() else { return Ok(None) };
        let slot = &self.slots[number];
        driver.finish(&slot.done)?;
        self.collected = Some(number);
        let mut room = slot.results.as_ref().map_or(&[][..], |results| results.bytes());
        let tensors = self.watched.iter().map(|watched| {
            let (bytes, rest) = room.split_at(watched.desc.bytes());
            room = rest;
            HostTensor::from_bytes(watched.desc.clone(), bytes.to_vec())
        });
        tensors.collect::<Result<_>>().map(Some)
    }
}

#[allow(unsafe_code)] // hands pinned memory to a copy that runs later
fn upload(driver: &dyn Driver, to: DevicePtr, from: &[u8]) -> Result<()> {
    // SAFETY: `from` is staging memory of a slot. `stage` waits for the slot's step, which waits for this copy, or for the
    // copy itself, before it writes there again; the executor waits for the device before the slot is dropped.
    unsafe { driver.upload_later(to, from) }
}

#[allow(unsafe_code)] // as above
fn download(driver: &dyn Driver, from: DevicePtr, to: &mut [u8]) -> Result<()> {
    // SAFETY: `to` is the results' memory of a slot. It is read after `collect` has waited for the event behind this copy,
    // written again only by the step after next, which comes after it in the stream, and dropped when the device is idle.
    unsafe { driver.download_later(from, to.as_mut_ptr(), to.len()) }
}
