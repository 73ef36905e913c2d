//! Figures of a classifier: shares of right answers, and which class is taken for which.

use serde::{Deserialize, Serialize};

/// Shares of right answers, in 0..1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// The first guess is right.
    pub top1: f64,
    /// One of the first five is.
    pub top5: f64,
}

impl Accuracy {
    /// Of `images` images, of which so many were right.
    pub fn of(right: [u64; 2], images: usize) -> Accuracy {
        let [top1, top5] = right.map(|count| count as f64 / images as f64);
        Accuracy { top1, top5 }
    }
}

/// How often each class was taken for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    /// Row: the true class, column: the predicted one.
    counts: Vec<u64>,
}

impl Confusion {
    /// Of predictions for images of known labels, all below `classes`.
    pub fn of(labels: &[u32], predictions: &[u32], classes: usize) -> Confusion {
        let mut counts = vec![0; classes * classes];
        for (&label, &prediction) in labels.iter().zip(predictions) {
            counts[label as usize * classes + prediction as usize] += 1;
        }
        Confusion { classes, counts }
    }

    /// A row for each true class, with the counts of the predicted ones.
    pub fn rows(&self) -> impl Iterator<Item = &[u64]> {
        self.counts.chunks(self.classes.max(1))
    }

    /// Images and share of right predictions of each class; none for a class without images.
    pub fn per_class(&self) -> Vec<(u64, Option<f64>)> {
        let figures = |(class, row): (usize, &[u64])| {
            let images: u64 = row.iter().sum();
            (images, (images > 0).then(|| row[class] as f64 / images as f64))
        };
        self.rows().enumerate().map(figures).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_the_truth() {
        let confusion = Confusion::of(&[0, 0, 2, 2, 2], &[0, 1, 2, 0, 2], 4);
        let rows: Vec<&[u64]> = confusion.rows().collect();
        assert_eq!(rows, [&[1, 1, 0, 0], &[0; 4], &[1, 0, 2, 0], &[0; 4]]);
        assert_eq!(confusion.per_class(), [(2, Some(0.5)), (0, None), (3, Some(2.0 / 3.0)), (0, None)]);
        assert_eq!(Accuracy::of([1, 3], 4), Accuracy { top1: 0.25, top5: 0.75 });
    }
}
