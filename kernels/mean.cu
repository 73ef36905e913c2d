// Means of short lists: losses of rows, spreads of dimensions.
#include "common.cuh"

// Block 0 writes *y0 = sum of x0[0..n0) / per0, block 1 likewise with x1; one block where there is one list. Sums in
// double.
KERNEL(256)
means(const float* x0, float* y0, int64_t n0, double per0, const float* x1, float* y1, int64_t n1, double per1) {
    __shared__ double scratch[256 / WARP];
    const float* const x = blockIdx.x == 0 ? x0 : x1;
    const int64_t n = blockIdx.x == 0 ? n0 : n1;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += 256) sum += double{x[i]};
    sum = block_sum<256>(sum, scratch);
    if (threadIdx.x == 0) *(blockIdx.x == 0 ? y0 : y1) = static_cast<float>(sum / (blockIdx.x == 0 ? per0 : per1));
}
EXPORT(means)
