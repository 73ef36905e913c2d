//! The model card: what the weights are, where they come from and how they are loaded, in Markdown.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use crate::data::augment::AugmentConfig;
use crate::error::{Error, Result};
use crate::export::facts::{ENGINE, sections};
use crate::export::onnx::{INPUT, OPSET};
use crate::export::source::Source;
use crate::export::{Format, Verified, is_torch};
use crate::nn::resnet::{Arch, Block, ResNet, Stem};
use crate::nn::simsiam::SimSiam;
use crate::train::config::{Recipe, RunConfig};

/// What a run can be repeated from, but for its data and its machine.
#[derive(Serialize)]
struct Settings<'a> {
    recipe: &'a Recipe,
    model: &'a SimSiam,
    augment: &'a AugmentConfig,
}

/// The card of `out`, which was written as `format` says.
///
/// # Errors
/// [`Error::Internal`] when the configuration cannot be written as TOML.
pub fn card(source: &Source, format: Format, out: &Path, verified: &Verified) -> Result<String> {
    let run = source.origin.run();
    let name = out.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let what = if source.heads { "backbone, projector and predictor" } else { "backbone" };
    let arch = source.model.backbone.arch();
    let history = match run {
        Some(_) => format!("after {} steps of SimSiam", source.step),
        None => source.history.clone(),
    };
    let mut text = format!(
        "# {arch} {history}\n\n`{name}`: {what}, {} tensors, written by {ENGINE} as `--to {}`.\n",
        verified.tensors,
        format.name()
    );
    let _ = write!(text, "\n## Use\n\n{}", usage(source, format, &name));
    for (title, facts) in sections(source).iter().filter(|(_, facts)| !facts.is_empty()) {
        let _ = write!(text, "\n## {title}\n\n| | |\n|---|---|\n");
        facts.iter().for_each(|(key, value)| _ = writeln!(text, "| {key} | {value} |"));
    }
    if run.is_some() && source.metrics.is_empty() {
        text += "\nThe run's metrics were not found: no figures.\n";
    }
    let how = match format {
        Format::Onnx => "its graph was run by the engine's own ops",
        _ => "its tensors are those of the checkpoint bit for bit",
    };
    let _ = write!(
        text,
        "\n## Verified\n\nThe file was read back and {how}: on {} random images the outputs differ from the engine's by {:.1e} of the \
         largest.\n",
        verified.images(),
        verified.difference
    );
    if let Some(RunConfig { recipe, model, augment, .. }) = run {
        let settings = toml::to_string(&Settings { recipe, model, augment }).map_err(|error| Error::Internal {
            thread: "model card".into(),
            message: format!("the configuration cannot be written as TOML: {error}"),
        })?;
        let _ = write!(text, "\n## Settings\n\n```toml\n{settings}```\n");
    }
    text += match run {
        Some(_) => {
            "\n## Licence\n\nThe licence of the weights is yours to choose, who trained them; mind the terms of the training \
             images. The engine lays no claim to them.\n"
        }
        None => "\n## Licence\n\nThat of the file which the weights come from.\n",
    };
    Ok(text)
}

/// How the file is loaded, in Markdown.
fn usage(source: &Source, format: Format, name: &str) -> String {
    let (language, lines) = snippet(source, format, name);
    let note = match format {
        Format::Detectron2 => {
            "Images go in as RGB, with PIXEL_MEAN and PIXEL_STD in levels of 0..255. Where the batch norms are trained \
                               on, set MODEL.RESNETS.NORM to SyncBN; detectron2's own default keeps them frozen.\n"
                .to_string()
        }
        Format::Onnx => format!(
            "Opset {OPSET}, float32. Input `{INPUT}` [batch, 3, {size}, {size}] with any batch; outputs {}.\n",
            outputs(source),
            size = source.augment.image_size
        ),
        _ => String::new(),
    };
    format!("```{language}\n{}\n```\n{}{note}", lines.join("\n"), if note.is_empty() { "" } else { "\n" })
}

