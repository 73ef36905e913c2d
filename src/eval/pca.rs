//! Principal components of features, exactly: block power iteration with Rayleigh-Ritz steps on the covariance, which is
//! never formed.

use nalgebra::DMatrix;

use crate::backend::cpu::{Mat, gemm_blocks};
use crate::error::{Error, Result};
use crate::rng::Stream;

/// Separates the random start from all other draws.
const PCA_DOMAIN: u32 = 0x9CA0_0001;
/// Directions iterated beyond those wanted: convergence goes with the eigenvalue behind the last of them.
const MORE: usize = 10;
/// Length of `C v - lambda v`, relative to the largest eigenvalue, at which a component is found.
const TOLERANCE: f64 = 1e-10;
/// Of spectra so flat that this does not suffice the components are of no use to anybody.
const MOST_STEPS: usize = 5_000;

/// The first principal components of a set of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Pca {
    /// Unit vectors `[k][dim]`, by falling variance; the entry of the largest magnitude is positive in each.
    pub components: Vec<f64>,
    /// Coordinates of the rows, `[n][k]`, from their mean.
    pub coordinates: Vec<f64>,
    /// Share of the variance in each, in 0..=1.
    pub explained: Vec<f64>,
}

impl Pca {
    /// The first `k` components of `features`, rows of `dim` values (fewer where there are fewer dimensions).
    ///
    /// # Errors
    /// [`Error::Shape`] for fewer than 2 rows, or values that are not finite.
    pub fn of(features: &[f32], dim: usize, k: usize) -> Result<Pca> {
        let n = features.len().checked_div(dim).unwrap_or(0);
        if n < 2 {
            return Err(Error::shape("PCA", "rows", "at least 2", n));
        }
        if let Some(at) = features.iter().position(|v| !v.is_finite()) {
            let got = format!("{} in row {}", features[at], at / dim);
            return Err(Error::shape("PCA", "features", "finite numbers", got));
        }
        let k = k.min(dim);
        let rows = centred(features, dim);
        let (components, variances) = components(&rows, [n, dim], k);
        let mut coordinates = vec![0.0; n * k];
        let transposed = Mat::row_major(&components[..], k, dim).t();
        gemm_blocks(Mat::row_major(&mut coordinates, n, k), Mat::row_major(&rows, n, dim), transposed, false);
        let total: f64 = rows.iter().map(|v| v * v).sum();
        let explained = variances.iter().map(|v| if total > 0.0 { v / total } else { 0.0 }).collect();
        Ok(Pca { components, coordinates, explained })
    }
}

/// The rows less their mean.
fn centred(features: &[f32], dim: usize) -> Vec<f64> {
    let n = features.len() / dim;
    let mut mean = vec![0.0; dim];
    for row in features.chunks_exact(dim) {
        mean.iter_mut().zip(row).for_each(|(mean, &v)| *mean += f64::from(v) / n as f64);
    }
    features.chunks_exact(dim).flat_map(|row| row.iter().zip(&mean).map(|(&v, mean)| f64::from(v) - mean)).collect()
}

/// The first `k` eigenvectors of `rows^T rows` as rows, and their eigenvalues.
fn components(rows: &[f64], [n, dim]: [usize; 2], k: usize) -> (Vec<f64>, Vec<f64>) {
    let block = (k + MORE).min(dim);
    let mut stream = Stream::new(0, PCA_DOMAIN, 0);
    let mut basis: Vec<f64> = (0..block * dim).map(|_| stream.normal()).collect();
    orthonormalise(&mut basis, dim, &mut stream);
    let (mut projected, mut image) = (vec![0.0; n * block], vec![0.0; block * dim]);
    let mut found = (Vec::new(), Vec::new());
    for _ in 0..MOST_STEPS {
        // image = basis (rows^T rows)
        let matrix = Mat::row_major(rows, n, dim);
        let directions = Mat::row_major(&basis[..], block, dim);
        gemm_blocks(Mat::row_major(&mut projected, n, block), matrix, directions.t(), false);
        let seen = Mat::row_major(&projected[..], n, block);
        gemm_blocks(Mat::row_major(&mut image, block, dim), seen.t(), matrix, false);
        let (turned, turned_image, values) = ritz(&basis, &image, [block, dim]);
        let scale = values.first().copied().unwrap_or(0.0).max(0.0);
        let residual = |i: usize| {
            let pairs = turned[i * dim..][..dim].iter().zip(&turned_image[i * dim..][..dim]);
            pairs.map(|(v, image)| (image - values[i] * v).powi(2)).sum::<f64>().sqrt()
        };
        let done = (0..k).all(|i| residual(i) <= TOLERANCE * scale);
        found = (turned, values);
        if done {
            break;
        }
        basis = turned_image;
        orthonormalise(&mut basis, dim, &mut stream);
    }
    let (mut vectors, mut values) = found;
    vectors.truncate(k * dim);
    values.truncate(k);
    vectors.chunks_exact_mut(dim).for_each(fix_sign);
    (vectors, values)
}

