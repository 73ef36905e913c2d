//! Data: the dataset file, its sources, the order of an epoch, augmentation and the loader. Knows no device: it fills host
//! memory that it is handed.

pub mod augment;
pub mod dataset;
pub mod decode;
pub mod format;
pub mod import;
pub mod journal;
pub mod loader;
pub mod manifest;
pub mod mapped;
pub mod order;
pub mod quiet;
pub mod reader;
mod resume;
pub mod shard;
pub mod views;
pub mod writer;
