//! The network as an ONNX graph, translated from the tape of its forward pass; and such a graph run by the engine's own ops.

mod proto;
mod run;

use std::any::Any;
use std::collections::{BTreeMap, HashMap};

use prost::Message;

use crate::error::{Error, Result};
use crate::graph::{Node, Tape, ValueId};
use crate::nn::simsiam::EvalGraph;
use crate::ops::batch_norm::BatchNormEval;
use crate::ops::conv2d::Conv2d;
use crate::ops::linear::Linear;
use crate::ops::pool::{GlobalAvgPool, MaxPool};
use crate::ops::relu::Relu;
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, HostTensor};
use proto::Attribute;

pub use run::run;

/// Version of the operators: all that are used have been as they are since 15.
pub const OPSET: i64 = 17;
/// Version of the file format that came with them.
const IR_VERSION: i64 = 8;
/// The one input.
pub const INPUT: &str = "images";
/// Name of the dimension that is free.
const BATCH: &str = "batch";
/// What a message of protobuf can hold.
const MAX_BYTES: usize = i32::MAX as usize;

/// The bytes of an ONNX file that computes what `graph` does, in float32: input `images` `[batch][3][h][w]`, the graph's outputs
/// under their names. Weights keep the names of `tensors`, in PyTorch's layouts. The bytes follow from the arguments alone.
///
/// # Errors
/// [`Error::Unsupported`] for ops without a counterpart and for networks of 2 GB, [`Error::Shape`] for tensors that are missing.
pub fn encode(graph: &EvalGraph, tensors: &NamedTensors, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut names: HashMap<ValueId, String> = HashMap::new();
    names.insert(graph.images, INPUT.into());
    names.extend(graph.params.iter().map(|param| (param.value, param.name.clone())));
    names.extend(graph.outputs.iter().map(|(name, value)| (*value, name.to_string())));
    let mut translation = Translation { tape: &graph.tape, names, nodes: Vec::new(), weights: BTreeMap::new() };
    graph.tape.nodes().iter().try_for_each(|node| translation.translate(node))?;
    let Translation { nodes, weights, .. } = translation;

    let [_, h, w, c] = graph.tape.desc(graph.images).shape.expect("onnx", INPUT)?;
    let outputs = graph.outputs.iter();
    let encoded = proto::Graph {
        node: nodes,
        name: "simsiam".into(),
        initializer: weights.into_iter().map(|(name, weight)| weight.tensor(name, tensors)).collect::<Result<_>>()?,
        input: vec![value_info(INPUT, &[c, h, w])],
        output: outputs.map(|(name, value)| value_info(name, &[graph.tape.desc(*value).shape.channels()])).collect(),
    };
    let entry = |(key, value): (&String, &String)| proto::Entry { key: key.clone(), value: value.clone() };
    let model = proto::Model {
        ir_version: IR_VERSION,
        producer_name: env!("CARGO_PKG_NAME").into(),
        graph: Some(encoded),
        opset_import: vec![proto::OperatorSet { domain: String::new(), version: OPSET }],
        metadata_props: metadata.iter().map(entry).collect(),
    };
    match model.encoded_len() {
        0..=MAX_BYTES => Ok(model.encode_to_vec()),
        bytes => Err(Error::Unsupported {
            what: format!("an ONNX file ends at {MAX_BYTES} bytes, this network takes {bytes}"),
            hint: Some("use --to safetensors".into()),
        }),
    }
}

/// A float32 value `[batch, dims...]`.
fn value_info(name: &str, dims: &[usize]) -> proto::ValueInfo {
    let batch = proto::Dimension { dim_value: None, dim_param: Some(BATCH.into()) };
    let fixed = dims.iter().map(|&dim| proto::Dimension { dim_value: Some(dim as i64), dim_param: None });
    let shape = proto::TensorShape { dim: std::iter::once(batch).chain(fixed).collect() };
    let kind = proto::TensorType { elem_type: proto::FLOAT, shape: Some(shape) };
    proto::ValueInfo { name: name.into(), kind: Some(proto::Type { tensor_type: Some(kind) }) }
}

/// Where an initializer comes from.
enum Weight {
    /// The tensors.
    Stored,
    /// A vector of one value: the gamma or beta of a batch norm that has none, which ONNX does not know.
    Constant { value: f32, len: usize },
}

impl Weight {
    fn tensor(self, name: String, tensors: &NamedTensors) -> Result<proto::Tensor> {
        let made;
        let tensor = match self {
            Weight::Stored => {
                tensors.get(&name).ok_or_else(|| Error::shape("onnx", &name, "a tensor", "none of this name"))?
            }
            Weight::Constant { value, len } => {
                made = HostTensor::from_f32([len], &vec![value; len])?;
                &made
            }
        };
        if tensor.desc().dtype != DType::F32 {
            return Err(Error::shape("onnx", &name, DType::F32, tensor.desc().dtype));
        }
        let dims = tensor.desc().shape.dims().iter().map(|&dim| dim as i64).collect();
        Ok(proto::Tensor { dims, data_type: proto::FLOAT, name, raw_data: tensor.bytes().to_vec() })
    }
}

