//! The tape as text: Graphviz, and a list of nodes.

use std::fmt::Write;

use crate::graph::{Node, Phase, Tape};

/// The tape as a Graphviz digraph: one box a node, one edge a value, edges labelled with shapes.
pub fn dot(tape: &Tape) -> String {
    let mut out =
        String::from("digraph tape {\n  rankdir=TB; node [shape=box, style=filled, fontname=\"Helvetica\"];\n");
    let mut writers: Vec<Option<usize>> = vec![None; tape.values().len()];
    for (index, node) in tape.nodes().iter().enumerate() {
        let _ =
            writeln!(out, "  n{index} [label=\"{}\\n{}\", fillcolor=\"{}\"];", node.name, node.op.name(), colour(node));
        for &input in &node.inputs {
            let value = tape.value(input);
            match writers[input.index()] {
                Some(writer) => {
                    let _ = writeln!(out, "  n{writer} -> n{index} [label=\"{}\"];", value.desc);
                }
                None => {
                    let leaf = input.index();
                    let _ = writeln!(out, "  v{leaf} [label=\"{}\\n{}\", shape=ellipse];", value.name, value.desc);
                    let _ = writeln!(out, "  v{leaf} -> n{index};");
                }
            }
        }
        for &output in &node.outputs {
            // A gradient with several writers: each adds to what the one before left.
            if let Some(before) = writers[output.index()].replace(index) {
                let _ = writeln!(out, "  n{before} -> n{index} [label=\"+=\", style=dashed];");
            }
        }
    }
    out.push_str("}\n");
    out
}

fn colour(node: &Node) -> &'static str {
    match node.phase {
        Phase::Forward => "#cfe3f5",
        Phase::Backward => "#fbdcc0",
        Phase::Update => "#d3ecc9",
    }
}