fn outputs(source: &Source) -> String {
    let features = format!("`features` [batch, {}]", source.model.backbone.feature_dim());
    if source.heads {
        format!("{features}, `projection` and `prediction` [batch, {}]", source.model.heads.dim)
    } else {
        features
    }
}

/// Language and lines that load the file `name`.
pub fn snippet(source: &Source, format: Format, name: &str) -> (&'static str, Vec<String>) {
    let backbone = &source.model.backbone;
    let file = format!("{name:?}");
    let (import, load) = match is_torch(Path::new(name)) {
        true => ("import torch", format!("torch.load({file}, weights_only=True)")),
        false => ("from safetensors.torch import load_file", format!("load_file({file})")),
    };
    let lines = match format {
        Format::Torchvision => {
            let mut lines = vec!["import torch, torchvision".to_string()];
            lines.extend((import != "import torch").then(|| import.into()));
            lines.extend(torchvision_model(backbone));
            lines.push("model.fc = torch.nn.Identity()  # the pooled feature is the result".into());
            lines.push(format!("model.load_state_dict({load}, strict=True)"));
            lines
        }
        Format::Timm => vec![
            "import timm".into(),
            format!("model = timm.create_model(\"{}\", num_classes=0, checkpoint_path={file})", backbone.arch()),
        ],
        Format::Safetensors => vec![
            import.to_string(),
            format!("tensors = {load}  # named as in SimSiam's state_dict: encoder.*, encoder.fc.*, predictor.*"),
        ],
        Format::Onnx => vec![
            "import onnxruntime".into(),
            format!("session = onnxruntime.InferenceSession({file})"),
            format!("features = session.run([\"features\"], {{\"{INPUT}\": images}})[0]"),
        ],
        Format::Detectron2 => return ("yaml", detectron2_config(source, &file)),
    };
    ("python", lines)
}

/// Python that makes the network: torchvision's constructors can where there are four stages from 64 channels.
fn torchvision_model(resnet: &ResNet) -> Vec<String> {
    if resnet.width != 64 || resnet.depths.len() != 4 {
        return vec!["model = ...  # torchvision has no such ResNet; tools/simsiam_torch/networks.py builds it".into()];
    }
    let block = match resnet.block {
        Block::Basic => "BasicBlock",
        Block::Bottleneck => "Bottleneck",
    };
    let mut lines = vec![match resnet.arch() {
        Arch::Custom => {
            format!("model = torchvision.models.ResNet(torchvision.models.resnet.{block}, {:?})", resnet.depths)
        }
        named => format!("model = torchvision.models.{named}()"),
    }];
    if resnet.stem == Stem::Cifar {
        lines.push("model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)".into());
        lines.push("model.maxpool = torch.nn.Identity()".into());
    }
    lines
}

/// The part of detectron2's configuration that differs from its default.
fn detectron2_config(source: &Source, file: &str) -> Vec<String> {
    let augment = &source.augment;
    let levels = |values: [f32; 3]| values.map(|value| format!("{:.3}", f64::from(value) * 255.0)).join(", ");
    let mut lines = vec![
        "MODEL:".to_string(),
        format!("  WEIGHTS: {file}"),
        format!("  PIXEL_MEAN: [{}]", levels(augment.mean)),
        format!("  PIXEL_STD: [{}]", levels(augment.std)),
        "  RESNETS:".into(),
    ];
    let resnet = &source.model.backbone;
    lines.push(match resnet.arch() {
        Arch::Custom => {
            format!("    # depths {:?}, width {}: make it with detectron2's ResNet class", resnet.depths, resnet.width)
        }
        named => format!("    DEPTH: {}", named.to_string().trim_start_matches("resnet")),
    });
    if resnet.block == Block::Basic {
        lines.push(format!("    RES2_OUT_CHANNELS: {}", resnet.width));
    }
    lines.extend(["    STRIDE_IN_1X1: False".into(), "INPUT:".into(), "  FORMAT: \"RGB\"".into()]);
    lines
}
