//! The command line: parse, resolve, run, exit code. One file per command.

mod augment_args;
mod augment_preview;
mod bench;
mod costs;
mod demo;
mod devices;
mod embed;
mod eval;
mod export;
mod facts;
mod finetune;
mod gpu_args;
mod import;
mod inspect;
mod kernels;
mod machine;
mod machine_args;
mod memory_args;
mod meter;
mod model_args;
mod output;
mod peaks;
mod picture;
mod plan;
mod prepare;
mod preset;
mod profile;
mod recipe_args;
mod recomputation;
mod selftest;
pub mod signals;
mod source_args;
mod train;
mod workload;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::{ArgAction, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::backend::cuda::{NVCC_RELEASE, compiled_modules};
use crate::error::{Error, Result};

/// SimSiam pretraining, fast, on one machine.
#[derive(Debug, Parser)]
#[command(name = "simsiam-engine", version, long_version = LONG_VERSION.as_str())]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads that compute [default: one per core]. Does not change any result.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// Tell more on standard error; -vv even more. RUST_LOG has the last word.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Pretrain a small network on embedded images: the whole job in a few minutes.
    Demo(demo::DemoArgs),
    /// Pretrain on a dataset, or continue a run.
    Train(Box<train::TrainArgs>),
    /// Turn images, from wherever they are, into a memory-mappable dataset.
    Prepare(prepare::PrepareArgs),
    /// Show and verify a dataset.
    Inspect(inspect::InspectArgs),
    /// Write a PNG with images beside two augmented views of each.
    AugmentPreview(augment_preview::AugmentPreviewArgs),
    /// Tell the memory and the work of a training step, without running it.
    Plan(plan::PlanArgs),
    /// Time every node of a training step, and say how far each is from what the device could do.
    Profile(Box<profile::ProfileArgs>),
    /// Measure a trained encoder: kNN accuracy, linear classifiers.
    Eval(eval::EvalArgs),
    /// Write the features of a dataset's images, for other programs, as a map or as a gallery of neighbours.
    Embed(Box<embed::EmbedArgs>),
    /// Train a pretrained network on labels, all or a few, and beside it one from scratch.
    Finetune(Box<finetune::FinetuneArgs>),
    /// Write the trained network for torchvision, timm, detectron2 or ONNX, with a model card.
    Export(export::ExportArgs),
    /// Show what is in a file of weights (PyTorch, torchvision, timm, the reference), and make it a checkpoint.
    Import(import::ImportArgs),
    /// Measure a part of the engine on this machine, and name what holds it up.
    Bench(bench::BenchArgs),
    /// Show the GPUs of this machine and NVIDIA's libraries, or why there are none.
    Devices(devices::DevicesArgs),
    /// Show the CUDA kernels in this program and what they take of a device.
    Kernels(kernels::KernelsArgs),
    /// Compare the engine with results that PyTorch computed.
    Selftest(selftest::SelftestArgs),
}

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.verbose);
    match start_threads(cli.threads).and_then(|()| run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, whatever the message was made of.
            eprintln!("error: {}", error.to_string().replace('\n', " "));
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
        Command::Plan(args) => plan::run(args),
        Command::Profile(args) => profile::run(&args),
        Command::Eval(args) => eval::run(args),
        Command::Embed(args) => embed::run(&args),
        Command::Finetune(args) => finetune::run(&args),
        Command::Export(args) => export::run(args),
        Command::Import(args) => import::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::Devices(args) => devices::run(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Selftest(args) => selftest::run(args),
    }
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
}

fn start_threads(threads: Option<usize>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    if threads == 0 {
        return Err(Error::config("--threads", "must be at least 1"));
    }
    let started = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    started.map_err(|e| Error::Unsupported { what: format!("cannot start {threads} threads: {e}"), hint: None })
}

static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    let archs: BTreeSet<&str> = compiled_modules().iter().flat_map(|kernel| kernel.archs).copied().collect();
    let cuda = match archs.is_empty() {
        true => "none".to_string(),
        false => format!("{} (nvcc {NVCC_RELEASE})", Vec::from_iter(archs).join(" ")),
    };
    let (version, commit, target) = (env!("CARGO_PKG_VERSION"), env!("SIMSIAM_COMMIT"), env!("SIMSIAM_TARGET"));
    format!("{version}\ncommit  {commit}\ntarget  {target}\nCUDA    {cuda}")
});
