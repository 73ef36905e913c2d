//! What an encoder is worth.

pub mod embed;
pub mod features;
pub mod knn;
pub mod map;
pub mod neighbours;
pub mod pca;
