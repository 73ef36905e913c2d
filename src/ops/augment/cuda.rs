//! The launches.
#![allow(unsafe_code)] // launches

use super::{Augmentation, ViewDescriptor};
use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{DevicePtr, Driver, Grid};
use crate::data::augment::{BlurKernel, Normalisation};
use crate::error::Result;

kernels! { "augment";
    /// The filters of views, and sums of lumas set to zero.
    fn augment_taps[; 256](views: DevicePtr, firsts: DevicePtr, weights: DevicePtr, lumas: DevicePtr, size: i32, capacity: i32);
    /// Crop, resize, and the jitter up to its contrast.
    fn augment_crop[; 512](
        pixels: DevicePtr, views: DevicePtr, firsts: DevicePtr, weights: DevicePtr, planes: DevicePtr, lumas: DevicePtr,
        size: i32, capacity: i32,
    );
    /// The rest of the jitter, grey, blur and normalisation.
    fn augment_finish[F32, Bf16, F16; 512](
        planes: DevicePtr, views: DevicePtr, lumas: DevicePtr, out: DevicePtr, size: i32, channels: i32, reflect: i32,
        strip_rows: i32, normalisation: Normalisation,
    );
    /// The same one channel at a time, for blurs that reach far.
    fn augment_finish_far[F32, Bf16, F16; 512](
        planes: DevicePtr, views: DevicePtr, lumas: DevicePtr, out: DevicePtr, size: i32, channels: i32, reflect: i32,
        strip_rows: i32, normalisation: Normalisation,
    );
}

/// Side of the square of pixels that a block makes, and its warps.
const TILE: usize = 32;
const WARPS: usize = 16;
/// Dynamic shared memory that every device gives a block without being asked, less what a kernel has besides.
const SHARED_BYTES: usize = 47 << 10;
/// Unfinished views between the two kernels: few enough to stay in the second-level cache.
const PLANES_BYTES: usize = 16 << 20;
/// Blocks along y.
const MAX_VIEWS: usize = 65_535;

/// Where in a device's memory a batch is augmented. Each starts at a multiple of 64 bytes.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// The bytes of all images, with [`Augmentation::pixel_memory`] of room.
    pub pixels: DevicePtr,
    /// A [`ViewDescriptor`] for every view.
    pub descriptors: DevicePtr,
    /// Scratch of [`Augmentation::workspace`] bytes.
    pub workspace: DevicePtr,
    /// The views, as [`Augmentation::output`] says.
    pub views: DevicePtr,
}

/// What lies where in the workspace, in bytes.
struct Layout {
    firsts: usize,
    weights: usize,
    planes: usize,
    end: usize,
}

/// How the last kernel uses its shared memory.
pub(super) struct Strips {
    pub channels: usize,
    pub rows: usize,
    pub bytes: usize,
}

impl Augmentation {
    /// Bytes of scratch for a number of views.
    pub fn workspace(&self, views: usize) -> usize {
        self.layout(views).end
    }

    /// Of it the tables that the first kernel writes.
    pub(super) fn tables(&self, views: usize) -> usize {
        self.layout(views).planes
    }

    fn layout(&self, views: usize) -> Layout {
        let after = |start: usize, bytes: usize| (start + bytes).next_multiple_of(256);
        let firsts = after(0, views * size_of::<u64>());
        let weights = after(firsts, 2 * views * self.size * size_of::<i32>());
        let planes = after(weights, 2 * views * self.capacity() * size_of::<f32>());
        Layout { firsts, weights, planes, end: after(planes, self.views_at_a_time().min(views) * self.planes_bytes()) }
    }

    fn planes_bytes(&self) -> usize {
        3 * self.size * self.size * size_of::<f32>()
    }

    fn views_at_a_time(&self) -> usize {
        (PLANES_BYTES / self.planes_bytes()).clamp(1, MAX_VIEWS)
    }

    /// As many rows as fit, and all three channels if that leaves every warp a row.
    pub(super) fn strips(&self) -> Strips {
        let extent = TILE + 2 * self.reach;
        let fitting = |channels: usize| (SHARED_BYTES / (channels * extent * size_of::<f32>())).saturating_sub(TILE);
        let channels = if fitting(3) >= WARPS { 3 } else { 1 };
        let rows = (fitting(channels) / WARPS * WARPS).min(extent.next_multiple_of(WARPS));
        Strips { channels, rows, bytes: channels * extent * (rows + TILE) * size_of::<f32>() }
    }

    /// Makes the `views` views that were described: three kernels, the last two for some views at a time.
    ///
    /// # Errors
    /// As [`Driver::launch`].
    ///
    /// # Safety
    /// All places are memory of `driver`, as large as [`Places`] says for so many views and not overlapping, and the
    /// descriptors are those that this `Augmentation` made for the images that lie at `places.pixels`.
    pub unsafe fn launch(&self, driver: &dyn Driver, views: usize, places: &Places) -> Result<()> {
        if views == 0 {
            return Ok(());
        }
        let layout = self.layout(views);
        let (lumas, firsts) = (places.workspace, places.workspace.offset(layout.firsts));
        let (weights, planes) = (places.workspace.offset(layout.weights), places.workspace.offset(layout.planes));
        let (size, capacity) = (self.size as i32, self.capacity() as i32);
        let strips = self.strips();
        let tiles = self.size.div_ceil(TILE).pow(2) as u32;
        let reflect = self.blur_kernel == BlurKernel::Gaussian;
        let kernel = if strips.channels == 3 { augment_finish } else { augment_finish_far };
        let view_bytes = self.output(1).bytes();

        let taps = augment_taps(places.descriptors, firsts, weights, lumas, size, capacity);
        // SAFETY: the tables hold what `check_tables` has checked for every descriptor, times the views of the layout.
        unsafe { driver.launch(Grid::new([views as u32, 2, 1]), taps)? };
        for first in (0..views).step_by(self.views_at_a_time()) {
            let grid = Grid::new([tiles, self.views_at_a_time().min(views - first) as u32, 1]);
            let descriptors = places.descriptors.offset(first * size_of::<ViewDescriptor>());
            let lumas = lumas.offset(first * size_of::<u64>());
            let firsts = firsts.offset(2 * first * self.size * size_of::<i32>());
            let weights = weights.offset(2 * first * self.capacity() * size_of::<f32>());
            let crop = augment_crop(places.pixels, descriptors, firsts, weights, planes, lumas, size, capacity);
            // SAFETY: `check_image` has checked that every image lies within the pixels, and the filters stay within the
            // image; the planes have room for as many views as the grid has.
            unsafe { driver.launch(grid, crop)? };
            let finish = kernel(
                self.dtype,
                planes,
                descriptors,
                lumas,
                places.views.offset(first * view_bytes),
                size,
                self.channels as i32,
                reflect.into(),
                strips.rows as i32,
                self.normalisation,
            );
            // SAFETY: the planes are those just made, the output has room for all views, and no kernel of a blur, by
            // `blur`, is longer than `reach`, for which the strips are laid out.
            unsafe { driver.launch(grid.with_shared(strips.bytes), finish)? };
        }
        Ok(())
    }
}
