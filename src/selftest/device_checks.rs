//! What only a device can get wrong: a replayed step against a launched one, what steps take of its memory, and every node
//! against the CPU's.

use super::trajectory::{Start, Step, start};
use super::{EMBEDDED, Golden, Outcome, Variant, Worst, augmentation};
use crate::backend::cpu::Tier;
use crate::backend::cuda::Driver;
use crate::error::{Error, Result};
use crate::exec::compare::{Comparison, compare};
use crate::exec::{Device, Executor, Options};
use crate::graph::Role;
use crate::rng::Stream;
use crate::tensor::DType;

/// The steps in which an executor takes what it needs: one warms up, one is captured.
const SETTLED: usize = 2;
/// Steps that show something: one on each copy of the inputs, replayed, after those.
pub const FEWEST_REPLAYS: usize = SETTLED + 2;
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

/// Runs a step of every embedded trajectory on the CPU and on `device` in lockstep, in float32, and makes views on both.
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
    augmentation::check(device, |outcome| {
        report(&outcome);
        outcomes.push(outcome);
    })?;
    Ok(outcomes)
}

/// Trains `steps` steps twice in each of `dtypes`, replaying a graph and launching node by node, on random views: every bit
/// of the loss and of what is left at the end must be the same, and nothing may be allocated after the second step.
///
/// # Errors
/// [`Error::Config`] without a CUDA device or with fewer steps than [`FEWEST_REPLAYS`]; faults of the device.
pub fn replays(
    device: &Device,
    dtypes: &[DType],
    variant: &Variant,
    steps: usize,
    mut report: impl FnMut(&Outcome),
) -> Result<Vec<Outcome>> {
    let driver = expect_cuda("--replay", device)?;
    if steps < FEWEST_REPLAYS {
        return Err(Error::config("--replay", format!("expected at least {FEWEST_REPLAYS} steps, got {steps}")));
    }
    let mut outcomes = Vec::new();
    for golden in trajectories()?.iter().take(1) {
        for &dtype in dtypes {
            let run = |graph| {
                let options = Options { graph, ..Options::default() };
                let mut run = start(golden, device, Step { target: device.target(), dtype, variant }, options)?;
                let mut memory = Settling::new(driver);
                let seen = train_on_noise(&mut run, dtype, steps, &mut memory)?;
                Ok::<_, Error>((seen, memory.verdict()?))
            };
            let ((replayed, memory), (launched, memory_launched)) = (run(true)?, run(false)?);
            let name = |what: &str| format!("{what} {}", golden.name());
            let same = Outcome {
                name: name("replay"),
                compared: format!("{steps} steps in {dtype}, replayed against launched"),
                worst: same_bits(&replayed, &launched),
            };
            let memory = [("replayed", memory), ("launched", memory_launched)].map(|(how, worst)| Outcome {
                name: name("memory"),
                compared: format!("{steps} steps in {dtype}, {how}"),
                worst,
            });
            for outcome in [same].into_iter().chain(memory) {
                report(&outcome);
                outcomes.push(outcome);
            }
        }
    }
    Ok(outcomes)
}

fn expect_cuda<'a>(option: &str, device: &'a Device) -> Result<&'a dyn Driver> {
    match device {
        Device::Cuda(driver) => Ok(&**driver),
        Device::Cpu(_) => Err(Error::config(option, "expected --device cuda or cuda-emulated, got the CPU")),
    }
}

fn same_bits(a: &[(String, Vec<u8>)], b: &[(String, Vec<u8>)]) -> Worst {
    let mut differ = a.iter().zip(b).filter(|(a, b)| a.1 != b.1).map(|(a, _)| a.0.as_str());
    match differ.next() {
        None => Worst::exact(true, "every bit is the same".into()),
        Some(first) => {
            let what = format!("{} of {} tensors differ, the first is {first}", 1 + differ.count(), a.len());
            Worst::exact(false, what)
        }
    }
}

/// Watches what steps take of a device: nothing, once they have settled.
struct Settling<'a> {
    driver: &'a dyn Driver,
    steps: usize,
    /// Allocations made, and bytes of the device in use, when the steps had settled.
    settled: Option<(u64, usize)>,
}

