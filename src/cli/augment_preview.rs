//! `augment-preview`: images beside two views of each, as training would see them.

use std::path::PathBuf;

use image::imageops::{FilterType, resize};
use image::{GrayImage, RgbImage};

use crate::cli::augment_args::AugmentArgs;
use crate::cli::preset::Preset;
use crate::data::augment::{AugmentConfig, Augmenter, Image, ViewParams};
use crate::data::mapped::{Dataset, Record};
use crate::data::order::EpochOrder;
use crate::error::{Error, Result};
use crate::report::grid::write_grid;

/// Smallest and largest side of a tile in the picture.
const CELL: [usize; 2] = [128, 512];

#[derive(Debug, clap::Args)]
pub struct AugmentPreviewArgs {
    /// Dataset file made by `prepare`.
    dataset: PathBuf,
    /// Picture to write (PNG): a row for each image, with the image, its first view and its second view.
    out: PathBuf,
    /// Number of images: the first ones of the epoch.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1000))]
    count: u64,
    /// Seed of the run.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Epoch of the run, from 0.
    #[arg(long, default_value_t = 0)]
    epoch: u32,
    /// Recipe that the defaults come from.
    #[arg(long, value_enum, default_value_t)]
    preset: Preset,
    #[command(flatten)]
    augment: AugmentArgs,
}

pub fn run(args: AugmentPreviewArgs) -> Result<()> {
    let config = args.augment.resolve(args.preset)?;
    let dataset = Dataset::open(&args.dataset)?;
    let images = dataset.len() as u64;
    let order = EpochOrder::new(images, args.seed, args.epoch);
    let mut augmenter = Augmenter::new(&config)?;
    let mut tiles = Vec::new();
    for place in 0..args.count.min(images) {
        let sample = order.at(place);
        let record = dataset.record(sample as usize)?;
        let image = Image::from_record(&record)?;
        let (width, height) = image.original_size();
        tiles.push(original(&record)?);
        for view in 0..2 {
            let params = ViewParams::draw(&config, args.seed, args.epoch, sample, view, width, height);
            let mut values = vec![0.0; config.view_len()];
            augmenter.view(&image, &params, &mut values);
            tiles.push(picture(&values, &config)?);
        }
    }
    let cell = config.image_size.clamp(CELL[0], CELL[1]) as u32;
    write_grid(&args.out, &tiles, 3, cell)?;
    println!("{}: {} rows of image, view 1, view 2", args.out.display(), tiles.len() / 3);
    Ok(())
}

/// The stored image in the proportions of its original.
fn original(record: &Record) -> Result<RgbImage> {
    let (width, height) = (record.width as u32, record.height as u32);
    let bytes = record.pixels.to_vec();
    let stored = match record.channels {
        1 => GrayImage::from_raw(width, height, bytes).map(|grey| image::DynamicImage::from(grey).to_rgb8()),
        _ => RgbImage::from_raw(width, height, bytes),
    };
    let stored = stored.ok_or_else(|| wrong_size(record.pixels.len()))?;
    let longest = record.original_width.max(record.original_height).max(1);
    let side = |original: usize| (original * width.max(height) as usize).div_ceil(longest).max(1) as u32;
    let proportions = (side(record.original_width), side(record.original_height));
    if proportions == (width, height) {
        return Ok(stored);
    }
    Ok(resize(&stored, proportions.0, proportions.1, FilterType::Triangle))
}

/// A normalised view as a picture.
fn picture(values: &[f32], config: &AugmentConfig) -> Result<RgbImage> {
    let level = |(i, &value): (usize, &f32)| ((value * config.std[i % 3] + config.mean[i % 3]) * 255.0).round() as u8;
    let bytes = values.iter().enumerate().map(level).collect();
    let side = config.image_size as u32;
    RgbImage::from_raw(side, side, bytes).ok_or_else(|| wrong_size(values.len()))
}

fn wrong_size(got: usize) -> Error {
    Error::shape("preview", "pixels", "height x width x channels", got)
}
