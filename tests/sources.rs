//! The sources of `prepare` against files written by other software: the fixtures of tools/source_fixtures.py, with what the
//! readers of others find in them; and against files that are damaged, incomplete or not what they seem.

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use common::{fail, run, scratch, succeed};
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::decode::Decoder;
use simsiam_engine::data::import::Source;
use simsiam_engine::data::import::cifar::Cifar;
use simsiam_engine::data::import::detect::{Kind, detect};
use simsiam_engine::data::import::folder::Folder;
use simsiam_engine::data::import::idx::Idx;
use simsiam_engine::data::import::select::{Split, Subset};
use simsiam_engine::data::import::source::{Fault, Item};
use simsiam_engine::data::import::webdataset::{Fields, WebDataset};
use simsiam_engine::error::Error;
use tempfile::TempDir;

type Opened = Result<Box<dyn Source>, Error>;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sources")
}

fn fixture(name: &str) -> PathBuf {
    fixtures().join(name)
}

fn boxed<S: Source + 'static>(source: Result<S, Error>) -> Opened {
    source.map(|source| Box::new(source) as Box<dyn Source>)
}

fn webdataset(path: &Path) -> Opened {
    boxed(WebDataset::open(path, None, Fields::default(), &std::env::temp_dir()))
}

fn error(opened: Opened) -> String {
    opened.err().expect("an error").to_string()
}

/// Columns x rows x channels, and the CRC-32 of the pixels.
fn digest(width: usize, height: usize, channels: usize, pixels: &[u8]) -> String {
    let mut crc = flate2::Crc::new();
    crc.update(pixels);
    format!("{width}x{height}x{channels} {:08x}", crc.sum())
}

fn digest_of(item: Item) -> Result<String, Fault> {
    match item {
        Item::Pixels { pixels, width, height, channels } => {
            Ok(digest(width.into(), height.into(), channels.into(), pixels))
        }
        Item::Encoded(bytes) => {
            let mut decoder = Decoder::default();
            let image = decoder.decode(bytes)?;
            Ok(digest(image.width.into(), image.height.into(), image.channels.into(), image.pixels))
        }
    }
}

/// What is wrong with image `i`, which must be bad.
fn fault(source: &dyn Source, i: usize) -> String {
    match source.read(i, &mut Vec::new()) {
        Err(Fault::Bad(reason)) => reason,
        other => panic!("image {i}: {other:?}"),
    }
}

fn expected(name: &str) -> (Vec<String>, Vec<Option<u32>>, Vec<String>) {
    let all: serde_json::Value = serde_json::from_slice(&fs::read(fixture("expected.json")).unwrap()).unwrap();
    let texts = |key: &str| serde_json::from_value(all[name][key].clone()).unwrap();
    (texts("pixels"), serde_json::from_value(all[name]["labels"].clone()).unwrap(), texts("classes"))
}

/// Compares with what is expected of `name`; bad images are left out. Read from the last to the first, with one buffer.
fn check(source: &dyn Source, name: &str) {
    let (pixels, labels, classes) = expected(name);
    assert_eq!(source.classes(), classes, "{name}");
    let mut buffer = Vec::new();
    let mut found = Vec::new();
    for i in (0..source.len()).rev() {
        match source.read(i, &mut buffer).and_then(digest_of) {
            Ok(digest) => found.push((digest, source.label(i))),
            Err(Fault::Bad(_)) => {}
            Err(Fault::Stop(error)) => panic!("{name}: {error}"),
        }
    }
    found.reverse();
    let expected: Vec<_> = pixels.into_iter().zip(labels).collect();
    assert_eq!(found, expected, "{name}");
    let names: std::collections::HashSet<String> = (0..source.len()).map(|i| source.name(i)).collect();
    assert_eq!(names.len(), source.len(), "{name}: names are unique");
}

// ---- files of others

