//! Augmentation on a CUDA device: from stored bytes to normalised views, with the bits of [`Augmenter`] on the CPU.
//!
//! Each step the host describes its views ([`ViewDescriptor`],
//! half a kilobyte each, a few microseconds), and uploads the descriptors with the images; everything that depends on the
//! pixels happens on the device. The filters too: their tables are up to a hundred times larger than a descriptor.
//!
//! [`Augmenter`]: crate::data::augment::Augmenter

pub(super) mod cuda;
mod descriptor;
mod op;

use std::iter::repeat_n;

pub use cuda::Places;
pub use descriptor::ViewDescriptor;
pub use op::AugmentViews;

use crate::data::augment::{
    AugmentConfig, BlurKernel, Filter, Normalisation, ViewParams, centre_filters, crop_filters,
};
use crate::data::loader::StoredImage;
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorDesc};

/// Longest side that a dataset file can state.
const MAX_SIDE: usize = u16::MAX as usize;

/// How the views of a run are made on a device.
#[derive(Debug, Clone)]
pub struct Augmentation {
    size: usize,
    channels: usize,
    dtype: DType,
    longest_side: usize,
    /// Of an image's pixels those that a view is made of, on average.
    crop_share: f64,
    blur_kernel: BlurKernel,
    max_sigma: f32,
    reach: usize,
    normalisation: Normalisation,
}

impl Augmentation {
    /// Views as `config` has them, as elements of `dtype` in 3 channels, or in 4 or 8 of which the last are zero; of images
    /// that are stored with sides of at most `longest_side`.
    ///
    /// # Errors
    /// [`Error::Config`] when `config` does not hold up to its checks; [`Error::Shape`] naming what else is not possible.
    pub fn new(config: &AugmentConfig, dtype: DType, channels: usize, longest_side: usize) -> Result<Augmentation> {
        config.validate()?;
        if !matches!(dtype, DType::F32 | DType::Bf16 | DType::F16) {
            return Err(Error::shape("augment", "element type of the views", "f32, bf16 or f16", dtype));
        }
        if !matches!(channels, 3 | 4 | 8) {
            return Err(Error::shape("augment", "channels of the views", "3, 4 or 8", channels));
        }
        if !(1..=MAX_SIDE).contains(&longest_side) {
            return Err(Error::shape("augment", "longest side", format!("1 to {MAX_SIDE} pixels"), longest_side));
        }
        Ok(Augmentation {
            size: config.image_size,
            channels,
            dtype,
            longest_side,
            crop_share: config.crop_scale.iter().sum::<f64>() / 2.0,
            blur_kernel: config.blur_kernel,
            max_sigma: config.blur_sigma[1] as f32,
            reach: config.blur_kernel.reach(config.blur_sigma[1]),
            normalisation: config.normalisation(),
        })
    }

    /// What a number of views is: `[views][size][size][channels]`.
    pub fn output(&self, views: usize) -> TensorDesc {
        TensorDesc::new([views, self.size, self.size, self.channels], self.dtype)
    }

    /// Bytes of stored pixels that a number of views are made of, on average, if images are as large as they may be.
    fn cropped_bytes(&self, views: usize) -> u64 {
        let image = (3 * self.longest_side * self.longest_side) as f64;
        (self.crop_share * image).round() as u64 * views as u64
    }

    /// Memory that images of so many bytes need on the device: it is read in pieces of 16 bytes.
    pub fn pixel_memory(bytes: usize) -> usize {
        bytes.next_multiple_of(16)
    }

    /// Describes the two views of every image, all first views before all second ones, for images in `pixel_bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the first image or view that is not possible.
    pub fn describe(
        &self,
        images: &[StoredImage],
        params: &[[ViewParams; 2]],
        pixel_bytes: usize,
        views: &mut Vec<ViewDescriptor>,
    ) -> Result<()> {
        self.describe_some(2, images, params, pixel_bytes, views)
    }

    /// Describes the first view of every image alone.
    ///
    /// # Errors
    /// As [`Augmentation::describe`].
    pub fn describe_first(
        &self,
        images: &[StoredImage],
        params: &[[ViewParams; 2]],
        pixel_bytes: usize,
        views: &mut Vec<ViewDescriptor>,
    ) -> Result<()> {
        self.describe_some(1, images, params, pixel_bytes, views)
    }

