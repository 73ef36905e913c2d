//! Recomputation: activations that are not kept for the backward pass but computed again when it comes to them (Chen et al.
//! 2016, "Training deep nets with sublinear memory cost"). A tape is rewritten: nodes that repeat others appear in its
//! backward phase, and what follows reads their outputs. Nothing else changes, so neither do the results.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::error::Result;
use crate::graph::{Node, Op, Phase, Role, Tape, Tensors, ValueId, WriteMode};

/// How an op's outputs are had again.
#[derive(Debug, Clone)]
pub enum Again {
    /// Not at all: they are kept.
    Never,
    /// By the same op on the same inputs. Of an op with updates they are kept nevertheless: it must not run twice.
    Same,
    /// By another op.
    By(Repetition),
}

/// An op that computes the bulk of another one's outputs again from its inputs and the rest of its outputs, which are kept.
#[derive(Debug, Clone)]
pub struct Repetition {
    /// The op.
    pub op: Arc<dyn Op>,
    /// What it reads.
    pub inputs: Vec<Source>,
    /// Which outputs of the first op its own ones are, in order.
    pub outputs: Vec<usize>,
}

/// A value as the op sees it that is to be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Its input of this number.
    Input(usize),
    /// Its output of this number.
    Output(usize),
}

/// What computes outputs of a node again.
#[derive(Debug, Clone)]
pub(super) struct Repeat {
    pub op: Arc<dyn Op>,
    pub inputs: Vec<ValueId>,
    /// The values that it computes again.
    pub outputs: Vec<ValueId>,
}

impl Repeat {
    /// That of a node, if it can be repeated.
    pub fn of(node: &Node) -> Option<Repeat> {
        match node.op.again() {
            Again::Never => None,
            Again::Same if !node.updates.is_empty() => None,
            Again::Same => {
                Some(Repeat { op: node.op.clone(), inputs: node.inputs.clone(), outputs: node.outputs.clone() })
            }
            Again::By(Repetition { op, inputs, outputs }) => {
                let value = |source: Source| match source {
                    Source::Input(i) => node.inputs[i],
                    Source::Output(i) => node.outputs[i],
                };
                let outputs = outputs.into_iter().map(|i| node.outputs[i]).collect();
                Some(Repeat { op, inputs: inputs.into_iter().map(value).collect(), outputs })
            }
        }
    }

    /// Bytes that it moves on `tape`.
    pub fn traffic(&self, tape: &Tape) -> u64 {
        let desc = |&value: &ValueId| tape.desc(value);
        let outputs = self.outputs.iter().map(|value| (desc(value), WriteMode::Overwrite)).collect();
        let inputs = self.inputs.iter().map(desc).collect();
        let tensors = Tensors { inputs, outputs, updates: Vec::new(), repeated: 0 };
        self.op.traffic(&tensors).total()
    }
}

/// Rewrites `tape` so that the outputs of the nodes `dropped`, by their positions, are computed again for what follows the
/// forward pass, right before the first node that reads one of them; all later ones read the same. What a repetition reads
/// is repeated as well where it is dropped itself. Nodes that cannot be repeated are passed over.
///
/// # Errors
/// Shape errors of faulty ops.
pub fn recompute(tape: &mut Tape, dropped: &BTreeSet<usize>) -> Result<()> {
    let nodes = tape.replace_nodes(Vec::new());
    let mut rewriting = Rewriting::new(tape, &nodes, dropped);
    for node in &nodes {
        let mut node = node.clone();
        if node.is_late() {
            for input in &mut node.inputs {
                *input = rewriting.repeated(*input)?;
            }
        }
        rewriting.nodes.push(node);
    }
    let nodes = rewriting.nodes;
    tape.replace_nodes(nodes);
    Ok(())
}

