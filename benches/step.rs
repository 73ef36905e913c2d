//! A whole SimSiam step on the CPU: forward, backward and update of both views, on random images.
//!
//! `cargo bench --bench step`; beside it `tools/pytorch_baseline.py --device cpu --arch resnet18 --stem cifar
//! --image-size 32 --batch 64 --projector-layers 2 --hidden 2048`.
#![allow(missing_docs)] // the harness makes undocumented functions

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::exec::{CpuExecutor, Executor};
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Arch, ResNet, Stem};
use simsiam_engine::nn::simsiam::SimSiam;
use simsiam_engine::ops::sgd::StepParam;
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::DType;
use simsiam_engine::train::state::write_initial;

fn model(arch: Arch, stem: Stem, projector_layers: usize) -> SimSiam {
    let heads = Heads {
        dim: 2048,
        projector_hidden: 2048,
        predictor_hidden: 512,
        projector_layers,
        projector_out_affine: false,
        projector_out_bias: OutBias::None,
        norm: HeadNorm::Default,
        predictor: PredictorKind::Mlp,
    };
    let backbone = ResNet::named(arch, stem).unwrap();
    SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true }
}

fn prepared(model: &SimSiam, batch: usize, image_size: usize) -> CpuExecutor {
    let graph = model.train_graph(batch, image_size, DType::F32, false).unwrap();
    let mut exec = CpuExecutor::new(graph.tape, Tier::Direct).unwrap();
    write_initial(&mut exec, &graph.params, 1).unwrap();
    let mut step_params = [0.0; StepParam::COUNT];
    step_params[StepParam::Lr as usize] = 0.01;
    step_params[StepParam::PredictorLr as usize] = 0.01;
    step_params[StepParam::Momentum as usize] = 0.9;
    exec.write(graph.step_params, bytemuck::cast_slice(&step_params)).unwrap();
    let mut stream = Stream::new(1, 0, 0);
    let views: Vec<f32> = (0..2 * batch * image_size * image_size * 3).map(|_| stream.normal() as f32).collect();
    exec.write(graph.views, bytemuck::cast_slice(&views)).unwrap();
    exec
}

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(10);
    for (name, arch, stem, layers, batch, size) in [
        ("resnet18-cifar-32px-batch64", Arch::Resnet18, Stem::Cifar, 2, 64, 32),
        ("resnet50-imagenet-224px-batch8", Arch::Resnet50, Stem::Imagenet, 3, 8, 224),
    ] {
        let mut exec = prepared(&model(arch, stem, layers), batch, size);
        group.throughput(Throughput::Elements(2 * batch as u64)); // views
        group.bench_function(name, |b| b.iter(|| exec.run_step().unwrap()));
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
