//! The plan: who overwrites and who accumulates, which values live when, and where each lies in one arena.

use crate::backend::cpu::arena::{ALIGNMENT, Slot};
use crate::error::{Error, Result};
use crate::graph::{Phase, Role, Tape, Value, ValueId};
use crate::tensor::TensorDesc;

/// Which kind of device a plan is for; they differ in the scratch that ops need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The host.
    Cpu,
    /// A CUDA device, real or emulated.
    Cuda,
}

/// How a node writes one output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteMode {
    /// Replaces what is there: the first writer of a value.
    Overwrite,
    /// Adds to what is there.
    Accumulate,
}

/// One node's share of the plan.
#[derive(Debug, Clone)]
pub struct NodePlan {
    /// How each output is written.
    pub modes: Vec<WriteMode>,
    /// Scratch of the node.
    pub workspace: Slot,
}

/// A buffer of the arena and the nodes between which it lives.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// Name of the value, or of the node whose workspace it is.
    pub name: String,
    /// What it is for; `None` for workspace.
    pub role: Option<Role>,
    /// Shape and element type; `None` for workspace.
    pub desc: Option<TensorDesc>,
    /// Where it lies.
    pub slot: Slot,
    /// First node that needs it.
    pub first: usize,
    /// Last node that needs it.
    pub last: usize,
}

/// Memory by purpose, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryReport {
    /// Weights.
    pub parameters: usize,
    /// Batch norm's running statistics and counters.
    pub state: usize,
    /// Momentum buffers.
    pub optimiser: usize,
    /// What the caller writes before a step (views, hyper-parameters); on CUDA devices twice, for this step and the next.
    pub inputs: usize,
    /// Activations that are alive when the forward pass ends: what is saved for the backward pass.
    pub saved_activations: usize,
    /// Gradients of the parameters.
    pub parameter_gradients: usize,
    /// The largest workspace of any node.
    pub workspace: usize,
    /// The most bytes of activations, gradients and workspace alive at one node: no placement can do with less.
    pub transient_peak: usize,
    /// Bytes that activations, gradients and workspace take in the arena as placed.
    pub transient: usize,
    /// The whole arena.
    pub total: usize,
}

/// Placement of every buffer of a tape.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Slot of each value, by [`ValueId::index`]; views have theirs in the slot of their storage.
    pub slots: Vec<Slot>,
    /// Per node.
    pub nodes: Vec<NodePlan>,
    /// Everything that has storage, in order of creation.
    pub buffers: Vec<Buffer>,
    /// Every input lies at its slot, and again so many bytes further on: a step reads one copy while the next step's is
    /// written. 0 where there is one copy.
    pub second_inputs: usize,
    /// The figures.
    pub memory: MemoryReport,
}

impl Plan {
    /// Plans `tape`: persistent values first, then activations, gradients and workspaces packed by lifetime.
    ///
    /// # Errors
    /// [`Error::Internal`] when a value is read before any node writes it.
    pub fn new(tape: &Tape, target: Target) -> Result<Plan> {
        Plan::guarded(tape, target, 0)
    }

    /// As [`Plan::new`], for tests that look for overruns: at least `guard` unused bytes lie behind every buffer, and with
    /// a guard no memory is used twice.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn guarded(tape: &Tape, target: Target, guard: usize) -> Result<Plan> {
        let mut buffers = lifetimes(tape)?;
        let modes = write_modes(tape);
        let workspaces = add_workspaces(tape, target, &mut buffers);
        if guard > 0 {
            buffers.iter_mut().for_each(|b| (b.first, b.last) = (0, tape.nodes().len()));
        }
        let (persistent, second_inputs) = place_persistent(&mut buffers, target, guard);
        let total = place_transient(&mut buffers, persistent, guard);
        let slot_of = |(index, value): (usize, &Value)| match value.alias_of {
            None => buffers[index].slot,
            Some(storage) => {
                let offset = buffers[storage.index()].slot.offset + value.alias_offset;
                Slot { offset, bytes: value.desc.bytes() }
            }
        };
        let slots = tape.values().iter().enumerate().map(slot_of).collect();
        let nodes = modes
            .into_iter()
            .zip(workspaces)
            .map(|(modes, workspace)| NodePlan { modes, workspace: buffers[workspace].slot })
            .collect();
        let mut memory = report(tape, &buffers, persistent, total);
        memory.inputs += second_inputs;
        buffers.retain(|b| b.slot.bytes > 0);
        Ok(Plan { slots, nodes, buffers, second_inputs, memory })
    }

    /// Where a value lies.
    pub fn slot(&self, id: ValueId) -> Slot {
        self.slots[id.index()]
    }
}

