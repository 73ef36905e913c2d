//! `bench`: how fast a part of the engine is on this machine, and what holds it up.

mod loader;

use clap::Subcommand;

use crate::error::Result;

#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Read and augment images as a training run would, and name the bottleneck.
    Loader(loader::LoaderArgs),
}

pub fn run(args: BenchArgs) -> Result<()> {
    match args.part {
        Part::Loader(args) => loader::run(&args),
    }
}
