//! Runs programs under GCC's sanitizers, with the kernels of the CUDA emulator watched.
//!
//! The program stays as it is: it loads the emulator's library at run time, and that is built with a sanitizer, whose own
//! library is loaded first.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which faults of kernels are watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sanitizer {
    /// Memory out of bounds, misaligned accesses, and what else C++ does not define.
    Address,
    /// Races.
    Thread,
}

/// How a program ends that a sanitizer has stopped.
pub const REPORTED: i32 = 86;

impl Sanitizer {
    /// As build.sh names it.
    fn name(self) -> &'static str {
        match self {
            Sanitizer::Address => "address",
            Sanitizer::Thread => "thread",
        }
    }
}

/// The emulator's library with the kernels of `kernels/` and of more files, built anew where they have changed.
pub fn emulator_library(name: &str, sanitizer: Option<Sanitizer>, more: &[&str]) -> PathBuf {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    fs::create_dir_all(&folder).unwrap();
    let library = folder.join(format!("{name}-{}.so", sanitizer.map_or("plain", Sanitizer::name)));
    let mut build = Command::new(kernels.join("emulator/build.sh"));
    build.arg(&library).args(sanitizer.map(Sanitizer::name)).args(more.iter().map(|file| kernels.join(file)));
    let output = build.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{build:?}:\n{said}");
    assert_eq!(said, "", "warnings");
    library
}

/// A command that runs `program` with such a library, built for `sanitizer`; it ends with [`REPORTED`] if the sanitizer finds
/// a fault. None where the sanitizer is not installed.
pub fn sanitized(sanitizer: Sanitizer, library: &Path, program: &Path) -> Option<Command> {
    let mut command = Command::new("setarch");
    // The thread sanitizer cannot start where addresses are as random as some systems make them.
    command.arg("--addr-no-randomize").arg(program);
    command.env("SIMSIAM_EMULATOR", library).env("LD_PRELOAD", runtime_of(library)?);
    match sanitizer {
        Sanitizer::Address => {
            command.env("UBSAN_OPTIONS", format!("print_stacktrace=1:exitcode={REPORTED}"));
            command.env("ASAN_OPTIONS", format!("detect_leaks=0:exitcode={REPORTED}"))
        }
        Sanitizer::Thread => {
            // Rust's threads synchronise in ways that it does not see, so only the kernels are watched. With several threads,
            // races between blocks are seen.
            command.env("SIMSIAM_EMULATOR_THREADS", "4");
            command.env("TSAN_OPTIONS", format!("ignore_noninstrumented_modules=1:halt_on_error=1:exitcode={REPORTED}"))
        }
    };
    Some(command)
}

/// The sanitizer's own library, as the dynamic linker finds it for `library`.
fn runtime_of(library: &Path) -> Option<String> {
    let output = Command::new("ldd").arg(library).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().find(|line| line.trim().starts_with("libasan") || line.trim().starts_with("libtsan"))?;
    let path = line.split_whitespace().nth(2)?;
    Path::new(path).exists().then(|| path.into())
}
