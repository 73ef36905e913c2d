//! From images to a dataset file: sources, and the pipeline from any of them to the writer.

mod append;
pub mod blob;
pub mod cifar;
pub mod detect;
pub mod folder;
pub mod idx;
pub mod labels;
#[cfg(feature = "parquet")]
pub mod parquet;
#[cfg(feature = "parquet")]
pub mod parquet_guard;
pub mod select;
pub mod source;
pub mod spool;
pub mod store;
pub mod tar;
pub mod webdataset;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::mpsc::sync_channel;

use self::append::Relabelled;
use self::source::Fault;
pub use self::source::Source;
pub use self::store::Store;
use super::decode::DecodeOptions;
use super::format::{Meta, Rejected};
use super::manifest::ShardRef;
use super::writer::{Base, Job, SEGMENT, Writer};
use crate::error::{Error, Result};
use crate::rng::{Stream, below};

/// Separates the draws of the order in the file from all others.
const SHUFFLE_DOMAIN: u32 = 0x5348_5546;

/// Bad images named in the message when there are too many.
const BAD_SHOWN: usize = 5;

/// How to make the dataset.
#[derive(Debug, Clone)]
pub struct Options {
    /// Form of the stored images.
    pub store: Store,
    /// How the images are decoded.
    pub decode: DecodeOptions,
    /// Seed of the order; `None` keeps the order of the source.
    pub shuffle: Option<u64>,
    /// Takes only this many images, the first in the (shuffled) order.
    pub limit: Option<usize>,
    /// Threads that decode.
    pub threads: usize,
    /// Stop at the first bad image.
    pub strict: bool,
    /// Per cent of the images that may be bad.
    pub max_bad: f64,
    /// Replace an existing file.
    pub force: bool,
    /// Throw away what an earlier call left unfinished, rather than go on with it.
    pub restart: bool,
    /// Bytes of a file after which the next shard begins; `None` makes one file.
    pub shard_size: Option<u64>,
    /// Bytes after which what was done is safe from a kill.
    pub segment: u64,
    /// Add to the dataset that is there.
    pub append: bool,
}

impl Options {
    /// One file of images in this form, in the order of the source, on one thread; no image may be bad.
    pub fn new(store: Store) -> Options {
        Options {
            store,
            decode: DecodeOptions::default(),
            shuffle: None,
            limit: None,
            threads: 1,
            strict: true,
            max_bad: 0.0,
            force: false,
            restart: false,
            shard_size: None,
            segment: SEGMENT,
            append: false,
        }
    }
}

/// What became of the images.
#[derive(Debug)]
pub struct Summary {
    /// The files written.
    pub files: Vec<ShardRef>,
    /// Class names of the dataset.
    pub classes: usize,
    /// Images that an earlier, interrupted call had dealt with.
    pub resumed: u64,
    /// What was left out, in the order of the source.
    pub rejected: Vec<Rejected>,
}

impl Summary {
    /// Records written.
    pub fn records(&self) -> u64 {
        self.files.iter().map(|file| file.records).sum()
    }

