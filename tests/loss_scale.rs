//! Dynamic loss scaling and the guard of the update: the scale follows PyTorch's rule to the bit, a step that overflowed or
//! whose loss is not finite changes no weight, and float16 trains.

use simsiam_engine::backend::cpu::Tier;
use simsiam_engine::exec::{Device, Executor};
use simsiam_engine::graph::{Role, Tape, ValueId};
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Block, ResNet, Stem};
use simsiam_engine::nn::simsiam::{SimSiam, StepShape, TrainGraph, ViewSource};
use simsiam_engine::ops::loss_scale::{LossScaleUpdate, LossScaling};
use simsiam_engine::ops::sgd::{Guard, SgdUpdate, StepParam};
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::rng::Stream;
use simsiam_engine::tensor::{DType, HostTensor, TensorDesc};
use simsiam_engine::train::state::write_initial;

/// The CPU, and emulated devices where there are any.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu(Tier::Direct)];
    devices.extend(emulated());
    devices
}

#[cfg(not(feature = "emulator"))]
fn emulated() -> Vec<Device> {
    vec![]
}

#[cfg(feature = "emulator")]
fn emulated() -> Vec<Device> {
    use simsiam_engine::backend::cuda::emulator::{Emulator, Options};
    let device = |(threads, seed)| Device::Cuda(std::sync::Arc::new(Emulator::new(Options { threads, seed }).unwrap()));
    [(1, 0), (3, 0x5EED)].map(device).to_vec()
}

fn normal(seed: u64, n: usize) -> Vec<f64> {
    let mut stream = Stream::new(seed, 5, 0);
    (0..n).map(|_| f64::from(stream.normal() as f32)).collect()
}

fn bits(tensor: &HostTensor) -> u32 {
    u32::from_le_bytes(tensor.bytes().try_into().unwrap())
}

/// Whether a step is bad; then the bits of 1 / scale in it, and of the scale and the number of good steps after it.
type Row = (bool, u32, u32, i64);

/// What `torch._amp_foreach_non_finite_check_and_unscale_` and `torch._amp_update_scale_` make of a sequence of steps, where
/// 1 / scale is `scale.double().reciprocal().float()` as in GradScaler. The first scale would grow beyond float32.
const PYTORCH: [(LossScaling, [Row; 10]); 3] = [
    (
        LossScaling { init: 2e38, growth: 2.0, backoff: 0.5, interval: 3 },
        [
            (false, 0x003671f7, 0x7f167699, 1),
            (false, 0x003671f7, 0x7f167699, 2),
            (false, 0x003671f7, 0x7f167699, 0),
            (true, 0x003671f7, 0x7e967699, 0),
            (false, 0x006ce3ef, 0x7e967699, 1),
            (false, 0x006ce3ef, 0x7e967699, 2),
            (false, 0x006ce3ef, 0x7f167699, 0),
            (true, 0x003671f7, 0x7e967699, 0),
            (true, 0x006ce3ef, 0x7e167699, 0),
            (false, 0x00d9c7dd, 0x7e167699, 1),
        ],
    ),
    (
        LossScaling { init: 5.7, growth: 3.0, backoff: 0.3, interval: 2 },
        [
            (false, 0x3e33a62d, 0x40b66666, 1),
            (false, 0x3e33a62d, 0x4188cccc, 0),
            (false, 0x3d6f883d, 0x4188cccc, 1),
            (true, 0x3d6f883d, 0x40a428f5, 0),
            (false, 0x3e479c33, 0x40a428f5, 1),
            (false, 0x3e479c33, 0x41763d70, 0),
            (false, 0x3d8512cc, 0x41763d70, 1),
            (true, 0x3d8512cc, 0x4093be76, 0),
            (true, 0x3e5dca00, 0x3fb14af4, 0),
            (false, 0x3f38d300, 0x3fb14af4, 1),
        ],
    ),
    (
        LossScaling { init: 65_536.0, growth: 2.0, backoff: 0.5, interval: 2000 },
        [
            (false, 0x37800000, 0x47800000, 1),
            (false, 0x37800000, 0x47800000, 2),
            (false, 0x37800000, 0x47800000, 3),
            (true, 0x37800000, 0x47000000, 0),
            (false, 0x38000000, 0x47000000, 1),
            (false, 0x38000000, 0x47000000, 2),
            (false, 0x38000000, 0x47000000, 3),
            (true, 0x38000000, 0x46800000, 0),
            (true, 0x38800000, 0x46000000, 0),
            (false, 0x39000000, 0x46000000, 1),
        ],
    ),
];

