//! `import`: what is in a file of weights, and the same as a checkpoint. Also `train --init`, which begins with such a file.

use std::path::{Path, PathBuf};

use super::augment_args::numbers;
use super::output::print;
use super::preset::Preset;
use crate::data::augment::AugmentConfig;
use crate::data::writer::refuse_existing;
use crate::error::{Error, Result};
use crate::import::{self, Foreign, Format, Network, Origin, Report, Weights};
use crate::nn::resnet::{Arch, ResNet, Stem};
use crate::nn::simsiam::SimSiam;
use crate::tensor::safetensors::NamedTensors;
use crate::train::checkpoint;
use crate::train::config::InitFrom;
use crate::train::trained::{self, Imported};

#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// File of torch.save (.pth, .pth.tar, .pt, .bin), safetensors file, checkpoint or run directory of this engine. Nothing in
    /// it is executed.
    #[arg(value_name = "FILE")]
    source: PathBuf,
    /// Write a checkpoint that stands alone, for `train --init`, `eval`, `embed`, `finetune` and `export`; with momenta and
    /// epoch where the file has them.
    #[arg(long, value_name = "CHECKPOINT")]
    out: Option<PathBuf>,
    /// The backbone that is expected [default: the one that the file holds].
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Leave projector, predictor and momenta out.
    #[arg(long)]
    backbone_only: bool,
    #[command(flatten)]
    images: ImageArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Replace the output if it exists.
    #[arg(long, requires = "out")]
    force: bool,
}

/// The images that the network was trained on, which no file says.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Images of --out")]
struct ImageArgs {
    /// Height and width of an image in pixels [default: those of a run; else 224, with a stem for small images 32].
    #[arg(long, value_name = "PIXELS", requires = "out")]
    image_size: Option<usize>,
    /// Mean of the channels in 0..1 [default: that of a run; else ImageNet's, with a stem for small images CIFAR-10's].
    #[arg(long, value_name = "R,G,B", value_parser = numbers::<f32, 3>, requires = "out")]
    mean: Option<[f32; 3]>,
    /// Standard deviation of the channels [default: as for the mean].
    #[arg(long, value_name = "R,G,B", value_parser = numbers::<f32, 3>, requires = "out")]
    std: Option<[f32; 3]>,
}

impl ImageArgs {
    /// The images of a network with this stem from a file.
    fn resolve(&self, foreign: &Foreign, stem: Stem) -> Result<AugmentConfig> {
        let is_own = foreign.format == Format::Checkpoint;
        let defaults = match (is_own.then(|| trained::open(&foreign.path).ok()).flatten(), stem) {
            (Some(trained), _) => trained.augment,
            (None, Stem::Imagenet) => Preset::Imagenet.augment(),
            (None, Stem::Cifar) => Preset::Cifar.augment(),
        };
        let augment = AugmentConfig {
            image_size: self.image_size.unwrap_or(defaults.image_size),
            mean: self.mean.unwrap_or(defaults.mean),
            std: self.std.unwrap_or(defaults.std),
            ..defaults
        };
        augment.validate()?;
        Ok(augment)
    }
}

pub fn run(args: &ImportArgs) -> Result<()> {
    if let Some(out) = &args.out {
        refuse_existing(out, args.force)?;
    }
    let foreign = import::open(&args.source)?;
    let expected = args.arch.map(|arch| expected(&foreign, arch)).transpose()?;
    let Weights { tensors, report, network } = import::fit(&foreign, expected.as_ref(), args.backbone_only)?;
    print(|out| match args.json {
        true => writeln!(out, "{:#}", serde_json::to_value(&report)?),
        false => report.print(out),
    })?;
    if !report.fits() {
        return Err(misfit(&foreign, &report));
    }
    let Some(out) = &args.out else { return Ok(()) };
    let (model, augment) = (network.model(), args.images.resolve(&foreign, network.backbone.stem)?);
    let file = foreign.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let imported = Some(Imported { file, blake3: digest(&foreign.path)?, model, augment });
    let Origin { step, epoch, .. } = foreign.origin;
    let origin = Origin { step, epoch, optimiser: report.optimiser, imported };
    checkpoint::save(out, &tensors, &origin)?;
    if !args.json {
        let epoch = epoch.filter(|_| report.momenta > 0).map_or("", |_| ", or --continue it");
        print(|stdout| {
            writeln!(stdout, "\nwrote {}; begin a run with it{epoch}:", out.display())?;
            writeln!(stdout, "  simsiam-engine train DATA --run DIR --init {} {}", out.display(), report.options)?;
            writeln!(stdout, "or use it as it is, in place of a run: eval, embed, finetune, export")
        })?;
    }
    Ok(())
}

