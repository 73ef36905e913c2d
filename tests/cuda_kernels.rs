//! The kernels as Rust declares them against the compiled code, in both directions, and what the compiled code costs.

use std::collections::{BTreeMap, BTreeSet};

use simsiam_engine::backend::cuda::resources::resources;
use simsiam_engine::backend::cuda::{Module, NVCC_RELEASE, compiled_modules};
use simsiam_engine::ops::cuda_kernels;

/// Whether there is compiled code; a run that may not skip fails without.
fn compiled() -> bool {
    if NVCC_RELEASE != "none" {
        return true;
    }
    assert!(!std::env::var("SIMSIAM_REQUIRE_NVCC").is_ok_and(|value| value == "1"), "built without nvcc");
    println!("skipped: built without nvcc");
    false
}

/// Block size and size in bytes of each parameter.
#[derive(Debug, PartialEq, Eq)]
struct Signature {
    file: String,
    threads: u32,
    parameters: Vec<usize>,
}

#[test]
fn every_kernel_has_the_parameters_that_rust_passes() {
    if !compiled() {
        return;
    }
    let mut in_code = BTreeMap::new();
    for module in compiled_modules() {
        let found = entries(module);
        assert!(
            !found.is_empty(),
            "no PTX with a kernel in {}: built with SIMSIAM_CUDA_ARCHS without -ptx?",
            module.name
        );
        in_code.extend(found);
    }
    let mut declared = BTreeMap::new();
    for kernel in cuda_kernels() {
        for (_, name) in kernel.variants {
            let signature =
                Signature { file: kernel.file.into(), threads: kernel.threads, parameters: kernel.parameters.to_vec() };
            assert!(declared.insert(name.to_string(), signature).is_none(), "{name} is declared twice");
        }
    }
    let names = |of: &BTreeMap<String, Signature>| of.keys().cloned().collect::<BTreeSet<_>>();
    let (compiled, declared_names) = (names(&in_code), names(&declared));
    let unknown: Vec<_> = compiled.difference(&declared_names).collect();
    let missing: Vec<_> = declared_names.difference(&compiled).collect();
    assert!(unknown.is_empty() && missing.is_empty(), "not declared: {unknown:?}; not compiled: {missing:?}");
    for (name, signature) in &declared {
        assert_eq!(signature, &in_code[name], "{name}: declared, compiled");
    }
}

/// The kernels of a module, from its PTX.
fn entries(module: &Module) -> BTreeMap<String, Signature> {
    let text = String::from_utf8_lossy(module.fatbin);
    let mut found = BTreeMap::new();
    for entry in text.split(".visible .entry ").skip(1) {
        let (name, rest) = entry.split_once('(').unwrap();
        let (parameters, rest) = rest.split_once(')').unwrap();
        let threads = rest.split_once(".maxntid ").unwrap().1.split(',').next().unwrap().trim().parse().unwrap();
        let parameters = parameters.split(".param ").skip(1).map(parameter_bytes).collect();
        found.insert(name.to_string(), Signature { file: module.name.to_string(), threads, parameters });
    }
    found
}

/// `.u64 relu_f32_param_0` has 8 bytes, `.align 8 .b8 sgd_param_0[4096]` 4096.
fn parameter_bytes(text: &str) -> usize {
    if let Some((_, count)) = text.split_once('[') {
        assert!(text.contains(".b8 "), "an array of bytes: {text}");
        return count.split(']').next().unwrap().parse().unwrap();
    }
    let bits = text.trim_start_matches(['.', 'u', 's', 'f', 'b']).split(' ').next().unwrap();
    bits.parse::<usize>().unwrap_or_else(|_| panic!("the type of {text:?}")) / 8
}

#[test]
fn no_kernel_spills_registers() {
    if !compiled() {
        return;
    }
    let mut kernels = BTreeSet::new();
    for module in compiled_modules() {
        let all = resources(module);
        for one in &all {
            assert!(one.registers > 0, "no figures of {} for {}", one.kernel, one.arch);
            assert_eq!(one.spills, 0, "{} spills for {}", one.kernel, one.arch);
            kernels.insert(one.kernel.clone());
        }
        for arch in module.archs.iter().filter(|arch| arch.starts_with("sm_")) {
            assert!(all.iter().any(|one| one.arch == **arch), "{}: no figures for {arch}", module.name);
        }
    }
    let declared: BTreeSet<String> =
        cuda_kernels().iter().flat_map(|kernel| kernel.variants).map(|(_, name)| name.to_string()).collect();
    assert_eq!(kernels, declared);
}
