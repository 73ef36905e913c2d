// Element by element: constants, copies, sums of two tensors, rows cut out of a tensor, conversions of element type.
#include "common.cuh"

// y = value.
template <class T> __device__ __forceinline__ void fill(T* __restrict__ y, float value, int64_t n) {
    for_each_pack<WIDTH<T>>(n, [=](int64_t i, auto count) {
        float v[decltype(count)::value];
        for (float& element : v) element = value;
        store(y + i, v);
    });
}

// N elements: y = x bit for bit, or y += x.
template <int N, class T> __device__ __forceinline__ void copy_or_add(T* y, const T* x, bool accumulate) {
    if (!accumulate) return copy_pack<N>(y, x);
    float v[N];
    load(v, x);
    store_or_add(y, v, true);
}

// y = x, or y += x.
template <class T>
__device__ __forceinline__ void copy(const T* __restrict__ x, T* __restrict__ y, int64_t n, bool accumulate) {
    for_each_pack<WIDTH<T>>(n, [=](int64_t i, auto count) {
        copy_or_add<decltype(count)::value>(y + i, x + i, accumulate);
    });
}

// y = a + b; b may be a.
template <class T> __device__ __forceinline__ void add(const T* a, const T* b, T* __restrict__ y, int64_t n) {
    for_each_pack<WIDTH<T>>(n, [=](int64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float sum[N], other[N];
        load(sum, a + i);
        load(other, b + i);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] += other[k];
        store(y + i, sum);
    });
}

// y = x in another element type, or y += x. Packs are 16 bytes of the narrow type.
template <class From, class To>
__device__ __forceinline__ void cast(const From* __restrict__ x, To* __restrict__ y, int64_t n, bool accumulate) {
    constexpr int PACK = WIDTH<From> > WIDTH<To> ? WIDTH<From> : WIDTH<To>;
    for_each_pack<PACK>(n, [=](int64_t i, auto count) {
        float v[decltype(count)::value];
        load(v, x + i);
        store_or_add(y + i, v, accumulate);
    });
}

// y = x[first .. first + n]; packs where the range begins at one.
template <class T>
__device__ __forceinline__ void slice_rows(const T* __restrict__ x, T* __restrict__ y, int64_t first, int64_t n) {
    const auto copy = [=](int64_t i, auto count) { copy_pack<decltype(count)::value>(y + i, x + first + i); };
    if (first % WIDTH<T> == 0) {
        for_each_pack<WIDTH<T>>(n, copy);
    } else {
        for_each_pack<1>(n, copy);
    }
}

// y = a, then b, n elements together; packs where a ends at one.
template <class T>
__device__ __forceinline__ void stack_rows(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y, int64_t of_a,
                                           int64_t n) {
    const auto first = [=](int64_t i, auto count) { copy_pack<decltype(count)::value>(y + i, a + i); };
    const auto second = [=](int64_t i, auto count) { copy_pack<decltype(count)::value>(y + of_a + i, b + i); };
    if (of_a % WIDTH<T> == 0) {
        for_each_pack<WIDTH<T>>(of_a, first);
        for_each_pack<WIDTH<T>>(n - of_a, second);
    } else {
        for_each_pack<1>(of_a, first);
        for_each_pack<1>(n - of_a, second);
    }
}

// d_x[first .. first + len] = d_y, zero in the rest of the n elements; or added there, the rest untouched. Packs where
// the range begins and ends at one.
template <class T>
__device__ __forceinline__ void slice_rows_backward(const T* __restrict__ d_y, T* __restrict__ d_x, int64_t first,
                                                    int64_t len, int64_t n, bool accumulate) {
    const auto add = [=](int64_t i, auto count) {
        copy_or_add<decltype(count)::value>(d_x + first + i, d_y + i, true);
    };
    const auto place = [=](int64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        const float zero[N] = {};
        if (first <= i && i < first + len) {
            copy_pack<N>(d_x + i, d_y + i - first);
        } else {
            store(d_x + i, zero);
        }
    };
    constexpr int PACK = WIDTH<T>;
    const bool packs = first % PACK == 0 && len % PACK == 0;
    if (accumulate) {
        packs ? for_each_pack<PACK>(len, add) : for_each_pack<1>(len, add);
    } else {
        packs ? for_each_pack<PACK>(n, place) : for_each_pack<1>(n, place);
    }
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL(256) fill_##S(T* y, float value, int64_t n) { fill(y, value, n); }                                          \
    EXPORT(fill_##S)                                                                                                   \
    KERNEL(256) copy_##S(const T* x, T* y, int64_t n, int32_t accumulate) { copy(x, y, n, accumulate); }               \
    EXPORT(copy_##S)                                                                                                   \
    KERNEL(256) add_##S(const T* a, const T* b, T* y, int64_t n) { add(a, b, y, n); }                                  \
    EXPORT(add_##S)                                                                                                    \
    KERNEL(256) slice_rows_##S(const T* x, T* y, int64_t first, int64_t n) { slice_rows(x, y, first, n); }             \
    EXPORT(slice_rows_##S)                                                                                             \
    KERNEL(256)                                                                                                        \
    stack_rows_##S(const T* a, const T* b, T* y, int64_t of_a, int64_t n) { stack_rows(a, b, y, of_a, n); }            \
    EXPORT(stack_rows_##S)                                                                                             \
    KERNEL(256)                                                                                                        \
    slice_rows_backward_##S(const T* d_y, T* d_x, int64_t first, int64_t len, int64_t n, int32_t accumulate) {         \
        slice_rows_backward(d_y, d_x, first, len, n, accumulate);                                                      \
    }                                                                                                                  \
    EXPORT(slice_rows_backward_##S)
FOR_EACH_TYPE(INSTANTIATE)

#define INSTANTIATE_CAST(T, S)                                                                                         \
    KERNEL(256) cast_to_##S(const float* x, T* y, int64_t n) { cast(x, y, n, false); }                                 \
    EXPORT(cast_to_##S)                                                                                                \
    KERNEL(256) cast_from_##S(const T* x, float* y, int64_t n, int32_t accumulate) { cast(x, y, n, accumulate); }      \
    EXPORT(cast_from_##S)
INSTANTIATE_CAST(bf16, bf16)
INSTANTIATE_CAST(f16, f16)
