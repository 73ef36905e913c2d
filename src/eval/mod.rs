//! What a trained encoder is worth: kNN accuracy on its features, linear classifiers on top of it, the features themselves as
//! files and pictures.

pub mod embed;
pub mod features;
pub mod heads;
pub mod knn;
pub mod linear;
pub mod map;
pub mod neighbours;
pub mod pca;
pub mod scores;
pub mod search;
pub mod split;
pub mod sweep;
