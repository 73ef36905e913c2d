//! `export`: the trained backbone as a file that torchvision loads.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use indicatif::HumanCount;
use serde::Deserialize;

use super::model_args::arch_name;
use super::output::print;
use crate::data::writer::refuse_existing;
use crate::error::{Error, Result};
use crate::exec::{CpuExecutor, Executor};
use crate::export::torchvision::write_backbone;
use crate::graph::Role;
use crate::nn::resnet::{Block, ResNet, Stem};
use crate::nn::simsiam::FeatureGraph;
use crate::rng::Stream;
use crate::tensor::safetensors::{self, NamedTensors};
use crate::tensor::{DType, HostTensor, TensorDesc};
use crate::train::checkpoint::{self, Checkpoint, Checkpoints};
use crate::train::config::{FILE_NAME, RunConfig};
use crate::train::run::CHECKPOINTS;
use crate::train::state::write_params;

/// Images of `--features`.
const IMAGES: usize = 4;
/// Separates their draws from all others.
const IMAGE_DOMAIN: u32 = 0xFEA7;

#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// Run directory, whose newest checkpoint is taken, or a checkpoint file in one.
    #[arg(value_name = "RUN_OR_CHECKPOINT")]
    source: PathBuf,
    /// File to write (usually *.safetensors).
    out: PathBuf,
    /// Also write random images and the engine's pooled features of them, for tools/check_export.py.
    #[arg(long, value_name = "FILE")]
    features: Option<PathBuf>,
    /// Replace the files if they exist.
    #[arg(long)]
    force: bool,
}

impl ExportArgs {
    /// The backbone of `source`, into a new file.
    pub fn new(source: PathBuf, out: PathBuf) -> ExportArgs {
        ExportArgs { source, out, features: None, force: false }
    }
}

/// What is told of the training state.
#[derive(Debug, Deserialize)]
pub(super) struct State {
    pub(super) step: u64,
}

pub fn run(args: ExportArgs) -> Result<()> {
    for path in [&args.out].into_iter().chain(&args.features) {
        refuse_existing(path, args.force)?;
    }
    if args.features.as_ref() == Some(&args.out) {
        return Err(Error::config("--features", "is the file that the backbone is written to"));
    }
    let (config, mut checkpoint) = open(&args.source)?;
    let graph = config.model.feature_graph(IMAGES, config.augment.image_size, DType::F32)?;
    let mut backbone = NamedTensors::new();
    for param in &graph.params {
        let expected = TensorDesc { shape: param.torch_shape(), dtype: param.desc.dtype };
        backbone.insert(param.name.clone(), checkpoint.take(&param.name, &expected)?);
    }
    let trained = graph.tape.with_role(Role::Parameter);
    let parameters: usize = trained.map(|(_, value)| value.desc.shape.len()).sum();
    let features = args.features.as_ref().map(|_| features(graph, &backbone, &config)).transpose()?;
    let step = checkpoint.state.step;
    let tensors = write_backbone(&args.out, backbone, &metadata(&config, step))?;
    if let (Some(path), Some(tensors)) = (&args.features, &features) {
        safetensors::write(path, tensors, &BTreeMap::new())?;
    }
    print(|out| {
        let (path, arch) = (args.out.display(), arch_name(&config.model.backbone));
        let parameters = HumanCount(parameters as u64);
        writeln!(out, "{path}: {arch} after step {step}, {tensors} tensors, {parameters} parameters")?;
        print_how_to_load(&args.out, &config, out)?;
        args.features.iter().try_for_each(|path| writeln!(out, "\n{}: images and their features", path.display()))
    })
}

/// The configuration and the checkpoint that `source` names.
pub(super) fn open(source: &Path) -> Result<(RunConfig, Checkpoint<State>)> {
    if source.is_dir() {
        let config = RunConfig::read(source)?;
        let folder = source.join(CHECKPOINTS);
        let latest = Checkpoints::new(&folder, config.log.keep_last)?.latest()?;
        let checkpoint = latest.ok_or_else(|| {
            Error::format(&folder, None, "expected a checkpoint, found none").with_hint("train the run first")
        })?;
        return Ok((config, checkpoint));
    }
    let checkpoint = checkpoint::load(source)?;
    let above = |levels: usize| source.ancestors().nth(levels).filter(|p| p.join(FILE_NAME).is_file());
    let run = above(1).or_else(|| above(2)).ok_or_else(|| {
        Error::format(source, None, format!("expected {FILE_NAME} beside the checkpoint or one folder up, found none"))
            .with_hint("leave checkpoints in their run directory")
    })?;
    Ok((RunConfig::read(run)?, checkpoint))
}