/// A tape that judges gradients of these sizes.
struct Judge {
    tape: Tape,
    loss: ValueId,
    gradients: Vec<ValueId>,
    scale: ValueId,
    good_steps: ValueId,
    unscale: ValueId,
}

fn judge(sizes: &[usize], scaling: LossScaling) -> Judge {
    let mut tape = Tape::new();
    let loss = tape.leaf("loss", TensorDesc::new([], DType::F32), Role::Input, false);
    let gradient = |&n: &usize| tape.leaf("d_w", TensorDesc::new([n], DType::F32), Role::Optimiser, false);
    let gradients: Vec<ValueId> = sizes.iter().map(gradient).collect();
    let scale = tape.leaf("scale", TensorDesc::new([], DType::F32), Role::State, false);
    let good_steps = tape.leaf("good steps", TensorDesc::new([], DType::I64), Role::State, false);
    let inputs = [&[loss], &gradients[..]].concat();
    let unscale = tape.update(LossScaleUpdate { scaling }, &inputs, &[scale, good_steps]).unwrap()[0];
    tape.keep(unscale);
    Judge { tape, loss, gradients, scale, good_steps, unscale }
}

#[test]
fn the_scale_follows_pytorch_wherever_the_overflow_is() {
    let few = vec![5, 4097, 1, 8192, 20_003];
    let many: Vec<usize> = (0..530).map(|i| i % 7).collect(); // two launches, and some without elements
    for device in devices() {
        for (sizes, (scaling, rows)) in [(&few, &PYTORCH[0]), (&few, &PYTORCH[1]), (&many, &PYTORCH[2])] {
            let Judge { tape, loss, gradients, scale, good_steps, unscale } = judge(sizes, *scaling);
            let mut exec = device.poisoned_executor(tape).unwrap();
            exec.write(scale, &DType::F32.encode(&[scaling.init])).unwrap();
            exec.write(good_steps, &0i64.to_le_bytes()).unwrap();
            // The last element of the last, of the first, and one in the middle of the largest.
            let largest = sizes.iter().enumerate().max_by_key(|(_, n)| **n).unwrap().0;
            let places = [(sizes.len() - 1, f64::NAN), (1, f64::INFINITY), (largest, f64::NEG_INFINITY)];
            let mut bad_steps = 0;
            for (step, &(bad, inverse, next, good)) in rows.iter().enumerate() {
                exec.write(loss, &DType::F32.encode(&[-0.5])).unwrap();
                let place = bad.then(|| places[bad_steps % places.len()]);
                for (i, (&gradient, &n)) in gradients.iter().zip(sizes).enumerate() {
                    let mut values = normal(i as u64, n);
                    match place {
                        Some((at, value)) if at == i && i == largest => values[n / 2] = value,
                        Some((at, value)) if at == i => *values.last_mut().unwrap() = value,
                        _ => {}
                    }
                    exec.write(gradient, &DType::F32.encode(&values)).unwrap();
                }
                bad_steps += usize::from(bad);
                exec.run_step().unwrap();
                let (factor, what) = (exec.read(unscale).unwrap(), format!("step {step} of {scaling:?}"));
                match bad {
                    true => assert!(factor.to_f64()[0].is_nan(), "{what}"),
                    false => assert_eq!(bits(&factor), inverse, "{what}"),
                }
                assert_eq!(bits(&exec.read(scale).unwrap()), next, "{what}");
                assert_eq!(exec.read(good_steps).unwrap().to_f64(), [good as f64], "{what}");
            }
            // Finite gradients, but not the loss.
            let before = exec.read(scale).unwrap().to_f64()[0] as f32;
            exec.write(loss, &DType::F32.encode(&[f64::INFINITY])).unwrap();
            exec.run_step().unwrap();
            assert!(exec.read(unscale).unwrap().to_f64()[0].is_nan());
            let shrunk = (f64::from(before) * scaling.backoff) as f32;
            assert_eq!(exec.read(scale).unwrap().to_f64(), [f64::from(shrunk)]);
            assert_eq!(exec.overrun().unwrap(), None);
        }
    }
}