/// One buffer per value (empty for views), then lifetimes widened over all reads and writes.
fn lifetimes(tape: &Tape) -> Result<Vec<Buffer>> {
    let end = tape.nodes().len().saturating_sub(1);
    let mut buffers: Vec<Buffer> = tape
        .values()
        .iter()
        .map(|v| {
            let bytes = if v.alias_of.is_some() { 0 } else { v.desc.bytes() };
            let (first, last) = if v.role.persistent() { (0, end) } else { (usize::MAX, 0) };
            let slot = Slot { offset: 0, bytes };
            Buffer { name: v.name.clone(), role: Some(v.role), desc: Some(v.desc.clone()), slot, first, last }
        })
        .collect();
    for (index, node) in tape.nodes().iter().enumerate() {
        for &input in &node.inputs {
            let buffer = &mut buffers[tape.storage(input).index()];
            if buffer.first == usize::MAX {
                return Err(Error::Internal {
                    thread: "planner".into(),
                    message: format!("{} reads {} before it is written", node.name, buffer.name),
                });
            }
            buffer.last = buffer.last.max(index);
        }
        for &output in &node.outputs {
            let buffer = &mut buffers[tape.storage(output).index()];
            buffer.first = buffer.first.min(index);
            buffer.last = buffer.last.max(index);
        }
    }
    for (i, value) in tape.values().iter().enumerate() {
        if value.keep {
            buffers[tape.storage(ValueId(i as u32)).index()].last = end;
        }
    }
    Ok(buffers)
}

/// The first node that writes a value overwrites it, later ones accumulate: there is no zeroing pass.
fn write_modes(tape: &Tape) -> Vec<Vec<WriteMode>> {
    let mut written = vec![false; tape.values().len()];
    let mut mode = |id: ValueId| match std::mem::replace(&mut written[id.index()], true) {
        true => WriteMode::Accumulate,
        false => WriteMode::Overwrite,
    };
    tape.nodes().iter().map(|node| node.outputs.iter().map(|&o| mode(o)).collect()).collect()
}

/// Appends a buffer for each node's workspace; returns their positions.
fn add_workspaces(tape: &Tape, target: Target, buffers: &mut Vec<Buffer>) -> Vec<usize> {
    let first = buffers.len();
    for (index, node) in tape.nodes().iter().enumerate() {
        let descs: Vec<&TensorDesc> = node.inputs.iter().map(|&i| tape.desc(i)).collect();
        let bytes = match (target, node.op.library_work(&descs)) {
            (Target::Cpu, _) => node.op.workspace(&descs),
            (Target::Cuda, Some(work)) => work.workspace(),
            (Target::Cuda, None) => node.op.cuda_workspace(&descs),
        };
        let slot = Slot { offset: 0, bytes };
        let name = format!("{} (workspace)", node.name);
        buffers.push(Buffer { name, role: None, desc: None, slot, first: index, last: index });
    }
    (first..buffers.len()).collect()
}

fn is_persistent(buffer: &Buffer) -> bool {
    buffer.role.is_some_and(Role::persistent)
}

fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Lays persistent buffers end to end, inputs first, on CUDA devices with room for them twice; returns the total size and
/// the distance between the two copies of the inputs.
fn place_persistent(buffers: &mut [Buffer], target: Target, guard: usize) -> (usize, usize) {
    let mut place = |keep: &dyn Fn(&Buffer) -> bool, from: usize| {
        let mut offset = from;
        for buffer in buffers.iter_mut().filter(|b| is_persistent(b) && keep(b)) {
            buffer.slot.offset = offset;
            offset += align(buffer.slot.bytes + guard);
        }
        offset
    };
    let is_input = |b: &Buffer| b.role == Some(Role::Input);
    let inputs = place(&is_input, 0);
    let second_inputs = if target == Target::Cuda { inputs } else { 0 };
    (place(&|b| !is_input(b), inputs + second_inputs), second_inputs)
}

