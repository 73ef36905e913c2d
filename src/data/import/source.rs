//! What `prepare` reads from: images by number, from any thread.

use crate::data::decode::Image;
use crate::error::Error;

/// Images by number. Any number may be read from any thread, in any order.
pub trait Source: Sync {
    /// Short name for the meta text.
    fn kind(&self) -> &'static str;
    /// Class names, empty for an unlabelled source.
    fn classes(&self) -> &[String];
    /// Number of images.
    fn len(&self) -> usize;
    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Class of image `i`: a place in [`Source::classes`].
    fn label(&self, i: usize) -> Option<u32>;
    /// What to call image `i` in messages: unique, and for a file its path below the source.
    fn name(&self, i: usize) -> String;
    /// Image `i`. `buffer` is scratch that its bytes may be put in; what it held before is of no interest.
    ///
    /// # Errors
    /// [`Fault::Bad`] when this one image cannot be used, [`Fault::Stop`] when there is no point in going on.
    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault>;
    /// Adds to `hasher` what tells this source from another one, or from itself after a change: the paths, sizes and times
    /// of its files, and the options that chose from them. An unfinished `prepare` is only gone on with if all is the same.
    fn fingerprint(&self, hasher: &mut blake3::Hasher);
}

/// An image as its source holds it.
#[derive(Debug)]
pub enum Item<'a> {
    /// An image file; its first bytes tell its kind.
    Encoded(&'a [u8]),
    /// Height x width x channels bytes.
    Pixels {
        /// The bytes.
        pixels: &'a [u8],
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
        /// 1 (grey) or 3 (RGB).
        channels: u8,
    },
}

impl Item<'_> {
    /// An image that is in memory already.
    pub fn from_image(image: &Image) -> Item<'_> {
        let Image { ref pixels, width, height, channels } = *image;
        Item::Pixels { pixels, width, height, channels }
    }
}

/// Why there is no image.
#[derive(Debug)]
pub enum Fault {
    /// This image cannot be used, for the reason given: a clause without the name of the image. Others may be good.
    Bad(String),
    /// The source itself fails: it has vanished, or the disk cannot be read.
    Stop(Error),
}

impl From<String> for Fault {
    fn from(reason: String) -> Fault {
        Fault::Bad(reason)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Stop(error)
    }
}
