//! `bench ops`: every op with a kernel of our own at ResNet-50's shapes, against what the device can do at best.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::ceilings::Ceilings;
use super::op_cases::{self, Case};
use crate::backend::cpu::Tier;
use crate::cli::output;
use crate::error::{Error, Result};
use crate::exec::{self, DeviceChoice, Executor, Precision};
use crate::graph::{Phase, Role, ValueId, ledger};
use crate::rng::Stream;
use crate::tensor::{DType, TensorDesc};

/// Executors of small cases take turns until they hold so many bytes: no cache has the data of the last turn.
const ROTATED_BYTES: usize = 256 << 20;
/// Random values that inputs are filled with, again and again; a prime, so that no row is like the last.
const RANDOM_VALUES: usize = 1_000_003;

#[derive(Debug, clap::Args)]
pub struct OpsArgs {
    /// Where to compute. Emulated kernels are timed too, which says nothing about a GPU.
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceChoice,
    /// Element type of the activations [default: bf16, f32 on the CPU].
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Images of a batch, of which each has two views [default: 256, 2 without a GPU].
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Only ops whose line contains TEXT.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Measurements of each op, of which the median counts [default: 20, 3 without a GPU].
    #[arg(long, value_name = "N")]
    repeat: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What was measured of one phase of a case.
struct Line {
    case: String,
    phase: &'static str,
    shape: String,
    bytes: u64,
    flops: u64,
    median: Duration,
    fastest: Duration,
}

pub fn run(args: &OpsArgs) -> Result<()> {
    let settings = Settings::resolve(args)?;
    let ceilings = Ceilings::measure(&settings.device, settings.repeat)?;
    let mut lines = Vec::new();
    if !args.json {
        output::print(|out| heading(out, &settings, &ceilings))?;
    }
    for case in op_cases::all(settings.batch, settings.dtype)? {
        if args.only.as_ref().is_some_and(|text| !case.name.contains(text.as_str())) {
            continue;
        }
        for line in measure(case, &settings)? {
            if !args.json {
                output::print(|out| print_line(out, &line, &ceilings))?;
            }
            lines.push(line);
        }
    }
    if lines.is_empty() {
        return Err(Error::config("--only", format!("no op has {:?} in its line", args.only.as_deref().unwrap_or(""))));
    }
    match args.json {
        true => output::print(|out| writeln!(out, "{:#}", to_json(&settings, &ceilings, &lines))),
        false => Ok(()),
    }
}

/// The options, checked, with their defaults.
struct Settings {
    device: exec::Device,
    on_gpu: bool,
    dtype: DType,
    batch: usize,
    repeat: usize,
}

impl Settings {
    fn resolve(args: &OpsArgs) -> Result<Settings> {
        let device = args.device.open(Tier::Direct)?.device;
        let on_gpu = device.is_gpu();
        let precision = args.dtype.unwrap_or(Precision::default_on(&device));
        precision.check_trainable_on(&device)?;
        let batch = args.batch.unwrap_or(if on_gpu { 256 } else { 2 });
        let repeat = args.repeat.unwrap_or(if on_gpu { 20 } else { 3 });
        for (option, value, range) in [("--batch", batch, 2..=8192), ("--repeat", repeat, 1..=10_000)] {
            if !range.contains(&value) {
                let what = format!("expected {} to {}, got {value}", range.start(), range.end());
                return Err(Error::config(option, what));
            }
        }
        Ok(Settings { device, on_gpu, dtype: precision.dtype(), batch, repeat })
    }
}

/// Times the phases of a case, each on its own.
fn measure(case: Case, settings: &Settings) -> Result<Vec<Line>> {
    let Case { name, shape, make } = case;
    let mut executors = Vec::new();
    loop {
        let mut executor = settings.device.executor(make()?)?;
        fill_inputs(&mut *executor)?;
        executors.push(executor);
        if executors.len() * executors[0].plan().memory.total >= ROTATED_BYTES || executors.len() == 16 {
            break;
        }
    }
    let mut lines = Vec::new();
    for (phase, phase_name) in [(Phase::Forward, "forward"), (Phase::Backward, "backward"), (Phase::Update, "update")] {
        let (bytes, flops) = traffic(&*executors[0], phase);
        if bytes == 0 {
            continue;
        }
        let times = time(&settings.device, &mut executors, phase, settings.repeat)?;
        let (median, fastest) = (times[times.len() / 2], times[0]);
        lines.push(Line { case: name.clone(), phase: phase_name, shape: shape.clone(), bytes, flops, median, fastest });
    }
    Ok(lines)
}

/// Sorted times of one run of a phase, after a first run that does not count.
fn time(
    device: &exec::Device,
    executors: &mut [Box<dyn Executor>],
    phase: Phase,
    repeat: usize,
) -> Result<Vec<Duration>> {
    for executor in &mut *executors {
        executor.run_phase(phase)?;
    }
    let mut times = Vec::with_capacity(repeat);
    for turn in 0..repeat {
        let executor = &mut executors[turn % executors.len()];
        times.push(time_once(device, &mut || executor.run_phase(phase))?);
    }
    times.sort_unstable();
    Ok(times)
}

/// How long `work` takes on the device.
pub(in crate::cli) fn time_once(device: &exec::Device, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
    match device {
        exec::Device::Cuda(driver) => driver.time(work),
        exec::Device::Cpu(_) => {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed())
        }
    }
}

