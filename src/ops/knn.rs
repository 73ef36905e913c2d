//! Weighted kNN as ops: the nearest bank rows of each query while the bank passes by in tiles, and their vote.
//!
//! A classifier multiplies its queries with one tile of the bank after the other ([`crate::ops::linear::Linear`]) and
//! merges each tile of products into what it has found; it never holds more than a tile.

use rayon::prelude::*;

use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::{Op, Tensors, Traffic};
use crate::tensor::{DType, TensorDesc};

/// Most neighbours of a query that the ops keep.
pub const MAX_NEIGHBOURS: usize = 256;

/// A bank row seen from a query, as one number that is greater the nearer the row is. Cosines are ordered as
/// [`f32::total_cmp`] does; of equal ones the lower row is nearer, so no two neighbours of a query are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour(u64);

impl Neighbour {
    /// The neighbour in bank row `row` at `cosine`.
    pub fn new(cosine: f32, row: u32) -> Neighbour {
        let bits = cosine.to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        Neighbour(u64::from(ordered) << 32 | u64::from(!row))
    }

    /// The neighbour that [`KnnMerge`] keeps as these bits.
    pub fn from_bits(bits: u64) -> Neighbour {
        Neighbour(bits)
    }

    /// Its cosine to the query.
    pub fn cosine(self) -> f32 {
        let ordered = (self.0 >> 32) as u32;
        f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
    }

    /// Its row in the bank.
    pub fn row(self) -> u32 {
        !(self.0 as u32)
    }
}

/// The class that most votes go to, the lowest of equal ones: each of the neighbours, given by cosine and class with
/// the nearest first, votes with weight `exp((cosine - 1) / temperature)`.
///
/// The votes are those of `exp(cosine / temperature)` up to a common factor, which keeps small temperatures from
/// overflowing.
pub fn elect(neighbours: impl Iterator<Item = (f32, usize)>, temperature: f64, classes: usize) -> usize {
    let mut votes = vec![0.0; classes];
    for (cosine, class) in neighbours {
        votes[class] += ((f64::from(cosine) - 1.0) / temperature).exp();
    }
    (1..classes).fold(0, |best, class| if votes[class] > votes[best] { class } else { best })
}

/// Merges one tile of the bank into the nearest neighbours found so far.
///
/// Inputs: products `[queries][tile]`, the queries' and the tile's reciprocal norms `[queries]` and `[tile]` (all F32),
/// and the range of bank rows in the tile, start and end (I64 `[2]`); columns behind its end are ignored. The cosine is
/// `product * query_scale * bank_scale`. Updates `[queries][k]` (I64, k at most [`MAX_NEIGHBOURS`]): the bits of the
/// best [`Neighbour`]s, nearest first, 0 for none. A tile that starts at bank row 0 begins a new search. A bank has
/// fewer than 2^32 - 1 rows.
#[derive(Debug, Clone, Copy)]
pub struct KnnMerge;

/// Numbers of queries and of neighbours of each.
fn best_dims(op: &str, best: &TensorDesc) -> Result<[usize; 2]> {
    let [queries, k] = best.shape.expect(op, "best")?;
    if k == 0 || k > MAX_NEIGHBOURS || best.dtype != DType::I64 {
        return Err(Error::shape(op, "best", format!("i64[queries, 1 to {MAX_NEIGHBOURS}]"), best));
    }
    Ok([queries, k])
}

/// Numbers of queries, columns of the tile and neighbours of what a [`KnnMerge`] works on.
fn merge_dims(products: &TensorDesc, best: &TensorDesc) -> Result<[usize; 3]> {
    let ([queries, tile], [rows, k]) = (products.shape.expect("knn_merge", "products")?, best_dims("knn_merge", best)?);
    if rows != queries {
        return Err(Error::shape("knn_merge", "rows of best", queries, rows));
    }
    Ok([queries, tile, k])
}

impl Op for KnnMerge {
    fn name(&self) -> &'static str {
        "knn_merge"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [queries, tile] = inputs[0].shape.expect(self.name(), "products")?;
        let expected = [
            ("products", TensorDesc::new([queries, tile], DType::F32)),
            ("query_scale", TensorDesc::new([queries], DType::F32)),
            ("bank_scale", TensorDesc::new([tile], DType::F32)),
            ("range", TensorDesc::new([2], DType::I64)),
        ];
        for ((what, expected), input) in expected.into_iter().zip(inputs) {
            if **input != expected {
                return Err(Error::shape(self.name(), what, expected, input));
            }
        }
        Ok(Vec::new())
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let [_, tile, k] = merge_dims(io.inputs[0].desc, io.updates[0].desc)?;
        let (products, query_scale) = (io.inputs[0].get::<f32>(), io.inputs[1].get::<f32>());
        let (bank_scale, range) = (io.inputs[2].get::<f32>(), io.inputs[3].get::<i64>());
        let (first, columns) = (range[0], usize::try_from(range[1] - range[0]).unwrap_or(0));
        let queries = io.updates[0].get::<u64>().par_chunks_mut(k).zip(products.par_chunks(tile)).zip(query_scale);
        queries.for_each(|((best, products), query_scale)| {
            if first == 0 {
                best.fill(0);
            }
            let farthest = best[k - 1];
            let scaled = products.iter().zip(bank_scale).take(columns).enumerate();
            let found = scaled.map(|(column, (product, bank_scale))| {
                Neighbour::new(product * query_scale * bank_scale, (first + column as i64) as u32).0
            });
            let mut all: Vec<u64> = best.iter().copied().chain(found.filter(|&found| found > farthest)).collect();
            all.sort_unstable_by(|a, b| b.cmp(a));
            best.copy_from_slice(&all[..k]);
        });
        Ok(())
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::merge(io)
    }
}