#[test]
fn tar_files_of_python_and_webdataset() {
    for name in ["ustar.tar", "gnu.tar", "pax.tar", "shards"] {
        check(&*webdataset(&fixture(name)).unwrap(), name);
    }
    let by_pattern = webdataset(&fixture("shards/set-train-{000..001}.tar")).unwrap();
    check(&*by_pattern, "shards");
    assert_eq!(by_pattern.name(4), "set-train-001.tar/x/004.webp");
    let fields = Fields { label: Some("group".into()), image: Some("webp".into()) };
    let by_group = WebDataset::open(&fixture("shards"), Some(Split::Train), fields, Path::new("")).unwrap();
    check(&by_group, "shards by group");
    assert!(by_group.notes().is_empty());
    // A long name, found again by reading its headers.
    let pax = webdataset(&fixture("pax.tar")).unwrap();
    let long = "a-folder-with-quite-a-long-name/".repeat(4);
    assert_eq!(pax.name(2), format!("pax.tar/{long}größe/0002.PNG"));
    let missing = error(webdataset(&fixture("shards/set-train-{000..002}.tar")));
    assert!(missing.contains("set-train-002.tar: No such file"), "{missing}");
}

#[test]
fn gzipped_tar_files() {
    let place = tempfile::tempdir().unwrap();
    for (name, tar) in [("a.tar.gz", "gnu.tar"), ("b.tgz", "ustar.tar")] {
        gzip(&place.path().join(name), &fs::read(fixture(tar)).unwrap());
    }
    check(&*webdataset(&place.path().join("a.tar.gz")).unwrap(), "gnu.tar");
    check(&*webdataset(&place.path().join("b.tgz")).unwrap(), "ustar.tar");
    // Both in one temporary file.
    let both = webdataset(place.path()).unwrap();
    assert_eq!((both.len(), both.name(4)), (8, "b.tgz/plain/0000.PNG".into()));
    assert_eq!(digest_of(both.read(5, &mut Vec::new()).unwrap()).unwrap(), expected("gnu.tar").0[1]);
    let packed = fs::read(place.path().join("a.tar.gz")).unwrap();
    let cut = place.path().join("cut.tgz");
    fs::write(&cut, &packed[..packed.len() / 2]).unwrap();
    assert!(error(webdataset(&cut)).contains("cannot be read or unpacked from here"));
}

