// The low-precision copies of all weights in one launch. T is their type.
//
// Traffic through device memory: 4 bytes read and 2 written for each weight.
#include "update.cuh"

template <class T> __device__ __forceinline__ void cast_all(const Parameters& table, int count) {
    const Parameter& p = table.at[find_parameter(table, count, blockIdx.x)];
    for_chunk(p, blockIdx.x, [&](int64_t i, auto elements) {
        float w[decltype(elements)::value];
        load(w, p.w + i);
        store(static_cast<T*>(p.copy) + i, w);
    });
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL(UPDATE_THREADS) cast_all_##S(const __grid_constant__ Parameters table, int32_t count) {                     \
        cast_all<T>(table, count);                                                                                     \
    }                                                                                                                  \
    EXPORT(cast_all_##S)
INSTANTIATE(bf16, bf16)
INSTANTIATE(f16, f16)
