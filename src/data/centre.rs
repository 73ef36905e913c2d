//! Many images as a network sees them in evaluation: resized, the centre cut out, normalised, nothing drawn.

use rayon::prelude::*;

use super::augment::{AugmentConfig, Augmenter};
use super::dataset::Dataset;
use super::reader::ImageReader;
use crate::error::{Error, Result};

/// Makes the centre views of `records`, on all threads: `out` holds one after the other, `[size][size][3]` each.
///
/// # Errors
/// Damaged records; an augmentation that makes no sense.
pub fn centre_views(dataset: &Dataset, records: &[usize], augment: &AugmentConfig, out: &mut [f32]) -> Result<()> {
    out.par_chunks_mut(augment.view_len()).zip(records).try_for_each_init(
        || (Augmenter::new(augment), ImageReader::default()),
        |(augmenter, reader), (out, &record)| {
            let augmenter = augmenter.as_mut().map_err(|e| Error::Mismatch(e.to_string()))?;
            augmenter.resize_center(&reader.read(dataset, record)?.0, None, out);
            Ok(())
        },
    )
}
