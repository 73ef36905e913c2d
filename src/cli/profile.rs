//! `profile`: where the time of a training step goes, node by node, and how much of it the device could not do without.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::costs::{by_kind, percent, time};
use super::output::{columns, print};
use super::peaks::{Peaks, teraflops};
use super::workload::{Steps, Synthetic, Workload, WorkloadArgs, check, merged, quartiles};
use crate::atomic::write_atomic;
use crate::error::Result;
use crate::exec::Executor;
use crate::graph::Phase;
use crate::graph::ledger::{self, Entry};
use crate::report::chart::bars::{Bar, BarChart, BarPanel, write_bars};

/// Rounds without a GPU, and on one.
const ROUNDS: [usize; 2] = [3, 20];
/// Steps that do not count: without a GPU, and on one.
const WARMUP: [usize; 2] = [1, 5];
const MAX_ROUNDS: usize = 10_000;
/// Bars of a chart; kinds of ops that are not among the slowest are left out of it.
const BARS: usize = 16;

#[derive(Debug, clap::Args)]
pub struct ProfileArgs {
    #[command(flatten)]
    workload: WorkloadArgs,
    /// Steps that are timed, of which the median of each node counts [default: 20, 3 without a GPU].
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Steps before the first that counts [default: 5, 1 without a GPU].
    #[arg(long, value_name = "N")]
    warmup: Option<usize>,
    /// How many of the slowest nodes to list; the JSON has them all.
    #[arg(long, value_name = "N", default_value_t = 25)]
    top: usize,
    /// Write everything as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw kinds of ops and slowest nodes as bars.
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
}

pub fn run(args: &ProfileArgs) -> Result<()> {
    for (option, value, min) in [("--steps", args.steps, 1), ("--warmup", args.warmup, 0)] {
        value.map_or(Ok(()), |value| check(option, value, min, MAX_ROUNDS))?;
    }
    let profile = Profile::measure(args)?;
    print(|out| profile.print(out, args.top))?;
    if let Some(path) = &args.json {
        write_atomic(path, |out| out.write_all(format!("{:#}\n", profile.json()).as_bytes()))?;
        eprintln!("wrote {}", path.display());
    }
    if let Some(path) = &args.png {
        write_bars(path, &profile.chart(args.top.min(BARS)))?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

/// What was measured of a node, or of several.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    nodes: usize,
    /// Seconds.
    time: f64,
    bytes: u64,
    flops: u64,
    /// Seconds that the device needs at least: by its roofline, node by node.
    floor: f64,
}

impl Cost {
    fn add(self, other: Cost) -> Cost {
        Cost {
            nodes: self.nodes + other.nodes,
            time: self.time + other.time,
            bytes: self.bytes + other.bytes,
            flops: self.flops + other.flops,
            floor: self.floor + other.floor,
        }
    }

    fn sum<'a>(costs: impl Iterator<Item = &'a Cost>) -> Cost {
        costs.fold(Cost::default(), |sum, cost| sum.add(*cost))
    }

    fn gigabytes_a_second(&self) -> f64 {
        self.bytes as f64 / self.time / 1e9
    }

    fn teraflops(&self) -> f64 {
        self.flops as f64 / self.time / 1e12
    }

    fn of_roofline(&self) -> f64 {
        self.floor / self.time
    }

    fn json(&self, total: f64) -> Value {
        json!({
            "nodes": self.nodes, "time_s": self.time, "share": self.time / total, "bytes": self.bytes,
            "flops": self.flops, "gb_per_s": self.gigabytes_a_second(), "tflop_per_s": self.teraflops(),
            "floor_s": self.floor, "of_roofline": self.of_roofline(),
        })
    }
}

/// One node of the tape.
struct NodeCost {
    index: usize,
    name: String,
    op: &'static str,
    phase: Phase,
    cost: Cost,
    fastest: f64,
}

impl NodeCost {
    /// Name and op; what the backward pass appended has the op in its name.
    fn label(&self) -> String {
        match self.name.ends_with(self.op) {
            true => self.name.clone(),
            false => format!("{} {}", self.name, self.op),
        }
    }
}

/// One step node by node, and right after it one as training runs it: what disturbs the machine meanwhile disturbs both.
struct Round {
    nodes: Vec<Duration>,
    /// Until the host had them all; a GPU was at work on another step before.
    wall: Duration,
    step: Duration,
}

impl Round {
    fn nodes_s(&self) -> f64 {
        self.nodes.iter().sum::<Duration>().as_secs_f64()
    }
}

/// Everything there is to tell.
struct Profile {
    workload: Workload,
    rounds: Vec<Round>,
    /// Nodes that run, in the tape's order.
    nodes: Vec<NodeCost>,
    total: Cost,
    /// Seconds of a whole step, run as training runs it: quartiles.
    step: [f64; 3],
    loss: f64,
    planned: usize,
}

