//! Out into the world: the weights of a run in the formats of other programs. Every file is read back, and its features compared
//! with the engine's, before it gets its name.

pub mod card;
pub mod detectron2;
pub mod facts;
pub mod names;
pub mod onnx;
pub mod pickle;
pub mod source;
pub mod torch;
pub mod zip;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use crate::atomic::write_verified;
use crate::error::{Error, Result};
use crate::exec::{CpuExecutor, Executor};
use crate::nn::resnet::{Arch, Stem};
use crate::rng::Stream;
use crate::tensor::safetensors::{self, NamedTensors};
use crate::tensor::{DType, HostTensor, TensorDesc};
use crate::train::state::write_params;
use source::Source;

/// Random images that the features are compared on.
const IMAGES: usize = 4;
/// Separates their draws from all others.
const IMAGE_DOMAIN: u32 = 0xFEA7;
/// Largest difference of a verified output, relative to the largest value: float32 summed in another order.
const TOLERANCE: f64 = 1e-5;

/// Whom the file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// torchvision's names; a .pth, .pt or .pth.tar is for torch.load, anything else is safetensors.
    #[default]
    Torchvision,
    /// timm's names; files as for torchvision.
    Timm,
    /// SimSiam's own names, in safetensors, with --heads if wished.
    Safetensors,
    /// A .pkl for detectron2's checkpointer.
    Detectron2,
    /// A graph with its weights, with --heads if wished.
    Onnx,
}

/// A file that was written, read back and found to be good.
#[derive(Debug)]
pub struct Verified {
    /// Tensors in it.
    pub tensors: usize,
    /// Largest difference between an output and the engine's, relative to the largest value of that output.
    pub difference: f64,
    /// `input`, images `[n][h][w][3]`, and what the engine makes of them: `features`, and `projection` and `prediction`.
    pub outputs: NamedTensors,
}

impl Verified {
    /// How many images were compared.
    pub fn images(&self) -> usize {
        IMAGES
    }
}

/// Whether a file of this name is one of `torch.save`.
fn is_torch(out: &Path) -> bool {
    let name = out.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    [".pth", ".pt", ".pth.tar"].iter().any(|ending| name.ends_with(ending))
}

impl Format {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Torchvision => "torchvision",
            Format::Timm => "timm",
            Format::Safetensors => "safetensors",
            Format::Detectron2 => "detectron2",
            Format::Onnx => "onnx",
        }
    }

    /// What the tensor `name` of the `state_dict` is called in the file.
    pub fn rename(self, name: &str) -> String {
        match self {
            Format::Torchvision | Format::Timm => names::torchvision(name),
            Format::Detectron2 => names::detectron2(name),
            Format::Safetensors | Format::Onnx => name.into(),
        }
    }

    /// Checks that the file's name says what it will be, and that the format has a place for the network.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Unsupported`] naming what does not fit.
    pub fn check(self, source: &Source, out: &Path) -> Result<()> {
        self.check_name(out)?;
        let backbone = &source.model.backbone;
        if source.heads && !matches!(self, Format::Safetensors | Format::Onnx) {
            let what = format!("projector and predictor have no place in a file for {}", self.name());
            return Err(Error::config("--heads", what).with_hint("add --to safetensors or --to onnx"));
        }
        let (small, custom) = (backbone.stem != Stem::Imagenet, backbone.arch() == Arch::Custom);
        let what = match self {
            Format::Timm | Format::Detectron2 if small => {
                format!("{}'s ResNets have a 7x7 stem, this one is for small images (--stem cifar)", self.name())
            }
            Format::Timm if custom => {
                format!("timm has no ResNet of {:?} blocks, width {}", backbone.depths, backbone.width)
            }
            _ => return Ok(()),
        };
        Err(Error::Unsupported { what, hint: Some("use --to torchvision or --to onnx".into()) })
    }

    fn check_name(self, out: &Path) -> Result<()> {
        let ending = out.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
        let (expected, fits) = match self {
            // detectron2 goes by the ending, and so do the others' loaders and people.
            Format::Detectron2 => (".pkl", ending == "pkl"),
            Format::Onnx => (".onnx", ending == "onnx"),
            Format::Safetensors => (".safetensors", !is_torch(out) && !["pkl", "onnx"].contains(&ending.as_str())),
            Format::Torchvision | Format::Timm => {
                (".safetensors, .pth, .pt or .pth.tar", !["pkl", "onnx"].contains(&ending.as_str()))
            }
        };
        if fits {
            return Ok(());
        }
        let what = format!("a file for --to {} ends in {expected}, got {}", self.name(), out.display());
        let hint = match ending.as_str() {
            "pkl" => "add --to detectron2",
            "onnx" => "add --to onnx",
            "pth" | "pt" | "tar" => "leave out --to, or name another file",
            _ => "name another file",
        };
        Err(Error::config("OUT", what).with_hint(hint))
    }

    /// The tensors in the bytes of a file, under their names in it.
    fn read(self, out: &Path, file: Vec<u8>) -> Result<NamedTensors> {
        match self {
            Format::Detectron2 => detectron2::read(out, &file),
            Format::Torchvision | Format::Timm if is_torch(out) => torch::read(out, file),
            _ => Ok(safetensors::read_bytes(out, &file)?.0),
        }
    }
}

