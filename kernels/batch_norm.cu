// Batch norm over rows of channels (NHWC images or N x D vectors): training with statistics per group of rows (a view),
// evaluation, and the gradient; each with an optional residual and an optional ReLU in the same pass.
//
// Traffic through device memory, in elements of the activations per element of x (2 bytes each in bf16):
//                    with or without ReLU   ReLU and residual
//   statistics                          1                   1   read x
//   apply                               2               3 1/16  read x (residual), write y (and the mask)
//   backward reduce                     2               3 1/16  read d_y, x (the mask), write d_residual
//   backward apply                      3                   3   read d_y, x, write d_x; behind a residual d_residual, which
//                                                               is d_y behind the mask, stands for d_y
// and one more for each output that is added to what is there. Where the ReLU let nothing through is never read off y: without
// a residual x and the statistics say it, with one a bit for each element does. Partial sums add 8 bytes per channel and tile:
// below 4 % of the statistics' traffic where there are rows enough to fill a device, and mostly answered by the cache. The
// apply passes walk from the end to the start, so that what the pass before read last is still cached.
#include "batch_norm.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Sums over the rows of tiles. Grid: one block per tile.

// What the sums of squares are shifted by: about the group's mean, so that they do not cancel in the variance. The average of
// its first eight rows (of fewer, the first), pairwise, which is exact for a constant channel. `x` is the first row's.
constexpr int SHIFT_ROWS = 8;
template <int N, class T>
__device__ __forceinline__ void load_shift(float (&shift)[N], const T* x, int64_t rows, int channels) {
    load(shift, x);
    if (rows < SHIFT_ROWS) return;
    float v[SHIFT_ROWS][N];
    load_rows(v, x, channels);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        float of_channel[SHIFT_ROWS];
#pragma unroll
        for (int u = 0; u < SHIFT_ROWS; ++u) of_channel[u] = v[u][k];
        shift[k] = tree_sum(of_channel) * (1.0f / SHIFT_ROWS);
    }
}

// Partial sums of x - shift and its square.
template <int N, class T>
__device__ __forceinline__ void statistics(const T* __restrict__ x, Partial* __restrict__ partials, const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    float shift[N] = {}, sums[2][N] = {};
    if (tile.inside) {
        const T* const of_group = x + tile.group * tiles.rows * tiles.channels + tile.channel;
        load_shift(shift, of_group, tiles.rows, tiles.channels);
    }
    for_rows<4>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float v[U][N];
        load_rows(v, x + i, tile.stride);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float d[U], square[U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                d[u] = v[u][k] - shift[k];
                square[u] = d[u] * d[u];
            }
            sums[0][k] += tree_sum(d);
            sums[1][k] += tree_sum(square);
        }
    });
    sum_over_rows(sums, tile, [&](int channel, const float(&totals)[2]) {
        partials[tile.chunk * tiles.channels + channel] = {totals[0], totals[1]};
    });
}

// Calls f(Count<M>) with the masking as a compile-time number.
template <class F> __device__ __forceinline__ void with_masking(int masking, F f) {
    if (masking == MASK_NONE) {
        f(Count<MASK_NONE>{});
    } else if (masking == MASK_OF_X) {
        f(Count<MASK_OF_X>{});
    } else {
        f(Count<MASK_STORED>{});
    }
}

