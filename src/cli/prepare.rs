//! `prepare`

use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct PrepareArgs {}

pub fn run(_args: PrepareArgs) -> Result<()> {
    Err(Error::Unsupported { what: "not built yet".into(), hint: None })
}
