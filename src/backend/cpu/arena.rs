//! One block of memory for everything a plan needs, handed out as disjoint slices.
#![allow(unsafe_code)] // splitting one allocation into slices that were checked to be disjoint

use memmap2::MmapMut;

use crate::error::{Error, Result};

/// Alignment of every slot in bytes: a multiple of a cache line and of an AVX-512 register, and what cuBLAS wants of its
/// workspace.
pub const ALIGNMENT: usize = 256;

/// A range of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// First byte; a multiple of [`ALIGNMENT`].
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

impl Slot {
    /// One past the last byte.
    pub fn end(&self) -> usize {
        self.offset + self.bytes
    }
}

/// Slices lent for one node: read ones, then written ones.
pub type Borrowed<'a> = (Vec<&'a [u8]>, Vec<&'a mut [u8]>);

/// Zero-initialised memory; pages are touched only when used.
#[derive(Debug)]
pub struct Arena {
    memory: MmapMut,
}

impl Arena {
    /// Reserves `bytes`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the system does not grant the memory.
    pub fn new(bytes: usize) -> Result<Arena> {
        let memory = MmapMut::map_anon(bytes.max(ALIGNMENT)).map_err(|e| Error::Unsupported {
            what: format!("out of memory: the plan needs {:.1} MB and the system refused it ({e})", bytes as f64 / 1e6),
            hint: Some(
                "use a smaller --batch or --image-size; `simsiam-engine plan` shows what a setting needs".into(),
            ),
        })?;
        #[cfg(target_os = "linux")]
        // Huge pages only make it faster; a kernel without them is no error.
        let _ = memory.advise(memmap2::Advice::HugePage);
        Ok(Arena { memory })
    }

    /// The bytes of one slot.
    pub fn slice(&self, slot: Slot) -> &[u8] {
        &self.memory[slot.offset..slot.end()]
    }

    /// The bytes of one slot, writable.
    pub fn slice_mut(&mut self, slot: Slot) -> &mut [u8] {
        &mut self.memory[slot.offset..slot.end()]
    }

    /// Borrows several slots at once: `reads` shared, `writes` exclusive.
    ///
    /// # Errors
    /// [`Error::Internal`] when a slot leaves the arena or a written slot overlaps any other: a planner fault.
    pub fn borrow(&mut self, reads: &[Slot], writes: &[Slot]) -> Result<Borrowed<'_>> {
        check_disjoint(self.memory.len(), reads, writes)?;
        let base = self.memory.as_mut_ptr();
        // SAFETY: `check_disjoint` showed that every slot lies inside the mapping and that no written slot overlaps another
        // slot, so shared and exclusive slices never alias; both borrow `self` mutably, so nothing else reaches the memory.
        let read = |s: &Slot| unsafe { std::slice::from_raw_parts(base.add(s.offset).cast_const(), s.bytes) };
        // SAFETY: as above.
        let write = |s: &Slot| unsafe { std::slice::from_raw_parts_mut(base.add(s.offset), s.bytes) };
        Ok((reads.iter().map(read).collect(), writes.iter().map(write).collect()))
    }
}

/// Checks that all slots lie in `len` bytes and that no written slot overlaps any other slot.
fn check_disjoint(len: usize, reads: &[Slot], writes: &[Slot]) -> Result<()> {
    let mut slots: Vec<(Slot, bool)> = reads.iter().map(|&s| (s, false)).collect();
    slots.extend(writes.iter().map(|&s| (s, true)));
    slots.retain(|(s, _)| s.bytes > 0);
    slots.sort_by_key(|(s, _)| s.offset);
    let fault = |message: String| Err(Error::Internal { thread: "planner".into(), message });
    // The furthest ends seen so far: of any slot, and of written ones.
    let (mut end, mut written_end) = (0, 0);
    for (slot, written) in slots {
        if slot.end() > len || slot.offset % ALIGNMENT != 0 {
            return fault(format!("{slot:?} does not lie in an arena of {len} bytes"));
        }
        if slot.offset < written_end || (written && slot.offset < end) {
            return fault(format!("{slot:?} overlaps another slot of its node"));
        }
        end = end.max(slot.end());
        if written {
            written_end = written_end.max(slot.end());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(offset: usize, bytes: usize) -> Slot {
        Slot { offset, bytes }
    }

    #[test]
    fn disjoint_slots_are_lent_and_keep_their_content() {
        let mut arena = Arena::new(1024).unwrap();
        {
            let (_, mut writes) = arena.borrow(&[], &[slot(256, 256), slot(512, 3)]).unwrap();
            writes[0].fill(7);
            writes[1].fill(9);
        }
        assert_eq!(arena.slice(slot(510, 4)), [7, 7, 9, 9]);
    }

    #[test]
    fn overlaps_and_overruns_are_refused() {
        let mut arena = Arena::new(1024).unwrap();
        assert!(arena.borrow(&[slot(0, 257)], &[slot(256, 64)]).is_err(), "read overlaps write");
        assert!(arena.borrow(&[], &[slot(0, 512), slot(256, 4)]).is_err(), "write overlaps write");
        assert!(arena.borrow(&[slot(256, 4)], &[slot(0, 512)]).is_err(), "read inside write");
        assert!(arena.borrow(&[], &[slot(4096, 64)]).is_err(), "beyond the end");
        assert!(arena.borrow(&[], &[slot(64, 64)]).is_err(), "on no multiple of the alignment");
        assert!(arena.borrow(&[slot(0, 512), slot(256, 64)], &[slot(512, 64)]).is_ok(), "reads may overlap");
    }
}