/// Bytes that the nodes of a phase have to move, and their floating-point operations.
fn traffic(executor: &dyn Executor, phase: Phase) -> (u64, u64) {
    let entries = ledger::entries(executor.tape(), executor.plan());
    let of_phase = executor.tape().nodes().iter().zip(entries).filter(|(node, _)| node.phase == phase);
    of_phase.fold((0, 0), |sum, (_, entry)| (sum.0 + entry.traffic.total(), sum.1 + entry.flops))
}

/// Random numbers in every leaf of the tape, around 0.1 so that no mean is zero.
pub(in crate::cli) fn fill_inputs(executor: &mut dyn Executor) -> Result<()> {
    let mut stream = Stream::new(4, 0, 0);
    let random: Vec<f64> = (0..RANDOM_VALUES).map(|_| stream.uniform(-0.9, 1.1)).collect();
    let roles = [Role::Input, Role::Parameter, Role::State, Role::Optimiser];
    let leaves = roles.into_iter().flat_map(|role| executor.tape().with_role(role));
    let leaves: Vec<(ValueId, TensorDesc)> = leaves.map(|(id, value)| (id, value.desc.clone())).collect();
    for (id, desc) in leaves {
        let bytes = desc.dtype.encode(&random);
        let repeated: Vec<u8> = bytes.iter().copied().cycle().take(desc.bytes()).collect();
        executor.write(id, &repeated)?;
    }
    Ok(())
}

fn heading(out: &mut dyn Write, settings: &Settings, ceilings: &Ceilings) -> io::Result<()> {
    writeln!(out, "device    {}", settings.device.name())?;
    writeln!(out, "ceilings  {ceilings}")?;
    if !settings.on_gpu {
        writeln!(out, "          without a GPU these figures only compare kernels with each other on this machine")?;
    }
    writeln!(out, "shapes    {} images, {} views, {}", settings.batch, 2 * settings.batch, settings.dtype)?;
    writeln!(
        out,
        "\n{:<24} {:<8} {:<20} {:>10} {:>9} {:>7} {:>8}",
        "op", "pass", "shape", "time", "GB/s", "of copy", "TFLOP/s"
    )
}

fn print_line(out: &mut dyn Write, line: &Line, ceilings: &Ceilings) -> io::Result<()> {
    let Line { case, phase, shape, .. } = line;
    let share = format!("{:.0} %", 100.0 * line.gigabytes_a_second() / ceilings.copy);
    let flops = match line.flops {
        0 => "-".into(),
        flops => format!("{:.2}", flops as f64 / line.median.as_secs_f64() / 1e12),
    };
    let (time, speed) = (format!("{:.1} us", line.median.as_secs_f64() * 1e6), line.gigabytes_a_second());
    writeln!(out, "{case:<24} {phase:<8} {shape:<20} {time:>10} {speed:>9.2} {share:>7} {flops:>8}")
}

impl Line {
    fn gigabytes_a_second(&self) -> f64 {
        self.bytes as f64 / self.median.as_secs_f64() / 1e9
    }
}

fn to_json(settings: &Settings, ceilings: &Ceilings, lines: &[Line]) -> Value {
    let line = |line: &Line| {
        json!({
            "op": line.case, "pass": line.phase, "shape": line.shape, "bytes": line.bytes, "flops": line.flops,
            "median_s": line.median.as_secs_f64(), "fastest_s": line.fastest.as_secs_f64(),
            "gb_per_s": line.gigabytes_a_second(), "of_copy": line.gigabytes_a_second() / ceilings.copy,
        })
    };
    json!({
        "device": settings.device.name(), "on_gpu": settings.on_gpu, "dtype": settings.dtype,
        "images": settings.batch, "repeat": settings.repeat, "ceilings": ceilings.json(),
        "ops": lines.iter().map(line).collect::<Vec<_>>(),
    })
}
