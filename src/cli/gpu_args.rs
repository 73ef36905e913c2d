//! How a step is run on a GPU.

#[derive(Debug, Clone, Copy, clap::Args)]
pub struct GpuArgs {
    /// On a GPU: launch every kernel instead of replaying a CUDA graph of the step. Does not change any result.
    #[arg(long)]
    pub no_graph: bool,
    /// On a GPU: time all algorithms of cuDNN and cuBLASLt for each layer, instead of the first few.
    #[arg(long)]
    pub autotune: bool,
    /// On a GPU: mark steps, phases and layers for Nsight, which has to have started the program (tools/profile.sh).
    #[arg(long)]
    pub nvtx: bool,
}
