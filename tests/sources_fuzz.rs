//! Damaged sources: more than 100,000 files that were whole until they were changed at random. Every parser must come to an end
//! with a set of images or an error, without panic, within a bounded memory; and what it accepts must be readable.

use std::alloc::System;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use cap::Cap;
use simsiam_engine::data::import::Source;
use simsiam_engine::data::import::cifar::Cifar;
use simsiam_engine::data::import::idx::Idx;
use simsiam_engine::data::import::source::{Fault, Item};
use simsiam_engine::data::import::webdataset::{Fields, WebDataset};
use simsiam_engine::error::Error;

/// What all tests here together may hold at once, in files of some KB: who asks for more ends the process.
const MEMORY: usize = 128 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, MEMORY);

type Opened = Result<Box<dyn Source>, Error>;

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sources").join(name)).unwrap()
}

fn boxed<S: Source + 'static>(source: Result<S, Error>) -> Opened {
    source.map(|source| Box::new(source) as Box<dyn Source>)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.word() % end.max(1) as u64) as usize
    }

    /// A place; more often near the start or the end, where headers are.
    fn place(&mut self, len: usize) -> usize {
        match self.below(4) {
            0 => self.below(len.min(64)),
            1 => len.saturating_sub(1 + self.below(len.min(512))),
            _ => self.below(len),
        }
    }

    /// Changes a file in one to four ways.
    fn damage(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                return;
            }
            let at = self.place(bytes.len());
            match self.below(9) {
                0 | 1 => bytes[at] ^= 1 << self.below(8),
                2 | 3 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'9', b'0', 0x15][self.below(8)],
                4 => bytes[at] = self.word() as u8,
                5 => {
                    let end = (at + 1 + self.below(8)).min(bytes.len());
                    let value = [0, 0xff, 0x7f][self.below(3)];
                    bytes[at..end].fill(value);
                }
                6 => bytes.truncate(at),
                7 => {
                    let end = (at + 1 + self.below(700)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, piece);
                }
                _ => {
                    let from = self.below(other.len());
                    let piece = &other[from..(from + 1 + self.below(64)).min(other.len())];
                    let end = (at + piece.len()).min(bytes.len());
                    bytes[at..end].copy_from_slice(&piece[..end - at]);
                }
            }
        }
    }
}

/// Opens `rounds` damaged versions of `seeds`, and reads what is accepted. Returns how many were.
fn fuzz(
    name: &str,
    seeds: &[Vec<u8>],
    rounds: usize,
    mend: impl Fn(&mut Vec<u8>, &mut Random),
    open: impl Fn(&Path) -> Opened,
    accept: impl Fn(&[u8], &dyn Source),
) -> usize {
    let place = tempfile::tempdir().unwrap();
    let path: PathBuf = place.path().join(name);
    let mut random = Random(1);
    let mut accepted = 0;
    for round in 0..rounds {
        let mut bytes = seeds[round % seeds.len()].clone();
        random.damage(&mut bytes, &seeds[random.0 as usize % seeds.len()]);
        mend(&mut bytes, &mut random);
        fs::write(&path, &bytes).unwrap();
        let opened = catch_unwind(AssertUnwindSafe(|| match open(&path) {
            Ok(source) => {
                read_all(&*source);
                accept(&bytes, &*source);
                true
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.len() < 2000 && !text.contains('\n'), "{text}");
                false
            }
        }));
        accepted += usize::from(opened.unwrap_or_else(|_| panic!("{name}, round {round}")));
    }
    println!("{name}: {accepted} of {rounds} damaged files accepted");
    accepted
}

fn read_all(source: &dyn Source) {
    assert!(!source.is_empty());
    let mut buffer = Vec::new();
    for i in 0..source.len().min(40) {
        assert!(source.label(i).is_none_or(|label| (label as usize) < source.classes().len()));
        assert!(!source.name(i).is_empty());
        match source.read(i, &mut buffer) {
            Ok(Item::Pixels { pixels, width, height, channels }) => {
                assert_eq!(pixels.len(), usize::from(width) * usize::from(height) * usize::from(channels));
            }
            Ok(Item::Encoded(_)) => {}
            Err(Fault::Bad(reason)) => assert!(!reason.is_empty()),
            Err(Fault::Stop(error)) => panic!("{error}"),
        }
    }
}

fn as_it_is(_: &mut Vec<u8>, _: &mut Random) {}

