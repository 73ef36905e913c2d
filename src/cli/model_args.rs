//! Options of the network and of the method.

use clap::ArgAction;

use super::preset::Preset;
use crate::error::{Error, Result};
use crate::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use crate::nn::resnet::{Arch, Block, ResNet, Stem};
use crate::nn::simsiam::SimSiam;
use crate::ops::similarity::Kind;

/// Channels of the first stage of every named ResNet.
const WIDTH: usize = 64;

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Network")]
pub struct ModelArgs {
    /// The backbone [default: imagenet resnet50, cifar resnet18].
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Residual block of --arch custom.
    #[arg(long, value_enum)]
    block: Option<Block>,
    /// Blocks in each stage of --arch custom, e.g. 1,1,1,1.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',')]
    depths: Option<Vec<usize>>,
    /// Channels of the first stage of --arch custom [default: 64].
    #[arg(long, value_name = "N")]
    width: Option<usize>,
    /// Layers before the first block [default: that of the preset].
    #[arg(long, value_enum)]
    stem: Option<Stem>,
    /// Dimension of z and p, the outputs of projector and predictor.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    dim: usize,
    /// Hidden width of the projector [default: the backbone's features, 2048 for resnet50, 512 for resnet18].
    #[arg(long, value_name = "N")]
    projector_hidden: Option<usize>,
    /// Hidden width of the predictor [default: a quarter of --dim].
    #[arg(long, value_name = "N")]
    predictor_hidden: Option<usize>,
    /// Layers of the projector, 2 or 3 [default: imagenet 3, cifar 2].
    #[arg(long, value_name = "N")]
    projector_layers: Option<usize>,
    /// Give the projector's last batch norm gamma and beta, as the paper does and the reference does not.
    #[arg(long)]
    projector_out_affine: bool,

    /// Treat the target as a constant. Without it the solution collapses.
    #[arg(long, value_name = "true|false", default_value_t = true, action = ArgAction::Set, hide_possible_values = true,
          help_heading = "Method")]
    stop_gradient: bool,
    /// What predicts one view from the other.
    #[arg(long, value_enum, default_value_t, help_heading = "Method")]
    predictor: PredictorKind,
    /// Let both views predict each other; false: only view 1 predicts view 2.
    #[arg(long, value_name = "true|false", default_value_t = true, action = ArgAction::Set, hide_possible_values = true,
          help_heading = "Method")]
    symmetric: bool,
    /// How near the prediction is to its target.
    #[arg(long, value_enum, default_value_t, help_heading = "Method")]
    similarity: Kind,
    /// Where projector and predictor have batch norm.
    #[arg(long, value_enum, default_value_t, help_heading = "Method")]
    head_bn: HeadNorm,
}

impl ModelArgs {
    /// The model, with the preset's values where an option was not given.
    ///
    /// # Errors
    /// [`Error::Config`] when options do not fit together or a value makes no sense.
    pub fn resolve(&self, preset: Preset) -> Result<SimSiam> {
        let backbone = self.backbone(preset)?;
        let layers = match preset {
            Preset::Imagenet => 3,
            Preset::Cifar => 2,
        };
        // The feature dimension is a shift by the number of stages: not before that number is known to be small.
        backbone.validate()?;
        let heads = Heads {
            dim: self.dim,
            projector_hidden: self.projector_hidden.unwrap_or(backbone.feature_dim()),
            predictor_hidden: self.predictor_hidden.unwrap_or(self.dim.div_ceil(4)),
            projector_layers: self.projector_layers.unwrap_or(layers),
            projector_out_affine: self.projector_out_affine,
            projector_out_bias: OutBias::None,
            norm: self.head_bn,
            predictor: self.predictor,
        };
        let model = SimSiam {
            backbone,
            heads,
            similarity: self.similarity,
            stop_gradient: self.stop_gradient,
            symmetric: self.symmetric,
        };
        model.validate()?;
        Ok(model)
    }

    fn backbone(&self, preset: Preset) -> Result<ResNet> {
        let (arch, stem) = match preset {
            Preset::Imagenet => (Arch::Resnet50, Stem::Imagenet),
            Preset::Cifar => (Arch::Resnet18, Stem::Cifar),
        };
        let stem = self.stem.unwrap_or(stem);
        if let Some(named) = ResNet::named(self.arch.unwrap_or(arch), stem) {
            let shaping = [
                ("--block", self.block.is_some()),
                ("--depths", self.depths.is_some()),
                ("--width", self.width.is_some()),
            ];
            return match shaping.iter().find(|(_, given)| *given) {
                Some((option, _)) => Err(Error::config(*option, "shapes a network of your own, not a named one")
                    .with_hint("add --arch custom, or leave it out")),
                None => Ok(named),
            };
        }
        let missing = |option, example: &str| {
            Error::config(option, "expected with --arch custom, got none").with_hint(format!("e.g. {option} {example}"))
        };
        let block = self.block.ok_or_else(|| missing("--block", "basic"))?;
        let depths = self.depths.clone().ok_or_else(|| missing("--depths", "1,1,1,1"))?;
        Ok(ResNet { block, depths, width: self.width.unwrap_or(WIDTH), stem })
    }
}

