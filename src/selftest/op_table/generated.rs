//! Tensors too large for a file: both sides make the inputs from the same random numbers and compare samples of what
//! comes out. tools/simsiam_torch/generated.py is the other side, value for value.

use serde::Deserialize;

use crate::rng::{Stream, below, unit};

/// Values of a result that are compared.
const SAMPLES: usize = 128;
/// Streams of the random numbers.
const VALUES: u32 = 0x6F70_7331;
const PLACES: u32 = 0x6F70_7332;

/// How a tensor is made; the innermost dimension is c.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Generated {
    pub shape: Vec<usize>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// Uniform in -1..1.
    Uniform,
    /// With a spread and an offset of its own for every channel, and nothing near the offset: what batch norm makes of it
    /// stays clear of the ReLU's corner, so that no rounding changes a mask.
    Gapped,
    /// In 0.5..1.5 and of alternating sign.
    Gain,
    /// In 0..0.05: too small to move what is added to it across zero.
    Small,
    /// In 0.5..1.5.
    Positive,
    /// Distinct-looking multiples of 1/8 in -16..16, exact in every precision.
    Eighths,
}

impl Generated {
    /// The values of tensor `key` of case `case`, each exactly a float32.
    pub fn values(&self, case: &str, key: &str) -> Vec<f64> {
        let channels = self.shape.last().copied().unwrap_or(1);
        let mut stream = Stream::new(seed(&format!("{case}/{key}")), VALUES, 0);
        let len = self.shape.iter().product();
        (0..len).map(|i| f64::from(self.kind.value(stream.word(), i % channels) as f32)).collect()
    }
}

impl Kind {
    fn value(self, word: u32, channel: usize) -> f64 {
        let u = unit(word);
        let centred = 2.0 * u - 1.0;
        match self {
            Kind::Uniform => centred,
            Kind::Gapped => {
                let spread = 0.5 + (channel * 7919 % 13) as f64 / 13.0;
                let offset = (channel * 104_729 % 17) as f64 / 8.0 - 1.0;
                (centred + if centred < 0.0 { -0.3 } else { 0.3 }) * spread + offset
            }
            Kind::Gain => (0.5 + u) * if channel.is_multiple_of(2) { 1.0 } else { -1.0 },
            Kind::Small => 0.05 * u,
            Kind::Positive => 0.5 + u,
            Kind::Eighths => f64::from(below(word, 256)) / 8.0 - 16.0,
        }
    }
}

/// The values of a result that its golden holds: all of a small one, else some anywhere.
pub(super) fn samples(values: &[f64]) -> Vec<f64> {
    if values.len() <= SAMPLES {
        return values.to_vec();
    }
    let mut stream = Stream::new(values.len() as u64, PLACES, 0);
    (0..SAMPLES).map(|_| values[below(stream.word(), values.len() as u32) as usize]).collect()
}

/// FNV-1a over the name.
fn seed(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}
