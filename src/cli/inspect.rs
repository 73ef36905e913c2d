//! `inspect`

use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct InspectArgs {}

pub fn run(_args: InspectArgs) -> Result<()> {
    Err(Error::Unsupported { what: "not built yet".into(), hint: None })
}
