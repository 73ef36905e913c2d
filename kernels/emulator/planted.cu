// What tests/emulator.rs runs, and gives to build.sh for it; not part of the library. First kernels without a fault,
// then each fault that the emulator must catch.
#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Without a fault.

// out[i] = sum of the block's elements + the element of the neighbouring thread's mirror image + how many are positive:
// by shared memory static and dynamic, barriers, and shuffles of some lanes while the others wait elsewhere. 256 bytes
// of dynamic shared memory; `in` and `out` have 64 elements for each block.
KERNEL(64) correct(const float* in, float* out) {
    __shared__ float scratch[64 / WARP];
    DYNAMIC_SHARED(float, copy);
    const int64_t i = global_thread();
    copy[threadIdx.x] = in[i];
    __syncthreads();
    float mirrored = copy[63 - threadIdx.x];
    const int positive = __syncthreads_count(mirrored > 0.0f);
    if (threadIdx.x % WARP < 16) mirrored = __shfl_down_sync(0x0000ffffu, mirrored, 1, 16);
    out[i] = block_sum<64>(copy[threadIdx.x], scratch) + mirrored + static_cast<float>(positive);
}
EXPORT(correct)

KERNEL(256) narrow(const float* x, bf16* as_bf16, f16* as_f16, int64_t n) {
    for (int64_t i = global_thread(); i < n; i += global_threads()) {
        as_bf16[i] = from_float<bf16>(x[i]);
        as_f16[i] = from_float<f16>(x[i]);
    }
}
EXPORT(narrow)

KERNEL(256) widen(const bf16* b, const f16* h, float* from_bf16, float* from_f16, int64_t n) {
    for (int64_t i = global_thread(); i < n; i += global_threads()) {
        from_bf16[i] = to_float(b[i]);
        from_f16[i] = to_float(h[i]);
    }
}
EXPORT(widen)

constexpr int WARP_RESULTS = 12;

// Each warp function of one value a lane, WARP_RESULTS results a thread.
KERNEL(64) warp_functions(const int* in, int* out) {
    const int x = in[threadIdx.x];
    const unsigned lane = threadIdx.x % WARP;
    const int results[WARP_RESULTS] = {
        __shfl_sync(ALL_LANES, x, 5),
        __shfl_sync(ALL_LANES, x, 11, 8),
        __shfl_xor_sync(ALL_LANES, x, 9),
        __shfl_up_sync(ALL_LANES, x, 3),
        __shfl_down_sync(ALL_LANES, x, 7, 16),
        static_cast<int>(__ballot_sync(ALL_LANES, x > 0)),
        __any_sync(ALL_LANES, x == in[17]),
        __all_sync(ALL_LANES, x > -50),
        __reduce_add_sync(ALL_LANES, x),
        __reduce_min_sync(ALL_LANES, x),
        // Odd and even lanes on their own, at the same time.
        __reduce_max_sync(lane % 2 ? 0xaaaaaaaau : 0x55555555u, x),
        __syncthreads_or(x == in[40]) + 2 * __syncthreads_and(x > -100),
    };
    for (int i = 0; i < WARP_RESULTS; ++i) out[threadIdx.x * WARP_RESULTS + i] = results[i];
}
EXPORT(warp_functions)

// Counts all threads of the grid, and finds the last.
KERNEL(64) atomics(unsigned* count, unsigned long long* last, float* sum) {
    atomicAdd(count, 1u);
    atomicMax(last, static_cast<unsigned long long>(global_thread()) << 32);
    atomicAdd(sum, 0.5f);
}
EXPORT(atomics)

// ---------------------------------------------------------------------------------------------------------------------
// With one.

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

// A device refuses packs of 16 bytes that lie elsewhere than at multiples of 16.
KERNEL(64) misaligned_access(const float* in, float* out) {
    float v[4];
    load(v, in + threadIdx.x % 4);
    out[threadIdx.x] = v[0];
}
EXPORT(misaligned_access)

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
    const unsigned mask = threadIdx.x % WARP == 3 ? 0x00007fffu : 0x0000ffffu;
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
