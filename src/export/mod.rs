//! Out into the world: weights for other programs.

pub mod torchvision;
