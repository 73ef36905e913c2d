//! Collapse monitor: watches the spread **and** the effective rank of z. Either alone misses a kind of collapse: with
//! batch norm at the projector's end the spread stays near 1 while the rank falls; without it the spread falls first.

use std::fmt;

use nalgebra::{DMatrix, SymmetricEigen};
use serde::{Deserialize, Serialize};

/// Rows that [`effective_rank`] looks at: the cost of the eigenvalues grows with their cube.
pub const RANK_ROWS: usize = 512;

/// Below this, z std * sqrt(d) means collapse: a healthy run stays near 1, a network without output batch norm starts
/// near 0.8 and falls to 0.2 within three epochs without stop-gradient.
const STD_FLOOR: f64 = 0.5;
/// Below this share of its best value, the effective rank means collapse: on Fashion-MNIST at batch 128 and d 512 it starts
/// at 84, a healthy run levels off near 70 (0.83), one without stop-gradient falls to 19-37 (0.23-0.44) in three epochs.
const RANK_SHARE: f64 = 0.5;
/// Below this share of min(rows, d) the effective rank means collapse even when nothing better was ever seen.
const RANK_FLOOR: f64 = 0.02;
/// A value must climb this much above its floor before the next warning, so that noise at the floor warns once.
const RECOVERY: f64 = 1.2;

/// The effective rank of z (Roy & Vetterli 2007; RankMe, arXiv 2210.02885): exp of the entropy of the normalised singular
/// values of the rows z / norm(z), of the first [`RANK_ROWS`] rows at most. Between 1 (one direction) and min(rows, dim);
/// 0 when every row is zero, NaN when a value is not finite.
///
/// # Panics
/// If `z` does not hold `rows` times `dim` values.
pub fn effective_rank(z: &[f32], rows: usize, dim: usize) -> f64 {
    assert_eq!(z.len(), rows * dim, "effective_rank: z is not rows x dim");
    if z.iter().any(|x| !x.is_finite()) {
        return f64::NAN;
    }
    let rows = rows.min(RANK_ROWS);
    let mut unit = DMatrix::from_row_iterator(rows, dim, z[..rows * dim].iter().map(|&x| f64::from(x)));
    for mut row in unit.row_iter_mut() {
        let norm = row.norm();
        if norm > 0.0 {
            row /= norm;
        }
    }
    let gram = if rows <= dim { &unit * unit.transpose() } else { unit.tr_mul(&unit) };
    // Rounding can push the smallest eigenvalues of a singular matrix just below zero.
    let singular: Vec<f64> = SymmetricEigen::new(gram).eigenvalues.iter().map(|e| e.max(0.0).sqrt()).collect();
    let sum: f64 = singular.iter().sum();
    if sum == 0.0 {
        return 0.0;
    }
    let entropy: f64 = singular.iter().map(|s| s / sum).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
    entropy.exp()
}

/// Which measure fell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CollapseKind {
    /// All z point the same way: z std * sqrt(d) fell.
    Std,
    /// z lives in few directions: its effective rank fell.
    Rank,
}

/// A sign of collapse, worded for the user by `Display`.
#[derive(Debug, Clone, PartialEq)]
pub struct CollapseWarning {
    /// Which measure fell.
    pub kind: CollapseKind,
    z_std: f64,
    effective_rank: Option<f64>,
    best_rank: f64,
    rank_limit: usize,
}

impl fmt::Display for CollapseWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rank = self.effective_rank.map_or("not measured".into(), |rank| format!("{rank:.1}"));
        let (z_std, best, limit) = (self.z_std, self.best_rank, self.rank_limit);
        match self.kind {
            CollapseKind::Std => write!(
                f,
                "collapse: the spread of z fell to std * sqrt(d) = {z_std:.2} (healthy: about 1, alarm below {STD_FLOOR}; \
                 effective rank {rank})"
            )?,
            CollapseKind::Rank => write!(
                f,
                "collapse: the effective rank of z fell to {rank} of at most {limit} (best so far {best:.1}; alarm below \
                 {:.1}; z std * sqrt(d) = {z_std:.2}{})",
                rank_floor(best, limit),
                // Batch norm restores the variance of what it normalises, not its rank.
                if z_std < STD_FLOOR { "" } else { ", which batch norm at the projector's end may hold up" }
            )?,
        }
        f.write_str(
            "; hint: keep --stop-gradient true and --predictor mlp; else lower --base-lr or add --warmup-epochs, and keep \
             --head-bn default",
        )
    }
}

