//! An ONNX graph of [`super::encode`], read back and run on the CPU by the engine's ops: what the file says, not what was meant.

use std::collections::HashMap;
use std::path::Path;

use prost::Message;

use super::proto::{self, FLOAT};
use super::{INPUT, OPSET};
use crate::backend::cpu::Tier;
use crate::error::{Error, Result};
use crate::exec::{CpuExecutor, Executor};
use crate::graph::builtin::Add;
use crate::graph::{Role, Tape, ValueId};
use crate::nn::layout::oihw_to_krsc;
use crate::ops::batch_norm::{BatchNormEval, Fusion};
use crate::ops::conv2d::Conv2d;
use crate::ops::linear::Linear;
use crate::ops::pool::{GlobalAvgPool, MaxPool};
use crate::ops::relu::Relu;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, HostTensor, TensorDesc};

/// The outputs, by name, that the graph in `file` computes of `images` `[n][h][w][3]`; `path` names the file in errors.
///
/// # Errors
/// [`Error::Format`] when it is not an ONNX file of this module, faults of the ops.
pub fn run(path: &Path, file: &[u8], images: &HostTensor, tier: Tier) -> Result<NamedTensors> {
    let fault = |what: String| Error::format(path, None, what);
    let model = proto::Model::decode(file).map_err(|error| fault(format!("not an ONNX file: {error}")))?;
    if !model.opset_import.iter().any(|set| set.domain.is_empty() && set.version == OPSET) {
        return Err(fault(format!("expected operators of version {OPSET}, got {:?}", model.opset_import)));
    }
    let graph = model.graph.ok_or_else(|| fault("there is no graph in it".into()))?;
    check_input(&graph, images).map_err(fault)?;

    let mut recording = Recording { tape: Tape::new(), values: HashMap::new() };
    recording.leaf(INPUT, images.desc().clone(), Role::Input);
    let mut weights = Vec::new();
    for tensor in graph.initializer {
        let (name, weight) = weight(tensor).map_err(fault)?;
        let value = recording.leaf(&name, weight.desc().clone(), Role::Parameter);
        weights.push((value, weight));
    }
    for node in &graph.node {
        let output = recording.node(node).map_err(|error| fault(format!("node {}: {error}", node.name)))?;
        let [name] = node.output.as_slice() else { return Err(fault(format!("node {}: one output", node.name))) };
        if recording.values.insert(name.clone(), output).is_some() {
            return Err(fault(format!("{name} is made twice")));
        }
    }
    let outputs: Vec<(String, ValueId)> = graph
        .output
        .into_iter()
        .map(|info| Ok((info.name.clone(), recording.value(&info.name)?)))
        .collect::<Result<_>>()?;
    outputs.iter().for_each(|(_, value)| _ = recording.tape.keep(*value));
    let input = recording.value(INPUT)?;

    let mut exec = CpuExecutor::new(recording.tape, tier)?;
    weights.iter().try_for_each(|(value, weight)| exec.write(*value, weight.bytes()))?;
    exec.write(input, images.bytes())?;
    exec.run_step()?;
    outputs.into_iter().map(|(name, value)| Ok((name, exec.read(value)?))).collect()
}

/// Whether the graph's one input takes `images`: `[batch][3][h][w]` of float32.
fn check_input(graph: &proto::Graph, images: &HostTensor) -> Result<(), String> {
    let [proto::ValueInfo { name, kind: Some(proto::Type { tensor_type: Some(kind) }) }] = graph.input.as_slice()
    else {
        return Err("expected one input, a tensor".into());
    };
    let dims: Vec<Option<i64>> = kind.shape.iter().flat_map(|shape| &shape.dim).map(|dim| dim.dim_value).collect();
    let expected = match *images.desc().shape.dims() {
        [_, h, w, c] => vec![None, Some(c as i64), Some(h as i64), Some(w as i64)],
        _ => vec![],
    };
    if name != INPUT || kind.elem_type != FLOAT || dims != expected {
        return Err(format!("input {name}: expected {INPUT} of float32 {expected:?}, got {dims:?}"));
    }
    Ok(())
}

/// An initializer in the engine's layout.
fn weight(tensor: proto::Tensor) -> Result<(String, HostTensor), String> {
    let proto::Tensor { dims, data_type, name, raw_data } = tensor;
    if data_type != FLOAT {
        return Err(format!("{name}: expected float32, got type {data_type}"));
    }
    let dims: Vec<usize> = dims.into_iter().map(|dim| dim as usize).collect();
    let weight = HostTensor::from_bytes(TensorDesc::new(dims.as_slice(), DType::F32), raw_data);
    let weight = weight.and_then(|weight| if dims.len() == 4 { oihw_to_krsc(&weight) } else { Ok(weight) });
    Ok((name, weight.map_err(|error| error.to_string())?))
}

