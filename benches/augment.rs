//! Views per second of one core, whole and by stage.
#![allow(missing_docs)] // criterion's macros make public items without

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simsiam_engine::data::augment::{AugmentConfig, Augmenter, Image, ViewParams};
use simsiam_engine::data::loader::StoredImage;
use simsiam_engine::ops::augment::Augmentation;
use simsiam_engine::tensor::DType;

const VIEWS: usize = 64;

/// A smooth image with texture; the time does not depend on what is on it.
fn pixels(side: usize) -> Vec<u8> {
    (0..side * side * 3).map(|i| ((i / 3 % side) + (i / 7) * (i % 3 + 1)) as u8).collect()
}

fn views(c: &mut Criterion, name: &str, config: &AugmentConfig, stored: usize) {
    let pixels = pixels(stored);
    let image = Image::new(&pixels, stored, stored, 3).unwrap();
    let params: Vec<_> = (0..VIEWS as u64)
        .map(|sample| ViewParams::draw(config, 1, 0, sample, 0, stored as u32, stored as u32))
        .collect();
    let mut augmenter = Augmenter::new(config).unwrap();
    let mut out = vec![0.0; config.view_len()];
    let mut group = c.benchmark_group("augment");
    group.sample_size(10).throughput(Throughput::Elements(VIEWS as u64));
    group.bench_function(name, |b| {
        b.iter(|| {
            for params in &params {
                augmenter.view(&image, params, black_box(&mut out));
            }
        });
    });
}

/// Views of which every one (or none) goes through an operation.
fn only(jitter: bool, blur: bool) -> AugmentConfig {
    AugmentConfig {
        jitter_probability: f64::from(u8::from(jitter)),
        blur_probability: f64::from(u8::from(blur)),
        grayscale_probability: 0.0,
        ..AugmentConfig::imagenet()
    }
}

/// What is left to the host when a device makes the views.
fn describe(c: &mut Criterion) {
    let config = AugmentConfig::imagenet();
    let sides =
        StoredImage { width: 256, height: 256, channels: 3, original_width: 500, original_height: 375, offset: 0 };
    let images: Vec<_> = (0..VIEWS / 2).map(|i| StoredImage { offset: i * sides.len(), ..sides }).collect();
    let draw = |sample, view| ViewParams::draw(&config, 1, 0, sample, view, 500, 375);
    let params: Vec<_> = (0..VIEWS as u64 / 2).map(|sample| [draw(sample, 0), draw(sample, 1)]).collect();
    let augmentation = Augmentation::new(&config, DType::Bf16, 8, 256).unwrap();
    let mut views = Vec::new();
    let mut group = c.benchmark_group("augment");
    group.sample_size(10).throughput(Throughput::Elements(VIEWS as u64));
    group.bench_function("describe_for_a_device", |b| {
        b.iter(|| augmentation.describe(&images, &params, images.len() * sides.len(), black_box(&mut views)).unwrap());
    });
}

fn augment(c: &mut Criterion) {
    views(c, "views_224_from_256", &AugmentConfig::imagenet(), 256);
    views(c, "views_32_from_32", &AugmentConfig::cifar(), 32);
    views(c, "crop_only_224_from_256", &only(false, false), 256);
    views(c, "crop_and_jitter_224_from_256", &only(true, false), 256);
    views(c, "crop_and_blur_224_from_256", &only(false, true), 256);
    describe(c);
}

// Plots would need a system font, which this crate's build of plotters leaves out.
criterion_group!(name = benches; config = Criterion::default().without_plots(); targets = augment);
criterion_main!(benches);
