//! Options of the machine that trains.

use super::gpu_args::GpuArgs;
use crate::backend::cpu::Tier;
use crate::data::mapped::Access;
use crate::error::Result;
use crate::exec::{Device, DeviceChoice, Opened, Precision};
use crate::train::config::Machine;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Where to train: auto (the first NVIDIA GPU if there is one, else the CPU), cpu, cuda, cuda:N, or cuda-emulated (the
    /// CUDA kernels on the CPU, for finding faults) [default: auto; with --resume, as before].
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// In what to train [default: bf16 on a GPU, f32 on the CPU; with --resume, as before].
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    #[command(flatten)]
    gpu: GpuArgs,
    /// Threads that read and augment images [default: 1; with --resume, as before].
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// How records are read [default: auto; with --resume, as before]. Does not change any result.
    #[arg(long, value_enum)]
    io: Option<Access>,
    /// Implementation of the CPU's convolutions.
    #[arg(long, value_enum, default_value_t)]
    cpu_conv: Tier,
}

impl MachineArgs {
    /// Changes `machine` as asked for and opens its device; a new run's element type is the device's own.
    pub fn open(&self, machine: &mut Machine, new: bool) -> Result<Device> {
        machine.device = self.device.unwrap_or(machine.device);
        machine.workers = self.workers.unwrap_or(machine.workers);
        machine.io = self.io.unwrap_or(machine.io);
        machine.cpu_conv = if new { self.cpu_conv } else { machine.cpu_conv };
        machine.graph &= !self.gpu.no_graph;
        machine.autotune |= self.gpu.autotune;
        machine.nvtx = self.gpu.nvtx;
        machine.epilogues = self.gpu.epilogues(std::mem::take(&mut machine.epilogues));
        let Opened { device, instead_of_gpu } = machine.device.open(machine.cpu_conv)?;
        if let Some(error) = instead_of_gpu {
            eprintln!("training on the CPU, because there is no GPU to be used: {error}");
        }
        let own = if new { Precision::default_on(&device) } else { machine.dtype };
        machine.dtype = self.dtype.unwrap_or(own);
        machine.dtype.check_trainable_on(&device)?;
        Ok(device)
    }
}
