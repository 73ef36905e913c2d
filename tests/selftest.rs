//! The embedded goldens pass on the CPU, in both tiers.

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::exec::Device;
use simsiam_engine::tensor::DType;

fn replay(tier: Tier) {
    let outcomes = simsiam_engine::selftest::run(None, &Device::Cpu(tier), &[DType::F64, DType::F32], |_| ()).unwrap();
    assert_eq!(outcomes.len(), 6);
    for outcome in &outcomes {
        println!(
            "{}: {} ({:.3} of the tolerance: {})",
            outcome.name, outcome.compared, outcome.worst.ratio, outcome.worst.what
        );
        assert!(outcome.passed(), "{}: {}", outcome.name, outcome.worst.what);
    }
}

#[test]
fn direct_tier_agrees_with_pytorch() {
    replay(Tier::Direct);
}

#[test]
fn reference_tier_agrees_with_pytorch() {
    replay(Tier::Reference);
}
