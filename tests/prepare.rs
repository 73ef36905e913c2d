//! `prepare` and `inspect` from outside: sources, order, bad input, interruption.

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::scratch;
use flate2::Compression;
use flate2::write::GzEncoder;
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::decode::Decoder;
use simsiam_engine::data::format::crc32c;
use tempfile::TempDir;

struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_simsiam-engine")).args(args).current_dir(self.0.path()).output().unwrap()
    }

    /// Runs it and opens `out.ssds`.
    fn prepare(&self, args: &[&str]) -> Dataset {
        let output = self.run(&[&["prepare"], args].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        Dataset::open(&self.at("out.ssds")).unwrap()
    }

    /// Runs it, expects failure with `expected` in its one line of error, and that nothing is left behind.
    fn fails(&self, args: &[&str], expected: &str) {
        let output = self.run(&[&["prepare"], args].concat());
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(matches!(errors[..], [line] if line.contains(expected)), "expected {expected:?} in {text:?}");
        assert!(!text.contains("panicked"), "{text}");
        assert!(["out.ssds", "out.ssds.tmp", "out.ssds.journal"].iter().all(|name| !self.at(name).exists()));
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images").join(name)).unwrap()
}

/// The pixels of a record, found again by what the decoder makes of a fixture.
fn is_fixture(dataset: &Dataset, i: usize, name: &str) -> bool {
    let bytes = fixture(name);
    let mut decoder = Decoder::default();
    let image = decoder.decode(&bytes).unwrap();
    dataset.record(i, scratch()).unwrap().bytes == image.pixels
}

/// The order that torchvision's ImageFolder gives for this tree, found by running it: classes by code point ("Z" before
/// "a"), then folders by the text of their path ("x-y" before "x/y"), then files by name.
#[test]
fn a_folder_has_the_order_of_torchvision() {
    let place = Place::new();
    let files = [
        ("pics/Zebra/b.jpg", "444.jpg"),
        ("pics/ant/x/a.png", "rgb.png"),
        ("pics/ant/x-y/a.gif", "a.gif"),
        ("pics/ant/x/y/a.png", "alpha.png"),
        ("pics/ant/z.bmp", "a.bmp"),
        ("pics/ant/B.jpg", "420.jpg"),
        ("pics/éa/1.webp", "lossless.webp"),
    ];
    for (path, name) in files {
        place.write(path, &fixture(name));
    }
    // No images by name or content.
    place.write("pics/ant/notes.txt", b"not one of them");
    place.write("pics/ant/._B.jpg", b"\0\x05\x16\x07");
    place.write("pics/top.png", &fixture("rgb.png"));
    let dataset = place.prepare(&["pics", "out.ssds", "--store", "raw", "--no-shuffle"]);
    assert_eq!(dataset.classes(), ["Zebra", "ant", "éa"]);
    let expected = ["444.jpg", "420.jpg", "a.bmp", "rgb.png", "a.gif", "alpha.png", "lossless.webp"];
    let labels: Vec<_> = (0..dataset.len()).map(|i| dataset.label(i).unwrap()).collect();
    assert_eq!(labels, [0, 1, 1, 1, 1, 1, 2].map(Some));
    for (i, name) in expected.iter().enumerate() {
        assert!(is_fixture(&dataset, i, name), "record {i} is not {name}");
    }
    assert_eq!(dataset.shards()[0].header().stride, 0);
}

#[test]
fn names_are_not_trusted() {
    let place = Place::new();
    place.write("pics/a/really.jpg", &fixture("rgb.png"));
    place.write("pics/a/none", &fixture("420.jpg"));
    place.write("pics/a/odd.dat", &fixture("a.tiff"));
    let dataset = place.prepare(&["pics", "out.ssds", "--store", "raw", "--no-shuffle"]);
    assert_eq!(dataset.len(), 3);
    assert!(
        is_fixture(&dataset, 0, "420.jpg") && is_fixture(&dataset, 1, "a.tiff") && is_fixture(&dataset, 2, "rgb.png")
    );
}

#[test]
fn a_folder_without_classes_has_no_labels() {
    let place = Place::new();
    place.write("pics/1.png", &fixture("rgb.png"));
    place.write("pics/2.jpg", &fixture("420.jpg"));
    let dataset = place.prepare(&["pics", "out.ssds", "--store", "raw:8"]);
    assert_eq!((dataset.len(), dataset.classes().len()), (2, 0));
    let record = dataset.record(0, scratch()).unwrap();
    assert_eq!((record.width, record.height, record.label), (8, 8, None));
    // 53x38 and 41x29, in either order.
    let originals: Vec<_> = (0..2).map(|i| dataset.entry(i).unwrap().original_width).collect();
    assert!(originals == [53, 41] || originals == [41, 53]);
}

/// Every fixture a few times, in two classes.
fn tree(place: &Place, copies: usize) {
    let names = ["444.jpg", "420.jpg", "progressive.jpg", "rgb.png", "palette.png", "a.gif", "lossy.webp", "a.tiff"];
    for copy in 0..copies {
        for (i, name) in names.iter().enumerate() {
            place.write(&format!("pics/class{}/{copy:03}-{name}", i % 2), &fixture(name));
        }
    }
}

#[test]
fn threads_do_not_change_the_file_but_the_seed_does() {
    let place = Place::new();
    tree(&place, 20);
    place.write("pics/class0/bad.jpg", b"\xff\xd8\xff\xe0 nothing");
    let bytes = |args: &[&str]| {
        place.prepare(&[&["pics", "out.ssds", "--store", "raw:20", "--force"], args].concat());
        fs::read(place.at("out.ssds")).unwrap()
    };
    let one = bytes(&["--threads", "1"]);
    assert_eq!(one, bytes(&["--threads", "2"]));
    assert_eq!(one, bytes(&["--threads", "13"]));
    assert_ne!(one, bytes(&["--seed", "1"]));
    let dataset = place.prepare(&["pics", "out.ssds", "--store", "raw:20", "--force"]);
    assert_eq!(dataset.len(), 160);
    let changes = (1..dataset.len()).filter(|&i| dataset.label(i).unwrap() != dataset.label(i - 1).unwrap()).count();
    assert!((50..110).contains(&changes), "{changes} changes of class: not shuffled");
    // The rejected file does not move with the order.
    assert_eq!(dataset.shards()[0].meta().rejected[0].path, "class0/bad.jpg");
    let some = place.prepare(&["pics", "out.ssds", "--store", "raw:20", "--force", "--limit", "7"]);
    assert_eq!(some.len(), 7);
    assert!((0..7).all(|i| some.record(i, scratch()).unwrap() == dataset.record(i, scratch()).unwrap()));
}

#[test]
fn bad_images_are_listed_or_stop_it() {
    let place = Place::new();
    tree(&place, 2);
    let cut = fixture("420.jpg");
    place.write("pics/class1/cut.jpg", &cut[..cut.len() * 2 / 3]);
    place.write("pics/class1/empty.png", b"");
    let png = fixture("rgb.png");
    place.write("pics/class0/flipped.png", &[&png[..300], &[!png[300]], &png[301..]].concat());
    place.fails(&["pics", "out.ssds"], "3 of 19 images cannot be used, more than the 1 % allowed");
    place.fails(&["pics", "out.ssds", "--max-bad", "15"], "hint: --max-bad PERCENT allows more");
    place.fails(&["pics", "out.ssds", "--strict", "--no-shuffle"], "class0/flipped.png: PNG: ");
    let output = place.run(&["prepare", "pics", "out.ssds", "--max-bad", "20"]);
    assert!(output.status.success());
    let text = stdout(&output);
    for line in ["class1/cut.jpg: JPEG: the file is truncated", "class1/empty.png: the file is empty", "3 of 19 images"]
    {
        assert!(text.contains(line), "{text}");
    }
    let dataset = Dataset::open(&place.at("out.ssds")).unwrap();
    let rejected: Vec<&str> = dataset.shards()[0].meta().rejected.iter().map(|r| r.path.as_str()).collect();
    assert_eq!((dataset.len(), rejected), (16, vec!["class0/flipped.png", "class1/cut.jpg", "class1/empty.png"]));
    let text = stdout(&place.run(&["inspect", "out.ssds"]));
    assert!(text.contains("rejected    3\n  class0/flipped.png: PNG: "), "{text}");
}

/// A few hundred bytes that unfold into gigapixels.
#[test]
fn a_decompression_bomb_is_refused() {
    let place = Place::new();
    let mut png = fixture("rgb.png");
    png[16..20].copy_from_slice(&60_000u32.to_be_bytes());
    png[20..24].copy_from_slice(&60_000u32.to_be_bytes());
    let crc = crc_ieee(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    place.write("pics/a/bomb.png", &png);
    place.fails(&["pics", "out.ssds", "--strict"], "60000x60000 pixels: more than 100 million");
    let mut jpeg = fixture("420.jpg");
    let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xea, 0x60, 0xea, 0x60]);
    place.write("pics/a/bomb.jpg", &jpeg);
    place.fails(&["pics", "out.ssds", "--strict", "--no-shuffle"], "bomb.jpg: 60000x60000 pixels");
}

