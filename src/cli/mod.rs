//! The command line: parse, resolve, run, exit code. One file per command.

mod augment_args;
mod augment_preview;
mod demo;
mod inspect;
mod meter;
mod model_args;
mod prepare;
mod preset;
mod recipe_args;
pub mod signals;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::{Error, Result};

#[derive(Debug, Parser)]
#[command(name = "simsiam-engine", version, about = "SimSiam pretraining, fast, on one machine")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Pretrain a small network on embedded images: the whole job in a few minutes.
    Demo(demo::DemoArgs),
    /// Pretrain on a dataset file, or continue a run.
    Train(Box<train::TrainArgs>),
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
        Command::Demo(args) => demo::run(args),
        Command::Train(args) => train::run(*args),
        Command::Prepare(args) => prepare::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::AugmentPreview(args) => augment_preview::run(args),
    }
}

/// Checks a `--device`.
///
/// # Errors
/// [`Error::Unsupported`] for a device that this build cannot compute on, [`Error::Config`] for anything else.
fn check_device(device: &str) -> Result<()> {
    match device {
        "cpu" => Ok(()),
        "cuda" => Err(Error::Unsupported {
            what: "--device cuda: this version trains on the CPU only".into(),
            hint: Some("use --device cpu".into()),
        }),
        other => Err(Error::config("--device", format!("expected cpu, got {other:?}"))),
    }
}
