#!/usr/bin/env bash
# A training step under NVIDIA's profilers:
#
#   tools/profile.sh nsys ENGINE OUT [OPTIONS of `bench step`...]           timeline with NVTX ranges (Nsight Systems)
#   tools/profile.sh ncu  ENGINE OUT KERNEL [OPTIONS of `bench step`...]    every counter of kernels called KERNEL, a regular
#                                                                           expression such as batch_norm (Nsight Compute)
#
# e.g. tools/profile.sh nsys target/release/simsiam-engine step --preset imagenet --batch 256 --dtype bf16
#
# writes OUT.nsys-rep with tables in OUT.txt, or OUT.ncu-rep with a summary in OUT.txt. The nodes of the captured graph are traced
# one by one. For counters the step is launched node by node instead (--no-graph).
# Variables: NSYS and NCU, the programs; LAUNCHES (default 4), how many launches ncu looks at, and SKIP (default 0), after how many.
set -euo pipefail

usage() {
    sed -n '2,/^# Variables/p' "$0" | sed 's/^# \{0,1\}//'
    exit 2
}

die() {
    echo "profile.sh: $1" >&2
    exit 1
}

# program VARIABLE NAME PACKAGE: the path of one of NVIDIA's programs.
program() {
    local path=${!1:-} folder
    if [ -z "$path" ]; then
        path=$(command -v "$2" || true)
    fi
    if [ -z "$path" ]; then
        for folder in "${CUDA_HOME:-/usr/local/cuda}/bin" /opt/nvidia/*/*/bin /opt/nvidia/*/*; do
            if [ -x "$folder/$2" ] && [ -f "$folder/$2" ]; then path=$folder/$2; fi
        done
    fi
    [ -n "$path" ] && [ -x "$path" ] || die "$2 not found${path:+ at $path} (looked in PATH, CUDA_HOME and /opt/nvidia); hint: install $3, or name it in $1"
    echo "$path"
}

[ $# -ge 3 ] || usage
mode=$1 engine=$2 out=$3
shift 3
[ -f "$engine" ] && [ -x "$engine" ] || die "$engine is no program; hint: cargo build --release"
mkdir -p "$(dirname "$out")"
# Few steps: every one of them looks like the others.
bench=("$engine" bench step --device cuda --warmup 5 --steps 3 --rounds 1)

case $mode in
    nsys)
        nsys=$(program NSYS nsys "Nsight Systems (nsight-systems-cli)")
        "$nsys" profile --force-overwrite true --output "$out" --trace cuda,nvtx,cublas,cudnn --cuda-graph-trace node \
            --sample none --cpuctxsw none "${bench[@]}" --nvtx "$@"
        "$nsys" stats --force-export true --report cuda_gpu_kern_sum --report cuda_gpu_mem_time_sum --report nvtx_gpu_proj_sum \
            "$out.nsys-rep" >"$out.txt"
        echo "wrote $out.nsys-rep (open it with nsys-ui) and $out.txt"
        ;;
    ncu)
        [ $# -ge 1 ] || usage
        kernel=$1
        shift
        ncu=$(program NCU ncu "Nsight Compute (nsight-compute)")
        "$ncu" --force-overwrite --export "$out" --set full --kernel-name "regex:$kernel" \
            --launch-skip "${SKIP:-0}" --launch-count "${LAUNCHES:-4}" "${bench[@]}" --no-graph "$@" ||
            die "ncu failed; hint: where it says ERR_NVGPUCTRPERM, counters are for root alone: run it as root, or set NVreg_RestrictProfilingToAdminUsers=0"
        [ -e "$out.ncu-rep" ] || die "no kernel matched $kernel; hint: \`$engine kernels\` lists the engine's own"
        "$ncu" --import "$out.ncu-rep" --page details >"$out.txt"
        echo "wrote $out.ncu-rep (open it with ncu-ui) and $out.txt"
        ;;
    *) usage ;;
esac