fn gzip(path: &Path, bytes: &[u8]) {
    let mut encoder = flate2::write::GzEncoder::new(fs::File::create(path).unwrap(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap();
}

#[test]
fn cifar_as_torchvision_reads_it() {
    let open = |folder: &str, split, coarse| boxed(Cifar::open(&fixture(folder), split, coarse));
    let (ten, hundred) = ("cifar-10-batches-bin", "cifar-100-binary");
    check(&*open(ten, Some(Split::Train), false).unwrap(), "cifar10 train");
    check(&*open(ten, Some(Split::Test), false).unwrap(), "cifar10 test");
    check(&*open("cifar-10-batches-bin/test_batch.bin", None, false).unwrap(), "cifar10 test");
    for (split, name) in [(Split::Train, "cifar100 train"), (Split::Test, "cifar100 test")] {
        check(&*open(hundred, Some(split), false).unwrap(), name);
        check(&*open(hundred, Some(split), true).unwrap(), &format!("{name} coarse"));
    }
    assert_eq!(open(ten, Some(Split::Train), false).unwrap().name(3), "data_batch_3.bin record 0");
    assert!(error(open(ten, None, false)).contains("holds several splits: train, test; hint: choose with --split"));
    assert!(error(open(ten, Some(Split::Val), false)).contains("has no val split; hint: it has: train, test"));
    assert!(error(open(ten, Some(Split::Train), true)).starts_with("--coarse-labels: CIFAR-10 has no groups"));
}

#[test]
fn idx_as_torchvision_reads_it() {
    let place = tempfile::tempdir().unwrap();
    let open = |split| Idx::open(&fixture("MNIST/raw"), None, Some(split), place.path());
    check(&open(Split::Train).unwrap(), "idx train");
    check(&open(Split::Test).unwrap(), "idx t10k");
    // The unpacked file has no name.
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

// ---- broken tar files

struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    fn new() -> Archive {
        Archive(tar::Builder::new(Vec::new()))
    }

    fn with(mut self, name: &str, bytes: &[u8]) -> Archive {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        self.0.append_data(&mut header, name, bytes).unwrap();
        self
    }

    fn save(self, place: &TempDir) -> PathBuf {
        let path = place.path().join("set.tar");
        fs::write(&path, self.0.into_inner().unwrap()).unwrap();
        path
    }
}

fn png() -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images/rgb.png")).unwrap()
}

#[test]
fn samples_that_cannot_be_used_are_bad_and_the_others_good() {
    let place = tempfile::tempdir().unwrap();
    let png = png();
    let path = Archive::new()
        .with("0.png", &png)
        .with("0.cls", b"2")
        .with("lonely.cls", b"1")
        .with("lonely.txt", b"text")
        .with("twice.png", &png)
        .with("twice.PNG", &png)
        .with("worded.png", &png)
        .with("worded.cls", b"wolf")
        .with("huge.png", &png)
        .with("huge.cls", b"99999999999")
        .with("none.png", &png)
        .with("none.cls", b"-1")
        .with("odd.json", br#"{"label": [1]}"#)
        .with("odd.png", &png)
        .with("cut.json", b"{")
        .with("cut.png", &png)
        .with("several.png", &png)
        .with("several.jpg", b"not taken for png")
        .with("README", b"no sample")
        .with("0.png", &png)
        .save(&place);
    let set = WebDataset::open(&path, None, Fields::default(), place.path()).unwrap();
    assert_eq!(set.classes(), ["0", "1", "2"]);
    let labels: Vec<_> = (0..set.len()).map(|i| set.label(i)).collect();
    assert_eq!(labels, [Some(2), Some(1), None, None, None, None, None, None, None, None]);
    for (i, reason) in [
        (1, "no image in this sample, which has cls, txt"),
        (2, "two members with the field png"),
        (3, "its label \"wolf\" is a name where those before are numbers"),
        (4, "its label 99999999999 is not in 0 to 262143"),
        (6, "its json has [1] for label, no number or name of a class"),
        (7, "its json cannot be read: EOF"),
    ] {
        assert!(fault(&set, i).starts_with(reason), "{i}: {}", fault(&set, i));
    }
    for i in [0, 5, 9] {
        assert!(matches!(set.read(i, &mut Vec::new()), Ok(Item::Encoded(bytes)) if bytes == png), "{i}");
    }
    assert!(matches!(set.read(8, &mut Vec::new()), Ok(Item::Encoded(b"not taken for png"))));
    assert!(set.notes()[0].starts_with("set.tar: 2 samples hold several images"), "{:?}", set.notes());
    assert_eq!(set.name(1), "set.tar/lonely.cls");
}

#[test]
fn archives_without_samples_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let none = Archive::new().with("README", b"text").save(&place);
    assert!(error(webdataset(&none)).contains("set.tar: no member of the form KEY.jpg"));
    let cifar = Archive::new().with("cifar/data_batch_1.bin", b"\x01\x02").save(&place);
    let text = error(webdataset(&cifar));
    assert!(text.contains("the first, set.tar/cifar/data_batch_1.bin: no image in this sample"), "{text}");
    assert!(text.contains("unpack other archives first"), "{text}");
}

/// A cut is an error that names a byte, wherever it falls; but where a member ends, a note says that the end is missing.
#[test]
fn no_cut_of_a_tar_file_goes_unnoticed() {
    let place = tempfile::tempdir().unwrap();
    for name in ["gnu.tar", "pax.tar", "ustar.tar"] {
        let whole = fs::read(fixture(name)).unwrap();
        let end = whole.iter().rposition(|byte| *byte != 0).unwrap() / 512 * 512 + 512;
        let path = place.path().join(name);
        for len in (0..end).step_by(61).chain((0..=end).step_by(512)) {
            fs::write(&path, &whole[..len]).unwrap();
            match WebDataset::open(&path, None, Fields::default(), place.path()) {
                Ok(set) => assert!(set.notes()[0].contains("lacks the mark of its end"), "{name} cut at {len}"),
                Err(e) if len < 2048 => assert!(e.to_string().starts_with(path.to_str().unwrap()), "{e}"),
                Err(e) => assert!(e.to_string().contains(", byte "), "{name} cut at {len}: {e}"),
            }
        }
        let mut damaged = whole.clone();
        damaged[600] ^= 0x20;
        damaged[100] ^= 0x01;
        fs::write(&path, &damaged).unwrap();
        assert!(error(webdataset(&path)).contains(", byte 0: not a tar header, or a damaged one"));
    }
}

// ---- broken CIFAR files

#[test]
fn broken_cifar_files_are_named_with_the_place() {
    let place = tempfile::tempdir().unwrap();
    let open = |name: &str, bytes: &[u8]| {
        let path = place.path().join(name);
        fs::write(&path, bytes).unwrap();
        boxed(Cifar::open(&path, None, false))
    };
    let good = fs::read(fixture("cifar-10-batches-bin/data_batch_2.bin")).unwrap();
    let cut = error(open("data_batch_2.bin", &good[..good.len() - 1]));
    assert!(cut.contains("byte 3073: 6145 bytes are no number of CIFAR-10 records of 3073 bytes"), "{cut}");
    assert!(error(open("data_batch_2.bin", b"")).contains("0 bytes are no number"));
    let mut two = good.clone();
    two[3073] = 10;
    let text = error(open("data_batch_2.bin", &two));
    assert!(text.contains("byte 3073: record 1 has label 10, expected 0 to 9"), "{text}");
    let mut hundred = fs::read(fixture("cifar-100-binary/train.bin")).unwrap();
    assert_eq!(open("no known name", &hundred).unwrap().kind(), "cifar100");
    hundred[3075] = 100;
    assert!(error(open("x", &hundred)).contains("byte 3075: record 1 has label 100, expected 0 to 99"));
    assert!(error(open("y", &[0; 4000])).contains("neither its name nor its 4000 bytes tell"));
    // The names of classes must be as many as there are classes.
    fs::write(place.path().join("fine_label_names.txt"), "one\ntwo\n").unwrap();
    assert!(error(open("train.bin", &hundred)).contains("fine_label_names.txt: 2 names, expected 100"));
    let python = tempfile::tempdir().unwrap();
    fs::write(python.path().join("data_batch_1"), b"\x80\x02}").unwrap();
    assert_eq!(detect(python.path()).unwrap(), Kind::Cifar);
    let text = error(boxed(Cifar::open(python.path(), None, false)));
    assert!(text.contains("get the binary version"), "{text}");
    fs::copy(fixture("cifar-100-binary/test.bin"), python.path().join("test.bin")).unwrap();
    fs::write(python.path().join("test_batch.bin"), &good).unwrap();
    assert!(error(boxed(Cifar::open(python.path(), None, false))).contains("files of both CIFAR-10 and CIFAR-100"));
}

// ---- sources that change or vanish

#[test]
fn a_source_that_changes_or_vanishes_stops_the_work() {
    let stops = |source: &dyn Source, i: usize, expected: &str| match source.read(i, &mut Vec::new()) {
        Err(Fault::Stop(error)) => assert!(error.to_string().contains(expected), "{error}"),
        other => panic!("{other:?}"),
    };
    let place = tempfile::tempdir().unwrap();
    let tar = place.path().join("set.tar");
    fs::copy(fixture("gnu.tar"), &tar).unwrap();
    let set = webdataset(&tar).unwrap();
    fs::OpenOptions::new().write(true).open(&tar).unwrap().set_len(3000).unwrap();
    stops(&*set, 0, "set.tar: has changed since it was opened");
    let images = place.path().join("images");
    fs::copy(fixture("MNIST/raw/t10k-images-idx3-ubyte"), &images).unwrap();
    let idx = Idx::open(&images, None, None, place.path()).unwrap();
    let mut bytes = fs::read(&images).unwrap();
    bytes.push(0);
    fs::write(&images, &bytes).unwrap();
    stops(&idx, 3, "images: has changed since it was opened");
    // More files than are kept open.
    let shards = place.path().join("shards");
    fs::create_dir(&shards).unwrap();
    for n in 0..130 {
        fs::copy(fixture("ustar.tar"), shards.join(format!("{n:03}.tar"))).unwrap();
    }
    let many = webdataset(&shards).unwrap();
    assert_eq!((many.len(), many.name(519)), (520, "129.tar/plain/0003.PNG".into()));
    assert_eq!(digest_of(many.read(517, &mut Vec::new()).unwrap()).unwrap(), expected("ustar.tar").0[1]);
    fs::remove_file(shards.join("007.tar")).unwrap();
    stops(&*many, 29, "cannot open");
    let folder = place.path().join("folder");
    fs::create_dir_all(folder.join("a")).unwrap();
    fs::write(folder.join("a/1.png"), png()).unwrap();
    std::os::unix::fs::symlink("nowhere", folder.join("a/2.png")).unwrap();
    let images = Folder::open(&folder, None).unwrap();
    assert_eq!(fault(&images, 1), "a link to nowhere");
    fs::rename(&folder, place.path().join("elsewhere")).unwrap();
    stops(&images, 0, "cannot read");
    stops(&images, 1, "cannot read");
}

#[test]
fn fingerprints_tell_sources_apart() {
    let place = tempfile::tempdir().unwrap();
    let print = |source: &dyn Source| {
        let mut hasher = blake3::Hasher::new();
        source.fingerprint(&mut hasher);
        hasher.finalize()
    };
    let tar = place.path().join("set.tar");
    fs::copy(fixture("gnu.tar"), &tar).unwrap();
    let before = print(&*webdataset(&tar).unwrap());
    assert_eq!(before, print(&*webdataset(&tar).unwrap()));
    let fields = Fields { image: None, label: Some("group".into()) };
    assert_ne!(before, print(&WebDataset::open(&tar, None, fields, place.path()).unwrap()));
    let classes = |names: &[&str]| {
        let names = names.iter().map(|name| name.to_string()).collect();
        print(&Subset::of_classes(webdataset(&tar).unwrap(), names).unwrap())
    };
    assert_eq!(classes(&["7", "0"]), classes(&["7", "0"]));
    assert_ne!(classes(&["7", "0"]), classes(&["0", "7"]));
    fs::copy(fixture("ustar.tar"), &tar).unwrap();
    assert_ne!(before, print(&*webdataset(&tar).unwrap()));
}

// ---- from the command line

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `prepare` in the order of the source; returns the dataset and what it said.
fn prepare(source: &Path, options: &[&str]) -> (Dataset, String) {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out.ssds");
    let args = ["prepare", text(source), text(&out), "--store", "raw", "--no-shuffle"];
    let output = run(&[&args[..], options].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    (Dataset::open(&out).unwrap(), said)
}

fn prepare_fails(source: &Path, options: &[&str]) -> String {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out.ssds");
    let text = fail(&[&["prepare", text(source), text(&out)], options].concat());
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "something is left behind");
    text
}

fn check_dataset(dataset: &Dataset, name: &str) {
    let (pixels, labels, classes) = expected(name);
    assert_eq!(dataset.classes(), classes, "{name}");
    assert_eq!(dataset.len(), pixels.len(), "{name}");
    for (i, (pixels, label)) in pixels.iter().zip(labels).enumerate() {
        let record = dataset.record(i, scratch()).unwrap();
        assert_eq!(&digest(record.width, record.height, record.channels, record.bytes), pixels, "{name} {i}");
        assert_eq!(record.label, label, "{name} {i}");
    }
}

#[test]
fn auto_recognises_every_source_and_says_so() {
    let cases: [(&str, &[&str], &str, &str); 6] = [
        ("pax.tar", &[], "pax.tar", "WebDataset: 4 images, 8 classes, from "),
        ("shards", &["--split", "train"], "shards", "WebDataset: 7 images, 3 classes, from 2 files, "),
        (
            "cifar-10-batches-bin",
            &["--split", "train"],
            "cifar10 train",
            "CIFAR-10: 6 images, 10 classes, from 5 files",
        ),
        (
            "cifar-100-binary/train.bin",
            &["--coarse-labels"],
            "cifar100 train coarse",
            "CIFAR-100: 2 images, 20 classes",
        ),
        ("MNIST/raw", &["--split", "test"], "idx t10k", "IDX: 4 images from "),
        ("MNIST/raw/train-images-idx3-ubyte.gz", &[], "idx train", "IDX: 6 images from "),
    ];
    for (source, options, name, said) in cases {
        let (dataset, text) = prepare(&fixture(source), options);
        assert!(text.starts_with(said), "{text}");
        check_dataset(&dataset, name);
    }
    let place = tempfile::tempdir().unwrap();
    let odd = place.path().join("odd name");
    fs::copy(fixture("ustar.tar"), &odd).unwrap();
    check_dataset(&prepare(&odd, &[]).0, "ustar.tar");
    gzip(&odd, &fs::read(fixture("gnu.tar")).unwrap());
    check_dataset(&prepare(&odd, &[]).0, "gnu.tar");
    fs::write(&odd, "").unwrap();
    assert!(prepare_fails(&odd, &[]).contains("odd name: is empty"));
    fs::write(&odd, "just a text").unwrap();
    let text = prepare_fails(&odd, &[]);
    assert!(
        text.contains("odd name: is no Parquet, tar, IDX or CIFAR file by its first bytes, name or length"),
        "{text}"
    );
    // Two kinds in one folder.
    fs::create_dir_all(place.path().join("wolf")).unwrap();
    fs::write(place.path().join("wolf/1.png"), png()).unwrap();
    fs::rename(&odd, place.path().join("everything.tar")).unwrap();
    let text = prepare_fails(place.path(), &[]);
    assert!(text.contains("holds WebDataset tar files (everything.tar) and a folder of images (wolf/)"), "{text}");
    assert_eq!(prepare(place.path(), &["--source", "folder"]).0.classes(), ["wolf"]);
}

#[test]
fn threads_do_not_change_the_file_of_a_packed_source() {
    let place = tempfile::tempdir().unwrap();
    let bytes = |threads: &str| {
        let out = place.path().join(threads);
        let pattern = fixture("shards/set-train-{000..001}.tar");
        succeed(&["prepare", text(&pattern), text(&out), "--store", "raw:9", "--threads", threads]);
        fs::read(out).unwrap()
    };
    assert_eq!(bytes("1"), bytes("5"));
}

#[test]
fn classes_are_chosen_and_named() {
    let place = tempfile::tempdir().unwrap();
    let list = place.path().join("classes.txt");
    fs::write(&list, "wolf\n\n ant \n").unwrap();
    let shards = fixture("shards");
    for option in ["wolf,ant", &format!("@{}", text(&list))] {
        let (dataset, said) = prepare(&shards, &["--classes", option]);
        assert!(said.contains("5 images of 2 classes are chosen"), "{said}");
        assert_eq!(dataset.classes(), ["wolf", "ant"]);
        let labels: Vec<_> = (0..dataset.len()).map(|i| dataset.label(i).unwrap().unwrap()).collect();
        assert_eq!(labels, [0, 1, 0, 1, 0]);
        let record = dataset.record(3, scratch()).unwrap();
        let pixels = digest(record.width, record.height, record.channels, record.bytes);
        assert_eq!(pixels, expected("shards").0[4]);
    }
    for (option, expected) in [
        ("wulf", "--classes: the source has no class wulf; hint: did you mean wolf?"),
        ("Ant,wolf", "the source has no class Ant; hint: did you mean ant?"),
        ("zebra", "the source has no class zebra; hint: the source has 3 classes: ant, emu, wolf"),
        ("ant,emu,ant", "--classes: ant is named twice"),
        ("ant,", "--classes: one of the names is empty"),
        ("", "--classes: names no class"),
        ("@/no/such/file", "cannot read /no/such/file"),
    ] {
        let text = prepare_fails(&shards, &["--classes", option]);
        assert!(text.contains(expected), "{text}");
    }
    let named = fs::write(&list, "zero\none\ntwo\nthree\nfour\nfive\nsix\nseven\neight\n");
    named.unwrap();
    let (dataset, _) = prepare(&fixture("gnu.tar"), &["--class-names", text(&list), "--classes", "three,seven"]);
    assert_eq!((dataset.classes(), dataset.len()), (&["three".to_string(), "seven".to_string()][..], 2));
    assert_eq!([dataset.label(0).unwrap(), dataset.label(1).unwrap()], [Some(1), Some(0)]);
    let text_of = prepare_fails(&shards, &["--class-names", text(&list)]);
    assert!(text_of.contains("--class-names: the classes have names already, like ant"), "{text_of}");
    fs::write(&list, "zero\none\n").unwrap();
    let text_of = prepare_fails(&fixture("gnu.tar"), &["--class-names", text(&list)]);
    assert!(text_of.contains("2 names for 8 classes"), "{text_of}");
    let text_of = prepare_fails(&fixture("gnu.tar"), &["--classes", "2"]);
    assert!(text_of.contains("--classes: no image is of 2"), "{text_of}");
}

#[test]
fn splits_of_a_folder_are_its_folders() {
    let place = tempfile::tempdir().unwrap();
    for path in ["train/a/1.png", "train/b/1.png", "validation/a/1.png"] {
        let path = place.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, png()).unwrap();
    }
    let (dataset, said) = prepare(place.path(), &["--split", "train"]);
    assert_eq!((dataset.classes(), dataset.len()), (&["a".to_string(), "b".to_string()][..], 2));
    assert!(said.contains("2 images in ") && said.contains("/train, 2 classes"), "{said}");
    assert_eq!(prepare(place.path(), &["--split", "val"]).0.len(), 1);
    let text = prepare_fails(place.path(), &["--split", "test"]);
    assert!(text.contains("has no test split; hint: it has: train, validation"), "{text}");
    let (_, said) = prepare(place.path(), &[]);
    assert!(said.contains("warning: the classes are called train, validation; --split chooses one"), "{said}");
}

