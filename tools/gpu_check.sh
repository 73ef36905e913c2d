#!/usr/bin/env bash
# Everything there is to check on a machine with a GPU, in one call: gpu_check.sh ENGINE OUT
# ENGINE is a program built with nvcc, here or elsewhere; OUT becomes a folder of JSON and logs. Goes on after a failure, and
# fails in the end.
set -uo pipefail
[ $# -eq 2 ] || { echo "usage: $0 ENGINE OUT" >&2; exit 2; }
[ -x "$1" ] || { echo "gpu_check.sh: $1 is no program; hint: cargo build --release, with nvcc" >&2; exit 2; }
engine=$(realpath "$1")
mkdir -p "$2" && cd "$2" || exit 1
failed=()

# check NAME COMMAND...: its output goes to NAME.log and the screen.
check() {
    local name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$name.log" || failed+=("$name")
}

# measure NAME COMMAND...: what it prints is JSON, and goes to NAME.json.
measure() {
    local name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" >"$name.json" 2>"$name.log" || { failed+=("$name"); cat "$name.log"; }
}

check device nvidia-smi
check version "$engine" --version
check selftest "$engine" selftest --device cuda
for tool in memcheck racecheck synccheck; do
    if command -v compute-sanitizer >/dev/null; then
        check "$tool" compute-sanitizer --tool "$tool" --error-exitcode 86 "$engine" selftest --device cuda --dtype bf16
    else
        echo "no compute-sanitizer: $tool left out" | tee "$tool.log"
    fi
done
for dtype in bf16 f32; do
    check "ops-$dtype" "$engine" bench ops --device cuda --dtype "$dtype"
    measure "ops-$dtype" "$engine" bench ops --device cuda --dtype "$dtype" --json
done

[ ${#failed[@]} -eq 0 ] || { printf '\nfailed: %s\n' "${failed[*]}"; exit 1; }
printf '\nall checks passed\n'