/// The effective rank below which a run counts as collapsed.
fn rank_floor(best: f64, limit: usize) -> f64 {
    (RANK_SHARE * best).max(RANK_FLOOR * limit as f64)
}

/// Watches z over a run and warns once per kind until that measure has recovered. Part of the training state, so that a
/// resumed run remembers its best rank and what it has warned of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CollapseMonitor {
    rank_limit: usize,
    best_rank: f64,
    std_warned: bool,
    rank_warned: bool,
}

impl CollapseMonitor {
    /// A monitor for effective ranks measured over `rows` rows of `dim` values.
    pub fn new(rows: usize, dim: usize) -> CollapseMonitor {
        let rank_limit = rows.min(RANK_ROWS).min(dim);
        CollapseMonitor { rank_limit, best_rank: 0.0, std_warned: false, rank_warned: false }
    }

    /// Takes z std * sqrt(d) and, when it was measured, the effective rank; returns what has newly fallen. Measure the rank
    /// once before the first update: the run is compared with its own best.
    pub fn observe(&mut self, z_std: f64, effective_rank: Option<f64>) -> Vec<CollapseWarning> {
        let mut fallen = Vec::new();
        if alarm(z_std, STD_FLOOR, &mut self.std_warned) {
            fallen.push(CollapseKind::Std);
        }
        if let Some(rank) = effective_rank {
            self.best_rank = self.best_rank.max(rank);
            if alarm(rank, rank_floor(self.best_rank, self.rank_limit), &mut self.rank_warned) {
                fallen.push(CollapseKind::Rank);
            }
        }
        let (best_rank, rank_limit) = (self.best_rank, self.rank_limit);
        let warning = |kind| CollapseWarning { kind, z_std, effective_rank, best_rank, rank_limit };
        fallen.into_iter().map(warning).collect()
    }
}

