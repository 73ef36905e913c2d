#!/bin/sh
# Compiles the driver and the profiler for tests to FOLDER/libcuda.so.1 and FOLDER/libprofiler.so, unless they are there and
# newer than their sources: build.sh FOLDER
set -eu

[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
emulator=$here/../../kernels/emulator

compiler=${CXX:-}
for candidate in c++ g++ clang++; do
    [ -n "$compiler" ] || ! command -v "$candidate" >/dev/null || compiler=$candidate
done
if [ -z "$compiler" ]; then
    echo "the CUDA driver for tests needs a C++17 compiler: found no c++, g++ or clang++; CXX=PATH names one" >&2
    exit 1
fi

mkdir -p "$1"
exec 9>"$1/lock"
if command -v flock >/dev/null; then flock 9; fi # against other tests

build() { # LIBRARY SOURCE...
    library=$1
    shift
    newest=$(ls -t "$@" "$here"/*.h "$emulator/launch.h" "$0" | head -n 1)
    if [ ! -e "$library" ] || [ "$newest" -nt "$library" ]; then
        "$compiler" -std=c++17 -O1 -g -fPIC -shared -fvisibility=hidden -pthread -Wall -Wextra -Werror \
            -I "$emulator" -Wl,-soname,"$(basename "$library")" "$@" -o "$library.new" -ldl
        mv "$library.new" "$library"
    fi
}
build "$1/libcuda.so.1" "$here"/*.cpp
ln -sf libcuda.so.1 "$1/libcuda.so" # before one of the system, which would be found first by this name
build "$1/libprofiler.so" "$here"/profiler/profiler.cpp
