//! What an encoder is worth.

pub mod features;
pub mod knn;
