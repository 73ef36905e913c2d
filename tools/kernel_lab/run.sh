#!/usr/bin/env bash
# The kernel lab: run.sh [LADDER...], all of them by default.
# Runs each ladder under the emulator, which checks every variant's result, and compiles it with nvcc where there is one
# (NVCC=PATH chooses it). On a machine with a GPU it times the variants there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
kernels=$root/kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

nvcc=${NVCC:-$(command -v nvcc || ls "$root"/.venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc 2>/dev/null | head -n 1 || true)}
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

ladders=("$@")
[ $# -gt 0 ] || for file in "$here"/*.cu; do ladders+=("$(basename "$file" .cu)"); done

emulate=(${CXX:-c++} -std=c++17 -O2 -ffp-contract=off -fno-strict-aliasing -pthread -Wno-unknown-pragmas -DSIMSIAM_EMULATOR -I "$kernels")
for source in "$kernels"/emulator/*.cpp; do
    "${emulate[@]}" -c "$source" -o "$work/$(basename "$source").o"
done

for ladder in "${ladders[@]}"; do
    printf '\n== %s, emulated\n' "$ladder"
    "${emulate[@]}" -x c++ "$here/$ladder.cu" -x none "$work"/*.o -o "$work/$ladder"
    "$work/$ladder"
    if [ -z "$nvcc" ]; then
        echo "no nvcc: not compiled for GPUs"
    elif has_gpu; then
        printf '\n== %s, %s\n' "$ladder" "$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
        "$nvcc" -std=c++17 -O3 -fmad=false -arch=native -I "$kernels" "$here/$ladder.cu" -o "$work/$ladder.gpu"
        "$work/$ladder.gpu"
    else
        "$nvcc" -std=c++17 -O3 -fmad=false -Werror=all-warnings -arch=sm_90a -I "$kernels" -c "$here/$ladder.cu" -o "$work/$ladder.o.gpu"
        echo "compiles with nvcc; no GPU to time it on"
    fi
done
