//! The ledger of a tape: the bytes that each node moves through the memory of a CUDA device, and its floating-point operations.
//!
//! What is counted is what kernels and libraries ask of memory, pass by pass: a tensor that is read again after all of it was
//! seen counts again, one that is added to is read and written, and pixels that no window of a convolution covers are not read.
//! Within a pass each element counts once, however many windows or blocks share it: caches answer the rest. A second pass over
//! a tensor that fits a cache may be answered there as well, so that such a node may run faster than the ledger says. The CPU's
//! implementations pass over their tensors about as often; `profile` holds them against the same figures.
//!
//! Left out are scratch that caches answer (partial sums of a few megabytes at most, in all below 0.3 % of a step of ResNet-50;
//! the unfinished views of the augmentation, which are made in portions for this very purpose; what libraries split off) and
//! what the host copies to the device between steps.

use std::iter::Sum;
use std::ops::Add;

use crate::graph::{Node, Plan, Tape, ValueId, WriteMode};
use crate::tensor::{DType, TensorDesc};

/// Bytes that are moved through a device's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From memory.
    pub read: u64,
    /// To memory.
    pub written: u64,
}

impl Traffic {
    /// Both ways.
    pub fn total(self) -> u64 {
        self.read + self.written
    }

    /// With `tensor` read once more.
    #[must_use]
    pub fn reading(self, tensor: &TensorDesc) -> Traffic {
        Traffic { read: self.read + tensor.bytes() as u64, ..self }
    }

    /// With `tensor` read once less.
    #[must_use]
    pub fn sparing(self, tensor: &TensorDesc) -> Traffic {
        Traffic { read: self.read - tensor.bytes() as u64, ..self }
    }

    /// With so many bytes written, and read again.
    #[must_use]
    pub fn staging(self, bytes: usize) -> Traffic {
        Traffic { read: self.read + bytes as u64, written: self.written + bytes as u64 }
    }
}

impl Add for Traffic {
    type Output = Traffic;

    fn add(self, other: Traffic) -> Traffic {
        Traffic { read: self.read + other.read, written: self.written + other.written }
    }
}

impl Sum for Traffic {
    fn sum<I: Iterator<Item = Traffic>>(all: I) -> Traffic {
        all.fold(Traffic::default(), Traffic::add)
    }
}

/// The tensors of a node, as far as its traffic depends on them.
#[derive(Debug, Clone)]
pub struct Tensors<'a> {
    /// What is read.
    pub inputs: Vec<&'a TensorDesc>,
    /// What is written, and how.
    pub outputs: Vec<(&'a TensorDesc, WriteMode)>,
    /// What is changed in place.
    pub updates: Vec<&'a TensorDesc>,
    /// Bytes of inputs that are one tensor under two numbers: it is read once.
    pub repeated: u64,
}

impl<'a> Tensors<'a> {
    /// Those of a node of `tape` that writes its outputs as `modes` say; outputs without one are overwritten.
    pub fn of(tape: &'a Tape, node: &Node, modes: &[WriteMode]) -> Tensors<'a> {
        let descs = |ids: &[ValueId]| -> Vec<&'a TensorDesc> { ids.iter().map(|&id| tape.desc(id)).collect() };
        let modes = modes.iter().copied().chain(std::iter::repeat(WriteMode::Overwrite));
        let outputs = descs(&node.outputs).into_iter().zip(modes).collect();
        let again = |&(i, id): &(usize, &ValueId)| node.inputs[..i].contains(id);
        let repeated = node.inputs.iter().enumerate().filter(again).map(|(_, &id)| tape.desc(id).bytes() as u64).sum();
        Tensors { inputs: descs(&node.inputs), outputs, updates: descs(&node.updates), repeated }
    }

    /// Whether output `i` is added to what is there.
    pub fn accumulates(&self, i: usize) -> bool {
        self.outputs.get(i).is_some_and(|(_, mode)| *mode == WriteMode::Accumulate)
    }

    /// Every input read once and every output written once, and read too where it is added to what is there; what is changed in
    /// place is read and written.
    pub fn once(&self) -> Traffic {
        let bytes = |tensor: &&TensorDesc| tensor.bytes() as u64;
        let added_to = self.outputs.iter().filter(|(_, mode)| *mode == WriteMode::Accumulate).map(|(tensor, _)| tensor);
        let updates: u64 = self.updates.iter().map(bytes).sum();
        Traffic {
            read: self.inputs.iter().chain(added_to).map(bytes).sum::<u64>() - self.repeated + updates,
            written: self.outputs.iter().map(|(tensor, _)| bytes(tensor)).sum::<u64>() + updates,
        }
    }
}

/// What one node of a tape takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Bytes.
    pub traffic: Traffic,
    /// Floating-point operations; 0 where memory traffic is all that counts.
    pub flops: u64,
    /// Element type that they are in: that of the first input; none of a node without inputs.
    pub dtype: Option<DType>,
}