#[test]
fn options_of_other_sources_are_refused() {
    for (source, options, expected) in [
        ("gnu.tar", &["--labels", "x"][..], "--labels: is for IDX files, and the source is WebDataset tar files"),
        ("shards", &["--coarse-labels"], "--coarse-labels: is for CIFAR binary files"),
        ("MNIST/raw", &["--label-field", "x"], "--label-field: is for WebDataset tar files"),
        ("gnu.tar", &["--image-column", "x"], "--image-column: is for Parquet files"),
        ("gnu.tar", &["--split", "train"], "--split: chooses from a folder, and "),
        ("gnu.tar", &["--source", "idx"], "not an IDX file of 3 dimensions"),
        ("gnu.tar", &["--source", "cifar"], "neither its name nor its 20480 bytes tell"),
        ("gnu.tar", &["--source", "folder"], "gnu.tar is a file"),
        ("shards", &["--source", "cifar", "--split", "test"], "no CIFAR files"),
        ("MNIST/raw", &["--source", "webdataset"], "no tar files in this folder"),
        ("shards", &["--split", "test"], "has no test split; hint: it has: train (2 files)"),
    ] {
        let text = prepare_fails(&fixture(source), options);
        assert!(text.contains(expected), "{text}");
    }
}

// ---- Parquet

