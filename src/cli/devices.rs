//! `devices`: what this machine has for training on a GPU, or why there is nothing.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::output::print;
use crate::atomic::write_atomic;
use crate::backend::cuda::library::cudnn::{self, Cudnn};
use crate::backend::cuda::library::{Installed, installed};
use crate::backend::cuda::{CudaDevice, DeviceFacts, DeviceMemory, Driver, compiled_modules};
use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct DevicesArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write cuDNN's description of a device: its plans can then be looked at on machines without one (tools/devices).
    #[arg(long, value_name = "FILE")]
    describe: Option<PathBuf>,
    /// Number of the device that --describe is about.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "describe")]
    ordinal: u32,
}

pub fn run(args: &DevicesArgs) -> Result<()> {
    if let Some(path) = &args.describe {
        return describe(args.ordinal, path);
    }
    let machine = Machine::look();
    print(|out| match args.json {
        true => writeln!(out, "{:#}", machine.json()),
        false => machine.print(out),
    })?;
    machine.usable()
}

/// Everything there is to tell.
struct Machine {
    driver: Result<[u32; 2]>,
    devices: Result<Vec<Found>>,
    libraries: Vec<Installed>,
}

/// A device, and its memory or why it cannot be opened.
struct Found {
    facts: DeviceFacts,
    memory: Result<DeviceMemory>,
}

impl Machine {
    fn look() -> Machine {
        let found = |facts: DeviceFacts| {
            let memory = CudaDevice::open(facts.ordinal).and_then(|device| device.memory());
            Found { facts, memory }
        };
        let devices = CudaDevice::list().map(|devices| devices.into_iter().map(found).collect());
        Machine { driver: CudaDevice::driver_version(), devices, libraries: installed() }
    }

    /// The first reason why no device can be used, if none can.
    fn usable(self) -> Result<()> {
        if compiled_modules().is_empty() {
            let what = "this build has no CUDA kernels: nvcc was not found when it was made".into();
            return Err(Error::Unsupported { what, hint: Some("run tools/install-nvcc.sh and build again".into()) });
        }
        let mut refused = None;
        let mut opened = false;
        for device in self.devices? {
            match device.memory {
                Ok(_) => opened = true,
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        if let Some(error) = refused.filter(|_| !opened) {
            return Err(error);
        }
        self.libraries.into_iter().filter(|one| one.needed).try_for_each(|one| one.found.map(|_| ()))
    }

    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        match &self.driver {
            Ok([major, minor]) => writeln!(out, "driver     for CUDA {major}.{minor}; the kernels need 13.0")?,
            Err(error) => writeln!(out, "driver     {error}")?,
        }
        let archs = compiled_modules().first().map_or(&[][..], |module| module.archs);
        match archs {
            [] => writeln!(out, "kernels    none: built without nvcc")?,
            archs => writeln!(out, "kernels    for {}", archs.join(", "))?,
        }
        match &self.devices {
            Err(error) => writeln!(out, "devices    none: {error}")?,
            Ok(devices) => devices.iter().try_for_each(|device| device.print(out))?,
        }
        for Installed { name, needed, found } in &self.libraries {
            match found {
                Ok((version, path)) => writeln!(out, "{name:<10} {version:<8} {}", path.display())?,
                Err(error) => writeln!(out, "{name:<10} {} {error}", if *needed { "missing:" } else { "not used:" })?,
            }
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let text = |error: &Error| error.to_string();
        let devices = |devices: &Vec<Found>| -> Vec<Value> {
            devices
                .iter()
                .map(|Found { facts, memory }| {
                    let mut value = json!(facts);
                    match memory {
                        Ok(memory) => value["memory_free"] = json!(memory.free),
                        Err(error) => value["error"] = json!(text(error)),
                    }
                    value
                })
                .collect()
        };
        let libraries = self.libraries.iter().map(|Installed { name, needed, found }| match found {
            Ok((version, path)) => json!({ "name": name, "needed": needed, "version": version, "path": path }),
            Err(error) => json!({ "name": name, "needed": needed, "error": text(error) }),
        });
        json!({
            "driver": self.driver.as_ref().map_or_else(|e| json!({ "error": text(e) }), |v| json!({ "cuda": v })),
            "kernels": compiled_modules().first().map_or(&[][..], |module| module.archs),
            "devices": self.devices.as_ref().map_or_else(|e| json!({ "error": text(e) }), |d| json!(devices(d))),
            "libraries": libraries.collect::<Vec<_>>(),
        })
    }
}

impl Found {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let DeviceFacts { ordinal, name, capability: [major, minor], multiprocessors, memory, code } = &self.facts;
        let gb = |bytes: usize| bytes as f64 / 1e9;
        write!(
            out,
            "device {ordinal:<3} {name}, compute capability {major}.{minor}, {multiprocessors} multiprocessors, "
        )?;
        write!(out, "{:.2} GB", gb(*memory))?;
        if let Ok(memory) = &self.memory {
            write!(out, ", {:.2} GB free", gb(memory.free))?;
        }
        match (code, &self.memory) {
            (_, Err(error)) => writeln!(out, ": cannot be used: {error}"),
            (Some(code), Ok(_)) => writeln!(out, "; runs the kernels for {code}"),
            (None, Ok(_)) => writeln!(out, "; this build has no kernels for it"),
        }
    }
}

fn describe(ordinal: u32, path: &Path) -> Result<()> {
    CudaDevice::list()?; // says why there is no device, better than cuDNN does
    let description = cudnn::describe(&Cudnn::load()?, ordinal as i32)?;
    write_atomic(path, |out| out.write_all(description.as_bytes()))?;
    print(|out| writeln!(out, "wrote {}", path.display()))
}
