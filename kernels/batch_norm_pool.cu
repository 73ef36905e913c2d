// The stem of a ResNet behind its convolution in one pass each way: batch norm, ReLU and 3x3 max pooling with stride 2 and
// padding 1. What lies between them, as large as x, is never written; a byte for each result says which position of its window
// the gradient goes to.
//
// Traffic through device memory, in elements of the activations per element of x (2 bytes each in bf16):
//   statistics          as in batch_norm.cu           1
//   apply               read x, write y, taken        1.37
//   backward reduce     read x, d_y, taken            1.37
//   backward apply      the same, write d_x           2.37
// where the separate ops take 1 + 2, 1.37, 1.37 and 2 + 3. The gradient at the output of the batch norm is gathered twice, a
// thread for two by two pixels: the windows over them are the same four, of which the caches answer all but one.
#include "batch_norm.cuh"
#include "positions.cuh"
#include "windows.cuh"

// Sizes of x and of y, which has oh x ow positions.
struct StemPooling {
    int64_t images;
    int32_t of_group; // images of a group
    int32_t h, w, c, oh, ow;
};

constexpr int SIDE_BY_SIDE = 2; // results of a thread: their windows share a column
constexpr int COLUMNS = SIZE + STRIDE * (SIDE_BY_SIDE - 1);

// y = the maximum of each window of relu((x - mean) scale + beta), rounded as if it had been written; taken = the first
// position of it, counted row by row, or NONE where nothing is greater than 0.
template <int N, class T>
__device__ __forceinline__ void apply_max_pool(const T* __restrict__ x, const float* __restrict__ mean,
                                               const float* __restrict__ scale, const float* __restrict__ beta,
                                               T* __restrict__ y, uint8_t* __restrict__ taken, const StemPooling& p) {
    const int across = (p.ow + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE;
    for_each_position<N>(p.images, p.oh, across, p.c, [&](int64_t image, int oy, int pair, int channel) {
        const int64_t of_group = image / p.of_group * p.c + channel;
        Channels<N> of;
        of.load_mean_and_beta(mean + of_group, beta + channel);
        load(of.scale, scale + of_group);
        const T* const of_image = x + image * (int64_t{p.h} * p.w * p.c) + channel;
        const int left = pair * SIDE_BY_SIDE * STRIDE - PADDING;
        float best[SIDE_BY_SIDE][N] = {};
        int first[SIDE_BY_SIDE][N];
#pragma unroll
        for (int o = 0; o < SIDE_BY_SIDE; ++o)
#pragma unroll
            for (int k = 0; k < N; ++k) first[o][k] = NONE;
#pragma unroll
        for (int ky = 0; ky < SIZE; ++ky) {
            const int iy = oy * STRIDE - PADDING + ky;
            if (iy < 0 || iy >= p.h) continue;
            float v[COLUMNS][N] = {}; // what lies outside never wins over 0
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                const int ix = left + column;
                if (ix < 0 || ix >= p.w) continue;
                load(v[column], of_image + (iy * p.w + ix) * p.c);
#pragma unroll
                for (int k = 0; k < N; ++k) v[column][k] = to_float(from_float<T>(of.normalised(k, v[column][k])));
            }
#pragma unroll
            for (int o = 0; o < SIDE_BY_SIDE; ++o)
#pragma unroll
                for (int kx = 0; kx < SIZE; ++kx)
#pragma unroll
                    for (int k = 0; k < N; ++k) {
                        const float value = v[o * STRIDE + kx][k];
                        first[o][k] = value > best[o][k] ? ky * SIZE + kx : first[o][k];
                        best[o][k] = value > best[o][k] ? value : best[o][k];
                    }
        }
#pragma unroll
        for (int o = 0; o < SIDE_BY_SIDE; ++o) {
            const int ox = pair * SIDE_BY_SIDE + o;
            if (ox >= p.ow) break;
            const int64_t to = image * (int64_t{p.oh} * p.ow * p.c) + (oy * p.ow + ox) * p.c + channel;
            store(y + to, best[o]);
            Pack<uint8_t, N> positions;
#pragma unroll
            for (int k = 0; k < N; ++k) positions.element[k] = uint8_t(first[o][k]);
            *reinterpret_cast<Pack<uint8_t, N>*>(taken + to) = positions;
        }
    });
}

// The gradient at the output of the batch norm in row i of a quad, rounded as if it had been written.
template <int N, class T>
__device__ __forceinline__ void gather_rounded(float (&g)[2][N], const QuadWindows<N, T>& windows, int i) {
    windows.gather(g, i);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int k = 0; k < N; ++k) g[j][k] = to_float(from_float<T>(g[j][k]));
}

