//! A file's tensors in the places of a network's parameters.

use std::collections::{BTreeMap, BTreeSet};

use super::foreign::{Foreign, Reader};
use super::names::{Names, is_backbone, is_projector_out_bias};
use super::network::{self, Network};
use super::pickle::shown;
use super::report::{Report, Skipped, WrongShape};
use crate::error::{Error, Result};
use crate::nn::ParamInfo;
use crate::nn::heads::OutBias;
use crate::nn::simsiam::SimSiam;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, HostTensor, Shape, TensorDesc};
use crate::train::state::MOMENTUM;
use crate::train::state::to_torch;

/// What a batch norm counts its steps in.
const COUNTER: &str = ".num_batches_tracked";

/// The tensors that fit, under the engine's names and in PyTorch's layout, as in a checkpoint: `momentum/<name>` the momenta.
/// Counters that the file does not have are 0.
#[derive(Debug)]
pub struct Weights {
    /// The tensors.
    pub tensors: NamedTensors,
    /// What was taken and what not.
    pub report: Report,
    /// The network that the file holds.
    pub network: Network,
}

/// What network a file holds, with its names sorted.
///
/// # Errors
/// [`Error::Format`] when there is no ResNet in it.
pub fn detect(foreign: &Foreign) -> Result<(Names, Network)> {
    let tensors = foreign.tensors();
    let none = |what: String| {
        Error::format(&foreign.path, None, what)
            .with_hint("expected torchvision's names, e.g. conv1.weight, layer1.0.conv1.weight")
    };
    let first: Vec<String> = tensors.iter().take(3).map(|(name, _)| shown(name)).collect();
    let found = Names::of(tensors.iter().map(|(name, _)| *name));
    let names = found.ok_or_else(|| {
        none(format!(
            "no ResNet among its {} tensors ({}{})",
            tensors.len(),
            first.join(", "),
            if tensors.len() > 3 { ", ..." } else { "" }
        ))
    })?;
    let all: BTreeMap<&str, Shape> = tensors.into_iter().collect();
    let shape_of = |theirs: &String| all.get(theirs.as_str()).cloned();
    let shapes = names.engine.iter().filter_map(|(ours, theirs)| Some((ours.as_str(), shape_of(theirs)?))).collect();
    let bias = names.engine.iter().find(|(ours, _)| is_projector_out_bias(ours));
    let trained_bias = bias.is_some_and(|(_, theirs)| foreign.has_momentum(theirs));
    let network = Network::detect(&shapes, trained_bias);
    let network = network.ok_or_else(|| none("its tensors do not make a ResNet of this engine".into()))?;
    Ok((names, network))
}

/// Fits a file to `expected`, or to the network that it holds. `backbone_only` leaves its heads and momenta out.
///
/// The bias that the reference keeps in front of the projector's last batch norm is expected when the file has it:
/// [`adopt_bias`] gives it to a model.
///
/// # Errors
/// [`Error::Format`] when there is no ResNet in the file, or values are not finite.
pub fn fit(foreign: &Foreign, expected: Option<&Network>, backbone_only: bool) -> Result<Weights> {
    let (mut names, network) = detect(foreign)?;
    if backbone_only {
        names.skip_heads();
    }
    let has_heads = names.engine.keys().any(|name| !is_backbone(name));
    let expected = expected.unwrap_or(&network);
    let mut params = network::graph(&expected.model())?.params;
    if expected.heads.is_none() {
        params.retain(|param| is_backbone(&param.name));
    }
    let mut fitting = Fitting::new(foreign, names, &network, expected);
    for param in params.iter().filter(|param| has_heads || is_backbone(&param.name)) {
        let taken = fitting.take(param)?;
        if let Some(theirs) = taken.filter(|_| !backbone_only && param.trainable) {
            fitting.take_momentum(param, &theirs)?;
        }
    }
    fitting.report.unexpected.extend(std::mem::take(&mut fitting.names.engine).into_values());
    if !has_heads {
        let heads = params.into_iter().filter(|param| !is_backbone(&param.name));
        fitting.report.missing.extend(heads.map(|param| param.name));
    }
    if fitting.report.momenta == 0 {
        fitting.report.optimiser = None;
    }
    Ok(Weights { tensors: fitting.tensors, report: fitting.report, network })
}

/// Gives `model` the bias in front of the projector's last batch norm if the file has one there: it changes no output, and so
/// no option asks for it.
///
/// # Errors
/// As [`detect`].
pub fn adopt_bias(foreign: &Foreign, model: &mut SimSiam) -> Result<()> {
    let (_, network) = detect(foreign)?;
    let bias = network.heads.map_or(OutBias::None, |heads| heads.projector_out_bias);
    model.heads.projector_out_bias = bias;
    Ok(())
}

