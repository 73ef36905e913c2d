//! Two executors in lockstep: which node is the first whose results differ?

use std::fmt::{self, Display};

use crate::error::{Error, Result};
use crate::exec::Executor;
use crate::graph::ValueId;
use crate::tensor::{DType, HostTensor};

/// A result that is so small a part of what it was made of, or smaller, is judged by that: sums that cancel leave rounding
/// errors only, such as the mean of what has none.
const CANCELLED: f64 = 0.05;

/// A node whose results differ by more than is allowed.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// The node's name and op.
    pub node: String,
    /// The value that differs.
    pub value: String,
    /// Norm of the difference, relative to that of the reference.
    pub error: f64,
    /// What is allowed.
    pub tolerance: f64,
}

impl Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Divergence { node, value, error, tolerance } = self;
        write!(f, "{node} is the first node that diverges: {value} is off by {error:.2e}, allowed {tolerance:.2e}")
    }
}

/// What a comparison found.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Nodes that agree.
    pub nodes: usize,
    /// The largest relative error among them, and the node that made it.
    pub worst: (f64, String),
    /// The first node that does not agree, if there is one.
    pub divergence: Option<Divergence>,
}

/// Runs a step of the same tape on both, node by node. After each node `other` takes over the results of `reference`, so that
/// every node is judged alone. Both must have been given the same inputs and parameters.
///
/// # Errors
/// [`Error::Mismatch`] when the tapes are not the same; faults of the executors.
pub fn compare(reference: &mut dyn Executor, other: &mut dyn Executor, tolerance: f64) -> Result<Comparison> {
    check_tapes(reference, other)?;
    let mut found = Comparison { nodes: 0, worst: (0.0, String::new()), divergence: None };
    for index in 0..reference.tape().nodes().len() {
        let terms = terms(reference, index)?;
        reference.run_node(index)?;
        other.run_node(index)?;
        let node = &reference.tape().nodes()[index];
        let name = format!("{} ({})", node.name, node.op.name());
        let values: Vec<ValueId> = node.outputs.iter().chain(&node.updates).copied().collect();
        for value in values {
            let (expected, got) = (reference.peek(value)?, other.peek(value)?);
            // Of bytes there are masks, which a result that was just compared decides.
            let judged = expected.desc().dtype != DType::U8;
            let error = if judged { relative_error(&expected, &got, terms) } else { 0.0 };
            if error > tolerance || error.is_nan() {
                let value = reference.tape().value(value).name.clone();
                found.divergence = Some(Divergence { node: name, value, error, tolerance });
                return Ok(found);
            }
            if error > found.worst.0 {
                found.worst = (error, name.clone());
            }
            other.poke(value, expected.bytes())?;
        }
        found.nodes += 1;
    }
    Ok(found)
}

fn check_tapes(a: &dyn Executor, b: &dyn Executor) -> Result<()> {
    let (a, b) = (a.tape(), b.tape());
    let alike = a.nodes().len() == b.nodes().len()
        && a.nodes().iter().zip(b.nodes()).all(|(a, b)| a.name == b.name && a.outputs == b.outputs)
        && a.values().iter().zip(b.values()).all(|(a, b)| a.desc == b.desc);
    match alike {
        true => Ok(()),
        false => Err(Error::Mismatch("two executors of different tapes cannot be compared node by node".into())),
    }
}

/// The size of what a node adds up: the least root mean square of its inputs that are no vectors of channels.
fn terms(exec: &dyn Executor, index: usize) -> Result<f64> {
    let mut least = f64::INFINITY;
    for &input in &exec.tape().nodes()[index].inputs {
        if exec.tape().desc(input).shape.rank() > 1 {
            let values = exec.peek(input)?.to_f64();
            least = least.min((values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt());
        }
    }
    Ok(if least.is_finite() { least } else { 0.0 })
}

/// Norm of the difference, as a share of the norm of `expected` or of `terms`; NaN where only one of them has a norm.
fn relative_error(expected: &HostTensor, got: &HostTensor, terms: f64) -> f64 {
    if expected.bytes() == got.bytes() {
        return 0.0;
    }
    let (expected, got) = (expected.to_f64(), got.to_f64());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut expected.iter().zip(&got).map(|(a, b)| a - b));
    let floor = CANCELLED * terms * (expected.len() as f64).sqrt() + f64::MIN_POSITIVE;
    difference / norm(&mut expected.iter().copied()).max(floor)
}
