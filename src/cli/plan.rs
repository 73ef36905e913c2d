//! `plan`: the memory and the work of a training step, before anything runs.

mod gpu;
mod ledger;

use std::cmp::Reverse;
use std::io::{self, Write};
use std::path::PathBuf;

use indicatif::HumanCount;
use serde_json::json;

use super::gpu_args::EpilogueArgs;
use super::memory_args::MemoryArgs;
use super::model_args::{ModelArgs, arch_name};
use super::output::{columns, print};
use super::preset::Preset;
use super::recipe_args::BATCH;
use super::recomputation::Recomputation;
use crate::atomic::write_atomic;
use crate::data::augment::AugmentConfig;
use crate::error::{Error, Result};
use crate::exec::{DeviceChoice, Precision};
use crate::graph::ledger::flops;
use crate::graph::plan::{Buffer, Target};
use crate::graph::{Phase, Plan, Role, Tape, dump};
use crate::nn::ParamInfo;
use crate::nn::simsiam::{SimSiam, StepShape, TrainGraph, ViewSource};
use crate::ops::augment::Augmentation;
use crate::tensor::DType;
use crate::train::epilogues::{EpilogueChoice, Processor};
use crate::train::memory::MemoryChoice;

use ledger::{Ledger, LedgerArgs};

/// No address space is larger; sums of sizes below it do not overflow.
const MAX_BYTES: u128 = 1 << 60;
const MAX_BATCH: usize = 1 << 16;
const MAX_IMAGE_SIZE: usize = 8192;

#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// Recipe that the defaults come from.
    #[arg(long, value_enum, default_value_t)]
    preset: Preset,
    /// Source images per step; each gives two views.
    #[arg(long, value_name = "N", default_value_t = BATCH)]
    batch: usize,
    /// Height and width of a view in pixels [default: imagenet 224, cifar 32].
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// Kind of device that the plan is for: cpu, or cuda, which need not be there [default: cpu; with --ledger, cuda].
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Element type of the activations [default: bf16 for cuda, f32 for the CPU].
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Side in pixels of the stored images that a CUDA device makes the views of, as `prepare` stores them.
    #[arg(long, value_name = "PIXELS", default_value_t = 256)]
    stored_size: usize,
    /// How many of the largest buffers to list; with --ledger, of the nodes that take most time.
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: usize,
    /// Print JSON, sizes in bytes.
    #[arg(long)]
    json: bool,
    /// Write the tape, every node and edge, as a Graphviz file.
    #[arg(long, value_name = "FILE")]
    dot: Option<PathBuf>,
    #[command(flatten)]
    memory: MemoryArgs,
    #[command(flatten)]
    epilogues: EpilogueArgs,
    #[command(flatten)]
    ledger: LedgerArgs,
    #[command(flatten)]
    model: ModelArgs,
}

pub fn run(args: PlanArgs) -> Result<()> {
    let report = Report::new(&args)?;
    print(|out| if args.json { writeln!(out, "{:#}", report.json()) } else { report.print(out) })?;
    if let Some(path) = &args.dot {
        write_atomic(path, |out| out.write_all(dump::dot(&report.tape).as_bytes()))?;
        eprintln!("wrote {}; draw it with: dot -Tsvg {} -o tape.svg", path.display(), path.display());
    }
    Ok(())
}

/// Everything there is to tell.
struct Report {
    model: SimSiam,
    batch: usize,
    image_size: usize,
    precision: Precision,
    tape: Tape,
    plan: Plan,
    memory: MemoryChoice,
    recomputation: Recomputation,
    /// Scalars by what they are in PyTorch.
    trainable: usize,
    backbone: usize,
    /// Floating-point operations of a step.
    flops: u64,
    top: usize,
    ledger: Option<LedgerArgs>,
}

