// Mean and variance of the channels where the mean is large beside the spread: how often x is read, and what is left of
// the variance. All variants share the same traversal.
#include "lab.cuh"

constexpr int PACK = WIDTH<float>;
constexpr int ROWS_AT_ONCE = 256 / WARP; // a warp goes along a row, 4 channels a lane

// Two sums of a term of each element, in parts of the rows: partial[part][sum][channel]. Grid: tiles of 128 channels,
// parts.
template <class F>
__device__ __forceinline__ void channel_sums(const float* x, double* partial, int64_t rows, int c,
                                             int64_t rows_per_block, F terms) {
    __shared__ float sums[2][ROWS_AT_ONCE][WARP * PACK];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, channel = (blockIdx.x * WARP + lane) * PACK;
    const int64_t first = blockIdx.y * rows_per_block, after = first + rows_per_block, end = after < rows ? after : rows;
    float sum[2][PACK] = {};
    if (channel < c) {
        for (int64_t r = first + warp; r < end; r += ROWS_AT_ONCE) {
            float v[PACK];
            load(v, x + r * c + channel);
#pragma unroll
            for (int k = 0; k < PACK; ++k) {
                const float2 term = terms(v[k], channel + k);
                sum[0][k] += term.x;
                sum[1][k] += term.y;
            }
        }
    }
    for (int k = 0; k < PACK; ++k) {
        sums[0][warp][lane * PACK + k] = sum[0][k];
        sums[1][warp][lane * PACK + k] = sum[1][k];
    }
    __syncthreads();
    const int own = blockIdx.x * WARP * PACK + threadIdx.x;
    if (threadIdx.x >= WARP * PACK || own >= c) return;
    for (int s = 0; s < 2; ++s) {
        double total = 0.0;
        for (int w = 0; w < ROWS_AT_ONCE; ++w) total += sums[s][w][threadIdx.x];
        partial[(int64_t{blockIdx.y} * 2 + s) * c + own] = total;
    }
}

// Sums of x and x^2.
KERNEL(256) sums_plain(const float* x, double* partial, int64_t rows, int32_t c, int64_t rows_per_block) {
    channel_sums(x, partial, rows, c, rows_per_block, [](float v, int) { return make_float2(v, v * v); });
}
EXPORT(sums_plain)

// Sums of x - s and its square, where s is the channel's value in the first row.
KERNEL(256) sums_shifted(const float* x, double* partial, int64_t rows, int32_t c, int64_t rows_per_block) {
    channel_sums(x, partial, rows, c, rows_per_block, [=](float v, int channel) {
        const float d = v - x[channel]; // read again from the cache
        return make_float2(d, d * d);
    });
}
EXPORT(sums_shifted)

// Sums of x - mean and its square.
KERNEL(256)
sums_centred(const float* x, const float* mean, double* partial, int64_t rows, int32_t c, int64_t rows_per_block) {
    channel_sums(x, partial, rows, c, rows_per_block, [=](float v, int channel) {
        const float d = v - mean[channel];
        return make_float2(d, d * d);
    });
}
EXPORT(sums_centred)

// Mean and variance from the sums of what was left of x when `shift`, a value for each channel or null, was subtracted.
KERNEL(256)
statistics(const double* partial, const float* shift, float* mean, float* variance, int64_t rows, int32_t c,
           int32_t parts) {
    const int64_t channel = global_thread();
    if (channel >= c) return;
    double sum = 0.0, squares = 0.0;
    for (int64_t part = 0; part < parts; ++part) {
        sum += partial[part * 2 * c + channel];
        squares += partial[(part * 2 + 1) * c + channel];
    }
    const double rest = sum / double(rows);
    mean[channel] = float((shift ? shift[channel] : 0.0f) + rest);
    variance[channel] = float(squares / double(rows) - rest * rest);
}
EXPORT(statistics)

int main() {
    const int64_t rows = lab::EMULATED ? 3001 : 256 * 56 * 56;
    const int32_t c = lab::EMULATED ? 264 : 256;
    const std::vector<float> values = lab::normal(rows * c, -16.0f, 0.05f, 3);
    const lab::Array<float> x(values);
    const lab::Array<float> mean(c), variance(c), first_mean(c);
    std::vector<double> sum(c), expected(c);
    for (int64_t i = 0; i < rows * c; ++i) sum[i % c] += values[i];
    for (int64_t i = 0; i < rows * c; ++i) {
        const double d = values[i] - sum[i % c] / double(rows);
        expected[i % c] += d * d / double(rows);
    }
    const auto error = [&] { return lab::error(variance.host(), expected); };

    const int32_t parts = int32_t(std::min<int64_t>((rows + 255) / 256, 1024));
    const int64_t rows_per_block = (rows + parts - 1) / parts;
    const lab::Array<double> partial(size_t(parts) * 2 * c);
    const dim3 grid((c + 127) / 128, parts), last((c + 255) / 256);
    const float* none = nullptr;
    const auto finish = [&](const float* shift, float* to) {
        LAUNCH(statistics, last, partial.get(), shift, to, variance.get(), rows, c, parts);
    };

    lab::Ladder ladder("batch norm statistics, float32, mean -16, deviation 0.05", double(rows) * c * sizeof(float));
    ladder.variant("one pass, E[x^2] - E[x]^2 (never ship this)", [&] {
        LAUNCH(sums_plain, grid, x.get(), partial.get(), rows, c, rows_per_block);
        finish(none, mean.get());
    }, error, INFINITY);
    ladder.variant("two passes, mean first", [&] {
        LAUNCH(sums_plain, grid, x.get(), partial.get(), rows, c, rows_per_block);
        finish(none, first_mean.get());
        LAUNCH(sums_centred, grid, x.get(), first_mean.get(), partial.get(), rows, c, rows_per_block);
        finish(first_mean.get(), mean.get());
    }, error, 1e-6);
    ladder.variant("one pass, shifted by the first row", [&] {
        LAUNCH(sums_shifted, grid, x.get(), partial.get(), rows, c, rows_per_block);
        finish(x.get(), mean.get());
    }, error, 1e-6);
}
