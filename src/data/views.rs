//! The views of many images as a network takes them.

use rayon::prelude::*;

use super::augment::{AugmentConfig, Augmenter, ViewParams};
use super::dataset::Dataset;
use super::reader::ImageReader;
use crate::error::{Error, Result};

/// How an image becomes what the network sees.
#[derive(Debug, Clone, Copy)]
pub enum View<'a> {
    /// Its resized centre.
    Centre,
    /// A random view, as an epoch of training has it: a function of seed, epoch and record.
    Drawn {
        /// The distribution; its views have the size that the network was prepared for.
        augment: &'a AugmentConfig,
        /// The seed of all draws.
        seed: u64,
        /// The epoch.
        epoch: u32,
    },
}

/// Makes the views of some records, on all threads: `out` holds one after the other, `[size][size][3]` each. `augment` is for
/// their centres.
///
/// # Errors
/// Damaged records; an augmentation that makes no sense.
pub fn make_views(
    augment: &AugmentConfig,
    dataset: &Dataset,
    records: &[usize],
    view: View<'_>,
    out: &mut [f32],
) -> Result<()> {
    let config = match view {
        View::Centre => augment,
        View::Drawn { augment, .. } => augment,
    };
    out.par_chunks_mut(augment.view_len()).zip(records).try_for_each_init(
        || (Augmenter::new(config), ImageReader::default()),
        |(augmenter, reader), (out, &record)| {
            let augmenter = augmenter.as_mut().map_err(|e| Error::Mismatch(e.to_string()))?;
            let (image, _) = reader.read(dataset, record)?;
            match view {
                View::Centre => augmenter.resize_center(&image, None, out),
                View::Drawn { augment, seed, epoch } => {
                    let (width, height) = image.original_size();
                    let params = ViewParams::draw(augment, seed, epoch, record as u64, 0, width, height);
                    augmenter.view(&image, &params, out);
                }
            }
            Ok(())
        },
    )
}