    fn describe_some(
        &self,
        count: usize,
        images: &[StoredImage],
        params: &[[ViewParams; 2]],
        pixel_bytes: usize,
        views: &mut Vec<ViewDescriptor>,
    ) -> Result<()> {
        if params.len() != images.len() {
            return Err(Error::shape("augment", "drawn pairs of views", images.len(), params.len()));
        }
        views.clear();
        let mut half = Vec::new();
        for (view, pairs) in repeat_n(params, count).enumerate() {
            for (image, pair) in images.iter().zip(pairs) {
                let params = &pair[view];
                let original = self.check_image(image, pixel_bytes)?;
                check_crop(params, original)?;
                let filters = crop_filters(params.crop, original, (image.width, image.height), self.size);
                self.blur(params, &mut half)?;
                views.push(ViewDescriptor::new(image, &filters, params.flip, &half).with_colours(params));
            }
        }
        self.check_tables(views);
        Ok(())
    }

    /// Describes one view of every image: the one for evaluation, as `Augmenter::resize_center` makes it.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the first image that is not possible.
    pub fn describe_centres(
        &self,
        images: &[StoredImage],
        pixel_bytes: usize,
        views: &mut Vec<ViewDescriptor>,
    ) -> Result<()> {
        views.clear();
        for image in images {
            let original = self.check_image(image, pixel_bytes)?;
            let filters = centre_filters(None, original, (image.width, image.height), self.size);
            views.push(ViewDescriptor::new(image, &filters, false, &[1.0]));
        }
        self.check_tables(views);
        Ok(())
    }

    /// Weights that a filter's table has room for: those of any image, whose filters have at most
    /// 2 * longest_side / size + 2 taps.
    fn capacity(&self) -> usize {
        (2 * (self.longest_side + self.size)).next_multiple_of(4)
    }

    /// What the kernels' memory safety rests on beyond the checks of images and crops.
    fn check_tables(&self, views: &[ViewDescriptor]) {
        let fits = |taps: usize| taps * self.size <= self.capacity();
        assert!(views.iter().all(|view| view.taps().into_iter().all(fits)), "a filter is larger than its table");
    }

    /// Checks that the kernels can read an image. Returns the size of its original.
    fn check_image(&self, image: &StoredImage, pixel_bytes: usize) -> Result<(u32, u32)> {
        let StoredImage { offset, width, height, channels, original_width, original_height } = *image;
        if !matches!(channels, 1 | 3) {
            return Err(Error::shape("augment", "channels of an image", "1 or 3", channels));
        }
        let sides = 1..=self.longest_side;
        if !sides.contains(&width) || !sides.contains(&height) {
            let expected = format!("sides from 1 to {}", self.longest_side);
            return Err(Error::shape("augment", "size of an image", expected, format!("{width} x {height}")));
        }
        if offset.checked_add(image.len()).is_none_or(|end| end > pixel_bytes) {
            let got = format!("{} from byte {offset} on", image.len());
            return Err(Error::shape("augment", "bytes of an image", format!("within {pixel_bytes}"), got));
        }
        match (u32::try_from(original_width), u32::try_from(original_height)) {
            (Ok(width @ 1..), Ok(height @ 1..)) => Ok((width, height)),
            _ => {
                let got = format!("{original_width} x {original_height}");
                Err(Error::shape("augment", "size of an original", "at least 1 x 1", got))
            }
        }
    }

    /// Fills `half` with the centre and right half of the blur's kernel; without a blur its centre is all.
    fn blur(&self, params: &ViewParams, half: &mut Vec<f32>) -> Result<()> {
        let Some(sigma) = params.blur_sigma else {
            half.clear();
            half.push(1.0);
            return Ok(());
        };
        if sigma > 0.0 && sigma <= self.max_sigma {
            self.blur_kernel.half(sigma, self.reach, half);
            return Ok(());
        }
        Err(Error::shape("augment", "sigma of a blur", format!("above 0, up to {}", self.max_sigma), sigma))
    }
}

fn check_crop(params: &ViewParams, (width, height): (u32, u32)) -> Result<()> {
    let crop = params.crop;
    let within = |first: u32, len: u32, side: u32| len > 0 && first.checked_add(len).is_some_and(|end| end <= side);
    if within(crop.left, crop.width, width) && within(crop.top, crop.height, height) {
        return Ok(());
    }
    let got = format!("{} x {} from column {}, row {} on", crop.width, crop.height, crop.left, crop.top);
    Err(Error::shape("augment", "crop", format!("within {width} x {height}"), got))
}

#[cfg(test)]
mod tests;
