//! The arithmetic of an axis: its range, its ticks, and the parts of a line that lie inside it. No drawing.

/// Rounds a raw step up to 1, 2 or 5 times a power of ten.
fn nice_step(raw: f64) -> f64 {
    let power = 10f64.powf(raw.log10().floor());
    let factor = raw / power;
    power * [1.0, 2.0, 5.0].into_iter().find(|nice| factor <= nice * (1.0 + 1e-9)).unwrap_or(10.0)
}

/// Round values inside a range, and how to print them.
#[derive(Debug)]
pub struct Ticks {
    /// The values, rising.
    pub values: Vec<f64>,
    step: f64,
}

impl Ticks {
    /// At most `most` ticks inside `lo..=hi`, `step_at_least` apart.
    pub fn new((lo, hi): (f64, f64), most: usize, step_at_least: f64) -> Ticks {
        let step = nice_step(((hi - lo) / most as f64).max(step_at_least));
        // A step that vanishes beside the values themselves would never advance; the rounding slack keeps a tick at `hi`.
        let first = (lo / step - 1e-9).ceil();
        let count = ((hi / step + 1e-9).floor() - first).clamp(0.0, most as f64) as usize;
        Ticks { values: (0..=count).map(|i| (first + i as f64) * step).collect(), step }
    }

    /// `value` with as many decimals as the step has, and `more`.
    pub fn format(&self, value: f64, more: i32) -> String {
        let largest = self.values.iter().fold(self.step, |m, v| m.max(v.abs()));
        if !(1e-4..1e6).contains(&largest) {
            let text = format!("{value:.*e}", more.max(0) as usize).replace('-', "\u{2212}");
            return if value == 0.0 { "0".into() } else { text };
        }
        let decimals = (more - (self.step.log10() + 1e-9).floor() as i32).clamp(0, 9) as usize;
        let text = format!("{value:.decimals$}");
        match text.strip_prefix('-') {
            // A rounded "-0.0" is zero to the reader.
            Some(digits) if digits.bytes().all(|b| matches!(b, b'0' | b'.')) => digits.to_string(),
            Some(digits) => format!("\u{2212}{digits}"),
            None => text,
        }
    }
}

/// The range of the finite `values` with a margin on both sides; a unit range where there are none.
pub fn padded_range(values: impl Iterator<Item = f64>, margin: f64) -> (f64, f64) {
    match finite_range(values) {
        None => (0.0, 1.0),
        Some((lo, hi)) if hi - lo <= 1e-9 * hi.abs().max(lo.abs()) => {
            let pad = if lo == 0.0 { 1.0 } else { 0.05 * lo.abs() };
            (lo - pad, hi + pad)
        }
        Some((lo, hi)) => (lo - margin * (hi - lo), hi + margin * (hi - lo)),
    }
}

fn finite_range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    // Half the largest float: a range between two of them must not overflow.
    let usable = |v: &f64| v.abs() < f64::MAX / 4.0;
    values
        .filter(usable)
        .fold(None, |range, v| Some(range.map_or((v, v), |(lo, hi): (f64, f64)| (lo.min(v), hi.max(v)))))
}

/// The pieces of the line through `points` that lie in `lo..=hi`: it breaks at non-finite points and where it leaves the range.
pub fn visible_runs(points: &[(f64, f64)], (lo, hi): (f64, f64)) -> Vec<Vec<(f64, f64)>> {
    let mut runs: Vec<Vec<(f64, f64)>> = vec![];
    let mut run: Vec<(f64, f64)> = vec![];
    let mut previous: Option<(f64, f64)> = None;
    let inside = |p: (f64, f64)| (lo..=hi).contains(&p.1);
    for &point in points {
        if !(point.0.is_finite() && point.1.is_finite()) {
            runs.push(std::mem::take(&mut run));
            previous = None;
            continue;
        }
        if let Some(before) = previous {
            let mut edges: Vec<_> = [lo, hi].into_iter().filter_map(|edge| crossing(before, point, edge)).collect();
            edges.sort_by(|a, b| (a.0 - before.0).abs().total_cmp(&(b.0 - before.0).abs()));
            run.extend(edges);
            if !inside(point) {
                runs.push(std::mem::take(&mut run));
            }
        }
        if inside(point) {
            run.push(point);
        }
        previous = Some(point);
    }
    runs.push(run);
    runs.retain(|run| !run.is_empty());
    runs
}

/// Where the segment from `a` to `b` strictly crosses the height `edge`.
fn crossing(a: (f64, f64), b: (f64, f64), edge: f64) -> Option<(f64, f64)> {
    if (a.1 < edge) == (b.1 < edge) || a.1 == edge || b.1 == edge {
        return None;
    }
    let t = (edge - a.1) / (b.1 - a.1);
    Some((a.0 + t * (b.0 - a.0), edge))
}