/// Greedy by size: the largest buffer first, each at the lowest offset that is free during its whole life
/// (Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020). Returns the arena's size.
fn place_transient(buffers: &mut [Buffer], base: usize, guard: usize) -> usize {
    let mut order: Vec<usize> =
        (0..buffers.len()).filter(|&i| !is_persistent(&buffers[i]) && buffers[i].slot.bytes > 0).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].slot.bytes), buffers[i].first, i));
    let mut placed: Vec<usize> = Vec::new(); // sorted by offset
    let mut total = base;
    for i in order {
        let (first, last, bytes) = (buffers[i].first, buffers[i].last, align(buffers[i].slot.bytes + guard));
        let mut offset = base;
        for other in placed.iter().map(|&p| &buffers[p]).filter(|o| o.first <= last && first <= o.last) {
            if offset + bytes <= other.slot.offset {
                break;
            }
            offset = offset.max(align(other.slot.end() + guard));
        }
        buffers[i].slot.offset = offset;
        total = total.max(offset + bytes);
        let position = placed.partition_point(|&p| buffers[p].slot.offset <= offset);
        placed.insert(position, i);
    }
    total
}

/// The node at which the most bytes are alive, and how many: no placement can do with less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peak {
    /// Position on the tape.
    pub node: usize,
    /// Persistent values included.
    pub bytes: usize,
}

/// The peak of a tape, without placing anything.
pub(super) fn peak(tape: &Tape, target: Target) -> Result<Peak> {
    let mut buffers = lifetimes(tape)?;
    add_workspaces(tape, target, &mut buffers);
    let (persistent, _) = place_persistent(&mut buffers, target, 0);
    let alive = transient_bytes(&buffers, tape.nodes().len());
    let most = alive.into_iter().enumerate().max_by_key(|&(_, bytes)| bytes);
    let (node, bytes) = most.unwrap_or_default();
    Ok(Peak { node, bytes: persistent + bytes })
}

/// Bytes of activations, gradients and workspace that are alive at each node.
fn transient_bytes(buffers: &[Buffer], nodes: usize) -> Vec<usize> {
    let (mut begins, mut ends) = (vec![0; nodes], vec![0; nodes]);
    for buffer in buffers.iter().filter(|b| !is_persistent(b) && b.first < nodes) {
        begins[buffer.first] += align(buffer.slot.bytes);
        ends[buffer.last.min(nodes - 1)] += align(buffer.slot.bytes);
    }
    let mut alive = 0;
    let mut at = |(begin, end): (usize, usize)| {
        let here = alive + begin;
        alive = here - end;
        here
    };
    begins.into_iter().zip(ends).map(&mut at).collect()
}

