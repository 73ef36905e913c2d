use super::*;
use crate::rng::Stream;

fn noise(len: usize) -> Vec<u8> {
    let mut stream = Stream::new(4, 77, 0);
    (0..len).map(|_| stream.word() as u8).collect()
}

fn config(image_size: usize) -> AugmentConfig {
    AugmentConfig { image_size, mean: [0.0; 3], std: [1.0 / 255.0; 3], ..AugmentConfig::imagenet() }
}

fn plain(crop: CropBox) -> ViewParams {
    ViewParams { crop, jitter: None, grayscale: false, blur_sigma: None, flip: false }
}

/// Makes a view in levels.
fn view(image: &Image, params: &ViewParams, size: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; size * size * 3];
    Augmenter::new(&config(size)).unwrap().view(image, params, &mut out);
    out
}

fn assert_near(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "place {i}: got {a}, expected {b}");
    }
}

#[test]
fn a_crop_of_the_views_size_is_a_copy() {
    let pixels = noise(19 * 17 * 3);
    let image = Image::new(&pixels, 19, 17, 3).unwrap();
    let got = view(&image, &plain(CropBox { top: 4, left: 7, height: 9, width: 9 }), 9);
    let expected: Vec<f32> =
        (0..9).flat_map(|y| &pixels[((y + 4) * 19 + 7) * 3..][..27]).map(|&b| f32::from(b)).collect();
    assert_near(&got, &expected, 1e-3);
}

#[test]
fn crops_of_a_stretched_image_keep_the_geometry_of_the_original() {
    // An original of 320 x 120 whose red is x / 2 and whose green is y; stored as 64 x 48.
    let (width, height) = (64, 48);
    let pixels: Vec<u8> = (0..height)
        .flat_map(|y| (0..width).map(move |x| (x, y)))
        .flat_map(|(x, y)| [(x as f32 + 0.5) * 5.0 / 2.0, (y as f32 + 0.5) * 2.5, 9.0].map(|v| v.round() as u8))
        .collect();
    let image = Image::new(&pixels, width, height, 3).unwrap().with_original_size(320, 120).unwrap();
    let got = view(&image, &plain(CropBox { top: 30, left: 100, height: 60, width: 121 }), 10);
    for y in 1..9 {
        for x in 1..9 {
            let pixel = &got[(y * 10 + x) * 3..][..3];
            let expected = [(100.0 + (x as f32 + 0.5) * 12.1) / 2.0, 30.0 + (y as f32 + 0.5) * 6.0, 9.0];
            assert_near(pixel, &expected, 0.6);
        }
    }
}

#[test]
fn a_flip_mirrors_the_finished_view() {
    let pixels = noise(40 * 30 * 3);
    let image = Image::new(&pixels, 40, 30, 3).unwrap();
    let size = 21;
    let straight = (0..200)
        .map(|sample| ViewParams::draw(&config(size), 1, 0, sample, 0, 40, 30))
        .find(|params| params.jitter.is_some() && params.blur_sigma.is_some() && !params.flip && !params.grayscale)
        .unwrap();
    let got = view(&image, &ViewParams { flip: true, ..straight }, size);
    let expected = view(&image, &straight, size);
    let mirrored: Vec<f32> =
        expected.chunks_exact(size * 3).flat_map(|row| row.chunks_exact(3).rev()).flatten().copied().collect();
    assert_ne!(got, expected);
    assert_near(&got, &mirrored, 1e-2);
}

#[test]
fn a_grey_image_is_the_colour_image_of_equal_channels() {
    let grey = noise(23 * 31);
    let colour: Vec<u8> = grey.iter().flat_map(|&v| [v; 3]).collect();
    for sample in 0..20 {
        let params = ViewParams::draw(&config(16), 3, 0, sample, 0, 23, 31);
        let a = view(&Image::new(&grey, 23, 31, 1).unwrap(), &params, 16);
        let b = view(&Image::new(&colour, 23, 31, 3).unwrap(), &params, 16);
        assert_eq!(a, b, "sample {sample}");
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let pixels = noise(70 * 50 * 3);
    let image = Image::new(&pixels, 70, 50, 3).unwrap();
    let config = AugmentConfig { blur_sigma: [0.1, 4.0], ..AugmentConfig::imagenet() };
    for size in [28, 33] {
        let config = AugmentConfig { image_size: size, ..config.clone() };
        let mut best = Augmenter::new(&config).unwrap();
        let mut scalar = Augmenter { instructions: pulp::Arch::Scalar, ..Augmenter::new(&config).unwrap() };
        let (mut a, mut b) = (vec![0.0; config.view_len()], vec![0.0; config.view_len()]);
        for sample in 0..50 {
            let params = ViewParams::draw(&config, 2, 0, sample, 0, 70, 50);
            best.view(&image, &params, &mut a);
            scalar.view(&image, &params, &mut b);
            assert_eq!(a, b, "sample {sample}");
        }
    }
}

#[test]
fn scratch_memory_carries_nothing_from_view_to_view() {
    let (large, small) = (noise(200 * 150 * 3), noise(3 * 2));
    let images = [Image::new(&large, 200, 150, 3).unwrap(), Image::new(&small, 3, 2, 1).unwrap()];
    let config = config(20);
    let mut reused = Augmenter::new(&config).unwrap();
    let mut out = vec![0.0; config.view_len()];
    for sample in 0..40 {
        let image = &images[sample as usize % 2];
        let (width, height) = image.original_size();
        let params = ViewParams::draw(&config, 8, 0, sample, 1, width, height);
        reused.view(image, &params, &mut out);
        assert_eq!(out, view(image, &params, 20), "sample {sample}");
        assert!(out.iter().all(|v| (-1e-3..=255.001).contains(v)), "sample {sample}");
    }
}

#[test]
fn evaluation_takes_an_image_of_the_views_size_as_it_is() {
    let pixels = noise(12 * 12 * 3);
    let image = Image::new(&pixels, 12, 12, 3).unwrap();
    let expected: Vec<f32> = pixels.iter().map(|&b| f32::from(b)).collect();
    let mut out = vec![0.0; 12 * 12 * 3];
    let mut augmenter = Augmenter::new(&config(12)).unwrap();
    augmenter.resize_center(&image, None, &mut out);
    assert_near(&out, &expected, 1e-3);
    augmenter.resize_center(&image, Some(14), &mut out);
    assert!(out.iter().zip(&expected).any(|(a, b)| (a - b).abs() > 1.0));
}

#[test]
fn impossible_images_are_refused() {
    assert!(Image::new(&[0; 12], 2, 2, 3).is_ok());
    for (bytes, width, height, channels) in [(12, 2, 3, 3), (8, 2, 2, 2), (0, 0, 2, 3)] {
        let message = Image::new(&vec![0; bytes], width, height, channels).unwrap_err().to_string();
        assert!(message.starts_with("image: ") && message.contains("got"), "{message}");
    }
    assert!(Image::new(&[0; 12], 2, 2, 3).unwrap().with_original_size(0, 5).is_err());
}
