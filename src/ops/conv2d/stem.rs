//! The convolution that begins an ImageNet ResNet, in 16 bits on CUDA: 7x7 with stride 2 over images in 4 channels. The
//! library is far from what memory allows there (3 channels suit no tensor core), so this one has kernels of our own.
#![allow(unsafe_code)] // launches

use bytemuck::NoUninit;

use crate::backend::conv::ConvGeometry;
use crate::backend::cuda::kernel::kernels;
use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
use crate::error::Result;
use crate::tensor::DType;

use super::Conv2d;

kernels! { "stem";
    /// y = conv(x, w)
    fn stem_conv[Bf16, F16; 128](x: DevicePtr, w: DevicePtr, y: DevicePtr, sizes: Sizes);
    /// What each block sums up of d_w.
    fn stem_wgrad[Bf16, F16; 128](x: DevicePtr, d_y: DevicePtr, partials: DevicePtr, sizes: Sizes);
    /// d_w = the sum of what the blocks have summed up.
    fn stem_wgrad_finish[; 256](partials: DevicePtr, blocks: i32, d_w: DevicePtr, taps: i32, accumulate: i32);
}

/// Channels of an image in the kernels, and the multiple that they make output channels in.
const CHANNELS: usize = 4;
const TILE_CHANNELS: usize = 64;
/// A tile of output pixels.
const TILE: [usize; 2] = [8, 16];
/// Taps of the kernel of one output channel, and what a block writes for each output channel: rows of 8 taps.
const TAPS: usize = 7 * 7;
const PARTIAL_ELEMENTS: usize = 7 * 8 * CHANNELS;
/// Taps that a block of the last kernel sums up.
const FINISH_TAPS: usize = 16;
/// Tiles that make it worth a block's while to load its weights, or to write its sums.
const TILES_OF_A_BLOCK: usize = 4;
/// The most blocks: 8 waves of two on each of an H100's 132 multiprocessors; and 3, where each block writes 57 KB.
const MOST_BLOCKS: usize = 2112;
const MOST_SUMMING_BLOCKS: usize = 792;

/// Channels that CUDA devices want images of 3 padded to, for the convolution `op` with a `kernel` of so many rows and
/// columns over them: 4 where the kernels here take it, else 8, for with 3 cuDNN wants 200 MB of scratch.
pub fn image_channels(op: &Conv2d, kernel: [usize; 2], c_out: usize, dtype: DType) -> usize {
    if covers(op, kernel, c_out, dtype) { CHANNELS } else { 8 }
}

fn covers(op: &Conv2d, kernel: [usize; 2], c_out: usize, dtype: DType) -> bool {
    let layout = (op.stride, op.padding, kernel) == ([2, 2], [3, 3], [7, 7]);
    layout && c_out > 0 && c_out.is_multiple_of(TILE_CHANNELS) && matches!(dtype, DType::Bf16 | DType::F16)
}

/// `StemSizes` of `kernels/stem.cu`.
#[derive(Debug, Clone, Copy, NoUninit)]
#[repr(C)]
struct Sizes {
    h: i32,
    w: i32,
    oh: i32,
    ow: i32,
    c_out: i32,
    across: i32,
    down: i32,
    tiles: i32,
}

/// A convolution that the kernels here do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stem {
    sizes: Sizes,
    tiles: usize,
    c_out: usize,
}

impl Stem {
    /// The convolution with these sizes, if it is one.
    pub fn of(g: &ConvGeometry, dtype: DType) -> Option<Stem> {
        let op = Conv2d::new(g.stride, g.padding);
        if g.c_in != CHANNELS || !covers(&op, g.kernel, g.c_out, dtype) {
            return None;
        }
        let (down, across) = (g.oh().div_ceil(TILE[0]), g.ow().div_ceil(TILE[1]));
        let tiles = g.n.checked_mul(down)?.checked_mul(across)?;
        // The kernels count tiles, rows, columns and weights in 32 bits.
        let counts = [tiles, g.h, g.w, g.c_out.checked_mul(PARTIAL_ELEMENTS)?];
        if tiles == 0 || counts.iter().any(|&count| count > i32::MAX as usize / 4) {
            return None;
        }
        let [h, w, oh, ow, c_out, across, down] = [g.h, g.w, g.oh(), g.ow(), g.c_out, across, down].map(|n| n as i32);
        let sizes = Sizes { h, w, oh, ow, c_out, across, down, tiles: tiles as i32 };
        Some(Stem { sizes, tiles, c_out: g.c_out })
    }

    /// Blocks that share the tiles, for each 64 output channels.
    fn blocks(&self, most: usize) -> usize {
        self.tiles.div_ceil(TILES_OF_A_BLOCK).min(most)
    }

    /// Tiles of output channels: each reads all of x.
    pub fn channel_tiles(&self) -> usize {
        self.c_out / TILE_CHANNELS
    }

    fn grid(&self, blocks: usize) -> Grid {
        Grid::new([blocks as u32, self.channel_tiles() as u32, 1])
    }

    /// Launches y = conv(x, w).
    pub fn forward(&self, io: &CudaIo<'_>) -> Result<()> {
        let call = stem_conv(io.dtype(), io.inputs[0].ptr, io.inputs[1].ptr, io.outputs[0].ptr, self.sizes);
        // SAFETY: the sizes are those of x and w by `geometry`, which checked that they go together, and `infer` made y of
        // them; the kernel reads and writes only pixels within, in pieces that `covers` makes whole.
        unsafe { io.launch(self.grid(self.blocks(MOST_BLOCKS)), call) }
    }

    /// Bytes of scratch for [`Stem::weight_gradient`].
    pub fn workspace(&self) -> usize {
        self.blocks(MOST_SUMMING_BLOCKS) * self.c_out * PARTIAL_ELEMENTS * size_of::<f32>()
    }

    /// Launches d_w, which is written over or added to.
    pub fn weight_gradient(&self, io: &CudaIo<'_>) -> Result<()> {
        let (d_w, blocks, taps) = (&io.outputs[0], self.blocks(MOST_SUMMING_BLOCKS), self.c_out * TAPS);
        let call = stem_wgrad(io.dtype(), io.inputs[0].ptr, io.inputs[1].ptr, io.workspace, self.sizes);
        // SAFETY: the sizes are those of x, and `infer` checked that d_y is the result of the convolution over it; the
        // workspace has room for the sums of as many blocks.
        unsafe { io.launch(self.grid(blocks), call)? };
        let accumulate = i32::from(d_w.accumulate);
        let call = stem_wgrad_finish(io.workspace, blocks as i32, d_w.ptr, taps as i32, accumulate);
        // SAFETY: the launch above wrote the sums of so many blocks; `infer` made d_w of c_out * 49 taps of 4 channels in
        // float32.
        unsafe { io.launch(Grid::new([taps.div_ceil(FINISH_TAPS) as u32, 1, 1]), call) }
    }
}
