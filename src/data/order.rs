//! The order of an epoch: a pseudo-random permutation that is computed, not stored. A four-round Feistel network on Philox
//! permutes the next power of four; indices that fall outside `0..n` are walked on until they fall inside. So any
//! position of any epoch can be sought at once, in constant memory.
//!
//! For slow disks the order can go by windows of consecutive records ([`EpochOrder::in_windows`]): the windows come in a
//! pseudo-random order, and so do the records inside each, but the disk reads a window from its start to its end. The
//! borders of the windows lie elsewhere in every epoch, so that neighbours are not neighbours for ever.

use crate::rng;

/// Keeps these draws apart from all others under the same seed (fourth counter word, the last byte of which is free).
const DOMAIN: u32 = 0x5EED_0000;
const ROUNDS: u32 = 4;

/// What a permutation is for: keeps its draws apart from those of the others (fourth counter word).
#[derive(Debug, Clone, Copy)]
enum Use {
    Records = 0x00,
    Windows = 0x10,
    InWindow = 0x20,
    Borders = 0x30,
}

/// A pseudo-random permutation of `0..n`.
#[derive(Debug, Clone)]
struct Permutation {
    n: u64,
    half_bits: u32,
    key: [u32; 2],
    epoch: u32,
    domain: u32,
    /// Tells permutations of the same use apart.
    number: u32,
}

impl Permutation {
    fn new(n: u64, seed: u64, epoch: u32, purpose: Use, number: u32) -> Permutation {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        Permutation { n, half_bits, key: rng::key(seed), epoch, domain: DOMAIN | purpose as u32, number }
    }

    fn at(&self, position: u64) -> u64 {
        assert!(position < self.n, "position {position} of {}", self.n);
        // The walk ends: it runs along one cycle of a permutation, and that cycle contains `position`, which is inside.
        let mut x = self.permute(position);
        while x >= self.n {
            x = self.permute(x);
        }
        x
    }

    /// One pass of the Feistel network over `0..4^half_bits`.
    fn permute(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..ROUNDS {
            // A half has 32 bits at most.
            let counter = [right as u32, self.number, self.epoch, self.domain | round];
            let mixed = u64::from(rng::philox(counter, self.key)[0]);
            (left, right) = (right, left ^ (mixed & mask));
        }
        (left << self.half_bits) | right
    }
}

/// The permutation of `0..n` of one epoch.
#[derive(Debug, Clone)]
pub struct EpochOrder {
    seed: u64,
    epoch: u32,
    records: Permutation,
    windows: Option<Windows>,
}

/// How an epoch is cut into windows. The records are seen as a ring that begins at `rotation`; every window has `len` of
/// them, except one that has what is left.
#[derive(Debug, Clone)]
struct Windows {
    len: u64,
    rotation: u64,
    /// The order of the windows of full length.
    full: Permutation,
    /// The short window, and how many full ones come before it in the epoch.
    short_len: u64,
    short_after: u64,
}

/// A window: positions `start..start + len` of the epoch visit `len` consecutive records from the `first` of the ring.
struct Window {
    start: u64,
    len: u64,
    first: u64,
}

impl Windows {
    fn new(n: u64, len: u64, seed: u64, epoch: u32) -> Windows {
        let (full, short_len) = (n / len, n % len);
        let [a, b, c, d] = rng::philox([0, 0, epoch, DOMAIN | Use::Borders as u32], rng::key(seed));
        let wide = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        let full_order = Permutation::new(full, seed, epoch, Use::Windows, 0);
        Windows { len, rotation: wide(a, b) % n, full: full_order, short_len, short_after: wide(c, d) % (full + 1) }
    }

    fn holding(&self, position: u64) -> Window {
        let Windows { len, short_len, .. } = *self;
        let short_start = self.short_after * len;
        let short = short_start..short_start + short_len;
        if short.contains(&position) {
            return Window { start: short_start, len: short_len, first: self.full.n * len };
        }
        let skipped = if position < short_start { 0 } else { short_len };
        let place = (position - skipped) / len;
        Window { start: place * len + skipped, len, first: self.full.at(place) * len }
    }
}

impl EpochOrder {
    /// The order in which epoch `epoch` visits `n` samples.
    pub fn new(n: u64, seed: u64, epoch: u32) -> EpochOrder {
        EpochOrder { seed, epoch, records: Permutation::new(n, seed, epoch, Use::Records, 0), windows: None }
    }

    /// Goes by windows of `len` consecutive records; 0 shuffles all records at once.
    #[must_use]
    pub fn in_windows(mut self, len: u64) -> EpochOrder {
        self.windows = (len > 0).then(|| Windows::new(self.records.n, len, self.seed, self.epoch));
        self
    }

    /// The sample at position `position` of the epoch.
    ///
    /// # Panics
    /// When `position` is not below `n`.
    pub fn at(&self, position: u64) -> u64 {
        let Some(windows) = &self.windows else { return self.records.at(position) };
        assert!(position < self.records.n, "position {position} of {}", self.records.n);
        let window = windows.holding(position);
        // The first record of a window names it.
        let inside = Permutation::new(window.len, self.seed, self.epoch, Use::InWindow, window.first as u32);
        self.on_ring(windows, window.first + inside.at(position - window.start))
    }

    /// The samples of the window that holds `position`, in the order in which they lie in the file, and the position
    /// where the next window starts. `None` when the order has no windows.
    ///
    /// # Panics
    /// When `position` is not below `n`.
    pub fn window(&self, position: u64) -> Option<(impl Iterator<Item = u64>, u64)> {
        let windows = self.windows.as_ref()?;
        assert!(position < self.records.n, "position {position} of {}", self.records.n);
        let Window { start, len, first } = windows.holding(position);
        Some(((first..first + len).map(|x| self.on_ring(windows, x)), start + len))
    }

