//! What the driver says no to, in words.

use std::ffi::CStr;

use cudarc::driver::result::DriverError;

use crate::error::Error;

/// Something this machine cannot do, and what helps.
pub(super) fn unsupported(what: &str, hint: &str) -> Error {
    Error::Unsupported { what: what.into(), hint: Some(hint.into()) }
}

/// The driver said no. Faults inside a kernel show at whatever call comes next.
pub(super) fn failed(action: &str, error: DriverError) -> Error {
    let hint = "`compute-sanitizer` finds the fault if it lies in a kernel";
    unsupported(&format!("the CUDA device cannot {action}: {}", said(error)), hint)
}

/// A call that this program should not have made.
pub(super) fn misuse(message: impl Into<String>) -> Error {
    Error::Internal { thread: "CUDA device".into(), message: message.into() }
}

/// The driver's words: `CUDA_ERROR_NOT_READY (device not ready)`.
pub(super) fn said(error: DriverError) -> String {
    let text = |s: Result<&CStr, _>| s.map_or("unknown".into(), |s: &CStr| s.to_string_lossy().into_owned());
    format!("{} ({})", text(error.error_name()), text(error.error_string()))
}