impl Report {
    fn new(args: &PlanArgs) -> Result<Report> {
        let model = args.model.resolve(args.preset)?;
        let (batch, top) = (args.batch, args.top);
        let image_size = args.image_size.unwrap_or(args.preset.image_size());
        for (option, value, max) in [("--batch", batch, MAX_BATCH), ("--image-size", image_size, MAX_IMAGE_SIZE)] {
            if !(1..=max).contains(&value) {
                return Err(Error::config(option, format!("expected 1 to {max}, got {value}")));
            }
        }
        args.ledger.check()?;
        let target = target(args)?;
        let precision = args.dtype.unwrap_or(if target == Target::Cuda { Precision::Bf16 } else { Precision::F32 });
        let source = view_source(args, &model, target, image_size, precision.dtype())?;
        let memory = args.memory.choose(MemoryChoice::default());
        let on = match target {
            Target::Cpu => Processor::Cpu,
            Target::Cuda => Processor::Gpu(Some(args.ledger.gpu.capability())),
        };
        let epilogues = args.epilogues.of(EpilogueChoice::default()).resolve_for(on, precision.dtype());
        let plain = StepShape::new(batch, image_size, precision.dtype(), source);
        let shape = StepShape { epilogues, views: memory.views, ..plain };
        let TrainGraph { tape, params, .. } = model.record_step(&shape)?;
        if tape.values().iter().map(|v| v.desc.bytes() as u128).sum::<u128>() > MAX_BYTES {
            let what = format!("{batch} images of {image_size} pixels take more memory than any machine can address");
            return Err(Error::config("--batch", what));
        }
        let (tape, trade) = memory.fit(tape, target)?;
        let plan = Plan::new(&tape, target)?;
        let recomputation = Recomputation::new(&tape, trade);
        let count = |keep: &dyn Fn(&ParamInfo) -> bool| -> usize {
            params.iter().filter(|p| keep(p)).map(|p| p.desc.shape.len()).sum()
        };
        let trainable = count(&|p| p.trainable);
        let in_backbone = |p: &ParamInfo| p.name.starts_with("encoder.") && !p.name.starts_with("encoder.fc.");
        let backbone = count(&|p| in_backbone(p) && tape.value(p.value).role == Role::Parameter);
        let flops = flops(&tape);
        let ledger = args.ledger.ledger.then(|| args.ledger.clone());
        Ok(Report {
            model,
            batch,
            image_size,
            precision,
            tape,
            plan,
            memory,
            recomputation,
            trainable,
            backbone,
            flops,
            top,
            ledger,
        })
    }

    fn ledger(&self) -> Option<Ledger<'_>> {
        let ledger = |args| Ledger::new(args, &self.tape, &self.plan, self.batch, self.precision);
        self.ledger.as_ref().map(ledger)
    }

    fn views(&self) -> usize {
        2 * self.batch
    }

    fn nodes(&self, phase: Phase) -> usize {
        self.tape.nodes().iter().filter(|n| n.phase == phase).count()
    }

    /// The largest buffers, persistent ones included.
    fn largest(&self) -> Vec<&Buffer> {
        let mut buffers: Vec<&Buffer> = self.plan.buffers.iter().collect();
        buffers.sort_by_key(|b| Reverse(b.slot.bytes));
        buffers.truncate(self.top);
        buffers
    }

    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let size = self.image_size;
        let title = format!("{}, {} stem", arch_name(&self.model.backbone), name_of(self.model.backbone.stem));
        let dtype = self.precision.dtype();
        let views = format!("{} views, {}", self.views(), self.memory.views);
        writeln!(out, "{title}, {size}x{size} pixels, batch {} ({views}), {dtype}", self.batch)?;
        if let Some(ledger) = self.ledger() {
            return ledger.print(out, self.top);
        }
        self.print_network(out)?;
        self.print_memory(out)?;
        self.recomputation.print(out)?;
        self.print_buffers(out)
    }

    fn print_network(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out, "\nnetwork")?;
        let mut row = |label: &str, value: usize, note: &str| {
            writeln!(out, "  {label:<24}{:>14}{note}", HumanCount(value as u64).to_string())
        };
        row("trainable parameters", self.trainable, "")?;
        row("backbone parameters", self.backbone, "")?;
        row("pooled features", self.model.backbone.feature_dim(), "")?;
        let [forward, backward, update] = [Phase::Forward, Phase::Backward, Phase::Update].map(|p| self.nodes(p));
        let note = format!("  ({forward} forward, {backward} backward, {update} update)");
        row("nodes of a step", self.tape.nodes().len(), &note)?;
        let per_image = self.flops as f64 / self.batch as f64;
        writeln!(out, "  {:<24}{:>14.2} GFLOP", "work per step", self.flops as f64 / 1e9)?;
        writeln!(out, "  {:<24}{:>14.2} GFLOP", "work per image", per_image / 1e9)
    }

    fn print_memory(&self, out: &mut dyn Write) -> io::Result<()> {
        let m = &self.plan.memory;
        writeln!(out, "\n{:<26}{:>14}", "memory", "MB")?;
        let mut row = |label: &str, bytes: usize, note: &str| {
            writeln!(out, "  {label:<24}{:>14}{note}", megabytes(bytes)).map(|()| bytes)
        };
        row("parameters", m.parameters, "")?;
        row("batch norm state", m.state, "")?;
        row("optimiser state", m.optimiser, "")?;
        row("inputs", m.inputs, "")?;
        let per_view = megabytes(m.saved_activations / self.views());
        row("saved activations", m.saved_activations, &format!("  ({per_view} per view)"))?;
        row("parameter gradients", m.parameter_gradients, "")?;
        row("largest workspace", m.workspace, "")?;
        row("transient peak", m.transient_peak, "  (activations, gradients and workspace alive at once)")?;
        row("transient as placed", m.transient, &format!("  ({:.2} % fragmentation)", self.fragmentation() * 100.0))?;
        let note = "  (parameters, state, optimiser, inputs, transient as placed)";
        row("total", m.total, note).map(|_| ())
    }

    /// Bytes that the placement wastes, as a share of the least possible.
    fn fragmentation(&self) -> f64 {
        let m = &self.plan.memory;
        m.transient as f64 / m.transient_peak.max(1) as f64 - 1.0
    }

    fn print_buffers(&self, out: &mut dyn Write) -> io::Result<()> {
        let rows: Vec<[String; 5]> = self.largest().into_iter().map(buffer_row).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let heads = ["largest buffers", "shape", "role", "nodes", "MB"].map(String::from);
        writeln!(out)?;
        columns(out, 3, [heads].into_iter().chain(rows))
    }

    fn json(&self) -> serde_json::Value {
        let buffers = self.largest().into_iter().map(|b| {
            json!({
                "name": b.name,
                "shape": b.desc.as_ref().map(|d| d.shape.dims()),
                "dtype": b.desc.as_ref().map(|d| d.dtype),
                "role": role_name(b.role),
                "first_node": b.first,
                "last_node": b.last,
                "offset": b.slot.offset,
                "bytes": b.slot.bytes,
            })
        });
        json!({
            "arch": arch_name(&self.model.backbone),
            "model": self.model,
            "batch": self.batch,
            "image_size": self.image_size,
            "dtype": self.precision.dtype(),
            "trainable_parameters": self.trainable,
            "backbone_parameters": self.backbone,
            "nodes": self.tape.nodes().len(),
            "flops_per_step": self.flops,
            "flops_per_image": self.flops as f64 / self.batch as f64,
            "memory": self.plan.memory,
            "views": self.memory.views,
            "memory_budget": self.memory.budget,
            "recomputation": self.recomputation.json(),
            "largest_buffers": buffers.collect::<Vec<_>>(),
            "ledger": self.ledger().map(|ledger| ledger.json()),
        })
    }
}