/// Writes the weights of `source` to `out` for `format`; the file appears when it was read back and found good.
///
/// # Errors
/// What [`Format::check`] finds, [`Error::Io`] when it cannot be written, [`Error::Mismatch`] when the file does not hold what
/// was meant.
pub fn write(source: &Source, format: Format, out: &Path) -> Result<Verified> {
    format.check(source, out)?;
    let images = random_images(source)?;
    let outputs = compute(source, &source.tensors, &images)?;
    let verify = |path: &Path| std::fs::read(path).map_err(Error::io("read back", out));
    let (tensors, difference) = if format == Format::Onnx {
        let augment = &source.augment;
        let graph = source.model.eval_graph(1, augment.image_size, DType::F32, source.heads)?;
        let file = onnx::encode(&graph, &source.tensors, &metadata(source, format))?;
        write_verified(
            out,
            |file_out| file_out.write_all(&file),
            |path| {
                let found = onnx::run(out, &verify(path)?, &images, source.origin.cpu_conv())?;
                Ok((graph.params.len(), largest_difference(out, &outputs, &found)?))
            },
        )?
    } else {
        let named: NamedTensors =
            source.tensors.iter().map(|(name, tensor)| (format.rename(name), tensor.clone())).collect();
        write_verified(
            out,
            |file_out| write_tensors(source, format, out, &named, file_out),
            |path| {
                let mut found = format.read(out, verify(path)?)?;
                if found != named {
                    let what = format!("{}: reading the export back gave other tensors", out.display());
                    return Err(Error::Mismatch(what));
                }
                let back = |name: &String| Some((name.clone(), found.remove(&format.rename(name))?));
                let back: NamedTensors = source.tensors.keys().filter_map(back).collect();
                Ok((named.len(), largest_difference(out, &outputs, &compute(source, &back, &images)?)?))
            },
        )?
    };
    let outputs = outputs.into_iter().chain([("input".to_string(), images)]).collect();
    Ok(Verified { tensors, difference, outputs })
}

fn write_tensors(
    source: &Source,
    format: Format,
    out: &Path,
    named: &NamedTensors,
    file: &mut dyn Write,
) -> io::Result<()> {
    match format {
        Format::Detectron2 => detectron2::write(named, file),
        Format::Torchvision | Format::Timm if is_torch(out) => torch::write(named, file),
        _ => safetensors::write_to(file, named, &metadata(source, format)),
    }
}

/// The facts that travel in the file.
fn metadata(source: &Source, format: Format) -> BTreeMap<String, String> {
    let mut metadata = facts::metadata(source);
    if format != Format::Onnx {
        metadata.insert("format".into(), "pt".into()); // what Python loaders look for
    }
    if format == Format::Timm {
        metadata.insert("pretrained_cfg".into(), pretrained_cfg(source).to_string());
    }
    metadata
}

/// What timm's models say of their weights, under timm's names.
fn pretrained_cfg(source: &Source) -> serde_json::Value {
    let augment = &source.augment;
    let decimals = |values: [f32; 3]| values.map(|value| value.to_string().parse::<f64>().unwrap_or(value.into()));
    serde_json::json!({
        "architecture": source.model.backbone.arch().to_string(),
        "num_classes": 0,
        "input_size": [3, augment.image_size, augment.image_size],
        "mean": decimals(augment.mean),
        "std": decimals(augment.std),
        "first_conv": "conv1",
        "classifier": "fc",
    })
}

/// Normalised noise `[n][h][w][3]`, each image with a colour of its own: noise alone averages out to much the same features.
fn random_images(source: &Source) -> Result<HostTensor> {
    let size = source.augment.image_size;
    let mut stream = Stream::new(0, IMAGE_DOMAIN, 0);
    let mut values = Vec::with_capacity(IMAGES * size * size * 3);
    for _ in 0..IMAGES {
        let colour = [(); 3].map(|()| 2.0 * stream.normal());
        values.extend((0..size * size * 3).map(|i| (colour[i % 3] + stream.normal()) as f32));
    }
    HostTensor::from_f32([IMAGES, size, size, 3], &values)
}

