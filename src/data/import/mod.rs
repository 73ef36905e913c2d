//! From images to a dataset file: sources, and the pipeline from any of them to the writer.

pub mod folder;
pub mod idx;
pub mod source;
pub mod store;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::mpsc::sync_channel;

use self::source::Fault;
pub use self::source::Source;
pub use self::store::Store;
use super::decode::DecodeOptions;
use super::format::{Header, Meta, Rejected};
use super::writer::Writer;
use crate::error::{Error, Result};
use crate::rng::{Stream, below};

/// Separates the draws of the order in the file from all others.
const SHUFFLE_DOMAIN: u32 = 0x5348_5546;

/// Bad images named in the message when there are too many.
const BAD_SHOWN: usize = 5;

/// How to make the file.
#[derive(Debug, Clone)]
pub struct Options {
    /// Size of the stored images.
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
}

/// What became of the images.
#[derive(Debug)]
pub struct Summary {
    /// Header of the file written.
    pub header: Header,
    /// What was left out, in the order of the source.
    pub rejected: Vec<Rejected>,
}

/// Whether to go on.
pub type Watch<'a> = &'a mut dyn FnMut(usize) -> bool;

/// Writes the images of `source` to `out`. The bytes follow from the source and the options, not from the number of threads.
/// `watch` is told the number of images done, and ends the work by returning false.
///
/// # Errors
/// [`Error::Format`] when too many images are bad (or one, with `strict`), [`Error::Config`] when `out` exists, [`Error::Io`]
/// when the disk refuses or `watch` ended the work. Nothing is left behind then.
pub fn prepare(source: &dyn Source, root: &Path, out: &Path, options: &Options, watch: Watch) -> Result<Summary> {
    let order = order(source.len(), options);
    let allowed = order.len() as f64 * options.max_bad / 100.0;
    let mut writer = Writer::create(out, options.store.alignment(), options.force)?;
    let mut rejected: Vec<(u32, Rejected)> = Vec::new();
    let make = |i: u32| store::record(source, i as usize, options.store, options.decode);
    in_order(&order, options, make, |place, i, outcome| {
        match outcome {
            Ok(record) => writer.append(&record)?,
            Err(Fault::Stop(error)) => return Err(error),
            Err(Fault::Bad(reason)) if options.strict => {
                return Err(Error::format(&root.join(source.name(i as usize)), None, reason)
                    .with_hint("without --strict, bad images are listed and left out"));
            }
            Err(Fault::Bad(reason)) => {
                rejected.push((i, Rejected { path: source.name(i as usize), reason }));
                // No need to go through the rest of a large set; of a small one, tell more than the first.
                if rejected.len() as f64 > allowed.max(BAD_SHOWN as f64) {
                    return Err(too_many_bad(root, &rejected, order.len(), options.max_bad));
                }
            }
        }
        if watch(place + 1) { Ok(()) } else { Err(interrupted(out)) }
    })?;
    rejected.sort_by_key(|(i, _)| *i);
    if rejected.len() as f64 > allowed {
        return Err(too_many_bad(root, &rejected, order.len(), options.max_bad));
    }
    let rejected: Vec<Rejected> = rejected.into_iter().map(|(_, rejected)| rejected).collect();
    let meta = Meta {
        classes: source.classes().to_vec(),
        source: source.kind().into(),
        store: options.store.to_string(),
        decoder: options.decode.to_string(),
        resizer: options.store.made_with(),
        writer: format!("simsiam-engine {}", env!("CARGO_PKG_VERSION")),
        rejected: rejected.clone(),
    };
    let header = writer.finish(&meta, options.shuffle, options.force)?;
    Ok(Summary { header, rejected })
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
    mut take: impl FnMut(usize, u32, T) -> Result<()>,
) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build();
    let pool = pool.map_err(|e| Error::config("--threads", e.to_string()))?;
    let window = options.threads * if options.store == Store::Native { 4 } else { 16 };
    let make = &make;
    pool.in_place_scope_fifo(|scope| {
        let mut waiting = VecDeque::with_capacity(window);
        let mut next = items.iter();
        for (place, &item) in items.iter().enumerate() {
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
            take(place, item, outcome.ok_or_else(lost)?)?;
        }
        Ok(())
    })
}

fn too_many_bad(root: &Path, rejected: &[(u32, Rejected)], total: usize, max_bad: f64) -> Error {
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
    let reason = "interrupted; nothing was left behind";
    Error::io("finish", out)(io::Error::new(io::ErrorKind::Interrupted, reason))
}
