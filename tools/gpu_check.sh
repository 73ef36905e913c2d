#!/usr/bin/env bash
# Everything there is to check and to measure on a machine with a GPU, in one call:
#
#   tools/gpu_check.sh [--quick|--full] [--only bench,check,train,variants] ENGINE OUT [DATA [TEST]]
#
# ENGINE  the program. Build it anywhere with nvcc and carry it over; it links nothing of CUDA:
#             cargo build --release && strip target/release/simsiam-engine
#         The machine needs NVIDIA's driver, cuDNN 9 and cuBLAS 13 (those that PyTorch brings are found), and for the comparison
#         python3 with torch and torchvision.
# OUT     becomes a folder of logs, JSON, a profile as PNG, and summary.md with the side-by-side tables (also as table.json).
# DATA    CIFAR-10 or the like, as a dataset file or anything that `prepare` takes; TEST its labelled test images, for kNN.
#         Without DATA nothing is trained.
#
#   --quick   what fits into 9 minutes on an H100 (the default)
#   --full    more element types, modes and sanitizers, longer training: up to an hour
#   --only    some of the parts. They have all 9 minutes then: calls into the same OUT are worth more than one; of three for
#             instance bench, then train, then check,variants.
#                 bench     the engine beside PyTorch at batch 256 and at the largest batch of each, and a profile
#                 check     does it compute the right thing?
#                 train     a run from DATA, and whether it resumes bit for bit
#                 variants  other ways to compute the same step, beside the standard one
#
# What matters most comes first, whatever the order of the parts, so that a limit cuts the least. A step that fails or takes too
# long does not stop the others. The exit code is 1 when one did.
#
# Variables: PYTHON (default python3); LIMIT, seconds for everything; TRAIN_SECONDS and EPOCHS of the training (default: as many
# as fit); DEVICE=cpu SMALL=1 or DEVICE=cuda-emulated SMALL=1 rehearses the script on a machine without a GPU, with tiny sizes.
set -uo pipefail

usage() {
    sed -n '2,/^# Variables/p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 2
}

full=0
parts=bench,check,train,variants
while [ $# -gt 0 ]; do
    case $1 in
        --quick) full=0 ;;
        --full) full=1 ;;
        --only) parts=${2:?--only: expected some of bench,check,train,variants}; shift ;;
        -*) usage ;;
        *) break ;;
    esac
    shift
done
[ $# -ge 2 ] && [ $# -le 4 ] || usage
[ -f "$1" ] && [ -x "$1" ] || { echo "gpu_check.sh: $1 is no program; hint: cargo build --release, with nvcc" >&2; exit 2; }
for part in ${parts//,/ }; do
    [[ $part =~ ^(bench|check|train|variants)$ ]] || { echo "gpu_check.sh: --only: expected some of bench,check,train,variants, got $part" >&2; exit 2; }
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
    limit=3500 sanitizer_seconds=900 train_seconds=900
elif [[ $parts == *,* ]]; then
    limit=530 sanitizer_seconds=60 train_seconds=60
else
    # One part has all the time to itself.
    limit=530 sanitizer_seconds=150 train_seconds=360
fi
deadline=$((SECONDS + ${LIMIT:-$limit}))
train_seconds=${TRAIN_SECONDS:-$train_seconds}
gpu=0 cuda=0
case $device in
    cuda-emulated) cuda=1 dtypes=(bf16 fp16) ;;
    cuda*) gpu=1 cuda=1 dtypes=(bf16 fp16) ;;
    *) dtypes=(f32) ;;
esac
dtype=${dtypes[0]}
small=(--arch custom --block bottleneck --depths '1,1' --width 8 --dim 24 --projector-hidden 20)
if [ "${SMALL:-0}" = 1 ]; then
    batch=4 largest=6
    # An emulated device has as much memory as it is told, and so a largest batch too.
    [ "$cuda$gpu" != 10 ] || largest=largest
    step=("${small[@]}" --stem imagenet --image-size 34)
    torch=(--arch custom --block bottleneck --depths '1,1' --width 8 --stem imagenet --dim 24 --hidden 20 --pred-dim 6 --image-size 34)
    train=("${small[@]}" --image-size 12 --batch 500)
    default_epochs=2 resume_at=5