// Partial sums of g and of g (x - mean); writes g to d_residual, unless that is null.
template <int N, int MASK, class T>
__device__ __forceinline__ void backward_reduce(const T* __restrict__ d_y, const T* __restrict__ x,
                                                const uint8_t* __restrict__ mask, const float* __restrict__ mean,
                                                const float* __restrict__ rstd, const float* __restrict__ gamma,
                                                const float* __restrict__ beta, T* d_residual, Partial* __restrict__ partials,
                                                const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    Channels<N> of = {};
    float sums[2][N] = {};
    if (tile.inside) {
        const int64_t of_group = tile.group * tiles.channels + tile.channel;
        of.load_mean_and_beta(mean + of_group, beta ? beta + tile.channel : nullptr);
        if (MASK == MASK_OF_X) load_scale(of.scale, rstd + of_group, gamma ? gamma + tile.channel : nullptr);
    }
    for_rows<2>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float g[U][N], v[U][N];
        load_rows(v, x + i, tile.stride);
        load_masked<MASK>(g, d_y, v, of, mask, i, tile.stride);
        if (d_residual) store_rows(d_residual + i, g, tile.stride);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            float first[U], second[U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                first[u] = g[u][k];
                second[u] = g[u][k] * (v[u][k] - of.mean[k]);
            }
            sums[0][k] += tree_sum(first);
            sums[1][k] += tree_sum(second);
        }
    });
    sum_over_rows(sums, tile, [&](int channel, const float(&totals)[2]) {
        partials[tile.chunk * tiles.channels + channel] = {totals[0], totals[1]};
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Combining partial sums. Grid: one block per COMBINED channels; each of its threads adds every SLICES-th chunk.

constexpr int COMBINE_THREADS = 512;
constexpr int COMBINED = 8; // channels of a block: 64 bytes of partial sums are read together
constexpr int SLICES = COMBINE_THREADS / COMBINED;

// Adds up the partial sums of each group in float64 and calls finish(group, channel, first, second) for one group after
// the other, always from the same thread for a channel.
template <class F>
__device__ __forceinline__ void combine(const Partial* __restrict__ partials, int chunks, int groups, int channels, F finish) {
    __shared__ double scratch[2][COMBINE_THREADS / WARP][COMBINED];
    const int c = int(threadIdx.x) % COMBINED, slice = int(threadIdx.x) / COMBINED, warp = int(threadIdx.x) / WARP;
    const int channel = int(blockIdx.x) * COMBINED + c;
    for (int group = 0; group < groups; ++group) {
        double sums[2] = {};
        if (channel < channels) {
            const Partial* of_channel = partials + int64_t{group} * chunks * channels + channel;
#pragma unroll 4
            for (int chunk = slice; chunk < chunks; chunk += SLICES) {
                const Partial partial = of_channel[int64_t{chunk} * channels];
                sums[0] += double(partial.element[0]);
                sums[1] += double(partial.element[1]);
            }
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int distance = COMBINED; distance < WARP; distance *= 2)
                sums[s] += __shfl_xor_sync(ALL_LANES, sums[s], distance);
            if (threadIdx.x % WARP < COMBINED) scratch[s][warp][c] = sums[s];
        }
        __syncthreads();
        if (slice == 0 && channel < channels) {
            double totals[2] = {};
#pragma unroll
            for (int w = 0; w < COMBINE_THREADS / WARP; ++w) {
                totals[0] += scratch[0][w][c];
                totals[1] += scratch[1][w][c];
            }
            finish(group, channel, totals[0], totals[1]);
        }
        __syncthreads(); // before the next group overwrites `scratch`
    }
}

// mean and rstd of each group, the scale that `apply` takes, and the running statistics: r = (1 - momentum) r + momentum s
// once per group in order, with the unbiased variance. Arrays are [groups][channels], running statistics [channels].
struct Statistics {
    const float* gamma;
    double eps, momentum;
    float *mean, *rstd, *scale, *running_mean, *running_var;

    // Of a channel in a group of n rows; `i` is its place in the arrays.
    __device__ __forceinline__ void set(int64_t i, int channel, double average, double variance, double n) const {
        const float inverse = float(1.0 / sqrt(variance + eps));
        mean[i] = float(average);
        rstd[i] = inverse;
        scale[i] = scale_of(gamma ? gamma + channel : nullptr, inverse);
        running_mean[channel] = moved(running_mean[channel], average);
        running_var[channel] = moved(running_var[channel], variance * n / (n - 1.0));
    }
    __device__ __forceinline__ float moved(float old, double value) const {
        return float(double(old) * (1.0 - momentum) + momentum * value);
    }
};

template <class T>
__device__ __forceinline__ void finish_statistics(const Partial* partials, int chunks, int groups, const T* __restrict__ x,
                                                  int64_t rows, int channels, const Statistics& to,
                                                  int64_t* __restrict__ tracked) {
    if (global_thread() == 0) *tracked += groups;
    const double n = double(rows);
    combine(partials, chunks, groups, channels, [&](int group, int channel, double first, double second) {
        float shift[1];
        load_shift(shift, x + group * rows * channels + channel, rows, channels);
        const double average = double(shift[0]) + first / n;
        const double variance = fmax((second - first * first / n) / n, 0.0);
        to.set(int64_t{group} * channels + channel, channel, average, variance, n);
    });
}

// The same from the sums of x and of its square as a convolution's epilogue leaves them, [groups][2][channels]. Grid: one
// thread per channel.
__device__ __forceinline__ void finish_sums(const float* __restrict__ sums, int groups, int64_t rows, int channels,
                                            const Statistics& to, int64_t* __restrict__ tracked) {
    const int64_t channel = global_thread();
    if (channel == 0) *tracked += groups;
    if (channel >= channels) return;
    const double n = double(rows);
    for (int group = 0; group < groups; ++group) {
        const float* const of_group = sums + int64_t{2} * group * channels + channel;
        const double average = double(of_group[0]) / n;
        const double variance = fmax(double(of_group[channels]) / n - average * average, 0.0);
        to.set(int64_t{group} * channels + channel, int(channel), average, variance, n);
    }
}

// From the sums of g and of g (x - mean): d_beta and d_gamma over all groups (unless null), and per group the coefficients
// of d_x = scale (g - offset - (x - mean) slope), as [3][groups][channels].
__device__ __forceinline__ void finish_backward(const Partial* partials, int chunks, int groups, int64_t rows, int channels,
                                                const float* __restrict__ rstd, const float* __restrict__ gamma,
                                                float* __restrict__ coefficients, float* d_gamma, bool accumulate_gamma,
                                                float* d_beta, bool accumulate_beta) {
    const double n = double(rows);
    const int64_t all = int64_t{groups} * channels;
    double gamma_sum = 0.0, beta_sum = 0.0;
    combine(partials, chunks, groups, channels, [&](int group, int channel, double first, double second) {
        const int64_t i = int64_t{group} * channels + channel;
        const float r = rstd[i];
        coefficients[i] = scale_of(gamma ? gamma + channel : nullptr, r);
        coefficients[all + i] = float(first / n);
        coefficients[2 * all + i] = float(second * (double(r) * double(r)) / n);
        gamma_sum += second * double(r);
        beta_sum += first;
        if (group < groups - 1) return;
        if (d_gamma) d_gamma[channel] = (accumulate_gamma ? d_gamma[channel] : 0.0f) + float(gamma_sum);
        if (d_beta) d_beta[channel] = (accumulate_beta ? d_beta[channel] : 0.0f) + float(beta_sum);
    });
}

// The scale that finish_statistics computes, once more, for channels of groups. Grid: a stride over them.
__device__ __forceinline__ void scale_again(const float* __restrict__ rstd, const float* __restrict__ gamma,
                                            float* __restrict__ scale, int groups, int channels) {
    const int64_t all = int64_t{groups} * channels;
    for (int64_t i = global_thread(); i < all; i += global_threads()) scale[i] = scale_of(gamma + i % channels, rstd[i]);
}

// The scale of evaluation, from the running variance.
__device__ __forceinline__ void eval_scale(const float* __restrict__ variance, const float* __restrict__ gamma, double eps,
                                           float* __restrict__ scale, int channels) {
    const int64_t c = global_thread();
    if (c < channels) scale[c] = scale_of(gamma ? gamma + c : nullptr, float(1.0 / sqrt(double(variance[c]) + eps)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Applying. Grid: one block per tile.

// y = act((x - mean) scale + beta + residual); mean and scale are [groups][channels], beta is [channels] or null (0). In front
// of a residual the sum is rounded to T, as where batch norm and addition are two ops: networks amplify each rounding, and
// only with the same ones can results be compared with those of PyTorch's autocast. As on the CPU, a ReLU turns NaN into 0:
// non-finite values are looked for in the inputs and losses. `mask` takes a bit for each y > 0, unless it is null.
template <int N, bool RESIDUAL, class T>
__device__ __forceinline__ void apply(const T* __restrict__ x, const T* __restrict__ residual, const float* __restrict__ mean,
                                      const float* __restrict__ scale, const float* __restrict__ beta, bool relu, T* y,
                                      uint8_t* mask, const RowTiles& tiles) {
    const Tile<N> tile(tiles, gridDim.x - 1 - blockIdx.x);
    if (!tile.inside) return;
    const int64_t of_group = tile.group * tiles.channels + tile.channel;
    Channels<N> of;
    of.load_mean_and_beta(mean + of_group, beta ? beta + tile.channel : nullptr);
    load(of.scale, scale + of_group);
    for_rows<RESIDUAL ? 2 : 4>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float v[U][N], r[U][N];
        load_rows(v, x + i, tile.stride);
        if (RESIDUAL) load_rows(r, residual + i, tile.stride);
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) {
                float out = of.normalised(k, v[u][k]);
                if (RESIDUAL) out = to_float(from_float<T>(out)) + r[u][k];
                v[u][k] = relu && !(out > 0.0f) ? 0.0f : out;
            }
        store_rows(y + i, v, tile.stride);
        if (RESIDUAL && mask) store_mask<T>(mask + i / N, v, tile.stride / N);
    });
}

// As `apply` without a residual, with partial sums of the columns of y as it is stored, [chunks of all groups][channels].
template <int N, class T>
__device__ __forceinline__ void apply_and_sum(const T* __restrict__ x, const float* __restrict__ mean,
                                              const float* __restrict__ scale, const float* __restrict__ beta, bool relu, T* y,
                                              float* __restrict__ partials, const RowTiles& tiles) {
    const Tile<N> tile(tiles, gridDim.x - 1 - blockIdx.x);
    Channels<N> of = {};
    float sums[1][N] = {};
    if (tile.inside) {
        const int64_t of_group = tile.group * tiles.channels + tile.channel;
        of.load_mean_and_beta(mean + of_group, beta ? beta + tile.channel : nullptr);
        load(of.scale, scale + of_group);
    }
    for_rows<4>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float v[U][N];
        load_rows(v, x + i, tile.stride);
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) {
                const float out = of.normalised(k, v[u][k]);
                v[u][k] = to_float(from_float<T>(relu && !(out > 0.0f) ? 0.0f : out));
            }
        store_rows(y + i, v, tile.stride);
        add_rows(sums[0], v);
    });
    sum_over_rows(sums, tile, [&](int channel, const float(&totals)[1]) {
        partials[tile.chunk * tiles.channels + channel] = totals[0];
    });
}

