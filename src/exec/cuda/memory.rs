//! Device memory that gives itself back.

use std::sync::Arc;

use crate::backend::cpu::arena::Slot;
use crate::backend::cuda::{DevicePtr, DeviceTensor, Driver, random};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorDesc};

/// Bytes that stay free beside the arena: captured graphs, and the libraries' kernels, which are loaded when they first run. A
/// ResNet-50 takes less than 150 MB of them on an H100.
const FOR_LIBRARIES: usize = 512 << 20;
/// Bytes that random words are written to at once: their number has 32 bits.
const RANDOM_AT_ONCE: usize = 1 << 30;

/// Device memory that is given back when it is dropped.
#[derive(Debug)]
pub(super) struct Memory {
    pub driver: Arc<dyn Driver>,
    pub start: DevicePtr,
}

impl Memory {
    pub fn new(driver: Arc<dyn Driver>, bytes: usize) -> Result<Memory> {
        let start = driver.allocate(bytes.max(1))?;
        Ok(Memory { driver, start })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Err(error) = self.driver.free(self.start) {
            tracing::warn!("device memory was not given back: {error}");
        }
    }
}

/// The memory of a program: one allocation.
#[derive(Debug)]
pub(super) struct Arena {
    memory: Memory,
    bytes: usize,
    /// What no kernel may touch.
    guards: Vec<Slot>,
}

/// Bytes that there are for an arena: of a real device the libraries, which this loads, need some too.
///
/// # Errors
/// A library that is missing; a fault of the device.
pub fn room(driver: &dyn Driver) -> Result<usize> {
    driver.libraries()?;
    Ok(driver.memory()?.free.saturating_sub(kept_free(driver)))
}

/// Bytes beside the arena; what is emulated needs none.
fn kept_free(driver: &dyn Driver) -> usize {
    if driver.emulated() { 0 } else { FOR_LIBRARIES }
}

impl Arena {
    /// Reserves `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the device has not so many free.
    pub fn new(driver: Arc<dyn Driver>, bytes: usize) -> Result<Arena> {
        let free = driver.memory()?.free;
        let kept = kept_free(&*driver);
        if bytes.saturating_add(kept) > free {
            return Err(Error::OutOfMemory { device: driver.name(), needed: bytes + kept, free, hint: None });
        }
        Ok(Arena { memory: Memory::new(driver, bytes)?, bytes, guards: Vec::new() })
    }

    pub fn driver(&self) -> &dyn Driver {
        &*self.memory.driver
    }

    pub fn shared_driver(&self) -> Arc<dyn Driver> {
        self.memory.driver.clone()
    }

    pub fn fill(&self, value: u8) -> Result<()> {
        self.driver().fill(self.memory.start, self.bytes, value)
    }

    /// Fills it with random bits: algorithms are timed on them, since zeros are computed with faster than data.
    pub fn fill_with_noise(&self) -> Result<()> {
        for (index, first) in (0..self.bytes).step_by(RANDOM_AT_ONCE).enumerate() {
            let bytes = (self.bytes - first).min(RANDOM_AT_ONCE) & !3;
            let desc = TensorDesc::new([bytes], DType::U8);
            let tensor = DeviceTensor { desc: &desc, ptr: self.memory.start.offset(first) };
            random::fill(self.driver(), tensor, 0, 0, index as u64)?;
        }
        Ok(())
    }

    pub fn guard(&mut self, guards: Vec<Slot>) {
        guards.iter().for_each(|guard| self.driver().guard(self.at(*guard), guard.bytes));
        self.guards = guards;
    }

    pub fn at(&self, slot: Slot) -> DevicePtr {
        self.memory.start.offset(slot.offset)
    }

    pub fn download(&self, slot: Slot) -> Result<Vec<u8>> {
        let mut bytes = vec![0; slot.bytes];
        self.driver().download(self.at(slot), &mut bytes)?;
        Ok(bytes)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.guards.iter().for_each(|guard| self.driver().unguard(self.at(*guard), guard.bytes));
    }
}