else
    batch=256 largest=largest
    step=(--preset imagenet)
    torch=(--arch resnet50 --image-size 224)
    train=(--batch 512)
    default_epochs=100 resume_at=40
fi

names=() states=() times=() failures=0

# note NAME STATE SECONDS
note() {
    names+=("$1") states+=("$2") times+=("$3")
    case $2 in passed | "left out"* | "cut short"*) ;; *) failures=$((failures + 1)) ;; esac
    [ "$2" = passed ] || printf '>> %s: %s\n' "$1" "$2"
}

# run_step NAME SECONDS OUTPUT COMMAND...: at most so long, and no longer than the whole may take; standard output goes to
# OUTPUT, everything else to NAME.log.
run_step() {
    local name=$1 limit=$2 output=$3 start=$SECONDS left=$((deadline - SECONDS)) over="out of time after $2 s" code
    shift 3
    printf '\n== %s: %s\n' "$name" "$*"
    if [ "$left" -lt 5 ]; then
        note "$name" "left out: no time" 0
        return
    fi
    [ "$limit" -lt "$left" ] || limit=$left over="cut short after $left s: no time"
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
        124 | 137) note "$name" "$over" $((SECONDS - start)) ;;
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

# engine_step NAME DTYPE BATCH OPTIONS...: whole steps, to step-NAME-DTYPE-BATCH.json, or step-DTYPE-BATCH.json with - for NAME; of
# the largest batch a few, for they take a quarter of a second each.
engine_step() {
    local name=step-$1-$2-$3 size=$3
    local -a few=()
    [ "$1" != - ] || name=step-$2-$3
    [ "$size" != largest ] || few=(--warmup 3 --steps 5 --rounds 5) size=$largest
    measure "$name" 150 "${emulated_memory[@]}" "$engine" bench step "${step[@]}" --device "$device" --dtype "$2" --batch "$size" "${few[@]}" "${@:4}" --json
}
emulated_memory=()
[ "$cuda$gpu" != 10 ] || emulated_memory=(env "SIMSIAM_EMULATOR_MEMORY=${SIMSIAM_EMULATOR_MEMORY:-45000000}")

has_part() {
    [[ ,$parts, == *,$1,* ]]
}

has_torch=
# torch_steps NAME SECONDS OPTIONS...: PyTorch's steps, to pytorch-NAME.jsonl.
torch_steps() {
    local -a where=(--device cpu --steps 2 --warm-up 1)
    [ -n "$has_torch" ] || { "$python" -c 'import torch, torchvision' 2>/dev/null && has_torch=yes || has_torch=no; }
    if [ "$has_torch" = no ]; then
        note "pytorch-$1" "left out: $python has no torch and torchvision" 0
        return
    fi
    [ "$gpu" = 0 ] || where=(--device cuda --steps 60 --per-round 6 --warm-up 6)
    run_step "pytorch-$1" "$2" "pytorch-$1.jsonl" "$python" "$tools/pytorch_baseline.py" "${torch[@]}" --memory-format channels_last \
        "${where[@]}" "${@:3}" --json
}

# Whether the engine is 1.2 times as fast as PyTorch: at the same batch, and at the largest of each. Compiling for PyTorch takes
# about 90 seconds for each batch and element type on an H100.
compare_with_pytorch() {
    engine_step - "$dtype" "$batch"
    engine_step - "$dtype" largest
    if [ "$gpu" = 1 ]; then
        torch_steps "$dtype" 240 --dtype "$dtype" --mode compile-graph --batch "$batch,largest"
    else
        torch_steps f32 240 --dtype f32 --mode eager --batch "$batch,6"
    fi
}

# The profile, and whether PyTorch is faster in another mode or element type than in the one that was compared with.
measure_more() {
    check profile 90 "$engine" profile "${step[@]}" --device "$device" --dtype "$dtype" --batch "$batch" --json profile.json --png profile.png
    [ "$cuda" = 0 ] || engine_step - fp16 "$batch"
    if [ "$gpu" = 1 ]; then
        torch_steps fp16 240 --dtype fp16 --mode compile-graph --batch "$batch,largest"
        torch_steps uncompiled 150 --dtype bf16,fp16 --mode graph,eager --batch "$batch"
    fi
    [ "$full" = 1 ] && [ "$gpu" = 1 ] || return
    torch_steps modes 900 --dtype bf16,fp16 --mode compile,reduce-overhead,max-autotune --batch "$batch"
    torch_steps batches 600 --dtype bf16 --mode compile-graph --batch 512,128,64
    local n
    for n in 512 128 64; do engine_step - bf16 "$n"; done
    for n in tf32 f32; do engine_step - "$n" "$batch"; done
}

