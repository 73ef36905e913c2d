#!/bin/sh
# Compiles the kernels and the emulator to one shared library: build.sh OUT.so [address|thread] [MORE.cu ...]
# Objects are kept in OUT.so.objects and compiled again only when a source, a header or the command has changed.
set -eu

[ $# -ge 1 ] || { echo "usage: $0 OUT.so [address|thread] [MORE.cu ...]" >&2; exit 2; }
out=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
kernels=$(dirname "$here")

compiler=${CXX:-}
for candidate in c++ g++ clang++; do
    [ -n "$compiler" ] || ! command -v "$candidate" >/dev/null || compiler=$candidate
done
[ -n "$compiler" ] || { echo "the CUDA emulator needs a C++17 compiler: found no c++, g++ or clang++; CXX=PATH names one" >&2; exit 1; }

# The emulator itself is never instrumented: it tells the sanitizers what they must know.
common="-std=c++17 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -pthread -Wall -Wextra -Wno-unknown-pragmas -DSIMSIAM_EMULATOR"
instrumented=
case ${1:-} in
    address) common="$common -O1 -g -fno-omit-frame-pointer -DSIMSIAM_SANITIZE_ADDRESS" instrumented=-fsanitize=address ;;
    thread) common="$common -O1 -g -fno-omit-frame-pointer -DSIMSIAM_SANITIZE_THREAD" instrumented=-fsanitize=thread ;;
    *) common="$common -O2" ;;
esac
[ -z "$instrumented" ] || shift

objects=$out.objects
mkdir -p "$objects"
newest_header=$(ls -t "$kernels"/*.cuh "$here"/*.h "$0" | head -n 1)

# Says how to compile a source, unless its object is that of the same source, headers and command.
plan() { # SOURCE FLAGS
    object=$objects/$(basename "$1").o
    command="$compiler $common $2 -I '$kernels' -x c++ -c '$1' -o '$object'"
    if [ ! -e "$object" ] || [ "$1" -nt "$object" ] || [ "$newest_header" -nt "$object" ] ||
        [ "$command" != "$(cat "$object.command" 2>/dev/null)" ]; then
        printf '%s\n' "$command" >"$object.command"
        printf '%s\0' "rm -f '$object' && $command"
    fi
}

plan_all() {
    for source in "$here"/*.cpp; do plan "$source" ""; done
    for source in "$kernels"/*.cu "$@"; do plan "$source" "-include emulator/cuda.h $instrumented"; done
}

list_objects() {
    for source in "$here"/*.cpp "$kernels"/*.cu "$@"; do printf "%s\0" "$objects/$(basename "$source").o"; done
}

jobs=${NUM_JOBS:-$(getconf _NPROCESSORS_ONLN)}
plan_all "$@" | xargs -0 -r -n 1 -P "$jobs" sh -c
list_objects "$@" | xargs -0 "$compiler" -shared -pthread $instrumented -o "$out.new"
mv "$out.new" "$out" # whoever has the old one loaded keeps it
