//! Which activations are computed again in the backward pass so that a step fits into a budget of memory.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::fmt::{self, Display};
use std::str::FromStr;

use bytesize::ByteSize;

use crate::choice::written_as_text;
use crate::error::{Error, Result};
use crate::graph::ledger::Entry;
use crate::graph::plan::{Peak, Target, peak};
use crate::graph::recompute::{Repeat, recompute};
use crate::graph::{Node, Plan, Tape, ValueId};
use crate::tensor::TensorDesc;

/// How much memory a step may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MemoryBudget {
    /// As much as it wants.
    #[default]
    Unlimited,
    /// So many bytes.
    Bytes(u64),
    /// As little as recomputation can do with.
    Least,
}

impl FromStr for MemoryBudget {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<MemoryBudget, String> {
        match text {
            "none" => return Ok(MemoryBudget::Unlimited),
            "min" => return Ok(MemoryBudget::Least),
            _ => {}
        }
        let bytes = text.parse::<ByteSize>().ok().map(|size| size.as_u64()).filter(|&bytes| bytes > 0);
        let expected = || format!("expected a size, as 24GB or 22GiB, min or none, got {text:?}");
        bytes.map(MemoryBudget::Bytes).ok_or_else(expected)
    }
}

impl Display for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryBudget::Unlimited => f.write_str("none"),
            MemoryBudget::Bytes(bytes) => write!(f, "{bytes}B"),
            MemoryBudget::Least => f.write_str("min"),
        }
    }
}

written_as_text!(MemoryBudget);

/// What recomputation costs and saves in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Trade {
    /// Nodes that are repeated.
    pub nodes: usize,
    /// Bytes of the plan without it.
    pub bytes_without: usize,
    /// Bytes of the plan with it.
    pub bytes_with: usize,
    /// Bytes of activations that are kept from the forward pass, without it.
    pub saved_without: usize,
    /// The same with it.
    pub saved_with: usize,
    /// Bytes that the repetitions move.
    pub extra_traffic: u64,
    /// Floating-point operations of the repetitions.
    pub extra_flops: u64,
}

impl Trade {
    /// What separates two versions of a tape, the second of which repeats more.
    fn between([without, with]: [&Tape; 2], target: Target) -> Result<Trade> {
        let [plain, fitted] = [Plan::new(without, target)?.memory, Plan::new(with, target)?.memory];
        let [fewer, more] = [without, with].map(repetitions);
        Ok(Trade {
            nodes: more.nodes - fewer.nodes,
            bytes_without: plain.total,
            bytes_with: fitted.total,
            saved_without: plain.saved_activations,
            saved_with: fitted.saved_activations,
            extra_traffic: more.traffic - fewer.traffic,
            extra_flops: more.flops - fewer.flops,
        })
    }
}

/// What the repetitions of a tape come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Repetitions {
    /// Nodes that compute again what others have.
    pub nodes: usize,
    /// Bytes that they move.
    pub traffic: u64,
    /// Floating-point operations.
    pub flops: u64,
}

/// What the repetitions of `tape` come to.
pub fn repetitions(tape: &Tape) -> Repetitions {
    let repeated = tape.nodes().iter().filter(|node| node.again);
    repeated.fold(Repetitions::default(), |sum, node| {
        let Entry { traffic, flops, .. } = Entry::of(tape, node, &[]);
        Repetitions { nodes: sum.nodes + 1, traffic: sum.traffic + traffic.total(), flops: sum.flops + flops }
    })
}

fn descs<'t>(tape: &'t Tape, values: &[ValueId]) -> Vec<&'t TensorDesc> {
    values.iter().map(|&value| tape.desc(value)).collect()
}

/// Rewrites `tape` until its plan takes no more than `budget`, with the least extra traffic that a greedy choice finds: as long
/// as the peak is too high, of what lies idle there it drops what gives the most bytes for those that have to be moved to have
/// it again. Only nodes without floating-point operations to speak of are repeated, and what they need that is kept by nobody.
///
/// # Errors
/// [`Error::Config`] when the budget is below the least that this can do.
pub fn fit(tape: &Tape, target: Target, budget: MemoryBudget) -> Result<(Tape, Trade)> {
    let search = Search { tape, target, candidates: candidates(tape) };
    let chosen = match budget {
        MemoryBudget::Unlimited => BTreeSet::new(),
        MemoryBudget::Bytes(bytes) => search.within(usize::try_from(bytes).unwrap_or(usize::MAX))?,
        MemoryBudget::Least => search.least()?.0,
    };
    let fitted = search.with(&chosen)?;
    let trade = Trade::between([tape, &fitted], target)?;
    Ok((fitted, trade))
}

