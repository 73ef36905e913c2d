use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use super::ahead::READ_AHEAD;
use super::*;
use crate::data::augment::{AugmentConfig, Augmenter, ViewParams};
use crate::data::decode::Decoder;
use crate::data::format::{Codec, HEADER_LEN, Meta, crc32c};
use crate::data::mapped::Access;
use crate::data::order::EpochOrder;
use crate::data::reader::ImageReader;
use crate::data::writer::{NewRecord, Writer};
use crate::rng::Stream;

const IMAGES: usize = 23;

fn noise(i: usize, [width, height, channels]: [usize; 3]) -> NewRecord {
    let mut stream = Stream::new(1, 99, i as u64);
    let bytes: Vec<u8> = (0..width * height * channels).map(|_| stream.word() as u8).collect();
    let (width, height) = (width as u16, height as u16);
    NewRecord {
        crc: crc32c(&bytes),
        bytes,
        codec: Codec::Raw,
        width,
        height,
        channels: channels as u8,
        original_width: 3 * width,
        original_height: 2 * height,
        label: (i % 4 != 3).then_some(i as u32 % 4),
    }
}

/// A JPEG file as a record; its original is what it decodes to.
fn jpeg(bytes: Vec<u8>, label: u32) -> NewRecord {
    NewRecord {
        crc: crc32c(&bytes),
        bytes,
        codec: Codec::Jpeg,
        width: 53,
        height: 38,
        channels: 3,
        original_width: 53,
        original_height: 38,
        label: Some(label),
    }
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images").join(name)).unwrap()
}

fn write(folder: &Path, name: &str, records: impl IntoIterator<Item = NewRecord>) -> PathBuf {
    let path = folder.join(name);
    let mut writer = Writer::create(&path, 64, false).unwrap();
    records.into_iter().for_each(|record| writer.append(&record).unwrap());
    let text = || "test".to_string();
    let classes = ["a", "b", "c"].map(String::from).to_vec();
    let meta = Meta {
        classes,
        source: text(),
        store: text(),
        decoder: text(),
        resizer: text(),
        writer: text(),
        rejected: vec![],
    };
    writer.finish(&meta, None).unwrap();
    path
}

/// A dataset of noise in several sizes, some grey, labels 0 to 2 or none, and of JPEG files among it.
fn dataset(folder: &Path) -> PathBuf {
    let files = ["420.jpg", "grey.jpg", "cmyk.jpg", "444.jpg"];
    let record = |i: usize| match i % 6 {
        5 => jpeg(fixture(files[i / 6 % 4]), 1),
        _ => noise(i, [12 + i % 5, 15 - i % 3, if i.is_multiple_of(4) { 1 } else { 3 }]),
    };
    write(folder, "noise.ssds", (0..IMAGES).map(record))
}

fn config(workers: usize) -> LoaderConfig {
    let augment = AugmentConfig { image_size: 16, blur_probability: 0.5, ..AugmentConfig::cifar() };
    LoaderConfig {
        batch: 5,
        seed: 3,
        augment,
        output: Output::Views,
        shuffle_window: 0,
        rank: 0,
        world_size: 1,
        workers,
        slots: 3,
        epochs: None,
    }
}

/// Everything a batch holds.
#[derive(Debug, Clone, PartialEq)]
struct Content {
    position: Position,
    samples: Vec<u64>,
    labels: Vec<Option<u32>>,
    views: Vec<u32>,
    pixels: Vec<u8>,
    images: Vec<StoredImage>,
    params: Vec<[ViewParams; 2]>,
}

fn content(batch: &Batch) -> Content {
    Content {
        position: batch.position,
        samples: batch.sample_ids().to_vec(),
        labels: batch.labels().to_vec(),
        views: batch.views().iter().map(|v| v.to_bits()).collect(),
        pixels: batch.pixels().to_vec(),
        images: batch.images().to_vec(),
        params: batch.params().to_vec(),
    }
}

fn take_from(dataset: Dataset, config: LoaderConfig, position: Position, count: usize) -> Vec<Content> {
    let mut loader = Loader::start(Arc::new(dataset), config, position).unwrap();
    (0..count).map(|_| content(&loader.next_batch().unwrap())).collect()
}

fn take(config: LoaderConfig, position: Position, count: usize) -> Vec<Content> {
    let folder = tempfile::tempdir().unwrap();
    take_from(Dataset::open(&dataset(folder.path())).unwrap(), config, position, count)
}

fn start(folder: &Path, config: LoaderConfig) -> Loader {
    let dataset = Dataset::open(&dataset(folder)).unwrap();
    Loader::start(Arc::new(dataset), config, Position::default()).unwrap()
}

