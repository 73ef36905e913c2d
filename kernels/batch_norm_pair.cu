// The end of a residual block whose shortcut is a projection: y = relu(bn(x) + bn_r(r)) in one pass, and its gradient in two.
// Statistics and the combination of partial sums are batch norm's own (batch_norm.cu).
//
// Traffic through device memory, in elements of the activations per element of x:
//   apply                  3 1/16  read x, r, write y and the mask
//   reduce                 3 1/16  read d_y, the mask, x, r
//   backward               5 1/16  read d_y, the mask, x, r, write d_x, d_r
// One batch norm after the other takes 5 1/16 to apply, since the normalised shortcut is written and read, and 11 1/16 for the
// gradient, where the masked d_y is. Every rounding and every order of a sum is as there.
// Passes that write walk from the end to the start, so that what the pass before read last is still cached.
#include "batch_norm.cuh"

// y and its mask. Both summands are rounded to T, as `apply` of batch_norm.cu does with x and finds the residual.
template <int N, class T>
__device__ __forceinline__ void apply_pair(const T* __restrict__ x, const float* __restrict__ mean,
                                           const float* __restrict__ scale, const float* __restrict__ beta,
                                           const T* __restrict__ r, const float* __restrict__ mean_r,
                                           const float* __restrict__ rstd_r, const float* __restrict__ gamma_r,
                                           const float* __restrict__ beta_r, T* y, uint8_t* mask, const RowTiles& tiles) {
    const Tile<N> tile(tiles, gridDim.x - 1 - blockIdx.x);
    if (!tile.inside) return;
    const int64_t of_group = tile.group * tiles.channels + tile.channel;
    Channels<N> of_x, of_r;
    of_x.load_mean_and_beta(mean + of_group, beta + tile.channel);
    load(of_x.scale, scale + of_group);
    of_r.load_mean_and_beta(mean_r + of_group, beta_r + tile.channel);
    load_scale(of_r.scale, rstd_r + of_group, gamma_r + tile.channel);
    for_rows<2>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float v[U][N], w[U][N];
        load_rows(v, x + i, tile.stride);
        load_rows(w, r + i, tile.stride);
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float out = to_float(from_float<T>(of_x.normalised(k, v[u][k]))) +
                                  to_float(from_float<T>(of_r.normalised(k, w[u][k])));
                v[u][k] = out > 0.0f ? out : 0.0f;
            }
        store_rows(y + i, v, tile.stride);
        store_mask<T>(mask + i / N, v, tile.stride / N);
    });
}

// Partial sums of g, which is d_y behind the mask, and of g (x - mean), and of g and g (r - mean_r).
template <int N, class T>
__device__ __forceinline__ void reduce_pair(const T* __restrict__ d_y, const uint8_t* __restrict__ mask,
                                            const T* __restrict__ x, const float* __restrict__ mean,
                                            Partial* __restrict__ partials, const T* __restrict__ r,
                                            const float* __restrict__ mean_r, Partial* __restrict__ partials_r,
                                            const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    float mean_of_x[N] = {}, mean_of_r[N] = {}, sums[3][N] = {};
    if (tile.inside) {
        const int64_t of_group = tile.group * tiles.channels + tile.channel;
        load(mean_of_x, mean + of_group);
        load(mean_of_r, mean_r + of_group);
    }
    for_rows<2>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float g[U][N], v[U][N], w[U][N];
        load_rows(v, x + i, tile.stride);
        load_rows(w, r + i, tile.stride);
        load_masked<MASK_STORED>(g, d_y, v, Channels<N>{}, mask, i, tile.stride);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float first[U], with_x[U], with_r[U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                first[u] = g[u][k];
                with_x[u] = g[u][k] * (v[u][k] - mean_of_x[k]);
                with_r[u] = g[u][k] * (w[u][k] - mean_of_r[k]);
            }
            sums[0][k] += tree_sum(first);
            sums[1][k] += tree_sum(with_x);
            sums[2][k] += tree_sum(with_r);
        }
    });
    sum_over_rows(sums, tile, [&](int channel, const float(&totals)[3]) {
        const int64_t i = tile.chunk * tiles.channels + channel;
        partials[i] = {totals[0], totals[1]};
        partials_r[i] = {totals[0], totals[2]};
    });
}

