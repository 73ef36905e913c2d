//! A file with weights, before anybody asks what network they belong to.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use super::pickle::{Id, TensorRef, Values, shown};
use super::torch::{self, TorchFile};
use super::{Format, OptimiserFacts, Origin};
use crate::error::{Error, Result};
use crate::tensor::safetensors::{self, NamedTensors};
use crate::tensor::{HostTensor, Shape};
use crate::train::checkpoint::{self, Checkpoint, Checkpoints};
use crate::train::run::CHECKPOINTS;
use crate::train::state::MOMENTUM;

/// Keys under which a `state_dict` lies in what training programs save.
const WRAPPERS: [&str; 5] = ["state_dict", "model", "model_state_dict", "module", "network"];
/// How deep they are nested at most.
const MAX_NESTING: usize = 3;
/// Groups of parameters, settings of a group, tensors for a parameter: an optimiser has fewer of each.
const MAX_SETTINGS: usize = 64;
/// Endings of what a `state_dict` holds besides parameters.
const BUFFERS: [&str; 3] = [".running_mean", ".running_var", ".num_batches_tracked"];

/// Tensors of a file under the file's own names.
#[derive(Debug)]
pub struct Foreign {
    /// The file.
    pub path: PathBuf,
    /// Its kind.
    pub format: Format,
    /// Name of the architecture, where the file says it.
    pub arch: Option<String>,
    /// What is known of the training.
    pub origin: Origin,
    /// Why an optimiser's state that is in the file was not understood.
    pub no_momenta: Option<String>,
    tensors: Tensors,
}

#[derive(Debug)]
enum Tensors {
    Here { tensors: NamedTensors, momenta: NamedTensors },
    Torch { file: Box<TorchFile>, tensors: Vec<(String, Id)>, momenta: HashMap<String, Id> },
}

/// Reads a file of any known kind; of a run directory the newest checkpoint.
///
/// # Errors
/// [`Error::Io`] when it cannot be read; [`Error::Format`] when it is cut, damaged, of no known kind or without tensors.
pub fn open(path: &Path) -> Result<Foreign> {
    if path.is_dir() {
        let folder = path.join(CHECKPOINTS);
        let latest = Checkpoints::new(&folder, 1)?.latest::<Origin>()?;
        let none =
            || Error::format(path, None, "a folder without checkpoints").with_hint("name a file, or a run directory");
        return latest.map(own).ok_or_else(none);
    }
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    read(path, bytes)
}

/// As [`open`], from a file in memory; `path` names it in errors.
///
/// # Errors
/// As [`open`].
pub fn read(path: &Path, bytes: Vec<u8>) -> Result<Foreign> {
    // A safetensors file begins with the length of its header, which may look like anything.
    if bytes.get(8) != Some(&b'{') && torch::is_torch(&bytes) {
        return interpret(path, torch::read(path, bytes)?);
    }
    let (tensors, metadata) = safetensors::read_bytes(path, &bytes).map_err(|error| match bytes.get(8) {
        Some(b'{') => error,
        _ => Error::format(path, Some(0), "neither a file of torch.save nor a safetensors file")
            .with_hint("import reads .pth, .pth.tar, .pt, .bin and .safetensors files, and checkpoints of this engine"),
    })?;
    if checkpoint::is_checkpoint(&metadata) {
        return Ok(own(checkpoint::verify(path, tensors, &metadata)?));
    }
    let arch = ["arch", "architecture"].iter().find_map(|key| metadata.get(*key)).cloned();
    let tensors = Tensors::Here { tensors, momenta: NamedTensors::new() };
    let (path, format) = (path.to_path_buf(), Format::Safetensors);
    Ok(Foreign { path, format, arch, origin: Origin::default(), no_momenta: None, tensors })
}

/// A checkpoint of this engine.
fn own(checkpoint: Checkpoint<Origin>) -> Foreign {
    let path = checkpoint.path().to_path_buf();
    let (origin, all) = checkpoint.into_parts();
    let (mut tensors, mut momenta) = (NamedTensors::new(), NamedTensors::new());
    for (name, tensor) in all {
        match name.strip_prefix(MOMENTUM) {
            Some(parameter) => momenta.insert(parameter.to_string(), tensor),
            None => tensors.insert(name, tensor),
        };
    }
    let tensors = Tensors::Here { tensors, momenta };
    Foreign { path, format: Format::Checkpoint, arch: None, origin, no_momenta: None, tensors }
}

