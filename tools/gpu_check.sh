#!/usr/bin/env bash
# Everything there is to check and to measure on a machine with a GPU, in one call:
#
#   tools/gpu_check.sh [--quick|--full] [--only check,bench,train] ENGINE OUT [DATA [TEST]]
#
# ENGINE  the program. Build it anywhere with nvcc and carry it over; it links nothing of CUDA:
#             cargo build --release && strip target/release/simsiam-engine
#         The machine needs NVIDIA's driver, cuDNN 9 and cuBLAS 13 (those that PyTorch brings are found), and for the comparison
#         python3 with torch and torchvision.
# OUT     becomes a folder of logs, JSON, a profile as PNG, and summary.md with the side-by-side table (also as table.json).
# DATA    CIFAR-10 or the like, as a dataset file or anything that `prepare` takes; TEST its labelled test images, for kNN.
#         Without DATA nothing is trained.
#
#   --quick   what fits into 9 minutes on an H100 (the default)
#   --full    more element types and modes, racecheck and synccheck, longer training: up to an hour
#   --only    some of the parts: check (does it compute the right thing?), bench (how fast?), train. One alone has all 9 minutes:
#             three calls into the same OUT are worth more than one.
#
# A step that fails or takes too long does not stop the others. The exit code is 1 when one did.
#
# Variables: PYTHON (default python3); LIMIT, seconds for everything; TRAIN_SECONDS and EPOCHS of the training;
# DEVICE=cpu SMALL=1 rehearses the script on a machine without a GPU, with tiny sizes.
set -uo pipefail

usage() {
    sed -n '2,/^# Variables/p' "$0" | sed 's/^# \{0,1\}//'
    exit 2
}

full=0
parts=check,bench,train
while [ $# -gt 0 ]; do
    case $1 in
        --quick) full=0 ;;
        --full) full=1 ;;
        --only) parts=${2:?--only: expected some of check,bench,train}; shift ;;
        -*) usage ;;
        *) break ;;
    esac
    shift
done
[ $# -ge 2 ] && [ $# -le 4 ] || usage
[ -f "$1" ] && [ -x "$1" ] || { echo "gpu_check.sh: $1 is no program; hint: cargo build --release, with nvcc" >&2; exit 2; }
for part in ${parts//,/ }; do
    [[ $part =~ ^(check|bench|train)$ ]] || { echo "gpu_check.sh: --only: expected some of check,bench,train, got $part" >&2; exit 2; }
done
for file in "${@:3}"; do
    [ -e "$file" ] || { echo "gpu_check.sh: $file is not there" >&2; exit 2; }
done
engine=$(realpath "$1")
tools=$(realpath "$(dirname "$0")")
data=${3:+$(realpath "$3")}
test=${4:+$(realpath "$4")}
mkdir -p "$2" && cd "$2" || exit 1

device=${DEVICE:-cuda}
python=${PYTHON:-python3}
if [ "$full" = 1 ]; then
    limit=3500 torch_seconds=1800 sanitizer_seconds=900 train_seconds=900 epochs=200
elif [[ $parts == *,* ]]; then
    limit=530 torch_seconds=180 sanitizer_seconds=60 train_seconds=60 epochs=20
else
    # One part has all the time to itself.
    limit=530 torch_seconds=330 sanitizer_seconds=240 train_seconds=430 epochs=100
fi
deadline=$((SECONDS + ${LIMIT:-$limit}))
train_seconds=${TRAIN_SECONDS:-$train_seconds} epochs=${EPOCHS:-$epochs}
if [ "${SMALL:-0}" = 1 ]; then
    batches=(4 6)
    step=(--arch custom --block basic --depths '1,1' --width 8 --stem cifar --dim 24 --projector-hidden 20 --image-size 18)
    torch_step=(--arch custom --block basic --depths '1,1' --width 8 --stem cifar --dim 24 --hidden 20 --pred-dim 6 --image-size 18)
    train=(--arch custom --block basic --depths '1,1' --width 8 --dim 24 --projector-hidden 20 --image-size 12 --batch 50)
else
    # The first is where all of PyTorch's modes are tried; from two of them it is known how many images are the most.
    batches=(256 512 largest 128 64)
    step=(--preset imagenet)
    torch_step=(--arch resnet50 --image-size 224)
    train=(--batch 512)
fi
case $device in
    cuda*) dtype=bf16 torch_device=cuda torch_dtypes=bf16,fp16 torch_modes=compile-graph,graph,eager ;;
    *) dtype=f32 torch_device=cpu torch_dtypes=f32 torch_modes=eager ;;
