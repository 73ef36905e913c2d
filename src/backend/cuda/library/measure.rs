//! Times of every algorithm for a convolution, and of what may be fused with it: for deciding what is worth it.
#![allow(unsafe_code)] // runs algorithms

use std::time::Duration;

use crate::error::Result;
use crate::tensor::{DType, TensorDesc};

use super::super::{DevicePtr, DeviceTensor, Driver, random};
use super::choose::{Chosen, CudaLibraries, median};
use super::cudnn::{Epilogue, Graph, Limits, Plan, Tensor};
use super::{Choice, Convolution, Direction, Operands, SCRATCH, Work, limits};

/// How many algorithms of each kind are timed at most.
const MOST: usize = 12;

/// An algorithm, measured.
#[derive(Debug)]
pub struct Measured {
    /// What it computes, for people.
    pub what: &'static str,
    /// The algorithm, for people.
    pub algorithm: String,
    /// Bytes of workspace.
    pub workspace: usize,
    /// The median of several runs, or why it does not run.
    pub time: Result<Duration>,
}

/// Tensors of noise: zeros cost a device less energy, and it would run faster than on real data.
struct Memory<'a> {
    driver: &'a dyn Driver,
    x: DevicePtr,
    w: DevicePtr,
    y: DevicePtr,
    /// As large as the largest of them.
    addend: DevicePtr,
    /// Two sums for each channel.
    sums: DevicePtr,
    workspace: DevicePtr,
}

impl<'a> Memory<'a> {
    fn new(driver: &'a dyn Driver, c: &Convolution, workspace: usize) -> Result<Memory<'a>> {
        let noise = |elements: usize, dtype: DType| {
            let words = (elements * dtype.size()).div_ceil(4);
            let desc = &TensorDesc::new([words], DType::F32);
            let ptr = driver.allocate(desc.bytes())?;
            random::fill(driver, DeviceTensor { desc, ptr }, 0, 0, 0)?;
            Ok(ptr)
        };
        let (x, y) = (c.geometry.x_len(), c.geometry.y_len());
        Ok(Memory {
            driver,
            x: noise(x, c.dtype)?,
            // d_w is float32.
            w: noise(c.geometry.w_len(), DType::F32)?,
            y: noise(y, c.dtype)?,
            addend: noise(x.max(y), c.dtype)?,
            sums: noise(2 * c.geometry.c_out, DType::F32)?,
            workspace: driver.allocate(workspace)?,
        })
    }

    fn operands(&self, direction: Direction, accumulate: bool) -> Operands {
        let (inputs, out) = match direction {
            Direction::Forward => ([self.x, self.w], self.y),
            Direction::DataGradient => ([self.y, self.w], self.x),
            Direction::WeightGradient => ([self.x, self.y], self.w),
        };
        let (added, sums) = ([DevicePtr::NULL; 2], DevicePtr::NULL);
        Operands { inputs, added, out, sums, accumulate, workspace: self.workspace }
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        for memory in [self.x, self.w, self.y, self.addend, self.sums, self.workspace] {
            if let Err(error) = self.driver.free(memory) {
                tracing::warn!("device memory was not given back: {error}");
            }
        }
    }
}

impl CudaLibraries {
    /// Times the algorithms for `convolution`: as it is, added to what is there, and where it applies with an addition or the
    /// statistics of its result fused into it. Those may take up to `workspace` bytes, which may be more than [`SCRATCH`].
    ///
    /// # Errors
    /// Too little memory; a fault of the device.
    pub fn measure(
        &self,
        driver: &dyn Driver,
        convolution: &Convolution,
        choice: Choice,
        workspace: usize,
    ) -> Result<Vec<Measured>> {
        let staging = Work::Convolution(*convolution).staging();
        let memory = Memory::new(driver, convolution, workspace.max(SCRATCH) + staging)?;
        self.bind()?;
        let direction = convolution.direction;
        let mut measured = vec![];
        let kinds: &[(&str, bool)] = match direction {
            Direction::Forward => &[("plain", false)],
            _ => &[("plain", false), ("added to what is there", true)],
        };
        for &(what, accumulate) in kinds {
            let operands = memory.operands(direction, accumulate);
            for chosen in self.all(&Work::Convolution(*convolution), accumulate, choice)? {
                // SAFETY: the memory was made for this convolution, the workspace with what it takes.
                let time = unsafe { chosen.time(driver, &operands) };
                measured.push(Measured { what, algorithm: chosen.describe(), workspace: chosen.workspace(), time });
            }
        }
        let fused: &[(&str, Epilogue)] = match direction {
            Direction::Forward => &[("with statistics of y", Epilogue::Statistics)],
            Direction::DataGradient => &[("with another tensor added", Epilogue::Add)],
            Direction::WeightGradient => &[],
        };
        let limits = Limits { workspace, ..limits(convolution, choice) };
        for &(what, epilogue) in fused {
            let graph = Graph::new(self.cudnn(), self.target(), convolution, epilogue)?;
            for plan in graph.plans(limits, MOST)? {
                let tensors = memory.tensors(convolution, epilogue);
                let time = median(driver, &mut || {
                    // SAFETY: the memory was made for this convolution, the workspace with as much as plans may take.
                    unsafe { plan.run(&tensors, memory.workspace) }
                });
                measured.push(Measured { what, algorithm: name(&plan), workspace: plan.workspace, time });
            }
        }
        Ok(measured)
    }
}

impl Memory<'_> {
    fn tensors(&self, convolution: &Convolution, epilogue: Epilogue) -> Vec<(Tensor, DevicePtr)> {
        let mut tensors = vec![(Tensor::X, self.x), (Tensor::W, self.w), (Tensor::Y, self.y)];
        match epilogue {
            Epilogue::Add => tensors.push((Tensor::Addend, self.addend)),
            Epilogue::Statistics => {
                let second = self.sums.offset(convolution.geometry.c_out * DType::F32.size());
                tensors.extend([(Tensor::Sum, self.sums), (Tensor::SquareSum, second)]);
            }
            Epilogue::None | Epilogue::Accumulate => {}
        }
        tensors
    }
}

fn name(plan: &Plan) -> String {
    let compiled = if plan.compiled { ", compiled" } else { "" };
    format!("cuDNN engine {}{compiled}", plan.engine.index)
}

impl Chosen {
    fn describe(&self) -> String {
        self.plan().map_or("cuBLASLt".into(), name)
    }

    fn workspace(&self) -> usize {
        self.plan().map_or(SCRATCH, |plan| plan.workspace)
    }
}