/// A node whose outputs may be dropped.
#[derive(Debug)]
struct Candidate {
    /// It, and what has to be repeated for it because nobody else keeps it.
    nodes: Vec<usize>,
    /// Its outputs that wait for the backward pass.
    values: Vec<ValueId>,
    /// Bytes of these.
    freed: u64,
    /// Bytes to be moved to have them again.
    extra: u64,
}

/// Every node that has outputs which wait for the backward pass and can be had again cheaply.
fn candidates(tape: &Tape) -> Vec<Candidate> {
    let mut waiting = vec![false; tape.values().len()];
    let mut writer = HashMap::new();
    for (index, node) in tape.nodes().iter().enumerate() {
        match node.is_late() {
            true => node.inputs.iter().for_each(|&input| waiting[tape.storage(input).index()] = true),
            false => writer.extend(node.outputs.iter().map(|&output| (output, index))),
        }
    }
    let context = Context { tape, waiting, writer };
    (0..tape.nodes().len()).filter_map(|index| context.candidate(index)).collect()
}

struct Context<'t> {
    tape: &'t Tape,
    /// By value: whether the backward pass reads it.
    waiting: Vec<bool>,
    /// The node of the forward pass, or of a repetition of it, that computes a value.
    writer: HashMap<ValueId, usize>,
}

impl Context<'_> {
    fn candidate(&self, index: usize) -> Option<Candidate> {
        let node = &self.tape.nodes()[index];
        if node.is_late() || node.op.is_view() {
            return None;
        }
        let waits = |value: &ValueId| self.waiting[value.index()] && !self.tape.value(*value).keep;
        let values: Vec<ValueId> = self.cheap(node)?.outputs.into_iter().filter(waits).collect();
        let freed = values.iter().map(|&value| self.tape.desc(value).bytes() as u64).sum();
        if freed == 0 {
            return None;
        }
        let (mut nodes, mut extra) = (vec![index], 0);
        let mut next = 0;
        while let Some(&index) = nodes.get(next) {
            let repeat = self.cheap(&self.tape.nodes()[index])?;
            extra += repeat.traffic(self.tape);
            for input in repeat.inputs {
                let storage = self.tape.storage(input);
                let there = self.tape.value(storage).role.persistent() || self.waiting[storage.index()];
                let needed = if there { None } else { Some(*self.writer.get(&storage)?) };
                nodes.extend(needed.filter(|index| !nodes.contains(index)));
            }
            next += 1;
        }
        Some(Candidate { nodes, values, freed, extra })
    }

    /// What repeats a node, if it does no arithmetic to speak of.
    fn cheap(&self, node: &Node) -> Option<Repeat> {
        let repeat = Repeat::of(node)?;
        (repeat.op.flops(&descs(self.tape, &repeat.inputs)) == 0).then_some(repeat)
    }
}

/// The search for a choice of candidates, which goes by their positions.
struct Search<'t> {
    tape: &'t Tape,
    target: Target,
    candidates: Vec<Candidate>,
}

type Chosen = BTreeSet<usize>;

