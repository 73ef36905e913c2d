//! What the augmentation draws from: the recipe's parameters with their presets and checks.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Largest blur sigma: its kernel stays shorter than a few hundred taps.
pub(super) const MAX_SIGMA: f64 = 32.0;
const MAX_IMAGE_SIZE: usize = 8192;

/// What a Gaussian blur of some sigma is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlurKernel {
    /// PIL's, which the reference recipe uses: three box blurs whose variances add up to sigma squared exactly.
    Pil,
    /// torchvision's: the density sampled at whole pixels. Below a sigma of about 0.5 it hardly blurs.
    Gaussian,
}

/// How levels of 0..255 become what a network sees: level x scale + offset, by channel.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Normalisation {
    /// By red, green and blue.
    pub scale: [f32; 3],
    /// By red, green and blue.
    pub offset: [f32; 3],
}

/// The distribution of the views. Both views of an image are drawn from the same one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AugmentConfig {
    /// Height and width of a view in pixels.
    pub image_size: usize,
    /// Range of the crop's area as a fraction of the image's.
    pub crop_scale: [f64; 2],
    /// Range of the crop's width / height, drawn log-uniformly.
    pub crop_ratio: [f64; 2],
    /// Probability of the colour jitter (all four operations together, in a random order).
    pub jitter_probability: f64,
    /// Brightness is scaled by a factor from 1 - b to 1 + b (not below 0).
    pub brightness: f64,
    /// As `brightness`, about the mean luma of the image.
    pub contrast: f64,
    /// As `brightness`, about the luma of each pixel.
    pub saturation: f64,
    /// The hue turns by up to this fraction of the colour circle, either way.
    pub hue: f64,
    /// Probability that a view turns grey.
    pub grayscale_probability: f64,
    /// Probability of the Gaussian blur.
    pub blur_probability: f64,
    /// Range of the blur's sigma in pixels.
    pub blur_sigma: [f64; 2],
    /// What a blur of some sigma is.
    pub blur_kernel: BlurKernel,
    /// Probability of a left-right flip.
    pub flip_probability: f64,
    /// Mean of the red, green and blue channel in 0..1, subtracted last.
    pub mean: [f32; 3],
    /// Standard deviation of the channels, divided by last.
    pub std: [f32; 3],
}

impl AugmentConfig {
    /// The recipe for ImageNet: 224 pixels, crops from a fifth of the area, blur on half of the views.
    pub fn imagenet() -> AugmentConfig {
        AugmentConfig {
            image_size: 224,
            crop_scale: [0.2, 1.0],
            crop_ratio: [3.0 / 4.0, 4.0 / 3.0],
            jitter_probability: 0.8,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.4,
            hue: 0.1,
            grayscale_probability: 0.2,
            blur_probability: 0.5,
            blur_sigma: [0.1, 2.0],
            blur_kernel: BlurKernel::Pil,
            flip_probability: 0.5,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
        }
    }

    /// The recipe for CIFAR: 32 pixels, no blur.
    pub fn cifar() -> AugmentConfig {
        AugmentConfig {
            image_size: 32,
            blur_probability: 0.0,
            mean: [0.4914, 0.4822, 0.4465],
            std: [0.2023, 0.1994, 0.2010],
            ..AugmentConfig::imagenet()
        }
    }

    /// Number of values of one view: height x width x channels.
    pub fn view_len(&self) -> usize {
        self.image_size * self.image_size * 3
    }

    /// The normalisation by `mean` and `std`.
    pub fn normalisation(&self) -> Normalisation {
        Normalisation {
            scale: self.std.map(|std| 1.0 / (255.0 * std)),
            offset: std::array::from_fn(|channel| -self.mean[channel] / self.std[channel]),
        }
    }

    /// Checks every parameter.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option that makes no sense.
    pub fn validate(&self) -> Result<()> {
        if !(1..=MAX_IMAGE_SIZE).contains(&self.image_size) {
            let what = format!("expected 1 to {MAX_IMAGE_SIZE} pixels, got {}", self.image_size);
            return Err(Error::config("--image-size", what));
        }
        range("--crop-scale", self.crop_scale, 1.0)?;
        range("--crop-ratio", self.crop_ratio, 1000.0)?;
        range("--blur-sigma", self.blur_sigma, MAX_SIGMA)?;
        within("--jitter-probability", self.jitter_probability, 1.0)?;
        within("--grayscale-probability", self.grayscale_probability, 1.0)?;
        within("--blur-probability", self.blur_probability, 1.0)?;
        within("--flip-probability", self.flip_probability, 1.0)?;
        within("--brightness", self.brightness, 100.0)?;
        within("--contrast", self.contrast, 100.0)?;
        within("--saturation", self.saturation, 100.0)?;
        within("--hue", self.hue, 0.5)?;
        for (&mean, &std) in self.mean.iter().zip(&self.std) {
            within("--mean", f64::from(mean), 1.0)?;
            if !(std.is_finite() && std > 0.0) {
                return Err(Error::config("--std", format!("expected numbers above 0, got {std}")));
            }
        }
        Ok(())
    }
}

/// Checks that `0 <= value <= max` (a NaN is not).
fn within(option: &str, value: f64, max: f64) -> Result<()> {
    if (0.0..=max).contains(&value) {
        return Ok(());
    }
    Err(Error::config(option, format!("expected a number from 0 to {max}, got {value}")))
}

/// Checks that `0 < low <= high <= max`.
fn range(option: &str, [low, high]: [f64; 2], max: f64) -> Result<()> {
    if 0.0 < low && low <= high && high <= max {
        return Ok(());
    }
    Err(Error::config(option, format!("expected LOW,HIGH with 0 < LOW <= HIGH <= {max}, got {low},{high}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_survive_toml() {
        for config in [AugmentConfig::imagenet(), AugmentConfig::cifar()] {
            config.validate().unwrap();
            let text = toml::to_string(&config).unwrap();
            assert_eq!(toml::from_str::<AugmentConfig>(&text).unwrap(), config);
        }
    }

    #[test]
    fn each_bad_parameter_is_named() {
        type Spoil = fn(&mut AugmentConfig);
        let cases: [(&str, Spoil); 9] = [
            ("--image-size", |c| c.image_size = 0),
            ("--crop-scale", |c| c.crop_scale = [0.5, 0.2]),
            ("--crop-scale", |c| c.crop_scale = [0.2, 1.5]),
            ("--crop-ratio", |c| c.crop_ratio = [0.0, 1.0]),
            ("--blur-sigma", |c| c.blur_sigma = [0.1, 33.0]),
            ("--flip-probability", |c| c.flip_probability = f64::NAN),
            ("--brightness", |c| c.brightness = -0.1),
            ("--hue", |c| c.hue = 0.6),
            ("--std", |c| c.std[1] = 0.0),
        ];
        for (option, spoil) in cases {
            let mut config = AugmentConfig::imagenet();
            spoil(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(option) && message.contains("got"), "{message}");
        }
    }
}
