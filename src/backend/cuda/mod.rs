//! CUDA: the kernels that were compiled into this binary, and the devices that run them.

mod allocations;
pub mod cast;
pub mod ceilings;
pub mod check;
pub mod device;
pub mod driver;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod io;
pub mod kernel;
pub mod library;
pub mod nvtx;
pub mod random;
pub mod resources;

pub use device::{CudaDevice, DeviceFacts};
pub use driver::{DeviceMemory, Driver, Event, Graph, HostTask, HostView, Pinned, Stream};
#[cfg(feature = "emulator")]
pub use emulator::Emulator;
pub use io::{CudaIo, DeviceOutput, DeviceTensor};
pub use kernel::{Call, DevicePtr, Grid, Kernel};
pub use nvtx::Nvtx;

/// One file of `kernels/`, compiled for several devices.
#[derive(Debug)]
pub struct Module {
    /// The file's name without extension.
    pub name: &'static str,
    /// NVIDIA's container of the compiled code, 16-byte aligned.
    pub fatbin: &'static [u8],
    /// What the container holds: `sm_90a` is machine code of that generation, `compute_80` PTX for it and later ones.
    pub archs: &'static [&'static str],
    /// What the assembler said of each kernel, see [`resources`].
    pub log: &'static str,
    /// A line for each kernel: name, threads of a block, and the bytes of each parameter.
    pub signatures: &'static str,
}

/// Gives embedded bytes the alignment that the driver reads them with.
#[allow(dead_code)] // not without nvcc: then there is nothing to embed
#[repr(C, align(16))]
struct Aligned<const N: usize>([u8; N]);

static MODULES: &[Module] = &include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// All compiled files; none when the crate was built without nvcc.
pub fn compiled_modules() -> &'static [Module] {
    MODULES
}

/// Why a library cannot be loaded, in the system's words.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// The declarations of the kernels that belong to no op.
pub fn kernels() -> Vec<&'static Kernel> {
    [cast::KERNELS, ceilings::KERNELS, check::KERNELS, random::KERNELS].concat()
}

/// The release of nvcc that compiled them, or "none".
pub const NVCC_RELEASE: &str = env!("SIMSIAM_NVCC");