#[test]
fn batches_depend_neither_on_the_workers_nor_on_how_bytes_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = dataset(folder.path());
    for (output, shuffle_window) in [(Output::Views, 0), (Output::Records, 0), (Output::Records, 7)] {
        let config = |workers| LoaderConfig { output, shuffle_window, ..config(workers) };
        let first = Dataset::open(&path).unwrap();
        let first = take_from(first, config(1), Position::default(), 10);
        for access in [Access::Map, Access::Pread, Access::Memory] {
            for workers in [1, 2, 3] {
                let dataset = Dataset::open_with(&path, access).unwrap();
                assert_eq!(first, take_from(dataset, config(workers), Position::default(), 10));
            }
        }
    }
}

#[test]
fn starts_anywhere_as_if_it_had_run_there() {
    for shuffle_window in [0, 4, 7, 100] {
        let config = |workers| LoaderConfig { shuffle_window, ..config(workers) };
        let whole = take(config(1), Position::default(), 10);
        for (skip, position) in [(3, Position { epoch: 0, step: 3 }), (6, Position { epoch: 1, step: 2 })] {
            assert_eq!(whole[skip..], take(config(2), position, 10 - skip));
        }
        // The end of an epoch is the start of the next.
        assert_eq!(whole[4..6], take(config(1), Position { epoch: 0, step: 4 }, 2));
    }
}

#[test]
fn an_epoch_visits_images_once_and_leaves_out_the_rest() {
    for shuffle_window in [0, 4] {
        let batches = take(LoaderConfig { shuffle_window, ..config(2) }, Position::default(), 8);
        for (epoch, batches) in batches.chunks(4).enumerate() {
            let mut samples: Vec<u64> = batches.iter().flat_map(|batch| batch.samples.clone()).collect();
            samples.sort_unstable();
            samples.dedup();
            assert_eq!(samples.len(), 20, "23 images, batches of 5");
            let positions: Vec<_> = batches.iter().map(|batch| batch.position).collect();
            let expected: Vec<_> = (0..4).map(|step| Position { epoch: epoch as u32, step }).collect();
            assert_eq!(positions, expected);
        }
        assert_ne!(batches[0].samples, batches[4].samples, "every epoch has its own order");
    }
}

#[test]
fn views_lie_where_promised_and_are_the_augmenters() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Arc::new(Dataset::open(&dataset(folder.path())).unwrap());
    let config = config(2);
    let mut loader = Loader::start(dataset.clone(), config.clone(), Position { epoch: 1, step: 2 }).unwrap();
    assert_eq!(loader.steps_per_epoch(), 4);
    let batch = loader.next_batch().unwrap();
    assert!(batch.pixels().is_empty());
    let order = EpochOrder::new(IMAGES as u64, config.seed, 1);
    let mut augmenter = Augmenter::new(&config.augment).unwrap();
    let mut reader = ImageReader::default();
    let len = config.augment.view_len();
    let mut expected = vec![0.0; len];
    for i in 0..config.batch {
        let sample = order.at((2 * config.batch + i) as u64);
        let (image, label) = reader.read(&dataset, sample as usize).unwrap();
        assert_eq!((batch.sample_ids()[i], batch.labels()[i]), (sample, label));
        for view in 0..2 {
            let (width, height) = image.original_size();
            let params = ViewParams::draw(&config.augment, config.seed, 1, sample, view, width, height);
            augmenter.view(&image, &params, &mut expected);
            assert_eq!(batch.views()[(view as usize * config.batch + i) * len..][..len], expected[..]);
        }
    }
}

