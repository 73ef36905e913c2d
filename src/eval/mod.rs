//! What an encoder is worth.

pub mod knn;
