//! ResNet v1.5 with torchvision's names: the stride sits on the 3x3 convolution of a bottleneck (He et al. 2016).

use crate::error::{Error, Result};
use crate::graph::ValueId;
use crate::nn::builder::{Builder, Mode, Norm};
use crate::ops::pool::{GlobalAvgPool, MaxPool};

/// The residual block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Block {
    /// Two 3x3 convolutions.
    Basic,
    /// 1x1, 3x3, 1x1, with four times the channels at the end.
    Bottleneck,
}

impl Block {
    /// Output channels as a multiple of the block's width.
    pub fn expansion(self) -> usize {
        match self {
            Block::Basic => 1,
            Block::Bottleneck => 4,
        }
    }
}

/// The layers before the first block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Stem {
    /// 7x7 stride 2, then 3x3 max pooling with stride 2.
    Imagenet,
    /// 3x3 stride 1, no pooling: for images of about 32 pixels.
    Cifar,
}

/// Channels of an image: red, green, blue.
const IMAGE_CHANNELS: usize = 3;

/// Architecture names of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// ResNet-18.
    Resnet18,
    /// ResNet-34.
    Resnet34,
    /// ResNet-50.
    Resnet50,
    /// ResNet-101.
    Resnet101,
    /// `--block`, `--depths` and `--width` say what.
    Custom,
}

/// A ResNet.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResNet {
    /// The block.
    pub block: Block,
    /// Blocks in each stage; stages after the first halve the resolution and double the width.
    pub depths: Vec<usize>,
    /// Width of the first stage; 64 is standard.
    pub width: usize,
    /// What comes before the first block.
    pub stem: Stem,
}

impl ResNet {
    /// One of the named networks; `None` for [`Arch::Custom`].
    pub fn named(arch: Arch, stem: Stem) -> Option<ResNet> {
        let (block, depths) = match arch {
            Arch::Resnet18 => (Block::Basic, [2, 2, 2, 2]),
            Arch::Resnet34 => (Block::Basic, [3, 4, 6, 3]),
            Arch::Resnet50 => (Block::Bottleneck, [3, 4, 6, 3]),
            Arch::Resnet101 => (Block::Bottleneck, [3, 4, 23, 3]),
            Arch::Custom => return None,
        };
        Some(ResNet { block, depths: depths.to_vec(), width: 64, stem })
    }

    /// Checks what a user can get wrong.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn validate(&self) -> Result<()> {
        if !(1..=8).contains(&self.depths.len()) || !self.depths.iter().all(|depth| (1..=1000).contains(depth)) {
            let what = format!("expected 1 to 8 stages of 1 to 1000 blocks, got {:?}", self.depths);
            return Err(Error::config("--depths", what));
        }
        if self.width == 0 || self.width > 4096 {
            return Err(Error::config("--width", format!("expected 1 to 4096 channels, got {}", self.width)));
        }
        Ok(())
    }

    /// Dimension of the pooled feature.
    pub fn feature_dim(&self) -> usize {
        (self.width << (self.depths.len() - 1)) * self.block.expansion()
    }

    /// Records the network from images `[n][h][w][3]`, or with channels of zeros after them, to pooled features `[n][feature_dim]`, names under `prefix`.
    ///
    /// # Errors
    /// Images too small for the network.
    pub fn record(&self, b: &mut Builder<'_>, prefix: &str, images: ValueId) -> Result<ValueId> {
        self.record_frozen(b, prefix, images, 0)
    }

    /// The parts that can be frozen, from the images on: the stem, which goes by its first convolution's name, and the stages.
    pub fn layers(&self) -> Vec<String> {
        let stages = (1..=self.depths.len()).map(|stage| format!("layer{stage}"));
        ["conv1".to_string()].into_iter().chain(stages).collect()
    }

    /// As [`ResNet::record`]; the first `frozen` of [`ResNet::layers`] are constants, with batch norm in evaluation mode.
    ///
    /// # Errors
    /// As [`ResNet::record`].
    pub fn record_frozen(&self, b: &mut Builder<'_>, prefix: &str, images: ValueId, frozen: usize) -> Result<ValueId> {
        let mode = b.mode;
        let mode_of = |layer: usize| if layer < frozen { Mode::Eval } else { mode };
        b.mode = mode_of(0);
        let mut x = self.stem(b, prefix, images)?;
        for (stage, &depth) in self.depths.iter().enumerate() {
            b.mode = mode_of(stage + 1);
            for i in 0..depth {
                let name = format!("{prefix}layer{}.{i}", stage + 1);
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                x = self.block(b, &name, x, self.width << stage, stride)?;
            }
        }
        b.mode = mode;
        b.tape.scoped(&format!("{prefix}avgpool"), |tape| tape.record_one(GlobalAvgPool, &[x]))
    }

    fn stem(&self, b: &mut Builder<'_>, prefix: &str, images: ValueId) -> Result<ValueId> {
        let shape = if self.stem == Stem::Imagenet { [7, 2, 3] } else { [3, 1, 1] };
        let x = b.conv_of(&format!("{prefix}conv1"), images, [IMAGE_CHANNELS, self.width], shape)?;
        let x = b.batch_norm(&format!("{prefix}bn1"), x, Norm::RELU)?;
        match self.stem {
            Stem::Cifar => Ok(x),
            Stem::Imagenet => {
                let pool = MaxPool { kernel: 3, stride: 2, padding: 1 };
                b.tape.scoped(&format!("{prefix}maxpool"), |tape| tape.record_one(pool, &[x]))
            }
        }
    }

    /// A residual block; the last batch norm adds the shortcut and applies the ReLU, and starts with gamma 0.
    fn block(&self, b: &mut Builder<'_>, name: &str, x: ValueId, width: usize, stride: usize) -> Result<ValueId> {
        let c_out = width * self.block.expansion();
        let convs: &[(usize, [usize; 3])] = match self.block {
            Block::Basic => &[(width, [3, stride, 1]), (c_out, [3, 1, 1])],
            Block::Bottleneck => &[(width, [1, 1, 0]), (width, [3, stride, 1]), (c_out, [1, 1, 0])],
        };
        let (last, inner) = convs.split_last().unwrap_or_else(|| unreachable!("every block has convolutions"));
        let mut y = x;
        for (i, (channels, shape)) in inner.iter().enumerate() {
            y = b.conv(&format!("{name}.conv{}", i + 1), y, *channels, *shape)?;
            y = b.batch_norm(&format!("{name}.bn{}", i + 1), y, Norm::RELU)?;
        }
        let i = convs.len();
        y = b.conv(&format!("{name}.conv{i}"), y, last.0, last.1)?;
        let shortcut = self.shortcut(b, name, x, c_out, stride)?;
        b.batch_norm(&format!("{name}.bn{i}"), y, Norm { residual: Some(shortcut), gamma: 0.0, ..Norm::RELU })
    }

    fn shortcut(&self, b: &mut Builder<'_>, name: &str, x: ValueId, c_out: usize, stride: usize) -> Result<ValueId> {
        if stride == 1 && b.tape.desc(x).shape.channels() == c_out {
            return Ok(x);
        }
        let x = b.conv(&format!("{name}.downsample.0"), x, c_out, [1, stride, 0])?;
        b.batch_norm(&format!("{name}.downsample.1"), x, Norm::PLAIN)
    }
}
