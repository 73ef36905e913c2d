//! The nearest rows of a bank that passes by in tiles: what kNN needs of it, in bounded memory, on any device.

use crate::error::{Error, Result};
use crate::eval::knn::reciprocal_norms;
use crate::exec::{Device, Executor};
use crate::graph::{Role, Tape, ValueId};
use crate::ops::knn::{KnnMerge, MAX_NEIGHBOURS, Neighbour};
use crate::ops::linear::Linear;
use crate::tensor::{DType, TensorDesc};

/// Bytes that a tile of the bank, and that the products with it, take at most.
const TILE_BYTES: usize = 64 << 20;
/// Rows of a tile.
const TILE_ROWS: std::ops::RangeInclusive<usize> = 64..=1024;

/// The sizes of a [`Search`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchShape {
    /// Queries at a time.
    pub queries: usize,
    /// Length of a feature.
    pub dim: usize,
    /// Neighbours kept of each query.
    pub k: usize,
}

impl SearchShape {
    /// As many of `queries` queries at a time as `memory` bytes allow, at least one.
    pub fn within(memory: usize, queries: usize, dim: usize, k: usize) -> SearchShape {
        let row = size_of::<f32>();
        // On the host and on the device; the products with the smallest tile.
        let bytes = 2 * dim * row + k * size_of::<u64>() + TILE_ROWS.start() * row;
        SearchShape { queries: (memory / bytes).clamp(1, queries.max(1)), dim, k }
    }

    /// Bank rows of a tile. It follows from the sizes alone.
    pub fn tile(&self) -> usize {
        let row = size_of::<f32>() * self.dim.max(self.queries).max(1);
        (TILE_BYTES / row).clamp(*TILE_ROWS.start(), *TILE_ROWS.end())
    }
}

/// A search on a device: takes queries, then the bank row by row, and has the nearest of them at the end.
#[derive(Debug)]
pub struct Search {
    exec: Box<dyn Executor>,
    shape: SearchShape,
    values: Values,
    /// Queries of the pass under way.
    queries: usize,
    /// Bank rows that wait for a whole tile.
    waiting: Vec<f32>,
    /// Bank rows that were searched.
    searched: usize,
}

#[derive(Debug)]
struct Values {
    queries: ValueId,
    query_scale: ValueId,
    bank: ValueId,
    bank_scale: ValueId,
    range: ValueId,
    best: ValueId,
}

impl Search {
    /// Plans the search and reserves its memory on `device`.
    ///
    /// # Errors
    /// [`Error::Config`] for more neighbours than can be kept; memory that the device refuses.
    pub fn new(shape: SearchShape, device: &Device) -> Result<Search> {
        if !(1..=MAX_NEIGHBOURS).contains(&shape.k) {
            return Err(Error::config("--k", format!("expected 1 to {MAX_NEIGHBOURS} neighbours, got {}", shape.k)));
        }
        let (tile, mut tape) = (shape.tile(), Tape::new());
        let mut leaf = |name: &str, dims: &[usize], dtype, role| {
            let desc = TensorDesc::new(dims, dtype);
            tape.leaf(name, desc, role, false)
        };
        let values = Values {
            queries: leaf("queries", &[shape.queries, shape.dim], DType::F32, Role::State),
            query_scale: leaf("query_scale", &[shape.queries], DType::F32, Role::State),
            bank: leaf("bank", &[tile, shape.dim], DType::F32, Role::Input),
            bank_scale: leaf("bank_scale", &[tile], DType::F32, Role::Input),
            range: leaf("range", &[2], DType::I64, Role::Input),
            best: leaf("best", &[shape.queries, shape.k], DType::I64, Role::State),
        };
        let products = tape.scoped("products", |tape| tape.record_one(Linear, &[values.queries, values.bank]))?;
        let inputs = [products, values.query_scale, values.bank_scale, values.range];
        tape.scoped("merge", |tape| tape.record_updating(KnnMerge, &inputs, &[values.best]))?;
        let exec = device.executor(tape)?;
        Ok(Search { exec, shape, values, queries: 0, waiting: Vec::new(), searched: 0 })
    }

    /// Its sizes.
    pub fn shape(&self) -> SearchShape {
        self.shape
    }

    /// Begins a pass over the bank for `queries`, row-major, of which there may be fewer than there is room for. The first is
    /// number `first` in messages.
    ///
    /// # Errors
    /// [`Error::Shape`] for features that do not fit or are not finite.
    pub fn start(&mut self, queries: &[f32], first: usize) -> Result<()> {
        let SearchShape { queries: room, dim, .. } = self.shape;
        if queries.is_empty() || !queries.len().is_multiple_of(dim) || queries.len() > room * dim {
            let expected = format!("1 to {room} rows of {dim}");
            return Err(Error::shape("kNN", "queries", expected, format!("{} values", queries.len())));
        }
        let mut scale = reciprocal_norms("queries", queries, dim, first)?;
        self.queries = scale.len();
        let mut rows = queries.to_vec();
        rows.resize(room * dim, 0.0);
        scale.resize(room, 0.0);
        self.exec.write(self.values.queries, bytemuck::cast_slice(&rows))?;
        self.exec.write(self.values.query_scale, bytemuck::cast_slice(&scale))?;
        (self.searched, self.waiting) = (0, Vec::with_capacity(self.shape.tile() * dim));
        Ok(())
    }

    /// Searches more rows of the bank.
    ///
    /// # Errors
    /// [`Error::Shape`] for features that are not finite; faults of the executor.
    pub fn push(&mut self, mut rows: &[f32]) -> Result<()> {
        let tile = self.shape.tile() * self.shape.dim;
        while !rows.is_empty() {
            let (now, later) = rows.split_at(rows.len().min(tile - self.waiting.len()));
            self.waiting.extend_from_slice(now);
            if self.waiting.len() == tile {
                self.merge()?;
            }
            rows = later;
        }
        Ok(())
    }

    /// The neighbours of each query, k a row, nearest first. The bank must have had at least k rows.
    ///
    /// # Errors
    /// As [`Search::push`]; [`Error::Shape`] for a bank of fewer rows.
    pub fn finish(&mut self) -> Result<Vec<Neighbour>> {
        if !self.waiting.is_empty() {
            self.merge()?;
        }
        let k = self.shape.k;
        if self.searched < k {
            return Err(Error::shape("kNN", "bank", format!("at least {k} rows"), self.searched));
        }
        self.exec.finish()?;
        let best: Vec<u64> = bytemuck::pod_collect_to_vec(self.exec.read(self.values.best)?.bytes());
        Ok(best.into_iter().take(self.queries * k).map(Neighbour::from_bits).collect())
    }

    /// Merges the waiting rows into what was found.
    fn merge(&mut self) -> Result<()> {
        let scale = reciprocal_norms("bank", &self.waiting, self.shape.dim, self.searched)?;
        let end = self.searched + scale.len();
        let range = [self.searched as i64, end as i64];
        self.exec.stage(self.values.bank, bytemuck::cast_slice(&self.waiting))?;
        self.exec.stage(self.values.bank_scale, bytemuck::cast_slice(&scale))?;
        self.exec.stage(self.values.range, bytemuck::cast_slice(&range))?;
        self.exec.run_step()?;
        self.waiting.clear();
        self.searched = end;
        Ok(())
    }
}
