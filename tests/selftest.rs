//! The embedded goldens pass on the CPU, in both tiers, and on an emulated CUDA device.

#[cfg(feature = "emulator")]
mod common;

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::exec::Device;
use simsiam_engine::tensor::DType;

fn replay(device: &Device, dtypes: &[DType]) {
    let outcomes = simsiam_engine::selftest::run(None, device, dtypes, |_| ()).unwrap();
    assert_eq!(outcomes.len(), 6);
    for outcome in &outcomes {
        println!(
            "{}: {} ({:.3} of the tolerance: {})",
            outcome.name, outcome.compared, outcome.worst.ratio, outcome.worst.what
        );
        assert!(outcome.passed(), "{}: {}", outcome.name, outcome.worst.what);
        assert!(outcome.worst.ratio > 0.0, "{}: nothing was compared", outcome.name);
    }
}

#[test]
fn direct_tier_agrees_with_pytorch() {
    replay(&Device::Cpu(Tier::Direct), &[DType::F64, DType::F32]);
}

#[test]
fn reference_tier_agrees_with_pytorch() {
    replay(&Device::Cpu(Tier::Reference), &[DType::F64, DType::F32]);
}

/// The kernels, run on the CPU.
#[cfg(feature = "emulator")]
mod emulated {
    use std::path::Path;
    use std::process::{Command, Output};
    use std::sync::Arc;

    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};

    use crate::common::sanitizer::{Sanitizer, emulator_library, sanitized};
    use super::*;

    const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    fn device(threads: u32, seed: u64) -> Device {
        Device::Cuda(Arc::new(Emulator::new(Options { threads, seed }).unwrap()))
    }

    #[test]
    fn kernels_agree_with_pytorch() {
        replay(&device(2, 0), &DTYPES);
    }

    #[test]
    fn kernels_agree_with_pytorch_in_any_order_of_blocks_and_warps() {
        replay(&device(3, 0x5EED), &DTYPES);
    }

    /// Every row of the op table at its small shapes, in a process that a sanitizer watches.
    fn clean_under(watched: Sanitizer) {
        let library = emulator_library("planted", Some(watched), &["emulator/planted.cu"]);
        let goldens = tempfile::tempdir().unwrap();
        let ops = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ops.safetensors");
        std::fs::copy(ops, goldens.path().join("ops.safetensors")).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_simsiam-engine"));
        let run = |command: Option<Command>| -> Option<Output> {
            let mut command = command?;
            command.args(["selftest", "--device", "cuda-emulated", "--golden"]).arg(goldens.path());
            Some(command.output().unwrap())
        };
        let Some(output) = run(sanitized(watched, &library, program)) else {
            assert!(!std::env::var("SIMSIAM_REQUIRE_NVCC").is_ok_and(|v| v == "1"), "no {watched:?} sanitizer");
            println!("skipped: no {watched:?} sanitizer on this machine");
            return;
        };
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(output.status.success(), "{}\n{said}", output.status);
        assert!(said.contains("agree with PyTorch"), "{said}");
    }

    #[test]
    fn kernels_stay_within_their_buffers() {
        clean_under(Sanitizer::Address);
    }

    #[test]
    fn kernels_do_not_race() {
        clean_under(Sanitizer::Thread);
    }
}
