//! The binary files of CIFAR and the IDX files of MNIST.

use std::fs;

use simsiam_engine::data::import::cifar::Cifar;
use simsiam_engine::data::import::detect::{Kind, detect};
use simsiam_engine::data::import::idx::Idx;
use simsiam_engine::data::import::select::Split;

use super::{boxed, check, error, fixture};

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
