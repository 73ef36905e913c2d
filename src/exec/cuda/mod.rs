//! The CUDA executor: launches the kernels of the planned nodes in order on one stream, in one arena of device memory.

mod library;

use std::sync::Arc;
use std::time::Duration;

use crate::backend::cpu::arena::Slot;
use crate::backend::cuda::{CudaIo, DeviceOutput, DevicePtr, DeviceTensor, Driver, check};
use crate::error::{Error, Result};
use crate::exec::Executor;
use crate::exec::program::{POISON, Program};
use crate::graph::plan::Target;
use crate::graph::{Node, Phase, Plan, Tape, ValueId, WriteMode};
use crate::tensor::{DType, HostTensor};

/// A tape planned and placed in the memory of a device, real or emulated.
#[derive(Debug)]
pub struct CudaExecutor {
    program: Program,
    arena: Arena,
}

/// Device memory that is given back when it is dropped.
#[derive(Debug)]
struct Memory {
    driver: Arc<dyn Driver>,
    start: DevicePtr,
}

impl Memory {
    fn new(driver: Arc<dyn Driver>, bytes: usize) -> Result<Memory> {
        let start = driver.allocate(bytes.max(1))?;
        Ok(Memory { driver, start })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Err(error) = self.driver.free(self.start) {
            tracing::warn!("device memory was not given back: {error}");
        }
    }
}

/// The memory of a program.
#[derive(Debug)]
struct Arena {
    memory: Memory,
    /// What no kernel may touch.
    guards: Vec<Slot>,
}

impl Arena {
    fn new(driver: Arc<dyn Driver>, bytes: usize, fill: u8) -> Result<Arena> {
        let memory = Memory::new(driver, bytes)?;
        memory.driver.fill(memory.start, bytes, fill)?;
        Ok(Arena { memory, guards: Vec::new() })
    }

    fn driver(&self) -> &dyn Driver {
        &*self.memory.driver
    }

    fn guard(&mut self, guards: Vec<Slot>) {
        guards.iter().for_each(|guard| self.driver().guard(self.at(*guard), guard.bytes));
        self.guards = guards;
    }

    fn at(&self, slot: Slot) -> DevicePtr {
        self.memory.start.offset(slot.offset)
    }

    fn download(&self, slot: Slot) -> Result<Vec<u8>> {
        let mut bytes = vec![0; slot.bytes];
        self.driver().download(self.at(slot), &mut bytes)?;
        Ok(bytes)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.guards.iter().for_each(|guard| self.driver().unguard(self.at(*guard), guard.bytes));
    }
}

impl CudaExecutor {
    /// Plans `tape` and reserves its memory on the device; persistent values start as zeros.
    ///
    /// # Errors
    /// Faults of the tape; [`crate::error::Error::Unsupported`] when the device has not enough memory.
    pub fn new(tape: Tape, driver: Arc<dyn Driver>) -> Result<CudaExecutor> {
        refuse_float64(&tape)?;
        let program = Program::new(tape, Target::Cuda)?;
        let arena = Arena::new(driver, program.plan.memory.total, 0)?;
        Ok(CudaExecutor { program, arena })
    }

    /// As [`CudaExecutor::new`] for finding faults, as [`crate::exec::CpuExecutor::poisoned`].
    ///
    /// # Errors
    /// As [`CudaExecutor::new`].
    pub fn poisoned(tape: Tape, driver: Arc<dyn Driver>) -> Result<CudaExecutor> {
        refuse_float64(&tape)?;
        let program = Program::guarded(tape, Target::Cuda)?;
        let mut arena = Arena::new(driver, program.plan.memory.total, POISON)?;
        arena.guard(program.guards().map(|(slot, _)| slot).collect());
        Ok(CudaExecutor { program, arena })
    }

