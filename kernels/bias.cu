// A bias added to every row of a matrix, and its gradient: the sums of the columns.
#include "common.cuh"

constexpr int THREADS = 256;

// How a block covers a matrix [rows][n] in packs of N columns: `lanes` threads side by side along a row (a power of
// two, no more than the row needs, at most a warp) and `rows` of them below each other.
template <int N> struct Cover {
    int lanes, rows, lane, row;

    __device__ __forceinline__ explicit Cover(int n) {
        lanes = WARP;
        while (lanes > 1 && lanes / 2 * N >= n) lanes /= 2;
        rows = THREADS / lanes;
        lane = threadIdx.x % lanes;
        row = threadIdx.x / lanes;
    }
};

// y = x + bias in each row; a thread keeps its part of the bias. Grid: tiles of lanes * N columns, any number of blocks
// along the rows.
template <int N, class T>
__device__ __forceinline__ void add_bias(const T* __restrict__ x, const float* __restrict__ bias, T* __restrict__ y,
                                         int64_t rows, int n) {
    const Cover<N> cover(n);
    const int column = (blockIdx.x * cover.lanes + cover.lane) * N;
    if (column >= n) return;
    float b[N];
#pragma unroll
    for (int k = 0; k < N; ++k) b[k] = bias[column + k];
    for (int64_t r = int64_t{blockIdx.y} * cover.rows + cover.row; r < rows; r += int64_t{gridDim.y} * cover.rows) {
        float v[N];
        load(v, x + r * n + column);
#pragma unroll
        for (int k = 0; k < N; ++k) v[k] += b[k];
        store(y + r * n + column, v);
    }
}

// partial[blockIdx.y][c] = the sum of column c over the rows_per_block rows of this block: short chains in float, then
// in double. Grid: tiles of lanes * N columns, parts of the rows.
template <int N, class T>
__device__ __forceinline__ void sum_rows(const T* __restrict__ x, double* __restrict__ partial, int64_t rows, int n,
                                         int64_t rows_per_block) {
    __shared__ float sums[THREADS * N]; // [cover.rows][cover.lanes * N]
    const Cover<N> cover(n);
    const int tile = cover.lanes * N, first_column = blockIdx.x * tile, column = first_column + cover.lane * N;
    const int64_t first = blockIdx.y * rows_per_block, after = first + rows_per_block, end = after < rows ? after : rows;
    float sum[N] = {};
    if (column < n) {
        for (int64_t r = first + cover.row; r < end; r += cover.rows) {
            float v[N];
            load(v, x + r * n + column);
#pragma unroll
            for (int k = 0; k < N; ++k) sum[k] += v[k];
        }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) sums[threadIdx.x * N + k] = sum[k];
    __syncthreads();
    const int c = threadIdx.x;
    if (c < tile && first_column + c < n) {
        double total = 0.0;
        for (int row = 0; row < cover.rows; ++row) total += sums[row * tile + c];
        partial[int64_t{blockIdx.y} * n + first_column + c] = total;
    }
}

// d_bias[c] = the sum of partial[0 .. parts][c], or added to it. Grid: tiles of 32 columns.
KERNEL(THREADS) sum_rows_finish(const double* partial, float* d_bias, int32_t parts, int32_t n, int32_t accumulate) {
    constexpr int WARPS = THREADS / WARP;
    __shared__ double sums[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    double sum = 0.0;
    if (column < n) {
        for (int part = warp; part < parts; part += WARPS) sum += partial[int64_t{part} * n + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < n) {
        for (int other = 1; other < WARPS; ++other) sum += sums[other][lane];
        if (accumulate) sum += d_bias[column];
        d_bias[column] = float(sum);
    }
}
EXPORT(sum_rows_finish)

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL(THREADS) add_bias_##S(const T* x, const float* bias, T* y, int64_t rows, int32_t n) {                       \
        if (n % WIDTH<T> == 0) {                                                                                       \
            add_bias<WIDTH<T>>(x, bias, y, rows, n);                                                                   \
        } else {                                                                                                       \
            add_bias<1>(x, bias, y, rows, n);                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    EXPORT(add_bias_##S)                                                                                               \
    KERNEL(THREADS) sum_rows_##S(const T* x, double* partial, int64_t rows, int32_t n, int64_t rows_per_block) {       \
        if (n % WIDTH<T> == 0) {                                                                                       \
            sum_rows<WIDTH<T>>(x, partial, rows, n, rows_per_block);                                                   \
        } else {                                                                                                       \
            sum_rows<1>(x, partial, rows, n, rows_per_block);                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    EXPORT(sum_rows_##S)
FOR_EACH_TYPE(INSTANTIATE)