/// Thins a run to what `columns` pixel columns can show: of each column the first, lowest, highest and last point.
pub fn thin(run: Vec<(f64, f64)>, (lo, hi): (f64, f64), columns: usize) -> Vec<(f64, f64)> {
    if run.len() <= 4 * columns {
        return run;
    }
    let column = |p: &(f64, f64)| ((p.0 - lo) / (hi - lo) * columns as f64) as usize;
    let mut kept = vec![];
    for group in run.chunk_by(|a, b| column(a) == column(b)) {
        let extreme = |pick: fn(f64, f64) -> bool| {
            (1..group.len()).fold(0, |best, i| if pick(group[i].1, group[best].1) { i } else { best })
        };
        let mut indices = [0, extreme(|a, b| a < b), extreme(|a, b| a > b), group.len() - 1];
        indices.sort_unstable();
        kept.extend(indices.chunk_by(|a, b| a == b).map(|same| group[same[0]]));
    }
    kept
}

/// Moves `positions` (of labels of `height`) apart until none overlap and all lie in `top..=bottom` if they can.
pub fn spread(positions: &mut [f64], height: f64, (top, bottom): (f64, f64)) {
    let mut order: Vec<usize> = (0..positions.len()).collect();
    order.sort_by(|&a, &b| positions[a].total_cmp(&positions[b]));
    let mut floor = top;
    for &i in &order {
        positions[i] = positions[i].max(floor);
        floor = positions[i] + height;
    }
    let mut ceiling = bottom;
    for &i in order.iter().rev() {
        positions[i] = positions[i].min(ceiling);
        ceiling = positions[i] - height;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(range: (f64, f64), most: usize) -> Vec<String> {
        let ticks = Ticks::new(range, most, 0.0);
        ticks.values.iter().map(|&v| ticks.format(v, 0)).collect()
    }

    #[test]
    fn ticks_are_round_and_printed_alike() {
        assert_eq!(labels((-0.93, 0.02), 5), ["−0.8", "−0.6", "−0.4", "−0.2", "0.0"]);
        assert_eq!(labels((70.0, 80.0), 5), ["70", "72", "74", "76", "78", "80"]);
        assert_eq!(labels((0.0, 4e-6), 4), ["0", "1e−6", "2e−6", "3e−6", "4e−6"]);
        assert_eq!(labels((0.949, 1.031), 5), ["0.96", "0.98", "1.00", "1.02"]);
        assert_eq!(Ticks::new((0.0, 3.0), 10, 1.0).values, [0.0, 1.0, 2.0, 3.0]);
        assert_eq!(Ticks::new((0.0, 12.0), 5, 0.0).format(-0.004, 1), "0.0");
    }

    #[test]
    fn ranges_survive_what_training_logs() {
        assert_eq!(padded_range([].into_iter(), 0.1), (0.0, 1.0));
        assert_eq!(padded_range([f64::NAN, f64::INFINITY].into_iter(), 0.1), (0.0, 1.0));
        assert_eq!(padded_range([0.0, 0.0].into_iter(), 0.1), (-1.0, 1.0));
        assert_eq!(padded_range([-2.0, -2.0].into_iter(), 0.1), (-2.1, -1.9));
        assert_eq!(padded_range([1.0, f64::NAN, 3.0].into_iter(), 0.5), (0.0, 4.0));
        let (lo, hi) = padded_range([-f64::MAX, 1.0, f64::MAX].into_iter(), 0.1);
        assert!((hi - lo).is_finite());
    }

    #[test]
    fn lines_break_at_gaps_and_at_the_edges() {
        let points = [(0.0, 5.0), (1.0, f64::NAN), (2.0, 5.0), (3.0, 15.0), (4.0, -5.0), (5.0, 10.0)];
        let expected: Vec<Vec<(f64, f64)>> = vec![
            vec![(0.0, 5.0)],
            vec![(2.0, 5.0), (2.5, 10.0)],
            vec![(3.25, 10.0), (3.75, 0.0)],
            vec![(4.0 + 1.0 / 3.0, 0.0), (5.0, 10.0)],
        ];
        assert_eq!(visible_runs(&points, (0.0, 10.0)), expected);
        assert!(visible_runs(&[(0.0, 20.0), (1.0, 30.0)], (0.0, 10.0)).is_empty());
    }

    #[test]
    fn thinning_keeps_extremes_and_ends() {
        let wave: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), f64::from(i * 7 % 101))).collect();
        let thinned = thin(wave.clone(), (0.0, 9_999.0), 10);
        assert!(thinned.len() <= 44, "{}", thinned.len());
        assert_eq!((thinned[0], thinned[thinned.len() - 1]), (wave[0], wave[9_999]));
        assert_eq!(finite_range(thinned.iter().map(|p| p.1)), Some((0.0, 100.0)));
        assert!(thinned.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(thin(wave[..40].to_vec(), (0.0, 39.0), 10), wave[..40]);
    }

    #[test]
    fn labels_never_overlap_while_there_is_room() {
        let mut positions = [50.0, 48.0, 99.0, 98.0, 0.0];
        spread(&mut positions, 10.0, (5.0, 95.0));
        assert_eq!(positions, [58.0, 48.0, 95.0, 85.0, 5.0]);
    }
}
