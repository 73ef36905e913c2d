//! `prepare`: images to a dataset file.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytesize::ByteSize;

use super::meter::Meter;
use super::output::print;
use super::source_args::{SourceArgs, default_store};
use crate::atomic::write_atomic;
use crate::data::decode::{Alpha, DecodeOptions, Decoder};
use crate::data::import::source::Item;
use crate::data::import::{self, Options, Source, Store, Summary};
use crate::data::writer::{is_unfinished, refuse_existing};
use crate::error::{Error, Result};

/// Rejected files that are printed; the dataset file lists all.
const REJECTED_SHOWN: usize = 10;

#[derive(Debug, clap::Args)]
pub struct PrepareArgs {
    /// Folder of images or of class folders; IDX, CIFAR binary, WebDataset tar or Parquet files, or a folder of them.
    source: PathBuf,
    /// Dataset to write (usually *.ssds).
    out: PathBuf,
    #[command(flatten)]
    source_args: SourceArgs,
    /// Form to store: raw:SIDE stretches to SIDE x SIDE pixels, raw keeps every size; jpeg keeps JPEG files as they are, jpeg:SIDE
    /// makes them smaller where the shorter side is longer. Default: raw:256, for IDX and CIFAR raw.
    #[arg(long, value_name = "raw:SIDE|raw|jpeg:SIDE|jpeg")]
    store: Option<Store>,
    /// Transparent pixels: drop keeps their colours as they are, white and black lay the image on that.
    #[arg(long, value_name = "drop|white|black", default_value = "drop")]
    alpha: Alpha,
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
    /// Also write the images that were left out to FILE: path, tab, reason, a line each.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write shards of about this size (4GB, 512MiB); OUT becomes the small manifest that names them.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shard_size: Option<u64>,
    /// Add the images to the dataset OUT, as a new shard. New classes come behind those that are there.
    #[arg(long, conflicts_with = "force")]
    append: bool,
    /// Replace OUT if it exists.
    #[arg(long)]
    force: bool,
    /// Throw away what an interrupted call left unfinished, instead of going on with it.
    #[arg(long)]
    restart: bool,
    /// Make what was done safe from a crash every SIZE bytes.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = size)]
    segment: u64,
}

/// A size as people write it.
fn size(text: &str) -> Result<u64, String> {
    let bytes = text.parse::<ByteSize>().ok().map(|size| size.as_u64()).filter(|&bytes| bytes > 0);
    bytes.ok_or_else(|| "expected a size above 0, as 4GB or 512MiB".into())
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
    if !args.append && !is_unfinished(&args.out) {
        refuse_existing(&args.out, args.force)?;
    }
    if let Some(report) = &args.report {
        refuse_existing(report, true)?;
    }
    let scratch = args.out.parent().unwrap_or(Path::new(""));
    let source = args.source_args.open(&args.source, scratch)?;
    let default = default_store(&*source);
    if args.store.is_none() {
        tell_of_small_images(&*source, default);
    }
    write(&*source, &args, default)
}

/// To stretch small images costs space and gains nothing. The first image stands for all.
fn tell_of_small_images(source: &dyn Source, store: Store) {
    let (Store::Square(side), mut buffer) = (store, Vec::new()) else { return };
    let Ok(Item::Encoded(bytes)) = source.read(0, &mut buffer) else { return };
    let mut decoder = Decoder::default();
    if let Ok(image) = decoder.decode(bytes)
        && 2 * image.width.max(image.height) <= side
    {
        let (width, height) = (image.width, image.height);
        eprintln!(
            "note: the first image is of {width}x{height} pixels; --store raw would keep such images as they are"
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
        restart: args.restart,
        shard_size: args.shard_size,
        segment: args.segment,
        append: args.append,
    };
    let stop = stop_on_signal()?;
    let mut meter = Meter::new("preparing", options.limit.unwrap_or(usize::MAX).min(source.len()) as u64);
    let outcome = import::prepare(source, &args.source, &args.out, &options, &mut |done| {
        meter.set(done as u64);
        !stop.load(Ordering::Relaxed)
    });
    let seconds = meter.finish();
    let summary = outcome.inspect_err(|_| tell_what_is_kept(&args.out))?;
    if let Some(path) = &args.report {
        write_report(path, &summary)?;
    }
    print(|out| report(&summary, args, &options, seconds, out))
}

fn report(
    summary: &Summary,
    args: &PrepareArgs,
    options: &Options,
    seconds: f64,
    out: &mut dyn Write,
) -> io::Result<()> {
    let records = summary.records();
    let seen = records + summary.rejected.len() as u64;
    let order = options.shuffle.map_or("in source order".into(), |seed| format!("shuffled with seed {seed}"));
    let shards = if summary.files.len() > 1 { format!(" in {} shards", summary.files.len()) } else { String::new() };
    let added = if options.append { "added " } else { "" };
    writeln!(
        out,
        "{}: {added}{records} images{shards}, {} classes, {}, {order}, {:.1} MB, {seconds:.1} s ({:.0} images/s)",
        args.out.display(),
        summary.classes,
        options.store,
        summary.bytes() as f64 / 1e6,
        (seen - summary.resumed.min(seen)) as f64 / seconds.max(1e-9)
    )?;
    if summary.resumed > 0 {
        writeln!(out, "{} of them were done by an earlier call, which this one went on with", summary.resumed)?;
    }
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

/// The list of `--report`.
fn write_report(path: &Path, summary: &Summary) -> Result<()> {
    write_atomic(path, |out| {
        summary.rejected.iter().try_for_each(|rejected| writeln!(out, "{}\t{}", rejected.path, rejected.reason))
    })
}

/// After a failure.
fn tell_what_is_kept(out: &Path) {
    if is_unfinished(out) {
        eprintln!(
            "note: what was done is kept beside {}; the same command goes on from there, --restart starts anew",
            out.display()
        );
    }
}

/// A flag that Ctrl-C and SIGTERM set, so that the work ends in good order.
fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed));
    handler.map_err(|e| Error::Internal { thread: "the signal handler".into(), message: e.to_string() })?;
    Ok(stop)
}