impl Entry {
    /// The entry of a node that writes its outputs as `modes` say, as [`Tensors::of`] takes them. A view takes nothing.
    pub fn of(tape: &Tape, node: &Node, modes: &[WriteMode]) -> Entry {
        let tensors = Tensors::of(tape, node, modes);
        let dtype = tensors.inputs.first().map(|tensor| tensor.dtype);
        if node.op.is_view() {
            return Entry { traffic: Traffic::default(), flops: 0, dtype };
        }
        let converted = node.op.library_work(&tensors.inputs).map_or(0, |work| work.converted());
        let traffic = node.op.traffic(&tensors).staging(converted);
        Entry { traffic, flops: node.op.flops(&tensors.inputs), dtype }
    }
}

/// The entries of all nodes of a planned tape, in its order.
pub fn entries(tape: &Tape, plan: &Plan) -> Vec<Entry> {
    tape.nodes().iter().zip(&plan.nodes).map(|(node, planned)| Entry::of(tape, node, &planned.modes)).collect()
}

/// Floating-point operations of all nodes of a tape.
pub fn flops(tape: &Tape) -> u64 {
    tape.nodes().iter().map(|node| Entry::of(tape, node, &[]).flops).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::builtin::{Add, Constant, Copy};
    use crate::graph::plan::Target;
    use crate::graph::{Role, backward};

    #[test]
    fn a_gradient_that_is_added_to_is_read_and_written() {
        let mut tape = Tape::new();
        let desc = TensorDesc::new([7, 3], DType::Bf16);
        let x = tape.leaf("x", desc.clone(), Role::Input, true);
        let y = tape.record_one(Add, &[x, x]).unwrap();
        let d_y = tape.leaf("d_y", desc, Role::Input, false);
        backward(&mut tape, &[(y, d_y)]).unwrap();
        let plan = Plan::new(&tape, Target::Cuda).unwrap();
        let traffic: Vec<Traffic> = entries(&tape, &plan).iter().map(|entry| entry.traffic).collect();
        let bytes = 7 * 3 * 2;
        let expected = [[1, 1], [1, 1], [2, 1]]; // the sum of x and itself, the first part of d_x, the second one
        assert_eq!(traffic, expected.map(|[read, written]| Traffic { read: read * bytes, written: written * bytes }));
        assert_eq!(traffic.into_iter().sum::<Traffic>().total(), 7 * bytes);
    }

    #[test]
    fn views_take_nothing_and_constants_are_written() {
        let mut tape = Tape::new();
        let one = tape.record_one(Constant { value: 1.0, dtype: DType::F32 }, &[]).unwrap();
        let target = tape.stop_gradient(one).unwrap();
        tape.record_one(Copy, &[target]).unwrap();
        let entries = entries(&tape, &Plan::new(&tape, Target::Cuda).unwrap());
        assert_eq!(
            entries.iter().map(|e| [e.traffic.read, e.traffic.written]).collect::<Vec<_>>(),
            [[0, 4], [0, 0], [4, 4]]
        );
        assert_eq!(entries[0].dtype, None);
        assert_eq!(entries[2].dtype, Some(DType::F32));
    }
}