/// What `--arch` calls the backbone; "custom" when it is none of the named ones.
pub fn arch_name(resnet: &ResNet) -> String {
    resnet.arch().to_string()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        model: ModelArgs,
    }

    fn resolve(args: &str, preset: Preset) -> Result<SimSiam> {
        let args = ["test"].into_iter().chain(args.split_whitespace());
        Cli::try_parse_from(args).unwrap_or_else(|e| panic!("{e}")).model.resolve(preset)
    }

    #[test]
    fn presets_are_the_papers_networks() {
        let imagenet = resolve("", Preset::Imagenet).unwrap();
        assert_eq!(imagenet.backbone, ResNet::named(Arch::Resnet50, Stem::Imagenet).unwrap());
        let reference_heads = Heads {
            dim: 2048,
            projector_hidden: 2048,
            predictor_hidden: 512,
            projector_layers: 3,
            projector_out_affine: false,
            projector_out_bias: OutBias::None,
            norm: HeadNorm::Default,
            predictor: PredictorKind::Mlp,
        };
        assert_eq!(imagenet.heads, reference_heads);
        assert!(imagenet.stop_gradient && imagenet.symmetric && imagenet.similarity == Kind::Cosine);

        let cifar = resolve("", Preset::Cifar).unwrap();
        assert_eq!(cifar.backbone, ResNet::named(Arch::Resnet18, Stem::Cifar).unwrap());
        assert_eq!(cifar.heads, Heads { projector_hidden: 512, projector_layers: 2, ..reference_heads });
    }

    #[test]
    fn backbones_have_the_names_of_the_option() {
        for (args, name) in [
            ("--arch resnet101 --stem cifar", "resnet101"),
            ("--arch custom --block bottleneck --depths 3,4,6,3", "resnet50"),
            ("--arch custom --block bottleneck --depths 3,4,6,3 --width 32", "custom"),
        ] {
            assert_eq!(arch_name(&resolve(args, Preset::Imagenet).unwrap().backbone), name);
        }
    }

    #[test]
    fn every_option_arrives() {
        let args = "--arch custom --block bottleneck --depths 1,2,3 --width 16 --stem cifar --dim 96 --projector-hidden 80 \
                    --predictor-hidden 20 --projector-layers 2 --projector-out-affine --stop-gradient false \
                    --predictor fixed-random --symmetric false --similarity softmax-xent --head-bn hidden";
        let expected = SimSiam {
            backbone: ResNet { block: Block::Bottleneck, depths: vec![1, 2, 3], width: 16, stem: Stem::Cifar },
            heads: Heads {
                dim: 96,
                projector_hidden: 80,
                predictor_hidden: 20,
                projector_layers: 2,
                projector_out_affine: true,
                projector_out_bias: OutBias::None,
                norm: HeadNorm::Hidden,
                predictor: PredictorKind::FixedRandom,
            },
            similarity: Kind::SoftmaxXent,
            stop_gradient: false,
            symmetric: false,
        };
        assert_eq!(resolve(args, Preset::Imagenet).unwrap(), expected);
    }

    #[test]
    fn combinations_that_make_no_sense_are_named() {
        let cases = [
            ("--arch custom", "--block: expected with --arch custom, got none; hint: e.g. --block basic"),
            (
                "--arch custom --block basic",
                "--depths: expected with --arch custom, got none; hint: e.g. --depths 1,1,1,1",
            ),
            ("--width 32", "--width: shapes a network of your own, not a named one; hint: add --arch custom"),
            ("--arch resnet18 --depths 2,2", "--depths: shapes a network of your own"),
            (
                "--arch custom --block basic --depths 1,0",
                "--depths: expected 1 to 8 stages of 1 to 1000 blocks, got [1, 0]",
            ),
            ("--arch custom --block basic --depths 1,1,1,1,1,1,1,1,1", "--depths: expected 1 to 8 stages"),
            ("--arch custom --block basic --depths 1 --width 0", "--width: expected 1 to 4096 channels, got 0"),
            ("--projector-layers 4", "--projector-layers: expected 2 or 3, got 4"),
            ("--dim 0", "--dim: expected 1 to 65536, got 0"),
        ];
        for (args, expected) in cases {
            let message = resolve(args, Preset::Imagenet).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{args}: {message}");
        }
    }
}
