//! Executors: in lockstep the first node that goes wrong is found and no other is blamed; a device's steps read their own
//! inputs and take no memory but the arena.

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::exec::compare::compare;
use simsiam_engine::exec::{CpuExecutor, Executor};
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::{SimSiam, TrainGraph};
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::DType;
use simsiam_engine::train::state::write_initial;

fn model(depth: usize) -> SimSiam {
    let backbone = ResNet { block: Block::Basic, depths: vec![depth, 1], width: 6, stem: Stem::Cifar };
    let heads = Heads {
        dim: 20,
        projector_hidden: 18,
        predictor_hidden: 7,
        projector_layers: 2,
        projector_out_affine: false,
        projector_out_bias: OutBias::None,
        norm: HeadNorm::Default,
        predictor: PredictorKind::Mlp,
    };
    SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true }
}

fn prepared(depth: usize, tier: Tier) -> (CpuExecutor, TrainGraph) {
    let graph = model(depth).train_graph(5, 11, DType::F32, false).unwrap();
    let copy = model(depth).train_graph(5, 11, DType::F32, false).unwrap();
    let mut exec = CpuExecutor::new(copy.tape, tier).unwrap();
    write_initial(&mut exec, &graph.params, 2).unwrap();
    let mut noise = Stream::new(5, 0, 0);
    let len = graph.tape.desc(graph.views).shape.len();
    let views: Vec<f32> = (0..len).map(|_| noise.normal() as f32).collect();
    exec.write(graph.views, bytemuck::cast_slice(&views)).unwrap();
    exec.write(graph.step_params, &DType::F64.encode(&[0.1, 0.05, 0.9, 1e-4])).unwrap();
    (exec, graph)
}

#[test]
fn both_implementations_of_the_cpu_agree_node_by_node() {
    let ((mut a, graph), (mut b, _)) = (prepared(2, Tier::Reference), prepared(2, Tier::Direct));
    let found = compare(&mut a, &mut b, 2e-5).unwrap();
    assert_eq!((found.nodes, found.divergence), (graph.tape.nodes().len(), None));
    assert!(found.worst.0 > 0.0, "the two add in another order");
}

#[test]
fn the_first_node_that_diverges_is_named() {
    for wrong in ["encoder.layer1.1.conv2", "encoder.layer2.0.bn1", "predictor.3"] {
        let ((mut a, graph), (mut b, _)) = (prepared(2, Tier::Direct), prepared(2, Tier::Direct));
        let weight = graph.params.iter().find(|p| p.name == format!("{wrong}.weight")).unwrap();
        let mut values = b.read(weight.value).unwrap().to_f64();
        values[1] += 0.01;
        b.write(weight.value, &DType::F32.encode(&values)).unwrap();
        let divergence = compare(&mut a, &mut b, 2e-5).unwrap().divergence.unwrap();
        assert!(divergence.node.starts_with(&format!("{wrong} (")), "{divergence}");
        assert!(divergence.error > 2e-5 && divergence.to_string().contains("is the first node that diverges"));
    }
}

#[test]
fn different_tapes_are_refused() {
    let ((mut a, _), (mut b, _)) = (prepared(1, Tier::Direct), prepared(2, Tier::Direct));
    let message = compare(&mut a, &mut b, 1.0).unwrap_err().to_string();
    assert!(message.contains("different tapes"), "{message}");
}

#[cfg(feature = "emulator")]
#[test]
fn nothing_is_allocated_after_the_second_step() {
    use std::sync::Arc;

    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
    use simsiam_engine::backend::cuda::{DeviceMemory, Driver};
    use simsiam_engine::exec::Device;

    let device = Arc::new(Emulator::new(Options { threads: 2, seed: 1 }).unwrap().with_memory(1 << 30));
    let driver: Arc<dyn Driver> = device;
    let graph = model(1).train_graph(5, 11, DType::Bf16, false).unwrap();
    let views = vec![0; graph.tape.desc(graph.views).bytes()];
    let before = driver.memory().unwrap();
    let mut exec = Device::Cuda(driver.clone()).executor(graph.tape).unwrap();
    exec.watch(&[graph.loss]).unwrap();
    let after: Vec<(DeviceMemory, u64)> = (0..6)
        .map(|_| {
            exec.stage(graph.views, &views).unwrap();
            exec.run_step().unwrap();
            exec.collect(1).unwrap();
            (driver.memory().unwrap(), driver.allocations())
        })
        .collect();
    assert_eq!(before.free - after[0].0.free, exec.plan().memory.total, "the arena is all that is taken of the device");
    // Each copy of the inputs has page-locked memory for what comes and goes; both graphs are made in the second step.
    assert_eq!(after[1].1 - after[0].1, 4);
    assert!(after[1..].iter().all(|taken| *taken == after[1]), "{after:?}");
    drop(exec);
    assert_eq!(driver.memory().unwrap(), before);
}

#[cfg(feature = "emulator")]
#[test]
fn steps_that_nobody_collects_still_read_their_own_inputs() {
    use std::sync::Arc;

    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
    use simsiam_engine::exec::{self, Device};

    /// The bytes of a weight after nine steps on different views, staged without waiting or written and waited for.
    fn train(seed: u64, staged: bool) -> Vec<u8> {
        let device = Device::Cuda(Arc::new(Emulator::new(Options { threads: 2, seed }).unwrap()));
        let graph = model(1).train_graph(5, 11, DType::F32, false).unwrap();
        let len = graph.tape.desc(graph.views).shape.len();
        let options = exec::Options { graph: staged, ..exec::Options::default() };
        let mut exec = device.executor_with(graph.tape, options).unwrap();
        write_initial(&mut *exec, &graph.params, 2).unwrap();
        exec.write(graph.step_params, &DType::F64.encode(&[0.1, 0.05, 0.9, 1e-4])).unwrap();
        let mut noise = Stream::new(5, 0, 0);
        for _ in 0..9 {
            let views: Vec<f32> = (0..len).map(|_| noise.normal() as f32).collect();
            match staged {
                true => exec.stage(graph.views, bytemuck::cast_slice(&views)).unwrap(),
                false => exec.write(graph.views, bytemuck::cast_slice(&views)).unwrap(),
            }
            exec.run_step().unwrap();
            if !staged {
                exec.finish().unwrap();
            }
        }
        exec.read(graph.params[0].value).unwrap().bytes().to_vec()
    }

    let expected = train(0, false);
    for seed in 0..4 {
        assert!(train(seed, true) == expected, "seed {seed}");
    }
}
