//! Augmentation on an emulated CUDA device against the CPU: the same bits, whatever the image and whatever is drawn.
#![cfg(feature = "emulator")]
#![allow(unsafe_code)] // launches

use std::path::Path;

use half::{bf16, f16};
use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
use simsiam_engine::backend::cuda::{DevicePtr, Driver};
use simsiam_engine::data::augment::{
    AugmentConfig, Augmenter, BlurKernel, CropBox, Image, Jitter, JitterOp, ViewParams,
};
use simsiam_engine::data::loader::StoredImage;
use simsiam_engine::ops::augment::{Augmentation, Places, ViewDescriptor};
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::DType;

/// Bytes before and after the views that no kernel may touch.
const MARGIN: usize = 256;
const POISON: u8 = 0xa7;

/// Stored images one after the other, as a batch of the loader holds them.
#[derive(Default)]
struct Images {
    pixels: Vec<u8>,
    stored: Vec<StoredImage>,
}

impl Images {
    fn with(mut self, (width, height, channels): (usize, usize, usize), pixels: &[u8]) -> Images {
        let offset = self.pixels.len();
        self.pixels.extend_from_slice(pixels);
        let (original_width, original_height) = (width, height);
        self.stored.push(StoredImage { offset, width, height, channels, original_width, original_height });
        self
    }

    /// Bytes that jump from any pixel to the next.
    fn with_noise(self, size: (usize, usize, usize)) -> Images {
        let mut stream = Stream::new(11, 5, self.stored.len() as u64);
        let pixels: Vec<u8> = (0..size.0 * size.1 * size.2).map(|_| stream.word() as u8).collect();
        self.with(size, &pixels)
    }

    fn with_photo(self, number: usize) -> Images {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/augment/photo{number}.png"));
        let photo = image::open(path).unwrap().to_rgb8();
        self.with((photo.width() as usize, photo.height() as usize, 3), photo.as_raw())
    }

    /// Says that the last image is a resized version of one of this size.
    fn of_original(mut self, width: usize, height: usize) -> Images {
        let last = self.stored.last_mut().unwrap();
        (last.original_width, last.original_height) = (width, height);
        self
    }

    /// Two photos, a grey image, extreme shapes, a single pixel, and one that is stored stretched.
    fn mixed() -> Images {
        let images = Images::default().with_photo(0).with_noise((57, 43, 1)).with_noise((3, 500, 3)).with_photo(1);
        let images = images.with_noise((1, 1, 3)).with_noise((211, 2, 1)).with_noise((64, 48, 3));
        images.of_original(320, 120).with_noise((1, 1, 1)).with_noise((5, 7, 3))
    }

    fn len(&self) -> usize {
        self.stored.len()
    }

    fn longest_side(&self) -> usize {
        self.stored.iter().map(|image| image.width.max(image.height)).max().unwrap()
    }

    fn image(&self, index: usize) -> Image<'_> {
        let StoredImage { offset, width, height, channels, original_width, original_height } = self.stored[index];
        let pixels = &self.pixels[offset..offset + self.stored[index].len()];
        let image = Image::new(pixels, width, height, channels).unwrap();
        image.with_original_size(original_width as u32, original_height as u32).unwrap()
    }

    /// What `draw` gives for both views of each image.
    fn params(&self, mut draw: impl FnMut(usize, u32, &StoredImage) -> ViewParams) -> Vec<[ViewParams; 2]> {
        self.stored.iter().enumerate().map(|(i, image)| [draw(i, 0, image), draw(i, 1, image)]).collect()
    }

    fn draw(&self, config: &AugmentConfig, epoch: u32) -> Vec<[ViewParams; 2]> {
        self.params(|i, view, image| {
            let (width, height) = (image.original_width as u32, image.original_height as u32);
            ViewParams::draw(config, 6, epoch, i as u64, view, width, height)
        })
    }

    /// The views of the CPU, all first ones before all second ones.
    fn views(&self, config: &AugmentConfig, params: &[[ViewParams; 2]]) -> Vec<f32> {
        let mut augmenter = Augmenter::new(config).unwrap();
        let mut all = vec![f32::NAN; 2 * self.len() * config.view_len()];
        for (i, out) in all.chunks_exact_mut(config.view_len()).enumerate() {
            let (view, image) = (i / self.len(), i % self.len());
            augmenter.view(&self.image(image), &params[image][view], out);
        }
        all
    }
}

