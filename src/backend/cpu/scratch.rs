//! Scratch memory that each thread keeps between calls.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable};

use super::gemm::Real;

/// One cache line; buffers are made of these so that they start on a line and hold f32 as well as f64.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u64; 8]);

thread_local! {
    /// Buffers not in use. A stack: nested uses find the buffer they had last time.
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` elements with arbitrary content to `f`. They start on a cache line. The thread keeps the memory for later calls.
pub fn with_scratch<T: Real, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    let mut lines = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    let needed = (len * size_of::<T>()).div_ceil(size_of::<Line>());
    if lines.len() < needed {
        lines = vec![Line::zeroed(); needed];
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut lines)[..len]);
    FREE.with_borrow_mut(|free| free.push(lines));
    result
}

/// Bytes that the calling thread keeps.
#[cfg(test)]
pub(crate) fn kept_bytes() -> usize {
    FREE.with_borrow(|free| free.iter().map(|lines| size_of_val(&lines[..])).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_uses_have_memory_of_their_own_and_keep_it() {
        let addresses = || {
            with_scratch(1000, |outer: &mut [f64]| {
                outer.fill(1.0);
                let inner = with_scratch(100, |inner: &mut [f32]| {
                    inner.fill(2.0);
                    inner.as_ptr() as usize
                });
                assert!(outer.iter().all(|&v| v == 1.0));
                (outer.as_ptr() as usize, inner)
            })
        };
        let first = addresses();
        assert_eq!(first, addresses());
        assert!(first.0 % 64 == 0 && first.1 % 64 == 0);
    }
}
