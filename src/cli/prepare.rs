//! `prepare`: images to a dataset file.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::meter::Meter;
use super::output::print;
use super::source_args::{SourceArgs, default_store};
use crate::data::import::{self, Options, Source, Store, Summary};
use crate::data::writer::refuse_existing;
use crate::error::{Error, Result};

/// Rejected files that are printed; the dataset file lists all.
const REJECTED_SHOWN: usize = 10;

#[derive(Debug, clap::Args)]
pub struct PrepareArgs {
    /// Folder of images or of class folders; IDX, CIFAR binary, WebDataset tar or Parquet files, or a folder of them.
    source: PathBuf,
    /// Dataset file to write (usually *.ssds).
    out: PathBuf,
    #[command(flatten)]
    source_args: SourceArgs,
    /// Size to store: raw:SIDE stretches to SIDE x SIDE, raw keeps every size. Default: raw:256, for IDX and CIFAR raw.
    #[arg(long, value_name = "raw:SIDE")]
    store: Option<Store>,
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
    let scratch = args.out.parent().unwrap_or(Path::new(""));
    let source = args.source_args.open(&args.source, scratch)?;
    write(&*source, &args, default_store(&*source))
}

fn write(source: &dyn Source, args: &PrepareArgs, default_store: Store) -> Result<()> {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let options = Options {
        store: args.store.unwrap_or(default_store),
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
