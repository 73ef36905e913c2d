//! What only a device can get wrong: a replayed step against a launched one, and every node against the CPU's.

use super::trajectory::{Start, Step, start};
use super::{EMBEDDED, Golden, Outcome, Variant, Worst};
use crate::backend::cpu::Tier;
use crate::error::{Error, Result};
use crate::exec::compare::{Comparison, compare};
use crate::exec::{Device, Executor, Options};
use crate::graph::Role;
use crate::rng::Stream;
use crate::tensor::DType;

/// What a float32 kernel may differ from the CPU's, relative to the norm of its result: sums have another order.
const TOLERANCE: f64 = 2e-5;

/// The golden files of whole steps that travel in the binary.
fn trajectories() -> Result<Vec<Golden>> {
    let mut found = Vec::new();
    for (name, bytes) in EMBEDDED {
        let golden = Golden::embedded(name, bytes)?;
        if golden.meta("kind")? == "simsiam-trajectory" {
            found.push(golden);
        }
    }
    Ok(found)
}

/// Runs a step of every embedded trajectory on the CPU and on `device` in lockstep, in float32.
///
/// # Errors
/// [`Error::Config`] without a CUDA device; faults of the device.
pub fn lockstep(device: &Device, variant: &Variant, mut report: impl FnMut(&Outcome)) -> Result<Vec<Outcome>> {
    expect_cuda("--lockstep", device)?;
    let step = Step { target: device.target(), dtype: DType::F32, variant };
    let mut outcomes = Vec::new();
    for golden in trajectories()? {
        // The CPU runs the device's own tape, padded stem and all.
        let begin = |on: &Device| start(&golden, on, step, Options::default());
        let (mut cpu, mut other) = (begin(&Device::Cpu(Tier::Direct))?, begin(device)?);
        for run in [&mut cpu, &mut other] {
            run.write_views(&golden, 0)?;
        }
        let Comparison { nodes, worst, divergence } = compare(&mut *cpu.exec, &mut *other.exec, TOLERANCE)?;
        let mut found = Worst::default();
        found.observe(|| worst.1, worst.0, TOLERANCE);
        if let Some(divergence) = divergence {
            found.observe(|| divergence.to_string(), divergence.error, TOLERANCE);
        }
        let compared = format!("{nodes} nodes on {} against the CPU", device.name());
        let outcome = Outcome { name: format!("lockstep {}", golden.name()), compared, worst: found };
        report(&outcome);
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// Trains `steps` steps twice in each of `dtypes`, replaying a graph and launching node by node, on random views: every bit
/// of the loss and of what is left at the end must be the same.
///
/// # Errors
/// [`Error::Config`] without a CUDA device; faults of the device.
pub fn replays(
    device: &Device,
    dtypes: &[DType],
    variant: &Variant,
    steps: usize,
    mut report: impl FnMut(&Outcome),
) -> Result<Vec<Outcome>> {
    expect_cuda("--replay", device)?;
    let mut outcomes = Vec::new();
    for golden in trajectories()?.iter().take(1) {
        for &dtype in dtypes {
            let run = |graph| {
                let options = Options { graph, ..Options::default() };
                let mut run = start(golden, device, Step { target: device.target(), dtype, variant }, options)?;
                train_on_noise(&mut run, dtype, steps)
            };
            let (replayed, launched) = (run(true)?, run(false)?);
            let differ = replayed.iter().zip(&launched).filter(|(a, b)| a.1 != b.1).map(|(a, _)| a.0.as_str());
            let mut worst = Worst::default();
            match differ.clone().next() {
                None => worst.observe(|| "every bit is the same".into(), 0.0, 0.0),
                Some(first) => {
                    let what = format!("{} of {} tensors differ, the first is {first}", differ.count(), replayed.len());
                    worst.observe(|| what, f64::INFINITY, 0.0);
                }
            }
            let compared = format!("{steps} steps in {dtype}, replayed against launched");
            let outcome = Outcome { name: format!("replay {}", golden.name()), compared, worst };
            report(&outcome);
            outcomes.push(outcome);
        }
    }
    Ok(outcomes)
}

fn expect_cuda(option: &str, device: &Device) -> Result<()> {
    match device {
        Device::Cuda(_) => Ok(()),
        Device::Cpu(_) => Err(Error::config(option, "expected --device cuda or cuda-emulated, got the CPU")),
    }
}

/// Trains on views of noise, staged as `train` does; returns every loss, and in the end every parameter, state and momentum.
fn train_on_noise(run: &mut Start, dtype: DType, steps: usize) -> Result<Vec<(String, Vec<u8>)>> {
    let mut seen = Vec::new();
    let mut noise = Stream::new(7, 0, 0);
    let exec = &mut run.exec;
    exec.watch(&[run.loss])?;
    let len = exec.tape().desc(run.views).shape.len();
    let mut collect = |exec: &mut dyn Executor, in_flight| {
        while let Some(watched) = exec.collect(in_flight)? {
            seen.push((format!("the loss of step {}", seen.len()), watched[0].bytes().to_vec()));
        }
        Ok::<(), Error>(())
    };
    for _ in 0..steps {
        let views: Vec<f32> = (0..len).map(|_| noise.normal() as f32).collect();
        exec.stage(run.views, &dtype.encode_f32(&views))?;
        exec.run_step()?;
        collect(&mut **exec, 1)?;
    }
    collect(&mut **exec, 0)?;
    for role in [Role::Parameter, Role::State, Role::Optimiser] {
        let values: Vec<_> = exec.tape().with_role(role).map(|(id, value)| (id, value.name.clone())).collect();
        for (id, name) in values {
            seen.push((name, exec.read(id)?.bytes().to_vec()));
        }
    }
    Ok(seen)
}
