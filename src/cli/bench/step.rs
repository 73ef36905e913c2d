//! `bench step`: whole training steps, back to back, as training runs them.

use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::step_data::{DataArgs, OnData};
use crate::backend::cuda::DeviceMemory;
use crate::cli::machine;
use crate::cli::output::print;
use crate::cli::workload::{Steps, Workload, WorkloadArgs, check, merged, quartiles};
use crate::error::Result;
use crate::exec::Device;

/// Without a GPU, and on one: steps that do not count, steps of a round, rounds.
const WARMUP: [usize; 2] = [1, 10];
const STEPS: [usize; 2] = [1, 10];
const ROUNDS: [usize; 2] = [3, 10];
const MOST: usize = 100_000;

#[derive(Debug, clap::Args)]
pub struct StepArgs {
    #[command(flatten)]
    workload: WorkloadArgs,
    /// Steps before the first that counts [default: 10, 1 without a GPU].
    #[arg(long, value_name = "N")]
    warmup: Option<usize>,
    /// Steps of a round, which are started back to back and timed together [default: 10, 1 without a GPU].
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Rounds, of which the median counts [default: 10, 3 without a GPU].
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataArgs,
}

pub fn run(args: &StepArgs) -> Result<()> {
    for (option, value, min) in [("--warmup", args.warmup, 0), ("--steps", args.steps, 1), ("--rounds", args.rounds, 1)]
    {
        value.map_or(Ok(()), |value| check(option, value, min, MOST))?;
    }
    let measured = Measured::new(args)?;
    print(|out| if args.json { writeln!(out, "{:#}", measured.json()) } else { measured.print(out) })
}

/// What was measured.
struct Measured {
    workload: Workload,
    /// Where the images came from, if they are not random.
    data: Option<PathBuf>,
    /// Steps of a round.
    steps: usize,
    /// Seconds of a step in each round, sorted.
    rounds: Vec<f64>,
    loss: f64,
    planned: usize,
    memory: Option<DeviceMemory>,
    /// Share of the time that was spent waiting for images.
    data_wait: Option<f64>,
}

impl Measured {
    fn new(args: &StepArgs) -> Result<Measured> {
        let workload = args.workload.resolve()?;
        match &args.data.data {
            None => Measured::of(workload, args, |workload| workload.synthetic(), |_| None),
            Some(data) => {
                let start = |workload: &Workload| OnData::start(data, &args.data, workload);
                Measured::of(workload, args, start, |on_data| Some(on_data.wait_share()))
            }
        }
    }

    fn of<S: Steps>(
        workload: Workload,
        args: &StepArgs,
        prepare: impl FnOnce(&Workload) -> Result<S>,
        data_wait: impl FnOnce(&S) -> Option<f64>,
    ) -> Result<Measured> {
        let mut prepared = prepare(&workload)?;
        let on_gpu = usize::from(workload.device.is_gpu());
        let steps = args.steps.unwrap_or(STEPS[on_gpu]);
        prepared.run(args.warmup.unwrap_or(WARMUP[on_gpu]))?;
        let mut round = || Ok(prepared.run(steps)?.as_secs_f64() / steps as f64);
        let mut rounds = (0..args.rounds.unwrap_or(ROUNDS[on_gpu])).map(|_| round()).collect::<Result<Vec<f64>>>()?;
        rounds.sort_by(f64::total_cmp);
        let memory = match &workload.device {
            Device::Cuda(driver) => Some(driver.memory()?),
            Device::Cpu(_) => None,
        };
        let (loss, planned, data_wait) = (prepared.finite_loss()?, prepared.planned_bytes(), data_wait(&prepared));
        Ok(Measured { workload, data: args.data.data.clone(), steps, rounds, loss, planned, memory, data_wait })
    }

    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let Measured { workload, steps, rounds, .. } = self;
        let [lower, median, upper] = quartiles(rounds);
        let (fastest, images) = (rounds[0], workload.batch as f64 / median);
        writeln!(out, "{}", workload.title())?;
        writeln!(out, "device     {}", workload.device.name())?;
        writeln!(out, "ceilings   {}", workload.peaks)?;
        if let (Some(data), Some(wait)) = (&self.data, self.data_wait) {
            writeln!(out, "data       {}, {:.1} % of the time spent waiting for it", data.display(), 100.0 * wait)?;
        }
        writeln!(out, "speed      {images:.1} images/s ({:.1} views/s)", 2.0 * images)?;
        let ms = |seconds: f64| format!("{:.2}", seconds * 1e3);
        let spread = format!("quartiles {} to {}, fastest {}", ms(lower), ms(upper), ms(fastest));
        writeln!(out, "step       {} ms ({spread}; {} rounds of {steps})", ms(median), rounds.len())?;
        writeln!(out, "MFU        {}", workload.peaks.describe_mfu(workload.flops, median))?;
        let used = match self.memory {
            Some(memory) => format!(", {:.0} MB of the device in use", (memory.total - memory.free) as f64 / 1e6),
            None => String::new(),
        };
        writeln!(out, "memory     {:.0} MB planned{used}", self.planned as f64 / 1e6)?;
        writeln!(out, "loss       {:.4}", self.loss)
    }

    fn json(&self) -> Value {
        let Measured { workload, steps, rounds, .. } = self;
        let [lower, median, upper] = quartiles(rounds);
        let (mfu, mfu_of_given) = workload.peaks.mfu(workload.flops, median);
        let data = self.data.as_ref().map_or("synthetic".into(), |path| path.display().to_string());
        let measured = json!({
            "data": data, "data_wait_share": self.data_wait,
            "steps": steps, "rounds": rounds.len(), "round_step_s": rounds,
            "step_s": median, "step_lower_quartile_s": lower, "step_upper_quartile_s": upper, "step_min_s": rounds[0],
            "images_per_s": workload.batch as f64 / median, "views_per_s": 2.0 * workload.batch as f64 / median,
            "mfu": mfu, "mfu_of_given_peak": mfu_of_given,
            "planned_bytes": self.planned,
            "device_bytes_in_use": self.memory.map(|memory| memory.total - memory.free),
            "device_bytes": self.memory.map(|memory| memory.total),
            "peak_host_bytes": machine::peak_memory(),
            "loss": self.loss,
        });
        merged(workload.json(), measured)
    }
}