#[test]
fn records_are_the_stored_pixels_with_what_was_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Arc::new(Dataset::open(&dataset(folder.path())).unwrap());
    let config = LoaderConfig { output: Output::Records, shuffle_window: 6, ..config(2) };
    let mut loader = Loader::start(dataset.clone(), config.clone(), Position { epoch: 1, step: 0 }).unwrap();
    let mut reader = ImageReader::default();
    let mut jpegs = 0;
    // Batches differ in size, and use the memory of a slot again.
    for step in 0..4 {
        let batch = loader.next_batch().unwrap();
        assert!(batch.views().is_empty());
        let order = EpochOrder::new(IMAGES as u64, config.seed, 1).in_windows(6);
        let mut free_from = 0;
        for i in 0..config.batch {
            let sample = order.at(step * 5 + i as u64);
            let (image, label) = reader.read(&dataset, sample as usize).unwrap();
            assert_eq!((batch.sample_ids()[i], batch.labels()[i]), (sample, label));
            let stored = batch.images()[i];
            assert_eq!(
                (stored.width, stored.height, stored.channels),
                (image.size().0, image.size().1, image.channels())
            );
            let (width, height) = image.original_size();
            assert_eq!((stored.original_width, stored.original_height), (width as usize, height as usize));
            assert_eq!(stored.offset, free_from, "no gaps");
            free_from += stored.len();
            assert_eq!(batch.pixels()[stored.offset..][..stored.len()], *image.pixels());
            let draw = |view| ViewParams::draw(&config.augment, config.seed, 1, sample, view, width, height);
            assert_eq!(batch.params()[i], [draw(0), draw(1)]);
            if sample == 5 {
                assert_eq!(image.pixels(), Decoder::default().decode(&fixture("420.jpg")).unwrap().pixels);
            }
            jpegs += usize::from(sample % 6 == 5);
        }
        assert_eq!(batch.pixels().len(), free_from);
    }
    assert!(jpegs >= 1);
    let work = loader.work();
    assert!(work.images >= 20 && work.bytes > 20 * 12 * 13, "{work:?}");
    assert!(work.decode > Duration::ZERO && work.total() > work.decode, "{work:?}");
}

#[test]
fn images_of_one_size_lie_at_a_fixed_stride() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "equal.ssds", (0..12).map(|i| noise(i, [7, 5, 3])));
    let config = LoaderConfig { output: Output::Records, batch: 4, ..config(2) };
    let batches = take_from(Dataset::open(&path).unwrap(), config, Position::default(), 3);
    for batch in batches {
        let expected: Vec<u8> = batch.samples.iter().flat_map(|&s| noise(s as usize, [7, 5, 3]).bytes).collect();
        assert_eq!(batch.pixels, expected);
    }
}

#[test]
fn ranks_together_make_what_one_makes() {
    let folder = tempfile::tempdir().unwrap();
    let path = dataset(folder.path());
    for shuffle_window in [0, 5] {
        let batches = |rank, world_size| {
            let config =
                LoaderConfig { output: Output::Records, batch: 8, rank, world_size, shuffle_window, ..config(2) };
            take_from(Dataset::open(&path).unwrap(), config, Position { epoch: 0, step: 1 }, 5)
        };
        let alone = batches(0, 1);
        for world_size in [2, 4, 8] {
            let ranks: Vec<_> = (0..world_size).map(|rank| batches(rank, world_size)).collect();
            for (step, expected) in alone.iter().enumerate() {
                let mut samples = vec![];
                let mut pixels = vec![];
                let mut params = vec![];
                for rank in &ranks {
                    assert_eq!(rank[step].position, expected.position);
                    assert_eq!(rank[step].samples.len(), 8 / world_size);
                    samples.extend_from_slice(&rank[step].samples);
                    pixels.extend_from_slice(&rank[step].pixels);
                    params.extend_from_slice(&rank[step].params);
                }
                assert_eq!((&samples, &pixels, &params), (&expected.samples, &expected.pixels, &expected.params));
            }
        }
    }
}

#[test]
fn ends_after_the_last_epoch() {
    let folder = tempfile::tempdir().unwrap();
    for shuffle_window in [0, 3] {
        let dataset = Arc::new(Dataset::open(&dataset(&folder.path().join("."))).unwrap());
        let config = LoaderConfig { epochs: Some(2), shuffle_window, ..config(1) };
        let mut loader = Loader::start(dataset, config, Position { epoch: 1, step: 2 }).unwrap();
        assert!(loader.next_batch().is_ok() && loader.next_batch().is_ok());
        assert!(loader.next_batch().unwrap_err().to_string().contains("after the last"));
        std::fs::remove_file(folder.path().join("noise.ssds")).unwrap();
    }
}

/// Takes batches until there are no more; the first error, all that follow being that there are none.
fn first_error(loader: &mut Loader) -> String {
    let errors: Vec<_> = (0..30).filter_map(|_| loader.next_batch().err()).collect();
    assert!(errors[1..].iter().all(|error| error.to_string().contains("after the last")), "{errors:?}");
    errors[0].to_string()
}

#[test]
fn a_damaged_record_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = dataset(folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[HEADER_LEN] ^= 1; // the first byte of the first record
    std::fs::write(&path, bytes).unwrap();
    for access in [Access::Map, Access::Pread, Access::Memory] {
        for output in [Output::Views, Output::Records] {
            let dataset = Arc::new(Dataset::open_with(&path, access).unwrap());
            let config = LoaderConfig { output, ..config(3) };
            let message = first_error(&mut Loader::start(dataset, config, Position::default()).unwrap());
            assert!(message.contains("record 0") && message.contains("noise.ssds"), "{message}");
        }
    }
}

