//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator.
//! Every draw is a pure function of (key, counter), so no result depends on threads, batch size or order of evaluation.
//! Same constants as cuRAND and Random123.

/// One block of four 32-bit words for `counter` under `key`.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(0x9E37_79B9);
            key[1] = key[1].wrapping_add(0xBB67_AE85);
        }
        let p0 = u64::from(counter[0]) * 0xD251_1F53;
        let p1 = u64::from(counter[2]) * 0xCD9E_8D57;
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
    }
    counter
}

/// The key for a 64-bit seed.
pub fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// Maps a word to [0, 1) with 24 bits, exactly representable in f32 and f64.
pub fn unit(word: u32) -> f64 {
    f64::from(word >> 8) * (1.0 / 16_777_216.0)
}

/// Maps a word to 0..n without modulo bias beyond 2^-32 (Lemire's multiply-shift).
pub fn below(word: u32, n: u32) -> u32 {
    ((u64::from(word) * u64::from(n)) >> 32) as u32
}

/// A sequential stream of draws: block after block of one (seed, domain, index) triple.
#[derive(Debug, Clone)]
pub struct Stream {
    key: [u32; 2],
    domain: u32,
    index: u64,
    block: u32,
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// A stream of its own for each `(seed, domain, index)`; `domain` separates uses (initialisation, tests, ...).
    pub fn new(seed: u64, domain: u32, index: u64) -> Stream {
        Stream { key: key(seed), domain, index, block: 0, words: [0; 4], used: 4 }
    }

    /// The next 32-bit word.
    pub fn word(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox([self.block, self.index as u32, (self.index >> 32) as u32, self.domain], self.key);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// Uniform in [lo, hi).
    pub fn uniform(&mut self, lo: f64, hi: f64) -> f64 {
        lo + (hi - lo) * unit(self.word())
    }

    /// Standard normal (Box-Muller, one of the pair used).
    pub fn normal(&mut self) -> f64 {
        // 1 - u lies in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * (1.0 - unit(self.word())).ln()).sqrt();
        radius * (std::f64::consts::TAU * unit(self.word())).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random123_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn normal_has_unit_moments() {
        let mut stream = Stream::new(7, 1, 0);
        let draws: Vec<f64> = (0..100_000).map(|_| stream.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }
}
