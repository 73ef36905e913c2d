// The collapse figure: mean over dimensions of the unbiased standard deviation, over rows, of z / max(|z|, 1e-12).
// Two steps and `means` (mean.cu): the rows' norms, then the spread of each dimension.
#include "row_teams.cuh"

// rnorm[j] = 1 / max(|z_j|, 1e-12). A team of threads per row (see row_teams.cuh), grid-stride over the rows.
template <class T> __device__ __forceinline__ void row_rnorms(const T* z, float* rnorm, int rows, int d) {
    for_row_length<T>(d, [=](auto width, auto team) {
        using TEAM = decltype(team);
        constexpr int N = decltype(width)::value;
        TEAM::for_each_row(rows, [=](int j) {
            const T* const row = row_at(z, j, d);
            float square[1] = {0.0f};
            for (int first = TEAM::lane() * N; first < d; first += TEAM::lanes * N) {
                float v[N];
                load(v, row + first);
#pragma unroll
                for (float element : v) square[0] = fmaf(element, element, square[0]);
            }
            TEAM::sum(square);
            if (TEAM::lane() == 0) rnorm[j] = rnorm_of(square[0]);
        });
    });
}

constexpr int TILE_PACKS = 4; // packs of columns of a block: 64 bytes of a row, whole sectors
constexpr int TILE_ROWS = 256 / TILE_PACKS;
constexpr int CHAIN = 16; // rows that are added in float before the sum moves on to double

// spread[block] = sum of the standard deviations of the block's TILE_PACKS * N columns of z rnorm.
//
// A block per tile of columns: `d` over 4 packs of them, rounded up (a pack is 16 bytes where they divide d, else one
// element). 64 rows at a time, a pack of columns per thread. Values are taken relative to row 0, so that sums of
// squares do not cancel when the rows have nearly collapsed into one. z comes from the L2 cache, where the pass before
// has left it.
template <class T, int N>
__device__ __forceinline__ void column_spread(const T* z, const float* rnorm, float* spread, int rows, int d) {
    const int pack = threadIdx.x % TILE_PACKS;
    const int column = (blockIdx.x * TILE_PACKS + pack) * N;
    double sum[N] = {}, square[N] = {};
    if (column < d) {
        float shift[N];
        load(shift, z + column);
        for (float& element : shift) element *= rnorm[0];
        for (unsigned start = threadIdx.x / TILE_PACKS; start < unsigned(rows); start += TILE_ROWS * CHAIN) {
            const T* const from = row_at(z, start, d) + column;
            const int left = (rows - start + TILE_ROWS - 1) / TILE_ROWS, count = left < CHAIN ? left : CHAIN;
            float chain_sum[N] = {}, chain_square[N] = {};
#pragma unroll 4
            for (int i = 0; i < count; ++i) {
                float v[N];
                load(v, row_at(from, i * TILE_ROWS, d));
                const float scale = rnorm[start + i * TILE_ROWS];
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float deviation = fmaf(v[k], scale, -shift[k]);
                    chain_sum[k] += deviation;
                    chain_square[k] = fmaf(deviation, deviation, chain_square[k]);
                }
            }
#pragma unroll
            for (int k = 0; k < N; ++k) {
                sum[k] += double{chain_sum[k]};
                square[k] += double{chain_square[k]};
            }
        }
    }
    __shared__ double parts[256 / WARP][TILE_PACKS * N][2];
#pragma unroll
    for (int k = 0; k < N; ++k) {
        // Lanes with the same pack of columns.
#pragma unroll
        for (int distance = TILE_PACKS; distance < WARP; distance *= 2) {
            sum[k] += __shfl_xor_sync(ALL_LANES, sum[k], distance);
            square[k] += __shfl_xor_sync(ALL_LANES, square[k], distance);
        }
        if (threadIdx.x % WARP < TILE_PACKS) {
            parts[threadIdx.x / WARP][pack * N + k][0] = sum[k];
            parts[threadIdx.x / WARP][pack * N + k][1] = square[k];
        }
    }
    __syncthreads();
    double deviation = 0.0;
    if (threadIdx.x < TILE_PACKS * N && blockIdx.x * TILE_PACKS * N + threadIdx.x < unsigned(d)) {
        double s = 0.0, q = 0.0;
        for (int warp = 0; warp < 256 / WARP; ++warp) {
            s += parts[warp][threadIdx.x][0];
            q += parts[warp][threadIdx.x][1];
        }
        const double variance = (q - s * s / rows) / (rows - 1);
        deviation = variance < 0.0 ? 0.0 : sqrt(variance); // by a rounding below zero; NaN stays
    }
    // Only the first warp has any: TILE_PACKS * N <= 32.
    const double total = warp_sum(deviation);
    if (threadIdx.x == 0) spread[blockIdx.x] = static_cast<float>(total);
}

template <class T>
__device__ __forceinline__ void column_spreads(const T* z, const float* rnorm, float* spread, int rows, int d) {
    if (d % WIDTH<T> == 0) column_spread<T, WIDTH<T>>(z, rnorm, spread, rows, d);
    else column_spread<T, 1>(z, rnorm, spread, rows, d);
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL(256) row_rnorms_##S(const T* z, float* rnorm, int rows, int d) { row_rnorms(z, rnorm, rows, d); }           \
    EXPORT(row_rnorms_##S)                                                                                             \
    KERNEL(256)                                                                                                        \
    column_spreads_##S(const T* z, const float* rnorm, float* spread, int rows, int d) {                               \
        column_spreads(z, rnorm, spread, rows, d);                                                                     \
    }                                                                                                                  \
    EXPORT(column_spreads_##S)
FOR_EACH_TYPE(INSTANTIATE)