/// What another program needs to know to use the backbone.
fn metadata(config: &RunConfig, step: u64) -> BTreeMap<String, String> {
    let ResNet { block, depths, width, stem } = &config.model.backbone;
    let dataset = config.data.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let entries = [
        ("arch", arch_name(&config.model.backbone)),
        ("block", format!("{block:?}").to_lowercase()),
        ("depths", joined(depths)),
        ("width", width.to_string()),
        ("stem", format!("{stem:?}").to_lowercase()),
        ("feature_dim", config.model.backbone.feature_dim().to_string()),
        ("image_size", config.augment.image_size.to_string()),
        ("mean", joined(&config.augment.mean)),
        ("std", joined(&config.augment.std)),
        ("dataset", dataset),
        ("epochs", config.recipe.epochs.to_string()),
        ("step", step.to_string()),
        ("seed", config.seed.to_string()),
        ("engine", format!("simsiam-engine {}", env!("CARGO_PKG_VERSION"))),
    ];
    entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

fn joined<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

/// The engine's pooled features of random images, under the names that tools/check_export.py expects.
fn features(graph: FeatureGraph, backbone: &NamedTensors, config: &RunConfig) -> Result<NamedTensors> {
    let FeatureGraph { tape, images, features, params } = graph;
    let desc = tape.desc(images).clone();
    let mut stream = Stream::new(0, IMAGE_DOMAIN, 0);
    let values: Vec<f32> = (0..desc.shape.len()).map(|_| stream.normal() as f32).collect();
    let input = HostTensor::from_bytes(desc, bytemuck::cast_slice(&values).to_vec())?;
    let mut exec = CpuExecutor::new(tape, config.machine.cpu_conv)?;
    write_params(&mut exec, &params, |name, expected| {
        backbone.get(name).cloned().ok_or_else(|| Error::shape("load", name, expected, "no such tensor"))
    })?;
    exec.write(images, input.bytes())?;
    exec.run_step()?;
    Ok([("input".into(), input), ("features".into(), exec.read(features)?)].into())
}

fn print_how_to_load(path: &Path, config: &RunConfig, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\nTo load it in Python:\n")?;
    writeln!(out, "  import torch, torchvision")?;
    writeln!(out, "  from safetensors.torch import load_file")?;
    match torchvision_model(&config.model.backbone) {
        Some(lines) => lines.iter().try_for_each(|line| writeln!(out, "  {line}"))?,
        None => {
            writeln!(out, "  model = ...  # torchvision has no such ResNet; tools/simsiam_torch/networks.py builds it")?
        }
    }
    writeln!(out, "  model.fc = torch.nn.Identity()")?;
    writeln!(out, "  model.load_state_dict(load_file({:?}))", path.display().to_string())?;
    writeln!(out, "\nIts images are RGB in 0..1, minus {:?}, divided by {:?}.", config.augment.mean, config.augment.std)
}

/// Python that makes the network, if torchvision's constructor can: four stages from 64 channels.
fn torchvision_model(resnet: &ResNet) -> Option<Vec<String>> {
    if resnet.width != 64 || resnet.depths.len() != 4 {
        return None;
    }
    let name = arch_name(resnet);
    let block = match resnet.block {
        Block::Basic => "BasicBlock",
        Block::Bottleneck => "Bottleneck",
    };
    let mut lines = vec![match name.as_str() {
        "custom" => {
            format!("model = torchvision.models.ResNet(torchvision.models.resnet.{block}, {:?})", resnet.depths)
        }
        _ => format!("model = torchvision.models.{name}()"),
    }];
    if resnet.stem == Stem::Cifar {
        lines.push("model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)".into());
        lines.push("model.maxpool = torch.nn.Identity()".into());
    }
    Some(lines)
}
