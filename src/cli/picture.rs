//! Stored images as pictures for people.

use image::RgbImage;
use image::imageops::{FilterType, resize};

use crate::data::augment::Image;

/// The image as it is stored.
pub fn stored(image: &Image) -> RgbImage {
    let (width, height) = image.size();
    let (pixels, channels) = (image.pixels(), image.channels());
    RgbImage::from_fn(width as u32, height as u32, |x, y| {
        let pixel = &pixels[(y as usize * width + x as usize) * channels..][..channels];
        image::Rgb(if channels == 1 { [pixel[0]; 3] } else { [pixel[0], pixel[1], pixel[2]] })
    })
}

/// The same in the proportions of its original, no larger than it is stored.
pub fn in_proportion(image: &Image) -> RgbImage {
    let stored = stored(image);
    let (width, height) = image.original_size();
    let longest = stored.width().max(stored.height());
    let side =
        |original: u32| (u64::from(original) * u64::from(longest)).div_ceil(width.max(height).into()).max(1) as u32;
    let proportions = (side(width), side(height));
    if proportions == (stored.width(), stored.height()) {
        return stored;
    }
    resize(&stored, proportions.0, proportions.1, FilterType::Triangle)
}
