//! The dataset file: what is written comes back, and every way of being broken gives one clear error, never a panic and
//! never a wrong image.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{lying, quick_folder, scratch};
use proptest::prelude::*;
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::format::{Codec, Entry, Header, Meta, NO_LABEL, Rejected, SHUFFLED, crc32c};
use simsiam_engine::data::writer::{NewRecord, Writer};
use simsiam_engine::error::{Error, Result};
use tempfile::TempDir;

/// Five records of differing size, both channel counts, with and without a label; no value occurs twice in a row.
fn records(equal_sizes: bool) -> Vec<NewRecord> {
    (0..5u16)
        .map(|i| {
            let (width, height, channels) =
                if equal_sizes { (5, 3, 3) } else { (5 + i, 3 + 2 * i, [1, 3][i as usize % 2]) };
            let len = width as usize * height as usize * channels as usize;
            let pixels: Vec<u8> = (0..len).map(|p| (p * 7 + i as usize * 31) as u8).collect();
            let label = (i != 3).then_some(u32::from(i % 3));
            let crc = crc32c(&pixels);
            NewRecord {
                bytes: pixels,
                codec: Codec::Raw,
                width,
                height,
                channels,
                original_width: 70 + i,
                original_height: 40 + i,
                label,
                crc,
            }
        })
        .collect()
}

fn meta() -> Meta {
    Meta {
        classes: ["ant", "bee", "Käfer"].map(String::from).to_vec(),
        source: "folder".into(),
        store: "raw".into(),
        decoder: "d 1".into(),
        resizer: "r 2".into(),
        writer: "w 3".into(),
        rejected: vec![Rejected { path: "bee/broken.jpg".into(), reason: "truncated".into() }],
    }
}

fn write(path: &Path, records: &[NewRecord]) -> Result<Header> {
    let mut writer = Writer::create(path, 64, false)?;
    records.iter().try_for_each(|record| writer.append(record))?;
    writer.finish(&meta(), Some(9))?;
    Ok(*Dataset::open(path)?.shards()[0].header())
}

/// A good file, as bytes, with a place for broken versions of it.
struct Bench {
    folder: TempDir,
    good: Vec<u8>,
    header: Header,
}

impl Bench {
    fn new(equal_sizes: bool) -> Bench {
        let folder = quick_folder();
        let path = folder.path().join("good.ssds");
        let header = write(&path, &records(equal_sizes)).unwrap();
        Bench { good: fs::read(&path).unwrap(), header, folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("broken.ssds")
    }

    fn open(&self, bytes: &[u8]) -> Result<Dataset> {
        // A new file each time: the last one may still be mapped.
        let _ = fs::remove_file(self.path());
        fs::write(self.path(), bytes).unwrap();
        Dataset::open(&self.path())
    }

    /// Opens a version whose header, entries and meta text were changed and all checksums made to fit again.
    fn open_lying(&self, lie: impl FnOnce(&mut Header, &mut [Entry], &mut Vec<u8>)) -> Result<Dataset> {
        self.open(&self.lying(lie))
    }

    fn lying(&self, lie: impl FnOnce(&mut Header, &mut [Entry], &mut Vec<u8>)) -> Vec<u8> {
        lying(&self.good, lie)
    }
}

/// The one sentence the user sees: of a [`Error::Format`], naming the file.
fn sentence<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error @ Error::Format { .. }) => {
            let text = error.to_string();
            assert!(text.contains("broken.ssds"), "{text}");
            assert!(!text.contains('\n'), "{text}");
            text
        }
        Err(other) => panic!("not a format error: {other}"),
    }
}

fn assert_says<T>(result: Result<T>, expected: &str) {
    let text = sentence(result);
    assert!(text.contains(expected), "expected {expected:?} in {text:?}");
}

/// All records equal those that were written.
fn assert_intact(dataset: &Dataset, expected: &[NewRecord]) {
    assert_eq!(dataset.len(), expected.len());
    assert_eq!(dataset.classes(), meta().classes);
    for (i, new) in expected.iter().enumerate() {
        let record = dataset.record(i, scratch()).unwrap();
        assert_eq!(record.bytes, new.bytes);
        assert_eq!((record.width, record.height), (new.width.into(), new.height.into()));
        assert_eq!(record.channels, usize::from(new.channels));
        let original = (usize::from(new.original_width), usize::from(new.original_height));
        assert_eq!((record.original_width, record.original_height), original);
        assert_eq!((record.label, record.codec), (new.label, Codec::Raw));
    }
}

