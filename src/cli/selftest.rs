//! `selftest`: the engine against results that PyTorch computed.

use std::path::PathBuf;

use super::output::print;
use crate::backend::cpu::Tier;
use crate::error::{Error, Result};
use crate::exec::{Device, DeviceChoice, Precision};
use crate::selftest::{self, Outcome};
use crate::tensor::DType;

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
    /// The CPU's convolutions.
    #[arg(long, value_enum, default_value_t)]
    cpu_conv: Tier,
}

pub fn run(args: SelftestArgs) -> Result<()> {
    let device = args.device.open(args.cpu_conv)?.device;
    let mut printed = Ok(());
    let outcomes = selftest::run(args.golden.as_deref(), &device, &dtypes(&device, args.dtype)?, |outcome| {
        if printed.is_ok() {
            printed = print(|out| writeln!(out, "{}", line(outcome)));
        }
    })?;
    printed?;
    let failed: Vec<&str> = outcomes.iter().filter(|o| !o.passed()).map(|o| o.name.as_str()).collect();
    if !failed.is_empty() {
        let (n, all) = (failed.len(), outcomes.len());
        return Err(Error::Mismatch(format!("selftest: {n} of {all} files failed: {}", failed.join(", "))));
    }
    print(|out| writeln!(out, "all {} files agree with PyTorch", outcomes.len()))
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
    format!("{verdict}  {name}: {compared}; worst at {:.3} of the tolerance: {}", worst.ratio, worst.what)
}
