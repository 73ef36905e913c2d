// ReLU where no batch norm precedes it, and its gradient.
#include "common.cuh"

// y = x > 0 ? x : 0; NaN gives 0 as on the CPU, where a NaN before it has been reported already.
template <class T> __device__ __forceinline__ void relu(const T* __restrict__ x, T* __restrict__ y, int64_t n) {
    for_each_pack<WIDTH<T>>(n, [=](int64_t i, auto count) {
        float v[decltype(count)::value];
        load(v, x + i);
        for (float& element : v) element = element > 0.0f ? element : 0.0f;
        store(y + i, v);
    });
}

// d_x = y > 0 ? d_y : 0.
template <class T>
__device__ __forceinline__ void relu_backward(const T* __restrict__ d_y, const T* __restrict__ y, T* __restrict__ d_x, int64_t n) {
    for_each_pack<WIDTH<T>>(n, [=](int64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float d[N], out[N];
        load(d, d_y + i);
        load(out, y + i);
#pragma unroll
        for (int k = 0; k < N; ++k) d[k] = out[k] > 0.0f ? d[k] : 0.0f;
        store(d_x + i, d);
    });
}

#define INSTANTIATE(T, S)                                                                                                   \
    KERNEL(256) relu_##S(const T* x, T* y, int64_t n) { relu(x, y, n); }                                                    \
    EXPORT(relu_##S)                                                                                                        \
    KERNEL(256) relu_backward_##S(const T* d_y, const T* y, T* d_x, int64_t n) { relu_backward(d_y, y, d_x, n); }           \
    EXPORT(relu_backward_##S)
FOR_EACH_TYPE(INSTANTIATE)