/// The network of the file, with another backbone.
fn expected(foreign: &Foreign, arch: Arch) -> Result<Network> {
    let (_, network) = import::fit::detect(foreign)?;
    let backbone = ResNet::named(arch, network.backbone.stem).unwrap_or_else(|| network.backbone.clone());
    Ok(Network { backbone, ..network })
}

fn misfit(foreign: &Foreign, report: &Report) -> Error {
    let what = format!("does not fit {}: {}", report.network, report.faults());
    Error::format(&foreign.path, None, what)
        .with_hint(format!("what the file holds is asked for with {}", report.options))
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Start")]
pub struct InitArgs {
    /// Begin with the weights of FILE: of torchvision, timm, SimSiam's reference release or this engine (whatever `import` reads).
    /// Heads that it does not have are drawn.
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    init: Option<PathBuf>,
    /// Take only the backbone of --init.
    #[arg(long, requires = "init", conflicts_with = "continue")]
    init_backbone: bool,
    /// Go on where the training of --init stopped: with its momenta, from its epoch.
    #[arg(long, requires = "init")]
    r#continue: bool,
}

/// What a run begins with.
pub struct Start {
    /// All tensors of its first checkpoint.
    pub tensors: NamedTensors,
    /// Where they come from, for the run's configuration.
    pub from: InitFrom,
    /// What was taken.
    pub report: Report,
}

impl InitArgs {
    /// The tensors of --init for `model`, which gets the frozen bias of the reference's files where there is one.
    ///
    /// # Errors
    /// Files that cannot be read, do not fit, or cannot be continued.
    pub fn start(&self, model: &mut SimSiam, seed: u64) -> Result<Option<Start>> {
        let Some(path) = &self.init else { return Ok(None) };
        let foreign = import::open(path)?;
        if !self.init_backbone {
            import::adopt_bias(&foreign, model)?;
        }
        let asked = Network { backbone: model.backbone.clone(), heads: Some(model.heads.clone()) };
        let Weights { tensors, report, .. } = import::fit(&foreign, Some(&asked), self.init_backbone)?;
        if !report.fits() {
            let misfit = misfit(&foreign, &report);
            let only_heads = import::fit(&foreign, Some(&asked), true)?.report.fits();
            let hint = format!("add {}, or take only the backbone with --init-backbone", report.options);
            return Err(if only_heads { misfit.with_hint(hint) } else { misfit });
        }
        let continued_after = self.r#continue.then(|| epochs_done(&foreign, &report)).transpose()?;
        let file = foreign.path.canonicalize().map_err(Error::io("open", &foreign.path))?;
        let from = InitFrom { blake3: digest(&file)?, file, backbone_only: self.init_backbone, continued_after };
        let tensors = import::complete(tensors, model, seed, self.r#continue)?;
        Ok(Some(Start { tensors, from, report }))
    }
}

fn epochs_done(foreign: &Foreign, report: &Report) -> Result<u64> {
    let refuse = |what: &str| Err(Error::config("--continue", format!("{} {what}", foreign.path.display())));
    match (report.epoch, report.momenta) {
        (None, _) if foreign.origin.step > 0 => {
            refuse("belongs to a run").map_err(|e| e.with_hint("continue that with --resume"))
        }
        (None, _) => {
            refuse("does not say how many epochs it has behind it").map_err(|e| e.with_hint("leave --continue out"))
        }
        (Some(_), 0) => refuse("has no momenta").map_err(|e| e.with_hint("leave --continue out")),
        (Some(epoch), _) => Ok(epoch),
    }
}

fn digest(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    hasher.update_reader(file).map_err(Error::io("read", path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

impl Start {
    /// Says what was taken.
    pub fn describe(&self) {
        let Report { file, matched, momenta, .. } = &self.report;
        let heads = match self.report.missing_in_heads().len() {
            0 => String::new(),
            drawn => format!("; {drawn} tensors of the heads are drawn"),
        };
        let after = self
            .from
            .continued_after
            .map_or(String::new(), |epoch| format!(", {momenta} momenta, after epoch {epoch}"));
        eprintln!("begins with {file}: {matched} tensors{after}{heads}");
    }
}
