//! Which of NVIDIA's libraries are on this machine.
#![allow(unsafe_code)] // asks a library for its version

use std::path::PathBuf;

use crate::error::{Error, Result};

use super::cublaslt::CublasLt;
use super::cudnn::Cudnn;
use super::search::{self, Library};
use super::table::functions;

/// A library that was looked for.
#[derive(Debug)]
pub struct Installed {
    /// Its name, for people.
    pub name: &'static str,
    /// Whether training needs it.
    pub needed: bool,
    /// Its version and where it lies, or why it cannot be used.
    pub found: Result<(String, PathBuf)>,
}

functions! {
    /// The compiler's.
    Compiler {
        fn nvrtcVersion(*mut i32, *mut i32) -> i32;
    }
}

/// Looks for all of them; needs no device.
pub fn installed() -> Vec<Installed> {
    let cublaslt = CublasLt::load().map(|library| (dotted(library.version()), library.path.clone()));
    let cudnn = Cudnn::load().map(|library| (dotted(library.version()), library.path.clone()));
    let found = |library: Library, needed, found| Installed { name: library.name(), needed, found };
    let builtins = search::find(Library::NvrtcBuiltins);
    vec![
        found(Library::CublasLt, true, cublaslt),
        found(Library::Cudnn, true, cudnn),
        // Of use only with its builtins.
        found(Library::Nvrtc, false, builtins.and_then(|_| compiler())),
    ]
}

fn compiler() -> Result<(String, PathBuf)> {
    let found = search::find(Library::Nvrtc)?;
    let functions = Compiler::load(found.library, Library::Nvrtc.name())?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers.
    match unsafe { (functions.nvrtcVersion)(&mut major, &mut minor) } {
        0 => Ok((format!("{major}.{minor}"), found.path)),
        status => Err(Error::Unsupported { what: format!("nvrtc does not say its version ({status})"), hint: None }),
    }
}

/// As cuDNN 9 and cuBLASLt 13 count: 91900 is 9.19.0.
fn dotted(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_nvidia_writes_them() {
        assert_eq!([91_900, 130_002, 90_501].map(dotted), ["9.19.0", "13.0.2", "9.5.1"]);
    }

    #[test]
    fn what_is_absent_says_so() {
        let all = installed();
        assert_eq!(
            all.iter().map(|one| (one.name, one.needed)).collect::<Vec<_>>(),
            [("cuBLASLt", true), ("cuDNN", true), ("nvrtc", false)]
        );
        for one in &all {
            match &one.found {
                Ok((version, path)) => assert!(version.contains('.') && path.exists(), "{one:?}"),
                Err(error) => assert!(error.to_string().contains("hint"), "{error}"),
            }
        }
    }
}
