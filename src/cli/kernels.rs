//! `kernels`: the CUDA kernels in this program, and what they take of a device.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::output::print;
use crate::atomic::write_atomic;
use crate::backend::cuda::resources::{Resources, resources};
use crate::backend::cuda::{Module, NVCC_RELEASE, compiled_modules};
use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct KernelsArgs {
    /// Only kernels whose name contains TEXT.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only this generation of devices, e.g. sm_90a.
    #[arg(long, value_name = "ARCH")]
    arch: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write the compiled code to FOLDER, a fatbin for each file of kernels/: for cuobjdump and nvdisasm.
    #[arg(long, value_name = "FOLDER")]
    extract: Option<PathBuf>,
}

pub fn run(args: &KernelsArgs) -> Result<()> {
    let modules = compiled_modules();
    if modules.is_empty() {
        let what = "this build has no CUDA kernels: nvcc was not found when it was made".into();
        return Err(Error::Unsupported { what, hint: Some("run tools/install-nvcc.sh and build again".into()) });
    }
    if let Some(folder) = &args.extract {
        return extract(modules, folder);
    }
    let wanted = |one: &Resources| {
        args.only.as_ref().is_none_or(|text| one.kernel.contains(text.as_str()))
            && args.arch.as_ref().is_none_or(|arch| one.arch == *arch)
    };
    let found: Vec<Resources> = modules.iter().flat_map(resources).filter(wanted).collect();
    if found.is_empty() {
        let archs = modules[0].archs.join(", ");
        return Err(Error::config("--only and --arch", format!("no kernel fits; this build has code for {archs}")));
    }
    print(|out| match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&found).unwrap_or_default()),
        false => table(out, &found),
    })
}

fn table(out: &mut dyn Write, found: &[Resources]) -> io::Result<()> {
    writeln!(out, "compiled by nvcc {NVCC_RELEASE}\n")?;
    writeln!(
        out,
        "{:<36} {:<8} {:>9} {:>12} {:>10} {:>11}",
        "kernel", "arch", "registers", "shared bytes", "stack", "spill bytes"
    )?;
    for Resources { kernel, arch, registers, shared, stack, spills } in found {
        writeln!(out, "{kernel:<36} {arch:<8} {registers:>9} {shared:>12} {stack:>10} {spills:>11}")?;
    }
    Ok(())
}

fn extract(modules: &[Module], folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    for module in modules {
        let path = folder.join(module.name).with_extension("fatbin");
        write_atomic(&path, |out| out.write_all(module.fatbin))?;
    }
    print(|out| writeln!(out, "{} fatbins in {}", modules.len(), folder.display()))
}