impl<'a> Settling<'a> {
    fn new(driver: &'a dyn Driver) -> Settling<'a> {
        Settling { driver, steps: 0, settled: None }
    }

    fn taken(&self) -> Result<(u64, usize)> {
        let memory = self.driver.memory()?;
        Ok((self.driver.allocations(), memory.total - memory.free))
    }

    fn step_done(&mut self) -> Result<()> {
        self.steps += 1;
        if self.steps == SETTLED {
            self.settled = Some(self.taken()?);
        }
        Ok(())
    }

    /// Whether anything was taken since then. Bytes count as well: a library may take some without asking.
    fn verdict(&self) -> Result<Worst> {
        let (made, bytes) = self.taken()?;
        let Some((made_before, bytes_before)) = self.settled else {
            return Ok(Worst::exact(false, format!("only {} steps were run", self.steps)));
        };
        let after = format!("after step {SETTLED} ({} steps)", self.steps - SETTLED);
        Ok(match (made - made_before, bytes.saturating_sub(bytes_before)) {
            (0, 0) => Worst::exact(true, format!("no allocation {after}, {bytes} bytes in use")),
            (0, more) => {
                let whose = "though the engine allocated nothing: a library's, or another process's";
                Worst::exact(false, format!("{more} more bytes in use {after}, {whose}"))
            }
            (allocations, more) => {
                Worst::exact(false, format!("allocations {after}: {allocations}, with {more} more bytes in use"))
            }
        })
    }
}

/// Trains on views of noise, staged as `train` does; returns every loss, and in the end every parameter, state and momentum.
fn train_on_noise(
    run: &mut Start,
    dtype: DType,
    steps: usize,
    memory: &mut Settling<'_>,
) -> Result<Vec<(String, Vec<u8>)>> {
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
        memory.step_done()?;
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

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::backend::cuda::Emulator;
    use crate::backend::cuda::emulator;
    use crate::error::Result;

    type Late = fn(&Emulator) -> Result<()>;

    /// What is said when `late` is done in the fourth of five steps.
    fn verdict(late: impl Fn(&Emulator) -> Result<()>) -> Worst {
        let device = Emulator::new(emulator::Options { threads: 1, seed: 0 }).unwrap();
        let mut memory = Settling::new(&device);
        for step in 1..=5 {
            if step <= SETTLED {
                device.event().and_then(|_| device.allocate(1000)).unwrap();
            }
            if step == 4 {
                late(&device).unwrap();
            }
            memory.step_done().unwrap();
        }
        memory.verdict().unwrap()
    }

    #[test]
    fn steps_that_have_settled_take_nothing() {
        let Worst { ratio, what } = verdict(|_| Ok(()));
        assert_eq!((ratio, what.as_str()), (0.0, "no allocation after step 2 (3 steps), 2000 bytes in use"));
    }

    #[test]
    fn whatever_is_allocated_later_fails() {
        let late: [(&str, Late); 5] = [
            ("allocations after step 2 (3 steps): 1, with 24 more bytes in use", |device| {
                device.allocate(24).map(drop)
            }),
            ("allocations after step 2 (3 steps): 1, with 0 more", |device| {
                device.allocate(24).and_then(|memory| device.free(memory))
            }),
            ("allocations after step 2 (3 steps): 1, with 0 more", |device| device.pinned(24).map(drop)),
            ("allocations after step 2 (3 steps): 1, with 0 more", |device| device.event().map(drop)),
            ("allocations after step 2 (3 steps): 1, with 0 more", |device| {
                device.begin_capture().and_then(|()| device.end_capture()).map(drop)
            }),
        ];
        for (expected, late) in late {
            let Worst { ratio, what } = verdict(late);
            assert!(ratio > 1.0 && what.starts_with(expected), "{what}");
        }
    }

    #[test]
    fn too_few_steps_show_nothing() {
        let device = Emulator::new(emulator::Options { threads: 1, seed: 0 }).unwrap();
        assert!(Settling::new(&device).verdict().unwrap().ratio > 1.0);
        let run = replays(&Device::Cuda(std::sync::Arc::new(device)), &[DType::F32], &Variant::default(), 3, |_| ());
        assert_eq!(run.unwrap_err().to_string(), "--replay: expected at least 4 steps, got 3");
    }
}
