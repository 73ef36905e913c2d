//! ResNet v1.5 with torchvision's names: the stride sits on the 3x3 convolution of a bottleneck (He et al. 2016).

use clap::ValueEnum;

use crate::error::{Error, Result};
use crate::graph::ValueId;
use crate::nn::builder::{Builder, Mode, Norm};
use crate::ops::conv2d::{Conv2d, stem::image_channels};
use crate::ops::pool::GlobalAvgPool;
use crate::tensor::DType;

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

impl Stem {
    /// Kernel, stride and padding of its convolution.
    fn convolution(self) -> [usize; 3] {
        match self {
            Stem::Imagenet => [7, 2, 3],
            Stem::Cifar => [3, 1, 1],
        }
    }
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

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_possible_value().map_or(Ok(()), |value| f.write_str(value.get_name()))
    }
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

    /// What `--arch` calls it: [`Arch::Custom`] when it is none of the named ones.
    pub fn arch(&self) -> Arch {
        let is_it = |arch: &&Arch| ResNet::named(**arch, self.stem).as_ref() == Some(self);
        Arch::value_variants().iter().find(is_it).copied().unwrap_or(Arch::Custom)
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

    /// Channels that the network sees images in where they are padded, with activations of `dtype`.
    pub fn padded_channels(&self, dtype: DType) -> usize {
        let [kernel, stride, padding] = self.stem.convolution();
        image_channels(&Conv2d::new([stride; 2], [padding; 2]), [kernel; 2], self.width, dtype)
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
        let channels = [IMAGE_CHANNELS, self.width];
        let x = b.conv_of(&format!("{prefix}conv1"), images, channels, self.stem.convolution())?;
        let norm = format!("{prefix}bn1");
        match self.stem {
            Stem::Cifar => b.batch_norm(&norm, x, Norm::RELU),
            Stem::Imagenet => b.batch_norm_max_pool([&norm, &format!("{prefix}maxpool")], x),
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
        let (conv, norm) = (format!("{name}.conv{}", convs.len()), format!("{name}.bn{}", convs.len()));
        let shortcut = Shortcut::new(b, name, x, c_out, stride)?;
        let mut y = x;
        for (i, (channels, shape)) in inner.iter().enumerate() {
            y = b.conv(&format!("{name}.conv{}", i + 1), y, *channels, *shape)?;
            let means = i + 1 == inner.len() && b.is_gram(&conv, [*channels, last.0], [last.1[0], last.1[2]]);
            y = b.batch_norm(&format!("{name}.bn{}", i + 1), y, Norm { means, ..Norm::RELU })?;
        }
        let y = b.conv_to_norm(&conv, y, last.0, last.1)?;
        match shortcut {
            Shortcut::Identity(x) => b.norm_of([&conv, &norm], y, Norm { residual: Some(x), ..Norm::LAST }),
            Shortcut::Projection { x, stride } => {
                let names = [format!("{name}.downsample.0"), format!("{name}.downsample.1")];
                let r = b.conv_to_norm(&names[0], x, c_out, [1, stride, 0])?;
                b.norm_of_pair([[&conv, &norm], [&names[0], &names[1]]], y, r)
            }
        }
    }
}

/// The way around a block.
#[derive(Debug, Clone, Copy)]
enum Shortcut {
    /// Its input as it is.
    Identity(ValueId),
    /// A 1x1 convolution of x with a stride, and its batch norm.
    Projection { x: ValueId, stride: usize },
}

impl Shortcut {
    /// Of a block with input x and so many channels at its end. The pixels that a projection reads are picked here, before all
    /// else of the block where they are picked at all: the gradient comes to them last, and is added where they were.
    fn new(b: &mut Builder<'_>, name: &str, x: ValueId, c_out: usize, stride: usize) -> Result<Shortcut> {
        let c_in = b.tape.desc(x).shape.channels();
        if stride == 1 && c_in == c_out {
            return Ok(Shortcut::Identity(x));
        }
        let conv = format!("{name}.downsample.0");
        match b.is_gram(&conv, [c_in, c_out], [1, 0]) {
            true => Ok(Shortcut::Projection { x: b.subsample(&conv, x, stride)?, stride: 1 }),
            false => Ok(Shortcut::Projection { x, stride }),
        }
    }
}