#[cfg(not(feature = "parquet"))]
#[test]
fn a_build_without_parquet_says_so() {
    let text = prepare_fails(&fixture("zstd.parquet"), &[]);
    assert!(text.contains("this build cannot read Parquet; hint: build with the feature parquet"), "{text}");
}

#[cfg(feature = "parquet")]
mod parquet {
    use simsiam_engine::data::import::parquet::{Columns, Parquet};

    use super::*;

    fn open(path: &Path, image: Option<&str>, label: Option<&str>) -> Opened {
        let columns = Columns { image: image.map(str::to_owned), label: label.map(str::to_owned) };
        boxed(Parquet::open(path, None, columns, &std::env::temp_dir()))
    }

    #[test]
    fn files_of_pyarrow() {
        for name in ["none", "snappy", "zstd", "gzip", "lz4", "pages2"].map(|form| format!("{form}.parquet")) {
            check(&*open(&fixture(&name), None, None).unwrap(), &name);
        }
        check(&*open(&fixture("plain.parquet"), None, Some("kind")).unwrap(), "plain.parquet");
        let unlabelled = open(&fixture("plain.parquet"), None, None).unwrap();
        assert_eq!((unlabelled.classes().len(), unlabelled.label(0)), (0, None));
        let hub = Parquet::open(&fixture("hub"), Some(Split::Train), Columns::default(), Path::new("")).unwrap();
        check(&hub, "hub train");
        assert_eq!(hub.name(4), "train-00001-of-00002.parquet row 1");
        let (dataset, said) = prepare(&fixture("hub"), &["--split", "train"]);
        check_dataset(&dataset, "hub train");
        assert!(said.starts_with("Parquet: 6 images, 4 classes, from 2 files, "), "{said}");
        assert!(said.contains("images from column img, labels from column label"), "{said}");
        let text = prepare_fails(&fixture("hub"), &[]);
        assert!(text.contains("holds several splits: train (2 files), test (1 files)"), "{text}");
    }

