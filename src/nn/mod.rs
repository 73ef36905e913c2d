//! Networks: they record the forward pass on a tape and name every parameter as PyTorch's `state_dict` does. Know no device.

pub mod builder;
pub mod classifier;
pub mod epilogues;
pub mod heads;
pub mod layout;
pub mod params;
pub mod resnet;
pub mod simsiam;
pub mod views;

pub use builder::{Builder, Mode};
pub use params::{ParamGroup, ParamInfo};
