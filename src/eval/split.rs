//! Parts of a labelled dataset in which every class has its share.

use crate::error::{Error, Result};
use crate::rng::{Stream, below};

/// Separates the draws of a split from all others under the same seed.
const SPLIT_DOMAIN: u32 = 0x5B17;

/// The records of a dataset in two parts, each ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// What is left.
    pub rest: Vec<usize>,
    /// The part that was drawn.
    pub drawn: Vec<usize>,
}

/// Draws `fraction` of the images of each class, rounded: from a class with two images or more at least one, and not all.
/// What is drawn from a class depends on the seed and its images alone.
///
/// # Errors
/// [`Error::Config`] for a fraction outside 0 to 1, both excluded, under the name `option`.
pub fn draw_balanced(option: &str, labels: &[u32], fraction: f64, seed: u64) -> Result<Split> {
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(Error::config(option, format!("expected a number between 0 and 1, got {fraction}")));
    }
    let classes = labels.iter().max().map_or(0, |&most| most as usize + 1);
    let mut records = vec![Vec::new(); classes];
    for (record, &label) in labels.iter().enumerate() {
        records[label as usize].push(record);
    }
    let (mut rest, mut drawn) = (Vec::new(), Vec::new());
    for (class, mut records) in records.into_iter().enumerate() {
        let count = match records.len() {
            0 | 1 => 0,
            n => ((n as f64 * fraction).round() as usize).clamp(1, n - 1),
        };
        let mut stream = Stream::new(seed, SPLIT_DOMAIN, class as u64);
        for place in 0..count {
            let other = place + below(stream.word(), (records.len() - place) as u32) as usize;
            records.swap(place, other);
        }
        rest.extend_from_slice(&records[count..]);
        drawn.extend_from_slice(&records[..count]);
    }
    rest.sort_unstable();
    drawn.sort_unstable();
    Ok(Split { rest, drawn })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_share() {
        // 40 images of class 0, 15 of class 1, 2 of class 3, 1 of class 4, interleaved.
        let sizes = [40, 15, 0, 2, 1];
        let mut left = sizes;
        let mut labels = Vec::new();
        while labels.len() < 58 {
            for (class, left) in left.iter_mut().enumerate().filter(|(_, left)| **left > 0) {
                labels.push(class as u32);
                *left -= 1;
            }
        }
        let split = draw_balanced("--holdout", &labels, 0.1, 7).unwrap();
        let count = |part: &[usize]| [0, 1, 2, 3, 4].map(|c| part.iter().filter(|&&i| labels[i] == c).count());
        assert_eq!(count(&split.drawn), [4, 2, 0, 1, 0]);
        assert_eq!(count(&split.rest), [36, 13, 0, 1, 1]);
        let mut all = [split.rest.clone(), split.drawn.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, Vec::from_iter(0..58));
        assert_eq!(draw_balanced("--holdout", &labels, 0.1, 7).unwrap(), split);
        assert_ne!(draw_balanced("--holdout", &labels, 0.1, 8).unwrap(), split);
    }

    #[test]
    fn senseless_fractions_are_named() {
        for fraction in [0.0, 1.0, -0.5, f64::NAN] {
            let message = draw_balanced("--holdout", &[0, 1], fraction, 0).unwrap_err().to_string();
            assert!(message.contains("--holdout: expected a number between 0 and 1"), "{message}");
        }
    }
}
