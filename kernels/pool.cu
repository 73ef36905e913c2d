// Max pooling and global average pooling over NHWC, and their gradients.
//
// Traffic through device memory, in elements per element of x (the larger tensor); windows overlap, but in the cache:
//   max pool, 3x3 with stride 2   read x, write y                     1.25
//   its gradient                  read x, y and d_y, write d_x        2.5
//   global average pool           read x                              1
//   its gradient                  write d_x                           1
// and one more for a gradient that is added to what is there.
#include "positions.cuh"
#include "rows.cuh"
#include "words.cuh"

struct Pooling {
    int64_t images;
    int32_t h, w, c, oh, ow;
    int32_t kernel, stride, padding;
};

// The geometry as compile-time constants, for what is fast when unrolled, or as it comes.
template <int KERNEL_SIZE, int STRIDE, int PADDING> struct Fixed {
    static constexpr int kernel = KERNEL_SIZE, stride = STRIDE, padding = PADDING;
    __device__ __forceinline__ explicit Fixed(const Pooling&) {}
};
struct Any {
    const int kernel, stride, padding;
    __device__ __forceinline__ explicit Any(const Pooling& p) : kernel(p.kernel), stride(p.stride), padding(p.padding) {}
};
typedef Fixed<3, 2, 1> ResNetStem;
__device__ __forceinline__ bool is_resnet_stem(const Pooling& p) { return p.kernel == 3 && p.stride == 2 && p.padding == 1; }

// ---------------------------------------------------------------------------------------------------------------------
// Max pooling.

// y = the maximum of each window; padding never wins, NaN always does.
template <int N, class G, class T>
__device__ __forceinline__ void max_pool(const T* __restrict__ x, T* __restrict__ y, const Pooling& p) {
    const G g(p);
    for_each_position<N>(p.images, p.oh, p.ow, p.c, [&](int64_t image, int oy, int ox, int channel) {
        const T* const of_image = x + image * (p.h * p.w * p.c) + channel;
        const int top = oy * g.stride - g.padding, left = ox * g.stride - g.padding;
        Words<T, N> best = filled_words<N, T>(-INFINITY);
#pragma unroll
        for (int ky = 0; ky < g.kernel; ++ky)
#pragma unroll
            for (int kx = 0; kx < g.kernel; ++kx) {
                const int iy = top + ky, ix = left + kx;
                if (iy < 0 || iy >= p.h || ix < 0 || ix >= p.w) continue;
                const Words<T, N> v = load_words<N>(of_image + (iy * p.w + ix) * p.c);
#pragma unroll
                for (int i = 0; i < v.COUNT; ++i) best.word[i] = max_words<T>(best.word[i], v.word[i]);
            }
        store_words(y + image * (p.oh * p.ow * p.c) + (oy * p.ow + ox) * p.c + channel, best);
    });
}

// d_x of any geometry, as a gather: each position of x adds d_y of the windows whose first maximum, in row-major order, it is.
// Where y is NaN nobody takes the gradient.
template <int N, class T>
__device__ __forceinline__ void max_pool_backward(const T* __restrict__ d_y, const T* __restrict__ x, const T* __restrict__ y,
                                                  T* d_x, bool accumulate, const Pooling& p) {
    const int kernel = p.kernel, stride = p.stride, padding = p.padding;
    for_each_position<N>(p.images, p.h, p.w, p.c, [&](int64_t image, int iy, int ix, int channel) {
        const int64_t x_image = image * (p.h * p.w * p.c) + channel, y_image = image * (p.oh * p.ow * p.c) + channel;
        const int here = (iy * p.w + ix) * p.c;
        const auto first_window = [=](int i) { return i + padding < kernel ? 0 : (i + padding - kernel) / stride + 1; };
        const auto last_window = [=](int i, int windows) { return min((i + padding) / stride, windows - 1); };
        float own[N], sum[N] = {};
        load(own, x + x_image + here);
        for (int oy = first_window(iy); oy <= last_window(iy, p.oh); ++oy)
            for (int ox = first_window(ix); ox <= last_window(ix, p.ow); ++ox) {
                const int64_t window = y_image + (oy * p.ow + ox) * p.c;
                const int top = max(oy * stride - padding, 0), left = max(ox * stride - padding, 0);
                const int right = min(ox * stride - padding + kernel, p.w);
                float gradient[N], maximum[N];
                bool first[N];
                load(gradient, d_y + window);
                load(maximum, y + window);
#pragma unroll
                for (int k = 0; k < N; ++k) first[k] = own[k] == maximum[k];
                for (int ey = top; ey <= iy; ++ey)
                    for (int ex = left; ex < (ey < iy ? right : ix); ++ex) {
                        float earlier[N];
                        load(earlier, x + x_image + (ey * p.w + ex) * p.c);
#pragma unroll
                        for (int k = 0; k < N; ++k) first[k] = first[k] && earlier[k] != maximum[k];
                    }
#pragma unroll
                for (int k = 0; k < N; ++k) sum[k] += first[k] ? gradient[k] : 0.0f;
            }
        store_or_add(d_x + x_image + here, sum, accumulate);
    });
}

