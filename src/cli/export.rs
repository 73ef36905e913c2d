//! `export`: the trained network as a file that other programs load, with a model card.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use indicatif::HumanCount;

use super::output::print;
use crate::atomic::write_atomic;
use crate::data::writer::refuse_existing;
use crate::error::{Error, Result};
use crate::export::card::{card, snippet};
use crate::export::source::Source;
use crate::export::{Format, write};
use crate::tensor::safetensors;

#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// Run directory, whose newest checkpoint is taken, a checkpoint file in one, or a file of `import --out`.
    #[arg(value_name = "RUN_OR_CHECKPOINT")]
    source: PathBuf,
    /// File to write. Its model card lies beside it, with the ending .md.
    out: PathBuf,
    /// Whom the file is for.
    #[arg(long = "to", value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
    /// Write projector and predictor too (--to safetensors or onnx).
    #[arg(long)]
    heads: bool,
    /// Also write random images and what the engine makes of them, for tools/check_export.py.
    #[arg(long, value_name = "FILE")]
    features: Option<PathBuf>,
    /// Replace the files if they exist.
    #[arg(long)]
    force: bool,
}

impl ExportArgs {
    /// The backbone of `source` for torchvision, into a new file.
    pub fn new(source: PathBuf, out: PathBuf) -> ExportArgs {
        ExportArgs { source, out, format: Format::default(), heads: false, features: None, force: false }
    }
}

pub fn run(args: ExportArgs) -> Result<()> {
    let card_path = card_path(&args.out);
    let files: Vec<&PathBuf> = [&args.out, &card_path].into_iter().chain(&args.features).collect();
    for (i, path) in files.iter().enumerate() {
        refuse_existing(path, args.force)?;
        if files[..i].contains(path) {
            let what = format!("{} would be two files at once: weights, model card, features", path.display());
            return Err(Error::config("OUT", what).with_hint("give them different names"));
        }
    }
    let source = Source::open(&args.source, args.heads)?;
    let verified = write(&source, args.format, &args.out)?;
    let card = card(&source, args.format, &args.out, &verified)?;
    write_atomic(&card_path, |out| out.write_all(card.as_bytes()))?;
    if let Some(path) = &args.features {
        safetensors::write(path, &verified.outputs, &BTreeMap::new())?;
    }
    print(|out| {
        let (path, arch, history) = (args.out.display(), source.model.backbone.arch(), &source.history);
        let (tensors, parameters) = (verified.tensors, HumanCount(source.parameters() as u64));
        writeln!(out, "{path}: {arch} {history}, {tensors} tensors, {parameters} parameters")?;
        let (images, difference) = (verified.images(), verified.difference);
        writeln!(
            out,
            "read back: on {images} random images it differs from the engine by {difference:.1e} of the largest output"
        )?;
        writeln!(out, "{}: model card", card_path.display())?;
        args.features.iter().try_for_each(|path| writeln!(out, "{}: images and outputs", path.display()))?;
        let (language, lines) = snippet(&source, args.format, &args.out.display().to_string());
        writeln!(out, "\nTo load it ({language}):\n")?;
        lines.iter().try_for_each(|line| writeln!(out, "  {line}"))?;
        let augment = &source.augment;
        writeln!(out, "\nIts images are RGB in 0..1, minus {:?}, divided by {:?}.", augment.mean, augment.std)
    })
}

/// `name.md` beside `name.onnx` and beside `name.pth.tar`.
fn card_path(out: &Path) -> PathBuf {
    let is_tar = out.extension().is_some_and(|ending| ending == "tar");
    if is_tar { out.with_extension("").with_extension("md") } else { out.with_extension("md") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_card_has_the_name_of_the_weights() {
        for (out, card) in
            [("a/x.v2.onnx", "a/x.v2.md"), ("x.pth.tar", "x.md"), ("x", "x.md"), ("a.b/x.safetensors", "a.b/x.md")]
        {
            assert_eq!(card_path(Path::new(out)), Path::new(card));
        }
    }
}