check_results() {
    check selftest 150 "$engine" selftest --device "$device"
    if [ "$cuda" = 1 ]; then
        # Steps under graph replay against the same steps launched node by node, bit for bit, and what they allocate; then node by
        # node against the CPU.
        local steps=200
        [ "$gpu" = 1 ] || steps=8
        check replay 90 "$engine" selftest --device "$device" --replay "$steps"
        check lockstep 90 "$engine" selftest --device "$device" --lockstep
    fi
    sanitize memcheck-lockstep memcheck selftest --device "$device" --lockstep
    check selftest-gram 150 "$engine" selftest --device "$device" --dtype f32 --bn gram
    check selftest-sequential 150 "$engine" selftest --device "$device" --dtype f32 --views sequential
    # Graphs, libraries and copies in 16 bits, then every kernel.
    sanitize memcheck-step memcheck bench step "${small[@]}" --stem imagenet --image-size 34 --device "$device" --dtype "$dtype" --batch 4 --warmup 0 --steps 3 --rounds 2
    sanitize memcheck-selftest memcheck selftest --device "$device" --dtype "$dtype"
    [ "$full" = 1 ] || return
    sanitize racecheck racecheck selftest --device "$device" --dtype "$dtype"
    sanitize synccheck synccheck selftest --device "$device" --dtype "$dtype"
}

# sanitize NAME TOOL ARGUMENTS...: the engine under a tool of compute-sanitizer.
sanitize() {
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
    if [ "$gpu" = 0 ]; then
        note "$1" "left out: no GPU" 0
    elif [ -z "$sanitizer" ]; then
        note "$1" "left out: no compute-sanitizer here" 0
    else
        check "$1" "$sanitizer_seconds" "$sanitizer" --tool "$2" --error-exitcode 86 "$engine" "${@:3}"
    fi
}

# Other ways to compute the same step, each as a whole step beside the standard one.
measure_variants() {
    local d
    for d in "${dtypes[@]}"; do
        # One that was measured just now is as good.
        [[ " ${names[*]} " == *" step-$d-$batch "* ]] || engine_step - "$d" "$batch"
    done
    engine_step gram "$dtype" "$batch" --bn gram
    [ "$cuda" = 0 ] || engine_step statistics fp16 "$batch" --fuse-statistics auto
    engine_step pooling "$dtype" "$batch" --fuse-pooling true
    engine_step shortcut "$dtype" "$batch" --fuse-shortcut false
    [ "$cuda" = 0 ] || engine_step residual "$dtype" "$batch" --residual-gradient fused
    engine_step gram "$dtype" largest --bn gram
    engine_step sequential "$dtype" "$batch" --views sequential
    engine_step budget "$dtype" "$batch" --memory-budget min
    if [ "$cuda" = 1 ]; then
        # Times every algorithm of the libraries, and keeps what it found in their cache.
        engine_step autotune "$dtype" "$batch" --autotune
        engine_step no-graph "$dtype" "$batch" --no-graph
    fi
    check profile-gram 90 "$engine" profile "${step[@]}" --device "$device" --dtype "$dtype" --batch "$batch" --bn gram --json profile-gram.json --png profile-gram.png
    # Of its own sizes, which are too much for an emulated device.
    [ "$gpu" = 0 ] || measure ops 90 "$engine" bench ops --device "$device" --json
    [ "$full" = 1 ] && [ "$cuda" = 1 ] || return
    engine_step statistics-pooling fp16 "$batch" --fuse-statistics auto --fuse-pooling true
    engine_step statistics "$dtype" "$batch" --fuse-statistics all
    engine_step gram-pooling "$dtype" "$batch" --bn gram --fuse-pooling true
    engine_step sequential "$dtype" largest --views sequential
}

# prepared FILE NAME: sets `dataset` to the dataset file of FILE, made if it is none yet; in the images' own size, for what is
# trained here is small.
prepared() {
    case $1 in
        *.ssds) dataset=$1 ;;
        *)
            dataset=$PWD/$2.ssds
            [ -e "$dataset" ] || check "$2" 120 "$engine" prepare "$1" "$dataset" --store raw
            ;;
    esac
}

