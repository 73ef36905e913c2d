//! `plan --ledger`: what every node of a step moves and computes, and how long a GPU needs for it at least.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::gpu::{Ceiling, Gpu, precision_of};
use crate::cli::costs::{Roofline, by_kind, percent, time};
use crate::cli::output::columns;
use crate::cli::peaks::teraflops;
use crate::cli::workload::merged;
use crate::error::{Error, Result};
use crate::exec::Precision;
use crate::graph::ledger::{self, Entry};
use crate::graph::{Node, Phase, Plan, Tape, Traffic};
use crate::tensor::DType;

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Ledger")]
pub struct LedgerArgs {
    /// Print instead the bytes that every node moves, its floating-point operations, and the time that a GPU needs for them at
    /// least, whose kernels and libraries are counted: --device is cuda. Lists --top nodes by time, with --top 0 all of them.
    #[arg(long)]
    pub ledger: bool,
    /// The GPU, which need not be there. Of the H100 the figures are measured (tools/bench_runs), of the others they are
    /// those of the data sheet times what the H100 reaches of its own: 0.85 of the bytes, 0.84 of the FLOP/s of tensor cores,
    /// 0.92 of those in float32.
    #[arg(long, value_enum, default_value_t, requires = "ledger")]
    pub gpu: Gpu,
    /// GB/s, read and written together, of a copy within the memory of the GPU, in place of the known figure.
    #[arg(long, value_name = "GB/S", requires = "ledger")]
    copy_gb_s: Option<f64>,
    /// TFLOP/s of large products of matrices in --dtype, in place of the known figure.
    #[arg(long, value_name = "TFLOPS", requires = "ledger")]
    tflops: Option<f64>,
}

impl LedgerArgs {
    /// # Errors
    /// [`Error::Config`] for figures that no device has.
    pub fn check(&self) -> Result<()> {
        for (option, value) in [("--copy-gb-s", self.copy_gb_s), ("--tflops", self.tflops)] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                return Err(Error::config(option, format!("expected more than 0, got {value}")));
            }
        }
        Ok(())
    }
}

/// The ceilings of a GPU for a step.
#[derive(Debug, Clone, Copy)]
struct Ceilings {
    gpu: Gpu,
    precision: Precision,
    copy: Ceiling,
    product: Ceiling,
}

impl Ceilings {
    fn new(args: &LedgerArgs, precision: Precision) -> Ceilings {
        let (copy, product) = (args.gpu.copy().or(args.copy_gb_s), args.gpu.product(precision).or(args.tflops));
        Ceilings { gpu: args.gpu, precision, copy, product }
    }

    /// That of nodes that compute with tensors of `dtype`.
    fn roofline(&self, dtype: Option<DType>) -> Roofline {
        let precision = precision_of(dtype, self.precision);
        let product = if precision == self.precision { self.product } else { self.gpu.product(precision) };
        Roofline { copy: self.copy.value, product: product.value }
    }

    fn json(&self) -> Value {
        let ceiling = |ceiling: &Ceiling| json!({ "value": ceiling.value, "source": ceiling.source.to_string() });
        json!({
            "gpu": self.gpu.name(), "copy_gb_per_s": ceiling(&self.copy), "product_tflop_per_s": ceiling(&self.product),
        })
    }
}

/// What a node takes, or several.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    nodes: usize,
    traffic: Traffic,
    flops: u64,
    /// The least seconds, node by node.
    time: f64,
    /// Of these, seconds of nodes that are bound by their bytes.
    bytes_time: f64,
}

impl Cost {
    fn new(entry: &Entry, roofline: &Roofline) -> Cost {
        let &Entry { traffic, flops, .. } = entry;
        let time = roofline.seconds(traffic.total(), flops);
        let bytes_time = if roofline.bound_by_bytes(traffic.total(), flops) { time } else { 0.0 };
        Cost { nodes: 1, traffic, flops, time, bytes_time }
    }

    fn add(self, other: Cost) -> Cost {
        Cost {
            nodes: self.nodes + other.nodes,
            traffic: self.traffic + other.traffic,
            flops: self.flops + other.flops,
            time: self.time + other.time,
            bytes_time: self.bytes_time + other.bytes_time,
        }
    }

