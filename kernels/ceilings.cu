// What a device can do at best, for benchmarks to measure themselves against: a copy through memory, float32
// multiply-adds, and bf16 tensor cores fed from registers. (mma.sync reaches the peak of the A100 and of the cards up
// to Ada; an H100 does about 1.6 times as much by wgmma, which reads shared memory.)
#include "mma.cuh"

constexpr int CHAINS = 8;  // independent accumulators of a thread or warp, enough to hide the latency of one
constexpr int UNROLL = 16; // of the loops over rounds

// to = from, 16 bytes at a time.
KERNEL(256) ceiling_copy(const float* from, float* to, int64_t n) {
    for_each_pack<WIDTH<float>>(n, [=](int64_t i, auto count) { copy_pack<decltype(count)::value>(to + i, from + i); });
}
EXPORT(ceiling_copy)

// rounds * CHAINS fused multiply-adds a thread; their sum is written so that they are needed.
KERNEL(256) ceiling_fma(float* out, int32_t rounds) {
    float x[CHAINS], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < CHAINS; ++k) x[k] = float(threadIdx.x + k);
#pragma unroll UNROLL
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int k = 0; k < CHAINS; ++k) x[k] = fmaf(x[k], 0.5f, 1.0f); // converges to 2
    }
#pragma unroll
    for (int k = 0; k < CHAINS; ++k) sum += x[k];
    out[global_thread()] = sum;
}
EXPORT(ceiling_fma)

// rounds * CHAINS products of 16x16 and 16x8 a warp: each adds 16 * 0.5 * 0.25 = 2 to every element.
KERNEL(256) ceiling_mma_bf16(float* out, int32_t rounds) {
    const uint32_t halves = 0x3f003f00u, quarters = 0x3e803e80u; // two bf16 each
    const uint32_t a[4] = {halves, halves, halves, halves}, b[2] = {quarters, quarters};
    float d[CHAINS][4] = {}, sum = 0.0f;
#pragma unroll UNROLL
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int k = 0; k < CHAINS; ++k) mma<bf16>(d[k], a, b);
    }
#pragma unroll
    for (int k = 0; k < CHAINS; ++k) sum += d[k][0] + d[k][1] + d[k][2] + d[k][3];
    out[global_thread()] = sum;
}
EXPORT(ceiling_mma_bf16)
