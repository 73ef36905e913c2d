//! The CUDA executor: prepare, warm up, capture, replay. One arena of device memory; kernels and libraries on one stream,
//! inputs on another; after its first steps, a step is one graph launch.

mod capture;
mod feed;
mod library;
mod memory;

use std::sync::Arc;
use std::time::Duration;

use crate::backend::cpu::arena::Slot;
use crate::backend::cuda::library::{Choice, Prepared, Work};
use crate::backend::cuda::{CudaIo, DeviceOutput, DevicePtr, DeviceTensor, Driver, Nvtx, Stream, check, nvtx};
use crate::error::{Error, Result};
use crate::exec::Executor;
use crate::exec::program::{POISON, Program};
use crate::graph::plan::Target;
use crate::graph::{Node, Phase, Plan, Role, Tape, ValueId, WriteMode};
use crate::tensor::{DType, HostTensor};

use capture::{Capture, Mode, SLOTS};
use feed::{Feed, Watched};
use memory::{Arena, Memory};

pub use memory::room;

/// How a CUDA executor works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Capture the step and replay it, instead of launching node by node.
    pub graph: bool,
    /// How the libraries' algorithms are chosen.
    pub choice: Choice,
    /// Tell a profiler what is launched: a range for every step, phase and node.
    pub nvtx: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { graph: true, choice: Choice::default(), nvtx: false }
    }
}

/// A tape planned and placed in the memory of a device, real or emulated.
#[derive(Debug)]
pub struct CudaExecutor {
    program: Program,
    options: Options,
    /// The profiler that is told, if one is.
    nvtx: Option<Nvtx>,
    /// The algorithm of every node that a library computes on a real device.
    prepared: Vec<Option<Box<dyn Prepared>>>,
    capture: Capture,
    feed: Feed,
    arena: Arena,
}

impl CudaExecutor {
    /// Plans `tape`, reserves its memory on the device, and chooses the libraries' algorithms; persistent values start as
    /// zeros.
    ///
    /// # Errors
    /// Faults of the tape; [`Error::OutOfMemory`] when the device has not enough; [`Error::Unsupported`] when a library is
    /// missing or has no algorithm.
    pub fn new(tape: Tape, driver: Arc<dyn Driver>, options: Options) -> Result<CudaExecutor> {
        refuse_float64(&tape)?;
        CudaExecutor::prepare(Program::new(tape, Target::Cuda)?, driver, options, 0)
    }

    /// As [`CudaExecutor::new`] for finding faults, as [`crate::exec::CpuExecutor::poisoned`].
    ///
    /// # Errors
    /// As [`CudaExecutor::new`].
    pub fn poisoned(tape: Tape, driver: Arc<dyn Driver>, options: Options) -> Result<CudaExecutor> {
        refuse_float64(&tape)?;
        let mut executor = CudaExecutor::prepare(Program::guarded(tape, Target::Cuda)?, driver, options, POISON)?;
        let guards = executor.program.guards().map(|(slot, _)| slot).collect();
        executor.arena.guard(guards);
        Ok(executor)
    }

    fn prepare(program: Program, driver: Arc<dyn Driver>, options: Options, fill: u8) -> Result<CudaExecutor> {
        let nvtx = options.nvtx.then(Nvtx::load).transpose()?;
        let works: Vec<_> = (0..program.tape.nodes().len()).map(|index| program.library_work(index)).collect();
        if works.iter().any(Option::is_some) {
            // They take memory for themselves, before it is looked how much there is.
            driver.libraries()?;
        }
        let arena = Arena::new(driver, program.plan.memory.total)?;
        let (feed, capture) = (Feed::new(arena.driver())?, Capture::default());
        let mut executor = CudaExecutor { program, options, nvtx, prepared: Vec::new(), capture, feed, arena };
        executor.prepared = executor.choose_algorithms(&works)?;
        executor.arena.fill(fill)?;
        // Inputs come on the other stream, which waits for nothing of this one.
        executor.arena.driver().synchronize()?;
        Ok(executor)
    }

    /// Lets the libraries choose, each for its own node: they time candidates where these will run.
    #[allow(unsafe_code)] // hands the nodes' memory to the libraries
    fn choose_algorithms(&self, works: &[Option<Work>]) -> Result<Vec<Option<Box<dyn Prepared>>>> {
        let driver = self.arena.driver();
        let libraries = if works.iter().any(Option::is_some) { driver.libraries()? } else { None };
        let Some(libraries) = libraries else { return Ok(works.iter().map(|_| None).collect()) };
        self.arena.fill_with_noise()?;
        let prepare = |(index, work): (usize, &Option<_>)| {
            let Some(work) = work else { return Ok(None) };
            let operands = library::operands(&self.io(index, 0));
            // SAFETY: the planner reserved every tensor as its shape says, from which the op made `work`, and
            // `Work::workspace` bytes of workspace.
            let prepared = unsafe { libraries.prepare(driver, work, &operands, self.options.choice) };
            prepared.map(Some).map_err(|error| of_node(error, &self.program.tape.nodes()[index].name))
        };
        let prepared = works.iter().enumerate().map(prepare).collect::<Result<_>>()?;
        libraries.remember();
        Ok(prepared)
    }

