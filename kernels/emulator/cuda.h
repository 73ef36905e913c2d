// CUDA C++ as the kernels use it, for an ordinary C++17 compiler: common.cuh includes this under SIMSIAM_EMULATOR.
// What is modelled and what is not: README.md.
#pragma once

#include "intrinsics.h"
#include "memory.h"
#include "pairs.h"
#include "registry.h"
#include "runtime.h"
#include "types.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

// A block stays on one thread of the operating system, so what is local to that thread is shared by the block. The
// address sanitizer guards plain globals only; its build runs one block at a time.
#ifdef SIMSIAM_SANITIZE_ADDRESS
#define __shared__ static
#else
#define __shared__ static __thread
#endif
#define DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulator::dynamic_shared())

// The constructors of a file run in order: EXPORT registers the kernel with the bound that KERNEL has left before it.
#define KERNEL(threads)                                                         \
    static const emulator::Bound EMULATOR_UNIQUE(bound_, __COUNTER__){threads}; \
    extern "C" __global__ void
#define KERNEL_RESIDENT(threads, blocks) KERNEL(threads)
#define EXPORT(name) static const emulator::Registration<&name> registration_##name{#name};

#define EMULATOR_UNIQUE(prefix, number) EMULATOR_JOIN(prefix, number)
#define EMULATOR_JOIN(a, b) a##b

#define threadIdx (emulator::current_thread().index)
#define blockIdx (emulator::current_thread().place->block)
#define blockDim (emulator::current_thread().place->block_size)
#define gridDim (emulator::current_thread().place->grid_size)
constexpr int warpSize = 32;

// Barriers of the block. All threads must come to the same line.
inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site, false); }
inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::here()) {
    return static_cast<int>(emulator::block_barrier(site, predicate != 0));
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::block_barrier(site, predicate == 0) == 0;
}
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::here()) {
    return emulator::block_barrier(site, predicate != 0) != 0;
}
