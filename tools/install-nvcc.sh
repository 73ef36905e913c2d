#!/usr/bin/env bash
# Puts NVIDIA's CUDA compiler, from PyPI, into ./.venv, where build.rs finds it: no root, no GPU, about 0.5 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
    echo "install-nvcc: $1" >&2
    exit 1
}

[ "$(uname -s)" = Linux ] || refuse "NVIDIA's packages are for Linux, this is $(uname -s); hint: the CPU part needs no nvcc"
command -v python3 >/dev/null || refuse "python3 not found; hint: install Python 3 with its venv module (Debian: apt install python3-venv)"
compgen -G '.venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc' >/dev/null && exit 0

python3 -m venv .venv || refuse "python3 cannot make a virtual environment; hint: install its venv module (Debian: apt install python3-venv)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'cuda-toolkit[nvcc,cudart,cccl]==13.0.*' ||
    refuse "pip could not install cuda-toolkit 13.0 from PyPI; hint: its message is above"
# Cargo cannot watch for a file that is not there yet: this makes the next build look for the compiler.
touch build.rs
