//! Sources from the command line: what is recognised, chosen and refused.

use std::fs;

use super::common::{scratch, succeed};
use super::{check_dataset, digest, expected, fixture, gzip, png, prepare, prepare_fails, text};

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

#[cfg(not(feature = "parquet"))]
#[test]
fn a_build_without_parquet_says_so() {
    let text = prepare_fails(&fixture("zstd.parquet"), &[]);
    assert!(text.contains("this build cannot read Parquet; hint: build with the feature parquet"), "{text}");
}
