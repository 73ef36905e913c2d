// SGD with momentum and weight decay for all parameters in one launch. T is the type of the low-precision copies.
#include "update.cuh"

// `guard` is null or a scalar: nothing is changed unless it is finite. If `unscale`, gradients are multiplied by it.
template <class T>
__device__ __forceinline__ void sgd(const Parameters& table, int count, const double* __restrict__ step_params,
                                    const float* __restrict__ guard, bool unscale) {
    const float guarded = guard == nullptr ? 1.0f : *guard;
    if (!is_finite(guarded)) return;
    const Parameter& p = table.at[find_parameter(table, count, blockIdx.x)];
    const float weight_decay = float(step_params[WEIGHT_DECAY]), factor = unscale ? guarded : 1.0f;
    const Hyper hyper = {float(step_params[p.lr]), float(step_params[MOMENTUM]), weight_decay, factor, 1.0f};
    update_chunk<T>(p, blockIdx.x, hyper);
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL(UPDATE_THREADS)                                                                                             \
    sgd_##S(const __grid_constant__ Parameters table, int32_t count, const double* step_params, const float* guard,    \
            int32_t unscale) {                                                                                         \
        sgd<T>(table, count, step_params, guard, unscale != 0);                                                        \
    }                                                                                                                  \
    EXPORT(sgd_##S)
FOR_EACH_TYPE(INSTANTIATE)