// d_x = scale (g - offset - (x - mean) slope), with g as in `backward_reduce`; adds g to d_residual, unless that is null. The
// two may be the same tensor.
template <int N, int MASK, class T>
__device__ __forceinline__ void backward_apply(const T* __restrict__ d_y, const T* __restrict__ x,
                                               const uint8_t* __restrict__ mask, const float* __restrict__ mean,
                                               const float* __restrict__ coefficients, int64_t all,
                                               const float* __restrict__ beta, T* d_x, bool accumulate, T* d_residual,
                                               const RowTiles& tiles) {
    const Tile<N> tile(tiles, gridDim.x - 1 - blockIdx.x);
    if (!tile.inside) return;
    const int64_t of_group = tile.group * tiles.channels + tile.channel;
    Channels<N> of;
    float offset[N], slope[N];
    of.load_mean_and_beta(mean + of_group, beta ? beta + tile.channel : nullptr);
    load(of.scale, coefficients + of_group);
    load(offset, coefficients + all + of_group);
    load(slope, coefficients + 2 * all + of_group);
    for_rows<2>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float g[U][N], v[U][N];
        load_rows(v, x + i, tile.stride);
        load_masked<MASK>(g, d_y, v, of, mask, i, tile.stride);
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k)
                v[u][k] = of.scale[k] * (g[u][k] - offset[k] - (v[u][k] - of.mean[k]) * slope[k]);
        store_rows(d_x + i, v, tile.stride, accumulate);
        if (d_residual) store_rows(d_residual + i, g, tile.stride, true);
    });
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE(T, S)                                                                                                   \
    KERNEL(TILE_THREADS) batch_norm_statistics_##S(const T* x, Partial* partials, RowTiles tiles) {                         \
        with_width<T>(tiles.channels, [&](auto n) { statistics<decltype(n)::value>(x, partials, tiles); });                 \
    }                                                                                                                       \
    EXPORT(batch_norm_statistics_##S)                                                                                       \
    KERNEL(COMBINE_THREADS)                                                                                                 \
    batch_norm_finish_statistics_##S(const Partial* partials, int32_t chunks, int32_t groups, const T* x, int64_t rows,     \
                                     int32_t channels, const float* gamma, double eps, double momentum, float* mean,        \
                                     float* rstd, float* scale, float* running_mean, float* running_var,                    \
                                     int64_t* tracked) {                                                                    \
        finish_statistics(partials, chunks, groups, x, rows, channels,                                                      \
                          {gamma, eps, momentum, mean, rstd, scale, running_mean, running_var}, tracked);                   \
    }                                                                                                                       \
    EXPORT(batch_norm_finish_statistics_##S)                                                                                \
    KERNEL(TILE_THREADS)                                                                                                    \
    batch_norm_apply_##S(const T* x, const T* residual, const float* mean, const float* scale, const float* beta,           \
                         int32_t relu, T* y, uint8_t* mask, RowTiles tiles) {                                               \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            constexpr int N = decltype(n)::value;                                                                           \
            if (residual) {                                                                                                 \
                apply<N, true>(x, residual, mean, scale, beta, relu != 0, y, mask, tiles);                                  \
            } else {                                                                                                        \
                apply<N, false>(x, residual, mean, scale, beta, relu != 0, y, mask, tiles);                                 \
            }                                                                                                               \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_apply_##S)                                                                                            \
    KERNEL(TILE_THREADS)                                                                                                    \
    batch_norm_apply_and_sum_##S(const T* x, const float* mean, const float* scale, const float* beta, int32_t relu, T* y,  \
                                 float* partials, RowTiles tiles) {                                                         \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            apply_and_sum<decltype(n)::value>(x, mean, scale, beta, relu != 0, y, partials, tiles);                         \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_apply_and_sum_##S)                                                                                    \
    KERNEL_RESIDENT(TILE_THREADS, 2)                                                                                        \
    batch_norm_backward_reduce_##S(const T* d_y, const T* x, int32_t masking, const uint8_t* mask, const float* mean,       \
                                   const float* rstd, const float* gamma, const float* beta, T* d_residual,                 \
                                   Partial* partials, RowTiles tiles) {                                                     \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            with_masking(masking, [&](auto m) {                                                                             \
                constexpr int N = decltype(n)::value, MASK = decltype(m)::value;                                            \
                backward_reduce<N, MASK>(d_y, x, mask, mean, rstd, gamma, beta, d_residual, partials, tiles);               \
            });                                                                                                             \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_backward_reduce_##S)                                                                                  \
    KERNEL_RESIDENT(TILE_THREADS, 2)                                                                                        \
    batch_norm_backward_apply_##S(const T* d_y, const T* x, int32_t masking, const uint8_t* mask, const float* mean,        \
                                  const float* coefficients, int64_t all, const float* beta, T* d_x, int32_t accumulate,    \
                                  T* d_residual, RowTiles tiles) {                                                          \
        with_width<T>(tiles.channels, [&](auto n) {                                                                         \
            with_masking(masking, [&](auto m) {                                                                             \
                constexpr int N = decltype(n)::value, MASK = decltype(m)::value;                                            \
                backward_apply<N, MASK>(d_y, x, mask, mean, coefficients, all, beta, d_x, accumulate != 0, d_residual,      \
                                        tiles);                                                                             \
            });                                                                                                             \
        });                                                                                                                 \
    }                                                                                                                       \
    EXPORT(batch_norm_backward_apply_##S)
FOR_EACH_TYPE(INSTANTIATE)

KERNEL(COMBINE_THREADS)
batch_norm_finish_backward(const Partial* partials, int32_t chunks, int32_t groups, int64_t rows, int32_t channels,
                           const float* rstd, const float* gamma, float* coefficients, float* d_gamma,
                           int32_t accumulate_gamma, float* d_beta, int32_t accumulate_beta) {
    finish_backward(partials, chunks, groups, rows, channels, rstd, gamma, coefficients, d_gamma, accumulate_gamma != 0,
                    d_beta, accumulate_beta != 0);
}
EXPORT(batch_norm_finish_backward)

KERNEL(256)
batch_norm_finish_sums(const float* sums, int32_t groups, int64_t rows, int32_t channels, const float* gamma, double eps,
                       double momentum, float* mean, float* rstd, float* scale, float* running_mean, float* running_var,
                       int64_t* num_batches_tracked) {
    finish_sums(sums, groups, rows, channels, {gamma, eps, momentum, mean, rstd, scale, running_mean, running_var},
                num_batches_tracked);
}
EXPORT(batch_norm_finish_sums)

KERNEL(256)
batch_norm_scale(const float* rstd, const float* gamma, float* scale, int32_t groups, int32_t channels) {
    scale_again(rstd, gamma, scale, groups, channels);
}
EXPORT(batch_norm_scale)

KERNEL(256)
batch_norm_eval_scale(const float* variance, const float* gamma, double eps, float* scale, int32_t channels) {
    eval_scale(variance, gamma, eps, scale, channels);
}
EXPORT(batch_norm_eval_scale)
