// Batch norm of a 1x1 convolution without its output (src/ops/gram_norm): sums over rows, the covariance, and the folding of
// statistics into weights and of gradients out of them. The matrix products between them are cuBLASLt's.
//
// Traffic through device memory: masked_sums reads d_y and y and writes g, centre reads x and writes y. All others work on matrices of c_out x c_in, at most some tens of MB, which the cache answers for the most part.
#include "rows.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Sums over the rows of tiles. Grid: one block per tile. partials are [chunks of all groups][channels].

// g = d_y where y > 0, else 0; partial sums of its columns. As everywhere, a NaN in y lets nothing through.
template <int N, class T>
__device__ __forceinline__ void masked_sums(const T* __restrict__ d_y, const T* __restrict__ y, T* __restrict__ g,
                                            float* __restrict__ partials, const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    float sums[1][N] = {};
    for_rows<4>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float d[U][N], v[U][N];
        load_rows(d, d_y + i, tile.stride);
        load_rows(v, y + i, tile.stride);
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) d[u][k] = v[u][k] > 0.0f ? d[u][k] : 0.0f;
        add_rows(sums[0], d);
        store_rows(g + i, d, tile.stride);
    });
    sum_over_rows(sums, tile, [&](int channel, const float(&totals)[1]) {
        partials[tile.chunk * tiles.channels + channel] = totals[0];
    });
}

// ---------------------------------------------------------------------------------------------------------------------

// y = x - mean, with means [groups][channels]. Grid: one block per tile.
template <int N, class T>
__device__ __forceinline__ void centre(const T* __restrict__ x, const float* __restrict__ mean, T* __restrict__ y,
                                       const RowTiles& tiles) {
    const Tile<N> tile(tiles, blockIdx.x);
    if (!tile.inside) return;
    float average[N];
    load(average, mean + tile.group * tiles.channels + tile.channel);
    for_rows<4>(tile, [&](int64_t i, auto count) {
        constexpr int U = decltype(count)::value;
        float v[U][N];
        load_rows(v, x + i, tile.stride);
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) v[u][k] -= average[k];
        store_rows(y + i, v, tile.stride);
    });
}

// covariance[group][i][j] = the sum of `splits` parts of sums[group] over `rows`, less the product of the means unless
// `centred`. Grid: any number of blocks.
KERNEL(256)
gram_covariance(const float* sums, int32_t splits, const float* mean, int64_t groups, int32_t c, double rows, int32_t centred,
                float* covariance) {
    const int64_t square = int64_t{c} * c;
    for (int64_t i = global_thread(); i < groups * square; i += global_threads()) {
        const int64_t group = i / square, element = i - group * square;
        const float* const parts = sums + group * splits * square + element;
        double sum = 0.0;
        for (int split = 0; split < splits; ++split) sum += double(parts[split * square]);
        const float* const of_group = mean + group * c;
        const double of_means = centred ? 0.0 : double(of_group[element / c]) * double(of_group[element % c]);
        covariance[i] = float(sum / rows - of_means);
    }
}
EXPORT(gram_covariance)

// ---------------------------------------------------------------------------------------------------------------------
// Folding: a warp for each output channel.

constexpr int FOLD_THREADS = 128;
constexpr int FOLD_WARPS = FOLD_THREADS / WARP;

__device__ __forceinline__ float moved(float old, double value, double momentum) {
    return float(double(old) * (1.0 - momentum) + momentum * value);
}

