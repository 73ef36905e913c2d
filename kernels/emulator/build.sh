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
if [ -z "$compiler" ]; then
    echo "the CUDA emulator needs a C++17 compiler: found no c++, g++ or clang++; CXX=PATH names one" >&2
    exit 1
fi

# The emulator itself is never instrumented: it tells the sanitizers what they must know.
common="-std=c++17 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -pthread"
common="$common -Wall -Wextra -Wno-unknown-pragmas -DSIMSIAM_EMULATOR"
watched="-O1 -g -fno-omit-frame-pointer"
instrumented=
case ${1:-} in
    address)
        common="$common $watched -DSIMSIAM_SANITIZE_ADDRESS"
        instrumented="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
        ;;
    thread)
        common="$common $watched -DSIMSIAM_SANITIZE_THREAD"
        instrumented=-fsanitize=thread
        ;;
    *) common="$common -O2" ;;
esac
[ -z "$instrumented" ] || shift

objects=$out.objects
mkdir -p "$objects"
exec 9>"$objects/lock"
if command -v flock >/dev/null; then flock 9; fi # against others who build the same
newest_header=$(ls -t "$kernels"/*.cuh "$here"/*.h "$0" | head -n 1)

# Whether a file is there, and was made by this command.
is_made_by() { # FILE COMMAND
    [ -e "$1" ] && [ "$2" = "$(cat "$1.command" 2>/dev/null)" ]
}

# Says how to compile a source, if its object is stale.
plan() { # SOURCE FLAGS
    object=$objects/$(basename "$1").o
    command="$compiler $common $2 -I '$kernels' -x c++ -c '$1' -o '$object.new'"
    if ! is_made_by "$object" "$command" || [ "$1" -nt "$object" ] || [ "$newest_header" -nt "$object" ]; then
        rm -f "$object" # so that it never is there without its command, whatever is killed when
        printf '%s\n' "$command" >"$object.command"
        printf '%s\0' "$command && mv '$object.new' '$object'"
    fi
}

link="$compiler -shared -pthread $instrumented"
for source in "$here"/*.cpp "$kernels"/*.cu "$@"; do link="$link '$objects/$(basename "$source").o'"; done
{
    for source in "$here"/*.cpp; do plan "$source" ""; done
    for source in "$kernels"/*.cu "$@"; do plan "$source" "-include emulator/cuda.h $instrumented"; done
} >"$objects/plan"
if [ -s "$objects/plan" ] || ! is_made_by "$out" "$link"; then
    rm -f "$out.command"
    xargs -0 -n 1 -P "${NUM_JOBS:-$(getconf _NPROCESSORS_ONLN)}" sh -c <"$objects/plan"
    sh -c "$link -o '$out.new'"
    mv "$out.new" "$out" # whoever has the old one loaded keeps it
    printf '%s\n' "$link" >"$out.command"
fi