fn emulator() -> Emulator {
    Emulator::new(Options { threads: 2, seed: 3 }).unwrap()
}

/// Memory of `bytes` poisoned bytes.
fn poisoned(driver: &dyn Driver, bytes: usize) -> DevicePtr {
    let memory = driver.allocate(bytes).unwrap();
    driver.upload(memory, &vec![POISON; bytes]).unwrap();
    memory
}

/// Makes the described views on the device. Returns their bytes.
fn run(driver: &dyn Driver, augmentation: &Augmentation, images: &Images, descriptors: &[ViewDescriptor]) -> Vec<u8> {
    let views = descriptors.len();
    let out_bytes = augmentation.output(views).bytes();
    let out = poisoned(driver, out_bytes + 2 * MARGIN);
    let places = Places {
        pixels: poisoned(driver, Augmentation::pixel_memory(images.pixels.len())),
        descriptors: driver.allocate(size_of_val(descriptors)).unwrap(),
        workspace: poisoned(driver, augmentation.workspace(views)),
        views: out.offset(MARGIN),
    };
    driver.upload(places.pixels, &images.pixels).unwrap();
    driver.upload(places.descriptors, bytemuck::cast_slice(descriptors)).unwrap();
    // SAFETY: all memory was allocated above as large as it must be, and the descriptors are those of these images.
    unsafe { augmentation.launch(driver, views, &places).unwrap() };
    let mut all = vec![0; out_bytes + 2 * MARGIN];
    driver.download(out, &mut all).unwrap();
    for memory in [out, places.pixels, places.descriptors, places.workspace] {
        driver.free(memory).unwrap();
    }
    let (before, rest) = all.split_at(MARGIN);
    let (views, after) = rest.split_at(out_bytes);
    assert!(before.iter().chain(after).all(|&byte| byte == POISON), "bytes around the views were touched");
    views.to_vec()
}

/// Rounds views of 3 channels to `dtype`, and pads them with zeros to `channels`.
fn stored(views: &[f32], dtype: DType, channels: usize) -> Vec<u8> {
    let padded = views.chunks_exact(3).flat_map(|pixel| (0..channels).map(|c| pixel.get(c).copied().unwrap_or(0.0)));
    match dtype {
        DType::F32 => padded.flat_map(f32::to_le_bytes).collect(),
        DType::Bf16 => padded.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F16 => padded.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
        other => panic!("{other}"),
    }
}

/// Compares the device with the CPU, element by element.
fn assert_equal(got: &[u8], expected: &[u8], dtype: DType, channels: usize, config: &AugmentConfig) {
    assert_eq!(got.len(), expected.len());
    let width = dtype.size();
    let different = |(a, b): &(&[u8], &[u8])| a != b;
    let elements = || got.chunks_exact(width).zip(expected.chunks_exact(width));
    let Some(first) = elements().position(|pair| different(&pair)) else { return };
    let count = elements().filter(different).count();
    let (pixel, size) = (first / channels, config.image_size);
    let (view, y, x) = (pixel / (size * size), pixel / size % size, pixel % size);
    let (a, b) = (&got[first * width..][..width], &expected[first * width..][..width]);
    panic!(
        "{count} of {} elements differ ({dtype}, {size} pixels), the first in view {view}, row {y}, column {x}, channel \
         {}: bytes {a:?}, expected {b:?}",
        got.len() / width,
        first % channels
    );
}

