//! `import`: what is in a file of weights, and the same as a checkpoint. Also `train --init`, which begins with such a file.

use std::path::{Path, PathBuf};

use super::output::print;
use crate::data::writer::refuse_existing;
use crate::error::{Error, Result};
use crate::import::{self, Foreign, Network, Origin, Report, Weights};
use crate::nn::resnet::{Arch, ResNet};
use crate::nn::simsiam::SimSiam;
use crate::tensor::safetensors::NamedTensors;
use crate::train::checkpoint;
use crate::train::config::InitFrom;

#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// File of torch.save (.pth, .pth.tar, .pt, .bin), safetensors file, checkpoint or run directory of this engine. Nothing in
    /// it is executed.
    #[arg(value_name = "FILE")]
    source: PathBuf,
    /// Write a checkpoint for `train --init`, with momenta and epoch where the file has them.
    #[arg(long, value_name = "CHECKPOINT")]
    out: Option<PathBuf>,
    /// The backbone that is expected [default: the one that the file holds].
    #[arg(long, value_enum)]
    arch: Option<Arch>,
    /// Leave projector, predictor and momenta out.
    #[arg(long)]
    backbone_only: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Replace the output if it exists.
    #[arg(long, requires = "out")]
    force: bool,
}

pub fn run(args: &ImportArgs) -> Result<()> {
    if let Some(out) = &args.out {
        refuse_existing(out, args.force)?;
    }
    let foreign = import::open(&args.source)?;
    let expected = args.arch.map(|arch| expected(&foreign, arch)).transpose()?;
    let Weights { tensors, report, .. } = import::fit(&foreign, expected.as_ref(), args.backbone_only)?;
    print(|out| match args.json {
        true => writeln!(out, "{:#}", serde_json::to_value(&report)?),
        false => report.print(out),
    })?;
    if !report.fits() {
        return Err(misfit(&foreign, &report));
    }
    let Some(out) = &args.out else { return Ok(()) };
    let Origin { step, epoch, .. } = foreign.origin;
    let origin = Origin { step, epoch, optimiser: report.optimiser };
    checkpoint::save(out, &tensors, &origin)?;
    if !args.json {
        let epoch = epoch.filter(|_| report.momenta > 0).map_or("", |_| ", or --continue it");
        print(|stdout| {
            writeln!(stdout, "\nwrote {}; begin a run with it{epoch}:", out.display())?;
            writeln!(stdout, "  simsiam-engine train DATA --run DIR --init {} {}", out.display(), report.options)
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