/// The kind of device; a plan needs none.
fn target(args: &PlanArgs) -> Result<Target> {
    let default = if args.ledger.ledger { DeviceChoice::Cuda(0) } else { DeviceChoice::Cpu };
    match args.device.unwrap_or(default) {
        DeviceChoice::Cpu if args.ledger.ledger => {
            let what = "with --ledger, which counts what a GPU does, expected cuda, got cpu";
            Err(Error::config("--device", what))
        }
        DeviceChoice::Cpu => Ok(Target::Cpu),
        DeviceChoice::Cuda(_) | DeviceChoice::CudaEmulated => Ok(Target::Cuda),
        DeviceChoice::Auto => Err(Error::config("--device", "expected cpu or cuda, got auto: a plan opens no device")),
    }
}

/// Views as `train` makes them: by the loader for the CPU, from stored bytes on a CUDA device.
fn view_source(
    args: &PlanArgs,
    model: &SimSiam,
    target: Target,
    image_size: usize,
    dtype: DType,
) -> Result<ViewSource> {
    if target == Target::Cpu {
        return Ok(ViewSource::Given { padded: false });
    }
    let config = AugmentConfig { image_size, ..args.preset.augment() };
    let augmentation = Augmentation::new(&config, dtype, model.backbone.padded_channels(dtype), args.stored_size)?;
    let pixel_bytes = args.batch.saturating_mul(args.stored_size * args.stored_size * 3);
    Ok(ViewSource::Stored { augmentation, pixel_bytes })
}

fn buffer_row(buffer: &Buffer) -> [String; 5] {
    let shape = buffer.desc.as_ref().map_or(String::new(), |d| d.to_string());
    let life = format!("{}..{}", buffer.first, buffer.last);
    [buffer.name.clone(), shape, role_name(buffer.role).into(), life, megabytes(buffer.slot.bytes)]
}

fn role_name(role: Option<Role>) -> &'static str {
    match role {
        Some(Role::Input) => "input",
        Some(Role::Parameter) => "parameter",
        Some(Role::State) => "state",
        Some(Role::Optimiser) => "optimiser",
        Some(Role::Activation) => "activation",
        Some(Role::Gradient) => "gradient",
        None => "workspace",
    }
}

/// Millions of bytes.
fn megabytes(bytes: usize) -> String {
    format!("{:.2}", bytes as f64 / 1e6)
}

pub fn name_of(value: impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
}
