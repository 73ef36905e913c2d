//! Options of the augmentation, shared by `train` and `augment-preview`.

use super::preset::Preset;
use crate::data::augment::AugmentConfig;
use crate::error::Result;

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Augmentation")]
pub struct AugmentArgs {
    /// Height and width of a view in pixels [default: imagenet 224, cifar 32].
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// Range of a crop's share of the image's area.
    #[arg(long, num_args = 2, value_names = ["LO", "HI"])]
    crop_scale: Option<Vec<f64>>,
    /// Range of a crop's width / height.
    #[arg(long, num_args = 2, value_names = ["LO", "HI"])]
    crop_ratio: Option<Vec<f64>>,
    /// Probability of the colour jitter.
    #[arg(long, value_name = "P")]
    jitter_probability: Option<f64>,
    /// Strength of the brightness jitter: factors from 1 - B to 1 + B.
    #[arg(long, value_name = "B")]
    brightness: Option<f64>,
    /// Strength of the contrast jitter.
    #[arg(long, value_name = "C")]
    contrast: Option<f64>,
    /// Strength of the saturation jitter.
    #[arg(long, value_name = "S")]
    saturation: Option<f64>,
    /// Largest turn of the hue, as a fraction of the colour circle.
    #[arg(long, value_name = "H")]
    hue: Option<f64>,
    /// Probability that a view turns grey.
    #[arg(long, value_name = "P")]
    grayscale_probability: Option<f64>,
    /// Probability of the Gaussian blur [default: imagenet 0.5, cifar 0].
    #[arg(long, value_name = "P")]
    blur_probability: Option<f64>,
    /// Range of the blur's sigma in pixels.
    #[arg(long, num_args = 2, value_names = ["LO", "HI"])]
    blur_sigma: Option<Vec<f64>>,
    /// Probability of a left-right flip.
    #[arg(long, value_name = "P")]
    flip_probability: Option<f64>,
    /// Mean of red, green and blue in 0..1, subtracted last.
    #[arg(long, num_args = 3, value_names = ["R", "G", "B"])]
    mean: Option<Vec<f32>>,
    /// Standard deviation of red, green and blue, divided by last.
    #[arg(long, num_args = 3, value_names = ["R", "G", "B"])]
    std: Option<Vec<f32>>,
}

impl AugmentArgs {
    /// The augmentation, with the preset's values where an option was not given.
    ///
    /// # Errors
    /// [`crate::error::Error::Config`] naming a value that makes no sense.
    pub fn resolve(&self, preset: Preset) -> Result<AugmentConfig> {
        let mut config = match preset {
            Preset::Imagenet => AugmentConfig::imagenet(),
            Preset::Cifar => AugmentConfig::cifar(),
        };
        set(&mut config.image_size, self.image_size);
        set_all(&mut config.crop_scale, &self.crop_scale);
        set_all(&mut config.crop_ratio, &self.crop_ratio);
        set(&mut config.jitter_probability, self.jitter_probability);
        set(&mut config.brightness, self.brightness);
        set(&mut config.contrast, self.contrast);
        set(&mut config.saturation, self.saturation);
        set(&mut config.hue, self.hue);
        set(&mut config.grayscale_probability, self.grayscale_probability);
        set(&mut config.blur_probability, self.blur_probability);
        set_all(&mut config.blur_sigma, &self.blur_sigma);
        set(&mut config.flip_probability, self.flip_probability);
        set_all(&mut config.mean, &self.mean);
        set_all(&mut config.std, &self.std);
        config.validate()?;
        Ok(config)
    }
}

fn set<T>(field: &mut T, option: Option<T>) {
    if let Some(value) = option {
        *field = value;
    }
}

/// clap has checked the number of values.
fn set_all<T: Copy, const N: usize>(field: &mut [T; N], option: &Option<Vec<T>>) {
    if let Some(values) = option {
        field.iter_mut().zip(values).for_each(|(field, value)| *field = *value);
    }
}
