//! Features as points in the plane: by their principal components, or by t-SNE (van der Maaten and Hinton 2008; Barnes-Hut
//! 2014).

use bhtsne::tSNE;

use crate::error::{Error, Result};
use crate::eval::pca::Pca;

/// Fewest points of a t-SNE: a neighbourhood has to be smaller than the set.
const FEWEST: usize = 16;
/// Neighbours that a point of a t-SNE feels, as is usual; less in small sets.
const PERPLEXITY: f32 = 30.0;
/// Accuracy of the Barnes-Hut tree, and steps of the descent: the customary ones.
const THETA: f32 = 0.5;
const STEPS: usize = 1000;
/// Principal components that a t-SNE starts from: the rest is mostly noise, and distances in all dimensions cost more.
const COMPONENTS: usize = 50;
/// Standard deviation of the start.
const START: f64 = 1e-4;

/// How features are mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Method {
    /// The first two principal components: distances and directions mean something, clusters may overlap.
    #[default]
    Pca,
    /// t-SNE: neighbours stay neighbours; distances between clusters, and their sizes, mean nothing.
    Tsne,
}

/// A map.
#[derive(Debug, Clone, PartialEq)]
pub struct Map {
    /// x and y of every row.
    pub points: Vec<[f64; 2]>,
    /// What the axes show; empty where they mean nothing.
    pub axes: [String; 2],
    /// How it was made.
    pub method: String,
}

impl Map {
    /// Maps `features`, rows of `dim` values.
    ///
    /// # Errors
    /// [`Error::Shape`] for values that are not finite, [`Error::Config`] for too few rows.
    pub fn of(features: &[f32], dim: usize, method: Method) -> Result<Map> {
        let n = features.len() / dim;
        let fewest = if method == Method::Tsne { FEWEST } else { 2 };
        if n < fewest || dim < 2 {
            let what = format!("expected at least {fewest} images and 2 dimensions, got {n} and {dim}");
            return Err(Error::config("--map-method", what));
        }
        match method {
            Method::Pca => {
                let pca = Pca::of(features, dim, 2)?;
                let axis = |i: usize| format!("principal component {} ({:.1} %)", i + 1, 100.0 * pca.explained[i]);
                let points = pca.coordinates.chunks_exact(2).map(|p| [p[0], p[1]]).collect();
                Ok(Map { points, axes: [axis(0), axis(1)], method: "PCA".into() })
            }
            Method::Tsne => {
                let pca = Pca::of(features, dim, COMPONENTS)?;
                let perplexity = PERPLEXITY.min(((n - 1) / 3) as f32);
                let points = tsne(&pca, n, perplexity)?;
                let components = pca.explained.len();
                let method = format!("t-SNE of {components} principal components (perplexity {perplexity})");
                Ok(Map { points, axes: [String::new(), String::new()], method })
            }
        }
    }
}

/// t-SNE of principal components, begun at the first two. On one thread: the library's sums depend on how many there are.
fn tsne(pca: &Pca, n: usize, perplexity: f32) -> Result<Vec<[f64; 2]>> {
    let k = pca.explained.len();
    let rows: Vec<f32> = pca.coordinates.iter().map(|&v| v as f32).collect();
    let samples: Vec<&[f32]> = rows.chunks_exact(k).collect();
    let spread = (pca.coordinates.iter().step_by(k).map(|v| v * v).sum::<f64>() / n as f64).sqrt();
    let scale = if spread > 0.0 { START / spread } else { 0.0 };
    let start: Vec<f32> =
        pca.coordinates.chunks_exact(k).flat_map(|row| [row[0], row[1]]).map(|v| (scale * v) as f32).collect();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let one = one.map_err(|e| Error::Unsupported { what: format!("cannot start a thread: {e}"), hint: None })?;
    let distance = |a: &&[f32], b: &&[f32]| a.iter().zip(*b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    let mapped = one.install(|| {
        let mut fit: tSNE<f32, &[f32]> = tSNE::new(&samples);
        fit.perplexity(perplexity).epochs(STEPS).initial_embedding(start).barnes_hut(THETA, distance).embedding()
    });
    Ok(mapped.chunks_exact(2).map(|p| [f64::from(p[0]), f64::from(p[1])]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// Three clusters of 60 points in 12 dimensions.
    fn clusters() -> Vec<f32> {
        let mut stream = Stream::new(5, 77, 0);
        let centres: Vec<f64> = (0..36).map(|_| 6.0 * stream.normal()).collect();
        (0..180 * 12).map(|i| (centres[i / 12 % 3 * 12 + i % 12] + stream.normal()) as f32).collect()
    }

    /// Share of points whose nearest other point is of their own cluster.
    fn purity(points: &[[f64; 2]]) -> f64 {
        let distance = |a: [f64; 2], b: [f64; 2]| (a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2);
        let own = |i: usize| {
            let others = (0..points.len()).filter(|&j| j != i);
            let nearest =
                others.min_by(|&a, &b| distance(points[i], points[a]).total_cmp(&distance(points[i], points[b])));
            nearest.is_some_and(|j| j % 3 == i % 3)
        };
        (0..points.len()).filter(|&i| own(i)).count() as f64 / points.len() as f64
    }

    #[test]
    fn clusters_stay_apart_and_the_map_is_always_the_same() {
        for method in [Method::Pca, Method::Tsne] {
            let map = Map::of(&clusters(), 12, method).unwrap();
            assert!(purity(&map.points) > 0.97, "{method:?}: {}", purity(&map.points));
            assert_eq!(map, Map::of(&clusters(), 12, method).unwrap(), "{method:?}");
        }
    }

    #[test]
    fn too_few_points_are_named() {
        let message = Map::of(&clusters()[..15 * 12], 12, Method::Tsne).unwrap_err().to_string();
        assert_eq!(message, "--map-method: expected at least 16 images and 2 dimensions, got 15 and 12");
        assert!(Map::of(&clusters()[..16 * 12], 12, Method::Tsne).is_ok());
    }
}
