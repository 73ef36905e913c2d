//! The command line: parse, resolve, run, exit code. One file per command.

mod augment_args;
mod augment_preview;
mod inspect;
mod meter;
mod prepare;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::Result;

#[derive(Debug, Parser)]
#[command(name = "simsiam-engine", version, about = "SimSiam pretraining, fast, on one machine")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Turn a folder of images (or IDX files) into one memory-mappable dataset file.
    Prepare(prepare::PrepareArgs),
    /// Show and verify a dataset file.
    Inspect(inspect::InspectArgs),
    /// Write a PNG with images beside two augmented views of each.
    AugmentPreview(augment_preview::AugmentPreviewArgs),
}

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Prepare(args) => prepare::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::AugmentPreview(args) => augment_preview::run(args),
    }
}
