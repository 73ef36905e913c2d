use super::cuda::Strips;
use super::*;
use crate::data::augment::CropBox;

fn config() -> AugmentConfig {
    AugmentConfig::imagenet()
}

fn image() -> StoredImage {
    StoredImage { offset: 5, width: 40, height: 30, channels: 3, original_width: 80, original_height: 90 }
}

/// Bytes of the pixels that end with `image()`.
const BYTES: usize = 5 + 40 * 30 * 3;

fn params() -> ViewParams {
    let crop = CropBox { top: 10, left: 20, height: 80, width: 60 };
    ViewParams { crop, jitter: None, grayscale: false, blur_sigma: Some(2.0), flip: false }
}

fn describe(image: StoredImage, params: ViewParams) -> Result<Vec<ViewDescriptor>> {
    let mut views = Vec::new();
    let augmentation = Augmentation::new(&config(), DType::F32, 8, 100)?;
    augmentation.describe(&[image], &[[params; 2]], BYTES, &mut views).map(|()| views)
}

#[test]
fn impossible_images_and_views_are_refused() {
    assert_eq!(describe(image(), params()).unwrap().len(), 2);
    let refusal = |image, params| describe(image, params).unwrap_err().to_string();
    let images = [
        (StoredImage { channels: 2, ..image() }, "channels of an image"),
        (StoredImage { width: 0, ..image() }, "size of an image"),
        (StoredImage { height: 101, ..image() }, "size of an image"),
        (StoredImage { offset: 6, ..image() }, "bytes of an image"),
        (StoredImage { offset: usize::MAX, ..image() }, "bytes of an image"),
        (StoredImage { original_width: 0, ..image() }, "size of an original"),
        (StoredImage { original_height: 1 << 33, ..image() }, "size of an original"),
    ];
    for (image, what) in images {
        let message = refusal(image, params());
        assert!(message.contains(what) && message.contains("got"), "{message}");
    }
    let crop = params().crop;
    for crop in [
        CropBox { width: 0, ..crop },
        CropBox { left: 21, ..crop },
        CropBox { top: 11, ..crop },
        CropBox { left: u32::MAX, ..crop },
    ] {
        let message = refusal(image(), ViewParams { crop, ..params() });
        assert!(message.contains("crop") && message.contains("80 x 90"), "{message}");
    }
    for sigma in [0.0, -1.0, f32::NAN, f32::INFINITY, f32::MAX, 2.0001] {
        let message = refusal(image(), ViewParams { blur_sigma: Some(sigma), ..params() });
        assert!(message.contains("sigma of a blur"), "{message}");
    }
}

#[test]
fn impossible_augmentations_are_refused() {
    let message = |dtype, channels, side| Augmentation::new(&config(), dtype, channels, side).unwrap_err().to_string();
    assert!(message(DType::F64, 8, 100).contains("element type"));
    assert!(message(DType::F32, 5, 100).contains("channels of the views"));
    assert!(message(DType::F32, 8, 0).contains("longest side"));
    assert!(message(DType::F32, 8, 65_536).contains("longest side"));
    let config = AugmentConfig { image_size: 0, ..config() };
    assert!(Augmentation::new(&config, DType::F32, 8, 100).is_err());
}

#[test]
fn first_views_come_before_second_ones() {
    let augmentation = Augmentation::new(&config(), DType::F32, 8, 100).unwrap();
    let images = [image(), StoredImage { offset: 0, ..image() }];
    let flipped = ViewParams { flip: true, ..params() };
    let mut views = Vec::new();
    let pairs = [[params(), flipped], [flipped, params()]];
    augmentation.describe(&images, &pairs, BYTES, &mut views).unwrap();
    let places: Vec<_> = views.iter().map(|view| (view.offset, view.axes[0].mirrored == 1)).collect();
    assert_eq!(places, [(5, false), (0, true), (5, true), (0, false)]);
    let message = augmentation.describe(&images, &pairs[..1], BYTES, &mut views).unwrap_err().to_string();
    assert!(message.contains("pairs of views"), "{message}");
}

#[test]
fn filters_fit_their_tables_at_any_size() {
    for longest_side in [1, 2, 63, 64, 65, 1000, 65_535] {
        for size in [1, 2, 31, 32, 33, 224, 8192] {
            let config = AugmentConfig { image_size: size, ..config() };
            let augmentation = Augmentation::new(&config, DType::F32, 8, longest_side).unwrap();
            for stored in [1, longest_side.div_ceil(2), longest_side - longest_side / 7, longest_side] {
                for original in [stored as u32, 65_535, 1 + stored as u32 / 3] {
                    let crop = CropBox { top: 0, left: 0, height: original, width: original };
                    let filters = [
                        crop_filters(crop, (original, original), (stored, stored), size),
                        centre_filters(None, (original, original), (stored, stored), size),
                    ];
                    for filter in filters.iter().flatten() {
                        assert!(
                            filter.taps * size <= augmentation.capacity(),
                            "{filter:?} for {size} of {longest_side}"
                        );
                    }
                }
            }
        }
    }
}

/// The strips of any blur fit the shared memory, and each warp has a row of them.
#[test]
fn strips_fit_the_shared_memory() {
    for blur_kernel in [BlurKernel::Pil, BlurKernel::Gaussian] {
        for sigma in [0.1, 0.5, 1.0, 2.0, 5.0, 8.0, 9.0, 16.0, 32.0] {
            let config = AugmentConfig { blur_kernel, blur_sigma: [0.1, sigma], ..config() };
            let augmentation = Augmentation::new(&config, DType::F32, 8, 100).unwrap();
            let Strips { channels, rows, bytes } = augmentation.strips();
            assert!(rows >= 16 && rows.is_multiple_of(16) && bytes <= 47 << 10, "sigma {sigma}: {rows} rows, {bytes}");
            assert_eq!(channels, if sigma <= 8.0 { 3 } else { 1 }, "sigma {sigma}");
        }
    }
}
