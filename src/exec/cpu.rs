//! The CPU executor: runs the planned nodes one after the other in one arena; each op is parallel inside.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::backend::cpu::arena::{Arena, Slot};
use crate::backend::cpu::{CpuIo, Input, Output, Tier};
use crate::error::Result;
use crate::exec::Executor;
use crate::exec::program::{POISON, Program};
use crate::graph::plan::Target;
use crate::graph::{Phase, Plan, Tape, ValueId, WriteMode};
use crate::tensor::{DType, HostTensor};

/// A tape planned and placed in host memory.
#[derive(Debug)]
pub struct CpuExecutor {
    program: Program,
    arena: Arena,
    tier: Tier,
    watched: Vec<ValueId>,
    /// The watched values of the steps that were not collected, oldest first.
    results: VecDeque<Vec<HostTensor>>,
}

impl CpuExecutor {
    /// Plans `tape` and reserves its memory; persistent values start as zeros.
    ///
    /// # Errors
    /// Faults of the tape; [`crate::error::Error::Unsupported`] when memory is refused.
    pub fn new(tape: Tape, tier: Tier) -> Result<CpuExecutor> {
        let program = Program::new(tape, Target::Cpu)?;
        let arena = Arena::new(program.plan.memory.total)?;
        Ok(CpuExecutor::with(program, arena, tier))
    }

    fn with(program: Program, arena: Arena, tier: Tier) -> CpuExecutor {
        CpuExecutor { program, arena, tier, watched: Vec::new(), results: VecDeque::new() }
    }

    fn after_step(&mut self) -> Result<()> {
        if self.watched.is_empty() {
            return Ok(());
        }
        let results = self.watched.iter().map(|&value| self.read(value)).collect::<Result<_>>()?;
        self.results.push_back(results);
        Ok(())
    }

    /// As [`CpuExecutor::new`] for finding faults: every byte starts as 0xFF (NaN in all float types), and buffers are
    /// apart, with bytes between them that [`Executor::overrun`] looks at.
    ///
    /// # Errors
    /// As [`CpuExecutor::new`].
    pub fn poisoned(tape: Tape, tier: Tier) -> Result<CpuExecutor> {
        let program = Program::guarded(tape, Target::Cpu)?;
        let bytes = program.plan.memory.total;
        let mut arena = Arena::new(bytes)?;
        arena.slice_mut(Slot { offset: 0, bytes }).fill(POISON);
        Ok(CpuExecutor::with(program, arena, tier))
    }