impl Profile {
    fn measure(args: &ProfileArgs) -> Result<Profile> {
        let workload = args.workload.resolve()?;
        let mut steps = workload.synthetic()?;
        let on_gpu = usize::from(workload.device.is_gpu());
        let (rounds, warmup) = (args.steps.unwrap_or(ROUNDS[on_gpu]), args.warmup.unwrap_or(WARMUP[on_gpu]));
        steps.run(warmup)?;
        let on_gpu = workload.device.is_gpu();
        let rounds = (0..rounds).map(|_| time_round(&mut steps, on_gpu)).collect::<Result<Vec<Round>>>()?;
        let step = quartiles_of(rounds.iter().map(|round| round.step));
        let (loss, planned) = (steps.finite_loss()?, steps.planned_bytes());
        let nodes = node_costs(&*steps.executor, &workload.peaks, &rounds);
        let total = Cost::sum(nodes.iter().map(|node| &node.cost));
        Ok(Profile { workload, rounds, nodes, total, step, loss, planned })
    }

    /// Sums over the nodes of each kind of op and phase, the slowest first.
    fn ops(&self) -> Vec<(&'static str, Phase, Cost)> {
        let mut ops = by_kind(self.nodes.iter().map(|node| (node.op, node.phase, node.cost)), Cost::add);
        ops.sort_by(|a, b| b.2.time.total_cmp(&a.2.time));
        ops
    }

    fn phase(&self, phase: Phase) -> Cost {
        Cost::sum(self.nodes.iter().filter(|node| node.phase == phase).map(|node| &node.cost))
    }

    /// The slowest nodes.
    fn slowest(&self, top: usize) -> Vec<&NodeCost> {
        let mut nodes: Vec<&NodeCost> = self.nodes.iter().collect();
        nodes.sort_by(|a, b| b.cost.time.total_cmp(&a.cost.time));
        nodes.truncate(top);
        nodes
    }

    fn images_a_second(&self) -> f64 {
        self.workload.batch as f64 / self.step[1]
    }

    fn mfu_text(&self) -> String {
        self.workload.peaks.describe_mfu(self.workload.flops, self.step[1])
    }

    fn print(&self, out: &mut dyn Write, top: usize) -> io::Result<()> {
        let (workload, total) = (&self.workload, self.total);
        writeln!(out, "{}", workload.title())?;
        writeln!(out, "device     {}", workload.device.name())?;
        writeln!(out, "ceilings   {}", workload.peaks)?;
        let [_, step, _] = self.step;
        writeln!(out, "step       {} ({:.1} images/s), MFU {}", time(step), self.images_a_second(), self.mfu_text())?;
        let note = "of the step; each alone, with what it takes to start and to time it";
        writeln!(out, "nodes      {}, {} {note}", time(total.time), percent(total.time / step))?;
        let note = "of the step: no node can be faster by the ceilings";
        writeln!(out, "roofline   {}, {} {note}", time(total.floor), percent(total.floor / step))?;

        self.table(
            out,
            ["phase", "", ""],
            Phase::ALL.map(|p| ([p.name().into(), String::new(), String::new()], self.phase(p))),
        )?;
        let row = |(op, phase, cost): (&str, Phase, Cost)| {
            ([op.into(), phase.name().into(), format!("{}", cost.nodes)], cost)
        };
        self.table(out, ["kind of op", "phase", "nodes"], self.ops().into_iter().map(row))?;
        let row = |node: &NodeCost| ([node.name.clone(), node.op.into(), node.phase.name().into()], node.cost);
        let heading = format!("slowest {} of {} nodes", top.min(self.nodes.len()), self.nodes.len());
        self.table(out, [heading.as_str(), "op", "phase"], self.slowest(top).into_iter().map(row))
    }

    fn table(
        &self,
        out: &mut dyn Write,
        heads: [&str; 3],
        rows: impl IntoIterator<Item = ([String; 3], Cost)>,
    ) -> io::Result<()> {
        let [a, b, c] = heads;
        let heads = [a, b, c, "time", "share", "GB/s", "TFLOP/s", "of roofline"].map(String::from);
        let row = |([a, b, c], cost): ([String; 3], Cost)| {
            let [time, share, bytes, flops, roofline] = self.figures(&cost);
            [a, b, c, time, share, bytes, flops, roofline]
        };
        writeln!(out)?;
        columns(out, 3, [heads].into_iter().chain(rows.into_iter().map(row)))
    }

    fn figures(&self, cost: &Cost) -> [String; 5] {
        let flops = if cost.flops == 0 { "-".into() } else { teraflops(cost.teraflops()) };
        let bytes = format!("{:.1}", cost.gigabytes_a_second());
        [time(cost.time), percent(cost.time / self.total.time), bytes, flops, percent(cost.of_roofline())]
    }

