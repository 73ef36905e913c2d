//! What a training step computes in the same pass as its convolutions, layer by layer.

use std::collections::HashSet;
use std::fmt::{self, Display};
use std::str::FromStr;

use crate::choice::written_as_text;
use crate::error::{Error, Result};
use crate::graph::{Node, Phase, Tape};
use crate::ops::conv2d::Join;

/// What the channels of an ordinary convolution are multiples of, and the largest side of its kernel.
const CHANNELS: usize = 8;
const KERNEL: usize = 3;
/// Most input channels of a narrow one.
pub const NARROW: usize = 128;
/// Layers that an error names.
const NAMED: usize = 4;

/// Some of a network's convolutions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layers {
    /// All of them.
    All,
    /// Those with kernels up to 3x3 and a multiple of 8 channels on both sides: all but a stem's 7x7 in the usual networks.
    Ordinary,
    /// Those of up to [`NARROW`] input channels.
    Narrow,
    /// Those with one of these names, and those below it: `encoder.layer1` has `encoder.layer1.0.conv2`, but not
    /// `encoder.layer10.0.conv2`.
    Named(Vec<String>),
}

impl Layers {
    /// None of them.
    pub const NONE: Layers = Layers::Named(Vec::new());

    /// Whether the convolution `layer` is among them, whose weight has `kernel` x `kernel` elements for each of c_in times
    /// c_out channels.
    pub fn contain(&self, layer: &str, kernel: usize, channels: [usize; 2]) -> bool {
        match self {
            Layers::All => true,
            Layers::Narrow => channels[0] <= NARROW,
            Layers::Ordinary => kernel <= KERNEL && channels.iter().all(|c| c.is_multiple_of(CHANNELS)),
            Layers::Named(names) => names.iter().any(|name| is_below(layer, name)),
        }
    }

    /// Checks that every name stands for one of `layers`.
    fn check(&self, option: &str, layers: &[&str]) -> Result<()> {
        let Layers::Named(names) = self else { return Ok(()) };
        match names.iter().find(|name| !layers.iter().any(|layer| is_below(layer, name))) {
            None => Ok(()),
            Some(name) => {
                let some = layers[..layers.len().min(NAMED)].join(", ");
                let expected = match layers {
                    [] => "none, since this network has no such layers".to_string(),
                    _ => format!("names of layers that it can hold for, or what they begin with, such as {some}"),
                };
                Err(Error::config(option, format!("expected {expected}; got {name}")))
            }
        }
    }
}

fn is_below(layer: &str, name: &str) -> bool {
    layer.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Layers, String> {
        match text {
            "all" => Ok(Layers::All),
            "none" => Ok(Layers::NONE),
            _ => {
                let names: Vec<String> = text.split(',').map(|name| name.trim().to_string()).collect();
                match names.iter().any(String::is_empty) {
                    true => {
                        Err(format!("expected all, none, or names of layers with commas between them, got {text:?}"))
                    }
                    false => Ok(Layers::Named(names)),
                }
            }
        }
    }
}

impl Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layers::All => f.write_str("all"),
            Layers::Narrow => write!(f, "all of up to {NARROW} input channels"),
            Layers::Ordinary => f.write_str("all up to 3x3 with multiples of 8 channels"),
            Layers::Named(names) if names.is_empty() => f.write_str("none"),
            Layers::Named(names) => f.write_str(&names.join(",")),
        }
    }
}

/// How the gradients of residual branches are added: `MODE[:LAYERS]`, all layers where none are named. The others
/// accumulate.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ResidualGradient {
    /// How.
    pub join: Join,
    /// Where.
    pub layers: Layers,
}

impl ResidualGradient {
    /// How it is added where `layer` computes it, whose kernel and channels are as for [`Layers::contain`].
    fn of(&self, layer: &str, kernel: usize, channels: [usize; 2]) -> Join {
        if self.layers.contain(layer, kernel, channels) { self.join } else { Join::Accumulate }
    }
}

impl Default for ResidualGradient {
    fn default() -> ResidualGradient {
        ResidualGradient { join: Join::Accumulate, layers: Layers::All }
    }
}

impl FromStr for ResidualGradient {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<ResidualGradient, String> {
        let (mode, layers) = text.split_once(':').map_or((text, None), |(mode, layers)| (mode, Some(layers)));
        let layers = layers.map_or(Ok(Layers::All), str::parse)?;
        let join = match mode {
            "accumulate" if layers == Layers::All => Join::Accumulate,
            "accumulate" => return Err("expected accumulate without layers: it is what all others do".into()),
            "separate" => Join::Separate,
            "fused" => Join::Fused,
            _ => return Err(format!("expected accumulate, separate or fused, got {mode:?}")),
        };
        Ok(ResidualGradient { join, layers })
    }
}

impl Display for ResidualGradient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.join {
            Join::Accumulate => "accumulate",
            Join::Separate => "separate",
            Join::Fused => "fused",
        })?;
        if self.layers == Layers::All { Ok(()) } else { write!(f, ":{}", self.layers) }
    }
}

