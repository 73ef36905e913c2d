// Kernels with planted faults, each of which the emulator must catch, and one without any. Not part of the library: tests give
// this file to build.sh.
#include "common.cuh"

// out[i] = sum over the block's elements and the neighbour's value, by all that the others do wrong: shared memory static and
// dynamic, barriers, shuffles, partial masks. In blocks of 64, `in` and `out` have 64 elements for each block.
KERNEL(64) correct(const float* in, float* out) {
    __shared__ float scratch[64 / WARP];
    DYNAMIC_SHARED(float, copy);
    const int64_t i = global_thread();
    copy[threadIdx.x] = in[i];
    __syncthreads();
    const float neighbour = copy[63 - threadIdx.x];
    float other = neighbour;
    if (threadIdx.x % WARP < 16) other = __shfl_down_sync(0x0000ffffu, neighbour, 1, 16);
    const float total = block_sum<64>(copy[threadIdx.x], scratch);
    const int positive = __syncthreads_count(neighbour > 0.0f);
    out[i] = total + other + static_cast<float>(positive);
}
EXPORT(correct)

// The value is read before the thread that writes it is known to have done so.
KERNEL(64) missing_barrier(float* out) {
    __shared__ float scratch[64];
    scratch[threadIdx.x] = static_cast<float>(threadIdx.x);
    out[threadIdx.x] = scratch[63 - threadIdx.x];
}
EXPORT(missing_barrier)

// A shuffle, unlike __syncwarp, orders no memory.
KERNEL(64) shuffle_for_barrier(float* out) {
    __shared__ float scratch[64];
    scratch[threadIdx.x] = static_cast<float>(threadIdx.x);
    __shfl_sync(ALL_LANES, 0, 0);
    out[threadIdx.x] = scratch[threadIdx.x ^ 1];
}
EXPORT(shuffle_for_barrier)

// The last thread reads one element too many.
KERNEL(64) global_overrun(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
EXPORT(global_overrun)

KERNEL(64) static_shared_overrun(float* out) {
    __shared__ float scratch[64];
    scratch[threadIdx.x] = 1.0f;
    __syncthreads();
    const float* volatile start = scratch; // the compiler would see through a plain one
    out[threadIdx.x] = start[threadIdx.x + 1];
}
EXPORT(static_shared_overrun)

KERNEL(64) dynamic_shared_overrun(float* out) {
    DYNAMIC_SHARED(float, scratch);
    scratch[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = scratch[threadIdx.x + 1];
}
EXPORT(dynamic_shared_overrun)

// Nobody has written what is read.
KERNEL(64) uninitialised_shared(float* out) {
    __shared__ float scratch[64];
    if (threadIdx.x < 63) scratch[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = scratch[threadIdx.x];
}
EXPORT(uninitialised_shared)

// Half of the block comes to another barrier.
KERNEL(64) diverged_barrier(float* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}
EXPORT(diverged_barrier)

// Half of the block ends before the barrier.
KERNEL(64) barrier_after_return(float* out) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}
EXPORT(barrier_after_return)

KERNEL(64) shuffle_after_return(float* out) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = warp_sum(1.0f);
}
EXPORT(shuffle_after_return)

// The lanes of one shuffle do not agree on who takes part.
KERNEL(64) masks_disagree(float* out) {
    const unsigned mask = threadIdx.x % WARP == 3 ? 0xffffffffu : 0x0000ffffu;
    if (threadIdx.x % WARP < 16) out[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1);
}
EXPORT(masks_disagree)

KERNEL(64) operations_disagree(float* out) {
    if (threadIdx.x % 2 == 0) {
        __syncwarp();
    } else {
        out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0f, 1);
    }
}
EXPORT(operations_disagree)

// All blocks add to one place.
KERNEL(64) race_between_blocks(float* out) { out[threadIdx.x] += 1.0f; }
EXPORT(race_between_blocks)