train_network() {
    local -a knn=() to_train
    local dataset bank epochs seconds
    if [ -z "$data" ]; then
        note train "left out: no DATA was given" 0
        return
    fi
    prepared "$data" train-data
    bank=$dataset
    if [ -n "$test" ]; then
        prepared "$test" test-data
        knn=(--knn-bank "$bank" --knn-queries "$dataset")
    fi
    to_train=(--preset cifar "${train[@]}" --device "$device" --dtype "$dtype" --workers $(($(nproc) / 2 + 1)))
    measure train-speed 60 "$engine" bench step "${to_train[@]}" --data "$bank" --json
    seconds=$((deadline - SECONDS - 60))
    [ "$seconds" -lt "$train_seconds" ] || seconds=$train_seconds
    if [ "$seconds" -lt 10 ]; then
        note train "left out: no time" 0
        return
    fi
    epochs=${EPOCHS:-$(epochs_in "$seconds" "$bank")}
    rm -rf run
    # Interrupted it writes a checkpoint and ends well. The signal goes to the engine alone: a second one would end it at once.
    check train $((seconds + 30)) timeout --foreground --preserve-status -s INT "$seconds" "$engine" train "$bank" --run run "${to_train[@]}" \
        --epochs "$epochs" --checkpoint-epochs $((epochs / 4 + 1)) "${knn[@]}" --knn-every $((epochs / 10 + 1))
    # Of the newest checkpoint, whatever became of the run; the search is the device's too.
    [ -z "$test" ] || measure knn 90 "$engine" eval knn run --bank "$bank" --queries "$dataset" --device "$device" --json
    resume_exactly "$bank"
}

# epochs_in SECONDS DATASET: how many epochs fit, by the speed just measured, with three tenths of the time for all else.
epochs_in() {
    local records
    records=$("$engine" inspect "$2" 2>/dev/null | awk '$1 == "records" { print $2 + 0 }')
    awk -v seconds="$1" -v records="${records:-0}" -v epochs="$default_epochs" '
        /"images_per_s"/ && records > 0 { epochs = int(0.7 * seconds * ($2 + 0) / records) }
        END { print epochs < 1 ? 1 : epochs }' train-speed.json
}

# Whether an epoch that goes on from a checkpoint ends with the bytes of one that was not interrupted.
resume_exactly() {
    rm -rf run-whole run-resumed
    # shellcheck disable=SC2016 # the inner shell is to expand these
    check resume 180 bash -euc '
        "$0" train "${@:2}" --run run-whole --epochs 1 --checkpoint-steps "$1" --keep-last 1000
        cp -r run-whole run-resumed
        last=$(ls run-whole/checkpoints/*.safetensors | tail -n 1)
        # Only the first one is left to go on from.
        ls run-resumed/checkpoints/*.safetensors | tail -n +2 | xargs rm
        "$0" train --resume run-resumed
        cmp "$last" "run-resumed/checkpoints/${last##*/}"
        echo "resumed from the first checkpoint, ${last##*/} is the same byte for byte"
        rm -r run-whole run-resumed' \
        "$engine" "$resume_at" "$1" "${to_train[@]}"
}

check version 20 "$engine" --version
if [ "$gpu" = 1 ]; then
    check device 20 nvidia-smi
    check devices 60 "$engine" devices
    check devices-describe 60 "$engine" devices --describe device.json
fi
if has_part bench; then compare_with_pytorch; fi
if has_part check; then check_results; fi
if has_part train; then train_network; fi
if has_part bench; then measure_more; fi
if has_part variants; then measure_variants; fi

for i in "${!names[@]}"; do
    printf '{"step": "%s", "result": "%s", "seconds": %s}\n' "${names[i]}" "${states[i]}" "${times[i]}"
done >"steps-${parts//,/-}.jsonl"
printf '\n'
if "$python" "$tools/bench_table.py" . 2>table.log; then cat summary.md; else cat table.log "steps-${parts//,/-}.jsonl"; fi
printf '\n%d of %d steps failed, after %d s; everything is in %s\n' "$failures" "${#names[@]}" "$SECONDS" "$PWD"
[ "$failures" -eq 0 ]