/// Within the span of `basis`, the best eigenvectors (as rows), their images and their eigenvalues, falling.
fn ritz(basis: &[f64], image: &[f64], [block, dim]: [usize; 2]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut small = vec![0.0; block * block];
    let [basis, image] = [basis, image].map(|m| Mat::row_major(m, block, dim));
    gemm_blocks(Mat::row_major(&mut small, block, block), basis, image.t(), false);
    let symmetric = DMatrix::from_fn(block, block, |i, j| (small[i * block + j] + small[j * block + i]) / 2.0);
    let eigen = symmetric.symmetric_eigen();
    let mut order: Vec<usize> = (0..block).collect();
    order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    let turn: Vec<f64> =
        order.iter().flat_map(|&j| eigen.eigenvectors.column(j).iter().copied().collect::<Vec<_>>()).collect();
    let turned = |matrix: Mat<&[f64]>| {
        let mut out = vec![0.0; block * dim];
        gemm_blocks(Mat::row_major(&mut out, block, dim), Mat::row_major(&turn[..], block, block), matrix, false);
        out
    };
    (turned(basis), turned(image), order.iter().map(|&j| eigen.eigenvalues[j]).collect())
}

/// Gram-Schmidt on rows, twice, which is as good as exact; a row that adds no direction is replaced by a random one.
fn orthonormalise(rows: &mut [f64], dim: usize, stream: &mut Stream) {
    for i in 0..rows.len() / dim {
        let (before, rest) = rows.split_at_mut(i * dim);
        let row = &mut rest[..dim];
        while !stands_alone(before, row) {
            row.fill_with(|| stream.normal());
        }
    }
}

/// Makes `row` a unit vector orthogonal to the rows `before`; false when nothing of it is left.
fn stands_alone(before: &[f64], row: &mut [f64]) -> bool {
    for _ in 0..2 {
        let length = norm(row);
        for other in before.chunks_exact(row.len()) {
            let along: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(other).for_each(|(a, b)| *a -= along * b);
        }
        let left = norm(row);
        if left.is_nan() || left <= 1e-13 * length {
            return false;
        }
        row.iter_mut().for_each(|v| *v /= left);
    }
    true
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// The sign that makes the largest entry positive.
fn fix_sign(vector: &mut [f64]) {
    let largest = vector.iter().copied().fold(0.0, |most: f64, v| if v.abs() > most.abs() { v } else { most });
    if largest < 0.0 {
        vector.iter_mut().for_each(|v| *v = -*v);
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        dim: usize,
        k: usize,
        rows: Vec<f32>,
        components: Vec<f64>,
        coordinates: Vec<f64>,
        explained: Vec<f64>,
    }

    fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(got.len(), expected.len(), "{what}");
        let scale = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            assert!((got - expected).abs() <= tolerance * scale, "{what} {i}: expected {expected}, got {got}");
        }
    }

    #[test]
    fn components_are_those_of_numpys_svd() {
        for golden in serde_json::from_str::<Vec<Golden>>(include_str!("../../tests/fixtures/pca.json")).unwrap() {
            let pca = Pca::of(&golden.rows, golden.dim, golden.k).unwrap();
            assert_close("component", &pca.components, &golden.components, 1e-8);
            assert_close("coordinate", &pca.coordinates, &golden.coordinates, 1e-8);
            assert_close("share", &pca.explained, &golden.explained, 1e-10);
        }
    }

    #[test]
    fn what_has_no_spread_has_no_components_to_speak_of() {
        let same = Pca::of(&[1.5f32; 12], 3, 2).unwrap();
        assert!(same.explained == [0.0, 0.0] && same.coordinates.iter().all(|v| *v == 0.0), "{same:?}");
        let line: Vec<f32> = (0..5).flat_map(|i| [i as f32, -2.0 * i as f32, 7.0]).collect();
        let pca = Pca::of(&line, 3, 2).unwrap();
        assert!((pca.explained[0] - 1.0).abs() < 1e-12 && pca.explained[1].abs() < 1e-12, "{:?}", pca.explained);
        assert_eq!(Pca::of(&line, 3, 9).unwrap().explained.len(), 3, "no more components than dimensions");
        assert!(Pca::of(&line[..3], 3, 2).is_err());
        assert!(Pca::of(&[1.0, f32::NAN, 2.0, 3.0], 2, 2).unwrap_err().to_string().contains("in row 0"));
    }
}
