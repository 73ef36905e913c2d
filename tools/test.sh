#!/usr/bin/env bash
# Every check of the project, from a fresh clone with nothing but Rust installed:
# formatting, lints, all tests, and what nvcc made of the kernels. Stops at the first failure.
#
#   SIMSIAM_REQUIRE_NVCC=1   a machine that cannot compile the CUDA kernels fails instead of testing the rest
#   SIMSIAM_REQUIRE_CUDNN=1  a machine that cannot ask cuDNN for plans fails instead of testing the rest
#   SIMSIAM_REQUIRE_PYTHON=1 a machine that cannot load exports in PyTorch, timm and onnxruntime fails instead of testing the rest
#   SIMSIAM_PYTHON           a Python that has them (tools/requirements.txt); default: python3
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
[ -t 1 ] && export CARGO_TERM_COLOR=always
summary=""

# stage NAME COMMAND...: runs one stage; ends the script when it fails.
stage() {
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    if ! "$@" 2>&1 | tee "$log"; then
        printf '\nFAILED: %s, after %d s: %s\n' "$name" $((SECONDS - start)) "$*" >&2
        exit 1
    fi
    local skipped=""
    grep -q '^SKIPPED' "$log" && skipped="  skipped"
    printf -v summary '%s  %-15s %4d s%s\n' "$summary" "$name" $((SECONDS - start)) "$skipped"
}

rust_tools() {
    if ! command -v cargo >/dev/null; then
        echo "cargo not found; hint: install Rust from https://rustup.rs"
        return 1
    fi
    if ! { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1; then
        echo "rustfmt or clippy is missing: adding them with rustup"
        rustup component add rustfmt clippy || return 1
    fi
    cargo --version
}

# The kernels compile without a GPU. Where even the compiler cannot be had, the rest is still worth testing.
cuda_compiler() {
    if [ -n "${NVCC:-}" ]; then
        echo "as NVCC says: $NVCC"
    elif tools/install-nvcc.sh; then
        echo "nvcc is there"
    elif [ "${SIMSIAM_REQUIRE_NVCC:-0}" = 1 ]; then
        return 1
    else
        echo "SKIPPED: going on without the CUDA kernels"
    fi
}

# cuDNN makes plans for a GPU that is only described.
cuda_libraries() {
    if tools/install-cuda-libs.sh; then
        echo "cuDNN and cuBLAS are there"
    elif [ "${SIMSIAM_REQUIRE_CUDNN:-0}" = 1 ]; then
        return 1
    else
        echo "SKIPPED: going on without asking cuDNN for plans"
    fi
}

# Exported files are loaded by the libraries that they are for.
python_packages() {
    local python=${SIMSIAM_PYTHON:-python3} packages="onnx, onnxruntime, safetensors, timm, torch, torchvision"
    if "$python" -c "import $packages"; then
        echo "$python has $packages"
    elif [ "${SIMSIAM_REQUIRE_PYTHON:-0}" = 1 ]; then
        return 1
    else
        echo "SKIPPED: going on without loading exports in other programs; hint: tools/requirements.txt, SIMSIAM_PYTHON"
    fi
}

# The emulator runs the CUDA kernels on the CPU, compiled by an ordinary C++ compiler.
emulator=()
cpp_compiler() {
    local compiler
    for compiler in "${CXX:-}" c++ g++ clang++; do
        [ -n "$compiler" ] && command -v "$compiler" >/dev/null && "$compiler" --version | head -n 1 && return
    done
    if [ "${SIMSIAM_REQUIRE_NVCC:-0}" = 1 ]; then
        echo "no C++ compiler (tried CXX, c++, g++, clang++); hint: Debian: apt install g++"
        return 1
    fi
    echo "SKIPPED: no C++ compiler, so the CUDA kernels are not run"
}

# Registers, spills and memory accesses of the compiled kernels.
compiled_kernels() {
    if target/debug/simsiam-engine --version | grep -q '^CUDA *none'; then
        echo "SKIPPED: built without nvcc"
    else
        python3 tools/kernel_report/report.py --check
    fi
}

stage "Rust tools" rust_tools
stage "CUDA compiler" cuda_compiler
stage "CUDA libraries" cuda_libraries
stage "Python packages" python_packages
stage "C++ compiler" cpp_compiler
grep -q '^SKIPPED' "$log" || emulator=(--features emulator)
stage "formatting" cargo fmt --check
stage "lints" cargo clippy --all-targets "${emulator[@]}" -- -D warnings
stage "tests" env VIRTUAL_ENV="$PWD/.venv" cargo test "${emulator[@]}"
tests=$(awk '/^test result:/ { passed += $4; failed += $6; ignored += $8 }
     END { printf "%d passed, %d failed, %d skipped\n", passed, failed, ignored }' "$log")
stage "compiled kernels" compiled_kernels

printf '\nAll stages passed\n%s%s\n' "$summary" "$tests"
