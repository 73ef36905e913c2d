use std::path::Path;

use super::*;
use crate::data::format::{Codec, HEADER_LEN, Meta, crc32c};
use crate::data::writer::{NewRecord, Writer};
use crate::rng::Stream;

const IMAGES: usize = 23;

/// A dataset of noise in several sizes, some grey, labels 0 to 2 or none.
fn dataset(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("noise.ssds");
    let mut writer = Writer::create(&path, 64, false).unwrap();
    for i in 0..IMAGES {
        let (width, height, channels) = (12 + i % 5, 15 - i % 3, if i % 4 == 0 { 1 } else { 3 });
        let mut stream = Stream::new(1, 99, i as u64);
        let pixels: Vec<u8> = (0..width * height * channels).map(|_| stream.word() as u8).collect();
        let crc = crc32c(&pixels);
        let (width, height) = (width as u16, height as u16);
        let label = (i % 4 != 3).then_some(i as u32 % 4);
        let (original_width, original_height) = (3 * width, 2 * height);
        let channels = channels as u8;
        let record = NewRecord {
            bytes: pixels,
            codec: Codec::Raw,
            width,
            height,
            channels,
            original_width,
            original_height,
            label,
            crc,
        };
        writer.append(&record).unwrap();
    }
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
    writer.finish(&meta, None, false).unwrap();
    path
}

fn config(workers: usize) -> LoaderConfig {
    let augment = AugmentConfig { image_size: 16, blur_probability: 0.5, ..AugmentConfig::cifar() };
    LoaderConfig { batch: 5, seed: 3, augment, workers, slots: 3, epochs: None }
}

fn start(workers: usize, position: Position) -> (tempfile::TempDir, Result<Loader>) {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Arc::new(Dataset::open(&dataset(folder.path())).unwrap());
    let loader = Loader::start(dataset, config(workers), position);
    (folder, loader)
}

/// Position, samples, labels and the bits of the views.
type Content = (Position, Vec<u64>, Vec<Option<u32>>, Vec<u32>);

fn content(batch: &Batch) -> Content {
    let bits = batch.views().iter().map(|v| v.to_bits()).collect();
    (batch.position, batch.sample_ids().to_vec(), batch.labels().to_vec(), bits)
}

fn take(workers: usize, position: Position, count: usize) -> Vec<Content> {
    let (_folder, loader) = start(workers, position);
    let mut loader = loader.unwrap();
    (0..count).map(|_| content(&loader.next_batch().unwrap())).collect()
}

#[test]
fn batches_do_not_depend_on_the_number_of_workers() {
    let one = take(1, Position::default(), 10);
    assert_eq!(one, take(2, Position::default(), 10));
    assert_eq!(one, take(3, Position::default(), 10));
}

#[test]
fn starts_anywhere_as_if_it_had_run_there() {
    let whole = take(1, Position::default(), 10);
    for (skip, position) in [(3, Position { epoch: 0, step: 3 }), (6, Position { epoch: 1, step: 2 })] {
        assert_eq!(whole[skip..], take(2, position, 10 - skip));
    }
    // The end of an epoch is the start of the next.
    assert_eq!(whole[4..6], take(1, Position { epoch: 0, step: 4 }, 2));
}

#[test]
fn an_epoch_visits_images_once_and_leaves_out_the_rest() {
    let batches = take(2, Position::default(), 8);
    for (epoch, batches) in batches.chunks(4).enumerate() {
        let mut samples: Vec<u64> = batches.iter().flat_map(|batch| batch.1.clone()).collect();
        samples.sort_unstable();
        samples.dedup();
        assert_eq!(samples.len(), 20, "23 images, batches of 5");
        let positions: Vec<_> = batches.iter().map(|batch| batch.0).collect();
        let expected: Vec<_> = (0..4).map(|step| Position { epoch: epoch as u32, step }).collect();
        assert_eq!(positions, expected);
    }
    assert_ne!(batches[0].1, batches[4].1, "every epoch has its own order");
}

#[test]
fn views_lie_where_promised_and_are_the_augmenters() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Arc::new(Dataset::open(&dataset(folder.path())).unwrap());
    let config = config(2);
    let mut loader = Loader::start(dataset.clone(), config.clone(), Position { epoch: 1, step: 2 }).unwrap();
    assert_eq!(loader.steps_per_epoch(), 4);
    let batch = loader.next_batch().unwrap();
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
fn ends_after_the_last_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = Arc::new(Dataset::open(&dataset(folder.path())).unwrap());
    let config = LoaderConfig { epochs: Some(2), ..config(1) };
    let mut loader = Loader::start(dataset, config, Position { epoch: 1, step: 2 }).unwrap();
    assert!(loader.next_batch().is_ok() && loader.next_batch().is_ok());
    assert!(loader.next_batch().unwrap_err().to_string().contains("after the last"));
}

#[test]
fn a_damaged_record_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = dataset(folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[HEADER_LEN] ^= 1; // the first byte of the first record
    std::fs::write(&path, bytes).unwrap();
    let dataset = Arc::new(Dataset::open(&path).unwrap());
    let mut loader = Loader::start(dataset, config(3), Position::default()).unwrap();
    let errors: Vec<_> = (0..30).filter_map(|_| loader.next_batch().err()).collect();
    let message = errors[0].to_string();
    assert!(message.contains("record 0") && message.contains("noise.ssds"), "{message}");
    assert!(errors[1..].iter().all(|error| error.to_string().contains("after the last")));
}

/// A loader without a dataset, whose batches `fill` makes.
fn spawn(slots: usize, fill: impl Fn(Position, &mut Slot) -> Result<()> + Send + 'static) -> Loader {
    let slots = (0..slots).map(|_| Slot::default()).collect();
    let positions = (0..).map(|step| Position { epoch: 0, step });
    Loader::spawn(slots, 1 << 40, positions, Arc::new(AtomicBool::new(false)), fill).unwrap()
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
    let (_folder, loader) = start(2, Position::default());
    let mut loader = loader.unwrap();
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
    let cases: [(&str, Spoil); 5] = [
        ("--batch: expected", |c| c.batch = 0),
        ("23 images, fewer than a batch of 24", |c| c.batch = 24),
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
    let (_folder, loader) = start(1, Position { epoch: 0, step: 5 });
    let message = loader.unwrap_err().to_string();
    assert!(message.contains("step 5 lies outside an epoch of 4 steps"), "{message}");
}
