//! `augment-preview`: images beside two views of each, as training would see them.

use std::path::PathBuf;

use image::RgbImage;

use crate::cli::augment_args::AugmentArgs;
use crate::cli::picture;
use crate::cli::preset::Preset;
use crate::data::augment::{AugmentConfig, Augmenter, ViewParams};
use crate::data::dataset::Dataset;
use crate::data::order::EpochOrder;
use crate::data::reader::ImageReader;
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
    let mut reader = ImageReader::default();
    let mut tiles = Vec::new();
    for place in 0..args.count.min(images) {
        let sample = order.at(place);
        let (image, _) = reader.read(&dataset, sample as usize)?;
        let (width, height) = image.original_size();
        tiles.push(picture::in_proportion(&image));
        for view in 0..2 {
            let params = ViewParams::draw(&config, args.seed, args.epoch, sample, view, width, height);
            let mut values = vec![0.0; config.view_len()];
            augmenter.view(&image, &params, &mut values);
            tiles.push(view_picture(&values, &config)?);
        }
    }
    let cell = config.image_size.clamp(CELL[0], CELL[1]) as u32;
    write_grid(&args.out, &tiles, 3, cell)?;
    println!("{}: {} rows of image, view 1, view 2", args.out.display(), tiles.len() / 3);
    Ok(())
}

/// A normalised view as a picture.
fn view_picture(values: &[f32], config: &AugmentConfig) -> Result<RgbImage> {
    let level = |(i, &value): (usize, &f32)| ((value * config.std[i % 3] + config.mean[i % 3]) * 255.0).round() as u8;
    let bytes = values.iter().enumerate().map(level).collect();
    let side = config.image_size as u32;
    RgbImage::from_raw(side, side, bytes).ok_or_else(|| wrong_size(values.len()))
}

fn wrong_size(got: usize) -> Error {
    Error::shape("preview", "pixels", "height x width x channels", got)
}
