//! The augmentation against torchvision and PIL: pixels of whole views, and the distribution of the drawn parameters.
//! The truth is made by tools/augment_parity.py.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use simsiam_engine::data::augment::{AugmentConfig, Augmenter, BlurKernel, Image, JitterOp, ViewParams};

/// The committed views, or those of a larger check.
fn folder() -> PathBuf {
    let committed = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/augment");
    std::env::var_os("AUGMENT_VIEWS").map_or_else(committed, PathBuf::from)
}

#[derive(Deserialize)]
struct Views {
    seed: u64,
    epoch: u32,
    views: Vec<View>,
}

#[derive(Deserialize)]
struct View {
    photo: String,
    preset: String,
    size: usize,
    stride: usize,
    sample: u64,
    view: u32,
    /// `None` for the view for evaluation.
    params: Option<Params>,
}

#[derive(Deserialize)]
struct Params {
    top: u32,
    left: u32,
    height: u32,
    width: u32,
    jitter: bool,
    order: [usize; 4],
    brightness: f32,
    contrast: f32,
    saturation: f32,
    hue: f32,
    grayscale: bool,
    blur: bool,
    sigma: f32,
    flip: bool,
}

impl View {
    fn config(&self) -> AugmentConfig {
        let preset = match self.preset.as_str() {
            "imagenet" => AugmentConfig::imagenet(),
            "cifar" => AugmentConfig::cifar(),
            "blur" => AugmentConfig {
                jitter_probability: 0.0,
                grayscale_probability: 0.0,
                blur_probability: 1.0,
                ..AugmentConfig::imagenet()
            },
            other => panic!("unknown preset {other}"),
        };
        AugmentConfig { image_size: self.size, ..preset }
    }
}

fn read_views() -> Views {
    serde_json::from_slice(&std::fs::read(folder().join("views.json")).unwrap()).unwrap()
}

fn place_of(op: JitterOp) -> usize {
    [JitterOp::Brightness, JitterOp::Contrast, JitterOp::Saturation, JitterOp::Hue]
        .iter()
        .position(|&o| o == op)
        .unwrap()
}

#[test]
fn views_have_the_parameters_of_the_stated_scheme() {
    let Views { seed, epoch, views } = read_views();
    let mut seen = 0;
    for view in &views {
        let Some(expected) = &view.params else { continue };
        let photo = image::open(folder().join(&view.photo)).unwrap();
        let (width, height) = (photo.width(), photo.height());
        let got = ViewParams::draw(&view.config(), seed, epoch, view.sample, view.view, width, height);
        let crop = (got.crop.top, got.crop.left, got.crop.height, got.crop.width);
        assert_eq!(crop, (expected.top, expected.left, expected.height, expected.width));
        assert_eq!(got.grayscale, expected.grayscale);
        assert_eq!(got.flip, expected.flip);
        assert_eq!(got.blur_sigma.is_some(), expected.blur);
        assert!(got.blur_sigma.is_none_or(|sigma| near(sigma, expected.sigma)));
        assert_eq!(got.jitter.is_some(), expected.jitter);
        if let Some(jitter) = got.jitter {
            assert_eq!(jitter.order.map(place_of), expected.order);
            assert!(near(jitter.brightness, expected.brightness) && near(jitter.contrast, expected.contrast));
            assert!(near(jitter.saturation, expected.saturation) && near(jitter.hue, expected.hue));
        }
        seen += 1;
    }
    assert!(seen >= 20, "only {seen} views");
}

fn near(a: f32, b: f32) -> bool {
    (a - b).abs() < 1e-6
}

/// Mean absolute differences, in levels of 255, summed up over views.
#[derive(Default)]
struct Differences {
    views: f64,
    ours_to_float: f64,
    ours_to_pil: f64,
    float_to_pil: f64,
}

/// Takes what the file holds of a view from the front of `data`.
fn stored(data: &mut &[u8], view: &View) -> (Vec<f64>, Vec<f64>) {
    let values = view.size.div_ceil(view.stride).pow(2) * 3;
    let (float, rest) = data.split_at(2 * values);
    let float = float.as_chunks().0.iter().map(|&pair| f64::from(u16::from_le_bytes(pair)) / 256.0).collect();
    let (pil, rest) = rest.split_at(if view.params.is_some() { values } else { 0 });
    *data = rest;
    (float, pil.iter().copied().map(f64::from).collect())
}

