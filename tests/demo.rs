//! `demo`: a short one leaves all its files and tells figures that agree with them; it never writes over an earlier one.

mod common;

use std::path::Path;

use simsiam_engine::train::config::RunConfig;
use simsiam_engine::train::metrics;

/// The figure in the only line of `text` that starts with `name`, in per cent, after `from`.
fn figure(text: &str, from: &str, name: &str) -> f64 {
    let text = &text[text.find(from).unwrap_or_else(|| panic!("no {from:?} in {text}"))..];
    let line = text.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
    line.trim_start()[name.len()..].split_whitespace().next().unwrap().parse().unwrap()
}

fn assert_is_file(path: &Path) {
    assert!(path.is_file(), "{} is missing", path.display());
}

#[test]
fn a_short_demo_learns_and_leaves_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("demo");
    let text = common::succeed(&["demo", "--epochs", "1", "--out", out.to_str().unwrap()]);

    let config = RunConfig::read(&out.join("run")).unwrap();
    assert_eq!((config.recipe.epochs, config.model.stop_gradient), (1, true));
    assert!(config.data.is_absolute(), "{}", config.data.display());
    let lines = metrics::read(&out.join("run/metrics.jsonl")).unwrap();
    let last = lines.last().unwrap();
    assert_eq!(last.step, 6_000 / config.recipe.batch as u64 - 1);
    for file in ["fashion-train.ssds", "fashion-test.ssds", "chart.png", "backbone.safetensors"] {
        assert_is_file(&out.join(file));
        assert!(!file.ends_with(".png") || image::open(out.join(file)).is_ok());
    }

    let (start, end) = ("before training", "kNN accuracy on the test images");
    let trained = figure(&text, end, "after SimSiam");
    let untrained = figure(&text, end, "untrained network");
    assert_eq!(trained, (last.knn.unwrap() * 1000.0).round() / 10.0);
    assert_eq!(untrained, figure(&text, start, "untrained network"));
    // Cosine kNN (k = 20, T = 0.1) on these pixels, by scikit-learn's neighbours: 79.8 %; ties may turn an image or two.
    assert!((figure(&text, start, "raw pixels") - 79.8).abs() < 0.31, "{text}");
    assert!(trained > untrained + 2.0, "trained {trained} %, untrained {untrained} %");
    assert!(last.z_std > 0.9 && last.effective_rank.unwrap() > 25.0, "{last:?}");
    assert!(text.contains("simsiam-engine prepare PHOTOS"), "{text}");

    let error = common::fail(&["demo", "--out", out.to_str().unwrap()]);
    assert!(error.contains("is not empty"), "{error}");
}