#[test]
fn a_file_that_is_cut_while_in_use_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = dataset(folder.path());
    let dataset = Arc::new(Dataset::open_with(&path, Access::Pread).unwrap());
    let mut loader = Loader::start(dataset, config(2), Position::default()).unwrap();
    loader.next_batch().unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(HEADER_LEN as u64).unwrap();
    let message = first_error(&mut loader);
    assert!(message.contains("noise.ssds: record ") && message.contains("cut since it was opened"), "{message}");
}

#[test]
fn an_undecodable_jpeg_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut cut = fixture("444.jpg");
    cut.truncate(cut.len() / 2);
    let records = (0..10).map(|i| if i == 7 { jpeg(cut.clone(), 0) } else { noise(i, [9, 8, 3]) });
    let path = write(folder.path(), "cut.ssds", records);
    for output in [Output::Views, Output::Records] {
        let dataset = Arc::new(Dataset::open(&path).unwrap());
        let config = LoaderConfig { output, ..config(2) };
        let message = first_error(&mut Loader::start(dataset, config, Position::default()).unwrap());
        assert!(message.contains("cut.ssds: record 7: JPEG: "), "{message}");
    }
}

#[test]
fn a_jpeg_of_another_size_than_the_index_says_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let wrong = NewRecord { width: 54, ..jpeg(fixture("444.jpg"), 0) };
    let path = write(folder.path(), "wrong.ssds", [noise(0, [9, 8, 3]), wrong]);
    let dataset = Arc::new(Dataset::open(&path).unwrap());
    let config = LoaderConfig { output: Output::Records, batch: 2, ..config(2) };
    let message = first_error(&mut Loader::start(dataset, config, Position::default()).unwrap());
    assert!(message.contains("record 1: ") && message.contains("53x38"), "{message}");
}

/// A loader without a dataset, whose batches `fill` makes.
fn spawn(slots: usize, fill: impl FnMut(Position, &mut Slot) -> Result<()> + Send + 'static) -> Loader {
    let slots = (0..slots).map(|_| Slot::default()).collect();
    let positions = (0..).map(|step| Position { epoch: 0, step });
    Loader::spawn(slots, positions, Arc::new(AtomicBool::new(false)), fill).unwrap()
}

#[test]
fn a_panic_becomes_an_error() {
    let mut loader = spawn(2, |position, _| match position.step {
        3 => panic!("step {} is unlucky", position.step),
        _ => Ok(()),
    });
    for _ in 0..3 {
        loader.next_batch().unwrap();
    }
    let message = loader.next_batch().unwrap_err().to_string();
    assert!(message.contains("step 3 is unlucky") && message.contains("loader"), "{message}");
    assert!(loader.next_batch().is_err());
}

#[test]
fn a_panicking_worker_is_an_error_that_names_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Dataset::open(&dataset(folder.path())).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let mut loader = spawn(2, move |position, _| {
        let work = || if position.step == 1 { panic!("unlucky") } else { Ok(()) };
        pool.install(|| workers::guard(&dataset, 17, work))
    });
    loader.next_batch().unwrap();
    let message = loader.next_batch().unwrap_err().to_string();
    assert!(message.contains("record 17 of ") && message.contains("noise.ssds: unlucky"), "{message}");
}

#[test]
fn holding_every_slot_is_an_error_and_no_hang() {
    let mut loader = spawn(2, |_, _| Ok(()));
    let first = loader.next_batch().unwrap();
    let second = loader.next_batch().unwrap();
    assert!(loader.next_batch().unwrap_err().to_string().contains("every slot"));
    drop(first);
    assert_eq!(loader.next_batch().unwrap().position.step, 2);
    drop(second);
}

#[test]
fn dropping_the_loader_ends_its_threads_at_once() {
    let start_time = Instant::now();
    let folder = tempfile::tempdir().unwrap();
    let mut loader = start(folder.path(), config(2));
    let batch = loader.next_batch().unwrap();
    drop(loader);
    assert!(start_time.elapsed() < Duration::from_secs(10));
    // A batch may outlive its loader.
    assert_eq!(batch.sample_ids().len(), 5);
}