/// Finds the `state_dict` and what stands beside it.
fn interpret(path: &Path, file: TorchFile) -> Result<Foreign> {
    let values = &file.values;
    let Some(dict) = state_dict(&file, file.root, 0) else {
        let what = format!("holds no state_dict: found {}", values.get(file.root).kind());
        let hint = format!("expected a dict of tensors by name, alone or under one of {}", WRAPPERS.join(", "));
        return Err(Error::format(path, None, what).with_hint(hint));
    };
    let mut tensors = Vec::new();
    let mut seen = HashMap::new();
    for (key, value) in values.entries(dict).unwrap_or_default() {
        let (Some(name), Some(_)) = (values.text(*key), file.tensor(*value)) else { continue };
        if seen.insert(name, ()).is_some() {
            return Err(Error::format(path, None, format!("the tensor {} is there twice", shown(name))));
        }
        tensors.push((name.to_string(), *value));
    }
    let get = |key: &str| values.lookup(file.root, key);
    let epoch = get("epoch").and_then(|id| u64::try_from(values.int(id)?).ok());
    let arch = get("arch").and_then(|id| values.text(id)).map(shown);
    let (mut momenta, mut no_momenta, mut optimiser) = (HashMap::new(), None, None);
    if let Some(state) = get("optimizer") {
        match read_optimiser(&file, state, &tensors) {
            Ok((facts, found)) => (optimiser, momenta) = (Some(facts), found),
            Err(reason) => no_momenta = Some(reason),
        }
    }
    let origin = Origin { step: 0, epoch, optimiser, imported: None };
    let (path, format) = (path.to_path_buf(), file.format);
    let tensors = Tensors::Torch { file: Box::new(file), tensors, momenta };
    Ok(Foreign { path, format, arch, origin, no_momenta, tensors })
}

/// The dict of tensors in `id`, which may be wrapped.
fn state_dict(file: &TorchFile, id: Id, depth: usize) -> Option<Id> {
    let entries = file.values.entries(id)?;
    if entries.iter().any(|(key, value)| file.values.text(*key).is_some() && file.tensor(*value).is_some()) {
        return Some(id);
    }
    if depth == MAX_NESTING {
        return None;
    }
    let wrapped = WRAPPERS.iter().filter_map(|key| file.values.lookup(id, key));
    wrapped.filter_map(|inner| state_dict(file, inner, depth + 1)).next()
}

/// The momenta of `torch.optim.SGD` by the names of their parameters, which the file does not say: PyTorch numbers parameters
/// in the order of the `state_dict`. Those that are never trained may be left out.
fn read_optimiser(
    file: &TorchFile,
    optimiser: Id,
    tensors: &[(String, Id)],
) -> Result<(OptimiserFacts, HashMap<String, Id>), String> {
    let values = &file.values;
    let groups = values.lookup(optimiser, "param_groups").and_then(|id| values.items(id)).unwrap_or_default();
    let states = values.lookup(optimiser, "state").and_then(|id| values.entries(id));
    let (Some(first), Some(states)) = (groups.first(), states) else {
        return Err("no param_groups or state in it".into());
    };
    let small = |id: Id| values.entries(id).is_none_or(|entries| entries.len() <= MAX_SETTINGS);
    if groups.len() > MAX_SETTINGS || !groups.iter().chain(states.iter().map(|(_, state)| state)).all(|id| small(*id)) {
        return Err("more settings than any optimiser has".into());
    }
    let setting = |group: Id, key: &str| values.lookup(group, key).and_then(|id| values.number(id));
    if groups.iter().any(|group| setting(*group, "dampening").is_some_and(|d| d != 0.0) || nesterov(values, *group)) {
        return Err("dampening or Nesterov momentum, which this engine does not have".into());
    }
    let states: HashMap<i64, Id> = states.iter().filter_map(|(key, state)| Some((values.int(*key)?, *state))).collect();
    let numbers = groups.iter().filter_map(|group| values.items(values.lookup(*group, "params")?)).flatten();
    // Each number must name one parameter, so a group that is repeated cannot make this long.
    let numbers: Vec<i64> = numbers.take(tensors.len() + 1).filter_map(|id| values.int(*id)).collect();
    let momentum = |number: &i64| {
        let momentum = values.lookup(*states.get(number)?, "momentum_buffer")?;
        file.tensor(momentum).map(|_| momentum)
    };
    let parameters = parameters_of(tensors, numbers.len())?;
    let mut momenta = HashMap::new();
    for ((name, parameter), number) in parameters.into_iter().zip(&numbers) {
        let Some(id) = momentum(number) else { continue };
        let (got, expected) = (file.tensor(id).map(|t| &t.shape), file.tensor(*parameter).map(|t| &t.shape));
        if got != expected {
            return Err(format!(
                "the order of the parameters is unknown: number {number} has not the shape of {}",
                shown(name)
            ));
        }
        momenta.insert(name.clone(), id);
    }
    if momenta.is_empty() {
        return Err("no momentum_buffer in it: not SGD with momentum, or saved before its first step".into());
    }
    let facts = OptimiserFacts {
        lr: groups.iter().filter_map(|group| setting(*group, "lr")).collect(),
        momentum: setting(*first, "momentum").unwrap_or(0.0),
        weight_decay: setting(*first, "weight_decay").unwrap_or(0.0),
    };
    Ok((facts, momenta))
}