/// The vote of the nearest neighbours.
///
/// Inputs: what [`KnnMerge`] found, `[queries][k]`, and the bank's labels `[bank]` (I64). Output `[queries]` (I64): the
/// class as [`elect`] has it, or -1 where a neighbour is missing, lies outside the bank or has a label outside
/// `0..classes`.
#[derive(Debug, Clone, Copy)]
pub struct KnnVote {
    /// How fast a vote's weight falls with distance.
    pub temperature: f64,
    /// Number of classes.
    pub classes: usize,
}

impl Op for KnnVote {
    fn name(&self) -> &'static str {
        "knn_vote"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let [queries, _] = best_dims(self.name(), inputs[0])?;
        let [bank] = inputs[1].shape.expect(self.name(), "labels")?;
        if bank >= u32::MAX as usize || inputs[1].dtype != DType::I64 || self.classes == 0 {
            return Err(Error::shape(
                self.name(),
                "labels",
                "i64, fewer than 2^32 - 1, of at least one class",
                inputs[1],
            ));
        }
        Ok(vec![TensorDesc::new([queries], DType::I64)])
    }

    fn differentiable(&self) -> bool {
        false
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let k = io.inputs[0].desc.shape.channels();
        let (best, labels) = (io.inputs[0].get::<u64>(), io.inputs[1].get::<i64>());
        let class_of = |neighbour: Neighbour| {
            let class = usize::try_from(*labels.get(neighbour.row() as usize)?).ok()?;
            (class < self.classes).then_some((neighbour.cosine(), class))
        };
        io.outputs[0].get::<i64>().par_iter_mut().zip(best.par_chunks(k)).for_each(|(prediction, best)| {
            let votes: Option<Vec<_>> = best.iter().map(|&bits| class_of(Neighbour(bits))).collect();
            *prediction = votes.map_or(-1, |votes| elect(votes.into_iter(), self.temperature, self.classes) as i64);
        });
        Ok(())
    }

    /// Of the labels those of the neighbours.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let [best, labels] = [tensors.inputs[0].bytes(), tensors.inputs[1].bytes()];
        Traffic { read: (best + labels.min(best)) as u64, ..tensors.once() }
    }

    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        cuda::vote(*self, io)
    }
}

pub(super) mod cuda {
    #![allow(unsafe_code)] // launches

    use super::{KnnVote, best_dims, merge_dims};
    use crate::backend::cuda::kernel::kernels;
    use crate::backend::cuda::{CudaIo, DevicePtr, Grid};
    use crate::error::Result;
    use crate::ops::row_teams::count;

    kernels! { "knn";
        /// merges a tile into best
        fn knn_merge[; 256](
            products: DevicePtr, query_scale: DevicePtr, bank_scale: DevicePtr, range: DevicePtr, best: DevicePtr,
            queries: i64, tile: i32, k: i32,
        );
        /// the class that the neighbours vote for
        fn knn_vote[; 256](
            best: DevicePtr, labels: DevicePtr, predictions: DevicePtr,
            queries: i64, bank_rows: i64, classes: i64, k: i32, temperature: f64,
        );
    }

    pub fn merge(io: &CudaIo<'_>) -> Result<()> {
        let [queries, tile, k] = merge_dims(io.inputs[0].desc, io.updates[0].desc)?;
        let [products, query_scale, bank_scale, range] = [0, 1, 2, 3].map(|i| io.inputs[i].ptr);
        let (best, length) = (io.updates[0].ptr, count(tile)?);
        let call = knn_merge(products, query_scale, bank_scale, range, best, queries as i64, length, k as i32);
        // SAFETY: `infer` checked that products are [queries][tile] and the scales [queries] and [tile], and
        // `merge_dims` that best is [queries][k] with 1 <= k <= 256.
        unsafe { io.launch(Grid::stride(queries, 1), call) }
    }

    pub fn vote(op: KnnVote, io: &CudaIo<'_>) -> Result<()> {
        let ([best, labels], predictions) = ([io.inputs[0], io.inputs[1]], io.outputs[0].ptr);
        let [queries, k] = best_dims("knn_vote", best.desc)?;
        let (bank, classes) = (labels.desc.shape.len() as i64, op.classes as i64);
        let call = knn_vote(best.ptr, labels.ptr, predictions, queries as i64, bank, classes, k as i32, op.temperature);
        // SAFETY: `infer` checked that best is [queries][k] with 1 <= k <= 256 and made predictions [queries]; the
        // kernel reads a label only of a row below `bank`.
        unsafe { io.launch(Grid::stride(queries, 1), call) }
    }
}

#[cfg(test)]
mod tests {
    use super::Neighbour;

    #[test]
    fn nearer_is_greater_and_ties_go_to_the_lower_row() {
        let ascending = [f32::NEG_INFINITY, -1.5, -1e-40, -0.0, 0.0, 1e-40, 0.999_999_94, 1.0, f32::INFINITY];
        for (i, &cosine) in ascending.iter().enumerate() {
            for row in [0, 1, 77, u32::MAX - 1] {
                let neighbour = Neighbour::new(cosine, row);
                assert_eq!((neighbour.cosine().to_bits(), neighbour.row()), (cosine.to_bits(), row));
                assert!(Neighbour::new(cosine, row + 1) < neighbour);
                assert!(ascending[..i].iter().all(|&less| Neighbour::new(less, 0) < neighbour));
            }
        }
    }
}