/// One SGD step from the same numbers; returns weights and momenta.
fn guarded_step(device: &Device, guard: Guard, value: f64, factor: f64) -> Vec<Vec<u8>> {
    let sizes = [3, 4099, 17];
    let mut tape = Tape::new();
    let step_params = tape.leaf("step_params", StepParam::desc(), Role::Input, false);
    let scalar = tape.leaf("guard", TensorDesc::new([], DType::F32), Role::Input, false);
    let mut leaves = |name: &str, role| -> Vec<ValueId> {
        sizes.iter().map(|&n| tape.leaf(name, TensorDesc::new([n], DType::F32), role, false)).collect()
    };
    let gradients = leaves("d_w", Role::Optimiser);
    let (weights, momenta) = (leaves("w", Role::Parameter), leaves("v", Role::Optimiser));
    let lr = vec![StepParam::Lr, StepParam::PredictorLr, StepParam::Lr];
    let guards = if guard == Guard::None { vec![] } else { vec![scalar] };
    let (inputs, updates) = ([vec![step_params], gradients.clone(), guards].concat(), [weights, momenta].concat());
    tape.update(SgdUpdate { lr, guard }, &inputs, &updates).unwrap();
    let mut exec = device.poisoned_executor(tape).unwrap();
    exec.write(step_params, &DType::F64.encode(&[0.3, 0.07, 0.9, 0.01])).unwrap();
    exec.write(scalar, &DType::F32.encode(&[value])).unwrap();
    for (i, &gradient) in gradients.iter().enumerate() {
        let values: Vec<f64> = normal(40 + i as u64, sizes[i]).iter().map(|v| v * factor).collect();
        exec.write(gradient, &DType::F32.encode(&values)).unwrap();
    }
    for (i, &update) in updates.iter().enumerate() {
        let desc = exec.tape().desc(update).clone();
        exec.write(update, &desc.dtype.encode(&normal(i as u64, desc.shape.len()))).unwrap();
    }
    exec.run_step().unwrap();
    assert_eq!(exec.overrun().unwrap(), None);
    updates.iter().map(|&update| exec.read(update).unwrap().bytes().to_vec()).collect()
}

#[test]
fn the_guard_stops_the_whole_update_or_changes_no_bit() {
    for device in devices() {
        let plain = guarded_step(&device, Guard::None, 0.0, 1.0);
        assert_eq!(guarded_step(&device, Guard::Finite, -0.98, 1.0), plain, "a finite loss");
        assert_eq!(guarded_step(&device, Guard::Unscale, 2f64.powi(-11), 2048.0), plain, "a power of two is exact");
        assert!(guarded_step(&device, Guard::Unscale, 2f64.powi(-11), 1024.0) != plain, "gradients are multiplied");
        let untouched: Vec<Vec<u8>> =
            (0..6).map(|i| DType::F32.encode(&normal(i as u64, [3, 4099, 17][i % 3]))).collect();
        assert!(plain.iter().zip(&untouched).all(|(got, before)| got != before));
        for guard in [Guard::Finite, Guard::Unscale] {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                assert_eq!(guarded_step(&device, guard, value, 1.0), untouched, "{guard:?} {value}");
            }
        }
    }
}

#[test]
fn what_no_scale_fits_is_refused() {
    let (scalar, gradient, counter) =
        (TensorDesc::new([], DType::F32), TensorDesc::new([7], DType::F32), TensorDesc::new([], DType::I64));
    let infer = |tensors: &[&TensorDesc]| {
        let op = LossScaleUpdate { scaling: LossScaling::default() };
        simsiam_engine::graph::Op::infer(&op, tensors).map_err(|e| e.to_string())
    };
    assert_eq!(infer(&[&scalar, &gradient, &scalar, &counter]).unwrap(), std::slice::from_ref(&scalar));
    let narrow = TensorDesc::new([7], DType::F16);
    let message = infer(&[&scalar, &narrow, &scalar, &counter]).unwrap_err();
    assert!(message.contains("element type of a gradient: expected f32, got f16"), "{message}");
    let message = infer(&[&scalar, &gradient, &scalar, &scalar]).unwrap_err();
    assert!(message.contains("good steps: expected i64[], got f32[]"), "{message}");
    assert!(infer(&[&scalar, &counter]).is_err() && infer(&[&gradient, &scalar, &counter]).is_err());
}

fn model() -> SimSiam {
    let heads = Heads {
        dim: 24,
        projector_hidden: 16,
        predictor_hidden: 8,
        projector_layers: 2,
        projector_out_affine: false,
        projector_out_bias: OutBias::None,
        norm: HeadNorm::Default,
        predictor: PredictorKind::Mlp,
    };
    let backbone = ResNet { block: Block::Basic, depths: vec![1, 1], width: 6, stem: Stem::Cifar };
    SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true }
}