esac

names=() states=() times=() failures=0

# note NAME STATE SECONDS
note() {
    names+=("$1") states+=("$2") times+=("$3")
    case $2 in passed | "left out"*) ;; *) failures=$((failures + 1)) ;; esac
    [ "$2" = passed ] || printf '>> %s: %s\n' "$1" "$2"
}

# run_step NAME SECONDS OUTPUT COMMAND...: at most so long, and no longer than the whole may take; standard output goes to
# OUTPUT, everything else to NAME.log.
run_step() {
    local name=$1 limit=$2 output=$3 start=$SECONDS left=$((deadline - SECONDS)) code
    shift 3
    printf '\n== %s: %s\n' "$name" "$*"
    if [ "$left" -lt 5 ]; then
        note "$name" "left out: no time" 0
        return
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    printf '%s\n' "$*" >"$name.log"
    if [ "$output" = "$name.log" ]; then
        timeout -k 10 "$limit" "$@" >>"$name.log" 2>&1
    else
        timeout -k 10 "$limit" "$@" >"$output" 2>>"$name.log"
    fi
    code=$?
    tail -n 25 "$name.log" | tail -n +2 | cut -c 1-200
    case $code in
        0) note "$name" passed $((SECONDS - start)) ;;
        124 | 137) note "$name" "out of time after $limit s" $((SECONDS - start)) ;;
        *) note "$name" "FAILED with exit code $code" $((SECONDS - start)) ;;
    esac
}

# check NAME SECONDS COMMAND...: what it prints goes to NAME.log.
check() {
    run_step "$1" "$2" "$1.log" "${@:3}"
}

# measure NAME SECONDS COMMAND...: it prints JSON, to NAME.json.
measure() {
    run_step "$1" "$2" "$1.json" "${@:3}"
}

has_part() {
    [[ ,$parts, == *,$1,* ]]
}

check_results() {
    check selftest 120 "$engine" selftest --device "$device"
    if [ "$torch_device" = cuda ]; then
        # Steps under graph replay against the same steps launched node by node, bit for bit; then node by node against the CPU.
        check replay 90 "$engine" selftest --device "$device" --replay
        check lockstep 90 "$engine" selftest --device "$device" --lockstep
    fi
    check selftest-gram 120 "$engine" selftest --device "$device" --dtype f32 --bn gram
    [ "$full" = 0 ] || check selftest-sequential 120 "$engine" selftest --device "$device" --dtype f32 --views sequential
    local tool tools_of_sanitizer=(memcheck)
    [ "$full" = 0 ] || tools_of_sanitizer+=(racecheck synccheck)
    for tool in "${tools_of_sanitizer[@]}"; do
        if [ "$torch_device" = cpu ] || ! command -v compute-sanitizer >/dev/null; then
            note "$tool" "left out: no compute-sanitizer here" 0
            continue
        fi
        check "$tool" "$sanitizer_seconds" compute-sanitizer --tool "$tool" --error-exitcode 86 "$engine" selftest --device "$device" --dtype "$dtype"
    done
}