// The same for one geometry G, where each thread takes STRIDE x STRIDE positions of x: the windows over them and the part of
// x that decides who is first are read into registers once. For 3x3, stride 2, padding 1: 13 packs of x and 4 windows for 4
// positions, where the gather above reads 48 packs.
template <int N, class G, class T>
__device__ __forceinline__ void max_pool_backward_tiled(const T* __restrict__ d_y, const T* __restrict__ x,
                                                        const T* __restrict__ y, T* d_x, bool accumulate, const Pooling& p) {
    constexpr int KERNEL_SIZE = G::kernel, STRIDE = G::stride, PADDING = G::padding;
    // The windows over positions STRIDE a ... STRIDE (a + 1) - 1 are a + FIRST ... a + LAST.
    constexpr int FIRST = -((KERNEL_SIZE - 1 - PADDING) / STRIDE), LAST = (STRIDE - 1 + PADDING) / STRIDE;
    constexpr int WINDOWS = LAST - FIRST + 1;
    // Their part of x: from BEFORE positions before the own ones to the last own row and to the last column of a window.
    constexpr int BEFORE = PADDING - STRIDE * FIRST;
    constexpr int ROWS = BEFORE + STRIDE, COLUMNS = BEFORE + STRIDE * LAST - PADDING + KERNEL_SIZE;
    constexpr int PER_WORD = Words<T, N>::PER_WORD;

    const int down = (p.h + STRIDE - 1) / STRIDE, across = (p.w + STRIDE - 1) / STRIDE;
    for_each_position<N>(p.images, down, across, p.c, [&](int64_t image, int a, int b, int channel) {
        const int64_t x_image = image * (p.h * p.w * p.c) + channel, y_image = image * (p.oh * p.ow * p.c) + channel;

        Words<T, N> part[ROWS][COLUMNS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int s = 0; s < COLUMNS; ++s) {
                const int iy = a * STRIDE - BEFORE + r, ix = b * STRIDE - BEFORE + s;
                part[r][s] = filled_words<N, T>(NAN); // equals nothing
                if (iy < 0 || iy >= p.h || ix < 0 || ix >= p.w) continue;
                part[r][s] = load_words<N>(x + x_image + (iy * p.w + ix) * p.c);
            }
        Words<T, N> gradient[WINDOWS][WINDOWS] = {}, maximum[WINDOWS][WINDOWS] = {};
#pragma unroll
        for (int r = 0; r < WINDOWS; ++r)
#pragma unroll
            for (int s = 0; s < WINDOWS; ++s) {
                const int oy = a + FIRST + r, ox = b + FIRST + s;
                if (oy < 0 || oy >= p.oh || ox < 0 || ox >= p.ow) continue;
                const int64_t window = y_image + (oy * p.ow + ox) * p.c;
                gradient[r][s] = load_words<N>(d_y + window);
                maximum[r][s] = load_words<N>(y + window);
            }
        Words<T, N> own[STRIDE][STRIDE] = {}; // what is there, then the result
#pragma unroll
        for (int r = 0; r < STRIDE; ++r)
#pragma unroll
            for (int s = 0; s < STRIDE; ++s) {
                const int iy = a * STRIDE + r, ix = b * STRIDE + s;
                if (accumulate && iy < p.h && ix < p.w) own[r][s] = load_words<N>(d_x + x_image + (iy * p.w + ix) * p.c);
            }

#pragma unroll
        for (int i = 0; i < Words<T, N>::COUNT; ++i) {
            float sum[STRIDE][STRIDE][PER_WORD] = {};
#pragma unroll
            for (int window = 0; window < WINDOWS * WINDOWS; ++window) {
                const int wy = window / WINDOWS, wx = window % WINDOWS;
                uint32_t found = 0;
#pragma unroll
                for (int position = 0; position < KERNEL_SIZE * KERNEL_SIZE; ++position) {
                    // Counted from the first own position.
                    const int row = (wy + FIRST) * STRIDE - PADDING + position / KERNEL_SIZE;
                    const int column = (wx + FIRST) * STRIDE - PADDING + position % KERNEL_SIZE;
                    if (row >= STRIDE) continue; // comes after the own ones
                    const uint32_t equal =
                        equal_mask<T>(part[row + BEFORE][column + BEFORE].word[i], maximum[wy][wx].word[i]);
                    if (row >= 0 && column >= 0 && column < STRIDE) {
                        float share[PER_WORD];
                        unpack<T>(share, gradient[wy][wx].word[i] & equal & ~found);
#pragma unroll
                        for (int k = 0; k < PER_WORD; ++k) sum[row][column][k] += share[k];
                    }
                    found |= equal;
                }
            }
#pragma unroll
            for (int cell = 0; cell < STRIDE * STRIDE; ++cell) {
                uint32_t& word = own[cell / STRIDE][cell % STRIDE].word[i];
                float total[PER_WORD];
                unpack<T>(total, word);
#pragma unroll
                for (int k = 0; k < PER_WORD; ++k) total[k] += sum[cell / STRIDE][cell % STRIDE][k];
                word = pack_word<T>(total);
            }
        }
#pragma unroll
        for (int r = 0; r < STRIDE; ++r)
#pragma unroll
            for (int s = 0; s < STRIDE; ++s) {
                const int iy = a * STRIDE + r, ix = b * STRIDE + s;
                if (iy < p.h && ix < p.w) store_words(d_x + x_image + (iy * p.w + ix) * p.c, own[r][s]);
            }
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Global average pooling: the pixels of an image are one group of rows.

// y = the mean over the pixels. Grid: one block per tile, which has all rows of its group. Each thread's sum is float64, fed
// with sums of four: exact however many pixels there are, and cheap.
template <int N, class T>
__device__ __forceinline__ void global_avg_pool(const T* __restrict__ x, T* __restrict__ y, const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    double sums[N] = {};
    for_rows<4>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float v[U][N];
        load_rows(v, x + i, tile.stride);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float of_channel[U];
#pragma unroll
            for (int u = 0; u < U; ++u) of_channel[u] = v[u][k];
            sums[k] += double(tree_sum(of_channel));
        }
    });
    float rounded[1][N];
#pragma unroll
    for (int k = 0; k < N; ++k) rounded[0][k] = float(sums[k]);
    sum_over_rows(rounded, tile, [&](int channel, const float(&totals)[1]) {
        y[tile.group * tiles.channels + channel] = from_float<T>(totals[0] / float(tiles.rows));
    });
}

