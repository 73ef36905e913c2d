//! The tape: a symbolic record of what a step computes. Values have shapes and dtypes, no storage and no device.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::graph::Op;
use crate::graph::builtin::StopGradient;
use crate::tensor::TensorDesc;

/// A value on a tape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(super) u32);

impl ValueId {
    /// Position in [`Tape::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a value is for; decides its lifetime and where `plan` counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Written by the caller before a step.
    Input,
    /// A weight, kept across steps.
    Parameter,
    /// State that ops change in place (batch norm's running statistics), kept across steps.
    State,
    /// Momentum buffers, kept across steps.
    Optimiser,
    /// Computed by a forward node.
    Activation,
    /// Computed by a backward or update node.
    Gradient,
}

impl Role {
    /// Whether the value keeps its content from step to step.
    pub fn persistent(self) -> bool {
        matches!(self, Role::Input | Role::Parameter | Role::State | Role::Optimiser)
    }
}

/// Which part of a step a node belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Recorded by the model.
    Forward,
    /// Appended by autodiff.
    Backward,
    /// The optimiser.
    Update,
}

impl Phase {
    /// All phases, in the order of a step.
    pub const ALL: [Phase; 3] = [Phase::Forward, Phase::Backward, Phase::Update];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Update => "update",
        }
    }
}

/// A value: a leaf or the output of a node.
#[derive(Debug, Clone)]
pub struct Value {
    /// Name in dumps; parameters carry their PyTorch `state_dict` name.
    pub name: String,
    /// Shape and element type.
    pub desc: TensorDesc,
    /// What it is for.
    pub role: Role,
    /// Whether a gradient is to flow to it.
    pub requires_grad: bool,
    /// Whether its content must be readable after the step.
    pub keep: bool,
    /// The value whose storage it shares, for outputs of view ops.
    pub alias_of: Option<ValueId>,
    /// Bytes of that storage before it.
    pub alias_offset: usize,
}

/// One recorded op.
#[derive(Debug, Clone)]
pub struct Node {
    /// The op with its attributes.
    pub op: Arc<dyn Op>,
    /// Where in the model it stands, e.g. `encoder.layer1.0.conv2`.
    pub name: String,
    /// Part of the step.
    pub phase: Phase,
    /// Values read.
    pub inputs: Vec<ValueId>,
    /// Values written. A gradient may be written by several nodes: the first overwrites, the others accumulate.
    pub outputs: Vec<ValueId>,
    /// Persistent values changed in place.
    pub updates: Vec<ValueId>,
    /// Whether it computes again what a node before it has computed and was not kept: see [`crate::graph::recompute`].
    pub again: bool,
}

impl Node {
    /// Whether it belongs to what follows the forward pass, and is no repetition of a part of that.
    pub fn is_late(&self) -> bool {
        self.phase != Phase::Forward && !self.again
    }
}

/// The record of one step.
#[derive(Debug, Clone, Default)]
pub struct Tape {
    values: Vec<Value>,
    nodes: Vec<Node>,
    scope: Vec<String>,
}

impl Tape {
    /// An empty tape.
    pub fn new() -> Tape {
        Tape::default()
    }

