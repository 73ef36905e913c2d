//! The training loop and what surrounds it: schedule, metrics, checkpoints, progress and the collapse monitor.

pub mod checkpoint;
pub mod config;
pub mod epilogues;
pub mod finetune;
pub mod memory;
pub mod metrics;
pub mod monitor;
pub mod progress;
pub mod run;
pub mod schedule;
pub mod state;
pub mod subset;
pub mod supervised;
pub mod trained;
pub mod trainer;