    fn compute(&mut self, index: usize) -> Result<()> {
        let Program { tape, plan } = &self.program;
        let (node, planned) = (&tape.nodes()[index], &plan.nodes[index]);
        if node.op.is_view() {
            return Ok(());
        }
        let slot = |id: &ValueId| plan.slot(*id);
        let reads: Vec<Slot> = node.inputs.iter().map(slot).collect();
        let writes: Vec<Slot> = node.outputs.iter().chain(&node.updates).map(slot).chain([planned.workspace]).collect();
        let (reads, mut writes) = self.arena.borrow(&reads, &writes)?;
        let workspace = writes.pop().unwrap_or_default();
        let mut writes = writes.into_iter();
        let inputs = node.inputs.iter().zip(reads);
        let output = |id: &ValueId, bytes, mode| Output {
            desc: tape.desc(*id),
            bytes,
            accumulate: mode == WriteMode::Accumulate,
        };
        let mut io = CpuIo {
            inputs: inputs.map(|(id, bytes)| Input { desc: tape.desc(*id), bytes }).collect(),
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

    fn is_finite(&self, value: ValueId) -> bool {
        all_finite(self.arena.slice(self.program.plan.slot(value)), self.tape().desc(value).dtype)
    }
}

impl Executor for CpuExecutor {
    fn run_phase(&mut self, phase: Phase) -> Result<()> {
        self.program.nodes_of(phase).into_iter().try_for_each(|index| self.compute(index))
    }

    fn run_step(&mut self) -> Result<()> {
        Phase::ALL.into_iter().try_for_each(|phase| self.run_phase(phase))?;
        self.after_step()
    }

    fn check_step(&mut self, checked: &[Phase]) -> Result<Option<String>> {
        for phase in Phase::ALL {
            match checked.contains(&phase) {
                false => self.run_phase(phase)?,
                true => {
                    if let Some(node) = self.first_non_finite(phase)? {
                        return Ok(Some(node));
                    }
                }
            }
        }
        self.after_step().map(|()| None)
    }

    fn run_node(&mut self, index: usize) -> Result<()> {
        self.compute(index)
    }

    fn stage(&mut self, value: ValueId, bytes: &[u8]) -> Result<()> {
        let slot = self.program.slot_to_stage(value, bytes.len())?;
        self.arena.slice_mut(Slot { bytes: bytes.len(), ..slot }).copy_from_slice(bytes);
        Ok(())
    }

    fn watch(&mut self, values: &[ValueId]) -> Result<()> {
        values.iter().try_for_each(|&value| self.program.slot_to_read(value).map(|_| ()))?;
        self.watched = values.to_vec();
        self.results.clear();
        Ok(())
    }

    fn collect(&mut self, in_flight: usize) -> Result<Option<Vec<HostTensor>>> {
        Ok(if self.results.len() > in_flight { self.results.pop_front() } else { None })
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    fn run_timed(&mut self) -> Result<Vec<Duration>> {
        let nodes = self.program.tape.nodes().len();
        let timed = |index| {
            let start = Instant::now();
            self.compute(index).map(|()| start.elapsed())
        };
        (0..nodes).map(timed).collect()
    }

    fn write(&mut self, value: ValueId, bytes: &[u8]) -> Result<()> {
        let slot = self.program.slot_to_write(value, bytes.len())?;
        self.arena.slice_mut(slot).copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, value: ValueId) -> Result<HostTensor> {
        let (slot, desc) = self.program.slot_to_read(value)?;
        HostTensor::from_bytes(desc.clone(), self.arena.slice(slot).to_vec())
    }

    fn peek(&self, value: ValueId) -> Result<HostTensor> {
        let bytes = self.arena.slice(self.program.plan.slot(value)).to_vec();
        HostTensor::from_bytes(self.tape().desc(value).clone(), bytes)
    }

    fn poke(&mut self, value: ValueId, bytes: &[u8]) -> Result<()> {
        let slot = Slot { bytes: bytes.len(), ..self.program.plan.slot(value) };
        self.arena.slice_mut(slot).copy_from_slice(bytes);
        Ok(())
    }

    fn tape(&self) -> &Tape {
        &self.program.tape
    }

    fn plan(&self) -> &Plan {
        &self.program.plan
    }

    fn first_non_finite(&mut self, phase: Phase) -> Result<Option<String>> {
        if let Some(leaf) = self.program.first_non_finite_leaf(|value| Ok(self.is_finite(value)))? {
            return Ok(Some(leaf));
        }
        for index in self.program.nodes_of(phase) {
            self.compute(index)?;
            let node = &self.program.tape.nodes()[index];
            if !node.outputs.iter().chain(&node.updates).all(|&value| self.is_finite(value)) {
                return Ok(Some(format!("{} ({})", node.name, node.op.name())));
            }
        }
        Ok(None)
    }

    fn overrun(&self) -> Result<Option<String>> {
        let changed = |slot: Slot| self.arena.slice(slot).iter().any(|&byte| byte != POISON);
        Ok(self.program.guards().find(|(guard, _)| changed(*guard)).map(|(_, name)| name.to_string()))
    }
}

/// Whether all elements are finite numbers.
fn all_finite(bytes: &[u8], dtype: DType) -> bool {
    match dtype {
        DType::F32 => bytemuck::cast_slice::<u8, f32>(bytes).iter().all(|v| v.is_finite()),
        DType::F64 => bytemuck::cast_slice::<u8, f64>(bytes).iter().all(|v| v.is_finite()),
        DType::Bf16 => bytemuck::cast_slice::<u8, u16>(bytes).iter().all(|v| half::bf16::from_bits(*v).is_finite()),
        DType::F16 => bytemuck::cast_slice::<u8, u16>(bytes).iter().all(|v| half::f16::from_bits(*v).is_finite()),
        DType::I64 | DType::U8 => true,
    }
}
