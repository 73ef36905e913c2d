//! What each compiled kernel takes of a multiprocessor, from the log of NVIDIA's assembler (`ptxas -v`).

use super::Module;

/// The needs of one kernel on one generation of devices.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Resources {
    /// Name in the compiled code.
    pub kernel: String,
    /// The generation, e.g. `sm_90a`.
    pub arch: String,
    /// Registers of a thread, of which a multiprocessor has 65,536.
    pub registers: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// Bytes of local memory of a thread: arrays that are indexed at run time, and spills.
    pub stack: u32,
    /// Bytes of registers that did not fit and go through memory: stores and loads of a thread.
    pub spills: u32,
}

/// The needs of all kernels of a file, in the order of the log.
pub fn resources(module: &Module) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    for line in module.log.lines() {
        if let Some((kernel, arch)) = entry_function(line) {
            let (kernel, arch) = (kernel.into(), arch.into());
            all.push(Resources { kernel, arch, registers: 0, shared: 0, stack: 0, spills: 0 });
        }
        let Some(last) = all.last_mut() else { continue };
        let figure = |what: &str| number_before(line, what);
        last.stack = figure(" bytes stack frame").unwrap_or(last.stack);
        last.registers = figure(" registers").unwrap_or(last.registers);
        last.shared = figure(" bytes smem").unwrap_or(last.shared);
        if let (Some(stores), Some(loads)) = (figure(" bytes spill stores"), figure(" bytes spill loads")) {
            last.spills = stores + loads;
        }
    }
    all
}

/// `... Compiling entry function 'relu_f32' for 'sm_90a'`
fn entry_function(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once("Compiling entry function '")?;
    let (kernel, rest) = rest.split_once("' for '")?;
    Some((kernel, rest.strip_suffix('\'')?))
}

/// The number that stands before `what`.
fn number_before(line: &str, what: &str) -> Option<u32> {
    let (before, _) = line.split_once(what)?;
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ptxas_prints() {
        let log = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_f32' for 'sm_90a'
ptxas info    : Function properties for a_f32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
ptxas info    : Compile time = 3.125 ms
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas info    : Function properties for b
    72 bytes stack frame, 12 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 72 bytes cumulative stack size, 2048 bytes smem, 376 bytes cmem[0]
";
        let a =
            Resources { kernel: "a_f32".into(), arch: "sm_90a".into(), registers: 16, shared: 0, stack: 0, spills: 0 };
        let b =
            Resources { kernel: "b".into(), arch: "sm_80".into(), registers: 255, shared: 2048, stack: 72, spills: 40 };
        assert_eq!(resources(&Module { name: "x", fatbin: &[], archs: &[], log, signatures: "" }), [a, b]);
    }
}
