//! How a step is run on a GPU.

use crate::nn::epilogues::ResidualGradient;
use crate::train::epilogues::{EpilogueChoice, FuseStatistics, NormChoice};

#[derive(Debug, Clone, clap::Args)]
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
    #[command(flatten)]
    epilogues: EpilogueArgs,
}

impl GpuArgs {
    /// What is asked for of `before`.
    pub fn epilogues(&self, before: EpilogueChoice) -> EpilogueChoice {
        self.epilogues.of(before)
    }
}

/// What is fused with convolutions, and how batch norm is computed behind them.
#[derive(Debug, Clone, clap::Args)]
pub struct EpilogueArgs {
    /// How batch norm behind 1x1 convolutions to more channels is computed: standard, gram (from the covariance of their
    /// inputs, without ever forming their results: a fifth fewer bytes and a third fewer saved activations for 6 % more
    /// operations),
    /// gram:LAYERS (in these alone, as for --fuse-statistics) or auto (what was measured to be faster: on a CPU gram in layers of
    /// up to 128 input channels, on a GPU so far standard)
    /// [default: standard; with --resume, as before].
    #[arg(long, value_name = "HOW")]
    bn: Option<NormChoice>,
    /// Convolutions that compute the statistics for the batch norm after them: auto (in fp16 on GPUs with compute capability
    /// 8.0 or 9.0, whose cuDNN does it fast), all, none, or names with commas between them and what they begin with, such as
    /// encoder.layer1,encoder.conv1 [default: none; with --resume, as before].
    #[arg(long, value_name = "LAYERS")]
    fuse_statistics: Option<FuseStatistics>,
    /// How a convolution's gradient is added to that of a residual branch: accumulate (in place, as it is computed), separate
    /// (by a kernel of its own) or fused (by cuDNN, to a new place); with layers as above, there alone [default: accumulate;
    /// with --resume, as before].
    #[arg(long, value_name = "MODE[:LAYERS]")]
    residual_gradient: Option<ResidualGradient>,
    /// Whether the batch norm, ReLU and max pooling of the ImageNet stem are one op each way, which moves fewer bytes [default:
    /// false; with --resume, as before].
    #[arg(long, value_name = "BOOL")]
    fuse_pooling: Option<bool>,
    /// Whether the last batch norm of a block and that of its projection shortcut are one kernel, which moves fewer bytes and
    /// changes no bit [default: true; with --resume, as before].
    #[arg(long, value_name = "BOOL")]
    fuse_shortcut: Option<bool>,
}

impl EpilogueArgs {
    /// What is asked for of `before`.
    pub fn of(&self, before: EpilogueChoice) -> EpilogueChoice {
        EpilogueChoice {
            fuse_statistics: self.fuse_statistics.clone().unwrap_or(before.fuse_statistics),
            bn: self.bn.clone().unwrap_or(before.bn),
            residual_gradient: self.residual_gradient.clone().unwrap_or(before.residual_gradient),
            fuse_pooling: self.fuse_pooling.unwrap_or(before.fuse_pooling),
            fuse_shortcut: self.fuse_shortcut.unwrap_or(before.fuse_shortcut),
        }
    }
}