/// A graph on its way onto a tape. Images are NHWC there, so that a value `[n][c][1][1]` is `[n][c]` already.
struct Recording {
    tape: Tape,
    values: HashMap<String, ValueId>,
}

impl Recording {
    fn leaf(&mut self, name: &str, desc: TensorDesc, role: Role) -> ValueId {
        let value = self.tape.leaf(name, desc, role, false);
        self.values.insert(name.into(), value);
        value
    }

    fn value(&self, name: &str) -> Result<ValueId> {
        let value = self.values.get(name).copied();
        value.ok_or_else(|| Error::shape("onnx", name, "a value that was made before it is read", "none"))
    }

    fn node(&mut self, node: &proto::Node) -> Result<ValueId> {
        let mut inputs: Vec<ValueId> = node.input.iter().map(|name| self.value(name)).collect::<Result<_>>()?;
        let settings = Settings { node };
        let Recording { tape, .. } = self;
        match (node.op_type.as_str(), inputs.len()) {
            ("Conv", 2) => {
                let [_, kh, kw, _] = tape.desc(inputs[1]).shape.expect("Conv", "weight")?;
                let [kernel, stride, padding] = settings.window()?;
                if kernel != [kh, kw] {
                    return Err(Error::shape("Conv", "kernel_shape", format!("{:?}", [kh, kw]), format!("{kernel:?}")));
                }
                tape.record_one(Conv2d::new(stride, padding), &inputs)
            }
            ("MaxPool", 1) => {
                let [kernel, stride, padding] = settings.window()?.map(|[vertical, _]| vertical);
                tape.record_one(MaxPool { kernel, stride, padding, taken: false }, &inputs)
            }
            ("BatchNormalization", 5) => {
                let fusion = Fusion { affine: true, residual: false, relu: false };
                let eps = settings.epsilon()?;
                inputs[1..].rotate_left(2); // from scale, bias, mean, variance
                tape.record_one(BatchNormEval { eps, fusion }, &inputs)
            }
            ("Gemm", 2 | 3) if settings.int("transB") == Some(1) => tape.record_one(Linear, &inputs),
            ("Add", 2) => tape.record_one(Add, &inputs),
            ("Relu", 1) => tape.record_one(Relu, &inputs),
            ("GlobalAveragePool", 1) => tape.record_one(GlobalAvgPool, &inputs),
            ("Flatten", 1) if tape.desc(inputs[0]).shape.rank() == 2 => Ok(inputs[0]),
            (op, count) => Err(Error::Unsupported {
                what: format!("an operator {op} of {count} inputs with these settings is not what is written"),
                hint: None,
            }),
        }
    }
}

/// The attributes of a node.
struct Settings<'a> {
    node: &'a proto::Node,
}

impl Settings<'_> {
    fn find(&self, name: &str) -> Option<&proto::Attribute> {
        self.node.attribute.iter().find(|attribute| attribute.name == name)
    }

    fn int(&self, name: &str) -> Option<i64> {
        self.find(name)?.i
    }

    fn epsilon(&self) -> Result<f64> {
        let value = self.find("epsilon").and_then(|attribute| attribute.f);
        // The shortest decimal: 1e-5 is meant, not the float32 next to it.
        let value = value.and_then(|value| value.to_string().parse().ok());
        value.ok_or_else(|| Error::shape(&self.node.op_type, "epsilon", "a number", "none"))
    }

    /// Kernel, stride and padding, vertical and horizontal.
    fn window(&self) -> Result<[[usize; 2]; 3]> {
        let ints = |name: &str| self.find(name).map_or(&[][..], |attribute| &attribute.ints);
        match (ints("kernel_shape"), ints("strides"), ints("pads")) {
            (&[kh, kw], &[sh, sw], &[top, left, bottom, right]) if top == bottom && left == right => {
                Ok([[kh, kw], [sh, sw], [top, left]].map(|pair| pair.map(|value| value as usize)))
            }
            other => Err(Error::shape(
                &self.node.op_type,
                "window",
                "2 sizes, 2 strides, 4 equal pads",
                format!("{other:?}"),
            )),
        }
    }
}
