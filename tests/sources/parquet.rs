//! Parquet files of pyarrow.

use std::fs;
use std::path::{Path, PathBuf};

use simsiam_engine::data::import::Source;
use simsiam_engine::data::import::parquet::{Columns, Parquet};
use simsiam_engine::data::import::select::Split;

use super::{Opened, boxed, check, check_dataset, error, fault, fixture, prepare, prepare_fails, text as text_of};

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

/// Real photographs: CIFAR-10 as JPEG files, train.parquet and test.parquet in the folder that the variable names.
#[test]
fn real_photographs() {
    let Some(folder) = std::env::var_os("SIMSIAM_CIFAR10_JPEG").map(PathBuf::from).filter(|path| path.is_dir()) else {
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