/// What the engine makes of images with `tensors`, which have `state_dict` names.
fn compute(source: &Source, tensors: &NamedTensors, images: &HostTensor) -> Result<NamedTensors> {
    let model = &source.model;
    let graph = model.eval_graph(IMAGES, source.augment.image_size, DType::F32, source.heads)?;
    let mut exec = CpuExecutor::new(graph.tape, source.origin.cpu_conv())?;
    write_params(&mut exec, &graph.params, |name, expected: &TensorDesc| {
        tensors.get(name).cloned().ok_or_else(|| Error::shape("load", name, expected, "no such tensor"))
    })?;
    exec.write(graph.images, images.bytes())?;
    exec.run_step()?;
    graph.outputs.iter().map(|(name, value)| Ok((name.to_string(), exec.read(*value)?))).collect()
}

/// The largest difference between outputs, relative to the largest value of each.
fn largest_difference(out: &Path, expected: &NamedTensors, found: &NamedTensors) -> Result<f64> {
    let mut largest = 0f64;
    for (name, expected) in expected {
        let fault = |what: String| Error::Mismatch(format!("{}: {name} {what}", out.display()));
        let found = found.get(name).filter(|found| found.desc() == expected.desc());
        let found = found.ok_or_else(|| fault("of the export is missing or of another shape".into()))?.to_f64();
        let expected = expected.to_f64();
        let scale = expected.iter().fold(0f64, |scale, value| scale.max(value.abs())).max(f64::MIN_POSITIVE);
        for (a, b) in expected.iter().zip(&found) {
            let difference = (a - b).abs() / scale;
            if difference.is_nan() || difference > TOLERANCE {
                return Err(fault(format!("should be {a}, the export gives {b}")));
            }
            largest = largest.max(difference);
        }
    }
    Ok(largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element type that weights have, scalars, empty tensors, NaN.
    pub(super) fn awkward_tensors() -> NamedTensors {
        let counter = HostTensor::from_bytes(TensorDesc::new([], DType::I64), (-6_i64).to_le_bytes().to_vec()).unwrap();
        let double = HostTensor::from_bytes(TensorDesc::new([1, 2], DType::F64), (0..16).collect()).unwrap();
        let named = [
            ("a.weight", HostTensor::from_f32([2, 1, 1, 3], &[1.0, -0.0, 3.0, 4.0, f32::NAN, 6.0]).unwrap()),
            ("b.counter", counter),
            ("b.empty", HostTensor::from_f32([0, 5], &[]).unwrap()),
            ("c.größe", double),
        ];
        named.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect()
    }

    #[test]
    fn a_difference_or_a_nan_is_an_error() {
        let outputs = |values: &[f32]| -> NamedTensors {
            [("features".to_string(), HostTensor::from_f32([values.len()], values).unwrap())].into()
        };
        let compare = |a: &[f32], b: &[f32]| largest_difference(Path::new("x.pth"), &outputs(a), &outputs(b));
        let near = compare(&[4.0, 1.0], &[4.0, 1.000_01]).unwrap();
        assert!((near - 2.5e-6).abs() < 1e-7, "{near}");
        let far = compare(&[4.0, 1.0], &[4.0, 1.001]).unwrap_err().to_string();
        assert!(far.starts_with("x.pth: features should be 1, the export gives 1.001"), "{far}");
        assert!(compare(&[f32::NAN], &[f32::NAN]).is_err());
        assert!(compare(&[1.0, 2.0], &[1.0]).unwrap_err().to_string().contains("another shape"));
    }

    #[test]
    fn names_of_files_decide_how_they_are_written() {
        for (name, torch) in [("a.pth", true), ("a.PT", true), ("a.pth.tar", true), ("a.tar", false), ("pth", false)] {
            assert_eq!(is_torch(Path::new(name)), torch, "{name}");
        }
        for (format, name, hint) in [
            (Format::Torchvision, "a.onnx", "add --to onnx"),
            (Format::Timm, "a.pkl", "add --to detectron2"),
            (Format::Safetensors, "a.pth.tar", "leave out --to, or name another file"),
            (Format::Detectron2, "a.pth", "leave out --to, or name another file"),
            (Format::Onnx, "a", "name another file"),
        ] {
            let message = format.check_name(Path::new(name)).unwrap_err().to_string();
            assert!(message.starts_with("OUT: a file for --to") && message.ends_with(hint), "{message}");
        }
        let fine = [
            (Format::Torchvision, "a"),
            (Format::Timm, "a.pth"),
            (Format::Safetensors, "a.bin"),
            (Format::Detectron2, "A.PKL"),
            (Format::Onnx, "a.b.onnx"),
        ];
        assert!(fine.iter().all(|(format, name)| format.check_name(Path::new(name)).is_ok()));
    }
}
