//! A hundred thousand broken dataset files, manifests and journals: each is refused with an error or read without the least
//! wrong byte, none makes the reader panic, and none makes it take memory that the size of the file does not justify.

mod common;

use std::alloc::System;
use std::fs;
use std::path::Path;

use cap::Cap;
use common::{lying, quick_folder};
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::format::{Codec, Header, Meta, Rejected, crc32c};
use simsiam_engine::data::journal::Journal;
use simsiam_engine::data::manifest::{Manifest, ShardRef};
use simsiam_engine::data::mapped::Access;
use simsiam_engine::data::writer::{Job, NewRecord, SEGMENT, Writer};
use simsiam_engine::rng::{Stream, below};
use tempfile::TempDir;

/// Whoever asks for more ends the process. The inputs have at most 20 kB; the rest is the test's own.
const MEMORY: usize = 16 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, MEMORY);

/// How many of each kind.
const DAMAGED: u64 = 30_000;
const LYING: u64 = 35_000;
const MANIFESTS: u64 = 20_000;
const JOURNALS: u64 = 20_000;

fn records() -> Vec<NewRecord> {
    let jpeg = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images/444.jpg");
    let raw = |i: u16| {
        let (width, height) = (5 + i, 3 + 2 * i);
        let bytes: Vec<u8> = (0..width * height * 3).map(|p| (p * 7 + i * 31) as u8).collect();
        (bytes, Codec::Raw, width, height)
    };
    let images = [raw(0), (fs::read(jpeg).unwrap(), Codec::Jpeg, 53, 38), raw(1), raw(4)];
    let record = |(i, (bytes, codec, width, height)): (usize, (Vec<u8>, Codec, u16, u16))| {
        let (label, crc) = ((i != 2).then_some(i as u32 % 3), crc32c(&bytes));
        let (original_width, original_height) = (2 * width, 3 * height);
        NewRecord { bytes, codec, width, height, channels: 3, original_width, original_height, label, crc }
    };
    images.into_iter().enumerate().map(record).collect()
}

fn meta() -> Meta {
    let text = |text: &str| text.to_string();
    Meta {
        classes: ["ant", "bee", "wasp"].map(String::from).to_vec(),
        source: text("folder"),
        store: text("jpeg"),
        decoder: text("d 1"),
        resizer: text("r 2"),
        writer: text("w 3"),
        rejected: vec![Rejected { path: text("bee/broken.jpg"), reason: text("cut") }],
    }
}

/// A good file of all kinds of records.
fn good(folder: &Path) -> Vec<u8> {
    let path = folder.join("good.ssds");
    let mut writer = Writer::create(&path, 64, true).unwrap();
    records().iter().for_each(|record| writer.append(record).unwrap());
    writer.finish(&meta(), Some(3)).unwrap();
    fs::read(&path).unwrap()
}

/// A place where each input is put in turn, under a name of its own (an earlier one may still be mapped).
struct Inputs {
    folder: TempDir,
    count: u64,
}

impl Inputs {
    fn open(&mut self, bytes: &[u8]) -> Option<Dataset> {
        let path = self.folder.path().join(format!("{}.ssds", self.count));
        self.count += 1;
        fs::write(&path, bytes).unwrap();
        let access = [Access::Map, Access::Pread, Access::Memory][self.count as usize % 3];
        let dataset = Dataset::open_with(&path, access).ok();
        fs::remove_file(&path).unwrap();
        dataset
    }
}

/// Changes, removes and doubles some bytes.
fn mutate(bytes: &mut Vec<u8>, stream: &mut Stream) {
    for _ in 0..=below(stream.word(), 3) {
        let at = below(stream.word(), bytes.len().max(1) as u32) as usize;
        match stream.word() % 8 {
            0 => bytes.truncate(at),
            1 => drop(bytes.splice(at..at, [0xff; 3])),
            2 => drop(bytes.splice(at..bytes.len().min(at + 5), [])),
            _ if at < bytes.len() => bytes[at] = [0, 0xff, 0x7f, stream.word() as u8][stream.word() as usize % 4],
            _ => {}
        }
    }
}

#[test]
fn no_input_panics_or_takes_memory() {
    let folder = quick_folder();
    let good = good(folder.path());
    damaged_files(&good);
    lying_files(&good);
    manifests(&good);
    journals(folder.path());
    let most = ALLOCATOR.max_allocated();
    assert!(most < MEMORY / 2, "{most} bytes");
}