impl Search<'_> {
    /// The tape without the outputs of the chosen ones.
    fn with(&self, chosen: &Chosen) -> Result<Tape> {
        let mut tape = self.tape.clone();
        recompute(&mut tape, &chosen.iter().flat_map(|&c| &self.candidates[c].nodes).copied().collect())?;
        Ok(tape)
    }

    /// A choice whose plan takes no more than `limit`.
    fn within(&self, limit: usize) -> Result<Chosen> {
        let (chosen, reached) = self.descend(limit)?;
        if reached <= limit {
            return self.pruned(chosen, limit);
        }
        // What was enough at the time has led past it.
        let (chosen, least) = self.least()?;
        if least <= limit {
            return self.pruned(chosen, limit);
        }
        let [least, asked] = [least, limit].map(|bytes| format!("{:.1} MB", bytes as f64 / 1e6));
        let what = format!("expected at least {least}, with which all is computed again that helps, got {asked}");
        let hint = "use --views sequential, --bn gram, or a smaller --batch";
        Err(Error::config("--memory-budget", what).with_hint(hint))
    }

    /// The choice that takes the least, and what it takes.
    fn least(&self) -> Result<(Chosen, usize)> {
        let (chosen, reached) = self.descend(0)?;
        let chosen = self.pruned(chosen, reached)?;
        let total = Plan::new(&self.with(&chosen)?, self.target)?.memory.total;
        Ok((chosen, total))
    }

    /// Chooses until the plan takes no more than `limit`, or nothing helps any more; returns the choice and what it takes.
    fn descend(&self, limit: usize) -> Result<(Chosen, usize)> {
        let mut chosen = Chosen::new();
        let mut open: Chosen = (0..self.candidates.len()).collect();
        let mut fitted = self.with(&chosen)?;
        let mut top = peak(&fitted, self.target)?;
        loop {
            // Where the peak is low enough, only a placement that wastes some can take more.
            let over = match top.bytes.checked_sub(limit) {
                Some(over) if over > 0 => over,
                _ => Plan::new(&fitted, self.target)?.memory.total.saturating_sub(limit),
            };
            let next = if over > 0 { self.best(&fitted, top, &open, over as u64) } else { None };
            let Some(next) = next else { return Ok((chosen, Plan::new(&fitted, self.target)?.memory.total)) };
            open.remove(&next);
            chosen.insert(next);
            let tape = self.with(&chosen)?;
            let lower = peak(&tape, self.target)?;
            match lower.bytes <= top.bytes {
                true => (fitted, top) = (tape, lower),
                false => _ = chosen.remove(&next),
            }
        }
    }

    /// The best of the open candidates that lie idle at the peak of `fitted`, which is too high by `over` bytes: the one that
    /// frees the most for its extra traffic; of equals the smallest that frees enough, or else the largest.
    fn best(&self, fitted: &Tape, top: Peak, open: &Chosen, over: u64) -> Option<usize> {
        let idle = self.idle(fitted, top.node);
        let helps = |c: &usize| self.candidates[*c].values.iter().any(|value| idle[value.index()]);
        let rank = |&c: &usize| {
            let Candidate { freed, extra, .. } = self.candidates[c];
            // Parts of a million are fine enough, and make a total order.
            let rate = u128::from(freed) * 1_000_000 / u128::from(extra.max(1));
            let enough = if freed >= over { u64::MAX - freed } else { freed };
            (rate, freed >= over, enough, Reverse(c))
        };
        open.iter().copied().filter(helps).max_by_key(rank)
    }

    /// By value: whether it waits at `node` of `fitted`: all that uses it on the way forward comes before, and all on the way
    /// back after.
    fn idle(&self, fitted: &Tape, node: usize) -> Vec<bool> {
        let known = self.tape.values().len();
        let (mut between, mut waits) = (vec![true; known], vec![false; known]);
        for (index, other) in fitted.nodes().iter().enumerate() {
            // What this search has appended belongs to the way back.
            let late = other.is_late() || other.outputs.iter().any(|output| output.index() >= known);
            let values = other.inputs.iter().chain(&other.outputs).map(|&value| fitted.storage(value).index());
            for value in values.filter(|&value| value < known) {
                between[value] &= if late { index > node } else { index < node };
                waits[value] |= late;
            }
        }
        between.into_iter().zip(waits).map(|(between, waits)| between && waits).collect()
    }

    /// The choice without those that `limit` can be met without, the costliest first.
    fn pruned(&self, mut chosen: Chosen, limit: usize) -> Result<Chosen> {
        let mut costliest: Vec<usize> = chosen.iter().copied().collect();
        costliest.sort_by_key(|&c| (Reverse(self.candidates[c].extra), c));
        for candidate in costliest {
            chosen.remove(&candidate);
            let tape = self.with(&chosen)?;
            let fits = peak(&tape, self.target)?.bytes <= limit && Plan::new(&tape, self.target)?.memory.total <= limit;
            if !fits {
                chosen.insert(candidate);
            }
        }
        Ok(chosen)
    }
}