    /// All values.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// All nodes in execution order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// One value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.index()]
    }

    /// Shape and element type of a value.
    pub fn desc(&self, id: ValueId) -> &TensorDesc {
        &self.value(id).desc
    }

    /// All values of one role, in order of creation.
    pub fn with_role(&self, role: Role) -> impl Iterator<Item = (ValueId, &Value)> {
        self.values.iter().enumerate().filter(move |(_, v)| v.role == role).map(|(i, v)| (ValueId(i as u32), v))
    }

    /// A leaf of the given role.
    pub fn leaf(&mut self, name: &str, desc: TensorDesc, role: Role, requires_grad: bool) -> ValueId {
        self.push_value(name.to_string(), desc, role, requires_grad)
    }

    /// Marks a value as readable after the step; returns it.
    pub fn keep(&mut self, id: ValueId) -> ValueId {
        self.values[id.index()].keep = true;
        id
    }

    /// Makes a leaf a constant, as PyTorch's `requires_grad = False` does; must come before any op that uses it is
    /// differentiated.
    pub fn freeze(&mut self, id: ValueId) {
        self.values[id.index()].requires_grad = false;
    }

    /// Runs `record` with `name` appended to the names of the nodes it records.
    pub fn scoped<R>(&mut self, name: &str, record: impl FnOnce(&mut Tape) -> R) -> R {
        self.scope.push(name.to_string());
        let result = record(self);
        self.scope.pop();
        result
    }

    /// Records `op`; returns its outputs.
    ///
    /// # Errors
    /// What `op.infer` finds wrong with the inputs, with the node's name.
    pub fn record(&mut self, op: impl Op + 'static, inputs: &[ValueId]) -> Result<Vec<ValueId>> {
        self.record_updating(op, inputs, &[])
    }

    /// Records an op with a single output.
    ///
    /// # Errors
    /// As [`Tape::record`].
    pub fn record_one(&mut self, op: impl Op + 'static, inputs: &[ValueId]) -> Result<ValueId> {
        Ok(self.record(op, inputs)?[0])
    }

    /// Gives the node at position `index` one input more, and returns the output that comes of it. For an op that makes one
    /// output of each input by itself, of leaves: the node stays where it is, before all that follows.
    ///
    /// # Errors
    /// As [`Tape::record`].
    pub fn extend(&mut self, index: usize, leaf: ValueId) -> Result<ValueId> {
        let Node { op, name, inputs, outputs, .. } = self.nodes[index].clone();
        let desc = self.infer(&*op, &name, &[&inputs[..], &[leaf]].concat())?.swap_remove(inputs.len());
        let requires_grad = op.differentiable() && self.value(leaf).requires_grad;
        let output = self.push_value(format!("{name}:{}", outputs.len()), desc, Role::Activation, requires_grad);
        self.nodes[index].inputs.push(leaf);
        self.nodes[index].outputs.push(output);
        Ok(output)
    }

    /// Records `op`, which also changes the persistent values `updates` in place.
    ///
    /// # Errors
    /// As [`Tape::record`].
    pub fn record_updating(
        &mut self,
        op: impl Op + 'static,
        inputs: &[ValueId],
        updates: &[ValueId],
    ) -> Result<Vec<ValueId>> {
        let op: Arc<dyn Op> = Arc::new(op);
        let name = self.node_name(op.name());
        let descs = self.infer(&*op, &name, inputs)?;
        let requires_grad = op.differentiable() && inputs.iter().any(|&i| self.value(i).requires_grad);
        let outputs: Vec<ValueId> = descs
            .into_iter()
            .enumerate()
            .map(|(i, desc)| self.push_value(format!("{name}:{i}"), desc, Role::Activation, requires_grad))
            .collect();
        if op.is_view() {
            self.alias(outputs[0], inputs[0], &*op);
        }
        self.nodes.push(Node {
            op,
            name,
            phase: Phase::Forward,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
            updates: updates.to_vec(),
            again: false,
        });
        Ok(outputs)
    }

    /// `x` as a constant: no gradient is ever recorded across this node.
    ///
    /// # Errors
    /// None in practice: any value can be a constant.
    pub fn stop_gradient(&mut self, x: ValueId) -> Result<ValueId> {
        self.record_one(StopGradient, &[x])
    }

    /// The value that owns the storage of `id`.
    pub fn storage(&self, id: ValueId) -> ValueId {
        self.value(id).alias_of.unwrap_or(id)
    }

    /// Input and output descriptions of `op` at a node called `name`.
    pub(super) fn infer(&self, op: &dyn Op, name: &str, inputs: &[ValueId]) -> Result<Vec<TensorDesc>> {
        let descs: Vec<&TensorDesc> = inputs.iter().map(|&i| self.desc(i)).collect();
        op.infer(&descs).map_err(|error| match error {
            Error::Shape { what, expected, got, .. } => Error::Shape { op: name.to_string(), what, expected, got },
            other => other,
        })
    }

    pub(super) fn push_value(&mut self, name: String, desc: TensorDesc, role: Role, requires_grad: bool) -> ValueId {
        let (alias_of, alias_offset) = (None, 0);
        self.values.push(Value { name, desc, role, requires_grad, keep: false, alias_of, alias_offset });
        ValueId(self.values.len() as u32 - 1)
    }

    pub(super) fn push_node(&mut self, node: Node) {
        self.nodes.push(node);
    }

    /// Puts other nodes in the place of all there are, which it returns.
    pub(super) fn replace_nodes(&mut self, nodes: Vec<Node>) -> Vec<Node> {
        std::mem::replace(&mut self.nodes, nodes)
    }

    /// Lets `view`, the output of the view `op`, share the storage of its input `x`.
    pub(super) fn alias(&mut self, view: ValueId, x: ValueId, op: &dyn Op) {
        let (storage, offset) = (self.storage(x), self.value(x).alias_offset + op.view_offset(self.desc(x)));
        let view = &mut self.values[view.index()];
        (view.alias_of, view.alias_offset) = (Some(storage), offset);
    }

    /// Appends a node of the update phase: it reads `inputs` and changes `updates`; returns its outputs, which most have none of.
    ///
    /// # Errors
    /// As [`Tape::record`].
    pub fn update(&mut self, op: impl Op + 'static, inputs: &[ValueId], updates: &[ValueId]) -> Result<Vec<ValueId>> {
        let name = self.node_name(op.name());
        let described: Vec<ValueId> = inputs.iter().chain(updates).copied().collect();
        let descs = self.infer(&op, &name, &described)?;
        let output = |(i, desc)| self.push_value(format!("{name}:{i}"), desc, Role::Gradient, false);
        let outputs: Vec<ValueId> = descs.into_iter().enumerate().map(output).collect();
        self.nodes.push(Node {
            op: Arc::new(op),
            name,
            phase: Phase::Update,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
            updates: updates.to_vec(),
            again: false,
        });
        Ok(outputs)
    }

    fn node_name(&self, op: &str) -> String {
        if self.scope.is_empty() { op.to_string() } else { self.scope.join(".") }
    }
}
