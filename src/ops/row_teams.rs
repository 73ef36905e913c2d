//! What the ops on rows of a matrix share on CUDA: the grid of `kernels/row_teams.cuh` and means of what each row gave.
#![allow(unsafe_code)] // a launch

use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
use crate::error::{Error, Result};

/// Up to this length a warp works on a row; beyond it a block. `for_row_length` in `kernels/row_teams.cuh` draws the
/// same line.
const SHORT_ROW: usize = 1024;
const WARPS_IN_BLOCK: usize = 8;
/// Enough for every device; the kernels stride over what is left.
const MAX_BLOCKS: usize = 65_536;

/// The grid of kernels with a team of threads per row, for rows of `d` elements.
pub(super) fn row_grid(rows: usize, d: usize) -> Grid {
    let blocks = if d <= SHORT_ROW { rows.div_ceil(WARPS_IN_BLOCK) } else { rows };
    Grid::new([blocks.clamp(1, MAX_BLOCKS) as u32, 1, 1])
}

/// A number of rows or columns as the kernels count them: with room for a loop's step past the last one.
pub(super) fn count(n: usize) -> Result<i32> {
    const MOST: i32 = 1 << 30;
    i32::try_from(n).ok().filter(|&n| n <= MOST).ok_or_else(|| Error::Unsupported {
        what: format!("a matrix with {n} rows or columns on CUDA"),
        hint: Some(format!("at most {MOST}")),
    })
}

kernels! { "mean";
    /// *y0 = sum of x0 / per0, and the same of x1 with a second block
    fn means[; 256](
        x0: DevicePtr, y0: DevicePtr, n0: i64, per0: f64, x1: DevicePtr, y1: DevicePtr, n1: i64, per1: f64,
    );
}

/// A list of floats in device memory whose sum over `per` becomes the scalar `to`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mean {
    /// The floats.
    pub of: DevicePtr,
    /// How many there are.
    pub n: usize,
    /// What their sum is divided by.
    pub per: usize,
    /// One float.
    pub to: DevicePtr,
}

/// Takes one mean, or two with the same launch.
///
/// # Safety
/// In each list `of` holds `n` floats and `to` one, and no list reads what another writes.
pub(super) unsafe fn take_means(io: &CudaIo<'_>, first: Mean, second: Option<Mean>) -> Result<()> {
    let other = second.unwrap_or(first);
    let call = means(
        first.of,
        first.to,
        first.n as i64,
        first.per as f64,
        other.of,
        other.to,
        other.n as i64,
        other.per as f64,
    );
    let blocks = if second.is_some() { 2 } else { 1 };
    // SAFETY: the caller's promise; block 0 touches the first list alone, block 1 the second.
    unsafe { io.launch(Grid::new([blocks, 1, 1]), call) }
}