/// The stored places of a normalised view, as levels.
fn levels(out: &[f32], view: &View) -> Vec<f64> {
    let AugmentConfig { mean, std, .. } = view.config();
    let places = || (0..view.size).step_by(view.stride);
    let pixels = places().flat_map(|y| places().map(move |x| 3 * (y * view.size + x)));
    pixels
        .flat_map(|at| (0..3).map(move |channel| (at, channel)))
        .map(|(at, channel)| f64::from(out[at + channel] * std[channel] + mean[channel]) * 255.0)
        .collect()
}

fn mean_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
}

/// The levels that the engine makes of a view, at the stored places.
fn make(view: &View, seed: u64, epoch: u32, blur_kernel: BlurKernel) -> Vec<f64> {
    let photo = image::open(folder().join(&view.photo)).unwrap().to_rgb8();
    let (width, height) = photo.dimensions();
    let image = Image::new(photo.as_raw(), width as usize, height as usize, 3).unwrap();
    let config = AugmentConfig { blur_kernel, ..view.config() };
    let mut out = vec![f32::NAN; config.view_len()];
    let mut augmenter = Augmenter::new(&config).unwrap();
    if view.params.is_some() {
        let params = ViewParams::draw(&config, seed, epoch, view.sample, view.view, width, height);
        augmenter.view(&image, &params, &mut out);
    } else {
        augmenter.resize_center(&image, None, &mut out);
    }
    levels(&out, view)
}

/// Every view with `blur_kernel` against both chains: the differences by preset and size.
fn compare(blur_kernel: BlurKernel, mut check: impl FnMut(&View, f64)) -> BTreeMap<(String, usize), Differences> {
    let Views { seed, epoch, views } = read_views();
    let file = std::fs::read(folder().join("views.bin")).unwrap();
    let mut data = file.as_slice();
    let mut all: BTreeMap<_, Differences> = BTreeMap::new();
    for view in &views {
        let (float, pil) = stored(&mut data, view);
        let ours = make(view, seed, epoch, blur_kernel);
        let to_float = mean_difference(&ours, &float);
        check(view, to_float);
        if view.params.is_some() {
            let sums = all.entry((view.preset.clone(), view.size)).or_default();
            sums.views += 1.0;
            sums.ours_to_float += to_float;
            sums.ours_to_pil += mean_difference(&ours, &pil);
            sums.float_to_pil += mean_difference(&float, &pil);
        }
    }
    assert!(data.is_empty(), "{} bytes of views.bin are left over", data.len());
    all
}

#[test]
fn views_with_torchvisions_blur_are_its_float_tensor_chains() {
    let all = compare(BlurKernel::Gaussian, |view, difference| {
        // What remains is rounding and 0.299 against torchvision's 0.2989 in the luma.
        let limit = if view.params.is_some() { 0.05 } else { 0.005 };
        let View { photo, sample, size, .. } = view;
        assert!(difference < limit, "{difference} levels: sample {sample} of {photo}, {size} pixels");
    });
    for ((preset, size), sums) in all {
        println!("{preset} {size}: {:.4} of 255 levels from the float chain", sums.ours_to_float / sums.views);
    }
}

#[test]
fn views_with_pils_blur_are_nearer_to_the_official_chain() {
    for ((preset, size), sums) in compare(BlurKernel::Pil, |_, _| {}) {
        let mean = |sum| sum / sums.views;
        let [to_float, to_pil, float_to_pil] = [sums.ours_to_float, sums.ours_to_pil, sums.float_to_pil].map(mean);
        println!(
            "{preset} {size}: {} views, from the float chain {to_float:.3}, from PIL {to_pil:.3}, float chain from PIL \
             {float_to_pil:.3} of 255 levels",
            sums.views
        );
        // The float chain's blur differs from PIL's, the more the smaller the sigma.
        assert!(preset != "imagenet" || to_float < 0.25, "{to_float} from the float chain");
        assert!(to_pil <= float_to_pil + 0.01, "{preset} {size}: {to_pil} from PIL, the float chain {float_to_pil}");
        // Crop and blur alone: PIL rounds to bytes after every pass.
        assert!(preset != "blur" || to_pil < 0.6, "{preset} {size}: {to_pil} from PIL");
    }
}