fn nesterov(values: &Values, group: Id) -> bool {
    let nesterov = values.lookup(group, "nesterov").map(|id| values.get(id));
    matches!(nesterov, Some(super::pickle::Value::Bool(true)))
}

/// The parameters that an optimiser with `count` of them numbers: all, or all but the bias that the reference freezes.
fn parameters_of(tensors: &[(String, Id)], count: usize) -> Result<Vec<&(String, Id)>, String> {
    let is_parameter = |name: &str| !BUFFERS.iter().any(|ending| name.ends_with(ending));
    let mut all: Vec<_> = tensors.iter().filter(|(name, _)| is_parameter(name)).collect();
    if all.len() == count + 1 {
        all.retain(|(name, _)| !super::names::is_projector_out_bias(name));
    }
    match all.len() == count {
        true => Ok(all),
        false => Err(format!("it has {count} parameters, the state_dict {}", all.len())),
    }
}

impl Foreign {
    /// Names and shapes of the tensors: in the order of the file where that is of `torch.save`, else by name.
    pub fn tensors(&self) -> Vec<(&str, Shape)> {
        match &self.tensors {
            Tensors::Here { tensors, .. } => {
                tensors.iter().map(|(n, t)| (n.as_str(), t.desc().shape.clone())).collect()
            }
            Tensors::Torch { file, tensors, .. } => {
                let shape = |id: Id| file.tensor(id).map_or_else(|| Shape::from([]), |t| Shape::from(&t.shape[..]));
                tensors.iter().map(|(name, id)| (name.as_str(), shape(*id))).collect()
            }
        }
    }

    /// Whether there are momenta.
    pub fn has_momenta(&self) -> bool {
        match &self.tensors {
            Tensors::Here { momenta, .. } => !momenta.is_empty(),
            Tensors::Torch { momenta, .. } => !momenta.is_empty(),
        }
    }

    /// Whether a parameter has a momentum.
    pub fn has_momentum(&self, name: &str) -> bool {
        match &self.tensors {
            Tensors::Here { momenta, .. } => momenta.contains_key(name),
            Tensors::Torch { momenta, .. } => momenta.contains_key(name),
        }
    }

    /// Hands out the tensors' elements.
    pub(super) fn reader(&self) -> Reader<'_> {
        let by_name = match &self.tensors {
            Tensors::Here { .. } => HashMap::new(),
            Tensors::Torch { tensors, .. } => tensors.iter().map(|(name, id)| (name.as_str(), *id)).collect(),
        };
        Reader { foreign: self, by_name, taken: BTreeMap::new() }
    }
}

/// Reads each element of a file once at most: tensors that share memory many times over would take more than the file has.
pub(super) struct Reader<'a> {
    foreign: &'a Foreign,
    by_name: HashMap<&'a str, Id>,
    taken: BTreeMap<&'a str, usize>,
}

impl<'a> Reader<'a> {
    /// The tensor of a name.
    pub fn tensor(&mut self, name: &str) -> Result<Option<HostTensor>> {
        match &self.foreign.tensors {
            Tensors::Here { tensors, .. } => Ok(tensors.get(name).cloned()),
            Tensors::Torch { file, .. } => {
                self.by_name.get(name).copied().map(|id| self.elements(file, id)).transpose()
            }
        }
    }

    /// The momentum of the parameter of a name.
    pub fn momentum(&mut self, name: &str) -> Result<Option<HostTensor>> {
        match &self.foreign.tensors {
            Tensors::Here { momenta, .. } => Ok(momenta.get(name).cloned()),
            Tensors::Torch { file, momenta, .. } => {
                momenta.get(name).copied().map(|id| self.elements(file, id)).transpose()
            }
        }
    }

    fn elements(&mut self, file: &'a TorchFile, id: Id) -> Result<HostTensor> {
        let Some(tensor) = file.tensor(id) else {
            return Err(Error::format(&self.foreign.path, None, "a tensor that is none"));
        };
        let TensorRef { storage, shape, .. } = tensor;
        let taken = self.taken.entry(&storage.key).or_default();
        *taken += shape.iter().product::<usize>();
        if *taken > storage.len {
            let what =
                format!("tensors overlap: more elements than the {} of storage {}", storage.len, shown(&storage.key));
            return Err(Error::format(&self.foreign.path, None, what));
        }
        file.elements(tensor)
    }
}
