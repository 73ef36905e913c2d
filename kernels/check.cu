// What the checks of a run ask of a tensor: its first element that is not finite, its sums and its largest value.
#include "common.cuh"

constexpr int THREADS = 256;

// *first = min(*first, the index of the first NaN or infinity). The minimum does not depend on the order of the blocks.
template <class T>
__device__ __forceinline__ void non_finite(const T* __restrict__ x, int64_t n, unsigned long long* __restrict__ first) {
    constexpr float LARGEST = 3.402823466e38f;
    constexpr unsigned long long NONE = ~0ull;
    unsigned long long found = NONE;
    for_each_pack<WIDTH<T>>(n, [&](int64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float v[N];
        load(v, x + i);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const unsigned long long at = i + k;
            if (!(fabsf(v[k]) <= LARGEST) && at < found) found = at; // NaN compares false
        }
    });
    if (found != NONE) atomicMin(first, found);
}

struct Summary {
    double sum, squares, largest; // of x, of x^2, of |x|; `largest` leaves NaNs out
};

// parts[block] = the summary of the elements that this block visits.
template <class T>
__device__ __forceinline__ void summarise(const T* __restrict__ x, int64_t n, Summary* __restrict__ parts) {
    __shared__ double sums[THREADS / WARP];
    __shared__ float maxima[THREADS / WARP];
    double sum = 0.0, squares = 0.0;
    float largest = 0.0f;
    for_each_pack<WIDTH<T>>(n, [&](int64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float v[N];
        load(v, x + i);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            sum += double(v[k]);
            squares += double(v[k]) * double(v[k]);
            largest = fmaxf(largest, fabsf(v[k]));
        }
    });
    sum = block_sum<THREADS>(sum, sums);
    squares = block_sum<THREADS>(squares, sums);
    largest = block_max<THREADS>(largest, maxima);
    if (threadIdx.x == 0) parts[blockIdx.x] = {sum, squares, double(largest)};
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL(THREADS) non_finite_##S(const T* x, int64_t n, unsigned long long* first) { non_finite(x, n, first); }      \
    EXPORT(non_finite_##S)                                                                                             \
    KERNEL(THREADS) summarise_##S(const T* x, int64_t n, Summary* parts) { summarise(x, n, parts); }                   \
    EXPORT(summarise_##S)
FOR_EACH_TYPE(INSTANTIATE)
