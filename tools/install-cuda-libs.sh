#!/usr/bin/env bash
# Puts cuDNN, cuBLAS and nvrtc, from PyPI, into ./.venv: no root, no GPU, about 1.3 GB. With VIRTUAL_ENV=$PWD/.venv the program
# and tests/cudnn_plans.rs find them there.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
    echo "install-cuda-libs: $1" >&2
    exit 1
}

[ "$(uname -s)" = Linux ] || refuse "NVIDIA's packages are for Linux, this is $(uname -s); hint: the CPU part needs none of them"
command -v python3 >/dev/null || refuse "python3 not found; hint: install Python 3 with its venv module (Debian: apt install python3-venv)"
compgen -G '.venv/lib/python3*/site-packages/nvidia/cudnn/lib/libcudnn.so.9' >/dev/null &&
    compgen -G '.venv/lib/python3*/site-packages/nvidia/cu13/lib/libcublasLt.so.13' >/dev/null && exit 0

python3 -m venv .venv || refuse "python3 cannot make a virtual environment; hint: install its venv module (Debian: apt install python3-venv)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    'nvidia-cudnn-cu13==9.19.*' 'nvidia-cublas==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' ||
    refuse "pip could not install NVIDIA's libraries from PyPI; hint: its message is above"
