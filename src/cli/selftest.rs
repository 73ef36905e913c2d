//! `selftest`: the engine against results that PyTorch computed.

use std::path::PathBuf;

use super::device::{Device, Precision, check_available};
use super::output::print;
use crate::backend::cpu::Tier;
use crate::error::{Error, Result};
use crate::selftest::{self, Outcome};

#[derive(Debug, clap::Args)]
pub struct SelftestArgs {
    /// Folder of golden files, as tools/golden.py writes them [default: a set inside the program].
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t)]
    device: Device,
    /// Element type to train in.
    #[arg(long, value_enum, default_value_t)]
    dtype: Precision,
    /// The CPU's convolutions.
    #[arg(long, value_enum, default_value_t)]
    cpu_conv: Tier,
}

pub fn run(args: SelftestArgs) -> Result<()> {
    check_available(args.device, args.dtype)?;
    let mut printed = Ok(());
    let outcomes = selftest::run(args.golden.as_deref(), args.cpu_conv, |outcome| {
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

fn line(outcome: &Outcome) -> String {
    let verdict = if outcome.passed() { "pass" } else { "FAIL" };
    let Outcome { name, compared, worst } = outcome;
    format!("{verdict}  {name}: {compared}; worst at {:.3} of the tolerance: {}", worst.ratio, worst.what)
}
