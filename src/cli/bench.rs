//! `bench`: how fast a part of the engine is on this machine, and what holds it up.

pub(super) mod ceilings;
mod conv;
mod loader;
mod op_cases;
pub(super) mod ops;
mod step;
mod step_data;

use clap::Subcommand;

use crate::error::Result;

#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Time every algorithm of cuDNN and cuBLASLt for a network's convolutions, and what may be fused with them.
    Conv(conv::ConvArgs),
    /// Read and augment images as a training run would, and name the bottleneck.
    Loader(loader::LoaderArgs),
    /// Time every op that has a kernel of its own at ResNet-50's shapes, against what the device can do at best.
    Ops(ops::OpsArgs),
    /// Time whole training steps: images/s, memory, and what part of the device's arithmetic is used.
    Step(Box<step::StepArgs>),
}

pub fn run(args: BenchArgs) -> Result<()> {
    match args.part {
        Part::Conv(args) => conv::run(&args),
        Part::Loader(args) => loader::run(&args),
        Part::Ops(args) => ops::run(&args),
        Part::Step(args) => step::run(&args),
    }
}
