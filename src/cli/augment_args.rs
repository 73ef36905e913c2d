//! The options of the augmentation, shared by the commands that make views.

use clap::ValueEnum;

use super::preset::Preset;
use crate::data::augment::{AugmentConfig, BlurKernel};
use crate::error::Result;

/// What a blur of some sigma is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kernel {
    /// As PIL: the reference recipe.
    Pil,
    /// As torchvision's tensor transform.
    Gaussian,
}

/// Options of the views. What is not given is the preset's.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Augmentation")]
pub struct AugmentArgs {
    /// Height and width of a view in pixels.
    #[arg(long, value_name = "PIXELS")]
    pub image_size: Option<usize>,
    /// Range of the crop's area as a fraction of the image's.
    #[arg(long, value_name = "LOW,HIGH", value_parser = numbers::<f64, 2>)]
    pub crop_scale: Option<[f64; 2]>,
    /// Range of the crop's width / height.
    #[arg(long, value_name = "LOW,HIGH", value_parser = numbers::<f64, 2>)]
    pub crop_ratio: Option<[f64; 2]>,
    /// Probability of the colour jitter.
    #[arg(long, value_name = "P")]
    pub jitter_probability: Option<f64>,
    /// Brightness is scaled by 1 - B to 1 + B.
    #[arg(long, value_name = "B")]
    pub brightness: Option<f64>,
    /// Contrast is scaled by 1 - C to 1 + C.
    #[arg(long, value_name = "C")]
    pub contrast: Option<f64>,
    /// Saturation is scaled by 1 - S to 1 + S.
    #[arg(long, value_name = "S")]
    pub saturation: Option<f64>,
    /// The hue turns by up to this fraction of the colour circle.
    #[arg(long, value_name = "FRACTION")]
    pub hue: Option<f64>,
    /// Probability that a view turns grey.
    #[arg(long, value_name = "P")]
    pub grayscale_probability: Option<f64>,
    /// Probability of the Gaussian blur.
    #[arg(long, value_name = "P")]
    pub blur_probability: Option<f64>,
    /// Range of the blur's sigma in pixels.
    #[arg(long, value_name = "LOW,HIGH", value_parser = numbers::<f64, 2>)]
    pub blur_sigma: Option<[f64; 2]>,
    /// What a blur of some sigma is.
    #[arg(long, value_enum)]
    pub blur_kernel: Option<Kernel>,
    /// Probability of a left-right flip.
    #[arg(long, value_name = "P")]
    pub flip_probability: Option<f64>,
    /// Mean of the channels in 0..1, subtracted from views.
    #[arg(long, value_name = "R,G,B", value_parser = numbers::<f32, 3>)]
    pub mean: Option<[f32; 3]>,
    /// Standard deviation of the channels, which views are divided by.
    #[arg(long, value_name = "R,G,B", value_parser = numbers::<f32, 3>)]
    pub std: Option<[f32; 3]>,
}

impl AugmentArgs {
    /// The checked configuration, with the preset's values where an option was not given.
    ///
    /// # Errors
    /// [`crate::error::Error::Config`] naming the option that makes no sense.
    pub fn resolve(&self, preset: Preset) -> Result<AugmentConfig> {
        let preset = preset.augment();
        let kernel = self.blur_kernel.map(|kernel| match kernel {
            Kernel::Pil => BlurKernel::Pil,
            Kernel::Gaussian => BlurKernel::Gaussian,
        });
        let config = AugmentConfig {
            image_size: self.image_size.unwrap_or(preset.image_size),
            crop_scale: self.crop_scale.unwrap_or(preset.crop_scale),
            crop_ratio: self.crop_ratio.unwrap_or(preset.crop_ratio),
            jitter_probability: self.jitter_probability.unwrap_or(preset.jitter_probability),
            brightness: self.brightness.unwrap_or(preset.brightness),
            contrast: self.contrast.unwrap_or(preset.contrast),
            saturation: self.saturation.unwrap_or(preset.saturation),
            hue: self.hue.unwrap_or(preset.hue),
            grayscale_probability: self.grayscale_probability.unwrap_or(preset.grayscale_probability),
            blur_probability: self.blur_probability.unwrap_or(preset.blur_probability),
            blur_sigma: self.blur_sigma.unwrap_or(preset.blur_sigma),
            blur_kernel: kernel.unwrap_or(preset.blur_kernel),
            flip_probability: self.flip_probability.unwrap_or(preset.flip_probability),
            mean: self.mean.unwrap_or(preset.mean),
            std: self.std.unwrap_or(preset.std),
        };
        config.validate()?;
        Ok(config)
    }
}

/// Parses exactly `N` numbers with commas between them.
pub(super) fn numbers<T: std::str::FromStr, const N: usize>(text: &str) -> Result<[T; N], String> {
    let parsed: Option<Vec<T>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    let exactly = parsed.and_then(|numbers| numbers.try_into().ok());
    exactly.ok_or_else(|| format!("expected {N} numbers with commas between them"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[arg(long, value_enum, default_value_t)]
        preset: Preset,
        #[command(flatten)]
        augment: AugmentArgs,
    }

    fn parse(text: &str) -> Result<AugmentConfig, String> {
        let arguments = ["command"].into_iter().chain(text.split_whitespace());
        let command = Command::try_parse_from(arguments).map_err(|e| e.to_string())?;
        command.augment.resolve(command.preset).map_err(|e| e.to_string())
    }

    #[test]
    fn nothing_given_is_the_preset() {
        assert_eq!(parse("").unwrap(), AugmentConfig::imagenet());
        assert_eq!(parse("--preset cifar").unwrap(), AugmentConfig::cifar());
    }

    #[test]
    fn every_option_reaches_its_parameter() {
        let text = "--image-size 48 --crop-scale 0.1,0.9 --crop-ratio 0.5,2 --jitter-probability 0.01 --brightness 0.02 \
                    --contrast 0.03 --saturation 0.04 --hue 0.05 --grayscale-probability 0.06 --blur-probability 0.07 \
                    --blur-sigma 0.3,0.6 --blur-kernel gaussian --flip-probability 0.08 --mean 0.1,0.2,0.3 --std 4,5,6";
        let expected = AugmentConfig {
            image_size: 48,
            crop_scale: [0.1, 0.9],
            crop_ratio: [0.5, 2.0],
            jitter_probability: 0.01,
            brightness: 0.02,
            contrast: 0.03,
            saturation: 0.04,
            hue: 0.05,
            grayscale_probability: 0.06,
            blur_probability: 0.07,
            blur_sigma: [0.3, 0.6],
            blur_kernel: BlurKernel::Gaussian,
            flip_probability: 0.08,
            mean: [0.1, 0.2, 0.3],
            std: [4.0, 5.0, 6.0],
        };
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn bad_options_are_named() {
        for (text, expected) in [
            ("--crop-scale 0.2", "expected 2 numbers"),
            ("--mean 0.1,0.2", "expected 3 numbers"),
            ("--crop-scale 0.9,0.2", "--crop-scale: expected LOW,HIGH"),
            ("--hue 0.7", "--hue: expected a number from 0 to 0.5, got 0.7"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }
}