// Variance and mean of y_k from T = w S and the mean of z; the folded weight gamma rstd w, rounded; the bias beta less what the
// folded weight makes of the mean; running statistics, one group after the other. Grid: c_out / FOLD_WARPS blocks.
template <class T>
__device__ __forceinline__ void fold(const float* __restrict__ w, const float* __restrict__ t, const float* __restrict__ mean,
                                     const float* __restrict__ gamma, const float* __restrict__ beta, int groups, int c_out,
                                     int c_in, double rows, bool centred, double eps, double momentum, T* __restrict__ folded,
                                     float* __restrict__ bias, float* __restrict__ rstd, float* running_mean,
                                     float* running_var, int64_t* tracked) {
    if (global_thread() == 0) *tracked += groups;
    const int lane = int(threadIdx.x) % WARP, k = int(blockIdx.x) * FOLD_WARPS + int(threadIdx.x) / WARP;
    if (k >= c_out) return;
    const float* const row = w + int64_t{k} * c_in;
    for (int group = 0; group < groups; ++group) {
        const int64_t place = int64_t{group} * c_out + k;
        const float* const of_mean = mean + int64_t{group} * c_in;
        double average = 0.0, variance = 0.0;
        for (int j = lane; j < c_in; j += WARP) {
            average += double(row[j]) * double(of_mean[j]);
            variance += double(row[j]) * double(t[place * c_in + j]);
        }
        average = warp_sum(average);
        variance = fmax(warp_sum(variance), 0.0);
        const float inverse = float(1.0 / sqrt(variance + eps)), scale = gamma[k] * inverse;
        double offset = 0.0;
        for (int j = lane; j < c_in; j += WARP) {
            const T rounded = from_float<T>(scale * row[j]);
            folded[place * c_in + j] = rounded;
            if (!centred) offset += double(to_float(rounded)) * double(of_mean[j]);
        }
        offset = warp_sum(offset);
        if (lane > 0) continue;
        bias[place] = float(double(beta[k]) - offset);
        rstd[place] = inverse;
        running_mean[k] = moved(running_mean[k], average, momentum);
        running_var[k] = moved(running_var[k], variance * rows / (rows - 1.0), momentum);
    }
}

// R' of channel k at column j: the sum of the parts of R, less what the mean gives.
__device__ __forceinline__ double centred_product(const float* __restrict__ r, int64_t part, int splits, double of_mean) {
    double sum = 0.0;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) sum += double(r[split * part]);
    return sum - of_mean;
}

// d_w, d_gamma and d_beta over all groups; per group Q = -(gamma rstd^2 d_gamma / rows) w. Grid: c_out / FOLD_WARPS
// blocks. `per_row` is 1 / rows: a division would cost a call, and the registers around it.
KERNEL(FOLD_THREADS)
gram_fold_backward(const float* r, int32_t splits, const float* s, const float* mean, const float* t, const float* w,
                   const float* gamma, const float* rstd, int32_t groups, int32_t c_out, int32_t c_in, double per_row, int32_t centred, float* d_w,
                   int32_t accumulate_w, float* d_gamma, int32_t accumulate_gamma, float* d_beta, int32_t accumulate_beta,
                   float* q) {
    const int lane = int(threadIdx.x) % WARP, k = int(blockIdx.x) * FOLD_WARPS + int(threadIdx.x) / WARP;
    if (k >= c_out) return;
    const int64_t first = int64_t{k} * c_in, part = int64_t{c_out} * c_in;
    double gamma_sum = 0.0, beta_sum = 0.0;
    for (int group = 0; group < groups; ++group) {
        const int64_t place = int64_t{group} * c_out + k;
        const float* const of_group = r + group * splits * part + first;
        const float* const of_mean = mean + int64_t{group} * c_in;
        const double sum = double(s[place]), inverse = double(rstd[place]), scale = double(gamma[k]) * inverse;
        const double shift = centred ? 0.0 : sum;
        double product = 0.0;
#pragma unroll 1
        for (int j = lane; j < c_in; j += WARP)
            product += centred_product(of_group + j, part, splits, shift * double(of_mean[j])) * double(w[first + j]);
        const double d = inverse * warp_sum(product);
        const double factor = -scale * per_row * inverse * d;
#pragma unroll 1
        for (int j = lane; j < c_in; j += WARP) {
            const double of_column = centred_product(of_group + j, part, splits, shift * double(of_mean[j]));
            const double value = scale * (of_column - inverse * d * double(t[place * c_in + j]));
            float* const to = d_w + first + j;
            *to = group > 0 || accumulate_w ? float(double(*to) + value) : float(value);
            q[place * c_in + j] = float(factor * double(w[first + j]));
        }
        gamma_sum += d;
        beta_sum += sum;
    }
    if (lane > 0) return;
    d_gamma[k] = float((accumulate_gamma ? double(d_gamma[k]) : 0.0) + gamma_sum);
    d_beta[k] = float((accumulate_beta ? double(d_beta[k]) : 0.0) + beta_sum);
}
EXPORT(gram_fold_backward)

