//! `devices`: what there is for training on a GPU, and each thing that is missing with its reason.

mod common;

use std::process::Command;

use serde_json::Value;

/// Runs it; standard output, exit code and the lines of standard error.
fn devices(prepare: impl FnOnce(&mut Command), args: &[&str]) -> (String, Option<i32>, Vec<String>) {
    let mut command = common::engine();
    command.arg("devices").args(args);
    prepare(&mut command);
    let output = command.output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.code(), errors.lines().map(String::from).collect())
}

/// Lets the program find none of NVIDIA's user-mode libraries.
fn without_libraries(command: &mut Command) {
    for name in ["SIMSIAM_CUDA_LIBS", "VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH"] {
        command.env_remove(name);
    }
    command.env("PATH", "");
}

#[test]
fn missing_pieces_are_listed_and_the_first_reason_is_the_error() {
    let (listed, code, errors) = devices(without_libraries, &[]);
    if code == Some(0) || listed.contains("device 0") || listed.contains("/usr/local/cuda") {
        return println!("skipped: this machine has a GPU or CUDA");
    }
    assert_eq!((code, errors.len()), (Some(1), 1), "{listed}\n{errors:?}");
    assert!(errors[0].starts_with("error: ") && errors[0].contains("; hint: "), "{errors:?}");
    for (name, hint) in [("cuDNN", "pip install nvidia-cudnn-cu13"), ("cuBLASLt", "pip install nvidia-cublas")] {
        let line = listed.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line.contains("missing: ") && line.contains("was not found in ") && line.contains(hint), "{line}");
    }
    assert!(listed.contains("devices    none: no CUDA driver: "), "{listed}");
}

#[test]
fn json_says_the_same() {
    let (listed, code, _) = devices(without_libraries, &["--json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let names: Vec<&str> =
        listed["libraries"].as_array().unwrap().iter().map(|l| l["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["cuBLASLt", "cuDNN", "nvrtc"]);
    if code == Some(1) && listed["devices"].is_object() {
        assert!(listed["devices"]["error"].as_str().unwrap().contains("hint"), "{listed}");
    }
}

#[test]
fn without_a_device_nothing_is_described() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("device.json");
    let (_, code, errors) = devices(without_libraries, &["--describe", file.to_str().unwrap()]);
    if code == Some(0) {
        return println!("skipped: this machine has a GPU");
    }
    assert_eq!((code, errors.len()), (Some(1), 1), "{errors:?}");
    assert!(!file.exists());
}

#[test]
fn convolutions_are_timed_on_a_gpu_only() {
    let output = common::run(&["bench", "conv", "--dtype", "f64"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.starts_with("error: --dtype: expected f32, tf32, bf16 or fp16, got f64"), "{error}");
    let output = common::run(&["bench", "conv", "--batch", "2", "--only", "no such node"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.starts_with("error: --only: no convolution's name contains it"), "{error}");
}

/// With a driver that shows a device, what remains to be said is about the libraries.
#[cfg(feature = "emulator")]
#[test]
fn a_device_is_listed_with_its_memory_and_its_kernels() {
    use common::fake_cuda::{compiled, with_fake_cuda};
    if !compiled() {
        return;
    }
    let shown = |words: &str| {
        devices(
            |command| {
                without_libraries(command);
                with_fake_cuda(command, words);
                command.env("PATH", "");
            },
            &[],
        )
    };
    let (listed, code, errors) = shown("");
    assert!(listed.contains("device 0   Fake GPU, compute capability "), "{listed}");
    assert!(listed.contains(" GB free; runs the kernels for sm_"), "{listed}");
    if !listed.contains("/usr/local/cuda") {
        assert_eq!(code, Some(1));
        assert!(errors[0].starts_with("error: cuBLASLt (libcublasLt.so.13) was not found in "), "{errors:?}");
    }
    let (listed, _, errors) = shown("old-driver");
    assert!(listed.contains("driver     for CUDA 12.8; the kernels need 13.0"), "{listed}");
    assert!(errors[0].starts_with("error: the CUDA driver is too old: "), "{errors:?}");
    let (_, _, errors) = shown("no-device");
    assert!(errors[0].starts_with("error: there is no CUDA device: "), "{errors:?}");
}
