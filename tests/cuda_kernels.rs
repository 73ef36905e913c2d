//! What can be known of the CUDA kernels without a GPU: that they are in the binary, that the compiled code is what Rust
//! declares, in both directions, what it costs, and that its random numbers are those of the host.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

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

#[test]
fn every_kernel_file_is_embedded_for_every_device() {
    if !compiled() {
        assert!(compiled_modules().is_empty());
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut sources: Vec<PathBuf> = names.filter(|path| path.extension().is_some_and(|x| x == "cu")).collect();
    sources.sort();
    let stems: Vec<&str> = sources.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
    assert_eq!(compiled_modules().iter().map(|module| module.name).collect::<Vec<_>>(), stems);
    for module in compiled_modules() {
        assert!(!module.archs.is_empty());
        let mut promised: Vec<&str> = module.archs.iter().map(|arch| arch.trim_end_matches(['a', 'f'])).collect();
        promised.sort_unstable();
        assert_eq!(contained_code(module), promised, "{}", module.name);
        assert_eq!(module.fatbin.as_ptr() as usize % 16, 0, "{}", module.name);
    }
}

/// The entries of a fatbin (`sm_90` for 90a), sorted; read from the container itself: a header of 16 bytes, then entries of
/// header and payload.
fn contained_code(module: &Module) -> Vec<String> {
    const MAGIC: u32 = 0xBA55_ED50;
    let bytes = module.fatbin;
    let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(u32_at(0), MAGIC, "{} is no fatbin", module.name);
    let (mut at, end) = (usize::from(u16_at(6)), usize::from(u16_at(6)) + u32_at(8) as usize);
    assert_eq!(end, bytes.len(), "{} is cut short", module.name);
    let mut code = vec![];
    while at < end {
        let (kind, header, payload, generation) = (u16_at(at), u32_at(at + 4), u32_at(at + 8), u32_at(at + 28));
        code.push(format!("{}_{generation}", ["", "compute", "sm"][usize::from(kind)]));
        at += (header + payload) as usize;
    }
    code.sort_unstable();
    code
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

/// The kernels of a module, as nvcc compiled them.
fn entries(module: &Module) -> BTreeMap<String, Signature> {
    let signature = |line: &str| {
        let (name, numbers) = line.split_once(' ').unwrap();
        let numbers: Vec<usize> = numbers.split_whitespace().map(|number| number.parse().unwrap()).collect();
        let (threads, parameters) = (numbers[0] as u32, numbers[1..].to_vec());
        (name.to_string(), Signature { file: module.name.to_string(), threads, parameters })
    };
    module.signatures.lines().map(signature).collect()
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

#[cfg(feature = "emulator")]
#[test]
fn device_random_numbers_are_the_hosts() {
    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
    use simsiam_engine::backend::cuda::{DeviceTensor, Driver, random};
    use simsiam_engine::rng::Stream;
    use simsiam_engine::tensor::{DType, TensorDesc};

    let device = Emulator::new(Options { threads: 2, seed: 1 }).unwrap();
    for (n, seed, domain, index) in [
        (1, 0, 0, 0),
        (3, 0x0123_4567_89AB_CDEF, u32::MAX, u64::MAX),
        (5, u64::MAX, 7, 0xFEDC_BA98_7654_3210),
        (4096, 1 << 32, 1 << 31, 1 << 32),
        (100_003, 20, 11, 10_566),
    ] {
        let desc = &TensorDesc::new([n], DType::F32);
        let ptr = device.allocate(desc.bytes() + 64).unwrap();
        random::fill(&device, DeviceTensor { desc, ptr }, seed, domain, index).unwrap();
        let mut bytes = vec![0; desc.bytes()];
        device.download(ptr, &mut bytes).unwrap();
        let mut stream = Stream::new(seed, domain, index);
        for (i, word) in bytes.chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes(word.try_into().unwrap());
            assert_eq!(word, stream.word(), "word {i} of {n} for ({seed:#x}, {domain:#x}, {index:#x})");
        }
    }
}
