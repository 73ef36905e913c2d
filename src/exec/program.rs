//! What every executor holds: a tape, and where its values lie.

use crate::backend::cpu::arena::Slot;
use crate::backend::cuda::library::Work;
use crate::error::{Error, Result};
use crate::graph::plan::{Buffer, Target};
use crate::graph::{Phase, Plan, Role, Tape, ValueId};
use crate::tensor::TensorDesc;

/// Bytes between the buffers of a poisoned program.
const GUARD: usize = 64;
/// What the memory of a poisoned program starts as: NaN in all float types.
pub(super) const POISON: u8 = 0xFF;

/// A planned tape.
#[derive(Debug)]
pub(super) struct Program {
    pub tape: Tape,
    pub plan: Plan,
}

impl Program {
    pub fn new(tape: Tape, target: Target) -> Result<Program> {
        let plan = Plan::new(&tape, target)?;
        Ok(Program { tape, plan })
    }

    /// With `GUARD` bytes behind every buffer.
    pub fn guarded(tape: Tape, target: Target) -> Result<Program> {
        let plan = Plan::guarded(&tape, target, GUARD)?;
        Ok(Program { tape, plan })
    }

    /// The indices of a phase's nodes, in order.
    pub fn nodes_of(&self, phase: Phase) -> Vec<usize> {
        let nodes = self.tape.nodes().iter().enumerate();
        nodes.filter(|(_, node)| node.phase == phase).map(|(index, _)| index).collect()
    }

    /// What a library is asked for in place of a node's kernel on a CUDA device, if one is.
    pub fn library_work(&self, index: usize) -> Option<Work> {
        let node = &self.tape.nodes()[index];
        let inputs: Vec<&TensorDesc> = node.inputs.iter().map(|&value| self.tape.desc(value)).collect();
        node.op.library_work(&inputs)
    }

    /// Where a persistent value of `bytes` bytes is written.
    pub fn slot_to_write(&self, value: ValueId, bytes: usize) -> Result<Slot> {
        let described = self.tape.value(value);
        if bytes != described.desc.bytes() {
            return Err(Error::shape(&described.name, "bytes", described.desc.bytes(), bytes));
        }
        Ok(self.plan.slot(value))
    }

    /// Where the first `bytes` bytes of an input are written: a batch may be smaller than what there is room for.
    pub fn slot_to_stage(&self, value: ValueId, bytes: usize) -> Result<Slot> {
        let described = self.tape.value(value);
        if described.role != Role::Input || bytes > described.desc.bytes() {
            let expected = format!("at most {} of an input", described.desc.bytes());
            return Err(Error::shape(&described.name, "bytes", expected, bytes));
        }
        Ok(self.plan.slot(value))
    }

    /// Where a persistent or kept value is read, and what it is.
    pub fn slot_to_read(&self, value: ValueId) -> Result<(Slot, &TensorDesc)> {
        let described = self.tape.value(value);
        if !described.role.persistent() && !described.keep {
            return Err(Error::Internal {
                thread: "executor".into(),
                message: format!("{} is read after the step but was not kept", described.name),
            });
        }
        Ok((self.plan.slot(value), &described.desc))
    }

    /// The guard behind each buffer of a guarded program, with the buffer's name.
    pub fn guards(&self) -> impl Iterator<Item = (Slot, &str)> {
        let guard = |b: &Buffer| Slot { offset: b.slot.end(), bytes: GUARD };
        self.plan.buffers.iter().map(move |b| (guard(b), b.name.as_str()))
    }

    /// The first leaf that is not finite before a step, by its name. Running statistics are left out: the run that is being
    /// looked into has updated them already.
    pub fn first_non_finite_leaf(&self, mut finite: impl FnMut(ValueId) -> Result<bool>) -> Result<Option<String>> {
        for role in [Role::Input, Role::Parameter, Role::Optimiser] {
            for (id, value) in self.tape.with_role(role) {
                if !finite(id)? {
                    return Ok(Some(format!("{} (not finite before the step)", value.name)));
                }
            }
        }
        Ok(None)
    }
}