/// A run of a tiny network on the same seven images in every step.
struct Run {
    exec: Box<dyn Executor>,
    graph: Values,
}

/// What is looked at.
struct Values {
    loss: ValueId,
    loss_scale: Option<ValueId>,
    trained: Vec<(String, ValueId)>,
}

impl Run {
    fn new(device: &Device, dtype: DType, scaling: Option<LossScaling>) -> Run {
        let source = ViewSource::Given { padded: false };
        let graph = model().record_step(&StepShape { scaling, ..StepShape::new(7, 13, dtype, source) }).unwrap();
        let TrainGraph { tape, views, step_params, loss, params, momenta, loss_scale, .. } = graph;
        let mut exec = device.executor(tape).unwrap();
        write_initial(&mut *exec, &params, 4).unwrap();
        let desc = exec.tape().desc(views).clone();
        exec.write(views, &desc.dtype.encode(&normal(9, desc.shape.len()))).unwrap();
        exec.write(step_params, &DType::F64.encode(&[0.05, 0.05, 0.9, 1e-4])).unwrap();
        let weights = params.iter().filter(|p| p.trainable).map(|p| (p.name.clone(), p.value));
        let trained = weights.chain(momenta).collect();
        Run { exec, graph: Values { loss, loss_scale, trained } }
    }

    fn step(&mut self) -> f64 {
        self.exec.run_step().unwrap();
        self.exec.read(self.graph.loss).unwrap().to_f64()[0]
    }

    fn scale(&self) -> f64 {
        self.exec.read(self.graph.loss_scale.unwrap()).unwrap().to_f64()[0]
    }

    /// Weights and momenta.
    fn trained(&self) -> Vec<Vec<u8>> {
        self.graph.trained.iter().map(|(_, value)| self.exec.read(*value).unwrap().bytes().to_vec()).collect()
    }

    fn weight(&self, name: &str) -> ValueId {
        self.graph.trained.iter().find(|(n, _)| n == name).unwrap().1
    }
}

#[test]
fn powers_of_two_change_no_bit_in_float32() {
    let run = |scaling| {
        let mut run = Run::new(&Device::Cpu(Tier::Direct), DType::F32, scaling);
        let losses: Vec<f64> = (0..5).map(|_| run.step()).collect();
        (losses, run.trained())
    };
    let scaling = LossScaling { init: 1024.0, interval: 2, ..LossScaling::default() };
    assert!(run(Some(scaling)) == run(None));
}

#[test]
fn a_step_whose_loss_is_not_finite_changes_nothing() {
    for device in devices() {
        let dtypes: &[DType] = match device {
            Device::Cpu(_) => &[DType::F32],
            _ => &[DType::F32, DType::Bf16, DType::F16],
        };
        for &dtype in dtypes {
            let scaling = (dtype == DType::F16).then(LossScaling::default);
            let mut run = Run::new(&device, dtype, scaling);
            run.step();
            let before = run.trained();
            let bias = run.weight("predictor.3.bias");
            let good = run.exec.read(bias).unwrap();
            let mut values = good.to_f64();
            values[5] = f64::INFINITY;
            run.exec.write(bias, &DType::F32.encode(&values)).unwrap();
            let planted = run.trained();
            assert!(!run.step().is_finite(), "{dtype}");
            assert!(run.trained() == planted, "{dtype}: weights or momenta changed");
            run.exec.write(bias, good.bytes()).unwrap();
            assert!(run.trained() == before && run.step().is_finite() && run.trained() != before, "{dtype}");
        }
    }
}

#[test]
fn float16_trains_after_a_scale_that_overflows() {
    for device in emulated() {
        let scaling = LossScaling { init: 2f64.powi(26), interval: 6, ..LossScaling::default() };
        let mut run = Run::new(&device, DType::F16, Some(scaling));
        let start = run.trained();
        let (mut losses, mut scales, mut skipped) = (vec![], vec![], 0);
        for _ in 0..30 {
            losses.push(run.step());
            scales.push(run.scale());
            if run.trained() == start {
                skipped += 1;
                assert_eq!(run.scale(), scaling.init / 2f64.powi(skipped), "an overflow halves the scale");
            }
        }
        assert!((2..15).contains(&skipped), "{skipped} steps skipped: {scales:?}");
        assert!(scales.windows(2).any(|pair| pair[1] == 2.0 * pair[0]), "it grows again: {scales:?}");
        assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
        assert!(losses[29] < losses[0] - 0.3, "{losses:?}");
    }
}