/// All tensors that a run of `model` begins with: those of `weights`, and where it has none start values for `seed` and momenta
/// of zero; `momenta` says whether its own are taken.
///
/// # Errors
/// Settings of `model` that do not fit together.
pub fn complete(mut weights: NamedTensors, model: &SimSiam, seed: u64, momenta: bool) -> Result<NamedTensors> {
    let mut tensors = NamedTensors::new();
    let graph = network::graph(model)?;
    let trained: BTreeSet<String> = graph.momenta.into_iter().map(|(name, _)| name).collect();
    for param in graph.params {
        let name = format!("{MOMENTUM}{}", param.name);
        if trained.contains(&param.name) {
            let desc = TensorDesc { shape: param.torch_shape(), dtype: param.desc.dtype };
            let zeros = || HostTensor::from_bytes(desc.clone(), vec![0; desc.bytes()]);
            let taken = weights.remove(&name).filter(|_| momenta);
            tensors.insert(name, taken.map_or_else(zeros, Ok)?);
        }
        let tensor = match weights.remove(&param.name) {
            Some(tensor) => tensor,
            None => to_torch(param.initial(seed))?,
        };
        tensors.insert(param.name, tensor);
    }
    Ok(tensors)
}

struct Fitting<'a> {
    foreign: &'a Foreign,
    reader: Reader<'a>,
    names: Names,
    shapes: BTreeMap<String, Shape>,
    tensors: NamedTensors,
    report: Report,
}

impl<'a> Fitting<'a> {
    fn new(foreign: &'a Foreign, mut names: Names, network: &Network, expected: &Network) -> Fitting<'a> {
        let mut skipped: Vec<Skipped> = std::mem::take(&mut names.skipped)
            .into_iter()
            .map(|(name, reason)| Skipped { name, reason: reason.into() })
            .collect();
        if let Some(reason) = &foreign.no_momenta {
            skipped.push(Skipped { name: "optimizer".into(), reason: reason.clone() });
        }
        let report = Report {
            file: foreign.path.display().to_string(),
            format: foreign.format,
            network: expected.to_string(),
            options: network.options(),
            prefix: names.prefix.clone(),
            matched: 0,
            values: 0,
            momenta: 0,
            optimiser: foreign.origin.optimiser.clone(),
            epoch: foreign.origin.epoch,
            missing: Vec::new(),
            missing_counters: 0,
            unexpected: Vec::new(),
            wrong_shape: Vec::new(),
            skipped,
        };
        let shapes = foreign.tensors().into_iter().map(|(name, shape)| (name.to_string(), shape)).collect();
        Fitting { foreign, reader: foreign.reader(), names, shapes, tensors: NamedTensors::new(), report }
    }

    /// Takes the tensor of a parameter if the file has it in its shape; returns the file's name of it.
    fn take(&mut self, param: &ParamInfo) -> Result<Option<String>> {
        let counter = param.name.ends_with(COUNTER);
        let Some(theirs) = self.names.engine.remove(&param.name) else {
            match counter {
                true => {
                    self.report.missing_counters += 1;
                    let zero = HostTensor::from_bytes(param.desc.clone(), vec![0; param.desc.bytes()])?;
                    self.tensors.insert(param.name.clone(), zero);
                }
                false => self.report.missing.push(param.name.clone()),
            }
            return Ok(None);
        };
        let (expected, got) = (param.torch_shape(), self.shapes.get(&theirs));
        if got != Some(&expected) {
            let got = got.map_or_else(Vec::new, |got| got.dims().to_vec());
            self.report.wrong_shape.push(WrongShape { name: theirs, expected: expected.dims().to_vec(), got });
            return Ok(None);
        }
        let Some(tensor) = self.reader.tensor(&theirs)? else { return Ok(None) };
        let tensor = self.converted(tensor, param.desc.dtype, &theirs)?;
        self.report.matched += 1;
        self.report.values += if counter { 0 } else { expected.len() };
        self.tensors.insert(param.name.clone(), tensor);
        Ok(Some(theirs))
    }

    /// The momentum of a parameter that was taken.
    fn take_momentum(&mut self, param: &ParamInfo, theirs: &str) -> Result<()> {
        let Some(momentum) = self.reader.momentum(theirs)? else { return Ok(()) };
        if momentum.desc().shape != param.torch_shape() {
            let (expected, got) = (param.torch_shape(), &momentum.desc().shape);
            let what = format!("the momentum of {}: expected {expected}, got {got}", shown(theirs));
            return Err(Error::format(&self.foreign.path, None, what));
        }
        let momentum = self.converted(momentum, param.desc.dtype, theirs)?;
        self.report.momenta += 1;
        self.tensors.insert(format!("{MOMENTUM}{}", param.name), momentum);
        Ok(())
    }

    /// The same values as `dtype`.
    fn converted(&self, tensor: HostTensor, dtype: DType, name: &str) -> Result<HostTensor> {
        let desc = TensorDesc { shape: tensor.desc().shape.clone(), dtype };
        let converted = match tensor.desc().dtype == dtype {
            true => tensor,
            false => HostTensor::from_bytes(desc, dtype.encode(&tensor.to_f64()))?,
        };
        let finite = dtype != DType::F32 || converted.to_f32()?.iter().all(|value| value.is_finite());
        match finite {
            true => Ok(converted),
            false => Err(Error::format(&self.foreign.path, None, format!("{} is not finite everywhere", shown(name)))
                .with_hint("the training it comes from has diverged; take an earlier checkpoint")),
        }
    }
}