// Partial sums of g and of g (x - mean), with g as gathered. Grid: one block per tile, whose rows are quads.
template <int N, class T>
__device__ __forceinline__ void reduce(const T* __restrict__ d_y, const uint8_t* __restrict__ taken, const T* __restrict__ x,
                                       const float* __restrict__ mean, Partial* __restrict__ partials, const StemPooling& p,
                                       const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    float m[N] = {}, sums[2][N] = {};
    if (tile.inside) load(m, mean + tile.group * tiles.channels + tile.channel);
    for_numbered_rows<1>(tile, [&](int64_t number, int64_t, auto) {
        const auto quad = Quad<N>::numbered(number, tile.channel, p);
        const QuadWindows<N, T> windows(quad, d_y, taken, p);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float g[2][N], v[2][N];
            quad.load_pixels(v, x, i, p);
            gather_rounded(g, windows, i);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                sums[0][k] += g[0][k] + g[1][k];
                sums[1][k] += g[0][k] * (v[0][k] - m[k]) + g[1][k] * (v[1][k] - m[k]);
            }
        }
    });
    sum_over_rows(sums, tile, [&](int channel, const float(&totals)[2]) {
        partials[tile.chunk * tiles.channels + channel] = {totals[0], totals[1]};
    });
}

// d_x = scale (g - offset - (x - mean) slope), with g as gathered. Grid: one block per tile, whose rows are quads.
template <int N, class T>
__device__ __forceinline__ void backward(const T* __restrict__ d_y, const uint8_t* __restrict__ taken,
                                         const T* __restrict__ x, const float* __restrict__ mean,
                                         const float* __restrict__ coefficients, int64_t all, T* d_x, bool accumulate,
                                         const StemPooling& p, const RowTiles& tiles) {
    const Tile<N> tile(tiles, gridDim.x - 1 - blockIdx.x);
    if (!tile.inside) return;
    const int64_t of_group = tile.group * tiles.channels + tile.channel;
    float m[N], scale[N], offset[N], slope[N];
    load(m, mean + of_group);
    load(scale, coefficients + of_group);
    load(offset, coefficients + all + of_group);
    load(slope, coefficients + 2 * all + of_group);
    for_numbered_rows<1>(tile, [&](int64_t number, int64_t, auto) {
        const auto quad = Quad<N>::numbered(number, tile.channel, p);
        const QuadWindows<N, T> windows(quad, d_y, taken, p);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float g[2][N], v[2][N];
            quad.load_pixels(v, x, i, p);
            gather_rounded(g, windows, i);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (!quad.has(i, j, p)) continue;
#pragma unroll
                for (int k = 0; k < N; ++k) v[j][k] = scale[k] * (g[j][k] - offset[k] - (v[j][k] - m[k]) * slope[k]);
                store_or_add(d_x + quad.element(i, j, p), v[j], accumulate);
            }
        }
    });
}

#define INSTANTIATE(T, S)                                                                                                   \
    KERNEL_RESIDENT(256, 2)                                                                                                 \
    batch_norm_max_pool_##S(const T* x, const float* mean, const float* scale, const float* beta, T* y, uint8_t* taken,     \
                            StemPooling p) {                                                                                \
        with_width<T>(p.c, [&](auto n) {                                                                                    \
            apply_max_pool<decltype(n)::value>(x, mean, scale, beta, y, taken, p);                                          \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_max_pool_##S)                                                                                         \
    KERNEL_RESIDENT(TILE_THREADS, 1)                                                                                        \
    batch_norm_max_pool_reduce_##S(const T* d_y, const uint8_t* taken, const T* x, const float* mean, Partial* partials,    \
                                   StemPooling p, RowTiles tiles) {                                                         \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            reduce<decltype(n)::value>(d_y, taken, x, mean, partials, p, tiles);                                            \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_max_pool_reduce_##S)                                                                                  \
    KERNEL_RESIDENT(TILE_THREADS, 1)                                                                                        \
    batch_norm_max_pool_backward_##S(const T* d_y, const uint8_t* taken, const T* x, const float* mean,                     \
                                     const float* coefficients, int64_t all, T* d_x, int32_t accumulate, StemPooling p,     \
                                     RowTiles tiles) {                                                                      \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            backward<decltype(n)::value>(d_y, taken, x, mean, coefficients, all, d_x, accumulate != 0, p, tiles);           \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_max_pool_backward_##S)
FOR_EACH_TYPE(INSTANTIATE)