fn compare(config: &AugmentConfig, images: &Images, params: &[[ViewParams; 2]], dtype: DType, channels: usize) {
    let augmentation = Augmentation::new(config, dtype, channels, images.longest_side()).unwrap();
    let mut descriptors = Vec::new();
    augmentation.describe(&images.stored, params, images.pixels.len(), &mut descriptors).unwrap();
    let got = run(&emulator(), &augmentation, images, &descriptors);
    let expected = stored(&images.views(config, params), dtype, channels);
    assert_equal(&got, &expected, dtype, channels, config);
}

fn config(image_size: usize) -> AugmentConfig {
    AugmentConfig { image_size, ..AugmentConfig::imagenet() }
}

fn whole(image: &StoredImage) -> CropBox {
    CropBox { top: 0, left: 0, height: image.original_height as u32, width: image.original_width as u32 }
}

fn all_orders() -> Vec<[JitterOp; 4]> {
    let ops = [JitterOp::Brightness, JitterOp::Contrast, JitterOp::Saturation, JitterOp::Hue];
    let different = |order: &[JitterOp; 4]| (0..4).all(|i| !order[..i].contains(&order[i]));
    (0..256).map(|code| [0, 2, 4, 6].map(|shift| ops[code >> shift & 3])).filter(different).collect()
}

#[test]
fn drawn_views_of_every_size_have_the_bits_of_the_cpu() {
    let images = Images::mixed();
    for (size, blur_kernel) in [
        (32, BlurKernel::Pil),
        (33, BlurKernel::Gaussian),
        (96, BlurKernel::Pil),
        (160, BlurKernel::Gaussian),
        (1, BlurKernel::Pil),
        (7, BlurKernel::Gaussian),
    ] {
        let config = AugmentConfig { blur_kernel, ..config(size) };
        compare(&config, &images, &images.draw(&config, 0), DType::F32, 8);
    }
}

#[test]
fn more_views_than_fit_between_the_kernels_at_a_time() {
    // 16 MiB are 27 unfinished views of 224 pixels.
    let mut images = Images::mixed().with_photo(1);
    for number in 0..4 {
        images = images.with_photo(number % 2);
    }
    let config = config(224);
    compare(&config, &images, &images.draw(&config, 1), DType::Bf16, 8);
}

#[test]
fn every_element_type_is_the_rounded_float() {
    let images = Images::default().with_photo(0).with_noise((57, 43, 1)).with_noise((9, 70, 3));
    let config = config(45);
    let params = images.draw(&config, 2);
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for channels in [3, 4, 8] {
            compare(&config, &images, &params, dtype, channels);
        }
    }
}

#[test]
fn every_order_of_the_jitter() {
    let orders = all_orders();
    assert_eq!(orders.len(), 24);
    // Factors on both sides of 1, grey and clamped pixels among them.
    let factors = [[0.6, 1.4, 1.3, 0.1], [1.4, 0.65, 0.7, -0.1], [1.9, 1.0, 0.0, 0.5], [1.0, 2.5, 1.0, 0.0]];
    let mut images = Images::default();
    for i in 0..12 {
        images = if i % 3 == 2 { images.with_noise((40, 37, 1 + 2 * (i % 2))) } else { images.with_photo(i % 2) };
    }
    for [brightness, contrast, saturation, hue] in factors {
        let params = images.params(|i, view, image| ViewParams {
            crop: whole(image),
            jitter: Some(Jitter { order: orders[2 * i + view as usize], brightness, contrast, saturation, hue }),
            grayscale: false,
            blur_sigma: None,
            flip: false,
        });
        compare(&config(33), &images, &params, DType::F32, 3);
    }
}

