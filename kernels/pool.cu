// Max pooling and global average pooling over NHWC, and their gradients.
//
// Traffic through device memory, in elements per element of x (the larger tensor; 2 bytes each in bf16); windows overlap, but
// in the cache:
//   max pool, 3x3 with stride 2   read x, write y, taken              1.37
//   its gradient                  read d_y, taken, write d_x          1.37
//   global average pool           read x                              1
//   its gradient                  write d_x                           1
// and one more for a gradient that is added to what is there. `taken` is a byte for each element of y: which position of its
// window the gradient goes to. Where no gradient is to come it is not written.
#include "positions.cuh"
#include "rows.cuh"
#include "windows.cuh"
#include "words.cuh"

struct Pooling {
    int64_t images;
    int32_t h, w, c, oh, ow;
    int32_t kernel, stride, padding;
};

// The geometry as compile-time constants, for what is fast when unrolled, or as it comes.
struct ResNetStem {
    static constexpr int kernel = SIZE, stride = STRIDE, padding = PADDING;
    __device__ __forceinline__ explicit ResNetStem(const Pooling&) {}
};
struct Any {
    const int kernel, stride, padding;
    __device__ __forceinline__ explicit Any(const Pooling& p) : kernel(p.kernel), stride(p.stride), padding(p.padding) {}
};
__device__ __forceinline__ bool is_resnet_stem(const Pooling& p) {
    return p.kernel == SIZE && p.stride == STRIDE && p.padding == PADDING;
}

// ---------------------------------------------------------------------------------------------------------------------
// Max pooling.

// y = the maximum of each window; padding never wins, NaN always does. taken, if it is wanted: the first position of the
// maximum, counted row by row, or NONE where it is NaN.
template <int N, class G, class T>
__device__ __forceinline__ void max_pool(const T* __restrict__ x, T* __restrict__ y, uint8_t* __restrict__ taken, const Pooling& p) {
    const G g(p);
    for_each_position<N>(p.images, p.oh, p.ow, p.c, [&](int64_t image, int oy, int ox, int channel) {
        const T* const of_image = x + image * (p.h * p.w * p.c) + channel;
        const int top = oy * g.stride - g.padding, left = ox * g.stride - g.padding;
        // Where all is -infinity nothing is greater than that: it is the first position inside.
        Words<T, N> best = filled_words<N, T>(-INFINITY);
        Words<T, N> first = whole_words<N, T>(max(-top, 0) * g.kernel + max(-left, 0));
#pragma unroll
        for (int ky = 0; ky < g.kernel; ++ky)
#pragma unroll
            for (int kx = 0; kx < g.kernel; ++kx) {
                const int iy = top + ky, ix = left + kx;
                if (iy < 0 || iy >= p.h || ix < 0 || ix >= p.w) continue;
                const Words<T, N> v = load_words<N>(of_image + (iy * p.w + ix) * p.c);
                const Words<T, N> here = whole_words<N, T>(ky * g.kernel + kx);
#pragma unroll
                for (int i = 0; i < v.COUNT; ++i) {
                    const uint32_t greater = greater_mask<T>(v.word[i], best.word[i]);
                    first.word[i] = (here.word[i] & greater) | (first.word[i] & ~greater);
                    best.word[i] = max_words<T>(best.word[i], v.word[i]);
                }
            }
        const int64_t to = image * (p.oh * p.ow * p.c) + (oy * p.ow + ox) * p.c + channel;
        store_words(y + to, best);
        if (taken == nullptr) return;
#pragma unroll
        for (int i = 0; i < best.COUNT; ++i) first.word[i] |= ~equal_mask<T>(best.word[i], best.word[i]);
        *reinterpret_cast<Pack<uint8_t, N>*>(taken + to) = low_bytes(first);
    });
}

// d_x of any geometry, as a gather: each position of x adds d_y of the windows that took it.
template <int N, class T>
__device__ __forceinline__ void max_pool_backward(const T* __restrict__ d_y, const uint8_t* __restrict__ taken, T* d_x,
                                                  bool accumulate, const Pooling& p) {
    const int kernel = p.kernel, stride = p.stride, padding = p.padding;
    for_each_position<N>(p.images, p.h, p.w, p.c, [&](int64_t image, int iy, int ix, int channel) {
        const int64_t y_image = image * (p.oh * p.ow * p.c) + channel;
        const auto first_window = [=](int i) { return i + padding < kernel ? 0 : (i + padding - kernel) / stride + 1; };
        const auto last_window = [=](int i, int windows) { return min((i + padding) / stride, windows - 1); };
        float sum[N] = {};
        for (int oy = first_window(iy); oy <= last_window(iy, p.oh); ++oy)
            for (int ox = first_window(ix); ox <= last_window(ix, p.ow); ++ox) {
                const int64_t window = y_image + (oy * p.ow + ox) * p.c;
                const int here = (iy + padding - oy * stride) * kernel + ix + padding - ox * stride;
                const auto positions = *reinterpret_cast<const Pack<uint8_t, N>*>(taken + window);
                float gradient[N];
                load(gradient, d_y + window);
#pragma unroll
                for (int k = 0; k < N; ++k) sum[k] += positions.element[k] == here ? gradient[k] : 0.0f;
            }
        store_or_add(d_x + image * (p.h * p.w * p.c) + (iy * p.w + ix) * p.c + channel, sum, accumulate);
    });
}

// The same for the ResNet stem, a thread for two by two positions: 4 windows are read for them, where the gather above reads 9.
template <int N, class T>
__device__ __forceinline__ void stem_max_pool_backward(const T* __restrict__ d_y, const uint8_t* __restrict__ taken, T* d_x,
                                                       bool accumulate, const Pooling& p) {
    for_each_position<N>(p.images, p.oh, p.ow, p.c, [&](int64_t image, int down, int across, int channel) {
        const Quad<N> quad(image, down, across, channel);
        const QuadWindows<N, T> windows(quad, d_y, taken, p);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sums[2][N];
            windows.gather(sums, i);
#pragma unroll
            for (int j = 0; j < 2; ++j)
                if (quad.has(i, j, p)) store_or_add(d_x + quad.element(i, j, p), sums[j], accumulate);
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
    KERNEL_RESIDENT(256, 4) max_pool_##S(const T* x, T* y, uint8_t* taken, Pooling p) {                                     \
        with_width<T>(p.c, [&](auto n) {                                                                                    \
            if (is_resnet_stem(p)) {                                                                                        \
                max_pool<decltype(n)::value, ResNetStem>(x, y, taken, p);                                                   \
            } else {                                                                                                        \
                max_pool<decltype(n)::value, Any>(x, y, taken, p);                                                          \
            }                                                                                                               \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(max_pool_##S)                                                                                                    \
    KERNEL_RESIDENT(128, 4) max_pool_backward_##S(const T* d_y, const uint8_t* taken, T* d_x, int32_t accumulate, Pooling p) {\
        with_width<T>(p.c, [&](auto n) {                                                                                    \
            if (is_resnet_stem(p)) {                                                                                        \
                stem_max_pool_backward<decltype(n)::value>(d_y, taken, d_x, accumulate != 0, p);                            \
            } else {                                                                                                        \
                max_pool_backward<decltype(n)::value>(d_y, taken, d_x, accumulate != 0, p);                                 \
            }                                                                                                               \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(max_pool_backward_##S)                                                                                           \
    KERNEL_RESIDENT(TILE_THREADS, 4) global_avg_pool_##S(const T* x, T* y, RowTiles tiles) {                                \
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