measure_speed() {
    local batch
    local -a profile_files=(--json profile.json --png profile.png)
    for batch in "${batches[@]}"; do
        measure "step-$dtype-$batch" 90 "$engine" bench step "${step[@]}" --device "$device" --dtype "$dtype" --batch "$batch" --json
    done
    # Batch norm without the results of the wide convolutions, at the first batch and at the most that fits then.
    for batch in "${batches[0]}" "${batches[2]:-${batches[1]}}"; do
        measure "step-gram-$dtype-$batch" 90 "$engine" bench step "${step[@]}" --device "$device" --dtype "$dtype" --batch "$batch" --bn gram --json
    done
    # The other 16 bits, in which cuDNN knows more.
    [ "$torch_device" = cpu ] || measure "step-fp16-${batches[0]}" 90 "$engine" bench step "${step[@]}" --device "$device" --dtype fp16 --batch "${batches[0]}" --json
    check profile 90 "$engine" profile "${step[@]}" --device "$device" --dtype "$dtype" --batch "${batches[0]}" "${profile_files[@]}"
    check profile-gram 90 "$engine" profile "${step[@]}" --device "$device" --dtype "$dtype" --batch "${batches[0]}" --bn gram --json profile-gram.json --png profile-gram.png
    if ! "$python" -c 'import torch, torchvision' 2>/dev/null; then
        note pytorch "left out: $python has no torch and torchvision" 0
    else
        local list warm=(--steps 60 --per-round 6 --warm-up 6)
        [ "$torch_device" = cuda ] || warm=(--steps 2 --warm-up 1)
        list=$(IFS=,; echo "${batches[*]}")
        [ "$full" = 0 ] || torch_modes+=,compile,reduce-overhead,max-autotune
        run_step pytorch "$torch_seconds" pytorch.jsonl "$python" "$tools/pytorch_baseline.py" "${torch_step[@]}" --device "$torch_device" \
            --memory-format channels_last --dtype "$torch_dtypes" --mode "$torch_modes" --batch "$list" --narrow $((full ? 2 : 1)) \
            --time-limit $((torch_seconds - 45)) "${warm[@]}" --json
    fi
    # Times every algorithm of the libraries, and keeps what it found in their cache.
    measure "step-autotune-$dtype-${batches[0]}" 120 "$engine" bench step "${step[@]}" --device "$device" --dtype "$dtype" --batch "${batches[0]}" --autotune --json
    measure ops 60 "$engine" bench ops --device "$device" --json
    if [ "$full" = 0 ] || [ "$torch_device" = cpu ]; then return; fi
    measure "step-no-graph-$dtype-${batches[0]}" 120 "$engine" bench step "${step[@]}" --device "$device" --dtype "$dtype" --batch "${batches[0]}" --no-graph --json
    for dtype in tf32 f32; do
        measure "step-$dtype-${batches[0]}" 180 "$engine" bench step "${step[@]}" --device "$device" --dtype "$dtype" --batch "${batches[0]}" --json
    done
}

# prepared FILE NAME: the dataset file of FILE, made if it is none yet.
prepared() {
    case $1 in
        *.ssds) echo "$1" ;;
        *) [ -e "$2.ssds" ] || "$engine" prepare "$1" "$2.ssds" >"$2.log" 2>&1; echo "$PWD/$2.ssds" ;;
    esac
}

train_network() {
    local -a knn=()
    local bank
    if [ -z "$data" ]; then
        note train "left out: no DATA was given" 0
        return
    fi
    bank=$(prepared "$data" train-data)
    [ -z "$test" ] || knn=(--knn-bank "$bank" --knn-queries "$(prepared "$test" test-data)")
    rm -rf run
    # Interrupted it writes a checkpoint and ends with 130, which is all that is asked of it here.
    # shellcheck disable=SC2016 # the inner shell is to expand these
    check train $((train_seconds + 60)) bash -c 'timeout --preserve-status -s INT "$0" "$@" || [ $? -eq 130 ]' \
        "$train_seconds" "$engine" train "$bank" --run run --preset cifar "${train[@]}" --epochs "$epochs" \
        --device "$device" --dtype "$dtype" --workers $(($(nproc) / 2 + 1)) "${knn[@]}"
}

check version 20 "$engine" --version
if [ "$torch_device" = cuda ]; then
    check device 20 nvidia-smi
    check devices 60 "$engine" devices
    check devices-describe 60 "$engine" devices --describe device.json
fi
if has_part check; then check_results; fi
if has_part train && [ "$full" = 0 ]; then train_network; fi
if has_part bench; then measure_speed; fi
if has_part train && [ "$full" = 1 ]; then train_network; fi

for i in "${!names[@]}"; do
    printf '{"step": "%s", "result": "%s", "seconds": %s}\n' "${names[i]}" "${states[i]}" "${times[i]}"
done >"steps-${parts//,/-}.jsonl"
printf '\n'
if "$python" "$tools/bench_table.py" . 2>table.log; then cat summary.md; else cat table.log "steps-${parts//,/-}.jsonl"; fi
printf '\n%d of %d steps failed, after %d s; everything is in %s\n' "$failures" "${#names[@]}" "$SECONDS" "$PWD"
[ "$failures" -eq 0 ]