#[test]
fn impossible_configurations_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Arc::new(Dataset::open(&dataset(folder.path())).unwrap());
    type Spoil = fn(&mut LoaderConfig);
    let cases: [(&str, Spoil); 8] = [
        ("--batch: expected", |c| c.batch = 0),
        ("23 images, fewer than a batch of 24", |c| c.batch = 24),
        ("--batch: 5 images cannot be shared equally by 2 ranks", |c| c.world_size = 2),
        ("--batch: 5 images cannot be shared equally by 0 ranks", |c| c.world_size = 0),
        ("--rank: expected a rank below the number of ranks, 5, got 5", |c| (c.world_size, c.rank) = (5, 5)),
        ("--workers", |c| c.workers = 0),
        ("--loader-slots", |c| c.slots = 1),
        ("--image-size", |c| c.augment.image_size = 0),
    ];
    for (expected, spoil) in cases {
        let mut config = config(1);
        spoil(&mut config);
        let message = Loader::start(dataset.clone(), config, Position::default()).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    let loader = Loader::start(dataset, config(1), Position { epoch: 0, step: 5 });
    let message = loader.unwrap_err().to_string();
    assert!(message.contains("step 5 lies outside an epoch of 4 steps"), "{message}");
}

/// What is asked for while batches are made from `from` on: the records after each of the batches.
fn asked(images: usize, config: &LoaderConfig, from: Position, count: usize) -> Vec<Vec<u64>> {
    let asked = Arc::new(Mutex::new(vec![]));
    let log = asked.clone();
    let mut ahead = ReadAhead::new(images, config.clone(), Arc::default(), move |s| log.lock().unwrap().push(s));
    let steps = steps_per_epoch(images, config.batch);
    let positions = std::iter::successors(Some(from), |p| Some(p.next(steps))).take(count);
    let after = |position| {
        ahead.keep_ahead_of(position);
        std::mem::take(&mut *asked.lock().unwrap())
    };
    positions.map(after).collect()
}

#[test]
fn every_record_is_asked_for_once_before_it_is_needed() {
    let images = 500;
    let config = LoaderConfig { batch: 20, ..config(1) };
    let from = Position { epoch: 2, step: 20 };
    // To the end of the epoch and two batches on.
    let asked = asked(images, &config, from, 7);
    let mut expected = vec![];
    for (epoch, places) in [(2, 400..500), (3, 0..120)] {
        let order = config.order(images, epoch);
        expected.extend(places.map(|place| order.at(place)));
    }
    assert_eq!(asked.concat(), expected);
    assert_eq!(asked[0].len(), 20 + 80, "the batch itself, and at least 64 images more");
    assert!(asked[1..].iter().all(|batch| batch.len() == 20));
}

#[test]
fn a_rank_asks_for_its_own_records() {
    let config = LoaderConfig { batch: 40, world_size: 4, rank: 2, epochs: Some(1), ..config(1) };
    let asked = asked(90, &config, Position::default(), 2).concat();
    let order = config.order(90, 0);
    let expected: Vec<u64> = (20..30).chain(60..70).map(|place| order.at(place)).collect();
    assert_eq!(asked, expected, "and for nothing behind the last epoch");
}

#[test]
fn windows_are_read_ahead_whole_in_the_order_of_the_file() {
    let images = 1000;
    let config = LoaderConfig { batch: 32, shuffle_window: 150, ..config(1) };
    let from = Position { epoch: 0, step: 5 };
    let asked = asked(images, &config, from, 40);
    let ahead = READ_AHEAD as u64;
    let mut known: std::collections::BTreeSet<u64> = Default::default();
    let mut position = from;
    for batch in &asked {
        known.extend(batch);
        // The window after the one that holds the batch, within the epoch, is known as a whole.
        let order = config.order(images, position.epoch);
        let places = config.places(position.step);
        assert!(places.clone().all(|place| known.contains(&order.at(place))));
        let (_, next) = order.window((places.end - 1 + ahead).min(31 * 32 - 1)).unwrap();
        if next < 31 * 32 {
            assert!(order.window(next).unwrap().0.all(|sample| known.contains(&sample)));
        }
        if position.next(31).epoch != position.epoch {
            known.clear();
            // What was asked for the next epoch is known in it.
            let order = config.order(images, position.epoch + 1);
            let (samples, next) = order.window(0).unwrap();
            known.extend(samples.chain(order.window(next).unwrap().0));
        }
        position = position.next(31);
    }
    // Sequential: of all steps only those between windows, and that over the end of the file, are not by one.
    let order = asked.concat();
    let jumps = order.windows(2).filter(|pair| pair[0] + 1 != pair[1]).count();
    assert!(jumps < 2 * 8 * 2, "{jumps} jumps among {} records", order.len());
}