/// Without fitting checksums: what is still read is what was written.
fn damaged_files(good: &[u8]) {
    let mut inputs = Inputs { folder: quick_folder(), count: 0 };
    let expected = records();
    let (mut opened, mut scratch) = (0, Vec::new());
    for round in 0..DAMAGED {
        let mut bytes = good.to_vec();
        mutate(&mut bytes, &mut Stream::new(round, 1, 0));
        let Some(dataset) = inputs.open(&bytes) else { continue };
        opened += 1;
        assert_eq!((dataset.len(), dataset.classes()), (expected.len(), &meta().classes[..]));
        for (i, new) in expected.iter().enumerate() {
            if let Ok(record) = dataset.record(i, &mut scratch) {
                assert_eq!(
                    (record.bytes, record.label, record.codec),
                    (&new.bytes[..], new.label, new.codec),
                    "{round}"
                );
            }
        }
    }
    // Hits in records, whose checksums are compared when they are read.
    assert!(opened > DAMAGED / 10 && opened < DAMAGED, "{opened}");
}

/// With fitting checksums: what is still read is consistent with itself.
fn lying_files(good: &[u8]) {
    let mut inputs = Inputs { folder: quick_folder(), count: 0 };
    let (mut opened, mut scratch) = (0, Vec::new());
    for round in 0..LYING {
        let mut stream = Stream::new(round, 2, 0);
        let bytes = lying(good, |header, entries, text| {
            let value = [0, 1, 0xff, stream.word() as u8][stream.word() as usize % 4];
            let mut place = |len: usize| below(stream.word(), len as u32) as usize;
            match round % 4 {
                0 => bytemuck::bytes_of_mut(header)[place(size_of::<Header>())] = value,
                1 => mutate(text, &mut stream),
                _ => bytemuck::bytes_of_mut(&mut entries[place(4)])[place(32)] = value,
            }
        });
        let Some(dataset) = inputs.open(&bytes) else { continue };
        opened += 1;
        for i in 0..dataset.len() {
            dataset.prefetch(i);
            let Ok(record) = dataset.record(i, &mut scratch) else { continue };
            let raw = record.width * record.height * record.channels;
            assert!(record.codec == Codec::Jpeg || record.bytes.len() == raw, "{round}");
            assert!(record.label.is_none_or(|label| (label as usize) < dataset.classes().len()), "{round}");
        }
    }
    assert!(opened > LYING / 50 && opened < LYING, "{opened}");
}

fn manifests(good: &[u8]) {
    let header: Header = bytemuck::pod_read_unaligned(&good[..size_of::<Header>()]);
    let shard = |name: &str| ShardRef::new(name.into(), &header);
    let text = serde_json::to_vec(&Manifest::new(meta().classes, vec![shard("a.ssds"), shard("b.ssds")])).unwrap();
    for round in 0..MANIFESTS {
        let mut bytes = text.clone();
        mutate(&mut bytes, &mut Stream::new(round, 3, 0));
        if let Ok(manifest) = Manifest::parse(Path::new("m"), &bytes) {
            assert_eq!(manifest.records, manifest.shards.iter().map(|shard| shard.records).sum::<u64>());
            assert!(manifest.shards.iter().all(|shard| !shard.file.contains('/')));
        }
    }
}

/// Frames of a damaged journal are those that were written, up to the damage.
fn journals(folder: &Path) {
    let path = folder.join("j.ssds");
    let job = Job {
        out: path.clone(),
        id: [7; 32],
        alignment: 64,
        segment: 1,
        shard_size: None,
        base: None,
        force: false,
        restart: true,
    };
    assert!(job.segment < SEGMENT);
    let mut writer = Writer::open(job).unwrap();
    records().iter().for_each(|record| writer.append(record).unwrap());
    writer.reject(9, Rejected { path: "x".into(), reason: "y".into() });
    writer.suspend().unwrap();
    let path = folder.join("j.ssds.journal");
    let whole = fs::read(&path).unwrap();
    let frames = |path: &Path| {
        let mut journal = Journal::open(path).unwrap();
        let mut frames = Vec::new();
        let collect = |frame, _| {
            frames.push(frame);
            Ok(())
        };
        journal.frames(0, collect).unwrap();
        (journal.job().unwrap(), frames)
    };
    let (_, expected) = frames(&path);
    assert_eq!(expected.len(), 5);
    for round in 0..JOURNALS {
        let mut bytes = whole.clone();
        mutate(&mut bytes, &mut Stream::new(round, 4, 0));
        fs::write(&path, &bytes).unwrap();
        let (job, found) = frames(&path);
        assert!(job.is_none_or(|id| id == [7; 32]));
        assert!(expected.starts_with(&found), "round {round}");
    }
}