    /// What a node works on in the step that reads copy `slot` of the inputs.
    fn io(&self, index: usize, slot: usize) -> CudaIo<'_> {
        let Program { tape, plan } = &self.program;
        let (node, planned) = (&tape.nodes()[index], &plan.nodes[index]);
        let output = |(id, mode): (&ValueId, &WriteMode)| {
            let DeviceTensor { desc, ptr } = self.tensor(*id, slot);
            DeviceOutput { desc, ptr, accumulate: *mode == WriteMode::Accumulate }
        };
        CudaIo {
            inputs: node.inputs.iter().map(|id| self.tensor(*id, slot)).collect(),
            outputs: node.outputs.iter().zip(&planned.modes).map(output).collect(),
            updates: node.updates.iter().map(|id| self.tensor(*id, slot)).collect(),
            workspace: self.arena.at(planned.workspace),
            driver: self.arena.driver(),
        }
    }

    #[allow(unsafe_code)] // hands the node's memory to a library
    fn launch_node(&self, index: usize, slot: usize) -> Result<()> {
        let node = &self.program.tape.nodes()[index];
        if node.op.is_view() {
            return Ok(());
        }
        let _range = self.range(&node.name);
        let io = self.io(index, slot);
        match &self.prepared[index] {
            // SAFETY: as when it was prepared: the places of the node's tensors, of which only an input's copy may differ.
            Some(prepared) => unsafe { prepared.run(io.driver, &library::operands(&io)) },
            None if self.program.library_work(index).is_some() => library::answer_on_host(&node.op, &io),
            None => node.op.cuda(&io),
        }
    }

    fn launch_phase(&self, phase: Phase, slot: usize) -> Result<()> {
        let _range = self.range(phase.name());
        self.program.nodes_of(phase).into_iter().try_for_each(|index| self.launch_node(index, slot))
    }

    fn launch_all(&self, slot: usize) -> Result<()> {
        Phase::ALL.into_iter().try_for_each(|phase| self.launch_phase(phase, slot))
    }

    /// A range that a profiler shows, as long as it is kept.
    fn range(&self, name: &str) -> Option<nvtx::Range> {
        self.nvtx.as_ref().map(|nvtx| nvtx.range(name))
    }

    /// Starts a step that reads copy `slot` of the inputs.
    fn start_step(&mut self, slot: usize) -> Result<()> {
        let driver = self.arena.shared_driver();
        let _range = self.range("step");
        if !self.options.graph {
            return self.launch_all(slot);
        }
        match self.capture.mode(slot) {
            Mode::Replay(graph) => driver.replay(graph),
            Mode::Eager => {
                self.launch_all(slot)?;
                self.capture.warmed_up();
                Ok(())
            }
            Mode::Capture => {
                let mut capture = std::mem::take(&mut self.capture);
                let captured = capture.capture(slot, &*driver, |slot| self.launch_all(slot));
                let replayed = captured.and_then(|graph| driver.replay(graph));
                self.capture = capture;
                replayed
            }
        }
    }

    /// Where a value lies in the step that reads copy `slot` of the inputs.
    fn tensor(&self, value: ValueId, slot: usize) -> DeviceTensor<'_> {
        DeviceTensor { desc: self.program.tape.desc(value), ptr: self.place(value, slot) }
    }

    fn place(&self, value: ValueId, slot: usize) -> DevicePtr {
        let Program { tape, plan } = &self.program;
        let first = self.arena.at(plan.slot(value));
        match tape.value(tape.storage(value)).role {
            Role::Input => first.offset(slot * plan.second_inputs),
            _ => first,
        }
    }

    fn is_finite(&self, value: ValueId, slot: usize, scratch: &Memory) -> Result<bool> {
        Ok(check::first_non_finite(&*scratch.driver, self.tensor(value, slot), scratch.start)?.is_none())
    }

    fn first_non_finite_in(&self, phase: Phase, slot: usize) -> Result<Option<String>> {
        let scratch = Memory::new(self.arena.shared_driver(), check::SCRATCH)?;
        if let Some(leaf) = self.program.first_non_finite_leaf(|value| self.is_finite(value, slot, &scratch))? {
            return Ok(Some(leaf));
        }
        for index in self.program.nodes_of(phase) {
            self.launch_node(index, slot)?;
            let node = &self.program.tape.nodes()[index];
            for &value in node.outputs.iter().chain(&node.updates) {
                if !self.is_finite(value, slot, &scratch)? {
                    return Ok(Some(format!("{} ({})", node.name, node.op.name())));
                }
            }
        }
        Ok(None)
    }
}

