//! What of a file was taken into a network, and what not.

use std::io::{self, Write};

use serde::Serialize;

use super::names::is_backbone;
use super::{Format, OptimiserFacts};

/// Names shown of each kind; `--json` has all.
const SHOWN: usize = 8;

/// The comparison of a file with a network.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The file.
    pub file: String,
    /// Its kind.
    pub format: Format,
    /// The network that it was compared with, in words.
    pub network: String,
    /// The network that the file holds, as options of `train`.
    pub options: String,
    /// What the backbone's names begin with in the file.
    pub prefix: String,
    /// Tensors that were taken.
    pub matched: usize,
    /// Their values, counters left out.
    pub values: usize,
    /// Momenta that were taken.
    pub momenta: usize,
    /// The optimiser they come from.
    pub optimiser: Option<OptimiserFacts>,
    /// Epochs done, where the file says so.
    pub epoch: Option<u64>,
    /// Tensors that the network has and the file has not, by the engine's names.
    pub missing: Vec<String>,
    /// Counters of batch norm that the file has not: they start at 0 and change no result.
    pub missing_counters: usize,
    /// Tensors of the file, by its names, that the network should have and has not.
    pub unexpected: Vec<String>,
    /// Tensors of another shape.
    pub wrong_shape: Vec<WrongShape>,
    /// What was left out on purpose.
    pub skipped: Vec<Skipped>,
}

/// A tensor of another shape than the network's.
#[derive(Debug, Clone, Serialize)]
pub struct WrongShape {
    /// The file's name.
    pub name: String,
    /// The network's shape.
    pub expected: Vec<usize>,
    /// The file's.
    pub got: Vec<usize>,
}

/// Something that is left out.
#[derive(Debug, Clone, Serialize)]
pub struct Skipped {
    /// The file's name.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl Report {
    /// Whether the backbone is there, whole, and nothing is of another shape or without a place. Missing heads do not count.
    pub fn fits(&self) -> bool {
        self.unexpected.is_empty() && self.wrong_shape.is_empty() && !self.missing.iter().any(|name| is_backbone(name))
    }

    /// Tensors of the heads that the file has not.
    pub fn missing_in_heads(&self) -> Vec<&str> {
        self.missing.iter().map(String::as_str).filter(|name| !is_backbone(name)).collect()
    }

    /// What keeps the file from fitting, in words.
    pub fn faults(&self) -> String {
        let wrong = |w: &WrongShape| format!("{} expected {:?}, got {:?}", w.name, w.expected, w.got);
        let wrong: Vec<String> = self.wrong_shape.iter().map(wrong).collect();
        let kinds = [("missing", &self.missing), ("unexpected", &self.unexpected), ("of another shape", &wrong)];
        let some = kinds.iter().filter(|(_, names)| !names.is_empty());
        let said = some.map(|(kind, names)| format!("{} {kind} ({})", names.len(), first(names, 3)));
        said.collect::<Vec<_>>().join(", ")
    }

    /// A table.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{}: {}", self.file, self.format.name())?;
        writeln!(out, "network      {}", self.network)?;
        let prefix = if self.prefix.is_empty() { String::new() } else { format!(", found under {}*", self.prefix) };
        writeln!(out, "matched      {} tensors, {} values{prefix}", self.matched, self.values)?;
        self.print_training(out)?;
        self.print_names("missing", &self.missing, out)?;
        if self.missing_counters > 0 {
            writeln!(out, "             and {} counters num_batches_tracked, which start at 0", self.missing_counters)?;
        }
        self.print_names("unexpected", &self.unexpected, out)?;
        let wrong = self.wrong_shape.iter().map(|w| format!("{}: expected {:?}, got {:?}", w.name, w.expected, w.got));
        self.print_names("wrong shape", &wrong.collect::<Vec<_>>(), out)?;
        let skipped = self.skipped.iter().map(|s| format!("{}: {}", s.name, s.reason));
        self.print_names("skipped", &skipped.collect::<Vec<_>>(), out)
    }

    fn print_training(&self, out: &mut dyn Write) -> io::Result<()> {
        if let Some(epoch) = self.epoch {
            writeln!(out, "epochs done  {epoch}")?;
        }
        if self.momenta > 0 {
            writeln!(out, "momenta      {}", self.momenta)?;
        }
        let Some(OptimiserFacts { lr, momentum, weight_decay }) = &self.optimiser else { return Ok(()) };
        writeln!(out, "optimiser    SGD, momentum {momentum}, weight decay {weight_decay}, learning rates {lr:?}")
    }

    fn print_names(&self, title: &str, names: &[String], out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "{title:<12} {}", names.len())?;
        names.iter().take(SHOWN).try_for_each(|name| writeln!(out, "  {name}"))?;
        if names.len() > SHOWN {
            writeln!(out, "  ... {} more; --json lists all", names.len() - SHOWN)?;
        }
        Ok(())
    }
}

fn first(names: &[String], count: usize) -> String {
    let more = if names.len() > count { ", ..." } else { "" };
    names.iter().take(count).map(String::as_str).collect::<Vec<_>>().join(", ") + more
}