/// For each quantity the share of draws up to each of some thresholds.
type Distributions = BTreeMap<String, Vec<(f64, f64)>>;

#[derive(Deserialize)]
struct Draws {
    draws: u64,
    crops: Vec<Crops>,
    jitter: Distributions,
}

#[derive(Deserialize)]
struct Crops {
    width: u32,
    height: u32,
    stats: Distributions,
}

/// Kolmogorov-Smirnov: two samples of 40,000 of one distribution differ by more than this once in 10,000 times.
const KS_LIMIT: f64 = 0.0158;

fn assert_same_distribution(what: &str, expected: &[(f64, f64)], mut got: Vec<f64>) {
    got.sort_by(f64::total_cmp);
    assert!(expected.len() > 1, "{what}: the truth has one value only");
    for &(threshold, share) in expected {
        // A hair above the threshold: sums of the same numbers may differ in the last bit.
        let below = got.partition_point(|&x| x <= threshold + 1e-7) as f64 / got.len() as f64;
        assert!((below - share).abs() < KS_LIMIT, "{what}: {below} of draws up to {threshold}, torchvision {share}");
    }
}

fn read_draws() -> Draws {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/augment/draws.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn crops_are_distributed_as_torchvisions() {
    let truth = read_draws();
    for Crops { width, height, stats } in &truth.crops {
        let crops: Vec<_> = (0..truth.draws)
            .map(|sample| ViewParams::draw(&AugmentConfig::imagenet(), 11, 0, sample, 0, *width, *height).crop)
            .collect();
        for (name, expected) in stats {
            let got = crops.iter().map(|crop| {
                let [top, left, h, w] = [crop.top, crop.left, crop.height, crop.width].map(f64::from);
                match name.as_str() {
                    "top" => top,
                    "left" => left,
                    "height" => h,
                    "width" => w,
                    "bottom" => top + h,
                    "right" => left + w,
                    "area" => w * h,
                    "ratio" => w / h,
                    other => panic!("unknown quantity {other}"),
                }
            });
            let what = format!("{name} in {width}x{height}");
            match expected.as_slice() {
                [(only, _)] => assert!(got.clone().all(|x| x == *only), "{what}: not always {only}"),
                _ => assert_same_distribution(&what, expected, got.collect()),
            }
        }
    }
}

#[test]
fn jitter_is_distributed_as_torchvisions() {
    let truth = read_draws();
    let config = AugmentConfig { jitter_probability: 1.0, ..AugmentConfig::imagenet() };
    let jitters: Vec<_> =
        (0..truth.draws).map(|sample| ViewParams::draw(&config, 12, 3, sample, 1, 256, 256).jitter.unwrap()).collect();
    for (name, expected) in &truth.jitter {
        let got = jitters.iter().map(|jitter| match name.as_str() {
            "brightness" => f64::from(jitter.brightness),
            "contrast" => f64::from(jitter.contrast),
            "saturation" => f64::from(jitter.saturation),
            "hue" => f64::from(jitter.hue),
            "product" => f64::from(jitter.brightness) * f64::from(jitter.contrast) * f64::from(jitter.saturation),
            "order" => jitter.order.iter().fold(0.0, |code, &op| 4.0 * code + place_of(op) as f64),
            other => panic!("unknown quantity {other}"),
        });
        assert_same_distribution(name, expected, got.collect());
    }
}

#[test]
fn operations_come_as_often_as_the_recipe_says() {
    const DRAWS: u64 = 40_000;
    let config = AugmentConfig::imagenet();
    let views: Vec<_> = (0..DRAWS).map(|sample| ViewParams::draw(&config, 13, 1, sample, 0, 256, 256)).collect();
    let share = |what: fn(&ViewParams) -> bool| views.iter().filter(|view| what(view)).count() as f64 / DRAWS as f64;
    let cases = [
        (share(|view| view.jitter.is_some()), 0.8),
        (share(|view| view.grayscale), 0.2),
        (share(|view| view.blur_sigma.is_some()), 0.5),
        (share(|view| view.flip), 0.5),
        (share(|view| view.flip && view.blur_sigma.is_some() && view.jitter.is_some()), 0.2),
        (share(|view| view.blur_sigma.is_some_and(|sigma| sigma < 1.05)), 0.25),
    ];
    for (got, expected) in cases {
        assert!((got - expected).abs() < 0.01, "{got} instead of {expected}");
    }
}

#[test]
fn the_two_views_of_an_image_are_independent() {
    const DRAWS: u64 = 20_000;
    let config = AugmentConfig::imagenet();
    let draw = |sample, view| ViewParams::draw(&config, 14, 0, sample, view, 500, 400);
    let same_flip = (0..DRAWS).filter(|&sample| draw(sample, 0).flip == draw(sample, 1).flip).count();
    assert!((same_flip as f64 / DRAWS as f64 - 0.5).abs() < 0.015, "{same_flip}");
    let pairs: Vec<_> = (0..DRAWS).map(|s| (draw(s, 0).crop, draw(s, 1).crop)).collect();
    let correlation = correlation(pairs.iter().map(|(a, b)| (f64::from(a.width), f64::from(b.width))));
    assert!(correlation.abs() < 0.03, "{correlation}");
}

fn correlation(pairs: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let n = pairs.clone().count() as f64;
    let (mean_a, mean_b) = (pairs.clone().map(|p| p.0).sum::<f64>() / n, pairs.clone().map(|p| p.1).sum::<f64>() / n);
    let moment = |f: fn(f64, f64) -> f64| pairs.clone().map(|(a, b)| f(a - mean_a, b - mean_b)).sum::<f64>();
    moment(|a, b| a * b) / (moment(|a, _| a * a) * moment(|_, b| b * b)).sqrt()
}

/// A dataset of five images, two of them grey, as the command line makes it.
fn prepare(folder: &Path) -> PathBuf {
    let images = folder.join("images");
    std::fs::create_dir(&images).unwrap();
    for i in 0..5u8 {
        let pixel = |x: u32, y: u32| (x * 3 + y * u32::from(i)) as u8;
        let path = images.join(format!("{i}.png"));
        if i < 2 {
            image::GrayImage::from_fn(40, 30, |x, y| image::Luma([pixel(x, y)])).save(path).unwrap();
        } else {
            image::RgbImage::from_fn(30, 60, |x, y| image::Rgb([pixel(x, y), x as u8, 200])).save(path).unwrap();
        }
    }
    let out = folder.join("five.ssds");
    let (ok, message) = engine(&["prepare", images.to_str().unwrap(), out.to_str().unwrap(), "--store", "raw:32"]);
    assert!(ok, "{message}");
    out
}

/// Runs the program: whether it succeeded, and what it said.
fn engine(arguments: &[&str]) -> (bool, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_simsiam-engine")).args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn augment_preview_draws_a_row_for_each_image() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = prepare(folder.path());
    let preview = |name: &str, options: &[&str]| {
        let out = folder.path().join(name);
        let arguments = ["augment-preview", dataset.to_str().unwrap(), out.to_str().unwrap()];
        let (ok, message) = engine(&[&arguments, options].concat());
        assert!(ok, "{message}");
        image::open(out).unwrap().to_rgb8()
    };
    let three = preview("a.png", &["--count", "3", "--preset", "cifar"]);
    assert_eq!(three.dimensions(), (3 * 132 + 4, 3 * 132 + 4));
    // No more rows than images.
    assert_eq!(preview("b.png", &["--preset", "cifar"]).dimensions(), (3 * 132 + 4, 5 * 132 + 4));
    assert_eq!(preview("c.png", &["--count", "3", "--preset", "cifar"]), three, "not repeatable");
    assert_ne!(preview("d.png", &["--count", "3", "--preset", "cifar", "--epoch", "1"]), three);
    assert_ne!(preview("e.png", &["--count", "3", "--preset", "cifar", "--seed", "1"]), three);
}

#[test]
fn augment_preview_names_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = prepare(folder.path());
    let out = folder.path().join("preview.png");
    for (options, expected) in [
        (["--hue", "0.7"], "error: --hue: expected a number from 0 to 0.5, got 0.7"),
        (["--crop-scale", "0.2"], "expected 2 numbers with commas between them"),
        (["--count", "0"], "--count"),
    ] {
        let arguments = ["augment-preview", dataset.to_str().unwrap(), out.to_str().unwrap(), options[0], options[1]];
        let (ok, message) = engine(&arguments);
        assert!(!ok && message.contains(expected) && !message.contains("panicked"), "{message}");
        assert!(!out.exists());
    }
}
