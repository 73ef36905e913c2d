//! Sources that change or vanish while they are read, or between two jobs.

use std::fs;

use simsiam_engine::data::import::Source;
use simsiam_engine::data::import::folder::Folder;
use simsiam_engine::data::import::idx::Idx;
use simsiam_engine::data::import::select::Subset;
use simsiam_engine::data::import::source::Fault;
use simsiam_engine::data::import::webdataset::{Fields, WebDataset};

use super::{digest_of, expected, fault, fixture, png, webdataset};

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
