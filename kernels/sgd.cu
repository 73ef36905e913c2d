// SGD with momentum and weight decay for all parameters in one launch. T is the type of the low-precision copies.
#include "update.cuh"

template <class T>
__device__ __forceinline__ void sgd(const Parameters& table, int count, const double* __restrict__ step_params) {
    const Parameter& p = table.at[find_parameter(table, count, blockIdx.x)];
    const float weight_decay = float(step_params[WEIGHT_DECAY]);
    const Hyper hyper = {float(step_params[p.lr]), float(step_params[MOMENTUM]), weight_decay, 1.0f};
    update_chunk<T>(p, blockIdx.x, hyper);
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL(UPDATE_THREADS)                                                                                             \
    sgd_##S(const __grid_constant__ Parameters table, int32_t count, const double* step_params) {                      \
        sgd<T>(table, count, step_params);                                                                             \
    }                                                                                                                  \
    EXPORT(sgd_##S)
FOR_EACH_TYPE(INSTANTIATE)
