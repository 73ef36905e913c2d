//! How images are stored: the step from what a source holds to a record of the dataset file.

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use super::source::{Fault, Item, Source};
use crate::data::decode::{Decoder, ImageRef, Resizer};
use crate::data::format::{Codec, crc32c};
use crate::data::writer::NewRecord;

/// The form in which images are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Pixels, in the size they come in.
    Native,
    /// Pixels, stretched to a square of this side. The size before is kept, so that crops can be drawn in the original
    /// geometry.
    Square(u16),
}

impl Store {
    /// What record offsets are multiples of: whole pages where every record fills whole pages, cache lines otherwise.
    pub fn alignment(self) -> u32 {
        match self {
            Store::Square(side) if (u32::from(side) * u32::from(side) * 3).is_multiple_of(4096) => 4096,
            _ => 64,
        }
    }
}

impl FromStr for Store {
    type Err = String;

    fn from_str(text: &str) -> Result<Store, String> {
        if text == "raw" {
            return Ok(Store::Native);
        }
        let side =
            text.strip_prefix("raw:").and_then(|side| side.parse().ok()).filter(|side| (1..=8192).contains(side));
        side.map(Store::Square).ok_or_else(|| "expected raw:SIDE with a side of 1 to 8192 (as raw:256), or raw".into())
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Store::Native => write!(f, "raw"),
            Store::Square(side) => write!(f, "raw:{side}"),
        }
    }
}

/// What a thread keeps from one image to the next.
#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    decoder: Decoder,
    resizer: Resizer,
}

/// Makes the record of image `i` of `source`.
///
/// # Errors
/// As [`Source::read`]; [`Fault::Bad`] when it cannot be decoded.
pub fn record(source: &dyn Source, i: usize, store: Store) -> Result<NewRecord, Fault> {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let original = match source.read(i, &mut scratch.bytes)? {
            Item::Encoded(bytes) => scratch.decoder.decode(bytes)?,
            Item::Pixels { pixels, width, height, channels } => ImageRef { pixels, width, height, channels },
        };
        let image = match store {
            Store::Native => original,
            Store::Square(side) => scratch.resizer.resize(original, side, side)?,
        };
        Ok(NewRecord {
            crc: crc32c(image.pixels),
            bytes: image.pixels.to_vec(),
            codec: Codec::Raw,
            width: image.width,
            height: image.height,
            channels: image.channels,
            original_width: original.width,
            original_height: original.height,
            label: source.label(i),
        })
    })
}