    fn json(&self) -> Value {
        let (workload, total) = (&self.workload, self.total.time);
        let phases = Phase::ALL.map(|phase| merged(json!({ "phase": phase.name() }), self.phase(phase).json(total)));
        let ops = self
            .ops()
            .into_iter()
            .map(|(op, phase, cost)| merged(json!({ "op": op, "phase": phase.name() }), cost.json(total)));
        let nodes = self.nodes.iter().map(|node| {
            let NodeCost { index, name: node_name, op, phase, cost, fastest } = node;
            let what =
                json!({ "node": index, "name": node_name, "op": op, "phase": phase.name(), "fastest_s": fastest });
            merged(what, cost.json(total))
        });
        let [lower, step, upper] = self.step;
        let rounds = self.rounds.iter().map(|round| {
            let [wall, step] = [round.wall, round.step].map(|time| time.as_secs_f64());
            json!({ "nodes_s": round.nodes_s(), "wall_s": wall, "step_s": step })
        });
        let (mfu, mfu_of_given) = workload.peaks.mfu(workload.flops, step);
        merged(
            workload.json(),
            json!({
                "rounds": rounds.collect::<Vec<_>>(),
                "planned_bytes": self.planned,
                "step_s": step, "step_lower_quartile_s": lower, "step_upper_quartile_s": upper,
                "images_per_s": self.images_a_second(), "mfu": mfu, "mfu_of_given_peak": mfu_of_given,
                "loss": self.loss,
                "total": self.total.json(total),
                "phases": phases,
                "ops": ops.collect::<Vec<_>>(),
                "nodes": nodes.collect::<Vec<_>>(),
            }),
        )
    }

    fn chart(&self, top: usize) -> BarChart {
        let bar = |label: String, phase: Phase, cost: &Cost| {
            let group = Phase::ALL.iter().position(|p| *p == phase).unwrap_or(0);
            let cells = vec![time(cost.time), percent(cost.time / self.total.time), percent(cost.of_roofline())];
            Bar { label, value: cost.time, full: cost.floor, group, cells }
        };
        let ops = self.ops();
        let slowest = self.slowest(top);
        let of_ops = ops.iter().take(BARS).map(|(op, phase, cost)| bar(format!("{op} ({})", cost.nodes), *phase, cost));
        let of_nodes = slowest.iter().map(|node| bar(node.label(), node.phase, &node.cost));
        let panels = vec![
            BarPanel { title: "By kind of op (nodes)".into(), bars: of_ops.collect() },
            BarPanel { title: "Slowest nodes".into(), bars: of_nodes.collect() },
        ];
        let speed =
            format!("{} a step, {:.1} images/s, MFU {}", time(self.step[1]), self.images_a_second(), self.mfu_text());
        BarChart {
            title: self.workload.title(),
            subtitle: format!("{}: {speed}", self.workload.device.name()),
            groups: Phase::ALL.map(|phase| phase.name().to_string()).to_vec(),
            key: "full colour: the least time by the roofline".into(),
            columns: ["time", "share", "of roofline"].map(String::from).to_vec(),
            panels,
        }
    }
}

fn time_round(steps: &mut Synthetic, on_gpu: bool) -> Result<Round> {
    // While a GPU is at work on this step, the nodes of the next queue up, and it need not wait for any of them.
    if on_gpu {
        steps.executor.run_step()?;
    }
    let start = Instant::now();
    let nodes = steps.executor.run_timed()?;
    let wall = start.elapsed();
    Ok(Round { nodes, wall, step: steps.run(1)? })
}

/// Quartiles of times, in seconds.
fn quartiles_of(times: impl Iterator<Item = Duration>) -> [f64; 3] {
    let mut seconds: Vec<f64> = times.map(|time| time.as_secs_f64()).collect();
    seconds.sort_by(f64::total_cmp);
    quartiles(&seconds)
}

fn node_costs(executor: &dyn Executor, peaks: &Peaks, rounds: &[Round]) -> Vec<NodeCost> {
    let (tape, roofline) = (executor.tape(), peaks.roofline());
    let cost = |(index, entry): (usize, &Entry)| {
        let times = || rounds.iter().map(|round| round.nodes[index]);
        let [_, median, _] = quartiles_of(times());
        let fastest = times().min().unwrap_or_default().as_secs_f64();
        let (bytes, flops) = (entry.traffic.total(), entry.flops);
        let cost = Cost { nodes: 1, time: median, bytes, flops, floor: roofline.seconds(bytes, flops) };
        let node = &tape.nodes()[index];
        NodeCost { index, name: node.name.clone(), op: node.op.name(), phase: node.phase, cost, fastest }
    };
    let entries = ledger::entries(tape, executor.plan());
    let nodes = entries.iter().enumerate();
    nodes.filter(|(index, _)| !tape.nodes()[*index].op.is_view()).map(cost).collect()
}