    /// Bytes written.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// Whether to go on, told the number of images done.
pub type Watch<'a> = &'a mut dyn FnMut(usize) -> bool;

/// Writes the images of `source` to `out`. The bytes follow from the source and the options, not from the number of threads,
/// nor from how often the work was interrupted. `watch` is told the number of images done, and ends the work by returning
/// false. When the work ends early, what was done is kept if it was worth a segment ([`super::writer::is_unfinished`]); the
/// same call goes on from there.
///
/// # Errors
/// [`Error::Format`] when too many images are bad (or one, with `strict`), [`Error::Config`] when `out` cannot be written,
/// [`Error::Io`] when a disk refuses or `watch` ended the work.
pub fn prepare(source: &dyn Source, root: &Path, out: &Path, options: &Options, watch: Watch) -> Result<Summary> {
    if !options.append {
        return write(source, None, root, out, options, watch);
    }
    let base = append::base(out, options.store)?;
    let source = Relabelled::new(source, &base.manifest.classes);
    write(&source, Some(base), root, out, options, watch)
}

fn write(
    source: &dyn Source,
    base: Option<Base>,
    root: &Path,
    out: &Path,
    options: &Options,
    watch: Watch,
) -> Result<Summary> {
    let order = order(source.len(), options);
    let mut writer = Writer::open(job(source, base, out, options))?;
    let resumed = writer.consumed();
    let meta = Meta {
        classes: source.classes().to_vec(),
        source: source.kind().into(),
        store: options.store.to_string(),
        decoder: options.decode.to_string(),
        resizer: options.store.made_with(),
        writer: format!("simsiam-engine {}", env!("CARGO_PKG_VERSION")),
        rejected: Vec::new(),
    };
    if let Err(error) = fill(&mut writer, source, root, &order, &meta, options, watch) {
        // The first error is the one to tell; should this fail too, what was noted before stays.
        let _ = writer.suspend();
        return Err(error);
    }
    let mut rejected = writer.rejected().to_vec();
    rejected.sort_by_key(|(i, _)| *i);
    let rejected = rejected.into_iter().map(|(_, rejected)| rejected).collect();
    let files = writer.finish(&meta, options.shuffle)?;
    Ok(Summary { files, classes: meta.classes.len(), resumed, rejected })
}

/// Decodes and appends what is still to be done of `order`.
fn fill(
    writer: &mut Writer,
    source: &dyn Source,
    root: &Path,
    order: &[u32],
    meta: &Meta,
    options: &Options,
    watch: Watch,
) -> Result<()> {
    let allowed = order.len() as f64 * options.max_bad / 100.0;
    let too_many = |writer: &Writer| too_many_bad(root, writer.rejected(), order.len(), options.max_bad);
    let rest = order.get(writer.consumed() as usize..).unwrap_or_default();
    let make = |i: u32| store::record(source, i as usize, options.store, options.decode);
    in_order(rest, options, make, |i, outcome| {
        match outcome {
            Ok(record) => {
                if writer.is_full(record.bytes.len()) {
                    writer.end_shard(meta, options.shuffle)?;
                }
                writer.append(&record)?;
            }
            Err(Fault::Stop(error)) => return Err(error),
            Err(Fault::Bad(reason)) if options.strict => {
                return Err(Error::format(&root.join(source.name(i as usize)), None, reason)
                    .with_hint("without --strict, bad images are listed and left out"));
            }
            Err(Fault::Bad(reason)) => {
                writer.reject(i.into(), Rejected { path: source.name(i as usize), reason });
                // No need to go through the rest of a large set; of a small one, tell more than the first.
                if writer.rejected().len() as f64 > allowed.max(BAD_SHOWN as f64) {
                    return Err(too_many(writer));
                }
            }
        }
        if watch(writer.consumed() as usize) { Ok(()) } else { Err(interrupted(writer.path())) }
    })?;
    if writer.rejected().len() as f64 > allowed { Err(too_many(writer)) } else { Ok(()) }
}

/// The job of these options: its name covers all that the bytes of the result depend on.
fn job(source: &dyn Source, base: Option<Base>, out: &Path, options: &Options) -> Job {
    let Options { store, shuffle, limit, shard_size, segment, force, restart, .. } = *options;
    let mut hasher = blake3::Hasher::new();
    let part = serde_json::json!([
        env!("CARGO_PKG_VERSION"),
        options.decode.to_string(),
        store.made_with(),
        store.to_string(),
        shuffle,
        limit,
        shard_size,
        base.as_ref().map(|base| &base.manifest),
        source.kind(),
        source.classes(),
        source.len(),
    ]);
    hasher.update(part.to_string().as_bytes());
    source.fingerprint(&mut hasher);
    let id = *hasher.finalize().as_bytes();
    Job { out: out.to_path_buf(), id, alignment: store.alignment(), segment, shard_size, base, force, restart }
}

/// The images to take, in file order: Fisher-Yates on Philox.
fn order(len: usize, options: &Options) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    if let Some(seed) = options.shuffle {
        let mut stream = Stream::new(seed, SHUFFLE_DOMAIN, 0);
        for last in (1..order.len()).rev() {
            order.swap(last, below(stream.word(), last as u32 + 1) as usize);
        }
    }
    order.truncate(options.limit.unwrap_or(len));
    order
}

/// Runs `make` on every item on all threads and `take` on the outcomes on this one, in the order of `items`. At most a
/// window of outcomes waits, so memory does not grow with the set; no thread waits for another as long as the window moves.
fn in_order<T: Send>(
    items: &[u32],
    options: &Options,
    make: impl Fn(u32) -> T + Sync,
    mut take: impl FnMut(u32, T) -> Result<()>,
) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build();
    let pool = pool.map_err(|e| Error::config("--threads", e.to_string()))?;
    let window = options.store.window(options.threads);
    let make = &make;
    pool.in_place_scope_fifo(|scope| {
        let mut waiting = VecDeque::with_capacity(window);
        let mut next = items.iter();
        for &item in items {
            while waiting.len() < window
                && let Some(&item) = next.next()
            {
                let (sender, receiver) = sync_channel(1);
                // Nobody listens any more after an error: then the outcome is not needed.
                scope.spawn_fifo(move |_| drop(sender.send(make(item))));
                waiting.push_back(receiver);
            }
            let outcome = waiting.pop_front().and_then(|receiver| receiver.recv().ok());
            let lost = || Error::Internal { thread: "a decoding thread".into(), message: "it ended early".into() };
            take(item, outcome.ok_or_else(lost)?)?;
        }
        Ok(())
    })
}

fn too_many_bad(root: &Path, rejected: &[(u64, Rejected)], total: usize, max_bad: f64) -> Error {
    let shown = rejected.iter().take(BAD_SHOWN).map(|(_, bad)| format!("{} ({})", bad.path, bad.reason));
    let shown = shown.collect::<Vec<_>>().join("; ");
    let (more, count) = if rejected.len() > BAD_SHOWN { ("; ...", "at least ") } else { ("", "") };
    let what = format!(
        "{count}{} of {total} images cannot be used, more than the {max_bad} % allowed: {shown}{more}",
        rejected.len()
    );
    Error::format(root, None, what).with_hint("--max-bad PERCENT allows more, and lists them all")
}

fn interrupted(out: &Path) -> Error {
    Error::io("finish", out)(io::Error::new(io::ErrorKind::Interrupted, "interrupted"))
}
