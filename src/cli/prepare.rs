//! `prepare`: images to a dataset file.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::meter::Meter;
use super::output::print;
use crate::data::decode::{Alpha, DecodeOptions};
use crate::data::import::folder::Folder;
use crate::data::import::idx::{self, Idx, Split};
use crate::data::import::{self, Options, Source, Store, Summary};
use crate::data::writer::refuse_existing;
use crate::error::{Error, Result};

/// Rejected files that are printed; the dataset file lists all.
const REJECTED_SHOWN: usize = 10;

/// Class folders of these names mean that the folder above the real one was named.
const SPLIT_NAMES: [&str; 6] = ["train", "val", "valid", "validation", "test", "dev"];

#[derive(Debug, clap::Args)]
pub struct PrepareArgs {
    /// Folder of class folders of images, folder of images, folder with IDX files, or an IDX images file (.gz too).
    source: PathBuf,
    /// Dataset file to write (usually *.ssds).
    out: PathBuf,
    /// What SOURCE is.
    #[arg(long = "source", value_name = "KIND", value_enum, default_value_t = Kind::Auto)]
    source_kind: Kind,
    /// Form to store: raw:SIDE stretches to SIDE x SIDE pixels, raw keeps every size; jpeg keeps JPEG files as they are, jpeg:SIDE
    /// makes them smaller where the shorter side is longer. Default: raw:256, for IDX raw.
    #[arg(long, value_name = "raw:SIDE|raw|jpeg:SIDE|jpeg")]
    store: Option<Store>,
    /// Transparent pixels: drop keeps their colours as they are, white and black lay the image on that.
    #[arg(long, value_name = "drop|white|black", default_value = "drop")]
    alpha: Alpha,
    /// IDX labels file (default: the one beside the images).
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Which IDX files of a folder.
    #[arg(long, value_enum)]
    split: Option<Split>,
    /// Take at most this many images (the first of the shuffled order).
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Threads that decode (default: one per core). Does not change the file.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Seed of the order of the records.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Keep the order of the source. A file sorted by class makes poor batches.
    #[arg(long, conflicts_with = "seed")]
    no_shuffle: bool,
    /// Stop at the first bad image.
    #[arg(long)]
    strict: bool,
    /// Per cent of the images that may be bad; those are listed and left out.
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0, conflicts_with = "strict")]
    max_bad: f64,
    /// Replace OUT if it exists.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// Find out.
    Auto,
    /// Image files.
    Folder,
    /// IDX files (MNIST and the like).
    Idx,
}

pub fn run(args: PrepareArgs) -> Result<()> {
    if !(0.0..=100.0).contains(&args.max_bad) {
        return Err(Error::config("--max-bad", format!("{} is not a percentage from 0 to 100", args.max_bad)));
    }
    for (option, value) in [("--limit", args.limit), ("--threads", args.threads)] {
        if value == Some(0) {
            return Err(Error::config(option, "must be at least 1"));
        }
    }
    // Now rather than after minutes of listing a large folder.
    refuse_existing(&args.out, args.force)?;
    if resolve_kind(&args)? == Kind::Idx {
        let source = Idx::open(&args.source, args.labels.as_deref(), args.split)?;
        let labels = source.labels().map_or("no labels".into(), |path| format!("labels from {}", path.display()));
        eprintln!("{} images from {}, {labels}", source.len(), source.images().display());
        return write(&source, &args, Store::Native);
    }
    if args.labels.is_some() || args.split.is_some() {
        return Err(Error::config(
            "--labels, --split",
            "are for IDX files; the labels of a folder are its class folders",
        ));
    }
    let source = Folder::open(&args.source)?;
    describe_folder(&source, &args.source);
    write(&source, &args, Store::Square(256))
}

