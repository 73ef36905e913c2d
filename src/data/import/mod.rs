//! import/mod