impl Drop for CudaExecutor {
    fn drop(&mut self) {
        // Copies may still read the staging memory. What goes wrong here has been reported by the call that failed before.
        let _ = self.arena.driver().synchronize();
    }
}

/// Says for which layer a library has no algorithm.
fn of_node(error: Error, node: &str) -> Error {
    match error {
        Error::Unsupported { what, hint } => Error::Unsupported { what: format!("{node}: {what}"), hint },
        other => other,
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
        let slot = self.feed.next();
        self.feed.before_step(self.arena.driver())?;
        self.launch_phase(phase, slot)
    }

    fn run_step(&mut self) -> Result<()> {
        let slot = self.feed.next();
        self.feed.before_step(self.arena.driver())?;
        self.start_step(slot)?;
        self.feed.after_step(self.arena.driver())
    }

    fn check_step(&mut self, checked: &[Phase]) -> Result<Option<String>> {
        let slot = self.feed.next();
        self.feed.before_step(self.arena.driver())?;
        for phase in Phase::ALL {
            match checked.contains(&phase) {
                false => self.launch_phase(phase, slot)?,
                true => {
                    if let Some(node) = self.first_non_finite_in(phase, slot)? {
                        return Ok(Some(node));
                    }
                }
            }
        }
        self.feed.after_step(self.arena.driver())?;
        Ok(None)
    }

    fn finish(&mut self) -> Result<()> {
        self.arena.driver().synchronize()
    }

    fn run_timed(&mut self) -> Result<Vec<Duration>> {
        let driver = self.arena.driver();
        let nodes = 0..self.program.tape.nodes().len();
        let slot = self.feed.next();
        self.feed.before_step(driver)?;
        let marks = nodes.clone().map(|_| driver.event()).chain([driver.event()]).collect::<Result<Vec<_>>>()?;
        for index in nodes.clone() {
            driver.record(&marks[index], Stream::Compute)?;
            self.launch_node(index, slot)?;
        }
        driver.record(&marks[nodes.end], Stream::Compute)?;
        driver.synchronize()?;
        nodes.map(|index| driver.elapsed(&marks[index], &marks[index + 1])).collect()
    }

    fn run_node(&mut self, index: usize) -> Result<()> {
        self.launch_node(index, self.feed.next())
    }

    fn stage(&mut self, value: ValueId, bytes: &[u8]) -> Result<()> {
        let slot = self.program.slot_to_stage(value, bytes.len())?;
        let place = (self.place(value, self.feed.next()), slot.bytes);
        self.feed.stage(self.arena.driver(), value, place, bytes)
    }

    fn watch(&mut self, values: &[ValueId]) -> Result<()> {
        let watched = |&value: &ValueId| {
            let (slot, desc) = self.program.slot_to_read(value)?;
            Ok(Watched { desc: desc.clone(), ptr: self.arena.at(slot) })
        };
        let watched = values.iter().map(watched).collect::<Result<_>>()?;
        self.arena.driver().synchronize()?;
        self.feed.watch(watched);
        Ok(())
    }

    fn collect(&mut self, in_flight: usize) -> Result<Option<Vec<HostTensor>>> {
        self.feed.collect(self.arena.driver(), in_flight)
    }

    fn write(&mut self, value: ValueId, bytes: &[u8]) -> Result<()> {
        self.program.slot_to_write(value, bytes.len())?;
        let is_input = self.program.tape.value(value).role == Role::Input;
        let copies = if is_input { SLOTS } else { 1 };
        (0..copies).try_for_each(|slot| self.arena.driver().upload(self.place(value, slot), bytes))
    }

    fn read(&self, value: ValueId) -> Result<HostTensor> {
        let (slot, desc) = self.program.slot_to_read(value)?;
        HostTensor::from_bytes(desc.clone(), self.arena.download(slot)?)
    }

    fn peek(&self, value: ValueId) -> Result<HostTensor> {
        let slot = self.program.plan.slot(value);
        HostTensor::from_bytes(self.program.tape.desc(value).clone(), self.arena.download(slot)?)
    }

    fn poke(&mut self, value: ValueId, bytes: &[u8]) -> Result<()> {
        let slot = Slot { bytes: bytes.len(), ..self.program.plan.slot(value) };
        self.arena.driver().upload(self.arena.at(slot), bytes)
    }

    fn tape(&self) -> &Tape {
        &self.program.tape
    }

    fn plan(&self) -> &Plan {
        &self.program.plan
    }

    fn first_non_finite(&mut self, phase: Phase) -> Result<Option<String>> {
        self.first_non_finite_in(phase, self.feed.last_seen())
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