fn crc_ieee(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

#[test]
fn unusable_folders_and_outputs_are_named() {
    let place = Place::new();
    fs::create_dir(place.at("empty")).unwrap();
    place.fails(&["empty", "out.ssds"], "empty: no image files in this folder");
    place.fails(&["nowhere", "out.ssds"], "cannot open nowhere: No such file");
    tree(&place, 1);
    place.fails(&["pics", "no/such/out.ssds"], "no/such/out.ssds: there is no folder no/such");
    place.fails(&["pics", "empty"], "empty: is a folder; the output is one file");
    place.fails(&["pics", "out.ssds", "--limit", "0"], "--limit: must be at least 1");
    place.fails(&["pics", "out.ssds", "--max-bad", "101"], "--max-bad: 101 is not a percentage");
    // Before the work, not after it.
    place.fails(&["pics", "out.ssds", "--report", "no/such/bad.tsv"], "no/such/bad.tsv: there is no folder no/such");
    for sizes in [["--shard-size", "huge"], ["--shard-size", "0"], ["--segment", "0B"]] {
        let text = stderr(&place.run(&[&["prepare", "pics", "out.ssds"][..], &sizes].concat()));
        assert!(text.contains("expected a size above 0, as 4GB or 512MiB"), "{text}");
    }
    place.fails(
        &["pics", "out.ssds", "--split", "train"],
        "pics has no train split; hint: expected a folder train in it",
    );
    std::os::unix::fs::symlink("..", place.at("pics/class0/up")).unwrap();
    place.fails(&["pics", "out.ssds"], "links back to a folder it lies in");
}

// ---- IDX

const LABELS: [u8; 5] = [3, 0, 2, 2, 1];

fn idx_images() -> Vec<u8> {
    let header = [0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 3];
    let pixels = (0..60u8).map(|p| p.wrapping_mul(37));
    header.into_iter().chain(pixels).collect()
}

fn idx_labels() -> Vec<u8> {
    [&[0, 0, 8, 1, 0, 0, 0, 5][..], &LABELS].concat()
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn idx_files_come_through() {
    let place = Place::new();
    place.write("set/train-images-idx3-ubyte.gz", &gz(&idx_images()));
    place.write("set/train-labels-idx1-ubyte", &idx_labels());
    let check = |dataset: &Dataset| {
        assert_eq!(dataset.classes(), ["0", "1", "2", "3"]);
        for (i, &label) in LABELS.iter().enumerate() {
            let record = dataset.record(i, scratch()).unwrap();
            assert_eq!((record.width, record.height, record.channels), (3, 4, 1));
            assert_eq!(record.label, Some(label.into()));
            assert_eq!(record.bytes, &idx_images()[16 + 12 * i..][..12]);
        }
    };
    check(&place.prepare(&["set", "out.ssds", "--no-shuffle"]));
    check(&place.prepare(&["set", "out.ssds", "--no-shuffle", "--force", "--split", "train"]));
    check(&place.prepare(&["set/train-images-idx3-ubyte.gz", "out.ssds", "--no-shuffle", "--force"]));
    let images = place.write("oddly named", &idx_images());
    let unlabelled = place.prepare(&["oddly named", "out.ssds", "--force"]);
    assert_eq!((unlabelled.len(), unlabelled.label(0).unwrap()), (5, None));
    let labels = place.at("set/train-labels-idx1-ubyte");
    let args = [images.to_str().unwrap(), "out.ssds", "--force", "--no-shuffle", "--labels", labels.to_str().unwrap()];
    check(&place.prepare(&args));
    let square = place.prepare(&["set", "out.ssds", "--force", "--store", "raw:7"]);
    let record = square.record(4, scratch()).unwrap();
    assert_eq!((record.width, record.height, record.original_width, record.original_height), (7, 7, 3, 4));
    // A second set makes it unclear which is meant.
    fs::remove_file(place.at("out.ssds")).unwrap();
    place.write("set/t10k-images-idx3-ubyte", &idx_images());
    place.fails(&["set", "out.ssds"], "several sets of images: t10k-images-idx3-ubyte, train-images-idx3-ubyte.gz");
    place.prepare(&["set", "out.ssds", "--split", "test"]);
}

#[test]
fn broken_idx_files_are_named_with_the_place() {
    let place = Place::new();
    let good = idx_images();
    let try_images = |bytes: &[u8], expected: &str| {
        place.write("images", bytes);
        place.fails(&["images", "out.ssds", "--source", "idx"], &format!("images{expected}"));
    };
    try_images(b"", ", byte 0: ends 16 bytes early");
    try_images(&good[..9], ", byte 9: ends 7 bytes early");
    try_images(&good[..40], ", byte 4: its header promises [5, 4, 3] bytes, more than the file can hold");
    try_images(&good[..70], ", byte 70: ends 6 bytes early");
    try_images(&[&good[..], b"!"].concat(), ", byte 76: goes on behind the data");
    try_images(&idx_labels(), ", byte 13: ends 3 bytes early");
    try_images(&[&idx_labels()[..], &[0; 9]].concat(), ", byte 0: not an IDX file of 3 dimensions");
    try_images(b"this is not an IDX file at all", ", byte 0: not an IDX file of 3 dimensions");
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    try_images(&with(4, 255), ", byte 4: its header promises [4278190085, 4, 3] bytes");
    try_images(&with(7, 0), ", byte 16: goes on behind");
    try_images(&[&good[..4], &[255; 12]].concat(), ", byte 4: its header promises");
    try_images(&[&good[..4], &[0; 12]].concat(), ": images of 0x0 pixels: the width must be 1 to 65535");
    let packed = gz(&good);
    for cut in 2..packed.len() {
        try_images(&packed[..cut], ", byte ");
    }
    try_images(&packed[..packed.len() - 1], ", byte 76: cannot be read or unpacked from here");
    let flipped: Vec<u8> =
        packed.iter().enumerate().map(|(i, b)| if i == packed.len() - 6 { !b } else { *b }).collect();
    try_images(&flipped, ", byte 76: cannot be read or unpacked from here");
    let bomb = gz(&[&[0, 0, 8, 3, 0, 255, 255, 255, 0, 0, 4, 0, 0, 0, 4, 0][..], &[0; 5000]].concat());
    try_images(&bomb, ", byte 4: its header promises");
    place.write("images", &good);
    let try_labels = |bytes: &[u8], expected: &str| {
        place.write("labels", bytes);
        place.fails(&["images", "out.ssds", "--labels", "labels"], &format!("labels{expected}"));
    };
    try_labels(&idx_labels()[..11], ", byte 11: ends 2 bytes early");
    try_labels(&[0, 0, 8, 1, 0, 0, 0, 2, 1, 1], ", byte 4: 2 labels for the 5 images of images");
    try_labels(&good, ", byte 0: not an IDX file of 1 dimensions");
    place.fails(&["images", "out.ssds", "--labels", "nowhere"], "cannot open nowhere");
}

// ---- inspect

#[test]
fn inspect_shows_verifies_and_draws() {
    let place = Place::new();
    tree(&place, 3);
    place.prepare(&["pics", "out.ssds", "--store", "raw:16"]);
    let output = place.run(&["inspect", "out.ssds", "--verify", "--contact-sheet", "sheet.png"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("all 24 records are whole"));
    let text = stdout(&output);
    for line in [
        "records     24, stride 768",
        "shuffled with seed 0",
        "24 of 16x16x3",
        "15 of 41x29, 9 of 53x38",
        "class1        12 ####",
    ] {
        assert!(text.contains(line), "{line:?} in {text}");
    }
    let sheet = image::open(place.at("sheet.png")).unwrap().to_rgb8();
    assert_eq!(sheet.dimensions(), (8 * 116 + 4, 3 * 116 + 4));
    // The middle of the second tile is a pixel of the second record.
    let dataset = Dataset::open(&place.at("out.ssds")).unwrap();
    let at = (8 * 16 + 8) * 3;
    assert_eq!(sheet.get_pixel(120 + 60, 4 + 60).0, dataset.record(1, scratch()).unwrap().bytes[at..at + 3]);
    let json: serde_json::Value =
        serde_json::from_slice(&place.run(&["inspect", "out.ssds", "--json"]).stdout).unwrap();
    assert_eq!((json["records"].as_u64(), json["classes"][1]["name"].as_str()), (Some(24), Some("class1")));
}

#[test]
fn verify_names_every_damaged_record() {
    let place = Place::new();
    tree(&place, 3);
    let dataset = place.prepare(&["pics", "out.ssds", "--store", "raw:16"]);
    let mut bytes = fs::read(place.at("out.ssds")).unwrap();
    for i in [4, 17] {
        bytes[dataset.entry(i).unwrap().offset as usize + 5] ^= 1;
    }
    place.write("damaged.ssds", &bytes);
    assert!(place.run(&["inspect", "damaged.ssds"]).status.success());
    let output = place.run(&["inspect", "damaged.ssds", "--verify"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1));
    let crc = crc32c(dataset.record(4, scratch()).unwrap().bytes);
    assert!(
        text.contains(&format!("byte {}: record 4: checksum mismatch: stored {crc:08x}", 4096 + 4 * 768)),
        "{text}"
    );
    assert!(text.contains("record 17: checksum mismatch"), "{text}");
    assert!(text.ends_with("error: damaged.ssds: 2 of 24 records are damaged\n"), "{text}");
}
