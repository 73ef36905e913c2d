//! What a trained encoder is worth: kNN accuracy on its features, and linear classifiers on top of it.

pub mod features;
pub mod heads;
pub mod knn;
pub mod linear;
pub mod scores;
pub mod search;
pub mod split;
pub mod sweep;