/// Whether `value` has newly fallen below `floor`.
fn alarm(value: f64, floor: f64, warned: &mut bool) -> bool {
    let fresh = value < floor && !*warned;
    *warned = value < floor || (*warned && value < RECOVERY * floor);
    fresh
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values any language can make: sin(12.9898 i + 78.233 j + i j), f32, with row i scaled by 1 + i.
    fn wave(rows: usize, dim: usize) -> Vec<f32> {
        let value = |i: usize, j: usize| {
            let (i, j) = (i as f64, j as f64);
            ((12.9898 * i + 78.233 * j + i * j).sin() * (1.0 + i)) as f32
        };
        (0..rows * dim).map(|k| value(k / dim, k % dim)).collect()
    }

    fn observe_all(monitor: &mut CollapseMonitor, series: &[(f64, f64)]) -> Vec<(usize, CollapseKind)> {
        let each = |(i, &(z_std, rank)): (usize, &(f64, f64))| {
            monitor.observe(z_std, Some(rank)).into_iter().map(|w| (i, w.kind)).collect::<Vec<_>>()
        };
        series.iter().enumerate().flat_map(each).collect()
    }

    #[test]
    fn effective_rank_matches_numpy() {
        // numpy.linalg.svd in float64 of the same rows: tall, wide, square, and more rows than are looked at.
        for (rows, dim, expected) in
            [(7, 3, 2.985568355), (5, 19, 4.871459728), (11, 11, 8.865941743), (700, 6, 5.999107781)]
        {
            let got = effective_rank(&wave(rows, dim), rows, dim);
            assert!((got - expected).abs() < 1e-6 * expected, "{rows} x {dim}: expected {expected}, got {got}");
        }
    }

    #[test]
    fn effective_rank_of_known_matrices() {
        let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-5, "expected {expected}, got {got}");
        let scaled_axes: Vec<f32> = (0..36).map(|k| if k / 6 == k % 6 { (k + 1) as f32 } else { 0.0 }).collect();
        close(effective_rank(&scaled_axes, 6, 6), 6.0); // rows are normalised, so their scale does not count
        // Rounding leaves singular values near 1e-8 beside the one of a constant matrix.
        close(effective_rank(&[0.3; 40], 8, 5), 1.0);
        // Two directions with 3 and 1 rows: singular values sqrt(3) and 1.
        let p = 3_f64.sqrt() / (3_f64.sqrt() + 1.0);
        let expected = (-p * p.ln() - (1.0 - p) * (1.0 - p).ln()).exp();
        close(effective_rank(&[1.0, 0.0, 2.0, 0.0, 0.0, -3.0, 5.0, 0.0], 4, 2), expected);
        assert_eq!(effective_rank(&[0.0; 12], 3, 4), 0.0);
        assert!(effective_rank(&[1.0, f32::INFINITY], 1, 2).is_nan());
    }

    #[test]
    fn a_healthy_run_never_warns() {
        let mut monitor = CollapseMonitor::new(128, 512);
        // Measured with PyTorch on Fashion-MNIST, batch 128, d 512, lr 0.05, every 15 steps.
        let series = [
            (0.998, 84.0),
            (0.999, 83.0),
            (0.998, 78.5),
            (0.998, 74.2),
            (0.995, 69.1),
            (0.997, 69.8),
            (0.997, 67.1),
            (0.99, 70.0),
        ];
        assert_eq!(observe_all(&mut monitor, &series), []);
    }

    #[test]
    fn output_batch_norm_hides_a_rank_collapse_from_the_spread() {
        let mut monitor = CollapseMonitor::new(128, 512);
        let series =
            [(0.998, 84.0), (0.996, 71.0), (0.993, 53.4), (0.983, 44.2), (0.990, 41.4), (0.990, 34.5), (0.97, 27.0)];
        assert_eq!(observe_all(&mut monitor, &series), [(4, CollapseKind::Rank)]);
        let mut monitor = CollapseMonitor::new(128, 512);
        monitor.observe(0.99, Some(72.0));
        let text = monitor.observe(0.97, Some(27.0))[0].to_string();
        for part in ["effective rank of z fell to 27.0 of at most 128", "best so far 72.0", "= 0.97", "--stop-gradient"]
        {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn without_output_batch_norm_both_fall() {
        let mut monitor = CollapseMonitor::new(128, 512);
        let series = [(0.799, 75.0), (0.746, 68.9), (0.457, 46.7), (0.331, 31.1), (0.19, 21.0)];
        assert_eq!(observe_all(&mut monitor, &series), [(2, CollapseKind::Std), (3, CollapseKind::Rank)]);
        let text = CollapseMonitor::new(128, 512).observe(0.19, None)[0].to_string();
        assert!(text.contains("std * sqrt(d) = 0.19") && text.contains("effective rank not measured"), "{text}");
    }

    #[test]
    fn a_run_that_starts_collapsed_is_noticed() {
        let warnings = CollapseMonitor::new(4096, 2048).observe(0.9, Some(8.0));
        assert_eq!(warnings.iter().map(|w| w.kind).collect::<Vec<_>>(), [CollapseKind::Rank]);
        assert!(warnings[0].to_string().contains("of at most 512"));
    }

    #[test]
    fn warns_again_only_after_recovery_and_remembers_across_a_checkpoint() {
        let mut monitor = CollapseMonitor::new(128, 512);
        let series = [(0.9, 80.0), (0.49, 80.0), (0.51, 80.0), (0.49, 80.0), (0.7, 80.0), (0.4, 80.0)];
        assert_eq!(observe_all(&mut monitor, &series), [(1, CollapseKind::Std), (5, CollapseKind::Std)]);
        let text = serde_json::to_string(&monitor).unwrap();
        let mut resumed: CollapseMonitor = serde_json::from_str(&text).unwrap();
        assert_eq!(resumed, monitor);
        assert_eq!(observe_all(&mut resumed, &[(0.4, 39.0)]), [(0, CollapseKind::Rank)]);
    }
}
