//! `augment_preview`

use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct AugmentPreviewArgs {}

pub fn run(_args: AugmentPreviewArgs) -> Result<()> {
    Err(Error::Unsupported { what: "not built yet".into(), hint: None })
}
