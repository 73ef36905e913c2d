//! `selftest`: the engine against results that PyTorch computed.

use std::path::PathBuf;

use super::output::print;
use crate::backend::cpu::Tier;
use crate::error::{Error, Result};
use crate::exec::{Device, DeviceChoice, Precision};
use crate::nn::views::Views;
use crate::selftest::{self, Outcome, Variant};
use crate::tensor::DType;
use crate::train::epilogues::NormChoice;

#[derive(Debug, clap::Args)]
pub struct SelftestArgs {
    /// Folder of golden files, as tools/golden.py writes them [default: a set inside the program].
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,
    /// Where to compute.
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceChoice,
    /// Element type of the activations [default: every one that the device computes in].
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Instead of goldens: train N steps replaying a CUDA graph and N launching node by node; every bit must be the same, and
    /// nothing may be allocated after the second step.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "200", conflicts_with_all = ["golden", "lockstep"])]
    replay: Option<usize>,
    /// Instead of goldens: run a step on the device and on the CPU node by node, and name the first node that diverges; and make
    /// augmented views on both, which must have the same bits.
    #[arg(long, conflicts_with = "golden")]
    lockstep: bool,
    /// How the views of training steps go through the network: together, or sequential, one after the other.
    #[arg(long, value_enum, default_value_t, hide_possible_values = true, value_name = "together|sequential")]
    views: Views,
    /// How training steps compute batch norm behind 1x1 convolutions to more channels: standard, gram or gram:LAYERS.
    #[arg(long, default_value_t, value_name = "HOW")]
    bn: NormChoice,
    /// The CPU's convolutions.
    #[arg(long, value_enum, default_value_t)]
    cpu_conv: Tier,
}

pub fn run(args: SelftestArgs) -> Result<()> {
    let device = args.device.open(args.cpu_conv)?.device;
    let mut printed = Ok(());
    let report = |outcome: &Outcome| {
        if printed.is_ok() {
            printed = print(|out| writeln!(out, "{}", line(outcome)));
        }
    };
    let dtypes = dtypes(&device, args.dtype)?;
    let variant = Variant { views: args.views, bn: args.bn };
    let outcomes = match args.replay {
        Some(steps) => selftest::replays(&device, &dtypes, &variant, steps, report)?,
        None if args.lockstep => selftest::lockstep(&device, &variant, report)?,
        None => selftest::run(args.golden.as_deref(), &device, &dtypes, &variant, report)?,
    };
    printed?;
    let failed: Vec<&str> = outcomes.iter().filter(|o| !o.passed()).map(|o| o.name.as_str()).collect();
    if !failed.is_empty() {
        let (n, all) = (failed.len(), outcomes.len());
        let what = match (args.replay, args.lockstep) {
            (None, false) => "files",
            _ => "checks",
        };
        return Err(Error::Mismatch(format!("selftest: {n} of {all} {what} failed: {}", failed.join(", "))));
    }
    if let Some(error) = device.missing_libraries() {
        let what = format!("selftest: convolutions, products and whole steps were not run: {error}");
        return Err(Error::Unsupported { what, hint: None });
    }
    let with = match (args.replay, args.lockstep) {
        (Some(_), _) => "checks passed: runs are the same launched and replayed, and allocate nothing once they go",
        (_, true) => "checks passed: steps and augmentation agree with the CPU",
        _ => "files agree with PyTorch",
    };
    print(|out| writeln!(out, "all {} {with}", outcomes.len()))
}

/// The element types to compute in. On the CPU every op is checked in f64 too, whatever is asked for.
fn dtypes(device: &Device, asked: Option<Precision>) -> Result<Vec<DType>> {
    let all = match device {
        Device::Cpu(_) => vec![DType::F64, DType::F32],
        Device::Cuda(_) => vec![DType::F32, DType::Bf16, DType::F16],
    };
    match (device, asked.map(Precision::dtype)) {
        (_, None) | (Device::Cpu(_), Some(DType::F32)) => Ok(all),
        (Device::Cuda(_), Some(dtype)) if all.contains(&dtype) => Ok(vec![dtype]),
        (_, Some(dtype)) => {
            let known: Vec<String> = all.iter().map(DType::to_string).collect();
            let what = format!("--dtype {dtype}: not computed on this device");
            Err(Error::Unsupported { what, hint: Some(format!("use one of {}", known.join(", "))) })
        }
    }
}

fn line(outcome: &Outcome) -> String {
    let verdict = if outcome.passed() { "pass" } else { "FAIL" };
    let Outcome { name, compared, worst } = outcome;
    format!("{verdict}  {name}: {compared}; {worst}")
}
