//! `--preset`: which recipe the defaults of all other options come from.

use crate::data::augment::AugmentConfig;

/// A recipe of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Preset {
    /// ResNet-50 on 224 pixels, 100 epochs.
    #[default]
    Imagenet,
    /// ResNet-18 with a small stem on 32 pixels, 800 epochs, no blur.
    Cifar,
}

impl Preset {
    /// Height and width of a view in pixels.
    pub fn image_size(self) -> usize {
        match self {
            Preset::Imagenet => 224,
            Preset::Cifar => 32,
        }
    }

    /// The views.
    pub fn augment(self) -> AugmentConfig {
        match self {
            Preset::Imagenet => AugmentConfig::imagenet(),
            Preset::Cifar => AugmentConfig::cifar(),
        }
    }
}
