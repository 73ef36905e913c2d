//! Reads images out of a dataset, decoded, in memory that is used again.

use super::augment::Image;
use super::dataset::Dataset;
use super::decode::Decoder;
use super::format::Codec;
use super::shard::Record;
use crate::error::{Error, Result};

/// Memory for the image being read. Every thread has its own.
#[derive(Debug, Default)]
pub struct ImageReader {
    bytes: Vec<u8>,
    decoder: Decoder,
}

impl ImageReader {
    /// Record `i` as it is stored.
    ///
    /// # Errors
    /// As [`Dataset::record`].
    pub fn fetch<'a>(&'a mut self, dataset: &'a Dataset, i: usize) -> Result<Record<'a>> {
        dataset.record(i, &mut self.bytes)
    }

    /// Image and label of record `i`.
    ///
    /// # Errors
    /// As [`Dataset::record`]; [`Error::Format`] when the record is a JPEG that cannot be decoded.
    pub fn read<'a>(&'a mut self, dataset: &'a Dataset, i: usize) -> Result<(Image<'a>, Option<u32>)> {
        let record = dataset.record(i, &mut self.bytes)?;
        let undecodable = |what| Error::format(dataset.path(), None, format!("record {i}: {what}"));
        Ok((decode(&record, &mut self.decoder).map_err(undecodable)?, record.label))
    }
}

/// The image of a record: its bytes themselves, or, of a JPEG, what `decoder` makes of them.
///
/// # Errors
/// The reason, as a clause without the name of the file.
pub fn decode<'a>(record: &Record<'a>, decoder: &'a mut Decoder) -> Result<Image<'a>, String> {
    let (width, height) = (record.width, record.height);
    let (pixels, channels) = match record.codec {
        Codec::Raw => (record.bytes, record.channels),
        Codec::Jpeg => {
            let image = decoder.decode(record.bytes)?;
            if (usize::from(image.width), usize::from(image.height)) != (width, height) {
                let (w, h) = (image.width, image.height);
                return Err(format!("the JPEG is of {w}x{h} pixels, but the index says {width}x{height}"));
            }
            (image.pixels, usize::from(image.channels))
        }
    };
    Image::new(pixels, width, height, channels)
        .and_then(|image| image.with_original_size(record.original_width as u32, record.original_height as u32))
        .map_err(|e| e.to_string())
}