written_as_text!(ResidualGradient);

/// What a training step fuses with its convolutions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Epilogues {
    /// Convolutions that compute the statistics for the batch norm after them, which reads their result once less.
    pub statistics: Layers,
    /// 1x1 convolutions to more channels whose result only a batch norm reads, and is never formed: see `ops::gram_norm`.
    pub gram: Layers,
    /// How the gradients of residual branches are added.
    pub residual_gradient: ResidualGradient,
    /// Whether the stem's batch norm and the max pooling behind it are one op, which reads and writes less.
    pub pooling: bool,
    /// Whether the last batch norm of a block and that of its projection shortcut are one op, which reads and writes less.
    pub shortcut: bool,
}

impl Default for Epilogues {
    fn default() -> Epilogues {
        Epilogues {
            statistics: Layers::NONE,
            gram: Layers::NONE,
            residual_gradient: ResidualGradient::default(),
            pooling: false,
            shortcut: true,
        }
    }
}

impl Epilogues {
    /// How the input's gradient of the convolution `layer` is added to another one.
    pub(super) fn join(&self, layer: &str, kernel: usize, channels: [usize; 2]) -> Join {
        self.residual_gradient.of(layer, kernel, channels)
    }

    /// Checks that every layer that was named is on a recorded step's tape, and that what was asked of it could be done.
    ///
    /// # Errors
    /// [`Error::Config`] with names of layers where it can.
    pub(super) fn check(&self, tape: &Tape) -> Result<()> {
        let named = |keep: &dyn Fn(&Node) -> bool| -> Vec<&str> {
            let nodes = tape.nodes().iter().filter(|node| node.phase == Phase::Forward && keep(node));
            nodes.map(|node| node.name.as_str()).collect()
        };
        let is_convolution = |node: &Node| node.op.name() == "conv2d";
        let is_gram = |node: &Node| node.op.name() == "gram_norm";
        let expands = |node: &Node| match tape.desc(node.inputs[1]).shape.dims() {
            [c_out, 1, 1, c_in] => c_out > c_in,
            _ => false,
        };
        self.statistics.check("--fuse-statistics", &named(&is_convolution))?;
        let possible = |node: &Node| is_gram(node) || (is_convolution(node) && expands(node));
        self.gram.check("--bn gram", &named(&possible))?;
        self.residual_gradient.layers.check("--residual-gradient", &joining(tape))
    }
}

/// Convolutions that add the gradient of their input to another one: their gradient writes to what was written before, is read
/// by an op that adds it, or reads what it is added to.
fn joining(tape: &Tape) -> Vec<&str> {
    let mut written = HashSet::new();
    let mut found = vec![];
    for (index, node) in tape.nodes().iter().enumerate() {
        if node.op.name() == "conv2d_dgrad" {
            let added = |next: &Node| next.op.name() == "copy" && next.inputs == node.outputs;
            let joins = node.inputs.len() > 2
                || node.outputs.iter().any(|output| written.contains(output))
                || tape.nodes().get(index + 1).is_some_and(added);
            found.extend(node.name.strip_suffix("/conv2d_dgrad").filter(|_| joins));
        }
        written.extend(node.outputs.iter().copied());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_named_by_whole_parts_of_their_names() {
        let some: Layers = "encoder.layer1, encoder.conv1".parse().unwrap();
        for (layer, expected) in [
            ("encoder.layer1.0.conv2", true),
            ("encoder.layer1", true),
            ("encoder.layer10.0.conv2", false),
            ("encoder.conv1", true),
            ("encoder.layer2.0.conv1", false),
        ] {
            assert_eq!(some.contain(layer, 7, [3, 5]), expected, "{layer}");
        }
        assert!(Layers::All.contain("a", 7, [3, 8]) && !Layers::NONE.contain("a", 1, [8, 8]));
        for (kernel, channels, expected) in
            [(3, [8, 24], true), (1, [16, 8], true), (3, [8, 12], false), (3, [12, 8], false), (7, [8, 64], false)]
        {
            assert_eq!(Layers::Ordinary.contain("a", kernel, channels), expected, "{kernel} {channels:?}");
        }
        assert!(Layers::Narrow.contain("a", 1, [128, 512]) && !Layers::Narrow.contain("a", 1, [136, 8]));
        assert!("a,,b".parse::<Layers>().unwrap_err().starts_with("expected all, none, or names"));
    }

    #[test]
    fn choices_are_read_as_they_are_written() {
        for text in ["accumulate", "separate", "fused", "fused:a.b,c", "separate:none"] {
            assert_eq!(text.parse::<ResidualGradient>().unwrap().to_string(), text);
        }
        for text in ["all", "none", "encoder.layer1,encoder.conv1"] {
            assert_eq!(text.parse::<Layers>().unwrap().to_string(), text);
        }
        for text in ["", "beta", "accumulate:a", "fused:", "separate:a,"] {
            assert!(text.parse::<ResidualGradient>().unwrap_err().starts_with("expected"), "{text}");
        }
    }
}
