//! Tar files: WebDataset's, Python's and broken ones.

use std::fs;
use std::path::{Path, PathBuf};

use simsiam_engine::data::import::Source;
use simsiam_engine::data::import::select::Split;
use simsiam_engine::data::import::source::Item;
use simsiam_engine::data::import::webdataset::{Fields, WebDataset};
use tempfile::TempDir;

use super::{check, digest_of, error, expected, fault, fixture, gzip, png, webdataset};

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
