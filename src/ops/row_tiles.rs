//! Tensors as rows of channels, cut into tiles for the blocks of a kernel: the launching side of `kernels/rows.cuh`.

use bytemuck::NoUninit;

use crate::backend::cuda::Grid;
use crate::tensor::{DType, TensorDesc};

/// Threads of a block.
const THREADS: usize = 256;
/// Packs of channels side by side in a tile: a warp that reads one row reads 512 bytes in a piece.
const MOST_LANES: usize = 32;
/// Rows that a thread loads at once; rounds are a multiple of it.
const ROWS_AT_ONCE: usize = 4;

/// Blocks of a pass that sums: two to three times as many as a large device holds, and few partial sums to combine.
const SUMMING_BLOCKS: usize = 1024;
/// Most rows that one thread adds up in float32, in pairs or fours: bounds the rounding error of its sums.
const SUMMING_ROUNDS: usize = 128;
/// Blocks of a pass that writes a tensor.
const STREAMING_BLOCKS: usize = 4096;
/// Most rows that one thread of it takes: many enough to load the channels' coefficients once for all of them.
const STREAMING_ROUNDS: usize = 32;

/// `RowTiles` of `kernels/rows.cuh`: what a kernel must know to find its tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, NoUninit)]
#[repr(C)]
pub(super) struct RowTiles {
    rows: i64,
    chunk: i64,
    channels: i32,
    lanes: i32,
}

/// A tensor whose rows of channels form groups of equal size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    /// Number of groups.
    pub groups: usize,
    /// Rows of one group.
    pub rows: usize,
    /// Elements of a row.
    pub channels: usize,
    /// Element type.
    pub dtype: DType,
}

impl Rows {
    /// The rows of `desc`, of which `groups` is a divisor.
    pub fn new(desc: &TensorDesc, groups: usize) -> Rows {
        Rows { groups, rows: desc.shape.rows() / groups, channels: desc.shape.channels(), dtype: desc.dtype }
    }

    /// Tiles for a pass that sums over rows.
    pub fn summing(&self) -> RowTiles {
        self.tiles(SUMMING_BLOCKS, SUMMING_ROUNDS)
    }

    /// Tiles for a pass that writes a tensor of this size.
    pub fn streaming(&self) -> RowTiles {
        self.tiles(STREAMING_BLOCKS, STREAMING_ROUNDS)
    }

    /// Tiles that have all rows of their group.
    pub fn whole_groups(&self) -> RowTiles {
        self.with_chunk(self.rows)
    }

    /// About `blocks` tiles, unless that leaves a thread less than one batch or more than `most_rounds` rows.
    fn tiles(&self, blocks: usize, most_rounds: usize) -> RowTiles {
        let step = THREADS / self.lanes();
        let all_rounds = self.groups * self.across() * self.rows.div_ceil(step);
        let rounds = (all_rounds / blocks).clamp(1, most_rounds).next_multiple_of(ROWS_AT_ONCE);
        self.with_chunk(rounds * step)
    }

    fn with_chunk(&self, chunk: usize) -> RowTiles {
        let (channels, lanes) = (self.channels as i32, self.lanes() as i32);
        RowTiles { rows: self.rows as i64, chunk: chunk as i64, channels, lanes }
    }

    /// Packs of a row: 16 bytes each where rows are a multiple of that, else single elements.
    fn packs(&self) -> usize {
        let width = 16 / self.dtype.size();
        if self.channels.is_multiple_of(width) { self.channels / width } else { self.channels }
    }

    fn lanes(&self) -> usize {
        self.packs().next_power_of_two().min(MOST_LANES)
    }

    /// Tiles side by side over the channels.
    fn across(&self) -> usize {
        self.packs().div_ceil(self.lanes())
    }

    /// Tiles one below the other in a group.
    pub fn chunks(&self, tiles: RowTiles) -> usize {
        self.rows.div_ceil(tiles.chunk as usize)
    }

    /// One block per tile.
    pub fn grid(&self, tiles: RowTiles) -> Grid {
        Grid::new([(self.groups * self.chunks(tiles) * self.across()) as u32, 1, 1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(groups: usize, rows: usize, channels: usize, dtype: DType) -> Rows {
        Rows { groups, rows, channels, dtype }
    }

    #[test]
    fn large_shapes_fill_a_device_and_small_ones_make_few_partial_sums() {
        // The layers of ResNet-50 with 256 pairs, two views as groups.
        for (side, channels) in [(112, 64), (56, 64), (56, 256), (28, 512), (14, 1024), (7, 512), (7, 2048)] {
            let tensor = rows(2, 256 * side * side, channels, DType::Bf16);
            for tiles in [tensor.summing(), tensor.streaming()] {
                let blocks = tensor.grid(tiles).blocks[0];
                assert!((350..20_000).contains(&blocks), "{blocks} blocks for {tensor:?}");
            }
            assert!(tensor.chunks(tensor.summing()) <= 6272 / 2, "{tensor:?}");
        }
        let head = rows(2, 256, 2048, DType::Bf16);
        assert_eq!(head.grid(head.summing()).blocks[0], 128);
        let tiny = rows(1, 2, 3, DType::F32);
        assert_eq!(tiny.grid(tiny.summing()).blocks[0], 1);
    }

    #[test]
    fn tiles_cover_every_row_and_channel() {
        for (groups, n, channels, dtype) in
            [(3, 31, 7, DType::F16), (1, 100_003, 24, DType::F32), (2, 33, 2056, DType::Bf16), (2, 1000, 1, DType::F32)]
        {
            let tensor = rows(groups, n, channels, dtype);
            for tiles in [tensor.summing(), tensor.streaming(), tensor.whole_groups()] {
                let chunks = tensor.chunks(tiles);
                assert!(chunks * tiles.chunk as usize >= n && (chunks - 1) * (tiles.chunk as usize) < n);
                let lanes = tiles.lanes as usize;
                assert!(lanes.is_power_of_two() && lanes <= 32 && tensor.across() * lanes >= tensor.packs());
                assert_eq!(tensor.grid(tiles).blocks[0] as usize, groups * chunks * tensor.across());
            }
        }
    }
}