#[test]
fn what_is_written_comes_back() {
    for equal_sizes in [true, false] {
        let bench = Bench::new(equal_sizes);
        let dataset = bench.open(&bench.good).unwrap();
        assert_intact(&dataset, &records(equal_sizes));
        assert_eq!(dataset.shards()[0].meta(), &meta());
        assert_eq!(dataset.shards()[0].header(), &bench.header);
        dataset.shards()[0].verify_hashes().unwrap();
        let header = dataset.shards()[0].header();
        assert_eq!((header.optional_features, header.shuffle_seed), (SHUFFLED, 9));
        assert_eq!(header.stride, if equal_sizes { 64 } else { 0 });
        (0..dataset.len() + 1).for_each(|i| dataset.prefetch(i));
        assert!(matches!(dataset.record(5, scratch()), Err(Error::Shape { .. })));
    }
}

/// The layout on disk, at the byte: what other programs may rely on.
#[test]
fn the_layout_is_the_documented_one() {
    let bench = Bench::new(true);
    let u64_at = |at: usize| u64::from_le_bytes(bench.good[at..at + 8].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(bench.good[at..at + 4].try_into().unwrap());
    let u16_at = |at: usize| u16::from_le_bytes(bench.good[at..at + 2].try_into().unwrap());
    assert_eq!(&bench.good[..8], &[0x89, 0x53, 0x53, 0x44, 0x0d, 0x0a, 0x1a, 0x0a]);
    assert_eq!((u16_at(8), u16_at(10), u32_at(12)), (1, 0, 64));
    assert_eq!((u64_at(32), u64_at(40)), (5, bench.good.len() as u64));
    assert_eq!(u64_at(48), 4096);
    assert_eq!(u64_at(72), 5 * 32);
    assert_eq!(u64_at(80) + u64_at(88), bench.good.len() as u64);
    assert_eq!((u64_at(96), u64_at(104)), (64, 45));
    assert_eq!([112, 116, 120, 124, 128].map(u32_at), [3, 5, 3, 0, 1]);
    assert_eq!(u64_at(144), 9);
    let (index, meta) = (u64_at(64) as usize, u64_at(80) as usize);
    assert_eq!(u32_at(168), crc32c(&bench.good[index..index + 160]));
    assert_eq!(u32_at(172), crc32c(&bench.good[meta..]));
    assert_eq!(bench.good[176..208], blake3::hash(&bench.good[index..index + 160]).as_bytes()[..]);
    assert_eq!(bench.good[208..240], blake3::hash(&bench.good[meta..]).as_bytes()[..]);
    assert!(bench.good[240..4092].iter().all(|&b| b == 0));
    assert_eq!(u32_at(4092), crc32c(&bench.good[..4092]));
    // Record 3, the one without a label.
    let entry = index + 3 * 32;
    assert_eq!((u64_at(entry), u32_at(entry + 8)), (4096 + 3 * 64, 45));
    assert_eq!([12, 14, 16, 18].map(|at| u16_at(entry + at)), [5, 3, 73, 43]);
    assert_eq!(u32_at(entry + 20), crc32c(&bench.good[4096 + 192..4096 + 192 + 45]));
    assert_eq!(u32_at(entry + 24), NO_LABEL);
    assert_eq!(bench.good[entry + 28..entry + 32], [0, 3, 0, 0]);
    // The check value of CRC-32C.
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bench = Bench::new(false);
    assert_says(bench.open(b""), "not a dataset file");
    assert_says(bench.open(&bench.good[..7]), "not a dataset file");
    assert_says(bench.open(&bench.good[..8]), "cut inside the 4096-byte header");
    assert_says(bench.open(&bench.good[..4095]), "byte 4095: cut inside the 4096-byte header");
    for cut in (4096..bench.good.len()).step_by(3).chain([bench.good.len() - 1]) {
        let expected = format!("the file is cut: {cut} bytes, but its header says {}", bench.good.len());
        assert_says(bench.open(&bench.good[..cut]), &expected);
    }
    let grown = [&bench.good[..], b"x"].concat();
    assert_says(bench.open(&grown), "the file is grown");
}

#[test]
fn a_flipped_bit_is_found_and_placed() {
    let bench = Bench::new(false);
    let flipped = |at: usize| {
        let mut bytes = bench.good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    assert_says(bench.open(&flipped(3)), "byte 0: not a dataset file");
    for at in [10, 16, 40, 60, 100, 160, 200, 239, 240, 4000, 4092, 4095] {
        assert_says(bench.open(&flipped(at)), "byte 0: header checksum mismatch");
    }
    let (index, meta) = (bench.header.index, bench.header.meta);
    for at in 0..index.len {
        let expected = format!("byte {}: index checksum mismatch", index.offset);
        assert_says(bench.open(&flipped((index.offset + at) as usize)), &expected);
    }
    for at in (0..meta.len).step_by(5) {
        let expected = format!("byte {}: meta checksum mismatch", meta.offset);
        assert_says(bench.open(&flipped((meta.offset + at) as usize)), &expected);
    }
    let third = bench.open(&bench.good).unwrap().entry(2).unwrap();
    for at in 0..u64::from(third.len) {
        let dataset = bench.open(&flipped((third.offset + at) as usize)).unwrap();
        let text = sentence(dataset.record(2, scratch()));
        assert!(text.contains(&format!("byte {}: record 2: checksum mismatch", third.offset)), "{text}");
        assert!(text.contains("hint: "), "{text}");
        assert!([0, 1, 3, 4].iter().all(|&i| dataset.record(i, scratch()).is_ok()), "the others are whole");
    }
}

#[test]
fn newer_versions_and_features_are_named() {
    let bench = Bench::new(true);
    assert_says(bench.open_lying(|h, _, _| h.major = 2), "format version 2.0, but this build reads up to 1.x");
    assert_says(bench.open_lying(|h, _, _| h.major = 0), "format version 0.0 never existed");
    assert_says(bench.open_lying(|h, _, _| h.required_features = 4), "needs features 0x4");
    // These may be ignored.
    let later = bench.open_lying(|h, _, _| (h.minor, h.optional_features) = (7, SHUFFLED | 1 << 40)).unwrap();
    assert_intact(&later, &records(true));
}

#[test]
fn a_lying_header_is_refused() {
    type Lie = fn(&mut Header);
    let lies: [(Lie, &str); 18] = [
        (|h| h.records = 0, "holds no records"),
        (|h| h.records = 4, "4 records need 32 bytes of index each, but it has 160"),
        (|h| h.records = u64::MAX / 16, "of index each"),
        (|h| h.file_len += 1, "the file is cut"),
        (|h| h.alignment = 0, "alignment is 0"),
        (|h| h.alignment = 48, "alignment is 48"),
        (|h| h.shard = 1, "shard 1 of 1"),
        (|h| h.payload.offset = 64, "payload of 4096 bytes at 64 overlaps"),
        (|h| h.payload.len = u64::MAX, "payload of"),
        (|h| h.payload.len += 64, "index of 160 bytes"),
        (|h| h.index.offset = u64::MAX - 5, "index of 160 bytes at"),
        (|h| h.meta.offset -= 8, "meta of"),
        (|h| h.meta.len += 1, "meta of"),
        (|h| h.classes = 2, "label 2 in a file of 2 classes"),
        (|h| h.classes = 4, "3 class names, but the header says 4"),
        (|h| h.max_record = 44, "the header's largest record (44 bytes, 5x3)"),
        (|h| h.max_width = 6, "the header's largest record (45 bytes, 6x3)"),
        (|h| h.stride = 128, "index of record 1: offset 4160 does not follow the record stride of 128"),
    ];
    let bench = Bench::new(true);
    for (lie, expected) in lies {
        assert_says(bench.open_lying(|header, _, _| lie(header)), expected);
    }
}

#[test]
fn a_lying_index_is_refused() {
    type Lie = fn(&mut [Entry]);
    let lies: [(Lie, &str); 18] = [
        (|e| e[4].offset = 1 << 40, "index of record 4: 99 bytes at 1099511627776 leave the payload"),
        (|e| e[4].offset = u64::MAX - 63, "leave the payload"),
        (|e| e[4].offset += 4096, "leave the payload"),
        (|e| e[0].offset = 0, "index of record 0: offset 0 lies before 4096"),
        (|e| e[0].offset = 4032, "offset 4032 lies before 4096"),
        (|e| e[2].offset = e[1].offset, "index of record 2: offset 4160 lies before"),
        (|e| e[1].offset += 1, "is not a multiple of 64"),
        (|e| e[1].len += 1, "index of record 1: 91 bytes, but 6x5x3 needs 90"),
        (|e| e[1].len = 0, "0 bytes, but"),
        (|e| e[1].width += 1, "90 bytes, but 7x5x3 needs 105"),
        (|e| e[1].channels = 1, "90 bytes, but 6x5x1 needs 30"),
        (|e| e[1].channels = 2, "2 channels, expected 1 or 3"),
        (|e| (e[1].width, e[1].len) = (0, 0), "an empty image: 0x5"),
        (|e| e[1].original_height = 0, "an empty image: 6x5 from 71x0"),
        (|e| e[1].label = 3, "label 3 in a file of 3 classes"),
        (|e| e[1].codec = 2, "codec 2 is not one this build knows"),
        (|e| e[1].codec = 1, "codec 1 (JPEG) in a file whose header names no JPEG records"),
        (
            |e| (e[1].width, e[1].height, e[1].channels, e[1].len) = (65535, 65535, 3, 0),
            "65535x65535x3 needs 12884508675",
        ),
    ];
    let bench = Bench::new(false);
    for (lie, expected) in lies {
        assert_says(bench.open_lying(|_, entries, _| lie(entries)), expected);
    }
}

#[test]
fn a_broken_meta_text_is_refused() {
    let bench = Bench::new(true);
    assert_says(bench.open_lying(|_, _, text| *text = b"{\"classes\": 7}".to_vec()), "meta text: ");
    assert_says(bench.open_lying(|_, _, text| *text = b"\xff\xfe".to_vec()), "meta text: ");
    assert_says(bench.open_lying(|_, _, text| *text = vec![b'['; 100_000]), "meta text: ");
    assert_says(bench.open_lying(|_, _, text| text.clear()), "meta text: ");
}

#[test]
fn hashes_are_compared_on_demand() {
    let bench = Bench::new(true);
    let dataset = bench.open_lying(|h, _, _| h.index_blake3[5] ^= 1).unwrap();
    assert_says(dataset.shards()[0].verify_hashes(), "BLAKE3 of the index");
    let dataset = bench.open_lying(|h, _, _| h.meta_blake3[31] ^= 1).unwrap();
    assert_says(dataset.shards()[0].verify_hashes(), "BLAKE3 of the meta");
}

#[test]
fn what_is_no_file_is_named_so() {
    let bench = Bench::new(true);
    let text = Dataset::open(bench.folder.path()).unwrap_err().to_string();
    assert!(text.contains("is a folder, not a dataset file"), "{text}");
    let text = Dataset::open(&bench.path()).unwrap_err().to_string();
    assert!(text.starts_with("cannot open ") && text.contains("broken.ssds"), "{text}");
    assert_says(bench.open(b"\x89PNG\r\n\x1a\n and so on"), "not a dataset file");
}

#[test]
fn the_writer_leaves_nothing_unfinished() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.ssds");
    let names = || -> Vec<String> {
        let entries = fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    // Dropped in the middle.
    let mut writer = Writer::create(&path, 64, false).unwrap();
    writer.append(&records(true)[0]).unwrap();
    assert_eq!(names(), ["a.ssds.journal", "a.ssds.tmp"]);
    // While it writes, nobody else may.
    let text = Writer::create(&path, 64, false).unwrap_err().to_string();
    assert!(text.contains("another process is writing this dataset now"), "{text}");
    drop(writer);
    assert_eq!(names(), [""; 0]);
    // Nothing to store.
    let writer = Writer::create(&path, 64, false).unwrap();
    let text = writer.finish(&meta(), None).unwrap_err().to_string();
    assert!(text.contains("there is no record to store"), "{text}");
    assert_eq!(names(), [""; 0]);
    // What a killed run left behind is longer than the new file, and must not show through.
    fs::write(folder.path().join("a.ssds.tmp"), vec![0xaa; 100_000]).unwrap();
    write(&path, &records(false)).unwrap();
    assert_eq!(names(), ["a.ssds"]);
    assert_intact(&Dataset::open(&path).unwrap(), &records(false));
    // An existing file stays, unless told otherwise; who has it open keeps what was there.
    let before = fs::read(&path).unwrap();
    let text = write(&path, &records(true)).unwrap_err().to_string();
    assert!(text.contains("exists already; hint: --force"), "{text}");
    assert_eq!(fs::read(&path).unwrap(), before);
    let old = Dataset::open(&path).unwrap();
    let mut writer = Writer::create(&path, 64, true).unwrap();
    records(true).iter().for_each(|record| writer.append(record).unwrap());
    writer.finish(&meta(), Some(9)).unwrap();
    assert_intact(&old, &records(false));
    assert_intact(&Dataset::open(&path).unwrap(), &records(true));
    assert_eq!(names(), ["a.ssds"]);
}

#[test]
fn a_record_must_have_the_bytes_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = Writer::create(&folder.path().join("a.ssds"), 64, false).unwrap();
    let mut record = records(true).remove(0);
    record.bytes.pop();
    assert!(matches!(writer.append(&record), Err(Error::Shape { .. })));
    assert_eq!(writer.records(), 0);
}

/// More than one segment of 64 MiB.
#[test]
fn a_file_of_several_segments_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.ssds");
    let mut writer = Writer::create(&path, 4096, false).unwrap();
    for i in 0..12u32 {
        let pixels: Vec<u8> = (0..2048 * 2048 * 3u32).map(|p| (p ^ (p >> 8) ^ (i * 41)) as u8).collect();
        let crc = crc32c(&pixels);
        let side = 2048;
        let (width, height, original_width, original_height) = (side, side, side, side);
        let label = Some(0);
        writer
            .append(&NewRecord {
                bytes: pixels,
                codec: Codec::Raw,
                width,
                height,
                channels: 3,
                original_width,
                original_height,
                label,
                crc,
            })
            .unwrap();
    }
    writer.finish(&meta(), None).unwrap();
    let dataset = Dataset::open(&path).unwrap();
    assert_eq!(dataset.shards()[0].header().stride, 2048 * 2048 * 3);
    for i in 0..12 {
        assert_eq!(dataset.record(i, scratch()).unwrap().bytes[1000], (1000u32 ^ (1000 >> 8) ^ (i as u32 * 41)) as u8);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any damage: an error somewhere, or (in the unused bytes between records) not the least effect.
    #[test]
    fn damage_never_gives_a_wrong_image(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let bench = Bench::new(false);
        let mut bytes = bench.good.clone();
        for (at, bits) in flips {
            *at.get_mut(&mut bytes) ^= bits;
        }
        if let Some(at) = cut {
            bytes.truncate(at.index(bytes.len()));
        }
        let expected = records(false);
        if let Ok(dataset) = bench.open(&bytes) {
            prop_assert_eq!(dataset.len(), expected.len());
            prop_assert_eq!(dataset.classes(), &meta().classes[..]);
            for (i, new) in expected.iter().enumerate() {
                if let Ok(record) = dataset.record(i, scratch()) {
                    prop_assert_eq!(record.bytes, &new.bytes[..]);
                    prop_assert_eq!(record.label, new.label);
                }
            }
        }
    }

    /// Lies with fitting checksums: whatever still opens is consistent with itself and stays inside the payload.
    #[test]
    fn lies_never_panic(
        header_bytes in prop::collection::vec((8usize..240, any::<u8>()), 0..3),
        entry_bytes in prop::collection::vec((0usize..5, 0usize..32, any::<u8>()), 0..3),
        text_bytes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..2),
    ) {
        let bench = Bench::new(false);
        let bytes = bench.lying(|header, entries, text| {
            for (at, value) in header_bytes {
                bytemuck::bytes_of_mut(header)[at] = value;
            }
            for (i, at, value) in entry_bytes {
                bytemuck::bytes_of_mut(&mut entries[i])[at] = value;
            }
            for (at, value) in text_bytes {
                *at.get_mut(text) = value;
            }
        });
        if let Ok(dataset) = bench.open(&bytes) {
            for i in 0..dataset.len() {
                dataset.prefetch(i);
                if let Ok(record) = dataset.record(i, scratch()) {
                    prop_assert_eq!(record.bytes.len(), record.width * record.height * record.channels);
                    prop_assert!(record.label.is_none_or(|label| (label as usize) < dataset.classes().len()));
                }
            }
        }
    }
}