    fn sum<'a>(costs: impl Iterator<Item = &'a Cost>) -> Cost {
        costs.fold(Cost::default(), |sum, cost| sum.add(*cost))
    }

    /// What bounds the time.
    fn bound(&self) -> String {
        match self.bytes_time / self.time {
            0.0 => "FLOPs".into(),
            share if share < 1.0 => format!("{:.0} % bytes", 100.0 * share),
            _ => "bytes".into(),
        }
    }

    fn json(&self) -> Value {
        json!({
            "nodes": self.nodes, "bytes_read": self.traffic.read, "bytes_written": self.traffic.written,
            "bytes": self.traffic.total(), "flops": self.flops, "roofline_s": self.time, "bound_by_bytes_s": self.bytes_time,
        })
    }

    /// Bytes and operations of one of so many parts, which need not be whole numbers.
    fn json_of_one(&self, parts: usize) -> Value {
        let of_one = |number: u64| number as f64 / parts as f64;
        json!({
            "bytes_read": of_one(self.traffic.read), "bytes_written": of_one(self.traffic.written),
            "bytes": of_one(self.traffic.total()), "flops": of_one(self.flops),
        })
    }

    /// MB read, written and together, and GFLOP, of one of so many parts.
    fn figures(&self, parts: usize) -> [String; 4] {
        let mega = |bytes: u64| format!("{:.2}", bytes as f64 / parts as f64 / 1e6);
        let flops = if self.flops == 0 { "-".into() } else { format!("{:.3}", self.flops as f64 / parts as f64 / 1e9) };
        [mega(self.traffic.read), mega(self.traffic.written), mega(self.traffic.total()), flops]
    }
}

/// The ledger of a step.
pub struct Ledger<'a> {
    tape: &'a Tape,
    images: usize,
    saved: usize,
    ceilings: Ceilings,
    /// Nodes that run, by number, with the element type that they compute in.
    nodes: Vec<(usize, Option<DType>, Cost)>,
    total: Cost,
}

impl<'a> Ledger<'a> {
    /// That of a planned step for `images` source images.
    pub fn new(args: &LedgerArgs, tape: &'a Tape, plan: &Plan, images: usize, precision: Precision) -> Ledger<'a> {
        let ceilings = Ceilings::new(args, precision);
        let entries = ledger::entries(tape, plan).into_iter().enumerate();
        let nodes: Vec<_> = entries
            .filter(|(node, _)| !tape.nodes()[*node].op.is_view())
            .map(|(node, entry)| (node, entry.dtype, Cost::new(&entry, &ceilings.roofline(entry.dtype))))
            .collect();
        let total = Cost::sum(nodes.iter().map(|(_, _, cost)| cost));
        Ledger { tape, images, saved: plan.memory.saved_activations, ceilings, nodes, total }
    }

    fn views(&self) -> usize {
        2 * self.images
    }

    fn costs(&self) -> impl Iterator<Item = (&Node, &Cost)> {
        self.nodes.iter().map(|(node, _, cost)| (&self.tape.nodes()[*node], cost))
    }

    /// By kind of op and phase, the one with the most bytes first.
    fn kinds(&self) -> Vec<(&'static str, Phase, Cost)> {
        let mut kinds = by_kind(self.costs().map(|(node, cost)| (node.op.name(), node.phase, *cost)), Cost::add);
        kinds.sort_by_key(|(_, _, cost)| std::cmp::Reverse(cost.traffic.total()));
        kinds
    }

    fn phase(&self, phase: Phase) -> Cost {
        Cost::sum(self.costs().filter(|(node, _)| node.phase == phase).map(|(_, cost)| cost))
    }

    /// Prints it, with the `top` nodes that take most time; with 0 all of them in their order.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn print(&self, out: &mut dyn Write, top: usize) -> io::Result<()> {
        let (Ceilings { gpu, precision, copy, product }, views) = (self.ceilings, self.views() as f64);
        writeln!(out, "gpu       {}", gpu.name())?;
        writeln!(out, "copy      {:.0} GB/s ({})", copy.value, copy.source)?;
        writeln!(out, "products  {} TFLOP/s in {precision} ({})", teraflops(product.value), product.source)?;
        let [per_view, per_image] = [views, views / 2.0].map(|count| format!("{:.0}", count / self.total.time));
        let bytes = percent(self.total.bytes_time / self.total.time);
        writeln!(
            out,
            "roofline  {} a step, {per_view} views/s, {per_image} images/s; {bytes} of it for bytes",
            time(self.total.time)
        )?;
        writeln!(
            out,
            "saved     {:.2} MB of activations a view, for the backward pass",
            self.saved as f64 / views / 1e6
        )?;

        let heads = ["total", "MB read", "MB written", "MB", "GFLOP"].map(String::from);
        let parts = [("of a step", 1), ("of an image", self.images), ("of a view", self.views())];
        let row = |(label, parts): (&str, usize)| {
            let [read, written, bytes, flops] = self.total.figures(parts);
            [label.into(), read, written, bytes, flops]
        };
        writeln!(out)?;
        columns(out, 1, [heads].into_iter().chain(parts.map(row)))?;

        writeln!(out, "\nbelow: MB and GFLOP of a view, times of a step")?;
        let kind = |(op, phase, cost): (&str, Phase, Cost)| {
            self.row([op, phase.name(), &cost.nodes.to_string()].map(String::from), &cost)
        };
        self.table(out, ["kind of op", "phase", "nodes"], self.kinds().into_iter().map(kind))?;

        let mut nodes: Vec<(&Node, &Cost)> = self.costs().collect();
        if top > 0 {
            nodes.sort_by(|a, b| b.1.time.total_cmp(&a.1.time));
            nodes.truncate(top);
        }
        let heading = format!("{} of {} nodes", nodes.len(), self.nodes.len());
        let rows = nodes
            .iter()
            .map(|(node, cost)| self.row([&node.name, node.op.name(), node.phase.name()].map(String::from), cost));
        self.table(out, [&heading, "op", "phase"], rows)
    }