// d_x = d_y / pixels at every pixel. Grid: one block per tile.
template <int N, class T>
__device__ __forceinline__ void global_avg_pool_backward(const T* __restrict__ d_y, T* d_x, bool accumulate, const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    if (!tile.inside) return;
    float share[N];
    load(share, d_y + tile.group * tiles.channels + tile.channel);
#pragma unroll
    for (int k = 0; k < N; ++k) share[k] /= float(tiles.rows);
    for_rows<4>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float value[U][N];
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) value[u][k] = share[k];
        store_rows(d_x + i, value, tile.stride, accumulate);
    });
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE(T, S)                                                                                                   \
    KERNEL(256) max_pool_##S(const T* x, T* y, Pooling p) {                                                                 \
        with_width<T>(p.c, [&](auto n) {                                                                                    \
            if (is_resnet_stem(p)) {                                                                                        \
                max_pool<decltype(n)::value, ResNetStem>(x, y, p);                                                          \
            } else {                                                                                                        \
                max_pool<decltype(n)::value, Any>(x, y, p);                                                                 \
            }                                                                                                               \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(max_pool_##S)                                                                                                    \
    KERNEL_RESIDENT(128, 2) max_pool_backward_##S(const T* d_y, const T* x, const T* y, T* d_x, int32_t accumulate, Pooling p) {     \
        with_width<T>(p.c, [&](auto n) {                                                                                    \
            if (is_resnet_stem(p)) {                                                                                        \
                max_pool_backward_tiled<decltype(n)::value, ResNetStem>(d_y, x, y, d_x, accumulate != 0, p);                \
            } else {                                                                                                        \
                max_pool_backward<decltype(n)::value>(d_y, x, y, d_x, accumulate != 0, p);                                  \
            }                                                                                                               \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(max_pool_backward_##S)                                                                                           \
    KERNEL(TILE_THREADS) global_avg_pool_##S(const T* x, T* y, RowTiles tiles) {                                            \
        with_width<T>(tiles.channels, [&](auto n) { global_avg_pool<decltype(n)::value>(x, y, tiles); });                   \
    }                                                                                                                       \
    EXPORT(global_avg_pool_##S)                                                                                             \
    KERNEL(TILE_THREADS) global_avg_pool_backward_##S(const T* d_y, T* d_x, int32_t accumulate, RowTiles tiles) {           \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            global_avg_pool_backward<decltype(n)::value>(d_y, d_x, accumulate != 0, tiles);                                 \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(global_avg_pool_backward_##S)
FOR_EACH_TYPE(INSTANTIATE)
