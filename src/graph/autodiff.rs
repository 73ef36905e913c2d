//! Reverse-mode differentiation: walks the tape backwards and appends ordinary ops.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::builtin::Copy;
use crate::graph::{Node, Op, Phase, Role, Tape, ValueId};

/// Gradients by value: `gradients[&x]` is d_x.
pub type Gradients = HashMap<ValueId, ValueId>;

/// Appends the backward pass for the outputs in `seeds` (pairs of an output and its upstream gradient) and returns the
/// gradient of every value that received one.
///
/// Nodes whose outputs receive no gradient are skipped, so whatever lies behind a stop-gradient alone costs nothing.
///
/// # Errors
/// [`Error::Unsupported`] when an op on the way has no gradient; shape errors of faulty ops.
pub fn backward(tape: &mut Tape, seeds: &[(ValueId, ValueId)]) -> Result<Gradients> {
    let mut gradients: Gradients = seeds.iter().copied().collect();
    for index in (0..tape.nodes().len()).rev() {
        let node = tape.nodes()[index].clone();
        let reached = node.outputs.iter().any(|o| gradients.contains_key(o) && tape.value(*o).requires_grad);
        if reached {
            let op = Arc::clone(&node.op);
            op.backward(&mut GradBuilder { tape, gradients: &mut gradients, node })?;
        }
    }
    Ok(gradients)
}

/// What an op's `backward` sees: its own node, the gradients so far, and a way to append ops.
#[derive(Debug)]
pub struct GradBuilder<'a> {
    tape: &'a mut Tape,
    gradients: &'a mut Gradients,
    node: Node,
}

impl GradBuilder<'_> {
    /// The node's input `i`.
    pub fn input(&self, i: usize) -> ValueId {
        self.node.inputs[i]
    }

    /// The node's output `i`.
    pub fn output(&self, i: usize) -> ValueId {
        self.node.outputs[i]
    }

    /// Number of inputs of the node.
    pub fn input_count(&self) -> usize {
        self.node.inputs.len()
    }

    /// The tape, to look at descriptions.
    pub fn tape(&self) -> &Tape {
        self.tape
    }

    /// Whether input `i` wants a gradient.
    pub fn needs(&self, i: usize) -> bool {
        self.tape.value(self.node.inputs[i]).requires_grad
    }

    /// Whether output `i` has a gradient.
    pub fn reached(&self, i: usize) -> bool {
        self.gradients.contains_key(&self.node.outputs[i])
    }

    /// The gradient of output `i`.
    ///
    /// # Errors
    /// [`Error::Internal`] when none arrived: the op asked for the gradient of an output that nothing consumes.
    pub fn d_output(&self, i: usize) -> Result<ValueId> {
        self.gradients.get(&self.node.outputs[i]).copied().ok_or_else(|| Error::Internal {
            thread: "autodiff".into(),
            message: format!("output {i} of {} has no gradient", self.node.name),
        })
    }

    /// Takes the gradient that input `i` has so far, if it has one, for an op that adds to it what it computes: the output
    /// emitted for this input next is the whole gradient.
    pub fn take_gradient(&mut self, i: usize) -> Option<ValueId> {
        self.gradients.remove(&self.node.inputs[i])
    }

    /// Makes `gradient` the gradient of input `i` as it is, without a copy.
    ///
    /// # Errors
    /// As [`GradBuilder::emit`], when a gradient is there already and the two must be added.
    pub fn pass(&mut self, i: usize, gradient: ValueId) -> Result<()> {
        match self.gradients.contains_key(&self.node.inputs[i]) {
            true => self.emit(Copy, &[gradient], &[Some(i)]),
            false => {
                self.gradients.insert(self.node.inputs[i], gradient);
                Ok(())
            }
        }
    }

    /// Appends `op`. Its output `j` is a contribution to the gradient of this node's input `targets[j]`, or dropped scratch
    /// for `None`.
    ///
    /// A gradient that exists already is added to in place; an op that cannot accumulate gets a temporary and a copy.
    ///
    /// # Errors
    /// Shape errors of `op.infer`.
    pub fn emit(&mut self, op: impl Op + 'static, inputs: &[ValueId], targets: &[Option<usize>]) -> Result<()> {
        self.emit_values(op, inputs, targets).map(|_| ())
    }

    /// As [`GradBuilder::emit`], for a gradient that takes several ops; returns the outputs.
    ///
    /// # Errors
    /// As [`GradBuilder::emit`].
    pub fn emit_values(
        &mut self,
        op: impl Op + 'static,
        inputs: &[ValueId],
        targets: &[Option<usize>],
    ) -> Result<Vec<ValueId>> {
        let op: Arc<dyn Op> = Arc::new(op);
        let name = format!("{}/{}", self.node.name, op.name());
        let descs = self.tape.infer(&*op, &name, inputs)?;
        let mut outputs = Vec::with_capacity(descs.len());
        let mut joins = Vec::new();
        for (j, desc) in descs.into_iter().enumerate() {
            let target = targets[j].map(|i| self.node.inputs[i]);
            let existing = target.and_then(|t| self.gradients.get(&t).copied());
            outputs.push(match (target, existing) {
                (Some(_), Some(gradient)) if op.accumulates() => gradient,
                (Some(_), Some(gradient)) => {
                    let part = self.tape.push_value(format!("{name}:part{j}"), desc, Role::Gradient, false);
                    joins.push((part, gradient));
                    part
                }
                (Some(t), None) => {
                    let label = format!("d_{}", self.tape.value(t).name);
                    let gradient = self.tape.push_value(label, desc, Role::Gradient, false);
                    self.gradients.insert(t, gradient);
                    gradient
                }
                (None, _) => self.tape.push_value(format!("{name}:{j}"), desc, Role::Gradient, false),
            });
        }
        self.push(op, name.clone(), inputs.to_vec(), outputs.clone());
        for (part, gradient) in joins {
            self.push(Arc::new(Copy), format!("{name}/add"), vec![part], vec![gradient]);
        }
        Ok(outputs)
    }

    fn push(&mut self, op: Arc<dyn Op>, name: String, inputs: Vec<ValueId>, outputs: Vec<ValueId>) {
        self.tape.push_node(Node {
            op,
            name,
            phase: Phase::Backward,
            inputs,
            outputs,
            updates: Vec::new(),
            again: false,
        });
    }
}
