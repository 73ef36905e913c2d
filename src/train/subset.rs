//! Fractions of the labels of a dataset: the same records on every machine, as many of every class, and smaller fractions
//! within larger ones.

use std::fmt::{self, Display};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::choice::written_as_text;
use crate::data::dataset::Dataset;
use crate::data::format::Entry;
use crate::error::{Error, Result};
use crate::rng;

/// Separates these draws from all others under the same seed.
const SUBSET_DOMAIN: u32 = 0x5B5E_7001;

/// A share of the labels, above 0 and up to 100 %.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fraction {
    percent: f64,
}

impl Fraction {
    /// All labels.
    pub const ALL: Fraction = Fraction { percent: 100.0 };

    /// The share of all, in 0..=1.
    pub fn share(self) -> f64 {
        self.percent / 100.0
    }
}

impl FromStr for Fraction {
    type Err = String;

    fn from_str(text: &str) -> Result<Fraction, String> {
        let expected = || format!("expected a percentage above 0% and up to 100%, such as 1% or 10%, got {text:?}");
        let percent =
            text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok()).ok_or_else(expected)?;
        if percent > 0.0 && percent <= 100.0 { Ok(Fraction { percent }) } else { Err(expected()) }
    }
}

impl Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.percent)
    }
}

written_as_text!(Fraction);

/// Chosen records of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subset {
    /// Their numbers, rising.
    pub records: Vec<usize>,
    /// How many there are of each class.
    pub counts: Vec<usize>,
}

/// A labelled record that may be chosen.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    record: usize,
    label: u32,
    /// Its place in the queue of its class.
    rank: u64,
}

impl Subset {
    /// Chooses `fraction` of the labelled records of `dataset`: of every class the same number (at least one, at most what
    /// there is), those whose content ranks first in a hash with `seed`. So a smaller fraction lies within a larger one, and
    /// the same images are chosen in whatever order they are stored. All of the labels are all labelled records.
    ///
    /// # Errors
    /// [`Error::Format`] when no record has a label; a damaged index.
    pub fn choose(dataset: &Dataset, fraction: Fraction, seed: u64) -> Result<Subset> {
        let mut candidates = Vec::new();
        for record in 0..dataset.len() {
            let entry = dataset.entry(record)?;
            candidates.extend(entry.label().map(|label| Candidate { record, label, rank: rank(&entry, seed) }));
        }
        if candidates.is_empty() {
            let what = format!("none of its {} records has a label, and fine-tuning needs them", dataset.len());
            return Err(Error::format(dataset.path(), None, what).with_hint("prepare the images with classes"));
        }
        Ok(first_of_each(candidates, dataset.classes().len(), fraction))
    }
}

/// A hash of a record's content, by its checksum and size, not of its place.
fn rank(entry: &Entry, seed: u64) -> u64 {
    let size = u32::from(entry.width) << 16 | u32::from(entry.height);
    let words = rng::philox([entry.crc, entry.len, size, SUBSET_DOMAIN], rng::key(seed));
    u64::from(words[0]) << 32 | u64::from(words[1])
}

fn first_of_each(mut candidates: Vec<Candidate>, classes: usize, fraction: Fraction) -> Subset {
    let mut all = vec![0; classes];
    candidates.iter().for_each(|c| all[c.label as usize] += 1);
    let seen = all.iter().filter(|&&count| count > 0).count();
    let each = match fraction == Fraction::ALL {
        true => usize::MAX,
        false => (fraction.share() * candidates.len() as f64 / seen as f64).round().max(1.0) as usize,
    };
    // Records of equal content are told apart by their place, and nothing else is.
    candidates.sort_unstable_by_key(|c| (c.rank, c.record));
    let mut counts = vec![0; classes];
    let mut take = |c: &Candidate| {
        let count: &mut usize = &mut counts[c.label as usize];
        let wanted = *count < each;
        *count += usize::from(wanted);
        wanted
    };
    let mut records: Vec<usize> = candidates.iter().filter(|c| take(c)).map(|c| c.record).collect();
    records.sort_unstable();
    Subset { records, counts }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fraction(text: &str) -> Fraction {
        text.parse().unwrap()
    }

    /// 5 classes of 400, 200, 100, 7 and 0 records; `rank` is a permutation of the numbers.
    fn candidates() -> Vec<Candidate> {
        let label = |i: usize| match i {
            0..400 => 0,
            400..600 => 1,
            600..700 => 3,
            _ => 4,
        };
        (0..707).map(|i| Candidate { record: i, label: label(i), rank: (i as u64 * 311) % 707 }).collect()
    }

    #[test]
    fn every_class_gets_as_many_and_none_goes_without() {
        let counts = |text| first_of_each(candidates(), 5, fraction(text)).counts;
        assert_eq!(counts("0.1%"), [1, 1, 0, 1, 1]);
        assert_eq!(counts("1%"), [2, 2, 0, 2, 2]); // 707 / 4 classes / 100 = 1.8
        assert_eq!(counts("10%"), [18, 18, 0, 18, 7]);
        assert_eq!(counts("99%"), [175, 175, 0, 100, 7]);
        assert_eq!(counts("100%"), [400, 200, 0, 100, 7]);
    }

    #[test]
    fn smaller_fractions_lie_within_larger_ones() {
        let chosen = ["0.5%", "1%", "7%", "10%", "60%", "100%"].map(|f| first_of_each(candidates(), 5, fraction(f)));
        for pair in chosen.windows(2) {
            assert!(pair[0].records.iter().all(|r| pair[1].records.binary_search(r).is_ok()));
            assert!(pair[0].records.len() < pair[1].records.len());
        }
        assert!(chosen[5].records.is_sorted() && chosen[5].records.len() == 707);
    }

    #[test]
    fn the_order_of_the_candidates_does_not_matter() {
        let expected = first_of_each(candidates(), 5, fraction("10%"));
        let mut turned = candidates();
        turned.reverse();
        turned.rotate_left(123);
        assert_eq!(first_of_each(turned, 5, fraction("10%")), expected);
    }

    #[test]
    fn percentages_are_read_as_they_are_written() {
        for text in ["1%", "10%", "0.5%", "100%"] {
            assert_eq!(fraction(text).to_string(), text);
        }
        for text in ["", "%", "0%", "-1%", "101%", "NaN%", "10", "0.1", "ten%"] {
            let message = text.parse::<Fraction>().unwrap_err();
            assert!(message.starts_with("expected a percentage above 0% and up to 100%"), "{text}: {message}");
        }
    }
}
