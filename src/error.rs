//! The one error type. Every variant prints as a single sentence that says what went wrong, where, what was expected,
//! what was found and, where one helps, a hint.

use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, as told to the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("cannot {action} {}: {source}{}", path.display(), what_helps(source))]
    Io {
        /// What was being done: "open", "write", "rename", ...
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The content of a file is not what its format promises.
    #[error("{}{}: {what}{}", path.display(), at_byte(*.offset), hinted(.hint))]
    Format {
        /// The file.
        path: PathBuf,
        /// Byte offset of the fault, where there is one.
        offset: Option<u64>,
        /// The fault, with the expected and the actual value.
        what: String,
        /// What the user can do.
        hint: Option<String>,
    },
    /// Tensor shapes or dtypes that an op cannot take.
    #[error("{op}: {what}: expected {expected}, got {got}")]
    Shape {
        /// The op or node.
        op: String,
        /// Which input or attribute.
        what: String,
        /// The condition that was not met.
        expected: String,
        /// The offending value.
        got: String,
    },
    /// An option or configuration value that makes no sense.
    #[error("{option}: {what}{}", hinted(.hint))]
    Config {
        /// The option as the user typed it, e.g. `--batch`.
        option: String,
        /// What is wrong with it.
        what: String,
        /// What the user can do.
        hint: Option<String>,
    },
    /// The loss (or a node's output under `--check`) is NaN or infinite.
    #[error(
        "step {step}: {what} is not finite; first bad node: {node}; last good checkpoint: {checkpoint}; \
         hint: lower --base-lr or add --warmup-epochs, then continue with --resume"
    )]
    NonFinite {
        /// The optimiser step, counted from 0.
        step: u64,
        /// The value that was found non-finite.
        what: String,
        /// The first node whose output was not finite.
        node: String,
        /// Path of the newest checkpoint with finite weights, or "none".
        checkpoint: String,
    },
    /// A plan does not fit into a device's memory.
    #[error("out of memory: the plan needs {}, {device} has {} free{}", size(*.needed), size(*.free), hinted(.hint))]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// Bytes that are needed, with what the libraries take besides.
        needed: usize,
        /// Bytes that are free.
        free: usize,
        /// What would fit.
        hint: Option<String>,
    },
    /// Something this build or machine cannot do.
    #[error("{what}{}", hinted(.hint))]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What the user can do.
        hint: Option<String>,
    },
    /// A comparison against stored truth failed.
    #[error("{0}")]
    Mismatch(String),
    /// A background thread ended unexpectedly; carries its message.
    #[error("internal error in {thread}: {message}; please report this")]
    Internal {
        /// The thread or component.
        thread: String,
        /// The panic message or broken condition.
        message: String,
    },
}

fn at_byte(offset: Option<u64>) -> String {
    offset.map_or(String::new(), |o| format!(", byte {o}"))
}

/// Bytes as people read them.
fn size(bytes: usize) -> String {
    match bytes {
        0..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

fn hinted(hint: &Option<String>) -> String {
    hint.as_ref().map_or(String::new(), |h| format!("; hint: {h}"))
}

/// What to do about a refusal of the operating system, where it is as good as always the same.
fn what_helps(refused: &io::Error) -> &'static str {
    match refused.kind() {
        io::ErrorKind::NotFound => "; hint: check the name, and the folder that it is relative to",
        io::ErrorKind::PermissionDenied => "; hint: check who may read and write there",
        io::ErrorKind::StorageFull => "; hint: free some space, or name a place on another disk",
        _ => "",
    }
}

impl Error {
    /// An [`Error::Io`]; use as `.map_err(Error::io("open", path))`.
    pub fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
        move |source| Error::Io { action, path: path.to_path_buf(), source }
    }

    /// An [`Error::Format`] without hint.
    pub fn format(path: &Path, offset: Option<u64>, what: impl Into<String>) -> Error {
        Error::Format { path: path.to_path_buf(), offset, what: what.into(), hint: None }
    }

    /// An [`Error::Config`] without hint.
    pub fn config(option: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Config { option: option.into(), what: what.into(), hint: None }
    }

    /// An [`Error::Shape`].
    pub fn shape(op: &str, what: &str, expected: impl ToString, got: impl ToString) -> Error {
        Error::Shape { op: op.into(), what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// Adds (or replaces) the hint of variants that carry one.
    pub fn with_hint(mut self, text: impl Into<String>) -> Error {
        if let Error::Format { hint, .. }
        | Error::Config { hint, .. }
        | Error::OutOfMemory { hint, .. }
        | Error::Unsupported { hint, .. } = &mut self
        {
            *hint = Some(text.into());
        }
        self
    }
}
