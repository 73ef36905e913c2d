// Dynamic loss scaling without the host: whether all gradients are finite, and what that does to the scale. The rule is that
// of PyTorch's GradScaler.
#include "update.cuh"

// found[chunk] = 1 if a gradient of the chunk is not finite, else 0. Grid: all chunks.
KERNEL(UPDATE_THREADS) non_finite_chunks(const __grid_constant__ Parameters table, int32_t count, float* found) {
    __shared__ float scratch[UPDATE_THREADS / WARP];
    const Parameter& p = table.at[find_parameter(table, count, blockIdx.x)];
    float bad = 0.0f;
    for_chunk(p, blockIdx.x, [&](int64_t i, auto pack) {
        constexpr int N = decltype(pack)::value;
        float d_w[N];
        load(d_w, p.d_w + i);
#pragma unroll
        for (int k = 0; k < N; ++k)
            if (!is_finite(d_w[k])) bad = 1.0f;
    });
    bad = block_max<UPDATE_THREADS>(bad, scratch);
    if (threadIdx.x == 0) found[blockIdx.x] = bad;
}
EXPORT(non_finite_chunks)

// *unscale = 1 / *scale, and after `interval` such steps in a row *scale grows; but when the loss or a gradient is not
// finite, *unscale = NaN, and *scale shrinks. A scale never grows to infinity. One block.
KERNEL(UPDATE_THREADS)
loss_scale_update(const float* found, int64_t chunks, const float* loss, float* scale, int64_t* good_steps, float* unscale,
                  double growth, double backoff, int64_t interval) {
    __shared__ float scratch[UPDATE_THREADS / WARP];
    float bad = 0.0f;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += UPDATE_THREADS) bad = fmaxf(bad, found[chunk]);
    bad = block_max<UPDATE_THREADS>(bad, scratch);
    if (threadIdx.x != 0) return;
    const double used = *scale;
    if (bad > 0.0f || !is_finite(*loss)) {
        *unscale = __int_as_float(0x7fffffff); // NaN
        *scale = float(used * backoff);
        *good_steps = 0;
        return;
    }
    *unscale = float(1.0 / used);
    const int64_t good = *good_steps + 1;
    const float grown = float(used * growth);
    if (good == interval && is_finite(grown)) *scale = grown;
    *good_steps = good == interval ? 0 : good;
}
EXPORT(loss_scale_update)