// rounded = m in the activations' type, and bias = -(s / rows) f - mean rounded, per group. Grid: tiles of 32 columns, groups.
constexpr int SHIFT_THREADS = 256;
template <class T>
__device__ __forceinline__ void shift(const float* __restrict__ m, const float* __restrict__ s, const T* __restrict__ f,
                                      const float* __restrict__ mean, int c_out, int c_in, double per_row, bool centred,
                                      T* __restrict__ rounded, float* __restrict__ bias) {
    constexpr int WARPS = SHIFT_THREADS / WARP;
    __shared__ double scratch[WARPS][WARP];
    const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP, i = int(blockIdx.x) * WARP + lane;
    const int64_t group = blockIdx.y;
    double sum = 0.0;
    if (i < c_in) {
        for (int k = warp; k < c_out; k += WARPS) {
            const int64_t channel = group * c_out + k;
            sum -= double(s[channel]) * per_row * double(to_float(f[channel * c_in + i]));
        }
        for (int j = warp; j < c_in; j += WARPS) {
            const int64_t row = group * c_in + j;
            const T value = from_float<T>(m[row * c_in + i]);
            rounded[row * c_in + i] = value;
            if (!centred) sum -= double(mean[row]) * double(to_float(value));
        }
    }
    scratch[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || i >= c_in) return;
    for (int other = 1; other < WARPS; ++other) sum += scratch[other][lane];
    bias[group * c_in + i] = float(sum);
}

// ---------------------------------------------------------------------------------------------------------------------

#define INSTANTIATE(T, S)                                                                                                   \
    KERNEL(TILE_THREADS)                                                                                                    \
    gram_masked_sums_##S(const T* d_y, const T* y, T* g, float* partials, RowTiles tiles) {                                 \
        with_width<T>(tiles.channels, [&](auto n) { masked_sums<decltype(n)::value>(d_y, y, g, partials, tiles); });        \
    }                                                                                                                       \
    EXPORT(gram_masked_sums_##S)                                                                                            \
    KERNEL(TILE_THREADS) gram_centre_##S(const T* x, const float* mean, T* y, RowTiles tiles) {                             \
        with_width<T>(tiles.channels, [&](auto n) { centre<decltype(n)::value>(x, mean, y, tiles); });                      \
    }                                                                                                                       \
    EXPORT(gram_centre_##S)                                                                                                 \
    KERNEL(FOLD_THREADS)                                                                                                    \
    gram_fold_##S(const float* w, const float* t, const float* mean, const float* gamma, const float* beta, int32_t groups, \
                  int32_t c_out, int32_t c_in, double rows, int32_t centred, double eps, double momentum, T* folded,        \
                  float* bias, float* rstd, float* running_mean, float* running_var, int64_t* tracked) {                    \
        fold(w, t, mean, gamma, beta, groups, c_out, c_in, rows, centred != 0, eps, momentum, folded, bias, rstd,           \
             running_mean, running_var, tracked);                                                                           \
    }                                                                                                                       \
    EXPORT(gram_fold_##S)                                                                                                   \
    KERNEL(SHIFT_THREADS)                                                                                                   \
    gram_shift_##S(const float* m, const float* s, const T* f, const float* mean, int32_t c_out, int32_t c_in,              \
                   double per_row, int32_t centred, T* rounded, float* bias) {                                              \
        shift(m, s, f, mean, c_out, c_in, per_row, centred != 0, rounded, bias);                                            \
    }                                                                                                                       \
    EXPORT(gram_shift_##S)
FOR_EACH_TYPE(INSTANTIATE)