    /// A row: what it is, bytes and operations of a view, time in a step.
    fn row(&self, [a, b, c]: [String; 3], cost: &Cost) -> [String; 10] {
        let [read, written, bytes, flops] = cost.figures(self.views());
        [a, b, c, read, written, bytes, flops, time(cost.time), percent(cost.time / self.total.time), cost.bound()]
    }

    fn table(
        &self,
        out: &mut dyn Write,
        [a, b, c]: [&str; 3],
        rows: impl Iterator<Item = [String; 10]>,
    ) -> io::Result<()> {
        let heads = [a, b, c, "MB read", "MB written", "MB", "GFLOP", "time", "share", "bound by"].map(String::from);
        writeln!(out)?;
        columns(out, 3, [heads].into_iter().chain(rows))
    }

    /// Everything.
    pub fn json(&self) -> Value {
        let views_per_s = self.views() as f64 / self.total.time;
        let phases = Phase::ALL.map(|phase| merged(json!({ "phase": phase.name() }), self.phase(phase).json()));
        let kinds = self.kinds().into_iter();
        let ops = kinds.map(|(op, phase, cost)| merged(json!({ "op": op, "phase": phase.name() }), cost.json()));
        let nodes = self.nodes.iter().map(|(index, dtype, cost)| {
            let node = &self.tape.nodes()[*index];
            let what = json!({
                "node": index, "name": node.name, "op": node.op.name(), "phase": node.phase.name(), "dtype": dtype,
                "bound_by": cost.bound(),
            });
            merged(what, cost.json())
        });
        json!({
            "ceilings": self.ceilings.json(),
            "per_step": self.total.json(),
            "per_image": self.total.json_of_one(self.images),
            "per_view": self.total.json_of_one(self.views()),
            "saved_activation_bytes_per_view": self.saved as f64 / self.views() as f64,
            "roofline_views_per_s": views_per_s,
            "roofline_images_per_s": views_per_s / 2.0,
            "phases": phases,
            "ops": ops.collect::<Vec<_>>(),
            "nodes": nodes.collect::<Vec<_>>(),
        })
    }
}
