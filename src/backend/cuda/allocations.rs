//! Which ranges of device memory are reserved: copies are checked against them before the device sees a wrong address. And how
//! much a driver has handed out at all.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

use super::DevicePtr;

/// Reserved ranges by their first address, each with its length in bytes, and the number of things handed out.
#[derive(Debug, Default)]
pub(super) struct Allocations {
    ranges: Mutex<BTreeMap<u64, usize>>,
    made: AtomicU64,
}

impl Allocations {
    fn ranges(&self) -> MutexGuard<'_, BTreeMap<u64, usize>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, memory: DevicePtr, bytes: usize) {
        self.count();
        self.ranges().insert(memory.0, bytes);
    }

    /// Counts what is no device memory: page-locked memory, an event, a graph.
    pub fn count(&self) {
        self.made.fetch_add(1, Ordering::Relaxed);
    }

    /// How much was ever made, given back or not.
    pub fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    /// Bytes of all ranges.
    #[cfg_attr(not(feature = "emulator"), allow(dead_code))]
    pub fn reserved(&self) -> usize {
        self.ranges().values().sum()
    }

    /// Takes a range out; returns its length.
    pub fn remove(&self, memory: DevicePtr) -> Result<usize> {
        self.ranges()
            .remove(&memory.0)
            .ok_or_else(|| fault(format!("cannot free what lies at {:#x}: nothing is reserved there", memory.0)))
    }

    /// Checks that `bytes` from `at` on lie within one range.
    pub fn check(&self, action: &str, at: DevicePtr, bytes: usize) -> Result<()> {
        let ranges = self.ranges();
        let range = ranges.range(..=at.0).next_back();
        let room = range.and_then(|(first, len)| len.checked_sub((at.0 - first) as usize)).unwrap_or(0);
        if bytes <= room {
            return Ok(());
        }
        Err(fault(format!("cannot {action} {bytes} bytes at {:#x}: {room} bytes are reserved there", at.0)))
    }

    /// All ranges, for giving them back.
    pub fn drain(&self) -> Vec<(DevicePtr, usize)> {
        std::mem::take(&mut *self.ranges()).into_iter().map(|(first, len)| (DevicePtr(first), len)).collect()
    }
}

fn fault(message: String) -> Error {
    Error::Internal { thread: "CUDA memory".into(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_where_they_end() {
        let allocations = Allocations::default();
        allocations.insert(DevicePtr(1000), 24);
        allocations.insert(DevicePtr(1100), 7);
        assert!(allocations.check("read", DevicePtr(1000), 24).is_ok());
        assert!(allocations.check("read", DevicePtr(1023), 1).is_ok());
        assert!(allocations.check("read", DevicePtr(1106), 1).is_ok());
        for (at, bytes) in [(1000, 25), (1024, 1), (999, 1), (1099, 2), (1107, 1), (0, 1)] {
            assert!(allocations.check("read", DevicePtr(at), bytes).is_err(), "{bytes} bytes at {at}");
        }
        assert_eq!(allocations.remove(DevicePtr(1000)).unwrap(), 24);
        assert!(allocations.check("read", DevicePtr(1000), 1).is_err());
        assert!(allocations.remove(DevicePtr(1000)).is_err());
        allocations.count();
        assert_eq!((allocations.made(), allocations.reserved()), (3, 7), "what was given back was made too");
    }
}
