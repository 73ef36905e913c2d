//! Small networks for tests of whole steps, trained a few steps on views that differ.
#![allow(dead_code)] // each test binary uses its own part

use simsiam_engine::exec::Device;
use simsiam_engine::graph::{Tape, ValueId};
use simsiam_engine::nn::epilogues::Epilogues;
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::{SimSiam, StepShape, TrainGraph, ViewSource};
use simsiam_engine::nn::views::Views;
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::DType;
use simsiam_engine::train::state::write_initial;

/// Two stages, so that there are shortcuts of both kinds.
pub fn model(block: Block, stem: Stem) -> SimSiam {
    let heads = Heads {
        dim: 12,
        projector_hidden: 14,
        predictor_hidden: 6,
        projector_layers: 2,
        projector_out_affine: false,
        projector_out_bias: OutBias::None,
        norm: HeadNorm::Default,
        predictor: PredictorKind::Mlp,
    };
    let backbone = ResNet { block, depths: vec![2, 1], width: 4, stem };
    SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true }
}

/// A step of a model.
#[derive(Debug, Clone)]
pub struct Setting {
    pub model: SimSiam,
    pub batch: usize,
    pub size: usize,
    pub dtype: DType,
    pub padded: bool,
    pub epilogues: Epilogues,
}

impl Setting {
    pub fn new(model: SimSiam, [batch, size]: [usize; 2], dtype: DType) -> Setting {
        Setting { model, batch, size, dtype, padded: false, epilogues: Epilogues::default() }
    }

    pub fn record(&self, views: Views) -> TrainGraph {
        let source = ViewSource::Given { padded: self.padded };
        let plain = StepShape::new(self.batch, self.size, self.dtype, source);
        let epilogues = self.epilogues.clone();
        self.model.record_step(&StepShape { keep_gradients: true, epilogues, views, ..plain }).unwrap()
    }

    /// Trains `steps` steps of a recorded tape after `rewrite`.
    pub fn train(&self, device: &Device, views: Views, steps: usize, rewrite: impl FnOnce(Tape) -> Tape) -> Trained {
        let TrainGraph { tape, views, step_params, loss, z_std, z, params, momenta, gradients, .. } =
            self.record(views);
        let mut exec = device.poisoned_executor(rewrite(tape)).unwrap();
        write_initial(&mut *exec, &params, 5).unwrap();
        for (_, momentum) in &momenta {
            let bytes = exec.tape().desc(*momentum).bytes();
            exec.write(*momentum, &vec![0; bytes]).unwrap();
        }
        // The last gamma of a block starts at 0, which would hide everything before it.
        for param in params.iter().filter(|param| param.name.contains(".bn") && param.name.ends_with("weight")) {
            exec.write(param.value, &param.desc.dtype.encode(&vec![0.8; param.desc.shape.len()])).unwrap();
        }
        exec.write(step_params, &DType::F64.encode(&[0.05, 0.04, 0.9, 1e-3])).unwrap();
        let desc = exec.tape().desc(views).clone();
        let mut trained = Trained::default();
        for step in 0..steps {
            exec.write(views, &desc.dtype.encode(&views_of(step, desc.shape.len()))).unwrap();
            exec.run_step().unwrap();
            let mut note = |name: &str, value: ValueId| {
                trained.0.push((format!("step {step}: {name}"), exec.read(value).unwrap().to_f64()));
            };
            [("loss", loss), ("z std", z_std), ("z", z)].into_iter().for_each(|(name, value)| note(name, value));
            gradients.iter().for_each(|(name, value)| note(&format!("gradient of {name}"), *value));
        }
        assert_eq!(exec.overrun().unwrap(), None);
        let params = params.iter().map(|p| (p.name.clone(), p.value));
        let momenta = momenta.iter().map(|(name, value)| (format!("momentum of {name}"), *value));
        trained.0.extend(params.chain(momenta).map(|(name, value)| (name, exec.read(value).unwrap().to_f64())));
        trained
    }
}

/// Normal numbers; each view has a mean and a spread of its own, so that none can stand for the other.
fn views_of(step: usize, len: usize) -> Vec<f64> {
    let mut noise = Stream::new(17, 4, step as u64);
    let of = |i: usize| if i < len / 2 { (0.9, 0.6) } else { (-0.4, 1.1) };
    (0..len).map(|i| of(i).0 + of(i).1 * noise.normal()).collect()
}

/// What was seen of a training, by name.
#[derive(Debug, Default, PartialEq)]
pub struct Trained(pub Vec<(String, Vec<f64>)>);

impl Trained {
    pub fn get(&self, name: &str) -> &[f64] {
        &self.0.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("nothing called {name}")).1
    }

    /// Asserts that everything is as `expected`, but for an error relative to its size.
    pub fn agrees(&self, expected: &Trained, tolerance: f64, about: &str) {
        assert_eq!(self.0.len(), expected.0.len(), "{about}");
        // What is 0 but for rounding, such as gradients in front of a batch norm, is small beside all others.
        for ((name, got), (known, expected)) in self.0.iter().zip(&expected.0) {
            assert_eq!((name, got.len()), (known, expected.len()), "{about}");
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let error = norm(&mut got.iter().zip(expected).map(|(a, b)| a - b));
            let scale = norm(&mut expected.iter().copied()).max(1e-3);
            assert!(error <= tolerance * scale, "{about}: {name} is off by {:.1e}", error / scale);
        }
    }

    /// The names of what has other bits than in `other`.
    pub fn differences(&self, other: &Trained) -> Vec<&str> {
        assert_eq!(self.0.len(), other.0.len());
        let bits = |values: &[f64]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let pairs = self.0.iter().zip(&other.0);
        pairs.filter(|(a, b)| bits(&a.1) != bits(&b.1)).map(|(a, _)| a.0.as_str()).collect()
    }
}

/// The CPU, and emulated devices whose blocks run in an order drawn from a seed.
#[cfg(feature = "emulator")]
pub fn emulated(seed: u64) -> Device {
    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
    Device::Cuda(std::sync::Arc::new(Emulator::new(Options { threads: 2, seed }).unwrap()))
}
