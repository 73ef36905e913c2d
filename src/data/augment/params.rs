//! The random draws of one view. They are a pure function of (seed, epoch, sample, view): 32 Philox words in fixed
//! slots, so no draw depends on a branch, a batch or a thread. The same parameters can drive any device.

use crate::data::augment::AugmentConfig;
use crate::rng;

const CROP_TRIES: usize = 10;

/// Which words a draw uses. Tries of the crop take two words each from slot 0 on.
mod slot {
    pub const CROP_TOP: usize = 20;
    pub const CROP_LEFT: usize = 21;
    pub const JITTER: usize = 22;
    pub const JITTER_ORDER: usize = 23;
    pub const BRIGHTNESS: usize = 24;
    pub const CONTRAST: usize = 25;
    pub const SATURATION: usize = 26;
    pub const HUE: usize = 27;
    pub const GRAYSCALE: usize = 28;
    pub const BLUR: usize = 29;
    pub const BLUR_SIGMA: usize = 30;
    pub const FLIP: usize = 31;
    pub const COUNT: usize = 32;
}

/// A rectangle of the original image, in its pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CropBox {
    /// First row.
    pub top: u32,
    /// First column.
    pub left: u32,
    /// Rows, at least 1.
    pub height: u32,
    /// Columns, at least 1.
    pub width: u32,
}

/// One of the four operations of the colour jitter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JitterOp {
    /// Scales all values.
    Brightness,
    /// Blends with the mean luma of the image.
    Contrast,
    /// Blends each pixel with its luma.
    Saturation,
    /// Turns the hue.
    Hue,
}

/// The draws of a colour jitter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Jitter {
    /// The operations in the order in which they are applied.
    pub order: [JitterOp; 4],
    /// Factor of [`JitterOp::Brightness`]; 1 changes nothing.
    pub brightness: f32,
    /// Factor of [`JitterOp::Contrast`]; 1 changes nothing.
    pub contrast: f32,
    /// Factor of [`JitterOp::Saturation`]; 1 changes nothing.
    pub saturation: f32,
    /// Turn of [`JitterOp::Hue`], as a fraction of the colour circle; 0 changes nothing.
    pub hue: f32,
}

/// Everything that makes one view of an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ViewParams {
    /// What is cut out and resized to the view's size.
    pub crop: CropBox,
    /// The colour jitter, if any.
    pub jitter: Option<Jitter>,
    /// Whether the view turns grey.
    pub grayscale: bool,
    /// Sigma of the blur, if any.
    pub blur_sigma: Option<f32>,
    /// Whether the view is flipped left-right.
    pub flip: bool,
}

impl ViewParams {
    /// Draws view `view` (0 or 1) of a sample whose original image has the given size.
    pub fn draw(
        config: &AugmentConfig,
        seed: u64,
        epoch: u32,
        sample: u64,
        view: u32,
        original_width: u32,
        original_height: u32,
    ) -> ViewParams {
        let draws = Draws::new(seed, epoch, sample, view);
        let spread = |slot, amount: f64| draws.uniform(slot, (1.0 - amount).max(0.0), 1.0 + amount) as f32;
        let jitter = Jitter {
            order: permutation(draws.below(slot::JITTER_ORDER, 24)),
            brightness: spread(slot::BRIGHTNESS, config.brightness),
            contrast: spread(slot::CONTRAST, config.contrast),
            saturation: spread(slot::SATURATION, config.saturation),
            hue: draws.uniform(slot::HUE, -config.hue, config.hue) as f32,
        };
        let [sigma_low, sigma_high] = config.blur_sigma;
        let sigma = draws.uniform(slot::BLUR_SIGMA, sigma_low, sigma_high) as f32;
        ViewParams {
            crop: draws.crop(config, original_width, original_height),
            jitter: draws.chance(slot::JITTER, config.jitter_probability).then_some(jitter),
            grayscale: draws.chance(slot::GRAYSCALE, config.grayscale_probability),
            blur_sigma: draws.chance(slot::BLUR, config.blur_probability).then_some(sigma),
            flip: draws.chance(slot::FLIP, config.flip_probability),
        }
    }
}

/// The 32 words of one view.
struct Draws([u32; slot::COUNT]);