// What makes d_x of g: scale (g - offset - (x - mean) slope), with the coefficients that `finish_backward` leaves.
template <int N> struct Gradient {
    float mean[N], scale[N], slope[N];

    __device__ __forceinline__ Gradient(const float* of_group, const float* coefficients, int64_t all) {
        load(mean, of_group);
        load(scale, coefficients);
        load(slope, coefficients + 2 * all);
    }
    template <int U>
    __device__ __forceinline__ void replace(float (&x)[U][N], const float (&g)[U][N], const float (&offset)[N]) const {
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) x[u][k] = scale[k] * (g[u][k] - offset[k] - (x[u][k] - mean[k]) * slope[k]);
    }
};

// d_x and d_r. The offset, the mean of g, is the same for both.
template <int N, class T>
__device__ __forceinline__ void backward_pair(const T* __restrict__ d_y, const uint8_t* __restrict__ mask,
                                              const T* __restrict__ x, const float* __restrict__ mean,
                                              const float* __restrict__ coefficients, T* d_x, bool accumulate,
                                              const T* __restrict__ r, const float* __restrict__ mean_r,
                                              const float* __restrict__ coefficients_r, T* d_r, bool accumulate_r, int64_t all,
                                              const RowTiles& tiles) {
    const Tile<N> tile(tiles, gridDim.x - 1 - blockIdx.x);
    if (!tile.inside) return;
    const int64_t of_group = tile.group * tiles.channels + tile.channel;
    const Gradient<N> of_x(mean + of_group, coefficients + of_group, all);
    const Gradient<N> of_r(mean_r + of_group, coefficients_r + of_group, all);
    float offset[N];
    load(offset, coefficients + all + of_group);
    for_rows<2>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float g[U][N], v[U][N], w[U][N];
        load_rows(v, x + i, tile.stride);
        load_rows(w, r + i, tile.stride);
        load_masked<MASK_STORED>(g, d_y, v, Channels<N>{}, mask, i, tile.stride);
        of_x.replace(v, g, offset);
        of_r.replace(w, g, offset);
        store_rows(d_x + i, v, tile.stride, accumulate);
        store_rows(d_r + i, w, tile.stride, accumulate_r);
    });
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE(T, S)                                                                                                   \
    KERNEL_RESIDENT(TILE_THREADS, 2)                                                                                        \
    batch_norm_pair_apply_##S(const T* x, const float* mean, const float* scale, const float* beta, const T* r,             \
                              const float* mean_r, const float* rstd_r, const float* gamma_r, const float* beta_r, T* y,    \
                              uint8_t* mask, RowTiles tiles) {                                                              \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            apply_pair<decltype(n)::value>(x, mean, scale, beta, r, mean_r, rstd_r, gamma_r, beta_r, y, mask, tiles);       \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_pair_apply_##S)                                                                                       \
    KERNEL_RESIDENT(TILE_THREADS, 2)                                                                                        \
    batch_norm_pair_reduce_##S(const T* d_y, const uint8_t* mask, const T* x, const float* mean, Partial* partials,         \
                               const T* r, const float* mean_r, Partial* partials_r, RowTiles tiles) {                      \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            reduce_pair<decltype(n)::value>(d_y, mask, x, mean, partials, r, mean_r, partials_r, tiles);                    \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_pair_reduce_##S)                                                                                      \
    KERNEL_RESIDENT(TILE_THREADS, 2)                                                                                        \
    batch_norm_pair_backward_##S(const T* d_y, const uint8_t* mask, const T* x, const float* mean,                          \
                                 const float* coefficients, T* d_x, int32_t accumulate, const T* r, const float* mean_r,    \
                                 const float* coefficients_r, T* d_r, int32_t accumulate_r, int64_t all, RowTiles tiles) {  \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            backward_pair<decltype(n)::value>(d_y, mask, x, mean, coefficients, d_x, accumulate != 0, r, mean_r,            \
                                              coefficients_r, d_r, accumulate_r != 0, all, tiles);                          \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_pair_backward_##S)
FOR_EACH_TYPE(INSTANTIATE)