/// Of the nodes `first..end` those whose outputs are worth to be computed again, if all of that part of the forward pass is.
/// The others are kept: what other parts of it read as well, what is a view, and what is far smaller than that which it is
/// computed from, such as statistics.
pub fn repeatable(tape: &Tape, first: usize, end: usize) -> BTreeSet<usize> {
    /// How many times smaller.
    const FAR: usize = 16;
    let nodes = tape.nodes();
    let elsewhere = nodes[..first].iter().chain(&nodes[end..]).filter(|node| node.phase == Phase::Forward);
    let read: BTreeSet<ValueId> = elsewhere.flat_map(|node| &node.inputs).copied().collect();
    let bytes = |values: &[ValueId]| values.iter().map(|&v| tape.desc(v).bytes()).sum::<usize>();
    let worth = |&index: &usize| {
        let node = &nodes[index];
        let shared = node.outputs.iter().any(|output| read.contains(output));
        !shared && !node.op.is_view() && bytes(&node.outputs) * FAR > bytes(&node.inputs)
    };
    (first..end).filter(worth).collect()
}

/// A tape on its way to another list of nodes.
struct Rewriting<'t> {
    tape: &'t mut Tape,
    /// The new list so far.
    nodes: Vec<Node>,
    /// What repeats a node, and the node's name, by its position on the old list: of those that are dropped, and views of what
    /// they compute.
    repeats: HashMap<usize, (Repeat, String)>,
    /// Which of them computes a value.
    writer: HashMap<ValueId, usize>,
    /// The second computation of a value.
    twins: HashMap<ValueId, ValueId>,
}

impl<'t> Rewriting<'t> {
    fn new(tape: &'t mut Tape, nodes: &[Node], dropped: &BTreeSet<usize>) -> Rewriting<'t> {
        let (mut repeats, mut writer) = (HashMap::new(), HashMap::new());
        for (index, node) in nodes.iter().enumerate().filter(|(_, node)| !node.is_late()) {
            let of_dropped = node.op.is_view() && writer.contains_key(&node.inputs[0]);
            let Some(repeat) = Repeat::of(node).filter(|_| of_dropped || dropped.contains(&index)) else { continue };
            writer.extend(repeat.outputs.iter().map(|&output| (output, index)));
            repeats.insert(index, (repeat, node.name.clone()));
        }
        Rewriting { tape, nodes: Vec::with_capacity(nodes.len()), repeats, writer, twins: HashMap::new() }
    }

    /// What a late node reads in the place of `value`; appends what computes it, if nothing has yet.
    fn repeated(&mut self, value: ValueId) -> Result<ValueId> {
        let Some(&last) = self.writer.get(&value) else { return Ok(value) };
        // In the order of the tape, which is one that works.
        let mut needed = BTreeSet::new();
        let mut pending = vec![(value, last)];
        while let Some((value, index)) = pending.pop() {
            if self.twins.contains_key(&value) || !needed.insert(index) {
                continue;
            }
            let inputs = &self.repeats[&index].0.inputs;
            pending.extend(inputs.iter().filter_map(|input| Some((*input, *self.writer.get(input)?))));
        }
        needed.into_iter().try_for_each(|index| self.repeat(index))?;
        Ok(self.twins[&value])
    }

    /// Appends the repetition of a node.
    fn repeat(&mut self, index: usize) -> Result<()> {
        let (Repeat { op, inputs, outputs: firsts }, name) = &self.repeats[&index];
        let name = format!("{name}/again");
        let inputs: Vec<ValueId> = inputs.iter().map(|input| *self.twins.get(input).unwrap_or(input)).collect();
        let descs = self.tape.infer(&**op, &name, &inputs)?;
        let mut outputs = Vec::with_capacity(descs.len());
        for (first, desc) in firsts.iter().zip(descs) {
            let label = format!("{} (again)", self.tape.value(*first).name);
            let twin = self.tape.push_value(label, desc, Role::Activation, false);
            self.twins.insert(*first, twin);
            outputs.push(twin);
        }
        if op.is_view() {
            self.tape.alias(outputs[0], inputs[0], &**op);
        }
        let (phase, updates) = (Phase::Backward, Vec::new());
        self.nodes.push(Node { op: op.clone(), name, phase, inputs, outputs, updates, again: true });
        Ok(())
    }
}
