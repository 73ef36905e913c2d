//! The embedded goldens pass on the CPU, in both tiers, and on an emulated CUDA device.

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::exec::Device;
use simsiam_engine::nn::views::Views;
use simsiam_engine::selftest::Variant;
use simsiam_engine::tensor::DType;

fn replay(device: &Device, dtypes: &[DType], variant: &Variant) {
    let outcomes = simsiam_engine::selftest::run(None, device, dtypes, variant, |_| ()).unwrap();
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

fn sequential() -> Variant {
    Variant { views: Views::Sequential, ..Variant::default() }
}

fn gram() -> Variant {
    Variant { bn: "gram".parse().unwrap(), ..Variant::default() }
}

#[test]
fn gram_norm_agrees_with_pytorch() {
    replay(&Device::Cpu(Tier::Direct), &[DType::F64, DType::F32], &gram());
}

#[test]
fn direct_tier_agrees_with_pytorch() {
    replay(&Device::Cpu(Tier::Direct), &[DType::F64, DType::F32], &Variant::default());
}

#[test]
fn one_view_after_the_other_agrees_with_pytorch() {
    replay(&Device::Cpu(Tier::Direct), &[DType::F64, DType::F32], &sequential());
}

#[test]
fn reference_tier_agrees_with_pytorch() {
    replay(&Device::Cpu(Tier::Reference), &[DType::F64, DType::F32], &Variant::default());
}

/// The kernels, run on the CPU.
#[cfg(feature = "emulator")]
mod emulated {
    use std::sync::Arc;

    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};

    use super::*;

    const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    fn device(threads: u32, seed: u64) -> Device {
        Device::Cuda(Arc::new(Emulator::new(Options { threads, seed }).unwrap()))
    }

    #[test]
    fn float64_is_refused_before_a_kernel_is_looked_for() {
        let refused = simsiam_engine::selftest::run(None, &device(1, 0), &[DType::F64], &Variant::default(), |_| ());
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("CUDA devices do not compute in f64; hint: use f32"), "{message}");
    }

    #[test]
    fn kernels_agree_with_pytorch() {
        replay(&device(2, 0), &DTYPES, &Variant::default());
    }

    #[test]
    fn kernels_agree_with_pytorch_in_any_order_of_blocks_and_warps() {
        replay(&device(3, 0x5EED), &DTYPES, &Variant::default());
    }

    /// In float32. In 16 bits a weight's gradient is rounded for each view, which makes a trajectory another draw
    /// (`tests/golden/README.md`); `tests/views.rs` shows that a step is the same but for that.
    #[test]
    fn kernels_agree_with_pytorch_on_one_view_after_the_other() {
        replay(&device(2, 1), &[DType::F32], &sequential());
    }

    /// In float32, as above; `tests/gram_norm.rs` shows that in bfloat16 a step is nearer to float64 than the usual one.
    #[test]
    fn kernels_of_gram_norm_agree_with_pytorch() {
        replay(&device(2, 3), &[DType::F32], &gram());
    }
}