    fn launch_node(&self, index: usize) -> Result<()> {
        let Program { tape, plan } = &self.program;
        let (node, planned) = (&tape.nodes()[index], &plan.nodes[index]);
        if node.op.is_view() {
            return Ok(());
        }
        let output = |(id, mode): (&ValueId, &WriteMode)| {
            let DeviceTensor { desc, ptr } = self.tensor(*id);
            DeviceOutput { desc, ptr, accumulate: *mode == WriteMode::Accumulate }
        };
        let io = CudaIo {
            inputs: node.inputs.iter().map(|id| self.tensor(*id)).collect(),
            outputs: node.outputs.iter().zip(&planned.modes).map(output).collect(),
            updates: node.updates.iter().map(|id| self.tensor(*id)).collect(),
            workspace: self.arena.at(planned.workspace),
            driver: self.arena.driver(),
        };
        match node.op.by_library() {
            true if self.arena.driver().emulated() => library::run_on_host(&*node.op, &io),
            _ => node.op.cuda(&io),
        }
    }

    fn tensor(&self, value: ValueId) -> DeviceTensor<'_> {
        DeviceTensor { desc: self.program.tape.desc(value), ptr: self.arena.at(self.program.plan.slot(value)) }
    }

    fn is_finite(&self, value: ValueId, scratch: &Memory) -> Result<bool> {
        Ok(check::first_non_finite(&*scratch.driver, self.tensor(value), scratch.start)?.is_none())
    }
}

/// No kernel computes in float64, the CPU's reference for gradients; hyper-parameters are only read in it.
fn refuse_float64(tape: &Tape) -> Result<()> {
    let outputs = |node: &Node| node.outputs.iter().any(|&value| tape.desc(value).dtype == DType::F64);
    match tape.nodes().iter().find(|node| outputs(node)) {
        None => Ok(()),
        Some(node) => {
            let what = format!("{} ({}): CUDA devices do not compute in f64", node.name, node.op.name());
            Err(Error::Unsupported { what, hint: Some("use f32, bf16 or f16".into()) })
        }
    }
}

impl Executor for CudaExecutor {
    fn run_phase(&mut self, phase: Phase) -> Result<()> {
        self.program.nodes_of(phase).into_iter().try_for_each(|index| self.launch_node(index))
    }

    fn finish(&mut self) -> Result<()> {
        self.arena.driver().synchronize()
    }

    fn run_timed(&mut self) -> Result<Vec<Duration>> {
        let driver = self.arena.driver();
        (0..self.program.tape.nodes().len()).map(|index| driver.time(&mut || self.launch_node(index))).collect()
    }

    fn write(&mut self, value: ValueId, bytes: &[u8]) -> Result<()> {
        let slot = self.program.slot_to_write(value, bytes.len())?;
        self.arena.driver().upload(self.arena.at(slot), bytes)
    }

    fn read(&self, value: ValueId) -> Result<HostTensor> {
        let (slot, desc) = self.program.slot_to_read(value)?;
        HostTensor::from_bytes(desc.clone(), self.arena.download(slot)?)
    }

    fn tape(&self) -> &Tape {
        &self.program.tape
    }

    fn plan(&self) -> &Plan {
        &self.program.plan
    }

    fn first_non_finite(&mut self, phase: Phase) -> Result<Option<String>> {
        let scratch = Memory::new(self.arena.memory.driver.clone(), check::SCRATCH)?;
        if let Some(leaf) = self.program.first_non_finite_leaf(|value| self.is_finite(value, &scratch))? {
            return Ok(Some(leaf));
        }
        for index in self.program.nodes_of(phase) {
            self.launch_node(index)?;
            let node = &self.program.tape.nodes()[index];
            for &value in node.outputs.iter().chain(&node.updates) {
                if !self.is_finite(value, &scratch)? {
                    return Ok(Some(format!("{} ({})", node.name, node.op.name())));
                }
            }
        }
        Ok(None)
    }

    fn overrun(&self) -> Result<Option<String>> {
        for (guard, name) in self.program.guards() {
            if self.arena.download(guard)?.iter().any(|&byte| byte != POISON) {
                return Ok(Some(name.to_string()));
            }
        }
        Ok(None)
    }
}