#[test]
fn idx() {
    let images = fixture("MNIST/raw/t10k-images-idx3-ubyte");
    let labels = fixture("MNIST/raw/t10k-labels-idx1-ubyte");
    let place = tempfile::tempdir().unwrap();
    let open = |path: &Path| boxed(Idx::open(path, None, None, place.path()));
    let whole = |bytes: &[u8], source: &dyn Source| {
        let dims = [1, 2, 3].map(|i| u32::from_be_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()) as usize);
        assert_eq!((bytes.len(), source.len()), (16 + dims[0] * dims[1] * dims[2], dims[0]));
    };
    assert!(fuzz("images", &[images.clone(), labels.clone()], 25_000, as_it_is, open, whole) > 1000);
    let packed = fixture("MNIST/raw/train-images-idx3-ubyte.gz");
    fuzz("images.gz", &[packed, images.clone()], 10_000, as_it_is, open, |_, _| {});
    let good = place.path().join("good");
    fs::write(&good, &images).unwrap();
    let open = |path: &Path| boxed(Idx::open(&good, Some(path), None, place.path()));
    fuzz("labels", &[labels, images], 5_000, as_it_is, open, |_, source| assert_eq!(source.len(), 4));
}

#[test]
fn cifar() {
    let seeds = [
        fixture("cifar-10-batches-bin/data_batch_2.bin"),
        fixture("cifar-100-binary/train.bin"),
        fixture("cifar-100-binary/fine_label_names.txt"),
    ];
    let open = |path: &Path| boxed(Cifar::open(path, None, false));
    let whole = |bytes: &[u8], source: &dyn Source| {
        let record = if source.kind() == "cifar10" { 3073 } else { 3074 };
        assert_eq!(bytes.len(), source.len() * record);
    };
    assert!(fuzz("unknown name", &seeds, 15_000, as_it_is, open, whole) > 1000);
    fuzz("train.bin", &seeds, 5_000, as_it_is, open, whole);
}

/// Gives every other damaged header its right checksum, so that damage gets past that.
fn mend_headers(bytes: &mut Vec<u8>, random: &mut Random) {
    for block in bytes.as_chunks_mut::<512>().0 {
        if &block[257..262] == b"ustar" && random.below(2) == 0 {
            let mut header = tar::Header::new_old();
            header.as_mut_bytes().copy_from_slice(block);
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
        }
    }
}

#[test]
fn webdataset() {
    let seeds = ["gnu.tar", "pax.tar", "ustar.tar", "shards/set-train-001.tar"].map(fixture);
    let place = tempfile::tempdir().unwrap();
    let open = |path: &Path| boxed(WebDataset::open(path, None, Fields::default(), place.path()));
    assert!(fuzz("set.tar", &seeds, 35_000, mend_headers, open, |_, _| {}) > 1000);
    let packed: Vec<Vec<u8>> = seeds.iter().map(|tar| gzip(tar)).collect();
    fuzz("set.tar.gz", &packed, 5_000, as_it_is, open, |_, _| {});
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    let mut encoder = flate2::read::GzEncoder::new(bytes, flate2::Compression::fast());
    std::io::Read::read_to_end(&mut encoder, &mut packed).unwrap();
    packed
}

#[cfg(feature = "parquet")]
#[test]
fn parquet() {
    use simsiam_engine::data::import::parquet::{Columns, Parquet};
    let names = ["none", "snappy", "zstd", "gzip", "lz4", "pages2", "plain"];
    let seeds = names.map(|name| fixture(&format!("{name}.parquet")));
    let place = tempfile::tempdir().unwrap();
    let open = |path: &Path| boxed(Parquet::open(path, None, Columns::default(), place.path()));
    assert!(fuzz("x.parquet", &seeds, 20_000, as_it_is, open, |_, _| {}) > 1000);
}

/// Memory does not follow the size of a source: gigabytes without content, of which only labels are kept.
#[test]
fn large_sources_are_not_read_into_memory() {
    let place = tempfile::tempdir().unwrap();
    let images = place.path().join("images");
    fs::write(&images, [0, 0, 8, 3, 0, 0x20, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 4]).unwrap();
    // 2,097,152 images of 4096 x 4 pixels.
    fs::OpenOptions::new().write(true).open(&images).unwrap().set_len(16 + (32 << 30)).unwrap();
    let idx = Idx::open(&images, None, None, place.path()).unwrap();
    assert_eq!(idx.len(), 1 << 21);
    let last = idx.read(idx.len() - 1, &mut Vec::new()).is_ok_and(|item| match item {
        Item::Pixels { pixels, width, height, .. } => (pixels.len(), width, height) == (16384, 4, 4096),
        Item::Encoded(_) => false,
    });
    assert!(last);
    let train = place.path().join("train.bin");
    fs::write(&train, b"").unwrap();
    fs::OpenOptions::new().write(true).open(&train).unwrap().set_len(3074 * 100_000).unwrap();
    let cifar = Cifar::open(&train, None, false).unwrap();
    assert_eq!(cifar.len(), 100_000);
}