    #[test]
    fn columns_are_chosen() {
        let two = fixture("two.parquet");
        let set = open(&two, None, Some("coarse")).unwrap();
        check(&*set, "two.parquet");
        assert_eq!([1, 2].map(|i| fault(&*set, i)), ["the row has no image (null)"; 2]);
        let fine = open(&two, Some("right"), Some("fine")).unwrap();
        assert_eq!(fault(&*fine, 2), "its label 9 is not one of the 4 classes");
        assert!(fine.read(1, &mut Vec::new()).is_ok());
        assert!(error(open(&two, None, None)).contains("has several columns of classes: fine, coarse"));
        let text = error(open(&two, Some("fine"), None));
        assert!(
            text.contains("no column of images (bytes) called fine; hint: its columns are left, right, fine"),
            "{text}"
        );
        assert!(error(open(&two, None, Some("left"))).contains("no column of whole numbers or texts called left"));
        let text = prepare_fails(&two, &["--label-column", "coarse", "--strict"]);
        assert!(text.contains("two.parquet row 1: the row has no image (null)"), "{text}");
    }

    #[test]
    fn cut_and_foreign_files_are_named() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("x.parquet");
        let whole = fs::read(fixture("snappy.parquet")).unwrap();
        for len in (0..whole.len()).step_by(37) {
            fs::write(&path, &whole[..len]).unwrap();
            let text = error(open(&path, None, None));
            assert!(text.starts_with(text_of(&path)) && text.contains("; hint: the file is"), "{len}: {text}");
        }
        fs::write(&path, [b"PARE", &whole[4..whole.len() - 4], b"PARE"].concat()).unwrap();
        assert!(error(open(&path, None, None)).contains("is encrypted"));
        let mut lying = whole.clone();
        let at = lying.len() - 8;
        lying[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        fs::write(&path, lying).unwrap();
        assert!(error(open(&path, None, None)).contains("metadata of 4294967295 bytes in a file of"));
        // Other classes in the second file.
        fs::copy(fixture("two.parquet"), place.path().join("y.parquet")).unwrap();
        fs::write(&path, &whole).unwrap();
        assert!(error(open(place.path(), None, None)).contains("lacks the column img of the files before"));
    }

    fn text_of(path: &Path) -> &str {
        path.to_str().unwrap()
    }

    /// Real photographs: CIFAR-10 as JPEG files, train.parquet and test.parquet in the folder that the variable names.
    #[test]
    fn real_photographs() {
        let Some(folder) = std::env::var_os("SIMSIAM_CIFAR10_JPEG").map(PathBuf::from).filter(|path| path.is_dir())
        else {
            eprintln!("skipped: SIMSIAM_CIFAR10_JPEG does not name a folder with train.parquet and test.parquet");
            return;
        };
        let (dataset, said) = prepare(&folder, &["--split", "test"]);
        assert!(said.starts_with("Parquet: 10000 images, 10 classes"), "{said}");
        let mut counts = [0; 10];
        for i in 0..dataset.len() {
            counts[dataset.label(i).unwrap().unwrap() as usize] += 1;
            let entry = dataset.entry(i).unwrap();
            assert_eq!((entry.original_width, entry.original_height), (32, 32));
        }
        assert_eq!((counts, dataset.classes()[0].as_str()), ([1000; 10], "airplane"));
    }
}
