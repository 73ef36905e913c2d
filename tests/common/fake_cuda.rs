//! Runs programs with the CUDA driver for tests (`tests/fake_cuda/`) in place of NVIDIA's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use simsiam_engine::backend::cuda::NVCC_RELEASE;

/// Set in the processes that tests start for themselves.
const CHILD: &str = "SIMSIAM_TEST_UNDER_FAKE_CUDA";

/// The folder of the driver, built anew where it has changed.
fn driver() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
    let mut build = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_cuda/build.sh"));
    let output = build.arg(&folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{build:?}:\n{said}");
    assert_eq!(said, "", "warnings");
    folder
}

/// Lets `command` find the driver, which behaves as `words` say, and the profiler.
pub fn with_fake_cuda<'a>(command: &'a mut Command, words: &str) -> &'a mut Command {
    let folder = driver();
    command.env("NVTX_INJECTION64_PATH", folder.join("libprofiler.so"));
    command.env("LD_LIBRARY_PATH", folder).env("FAKE_CUDA", words);
    command.env("FAKE_CUDA_KERNELS", concat!(env!("OUT_DIR"), "/emulator.so"))
}

/// Lets `command` find no driver; false where the system has one.
pub fn without_cuda(command: &mut Command) -> bool {
    let empty = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no-cuda");
    fs::create_dir_all(&empty).unwrap();
    command.env("LD_LIBRARY_PATH", empty);
    simsiam_engine::backend::cuda::CudaDevice::driver_version().is_err()
}

/// Whether there are kernels to load; a run that may not skip fails without.
pub fn compiled() -> bool {
    if NVCC_RELEASE != "none" {
        return true;
    }
    assert!(!std::env::var("SIMSIAM_REQUIRE_NVCC").is_ok_and(|value| value == "1"), "built without nvcc");
    println!("skipped: built without nvcc");
    false
}

/// Whether this is a process with the driver. If not, runs the test called `name` in one: the library has to be found when
/// the process loads it. The driver ends it with an error also for what it finds when it is given up.
pub fn in_child(name: &str, words: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    if !compiled() {
        return false;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture"]).env(CHILD, "1");
    let output = with_fake_cuda(&mut command, words).output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{}:\n{said}", output.status);
    assert!(said.contains("1 passed"), "no test {name}:\n{said}");
    println!("{said}");
    false
}

/// Tests that run with the driver, each in a process of its own: `fn name("words of FAKE_CUDA") { ... }`.
#[allow(unused_macros)] // each test binary uses its own part
macro_rules! under_fake_cuda {
    ($($(#[$attribute:meta])* fn $name:ident($words:expr) $body:block)*) => {
        $($(#[$attribute])* #[test] fn $name() {
            if $crate::common::fake_cuda::in_child(stringify!($name), &$words.to_string()) $body
        })*
    };
}
#[allow(unused_imports)]
pub(crate) use under_fake_cuda;
