//! Pictures for people: charts and grids of images.

pub mod chart;
pub mod grid;