#[test]
fn every_operation_alone_and_with_the_others() {
    let images = (0..8).fold(Images::default(), |images, i| match i {
        3 => images.with_noise((30, 50, 1)),
        _ => images.with_photo(i % 2),
    });
    for blur_kernel in [BlurKernel::Pil, BlurKernel::Gaussian] {
        let config = AugmentConfig { blur_kernel, ..config(40) };
        let drawn = images.draw(&AugmentConfig { jitter_probability: 1.0, ..config.clone() }, 3);
        let params = images.params(|i, view, _| {
            let on = |bit: u32| (2 * i as u32 + view) >> bit & 1 == 1;
            let drawn = drawn[i][view as usize];
            ViewParams {
                jitter: drawn.jitter.filter(|_| on(0)),
                grayscale: on(1),
                blur_sigma: on(2).then_some(0.3 + 0.2 * i as f32),
                flip: on(3),
                ..drawn
            }
        });
        compare(&config, &images, &params, DType::F32, 8);
    }
}

#[test]
fn blurs_that_reach_further_than_a_tile_and_than_the_view() {
    let images = Images::default().with_photo(0).with_noise((33, 20, 3));
    for blur_kernel in [BlurKernel::Pil, BlurKernel::Gaussian] {
        for (size, largest) in [(70, 8.0), (33, 32.0), (20, 11.7), (100, 32.0)] {
            let config = AugmentConfig { blur_kernel, blur_sigma: [0.1, largest], ..config(size) };
            // The largest and smallest sigma, one in between, and no blur.
            let sigmas = [Some(largest as f32), Some(0.1), Some(largest as f32 / 3.0), None];
            let drawn = images.draw(&config, 4);
            let params = images.params(|i, view, _| {
                let drawn = drawn[i][view as usize];
                ViewParams { blur_sigma: sigmas[2 * i + view as usize], ..drawn }
            });
            compare(&config, &images, &params, DType::F32, 8);
        }
    }
}

#[test]
fn tiny_crops_are_enlarged_and_huge_ones_shrunk() {
    let tiny = Images::mixed();
    for (width, height) in [(1, 1), (2, 1), (3, 2)] {
        let params = tiny.params(|i, view, image| {
            let (width, height) = (width.min(image.original_width as u32), height.min(image.original_height as u32));
            // At the far corner or at the near one.
            let far = view == 0;
            let left = if far { image.original_width as u32 - width } else { 0 };
            let top = if far { image.original_height as u32 - height } else { 0 };
            let crop = CropBox { top, left, height, width };
            ViewParams { crop, jitter: None, grayscale: i % 2 == 1, blur_sigma: None, flip: i % 3 == 0 }
        });
        compare(&config(96), &tiny, &params, DType::F32, 8);
    }
    let huge = Images::default().with_noise((1601, 1203, 3)).with_noise((4001, 9, 1)).with_noise((7, 3000, 3));
    for size in [5, 33, 64] {
        let params = huge.params(|_, view, image| {
            let mut crop = whole(image);
            crop.left = view * 3;
            crop.width -= view * 3;
            ViewParams { crop, jitter: None, grayscale: false, blur_sigma: None, flip: view == 1 }
        });
        compare(&config(size), &huge, &params, DType::F32, 3);
    }
}

#[test]
fn views_for_evaluation() {
    let images = Images::mixed().with_noise((48, 48, 3));
    let config = config(48);
    let augmentation = Augmentation::new(&config, DType::F32, 3, images.longest_side()).unwrap();
    let mut descriptors = Vec::new();
    augmentation.describe_centres(&images.stored, images.pixels.len(), &mut descriptors).unwrap();
    let got = run(&emulator(), &augmentation, &images, &descriptors);
    let mut augmenter = Augmenter::new(&config).unwrap();
    let mut expected = vec![f32::NAN; images.len() * config.view_len()];
    for (i, out) in expected.chunks_exact_mut(config.view_len()).enumerate() {
        augmenter.resize_center(&images.image(i), None, out);
    }
    assert_equal(&got, &stored(&expected, DType::F32, 3), DType::F32, 3, &config);
}