/// What the source is, when the user did not say.
fn resolve_kind(args: &PrepareArgs) -> Result<Kind> {
    let status = fs::metadata(&args.source).map_err(Error::io("open", &args.source))?;
    match args.source_kind {
        Kind::Folder if !status.is_dir() => {
            Err(Error::config("--source folder", format!("{} is a file", args.source.display())))
        }
        Kind::Auto if status.is_dir() => {
            let entries = fs::read_dir(&args.source).map_err(Error::io("list", &args.source))?;
            let idx = entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(idx::is_images_name));
            Ok(if idx { Kind::Idx } else { Kind::Folder })
        }
        Kind::Auto => Ok(Kind::Idx),
        kind => Ok(kind),
    }
}

fn describe_folder(source: &Folder, root: &Path) {
    let labels = match source.classes().len() {
        0 => "no class folders, so no labels".into(),
        n => format!("{n} classes"),
    };
    eprintln!("{} images in {}, {labels}", source.len(), root.display());
    if source.ignored() > 0 {
        eprintln!("note: {} other files are no images and were passed over", source.ignored());
    }
    let empty = source.empty_classes();
    if !empty.is_empty() {
        eprintln!("warning: {} classes have no images: {}", empty.len(), empty[..empty.len().min(5)].join(", "));
    }
    if !source.classes().is_empty() && source.classes().iter().all(|c| SPLIT_NAMES.contains(&c.to_lowercase().as_str()))
    {
        let first = &source.classes()[0];
        eprintln!(
            "warning: the classes are called {}; to use the folders inside, name {}",
            source.classes().join(", "),
            root.join(first).display()
        );
    }
}

fn write(source: &dyn Source, args: &PrepareArgs, default_store: Store) -> Result<()> {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let options = Options {
        store: args.store.unwrap_or(default_store),
        decode: DecodeOptions { alpha: args.alpha },
        shuffle: (!args.no_shuffle).then_some(args.seed),
        limit: args.limit,
        threads: args.threads.unwrap_or_else(cores),
        strict: args.strict,
        max_bad: args.max_bad,
        force: args.force,
    };
    let stop = stop_on_signal()?;
    let mut meter = Meter::new("preparing", options.limit.unwrap_or(usize::MAX).min(source.len()) as u64);
    let outcome = import::prepare(source, &args.source, &args.out, &options, &mut |done| {
        meter.set(done as u64);
        !stop.load(Ordering::Relaxed)
    });
    let seconds = meter.finish();
    let summary = outcome?;
    print(|out| report(&summary, args, &options, seconds, out))
}

fn report(
    summary: &Summary,
    args: &PrepareArgs,
    options: &Options,
    seconds: f64,
    out: &mut dyn Write,
) -> io::Result<()> {
    let header = &summary.header;
    let seen = header.records + summary.rejected.len() as u64;
    let order = options.shuffle.map_or("in source order".into(), |seed| format!("shuffled with seed {seed}"));
    writeln!(
        out,
        "{}: {} images, {} classes, {}, {order}, {:.1} MB, {seconds:.1} s ({:.0} images/s)",
        args.out.display(),
        header.records,
        header.classes,
        options.store,
        header.file_len as f64 / 1e6,
        seen as f64 / seconds.max(1e-9)
    )?;
    if summary.rejected.is_empty() {
        return Ok(());
    }
    writeln!(out, "{} of {seen} images could not be used and were left out:", summary.rejected.len())?;
    for rejected in summary.rejected.iter().take(REJECTED_SHOWN) {
        writeln!(out, "  {}: {}", rejected.path, rejected.reason)?;
    }
    if summary.rejected.len() > REJECTED_SHOWN {
        writeln!(out, "  ... all are listed by: simsiam-engine inspect --json {}", args.out.display())?;
    }
    Ok(())
}

/// A flag that Ctrl-C and SIGTERM set, so that the unfinished file is removed.
fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed));
    handler.map_err(|e| Error::Internal { thread: "the signal handler".into(), message: e.to_string() })?;
    Ok(stop)
}