/// A node to be: its operator, what it reads, its settings.
type Step = (&'static str, Vec<String>, Vec<Attribute>);

/// A tape on its way into a graph.
struct Translation<'a> {
    tape: &'a Tape,
    names: HashMap<ValueId, String>,
    nodes: Vec<proto::Node>,
    weights: BTreeMap<String, Weight>,
}

impl Translation<'_> {
    fn translate(&mut self, node: &Node) -> Result<()> {
        let op: &dyn Any = &*node.op;
        let reads = self.reads(&node.inputs)?;
        let steps = if let Some(Conv2d { stride, padding, .. }) = op.downcast_ref() {
            let [_, kh, kw, _] = self.tape.desc(node.inputs[1]).shape.expect("onnx", "convolution's weight")?;
            vec![("Conv", reads, window([kh, kw], *stride, *padding))]
        } else if let Some(norm) = op.downcast_ref() {
            self.batch_norm(node, norm, reads)
        } else if let Some(Linear) = op.downcast_ref() {
            vec![("Gemm", reads, vec![Attribute::int("transB", 1)])]
        } else if let Some(Relu) = op.downcast_ref() {
            vec![("Relu", reads, vec![])]
        } else if let Some(MaxPool { kernel, stride, padding, .. }) = op.downcast_ref() {
            vec![("MaxPool", reads, window([*kernel; 2], [*stride; 2], [*padding; 2]))]
        } else if let Some(GlobalAvgPool) = op.downcast_ref() {
            vec![("GlobalAveragePool", reads, vec![]), ("Flatten", vec![], vec![Attribute::int("axis", 1)])]
        } else {
            return Err(Error::Unsupported {
                what: format!("{}: the op {} has no counterpart in ONNX here", node.name, node.op.name()),
                hint: None,
            });
        };
        self.chain(node, steps);
        Ok(())
    }

    /// Normalise, then add the residual, then ReLU; ONNX has no fused form.
    fn batch_norm(&mut self, node: &Node, norm: &BatchNormEval, reads: Vec<String>) -> Vec<Step> {
        let channels = self.tape.desc(node.inputs[0]).shape.channels();
        let (statistics, rest) = reads.split_at(3);
        let (affine, residual) = rest.split_at(if norm.fusion.affine { 2 } else { 0 });
        let affine = match affine {
            [] => [("weight", 1.0), ("bias", 0.0)].map(|(kind, value)| {
                let name = format!("{}.{kind}", node.name);
                self.weights.insert(name.clone(), Weight::Constant { value, len: channels });
                name
            }),
            _ => [affine[0].clone(), affine[1].clone()],
        };
        let inputs = [&statistics[..1], &affine, &statistics[1..]].concat();
        let mut steps = vec![("BatchNormalization", inputs, vec![Attribute::float("epsilon", norm.eps)])];
        if norm.fusion.residual {
            steps.push(("Add", residual.to_vec(), vec![]));
        }
        if norm.fusion.relu {
            steps.push(("Relu", vec![], vec![]));
        }
        steps
    }

    /// Appends nodes, each of which reads first what the one before it made. The last one makes the output of `node`.
    fn chain(&mut self, node: &Node, steps: Vec<Step>) {
        let last = steps.len() - 1;
        let mut made: Option<String> = None;
        for (i, (op, reads, attribute)) in steps.into_iter().enumerate() {
            let name = if i == 0 { node.name.clone() } else { format!("{}.{}", node.name, op.to_lowercase()) };
            let output = match self.names.get(&node.outputs[0]) {
                Some(output) if i == last => output.clone(),
                _ => name.clone(),
            };
            let input = made.into_iter().chain(reads).collect();
            self.nodes.push(proto::Node { input, output: vec![output.clone()], name, op_type: op.into(), attribute });
            made = Some(output);
        }
        self.names.extend(made.map(|output| (node.outputs[0], output)));
    }

    /// The names of values, noting which are weights.
    fn reads(&mut self, values: &[ValueId]) -> Result<Vec<String>> {
        let mut read = |value: &ValueId| {
            let name = self.names.get(value).cloned().ok_or_else(|| {
                Error::shape("onnx", &self.tape.value(*value).name, "a value that was made before it is read", "none")
            })?;
            if self.tape.value(*value).role.persistent() && name != INPUT {
                self.weights.insert(name.clone(), Weight::Stored);
            }
            Ok(name)
        };
        values.iter().map(&mut read).collect()
    }
}

/// The settings of a sliding window.
fn window(kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]) -> Vec<Attribute> {
    let pads = [padding, padding].concat();
    vec![Attribute::ints("kernel_shape", &kernel), Attribute::ints("strides", &stride), Attribute::ints("pads", &pads)]
}
