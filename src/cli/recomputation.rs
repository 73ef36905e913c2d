//! What is computed again in a step, what that costs and what it saves.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::graph::Tape;
use crate::graph::budget::{Repetitions, Trade, repetitions};
use crate::graph::ledger::flops;

/// The repetitions of a step, and those among them that a budget asked for.
pub struct Recomputation {
    all: Repetitions,
    /// Floating-point operations of the whole step.
    flops: u64,
    trade: Option<Trade>,
}

impl Recomputation {
    /// Of the tape of a step; `trade` is what its budget came to.
    pub fn new(tape: &Tape, trade: Option<Trade>) -> Recomputation {
        Recomputation { all: repetitions(tape), flops: flops(tape), trade }
    }

    /// Prints a table, if there is anything to tell.
    ///
    /// # Errors
    /// What `out` reports.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.all.nodes == 0 && self.trade.is_none() {
            return Ok(());
        }
        writeln!(out, "\nrecomputation")?;
        let mut row = |label: &str, value: String, note: String| writeln!(out, "  {label:<24}{value:>14}{note}");
        let Repetitions { nodes, traffic, flops } = self.all;
        let share = 100.0 * flops as f64 / (self.flops - flops).max(1) as f64;
        row("nodes computed again", nodes.to_string(), String::new())?;
        row("their work", format!("{:.2}", flops as f64 / 1e9), format!("  GFLOP (+{share:.1} %)"))?;
        row("their traffic", format!("{:.2}", traffic as f64 / 1e6), "  MB".into())?;
        let Some(trade) = &self.trade else { return Ok(()) };
        let mb = |bytes: usize| format!("{:.2}", bytes as f64 / 1e6);
        row("for the budget: nodes", trade.nodes.to_string(), String::new())?;
        let traffic = format!("  MB ({:.2} GFLOP)", trade.extra_flops as f64 / 1e9);
        row("  traffic", format!("{:.2}", trade.extra_traffic as f64 / 1e6), traffic)?;
        let note = |without| format!("  MB ({} without)", mb(without));
        row("  saved activations", mb(trade.saved_with), note(trade.saved_without))?;
        row("  total", mb(trade.bytes_with), note(trade.bytes_without))
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let Repetitions { nodes, traffic, flops } = self.all;
        json!({ "nodes": nodes, "flops": flops, "traffic_bytes": traffic, "budget": self.trade })
    }
}
