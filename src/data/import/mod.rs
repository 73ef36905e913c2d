//! import
pub mod decode;
