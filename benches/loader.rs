//! Images per second through the loader, from a warm file: finished views (two an image), and stored pixels.
//! `simsiam-engine bench loader` measures the same on a dataset of yours.
#![allow(missing_docs)] // criterion's macros make public items without

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simsiam_engine::data::augment::AugmentConfig;
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::format::{Codec, Meta, crc32c};
use simsiam_engine::data::loader::{Loader, LoaderConfig, Output, Position};
use simsiam_engine::data::mapped::Access;
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
    writer.finish(&meta, None).unwrap();
    path
}

fn batches(c: &mut Criterion, name: &str, dataset: Dataset, augment: AugmentConfig, output: Output, batch: usize) {
    let workers = available_parallelism().map_or(1, |n| n.get());
    let config = LoaderConfig {
        batch,
        seed: 1,
        augment,
        output,
        shuffle_window: 0,
        rank: 0,
        world_size: 1,
        workers,
        slots: 3,
        epochs: None,
    };
    let mut loader = Loader::start(Arc::new(dataset), config, Position::default()).unwrap();
    let mut group = c.benchmark_group("loader");
    group.sample_size(10).throughput(Throughput::Elements(batch as u64));
    group.bench_function(format!("{name}_{workers}_workers"), |b| b.iter(|| loader.next_batch().unwrap().position));
}

fn loader(c: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let large = write(folder.path(), 1024, 256);
    let (imagenet, cifar) = (AugmentConfig::imagenet(), AugmentConfig::cifar());
    batches(c, "images_224_from_256", Dataset::open(&large).unwrap(), imagenet.clone(), Output::Views, 64);
    for access in [Access::Map, Access::Pread, Access::Memory] {
        let name = format!("records_256_{access:?}").to_lowercase();
        let dataset = Dataset::open_with(&large, access).unwrap();
        batches(c, &name, dataset, imagenet.clone(), Output::Records, 256);
    }
    let small = write(folder.path(), 4096, 32);
    batches(c, "images_32_from_32", Dataset::open(&small).unwrap(), cifar, Output::Views, 256);
}

// Plots would need a system font, which this crate's build of plotters leaves out.
criterion_group!(name = benches; config = Criterion::default().without_plots(); targets = loader);
criterion_main!(benches);
