// Sums of the columns of groups of rows. Traffic through device memory: x is read once.
#include "rows.cuh"

// Partial sums of the columns of x, [chunks of all groups][channels]. Grid: one block per tile.
template <int N, class T>
__device__ __forceinline__ void group_sums(const T* __restrict__ x, float* __restrict__ partials, const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    float sums[1][N] = {};
    for_rows<4>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float v[U][N];
        load_rows(v, x + i, tile.stride);
        add_rows(sums[0], v);
    });
    sum_over_rows(sums, tile, [&](int channel, const float(&totals)[1]) {
        partials[tile.chunk * tiles.channels + channel] = totals[0];
    });
}

// sums[group][c] = factor times the sum of the partial sums of column c in `chunks` chunks. Grid: tiles of 32 columns, groups.
constexpr int FINISH_THREADS = 256;
KERNEL(FINISH_THREADS)
group_sums_finish(const float* partials, int32_t chunks, int32_t channels, double factor, float* sums) {
    constexpr int WARPS = FINISH_THREADS / WARP;
    __shared__ double scratch[WARPS][WARP];
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, c = int(blockIdx.x) * WARP + lane;
    const float* const of_group = partials + int64_t{blockIdx.y} * chunks * channels;
    double sum = 0.0;
    if (c < channels) {
        for (int chunk = warp; chunk < chunks; chunk += WARPS) sum += double(of_group[int64_t{chunk} * channels + c]);
    }
    scratch[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= channels) return;
    for (int other = 1; other < WARPS; ++other) sum += scratch[other][lane];
    sums[int64_t{blockIdx.y} * channels + c] = float(sum * factor);
}
EXPORT(group_sums_finish)

#define INSTANTIATE(T, S)                                                                                                   \
    KERNEL(TILE_THREADS) group_sums_##S(const T* x, float* partials, RowTiles tiles) {                                      \
        with_width<T>(tiles.channels, [&](auto n) { group_sums<decltype(n)::value>(x, partials, tiles); });                 \
    }                                                                                                                       \
    EXPORT(group_sums_##S)
FOR_EACH_TYPE(INSTANTIATE)
