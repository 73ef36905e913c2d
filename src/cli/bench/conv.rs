//! `bench conv`: every algorithm of cuDNN and cuBLASLt for a network's convolutions, and what may be fused with them.

use std::io::{self, Write};
use std::sync::Arc;

use serde_json::json;

use crate::backend::conv::ConvGeometry;
use crate::backend::cuda::library::{Choice, Convolution, Measured, Work};
use crate::backend::cuda::{CudaDevice, Driver};
use crate::cli::model_args::ModelArgs;
use crate::cli::output::print;
use crate::cli::preset::Preset;
use crate::error::{Error, Result};
use crate::exec::Precision;
use crate::graph::Tape;
use crate::nn::simsiam::{StepShape, ViewSource};
use crate::tensor::{DType, TensorDesc};

#[derive(Debug, clap::Args)]
pub struct ConvArgs {
    /// Recipe that the defaults come from.
    #[arg(long, value_enum, default_value_t)]
    preset: Preset,
    /// Source images per step; each gives two views.
    #[arg(long, value_name = "N", default_value_t = 256)]
    batch: usize,
    /// Height and width of a view in pixels [default: imagenet 224, cifar 32].
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// Element type of the activations.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Precision,
    /// Only nodes whose name contains TEXT, e.g. encoder.layer1.0.conv2.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Workspace in MiB that fused algorithms may take.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    workspace: usize,
    /// Number of the GPU.
    #[arg(long, value_name = "N", default_value_t = 0)]
    gpu: usize,
    /// Print JSON, a line for each algorithm.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

pub fn run(args: &ConvArgs) -> Result<()> {
    let convolutions = convolutions(args)?;
    let device = Arc::new(CudaDevice::open(args.gpu)?);
    let libraries = device.loaded_libraries()?;
    let choice = Choice { tf32: args.dtype == Precision::Tf32, autotune: true };
    if !args.json {
        print(|out| writeln!(out, "{}, {}, {} views\n", device.name(), args.dtype.dtype(), 2 * args.batch))?;
    }
    for (nodes, convolution) in &convolutions {
        let mut measured = libraries.measure(&*device, convolution, choice, args.workspace << 20)?;
        measured.sort_by_key(|one| (one.what, one.time.as_ref().ok().copied().unwrap_or(std::time::Duration::MAX)));
        print(|out| match args.json {
            true => write_json(out, nodes, convolution, &measured),
            false => write_table(out, nodes, convolution, &measured),
        })?;
    }
    Ok(())
}

/// The different convolutions of a training step, each with the nodes that compute it.
fn convolutions(args: &ConvArgs) -> Result<Vec<(Vec<String>, Convolution)>> {
    let model = args.model.resolve(args.preset)?;
    let image_size = args.image_size.unwrap_or(args.preset.image_size());
    let source = ViewSource::Given { padded: true };
    let dtype = args.dtype.dtype();
    if dtype == DType::F64 {
        return Err(Error::config("--dtype", "expected f32, tf32, bf16 or fp16, got f64"));
    }
    let shape = StepShape::new(args.batch, image_size, dtype, source);
    let tape = model.record_step(&shape)?.tape;
    let mut found: Vec<(Vec<String>, Convolution)> = vec![];
    for (name, convolution) in named(&tape) {
        if args.only.as_ref().is_some_and(|text| !name.contains(text.as_str())) {
            continue;
        }
        match found.iter_mut().find(|(_, other)| *other == convolution) {
            Some((nodes, _)) => nodes.push(name),
            None => found.push((vec![name], convolution)),
        }
    }
    match found.is_empty() {
        true => Err(Error::config("--only", "no convolution's name contains it")),
        false => Ok(found),
    }
}

fn named(tape: &Tape) -> impl Iterator<Item = (String, Convolution)> {
    tape.nodes().iter().filter_map(|node| {
        let descs: Vec<&TensorDesc> = node.inputs.iter().map(|&id| tape.desc(id)).collect();
        match node.op.library_work(&descs)? {
            Work::Convolution(convolution) => Some((node.name.clone(), convolution)),
            Work::Product(_) => None,
        }
    })
}

fn write_table(out: &mut dyn Write, nodes: &[String], c: &Convolution, measured: &[Measured]) -> io::Result<()> {
    let Convolution { direction, geometry, .. } = c;
    let ConvGeometry { n, h, w, c_in, c_out, kernel: [kh, kw], stride, .. } = geometry;
    let more = if nodes.len() > 1 { format!(" and {} more", nodes.len() - 1) } else { String::new() };
    writeln!(
        out,
        "{direction:?} of {n}x{h}x{w}, {c_in} to {c_out} channels, {kh}x{kw} by {}: {}{more}",
        stride[0], nodes[0]
    )?;
    for Measured { what, algorithm, workspace, time } in measured {
        write!(out, "  {what:<27} {algorithm:<28} {:>9.1} MiB ", *workspace as f64 / f64::from(1 << 20))?;
        match time {
            Ok(time) => {
                let (us, rate) = (time.as_secs_f64() * 1e6, c.geometry.flops() as f64 / time.as_secs_f64() / 1e12);
                writeln!(out, "{us:>10.1} us {rate:>8.1} TFLOP/s")?;
            }
            Err(error) => writeln!(out, "{error}")?,
        }
    }
    writeln!(out)
}

fn write_json(out: &mut dyn Write, nodes: &[String], c: &Convolution, measured: &[Measured]) -> io::Result<()> {
    for Measured { what, algorithm, workspace, time } in measured {
        let mut line = json!({ "nodes": nodes, "convolution": c, "what": what, "algorithm": algorithm });
        line["workspace_bytes"] = json!(workspace);
        match time {
            Ok(time) => line["seconds"] = json!(time.as_secs_f64()),
            Err(error) => line["error"] = json!(error.to_string()),
        }
        writeln!(out, "{line}")?;
    }
    Ok(())
}
