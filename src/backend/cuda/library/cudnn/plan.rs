//! Engines for an operation graph: which may be taken, and how one runs.
#![allow(unsafe_code)] // runs plans

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};

use super::super::super::DevicePtr;
use super::constants::{self as c, attribute, descriptor, heuristics, kind, numerical_note};
use super::descriptor::Descriptor;
use super::graph::{Graph, Tensor};
use super::{Opaque, Target};

/// How many sets of pointers a plan keeps as cuDNN takes them: two copies of the inputs times two views.
const PACKS: usize = 4;
/// More than any engine has of notes and knobs.
const MANY: usize = 64;

/// Notes of engines that are never taken: bits that differ from run to run, and roundings that the data's type does not ask
/// for.
const EXCLUDED: [i32; 5] = [
    numerical_note::NONDETERMINISTIC,
    numerical_note::DOWN_CONVERT_INPUTS,
    numerical_note::REDUCED_PRECISION_REDUCTION,
    numerical_note::FFT,
    numerical_note::WINOGRAD,
];

/// What a plan must keep to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of workspace.
    pub workspace: usize,
    /// Whether tensor cores may be used. On float32 they round their operands to TF32; cuDNN has no other word for it.
    pub tensor_cores: bool,
}

/// What tells an engine with its settings from all others, for one graph on one device with one version of cuDNN.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Engine {
    /// Its number.
    pub index: i64,
    /// Type and value of each knob.
    pub knobs: Vec<[i64; 2]>,
}

/// An engine that can run the graph.
#[derive(Debug)]
pub struct Plan {
    descriptor: Descriptor,
    /// The pointers that it ran on last: most plans run on the same ones again and again.
    packed: Mutex<Vec<Packed>>,
    target: Target,
    /// The engine and its settings.
    pub engine: Engine,
    /// Bytes of workspace that it takes.
    pub workspace: usize,
    /// Whether it uses tensor cores.
    pub tensor_cores: bool,
    /// Whether its kernel was compiled just now.
    pub compiled: bool,
}

/// Pointers as cuDNN takes them.
#[derive(Debug)]
struct Packed {
    tensors: Vec<(Tensor, DevicePtr)>,
    workspace: DevicePtr,
    pack: Descriptor,
}

/// An engine that the heuristics name.
struct Candidate {
    config: Arc<Descriptor>,
    engine: Engine,
    notes: Vec<i32>,
    compiled: bool,
}

impl Candidate {
    fn tensor_cores(&self) -> bool {
        self.notes.contains(&numerical_note::TENSOR_CORE)
    }

    fn admissible(&self, limits: Limits) -> bool {
        !self.notes.iter().any(|note| EXCLUDED.contains(note)) && (limits.tensor_cores || !self.tensor_cores())
    }
}

impl Graph {
    /// Up to `most` plans within `limits`, best first as cuDNN ranks them; but those without tensor cores come last where
    /// tensor cores are allowed: cuDNN ranks a few of those first that want little workspace, and they are many times slower.
    /// Engines that have to be compiled are tried only when there are no others. Empty when there is none.
    ///
    /// # Errors
    /// A graph that cuDNN cannot rank engines for.
    pub fn plans(&self, limits: Limits, most: usize) -> Result<Vec<Plan>> {
        for mode in [heuristics::MODE_A, heuristics::MODE_B, heuristics::MODE_FALLBACK] {
            let mut candidates = self.candidates(mode)?;
            candidates.retain(|candidate| candidate.admissible(limits));
            candidates.sort_by_key(|candidate| (candidate.compiled, !candidate.tensor_cores()));
            let mut plans: Vec<Plan> = vec![];
            for candidate in &candidates {
                let enough = plans.len() == most || candidate.compiled && plans.iter().any(|plan| !plan.compiled);
                if enough {
                    break;
                }
                // An engine whose plan cannot be made does not support the graph: that is what making it finds out.
                plans.extend(self.plan(candidate).ok().filter(|plan| plan.workspace <= limits.workspace));
            }
            if !plans.is_empty() {
                return Ok(plans);
            }
        }
        Ok(vec![])
    }

    /// The plan for an engine that was chosen before; none when it is not named any more.
    ///
    /// # Errors
    /// As [`Graph::plans`].
    pub fn plan_of(&self, engine: &Engine, limits: Limits) -> Result<Option<Plan>> {
        for mode in [heuristics::MODE_A, heuristics::MODE_B, heuristics::MODE_FALLBACK] {
            let candidates = self.candidates(mode)?;
            let chosen = candidates.iter().find(|one| one.engine == *engine && one.admissible(limits));
            if let Some(candidate) = chosen {
                return Ok(self.plan(candidate).ok().filter(|plan| plan.workspace <= limits.workspace));
            }
        }
        Ok(None)
    }

    /// The engines that cuDNN names, best first.
    fn candidates(&self, mode: i32) -> Result<Vec<Candidate>> {
        let ranking = Descriptor::new(self.descriptor.cudnn(), descriptor::ENGINEHEUR)?
            .refer(attribute::ENGINEHEUR_OPERATION_GRAPH, &[&self.descriptor])?
            .set(attribute::ENGINEHEUR_MODE, kind::HEUR_MODE, &[mode])?;
        let ranking = match &self.target {
            Target::Device(_) => ranking,
            Target::Described(device) => ranking.refer(attribute::ENGINEHEUR_DEVICEPROP, &[device])?,
        };
        // No engine is no fault, though cuDNN may say so by refusing to rank them.
        let Ok(ranking) = ranking.finish("rank engines") else { return Ok(vec![]) };
        let count = ranking.count_descriptors(attribute::ENGINEHEUR_RESULTS)?;
        let configs = ranking.get_descriptors(attribute::ENGINEHEUR_RESULTS, descriptor::ENGINECFG, count)?;
        configs.into_iter().map(|config| self.candidate(config)).collect()
    }

