//! Views that a device makes of stored images against those that the CPU makes of them: the same bits.

use super::{Outcome, Worst};
use crate::data::augment::{AugmentConfig, Augmenter, BlurKernel, Image, ViewParams};
use crate::data::loader::StoredImage;
use crate::error::Result;
use crate::exec::Device;
use crate::graph::{Role, Tape};
use crate::ops::augment::{AugmentViews, Augmentation};
use crate::rng::Stream;
use crate::tensor::DType;

/// Width, height and channels of the images: colour and grey, extreme shapes, single pixels.
const IMAGES: [[usize; 3]; 9] =
    [[57, 43, 3], [40, 61, 1], [3, 500, 3], [211, 2, 1], [1, 1, 3], [64, 48, 3], [32, 32, 3], [333, 250, 3], [5, 7, 1]];
/// The size of the original of the image that is stored stretched, and its number.
const STRETCHED: (usize, [usize; 2]) = (5, [320, 120]);
/// Batches of drawn views, each with other crops, colours and blurs.
const BATCHES: u32 = 3;

/// Stored images one after the other, as a batch of the loader holds them.
struct Images {
    pixels: Vec<u8>,
    stored: Vec<StoredImage>,
}

impl Images {
    /// Slopes with noise on them, so that neighbours are alike and no two are the same.
    fn drawn() -> Images {
        let (mut noise, mut images) = (Stream::new(12, 0, 0), Images { pixels: Vec::new(), stored: Vec::new() });
        for (number, [width, height, channels]) in IMAGES.into_iter().enumerate() {
            let [original_width, original_height] = if number == STRETCHED.0 { STRETCHED.1 } else { [width, height] };
            let offset = images.pixels.len();
            for place in 0..width * height * channels {
                let (x, y) = (place / channels % width, place / channels / width);
                let slope = 230 * x / width + 90 * y / height + 60 * (place % channels);
                images.pixels.push((slope as u32 + noise.word() % 24) as u8);
            }
            images.stored.push(StoredImage { offset, width, height, channels, original_width, original_height });
        }
        images
    }

    fn draw(&self, config: &AugmentConfig, epoch: u32) -> Vec<[ViewParams; 2]> {
        let draw = |(number, image): (usize, &StoredImage)| {
            let (width, height) = (image.original_width as u32, image.original_height as u32);
            [0, 1].map(|view| ViewParams::draw(config, 3, epoch, number as u64, view, width, height))
        };
        self.stored.iter().enumerate().map(draw).collect()
    }

    /// The CPU's views as elements of `dtype` in so many channels, all first ones before all second ones.
    fn views(
        &self,
        config: &AugmentConfig,
        params: &[[ViewParams; 2]],
        (dtype, channels): (DType, usize),
    ) -> Result<Vec<u8>> {
        let mut augmenter = Augmenter::new(config)?;
        let (mut view, mut all) = (vec![0.0; config.view_len()], Vec::new());
        for number in 0..2 {
            for (stored, params) in self.stored.iter().zip(params) {
                let pixels = &self.pixels[stored.offset..stored.offset + stored.len()];
                let image = Image::new(pixels, stored.width, stored.height, stored.channels)?;
                let original = (stored.original_width as u32, stored.original_height as u32);
                augmenter.view(&image.with_original_size(original.0, original.1)?, &params[number], &mut view);
                let channel = |pixel: &[f32], c| pixel.get(c).copied().unwrap_or(0.0);
                let pixels = view.chunks_exact(3);
                let padded: Vec<f32> = pixels.flat_map(|pixel| (0..channels).map(move |c| channel(pixel, c))).collect();
                all.extend(dtype.encode_f32(&padded));
            }
        }
        Ok(all)
    }
}

/// Augments images of many shapes on a CUDA device, as training stages them, and compares with the CPU.
///
/// # Errors
/// Faults of the device.
pub(super) fn check(device: &Device, mut report: impl FnMut(Outcome)) -> Result<()> {
    let images = Images::drawn();
    let small = AugmentConfig { image_size: 33, blur_kernel: BlurKernel::Gaussian, ..AugmentConfig::imagenet() };
    let large = AugmentConfig { image_size: 96, ..AugmentConfig::imagenet() };
    for (config, dtype, channels) in [(&small, DType::F32, 8), (&small, DType::F16, 4), (&large, DType::Bf16, 8)] {
        let mut differ = Vec::new();
        for (epoch, device_views) in on_device(device, &images, config, (dtype, channels))?.iter().enumerate() {
            let expected = images.views(config, &images.draw(config, epoch as u32), (dtype, channels))?;
            let elements = device_views.chunks(dtype.size()).zip(expected.chunks(dtype.size()));
            let of_view = config.view_len() / 3 * channels;
            differ.extend(elements.enumerate().filter(|(_, (a, b))| a != b).map(|(i, _)| (epoch, i / of_view)));
        }
        let views = BATCHES as usize * 2 * IMAGES.len();
        let worst = match differ.first() {
            None => Worst::exact(true, "every bit is the same".into()),
            Some((batch, view)) => {
                let what = format!("{} elements differ, the first in view {view} of batch {batch}", differ.len());
                Worst::exact(false, what)
            }
        };
        let size = config.image_size;
        let compared = format!("{views} views of {size} pixels in {dtype} on {} against the CPU", device.name());
        report(Outcome { name: "augmentation".into(), compared, worst });
    }
    Ok(())
}

/// The views of every batch, as the device makes them.
fn on_device(
    device: &Device,
    images: &Images,
    config: &AugmentConfig,
    (dtype, channels): (DType, usize),
) -> Result<Vec<Vec<u8>>> {
    let longest_side = IMAGES.iter().flat_map(|[width, height, _]| [*width, *height]).max().unwrap_or(1);
    let augmentation = Augmentation::new(config, dtype, channels, longest_side)?;
    let pixel_bytes = images.pixels.len();
    let op = AugmentViews { augmentation: augmentation.clone(), views: 2 * IMAGES.len(), pixel_bytes };
    let (mut tape, inputs) = (Tape::new(), op.inputs());
    let leaves = ["pixels", "descriptors"].into_iter().zip(inputs);
    let leaves: Vec<_> = leaves.map(|(name, desc)| tape.leaf(name, desc, Role::Input, false)).collect();
    let views = tape.record_one(op, &leaves)?;
    tape.keep(views);
    let mut exec = device.executor(tape)?;
    let mut descriptors = Vec::new();
    (0..BATCHES)
        .map(|epoch| {
            augmentation.describe(&images.stored, &images.draw(config, epoch), pixel_bytes, &mut descriptors)?;
            exec.stage(leaves[0], &images.pixels)?;
            exec.stage(leaves[1], bytemuck::cast_slice(&descriptors))?;
            exec.run_step()?;
            Ok(exec.read(views)?.bytes().to_vec())
        })
        .collect()
}
