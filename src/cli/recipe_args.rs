//! Options of the optimiser and its schedule.

use clap::ArgAction;

use super::preset::Preset;
use crate::train::config::Recipe;

/// Source images per step of both recipes.
pub const BATCH: usize = 512;

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Recipe")]
pub struct RecipeArgs {
    /// Epochs of the whole run [default: imagenet 100, cifar 800].
    #[arg(long, value_name = "N")]
    epochs: Option<u64>,
    /// Source images per step; each gives two views.
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch: usize,
    /// Learning rate at batch 256; it grows in proportion to --batch [default: imagenet 0.05, cifar 0.03].
    #[arg(long, value_name = "LR")]
    base_lr: Option<f64>,
    /// Epochs of linear warm-up; the paper uses 10 for batches from 1024.
    #[arg(long, value_name = "N", default_value_t = 0)]
    warmup_epochs: u64,
    /// When the learning rate follows its cosine: at every epoch, as the reference does, or at every step.
    #[arg(long, value_enum, default_value_t = LrDecay::Epoch)]
    lr_decay: LrDecay,
    /// Keep the predictor at the start learning rate, as the reference does.
    #[arg(long, value_name = "true|false", default_value_t = true, action = ArgAction::Set, hide_possible_values = true)]
    fix_predictor_lr: bool,
    /// Momentum of SGD.
    #[arg(long, default_value_t = 0.9)]
    momentum: f64,
    /// Weight decay, on all trainable parameters [default: imagenet 1e-4, cifar 5e-4].
    #[arg(long, value_name = "DECAY")]
    weight_decay: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LrDecay {
    Epoch,
    Step,
}

impl RecipeArgs {
    /// The recipe, with the preset's values where an option was not given.
    pub fn resolve(&self, preset: Preset) -> Recipe {
        let (epochs, base_lr, weight_decay) = match preset {
            Preset::Imagenet => (100, 0.05, 1e-4),
            Preset::Cifar => (800, 0.03, 5e-4),
        };
        Recipe {
            epochs: self.epochs.unwrap_or(epochs),
            batch: self.batch,
            base_lr: self.base_lr.unwrap_or(base_lr),
            warmup_epochs: self.warmup_epochs,
            per_step: self.lr_decay == LrDecay::Step,
            fix_predictor_lr: self.fix_predictor_lr,
            momentum: self.momentum,
            weight_decay: self.weight_decay.unwrap_or(weight_decay),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        recipe: RecipeArgs,
    }

    fn resolve(args: &[&str], preset: Preset) -> Recipe {
        Cli::try_parse_from([&["test"], args].concat()).unwrap().recipe.resolve(preset)
    }

    #[test]
    fn presets_are_the_papers_recipes() {
        let imagenet = Recipe {
            epochs: 100,
            batch: 512,
            base_lr: 0.05,
            warmup_epochs: 0,
            per_step: false,
            fix_predictor_lr: true,
            momentum: 0.9,
            weight_decay: 1e-4,
        };
        assert_eq!(resolve(&[], Preset::Imagenet), imagenet);
        let cifar = Recipe { epochs: 800, base_lr: 0.03, weight_decay: 5e-4, ..imagenet };
        assert_eq!(resolve(&[], Preset::Cifar), cifar);
    }

    #[test]
    fn options_win_over_the_preset() {
        let args = "--epochs 3 --batch 64 --base-lr 0.1 --warmup-epochs 1 --lr-decay step --fix-predictor-lr false \
                    --momentum 0.8 --weight-decay 0.01";
        let expected = Recipe {
            epochs: 3,
            batch: 64,
            base_lr: 0.1,
            warmup_epochs: 1,
            per_step: true,
            fix_predictor_lr: false,
            momentum: 0.8,
            weight_decay: 0.01,
        };
        assert_eq!(resolve(&args.split_whitespace().collect::<Vec<_>>(), Preset::Cifar), expected);
    }
}