    fn candidate(&self, config: Descriptor) -> Result<Candidate> {
        let engines = config.get_descriptors(attribute::ENGINECFG_ENGINE, descriptor::ENGINE, 1)?;
        let message = "cuDNN named a configuration without an engine".to_string();
        let engine = engines.first().ok_or(Error::Internal { thread: "cuDNN".into(), message })?;
        let behavior: Vec<i32> = engine.get(attribute::ENGINE_BEHAVIOR_NOTE, kind::BEHAVIOR_NOTE, MANY)?;
        let knobs = config.get_descriptors(attribute::ENGINECFG_KNOB_CHOICES, descriptor::KNOB_CHOICE, MANY)?;
        let knobs = knobs.iter().map(|knob| {
            let kinds: Vec<i32> = knob.get(attribute::KNOB_CHOICE_KNOB_TYPE, kind::KNOB_TYPE, 1)?;
            Ok([kinds.first().map_or(-1, |&kind| kind.into()), knob.integer(attribute::KNOB_CHOICE_KNOB_VALUE)?])
        });
        Ok(Candidate {
            engine: Engine {
                index: engine.integer(attribute::ENGINE_GLOBAL_INDEX)?,
                knobs: knobs.collect::<Result<_>>()?,
            },
            notes: engine.get(attribute::ENGINE_NUMERICAL_NOTE, kind::NUMERICAL_NOTE, MANY)?,
            compiled: behavior.contains(&c::BEHAVIOR_NOTE_RUNTIME_COMPILATION),
            config: Arc::new(config.keep(&self.descriptor)),
        })
    }

    fn plan(&self, candidate: &Candidate) -> Result<Plan> {
        let plan = Descriptor::new(self.descriptor.cudnn(), descriptor::EXECUTION_PLAN)?
            .refer(attribute::EXECUTION_PLAN_ENGINE_CONFIG, &[&candidate.config])?;
        let plan = match &self.target {
            Target::Device(handle) => {
                plan.pointers(attribute::EXECUTION_PLAN_HANDLE, kind::HANDLE, &[*handle.raw()])?
            }
            Target::Described(_) => plan,
        };
        let plan = plan.finish("make a plan")?;
        let workspace = plan.integer(attribute::EXECUTION_PLAN_WORKSPACE_SIZE)?;
        Ok(Plan {
            workspace: usize::try_from(workspace).unwrap_or(usize::MAX),
            descriptor: plan,
            packed: Mutex::default(),
            target: self.target.clone(),
            engine: candidate.engine.clone(),
            tensor_cores: candidate.tensor_cores(),
            compiled: candidate.compiled,
        })
    }
}

impl Plan {
    /// Starts it on the stream of its target.
    ///
    /// # Errors
    /// [`Error::Internal`] for a plan of a device that is only described; what cuDNN refuses.
    ///
    /// # Safety
    /// The context of the device is that of this thread. Every tensor of the graph is given, with device memory of its size;
    /// the workspace has as many bytes as the plan says.
    pub unsafe fn run(&self, tensors: &[(Tensor, DevicePtr)], workspace: DevicePtr) -> Result<()> {
        let Target::Device(handle) = &self.target else {
            let message = "a plan for a described device was to be run".into();
            return Err(Error::Internal { thread: "cuDNN".into(), message });
        };
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let known = packed.iter().position(|old| old.tensors == tensors && old.workspace == workspace);
        let index = match known {
            Some(index) => index,
            None => {
                let new = self.pack(tensors, workspace)?;
                packed.truncate(PACKS - 1);
                packed.insert(0, new);
                0
            }
        };
        let pack = &packed[index].pack;
        let cudnn = self.descriptor.cudnn();
        let handle = handle.raw();
        // SAFETY: handle, plan and pack are alive and finished; the memory is the caller's promise.
        let status = unsafe { (cudnn.functions.cudnnBackendExecute)(*handle, self.descriptor.raw(), pack.raw()) };
        cudnn.check(status, &format!("run engine {}", self.engine.index))
    }

    fn pack(&self, tensors: &[(Tensor, DevicePtr)], workspace: DevicePtr) -> Result<Packed> {
        let pointer = |memory: DevicePtr| memory.0 as Opaque;
        let pointers: Vec<Opaque> = tensors.iter().map(|(_, memory)| pointer(*memory)).collect();
        let names: Vec<i64> = tensors.iter().map(|(tensor, _)| *tensor as i64).collect();
        let pack = Descriptor::new(self.descriptor.cudnn(), descriptor::VARIANT_PACK)?
            .pointers(attribute::VARIANT_PACK_DATA_POINTERS, kind::VOID_PTR, &pointers)?
            .set(attribute::VARIANT_PACK_UNIQUE_IDS, kind::INT64, &names)?
            .pointers(attribute::VARIANT_PACK_WORKSPACE, kind::VOID_PTR, &[pointer(workspace)])?
            .finish("pack pointers")?;
        Ok(Packed { tensors: tensors.to_vec(), workspace, pack })
    }
}