impl Draws {
    fn new(seed: u64, epoch: u32, sample: u64, view: u32) -> Draws {
        let mut words = [0; slot::COUNT];
        for (block, four) in words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let counter = [sample as u32, (sample >> 32) as u32 | (view << 24), epoch, block as u32];
            *four = rng::philox(counter, rng::key(seed));
        }
        Draws(words)
    }

    fn uniform(&self, slot: usize, low: f64, high: f64) -> f64 {
        low + (high - low) * rng::unit(self.0[slot])
    }

    fn below(&self, slot: usize, n: u32) -> u32 {
        rng::below(self.0[slot], n)
    }

    fn chance(&self, slot: usize, probability: f64) -> bool {
        rng::unit(self.0[slot]) < probability
    }

    /// torchvision's RandomResizedCrop: ten tries at an area and a ratio, then the largest centred crop of a legal ratio.
    fn crop(&self, config: &AugmentConfig, width: u32, height: u32) -> CropBox {
        let area = f64::from(width) * f64::from(height);
        let [scale_low, scale_high] = config.crop_scale;
        let [ratio_low, ratio_high] = config.crop_ratio.map(f64::ln);
        for attempt in 0..CROP_TRIES {
            let target = area * self.uniform(2 * attempt, scale_low, scale_high);
            let ratio = self.uniform(2 * attempt + 1, ratio_low, ratio_high).exp();
            // Python's round(): halves go to the even neighbour.
            let w = (target * ratio).sqrt().round_ties_even() as u32;
            let h = (target / ratio).sqrt().round_ties_even() as u32;
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                let top = self.below(slot::CROP_TOP, height - h + 1);
                let left = self.below(slot::CROP_LEFT, width - w + 1);
                return CropBox { top, left, height: h, width: w };
            }
        }
        centre_crop(config.crop_ratio, width, height)
    }
}

/// The largest centred crop whose ratio is legal.
fn centre_crop([ratio_low, ratio_high]: [f64; 2], width: u32, height: u32) -> CropBox {
    let (w, h) = (f64::from(width), f64::from(height));
    let (crop_width, crop_height) = if w / h < ratio_low {
        (width, (w / ratio_low).round_ties_even() as u32)
    } else if w / h > ratio_high {
        ((h * ratio_high).round_ties_even() as u32, height)
    } else {
        (width, height)
    };
    // Ratios far from 1 can round a side of a tiny image to nothing.
    let (crop_width, crop_height) = (crop_width.clamp(1, width), crop_height.clamp(1, height));
    CropBox { top: (height - crop_height) / 2, left: (width - crop_width) / 2, height: crop_height, width: crop_width }
}

/// The `index`-th of the 24 orders of the jitter operations, in lexicographic order.
fn permutation(mut index: u32) -> [JitterOp; 4] {
    let mut order = [JitterOp::Brightness, JitterOp::Contrast, JitterOp::Saturation, JitterOp::Hue];
    for (place, orders_of_the_rest) in [6, 2, 1].into_iter().enumerate() {
        let chosen = place + (index / orders_of_the_rest) as usize;
        order[place..=chosen].rotate_right(1);
        index %= orders_of_the_rest;
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_orders_are_different() {
        let orders: Vec<_> = (0..24).map(permutation).collect();
        for (i, order) in orders.iter().enumerate() {
            assert!(!orders[..i].contains(order), "{order:?} comes twice");
            assert!(order.iter().enumerate().all(|(k, op)| !order[..k].contains(op)), "{order:?}");
        }
    }

    #[test]
    fn crops_stay_inside_any_image() {
        let mut config = AugmentConfig::imagenet();
        for ratio in [[0.75, 4.0 / 3.0], [3.0, 9.0], [0.1, 0.2]] {
            config.crop_ratio = ratio;
            for (width, height) in [(1, 1), (1, 9), (9, 1), (3, 500), (500, 375), (65_535, 2), (32, 32)] {
                for sample in 0..200 {
                    let crop = ViewParams::draw(&config, 5, 0, sample, 1, width, height).crop;
                    assert!(crop.width >= 1 && crop.left + crop.width <= width, "{crop:?} of {width}x{height}");
                    assert!(crop.height >= 1 && crop.top + crop.height <= height, "{crop:?} of {width}x{height}");
                }
            }
        }
    }

    #[test]
    fn every_coordinate_of_a_draw_matters() {
        let draw = |seed, epoch, sample, view| {
            ViewParams::draw(&AugmentConfig::imagenet(), seed, epoch, sample, view, 640, 480)
        };
        let base = draw(1, 2, 3, 0);
        assert_eq!(base, draw(1, 2, 3, 0));
        for other in
            [draw(2, 2, 3, 0), draw(1, 3, 3, 0), draw(1, 2, 4, 0), draw(1, 2, 3, 1), draw(1, 2, 3 | 1 << 32, 0)]
        {
            assert_ne!(base.crop, other.crop);
        }
    }

    #[test]
    fn switched_off_operations_are_never_drawn() {
        let config = AugmentConfig {
            jitter_probability: 0.0,
            grayscale_probability: 1.0,
            blur_probability: 0.0,
            flip_probability: 1.0,
            ..AugmentConfig::imagenet()
        };
        for sample in 0..500 {
            let params = ViewParams::draw(&config, 0, 0, sample, 0, 64, 48);
            assert!(params.jitter.is_none() && params.blur_sigma.is_none() && params.grayscale && params.flip);
        }
    }
}
