//! The CPU executor: runs the planned nodes one after the other in one arena; each op is parallel inside.

use crate::backend::cpu::arena::{Arena, Slot};
use crate::backend::cpu::{CpuIo, Input, Output, Tier};
use crate::error::{Error, Result};
use crate::exec::Executor;
use crate::graph::plan::Buffer;
use crate::graph::{Phase, Plan, Role, Tape, ValueId, WriteMode};
use crate::tensor::{DType, HostTensor, TensorDesc};

/// Bytes between the buffers of a poisoned executor.
const GUARD: usize = 64;
/// What a poisoned executor's memory starts as.
const POISON: u8 = 0xFF;

/// A tape planned and placed in host memory.
#[derive(Debug)]
pub struct CpuExecutor {
    tape: Tape,
    plan: Plan,
    arena: Arena,
    tier: Tier,
}

impl CpuExecutor {
    /// Plans `tape` and reserves its memory; persistent values start as zeros.
    ///
    /// # Errors
    /// Faults of the tape; [`Error::Unsupported`] when memory is refused.
    pub fn new(tape: Tape, tier: Tier) -> Result<CpuExecutor> {
        let plan = Plan::new(&tape)?;
        let arena = Arena::new(plan.memory.total)?;
        Ok(CpuExecutor { tape, plan, arena, tier })
    }

    /// As [`CpuExecutor::new`] for finding faults: every byte starts as 0xFF (NaN in all float types), and buffers are
    /// `GUARD` bytes apart, which [`CpuExecutor::overrun`] looks at.
    ///
    /// # Errors
    /// As [`CpuExecutor::new`].
    pub fn poisoned(tape: Tape, tier: Tier) -> Result<CpuExecutor> {
        let plan = Plan::guarded(&tape, GUARD)?;
        let mut arena = Arena::new(plan.memory.total)?;
        arena.slice_mut(Slot { offset: 0, bytes: plan.memory.total }).fill(POISON);
        Ok(CpuExecutor { tape, plan, arena, tier })
    }

    /// The first buffer of a poisoned executor behind which a byte was changed.
    pub fn overrun(&self) -> Option<&str> {
        let guard = |b: &Buffer| Slot { offset: b.slot.end(), bytes: GUARD };
        let changed = |b: &&Buffer| self.arena.slice(guard(b)).iter().any(|&byte| byte != POISON);
        self.plan.buffers.iter().find(changed).map(|b| b.name.as_str())
    }

    fn run_node(&mut self, index: usize) -> Result<()> {
        let (node, planned) = (&self.tape.nodes()[index], &self.plan.nodes[index]);
        if node.op.is_view() {
            return Ok(());
        }
        let slot = |id: &ValueId| self.plan.slot(*id);
        let reads: Vec<Slot> = node.inputs.iter().map(slot).collect();
        let writes: Vec<Slot> = node.outputs.iter().chain(&node.updates).map(slot).chain([planned.workspace]).collect();
        let (reads, mut writes) = self.arena.borrow(&reads, &writes)?;
        let workspace = writes.pop().unwrap_or_default();
        let mut writes = writes.into_iter();
        let inputs = node.inputs.iter().zip(reads);
        let output = |id: &ValueId, bytes, mode| Output {
            desc: self.tape.desc(*id),
            bytes,
            accumulate: mode == WriteMode::Accumulate,
        };
        let mut io = CpuIo {
            inputs: inputs.map(|(id, bytes)| Input { desc: self.tape.desc(*id), bytes }).collect(),
            outputs: node
                .outputs
                .iter()
                .zip(&planned.modes)
                .zip(&mut writes)
                .map(|((id, m), b)| output(id, b, *m))
                .collect(),
            updates: node.updates.iter().zip(&mut writes).map(|(id, b)| output(id, b, WriteMode::Overwrite)).collect(),
            workspace,
            tier: self.tier,
        };
        node.op.cpu(&mut io)
    }

    fn nodes_of(&self, phase: Phase) -> Vec<usize> {
        let nodes = self.tape.nodes().iter().enumerate();
        nodes.filter(|(_, node)| node.phase == phase).map(|(index, _)| index).collect()
    }

    fn is_finite(&self, slot: Slot, dtype: DType) -> bool {
        let bytes = self.arena.slice(slot);
        match dtype {
            DType::F32 => bytemuck::cast_slice::<u8, f32>(bytes).iter().all(|v| v.is_finite()),
            DType::F64 => bytemuck::cast_slice::<u8, f64>(bytes).iter().all(|v| v.is_finite()),
            DType::Bf16 => bytemuck::cast_slice::<u8, u16>(bytes).iter().all(|v| half::bf16::from_bits(*v).is_finite()),
            DType::F16 => bytemuck::cast_slice::<u8, u16>(bytes).iter().all(|v| half::f16::from_bits(*v).is_finite()),
            DType::I64 | DType::U8 => true,
        }
    }
}

impl Executor for CpuExecutor {
    fn run_phase(&mut self, phase: Phase) -> Result<()> {
        self.nodes_of(phase).into_iter().try_for_each(|index| self.run_node(index))
    }

    fn write(&mut self, value: ValueId, bytes: &[u8]) -> Result<()> {
        let described = self.tape.value(value);
        if bytes.len() != described.desc.bytes() {
            return Err(Error::shape(&described.name, "bytes", described.desc.bytes(), bytes.len()));
        }
        self.arena.slice_mut(self.plan.slot(value)).copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, value: ValueId) -> Result<HostTensor> {
        let described = self.tape.value(value);
        if !described.role.persistent() && !described.keep {
            return Err(Error::Internal {
                thread: "executor".into(),
                message: format!("{} is read after the step but was not kept", described.name),
            });
        }
        let TensorDesc { shape, dtype } = &described.desc;
        let bytes = self.arena.slice(self.plan.slot(value)).to_vec();
        HostTensor::from_bytes(TensorDesc::new(shape.dims(), *dtype), bytes)
    }

    fn tape(&self) -> &Tape {
        &self.tape
    }

    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn first_non_finite(&mut self, phase: Phase) -> Result<Option<String>> {
        // Not running statistics: the run that is being looked into has updated them already.
        let leaf = |role: Role| role.persistent() && role != Role::State;
        let leaves = self.tape.values().iter().enumerate().filter(|(_, v)| leaf(v.role));
        for (i, value) in leaves {
            if !self.is_finite(self.plan.slots[i], value.desc.dtype) {
                return Ok(Some(format!("{} (not finite before the step)", value.name)));
            }
        }
        for index in self.nodes_of(phase) {
            self.run_node(index)?;
            let node = &self.tape.nodes()[index];
            let finite = |&v: &ValueId| self.is_finite(self.plan.slot(v), self.tape.desc(v).dtype);
            if !node.outputs.iter().chain(&node.updates).all(finite) {
                return Ok(Some(format!("{} ({})", node.name, node.op.name())));
            }
        }
        Ok(None)
    }
}
