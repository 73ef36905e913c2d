//! SimSiam pretraining engine: tape, plan, executors, data and training loop. See ARCHITECTURE.md for the map.

pub mod atomic;
pub mod backend;
mod choice;
pub mod cli;
pub mod data;
pub mod error;
pub mod eval;
pub mod exec;
pub mod export;
pub mod graph;
pub mod import;
pub mod nn;
pub mod ops;
pub mod report;
pub mod rng;
pub mod selftest;
pub mod tensor;
pub mod train;
