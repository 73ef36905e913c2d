//! The records nearest to a few of them in feature space, found as the features come by.

use crate::error::{Error, Result};
use crate::ops::knn::Neighbour;

/// A search for the nearest records of some queries, which are records themselves and never their own neighbours.
#[derive(Debug)]
pub struct Search {
    queries: Vec<usize>,
    /// Unit rows.
    features: Vec<f64>,
    dim: usize,
    k: usize,
    /// The best so far, nearest first.
    nearest: Vec<Vec<Neighbour>>,
}

impl Search {
    /// Looks for the `k` nearest of each of `queries`, whose features are rows of `dim` values.
    ///
    /// # Errors
    /// [`Error::Shape`] when the features are not as many as the queries.
    pub fn new(queries: Vec<usize>, features: &[f32], dim: usize, k: usize) -> Result<Search> {
        if features.len() != queries.len() * dim {
            return Err(Error::shape("neighbours", "features of queries", queries.len() * dim, features.len()));
        }
        let unit = |row: &[f32]| {
            let scale = reciprocal_norm(row);
            row.iter().map(|&v| f64::from(v) * scale).collect::<Vec<f64>>()
        };
        let features = features.chunks_exact(dim).flat_map(unit).collect();
        let nearest = vec![Vec::with_capacity(k + 1); queries.len()];
        Ok(Search { queries, features, dim, k, nearest })
    }

    /// Looks at the rows of the records from `first` on.
    pub fn see(&mut self, first: usize, rows: &[f32]) {
        for (record, row) in rows.chunks_exact(self.dim).enumerate().map(|(i, row)| (first + i, row)) {
            let scale = reciprocal_norm(row);
            let searches = self.queries.iter().zip(self.features.chunks_exact(self.dim)).zip(&mut self.nearest);
            for ((_, query), nearest) in searches.filter(|((query, _), _)| **query != record) {
                let product: f64 = query.iter().zip(row).map(|(a, &b)| a * f64::from(b)).sum();
                let found = Neighbour::new((product * scale) as f32, record as u32);
                let place = nearest.partition_point(|kept| *kept > found);
                nearest.insert(place, found);
                nearest.truncate(self.k);
            }
        }
    }

    /// The queries, each with its neighbours and their cosines, nearest first.
    pub fn finish(self) -> Vec<(usize, Vec<(usize, f32)>)> {
        let found = |near: Vec<Neighbour>| near.into_iter().map(|n| (n.row() as usize, n.cosine())).collect();
        self.queries.into_iter().zip(self.nearest.into_iter().map(found)).collect()
    }
}

/// 0 for a row of zeros, whose cosine with everything is 0.
fn reciprocal_norm(row: &[f32]) -> f64 {
    let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 { 1.0 / norm } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_by_cosine_come_first_and_never_the_query() {
        // Directions 0, 90, 10, 40, 180 degrees and nothing, of different lengths.
        let angles = [0.0f32, 90.0, 10.0, 40.0, 180.0].map(f32::to_radians);
        let mut rows: Vec<f32> =
            angles.iter().enumerate().flat_map(|(i, a)| [a.cos(), a.sin()].map(|v| v * (i + 1) as f32)).collect();
        rows.extend([0.0, 0.0]);
        let queries = [rows[..2].to_vec(), rows[6..8].to_vec()].concat();
        let mut search = Search::new(vec![0, 3], &queries, 2, 3).unwrap();
        search.see(0, &rows[..6]);
        search.see(3, &rows[6..]);
        let found = search.finish();
        let records = |i: usize| found[i].1.iter().map(|n: &(usize, f32)| n.0).collect::<Vec<_>>();
        assert_eq!((found[0].0, records(0)), (0, vec![2, 3, 5]));
        assert_eq!((found[1].0, records(1)), (3, vec![2, 0, 1]));
        let expected = [10.0f32, 40.0].map(|a| a.to_radians().cos());
        for (near, expected) in found[0].1.iter().zip(expected) {
            assert!((near.1 - expected).abs() < 1e-6, "expected {expected}, got {}", near.1);
        }
        assert!(Search::new(vec![0], &queries, 2, 3).is_err());
    }
}
