//! The graph: ops are recorded on a tape without storage, differentiated by appending ops, and planned into one arena.
//! Names no concrete op except the two that the graph itself needs ([`builtin`]).

pub mod autodiff;
pub mod budget;
pub mod builtin;
pub mod dump;
pub mod ledger;
pub mod op;
pub mod plan;
pub mod recompute;
pub mod tape;

pub use autodiff::{GradBuilder, backward};
pub use ledger::{Tensors, Traffic};
pub use op::Op;
pub use plan::{Plan, WriteMode};
pub use recompute::Again;
pub use tape::{Node, Phase, Role, Tape, Value, ValueId};
