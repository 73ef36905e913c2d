//! The order of an epoch: a pseudo-random permutation that is computed, not stored. A four-round Feistel network on Philox
//! permutes the next power of four; indices that fall outside `0..n` are walked on until they fall inside. So any
//! position of any epoch can be sought at once, in constant memory.

use crate::rng;

/// Keeps these draws apart from all others under the same seed (fourth counter word).
const DOMAIN: u32 = 0x5EED_0000;
const ROUNDS: u32 = 4;

/// The permutation of `0..n` of one epoch.
#[derive(Debug, Clone)]
pub struct EpochOrder {
    n: u64,
    half_bits: u32,
    key: [u32; 2],
    epoch: u32,
}

impl EpochOrder {
    /// The order in which epoch `epoch` visits `n` samples.
    pub fn new(n: u64, seed: u64, epoch: u32) -> EpochOrder {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        EpochOrder { n, half_bits: bits.div_ceil(2).max(1), key: rng::key(seed), epoch }
    }

    /// The sample at position `position` of the epoch.
    ///
    /// # Panics
    /// When `position` is not below `n`.
    pub fn at(&self, position: u64) -> u64 {
        assert!(position < self.n, "position {position} of an epoch of {} samples", self.n);
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
            let counter = [right as u32, (right >> 32) as u32, self.epoch, DOMAIN | round];
            let mixed = u64::from(rng::philox(counter, self.key)[0]);
            (left, right) = (right, left ^ (mixed & mask));
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(n: u64, seed: u64, epoch: u32) -> Vec<u64> {
        let order = EpochOrder::new(n, seed, epoch);
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
        let base = epoch(500, 9, 0);
        for other in [epoch(500, 9, 1), epoch(500, 10, 0), epoch(500, 9 | 1 << 40, 0)] {
            let same = base.iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(same < 10, "{same} of 500 positions agree");
        }
    }

    #[test]
    fn seeks_in_sets_beyond_32_bits() {
        let n = (1 << 40) + 12_345;
        let order = EpochOrder::new(n, 7, 2);
        let (a, b) = (order.at(0), order.at(n - 1));
        assert!(a < n && b < n && a != b);
    }
}
