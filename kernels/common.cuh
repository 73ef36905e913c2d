// What all kernels share: element types, 16-byte packs, sums over warps and blocks, and the macros that let one source
// compile for the device (nvcc) and for the emulator (any C++17 compiler with -DSIMSIAM_EMULATOR).
//
// Everything is compiled without fused multiply-add unless the code says `fmaf` (nvcc -fmad=false, g++ -ffp-contract=off):
// the emulator and every GPU then round alike, and sums do not depend on what the optimiser happened to fuse.
#pragma once

#ifdef SIMSIAM_EMULATOR
#include "emulator/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
// A kernel with an unmangled name, for blocks of exactly `threads` threads. Each is followed by EXPORT(name).
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
// The same, with how many blocks a multiprocessor shall hold at least: keeps the compiler from spilling to fit more.
#define KERNEL_RESIDENT(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define EXPORT(name)
// Shared memory whose size the launch decides; at most one per kernel.
#define DYNAMIC_SHARED(T, name)                              \
    extern __shared__ __align__(16) unsigned char shared_[]; \
    T* const name = reinterpret_cast<T*>(shared_)
#endif

// Stamps INSTANTIATE(type, suffix) for each element type of activations.
#define FOR_EACH_TYPE(INSTANTIATE) \
    INSTANTIATE(float, f32)        \
    INSTANTIATE(bf16, bf16)        \
    INSTANTIATE(f16, f16)

typedef __nv_bfloat16 bf16;
typedef __half f16;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------------------
// Elements. All arithmetic is in float; a store rounds to nearest even.

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// Elements in 16 bytes.
template <class T> constexpr int WIDTH = 16 / sizeof(T);

// N elements that are loaded and stored in one access: N = WIDTH<T> where a row of channels is a multiple of it, else 1.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T element[N];
};

// Reads N elements as floats; `from` is aligned to all N of them.
template <int N, class T> __device__ __forceinline__ void load(float (&to)[N], const T* from) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(pack.element[i]);
}

// Writes N floats, rounded; `to` is aligned to all N of them.
template <int N, class T> __device__ __forceinline__ void store(T* to, const float (&from)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.element[i] = from_float<T>(from[i]);
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Copies N elements bit for bit; both places are aligned to all N of them.
template <int N, class T> __device__ __forceinline__ void copy_pack(T* to, const T* from) {
    *reinterpret_cast<Pack<T, N>*>(to) = *reinterpret_cast<const Pack<T, N>*>(from);
}

// As `store`, or adds to what is there, in float, when `accumulate` is set.
template <int N, class T> __device__ __forceinline__ void store_or_add(T* to, float (&value)[N], bool accumulate) {
    if (accumulate) {
        float old[N];
        load(old, to);
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] += old[i];
    }
    store(to, value);
}

// ---------------------------------------------------------------------------------------------------------------------
// Grid-stride loops.

__device__ __forceinline__ int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t global_threads() { return int64_t{gridDim.x} * blockDim.x; }

// Calls f(first, count<N>) for the `n` elements of an array, a pack at a time and the rest one by one; `f` takes the index
// of the first element and, as a compile-time integer, how many.
template <int N> struct Count {
    static constexpr int value = N;
};
template <int N, class F> __device__ __forceinline__ void for_each_pack(int64_t n, F f) {
    const int64_t packs = n / N;
    for (int64_t i = global_thread(); i < packs; i += global_threads()) f(i * N, Count<N>{});
    for (int64_t i = packs * N + global_thread(); i < n; i += global_threads()) f(i, Count<1>{});
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums in a fixed order: the same inputs give the same bits on every run.

// The sum over the warp, in every lane.
template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// The sum over a block of THREADS threads (a multiple of 32), in every thread. `scratch` is shared memory of THREADS / 32
// values; it may be used again right away.
template <int THREADS, class T> __device__ __forceinline__ T block_sum(T x, T* scratch) {
    x = warp_sum(x);
    __syncthreads(); // the last reader of `scratch` is done
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    T total = scratch[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / WARP; ++warp) total += scratch[warp];
    return total;
}

// The maximum over a block, as `block_sum`.
template <int THREADS> __device__ __forceinline__ float block_max(float x, float* scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float largest = scratch[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / WARP; ++warp) largest = fmaxf(largest, scratch[warp]);
    return largest;
}
