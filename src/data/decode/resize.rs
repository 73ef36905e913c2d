//! Resizing with antialias: each output pixel averages all the input it covers.

use fast_image_resize::images::{Image as Target, ImageRef as Source};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions};

use super::ImageRef;

/// What resized the images, for the meta text.
pub const RESIZER: &str = "fast_image_resize 6 bilinear antialias";

/// Resizes images one after the other, and keeps its buffers.
#[derive(Debug, Default)]
pub struct Resizer {
    inner: fast_image_resize::Resizer,
    pixels: Vec<u8>,
}

impl Resizer {
    /// `image` stretched to `width` x `height` pixels; itself where it has that size already.
    ///
    /// # Errors
    /// The reason, when the resizer refuses.
    pub fn resize<'a>(&'a mut self, image: ImageRef<'a>, width: u16, height: u16) -> Result<ImageRef<'a>, String> {
        if (image.width, image.height) == (width, height) {
            return Ok(image);
        }
        let pixel_type = if image.channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
        let source = Source::new(image.width.into(), image.height.into(), image.pixels, pixel_type);
        let source = source.map_err(|e| e.to_string())?;
        self.pixels.resize(usize::from(width) * usize::from(height) * usize::from(image.channels), 0);
        let target = Target::from_slice_u8(width.into(), height.into(), &mut self.pixels, pixel_type);
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
        self.inner.resize(&source, &mut target.map_err(|e| e.to_string())?, &options).map_err(|e| e.to_string())?;
        Ok(ImageRef { pixels: &self.pixels, width, height, channels: image.channels })
    }
}
