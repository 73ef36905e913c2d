//! `selftest`: replays goldens made by PyTorch (tools/golden.py) on the chosen device.

mod augmentation;
mod device_checks;
mod op_table;
mod trajectory;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

pub use device_checks::{lockstep, replays};

use crate::error::{Error, Result};
use crate::exec::Device;
use crate::nn::views::Views;
use crate::tensor::safetensors::{self, NamedTensors};
use crate::tensor::{DType, HostTensor};
use crate::train::epilogues::NormChoice;

/// The set that travels in the binary.
const EMBEDDED: &[(&str, &[u8])] = &[
    ("ops.safetensors", include_bytes!("../../tests/golden/ops.safetensors")),
    ("shapes.safetensors", include_bytes!("../../tests/golden/shapes.safetensors")),
    ("basic-cifar-2layer.safetensors", include_bytes!("../../tests/golden/basic-cifar-2layer.safetensors")),
    ("basic-imagenet-3layer.safetensors", include_bytes!("../../tests/golden/basic-imagenet-3layer.safetensors")),
    ("bottleneck-cifar-2layer.safetensors", include_bytes!("../../tests/golden/bottleneck-cifar-2layer.safetensors")),
    (
        "bottleneck-imagenet-3layer.safetensors",
        include_bytes!("../../tests/golden/bottleneck-imagenet-3layer.safetensors"),
    ),
];

/// The result of one file.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// File name.
    pub name: String,
    /// What was compared.
    pub compared: String,
    /// The worst error as a multiple of what is allowed, and where it is; a file passes up to 1.
    pub worst: Worst,
}

impl Outcome {
    /// Whether everything is within its tolerance.
    pub fn passed(&self) -> bool {
        self.worst.ratio <= 1.0
    }
}

/// The largest error seen so far, relative to its tolerance.
#[derive(Debug, Clone, Default)]
pub struct Worst {
    /// Error divided by tolerance; infinite for NaN.
    pub ratio: f64,
    /// What it was.
    pub what: String,
}

impl Worst {
    /// Of what has no tolerance: it is right, or it is not.
    fn exact(right: bool, what: String) -> Worst {
        Worst { ratio: if right { 0.0 } else { f64::INFINITY }, what }
    }

    /// Takes note of an error and its tolerance.
    fn observe(&mut self, what: impl FnOnce() -> String, error: f64, tolerance: f64) {
        let ratio = if error == 0.0 { 0.0 } else { error / tolerance };
        let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
        if ratio > self.ratio || self.what.is_empty() {
            let what = format!("{}: error {error:.2e}, allowed {tolerance:.2e}", what());
            *self = Worst { ratio: ratio.max(self.ratio), what };
        }
    }
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ratio > 0.0 && self.ratio.is_finite() {
            true => write!(f, "worst at {:.3} of the tolerance: {}", self.ratio, self.what),
            false => f.write_str(&self.what),
        }
    }
}

/// How whole steps are computed; the results are those of the default.
#[derive(Debug, Clone, Default)]
pub struct Variant {
    /// How the views go through the network.
    pub views: Views,
    /// How batch norm is computed behind 1x1 convolutions.
    pub bn: NormChoice,
}

/// A golden file in memory.
#[derive(Debug)]
struct Golden {
    path: PathBuf,
    tensors: NamedTensors,
    metadata: BTreeMap<String, String>,
}

impl Golden {
    fn embedded(name: &str, bytes: &[u8]) -> Result<Golden> {
        let path = PathBuf::from(name);
        let (tensors, metadata) = safetensors::read_bytes(&path, bytes)?;
        Ok(Golden { path, tensors, metadata })
    }

    fn name(&self) -> String {
        self.path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
    }

    fn meta(&self, key: &str) -> Result<&str> {
        let found = self.metadata.get(key).map(String::as_str);
        found.ok_or_else(|| Error::format(&self.path, None, format!("metadata: expected a value for {key}, got none")))
    }

    fn parse<T: std::str::FromStr>(&self, key: &str) -> Result<T> {
        let text = self.meta(key)?;
        text.parse().map_err(|_| Error::format(&self.path, None, format!("metadata: {key} cannot be {text:?}")))
    }

    fn tensor(&self, name: &str) -> Result<&HostTensor> {
        self.tensors.get(name).ok_or_else(|| Error::format(&self.path, None, format!("tensor {name} is missing")))
    }

    /// Elements of a tensor as f64.
    fn values(&self, name: &str) -> Result<Vec<f64>> {
        Ok(self.tensor(name)?.to_f64())
    }

    /// A scalar, 0 where the file has none.
    fn scalar_or_zero(&self, name: &str) -> f64 {
        self.tensors.get(name).and_then(|t| t.to_f64().first().copied()).unwrap_or(0.0)
    }

    fn replay(&self, device: &Device, dtypes: &[DType], variant: &Variant) -> Result<Outcome> {
        let (compared, worst) = match self.meta("kind")? {
            "simsiam-ops" => op_table::replay(self, device, dtypes)?,
            "simsiam-trajectory" => trajectory::replay(self, device, dtypes, variant)?,
            other => {
                let what = format!("metadata: kind: expected simsiam-ops or simsiam-trajectory, got {other:?}");
                return Err(Error::format(&self.path, None, what));
            }
        };
        Ok(Outcome { name: self.name(), compared, worst })
    }
}

/// Replays every `*.safetensors` in `folder`, or the embedded set without one, in each of `dtypes`, trajectories as
/// `variant` says; calls `report` after each file.
///
/// # Errors
/// Unreadable folders or files; a mismatch is no error but an [`Outcome`] that did not pass.
pub fn run(
    folder: Option<&Path>,
    device: &Device,
    dtypes: &[DType],
    variant: &Variant,
    mut report: impl FnMut(&Outcome),
) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    let mut replay = |golden: Golden| -> Result<()> {
        let outcome = golden.replay(device, dtypes, variant)?;
        report(&outcome);
        outcomes.push(outcome);
        Ok(())
    };
    match folder {
        None => {
            for (name, bytes) in EMBEDDED {
                replay(Golden::embedded(name, bytes)?)?;
            }
        }
        Some(folder) => {
            for path in golden_files(folder)? {
                let (tensors, metadata) = safetensors::read(&path)?;
                replay(Golden { path, tensors, metadata })?;
            }
        }
    }
    Ok(outcomes)
}

fn golden_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::format(folder, None, "expected *.safetensors files, found none")
            .with_hint("tools/golden.py writes them"));
    }
    files.sort();
    Ok(files)
}