fn report(tape: &Tape, buffers: &[Buffer], persistent: usize, total: usize) -> MemoryReport {
    let sum = |keep: &dyn Fn(&Buffer) -> bool| buffers.iter().filter(|b| keep(b)).map(|b| align(b.slot.bytes)).sum();
    let role = |role: Role| sum(&|b| b.role == Some(role));
    let forward_end = tape.nodes().iter().rposition(|n| n.phase == Phase::Forward).unwrap_or(0);
    let backward_end = tape.nodes().iter().rposition(|n| n.phase != Phase::Update).unwrap_or(0);
    let alive = |b: &Buffer, node: usize| b.first <= node && node <= b.last;
    MemoryReport {
        parameters: role(Role::Parameter),
        state: role(Role::State),
        optimiser: role(Role::Optimiser),
        inputs: role(Role::Input),
        saved_activations: sum(&|b| b.role == Some(Role::Activation) && alive(b, forward_end) && b.last > forward_end),
        parameter_gradients: sum(&|b| b.role == Some(Role::Gradient) && b.last > backward_end),
        workspace: buffers.iter().filter(|b| b.role.is_none()).map(|b| b.slot.bytes).max().unwrap_or(0),
        transient_peak: transient_bytes(buffers, tape.nodes().len()).into_iter().max().unwrap_or(0),
        transient: total - persistent,
        total,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::builtin::{Add, Copy};
    use crate::graph::{Node, backward};
    use crate::tensor::DType;

    fn chain() -> (Tape, Vec<ValueId>) {
        let mut tape = Tape::new();
        let mut values = vec![tape.leaf("x", TensorDesc::new([1000], DType::F32), Role::Input, true)];
        for _ in 0..5 {
            let last = values[values.len() - 1];
            values.push(tape.record_one(Copy, &[last]).unwrap());
        }
        (tape, values)
    }

    #[test]
    fn a_chain_needs_two_buffers() {
        let (tape, values) = chain();
        let plan = Plan::new(&tape, Target::Cpu).unwrap();
        assert_eq!(plan.memory.transient, 2 * align(4000));
        assert_eq!(plan.memory.transient, plan.memory.transient_peak);
        assert_eq!(plan.slot(values[1]), plan.slot(values[3]), "a dead buffer is reused");
    }

    #[test]
    fn a_kept_value_is_never_overwritten() {
        let (mut tape, values) = chain();
        tape.keep(values[1]);
        let plan = Plan::new(&tape, Target::Cpu).unwrap();
        for other in &values[2..] {
            assert!(plan.slot(*other).offset != plan.slot(values[1]).offset);
        }
    }

    #[test]
    fn second_gradient_contribution_accumulates() {
        let mut tape = Tape::new();
        let x = tape.leaf("x", TensorDesc::new([3], DType::F32), Role::Input, true);
        let y = tape.record_one(Add, &[x, x]).unwrap();
        let d_y = tape.leaf("d_y", TensorDesc::new([3], DType::F32), Role::Input, false);
        let gradients = backward(&mut tape, &[(y, d_y)]).unwrap();
        let plan = Plan::new(&tape, Target::Cpu).unwrap();
        let writers: Vec<(&Node, &NodePlan)> =
            tape.nodes().iter().zip(&plan.nodes).filter(|(n, _)| n.outputs == [gradients[&x]]).collect();
        let modes: Vec<_> = writers.iter().map(|(_, p)| p.modes[0]).collect();
        assert_eq!(modes, [WriteMode::Overwrite, WriteMode::Accumulate]);
    }

    #[test]
    fn no_gradient_crosses_a_stop_gradient() {
        let mut tape = Tape::new();
        let x = tape.leaf("x", TensorDesc::new([3], DType::F32), Role::Input, true);
        let target = tape.stop_gradient(x).unwrap();
        let y = tape.record_one(Copy, &[target]).unwrap();
        let d_y = tape.leaf("d_y", TensorDesc::new([3], DType::F32), Role::Input, false);
        let before = tape.nodes().len();
        let gradients = backward(&mut tape, &[(y, d_y)]).unwrap();
        assert!(!gradients.contains_key(&x));
        assert_eq!(tape.nodes().len(), before, "the target side has no backward nodes at all");
    }

    #[test]
    fn placements_of_random_lifetimes_never_overlap() {
        let mut stream = crate::rng::Stream::new(3, 0, 0);
        let mut buffers: Vec<Buffer> = (0..200)
            .map(|i| {
                let first = crate::rng::below(stream.word(), 50) as usize;
                let last = first + crate::rng::below(stream.word(), 12) as usize;
                let bytes = 1 + crate::rng::below(stream.word(), 10_000) as usize;
                Buffer { name: i.to_string(), role: None, desc: None, slot: Slot { offset: 0, bytes }, first, last }
            })
            .collect();
        let total = place_transient(&mut buffers, 128, 0);
        for (i, a) in buffers.iter().enumerate() {
            assert!(a.slot.offset >= 128 && a.slot.end() <= total);
            for b in &buffers[..i] {
                let meet_in_time = a.first <= b.last && b.first <= a.last;
                let meet_in_space = a.slot.offset < b.slot.end() && b.slot.offset < a.slot.end();
                assert!(!(meet_in_time && meet_in_space), "{a:?} and {b:?}");
            }
        }
    }
}
