//! Images per second through the loader (two views each), from a warm file.
#![allow(missing_docs)] // criterion's macros make public items without

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simsiam_engine::data::augment::AugmentConfig;
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::format::{Codec, Meta, crc32c};
use simsiam_engine::data::loader::{Loader, LoaderConfig, Position};
use simsiam_engine::data::writer::{NewRecord, Writer};

/// A dataset of smooth images with texture.
fn write(folder: &Path, images: usize, side: u16) -> PathBuf {
    let path = folder.join(format!("{side}.ssds"));
    let mut writer = Writer::create(&path, 4096, false).unwrap();
    let width = usize::from(side);
    for image in 0..images {
        let pixels: Vec<u8> =
            (0..width * width * 3).map(|i| ((i / 3 % width) + (i / 7) * (image % 9 + 1)) as u8).collect();
        let crc = crc32c(&pixels);
        let (width, height, original_width, original_height) = (side, side, 2 * side, side);
        let record = NewRecord {
            bytes: pixels,
            codec: Codec::Raw,
            width,
            height,
            channels: 3,
            original_width,
            original_height,
            label: None,
            crc,
        };
        writer.append(&record).unwrap();
    }
    let text = || "bench".to_string();
    let (classes, rejected) = (vec![], vec![]);
    let meta =
        Meta { classes, source: text(), store: text(), decoder: text(), resizer: text(), writer: text(), rejected };
    writer.finish(&meta, None, false).unwrap();
    path
}

fn batches(c: &mut Criterion, name: &str, augment: AugmentConfig, batch: usize, path: &Path) {
    let dataset = Arc::new(Dataset::open(path).unwrap());
    let workers = available_parallelism().map_or(1, |n| n.get());
    let config = LoaderConfig { batch, seed: 1, augment, workers, slots: 3, epochs: None };
    let mut loader = Loader::start(dataset, config, Position::default()).unwrap();
    let mut group = c.benchmark_group("loader");
    group.sample_size(10).throughput(Throughput::Elements(batch as u64));
    group.bench_function(format!("{name}_{workers}_workers"), |b| b.iter(|| loader.next_batch().unwrap().position));
}

fn loader(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let large = write(folder.path(), 256, 256);
    batches(c, "images_224_from_256", AugmentConfig::imagenet(), 64, &large);
    let small = write(folder.path(), 4096, 32);
    batches(c, "images_32_from_32", AugmentConfig::cifar(), 256, &small);
}

// Plots would need a system font, which this crate's build of plotters leaves out.
criterion_group!(name = benches; config = Criterion::default().without_plots(); targets = loader);
criterion_main!(benches);