    fn on_ring(&self, windows: &Windows, x: u64) -> u64 {
        // Without a sum that could overflow.
        let before_the_seam = self.records.n - windows.rotation;
        if x < before_the_seam { x + windows.rotation } else { x - before_the_seam }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn epoch(n: u64, seed: u64, epoch: u32) -> Vec<u64> {
        let order = EpochOrder::new(n, seed, epoch);
        (0..n).map(|i| order.at(i)).collect()
    }

    fn windowed(n: u64, window: u64, seed: u64, epoch: u32) -> Vec<u64> {
        let order = EpochOrder::new(n, seed, epoch).in_windows(window);
        (0..n).map(|i| order.at(i)).collect()
    }

    #[test]
    fn visits_every_sample_once() {
        for n in (1..=70).chain([255, 256, 257, 1000, 4095, 4097, 60_000]) {
            let mut visited = epoch(n, 42, 3);
            visited.sort_unstable();
            assert!(visited.into_iter().eq(0..n), "n = {n}");
        }
    }

    #[test]
    fn looks_random() {
        let n = 20_000;
        let order = epoch(n, 1, 0);
        // A random permutation moves an index by n/3 on average and keeps about one in place.
        let moved = order.iter().zip(0..).map(|(&x, i): (&u64, u64)| x.abs_diff(i) as f64).sum::<f64>() / n as f64;
        assert!((moved / n as f64 - 1.0 / 3.0).abs() < 0.01, "mean displacement {moved}");
        let fixed = order.iter().zip(0..).filter(|&(&x, i): &(&u64, u64)| x == i).count();
        assert!(fixed < 8, "{fixed} fixed points");
        // Neighbours are independent: half of the steps go up.
        let up = order.windows(2).filter(|pair| pair[0] < pair[1]).count() as f64 / n as f64;
        assert!((up - 0.5).abs() < 0.02, "{up} of the steps go up");
        // Half of the first half comes from the first half.
        let low = order[..n as usize / 2].iter().filter(|&&x| x < n / 2).count() as f64 / (n as f64 / 2.0);
        assert!((low - 0.5).abs() < 0.02, "{low}");
    }

    #[test]
    fn depends_on_seed_and_epoch() {
        for make in [epoch as fn(_, _, _) -> _, |n, seed, epoch| windowed(n, 60, seed, epoch)] {
            let base = make(500, 9, 0);
            for other in [make(500, 9, 1), make(500, 10, 0), make(500, 9 | 1 << 40, 0)] {
                let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
                assert!(same < 10, "{same} of 500 positions agree");
            }
        }
    }

    #[test]
    fn seeks_in_sets_beyond_32_bits() {
        let n = (1 << 40) + 12_345;
        for window in [0, 10_000] {
            let order = EpochOrder::new(n, 7, 2).in_windows(window);
            let (a, b) = (order.at(0), order.at(n - 1));
            assert!(a < n && b < n && a != b);
        }
    }

    proptest! {
        #[test]
        fn windows_visit_every_sample_once(n in 1..3000u64, window in 1..4000u64, seed: u64, epoch: u32) {
            let mut visited = windowed(n, window, seed, epoch);
            visited.sort_unstable();
            prop_assert!(visited.into_iter().eq(0..n));
        }

        #[test]
        fn a_window_is_what_its_positions_visit(n in 1..2000u64, len in 1..2500u64, seed: u64, epoch: u32) {
            let order = EpochOrder::new(n, seed, epoch).in_windows(len);
            let (mut start, mut short) = (0, 0);
            while start < n {
                let (samples, end) = order.window(start).unwrap();
                let samples = Vec::from_iter(samples);
                // Consecutive, but for the one step from the last record to the first.
                prop_assert!(samples.windows(2).all(|pair| (pair[0] + 1) % n == pair[1]));
                let mut visited: Vec<u64> = (start..end).map(|position| order.at(position)).collect();
                let mut expected = samples.clone();
                visited.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(visited, expected);
                short += usize::from(samples.len() as u64 != len);
                start = end;
            }
            prop_assert_eq!(start, n);
            prop_assert_eq!(short, usize::from(!n.is_multiple_of(len)));
        }
    }

    #[test]
    fn windows_are_shuffled_outside_and_inside() {
        let (n, len) = (20_000, 100);
        let order = windowed(n, len, 1, 0);
        let firsts: Vec<u64> = order.chunks(len as usize).map(|window| window[0]).collect();
        let up = firsts.windows(2).filter(|pair| pair[0] < pair[1]).count() as f64 / firsts.len() as f64;
        assert!((up - 0.5).abs() < 0.1, "{up} of the steps between windows go up");
        let up = order.windows(2).filter(|pair| pair[0] < pair[1]).count() as f64 / n as f64;
        assert!((up - 0.5).abs() < 0.02, "{up} of the steps go up");
        // No two windows are shuffled alike.
        let places = |window: &[u64]| -> Vec<u64> { window.iter().map(|x| (x + n - window[0]) % n).collect() };
        assert_ne!(places(&order[..100]), places(&order[100..200]));
    }

    #[test]
    fn windows_have_other_borders_in_every_epoch() {
        // Where windows start, counted from the borders there would be if none moved.
        let (n, len) = (1000, 50);
        let borders = |epoch| {
            let order = EpochOrder::new(n, 5, epoch).in_windows(len);
            order.window(0).unwrap().0.next().unwrap() % len
        };
        let different: std::collections::BTreeSet<u64> = (0..20).map(borders).collect();
        assert!(different.len() > 10, "{different:?}");
    }
}
