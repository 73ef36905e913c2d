// SGD with momentum and weight decay for all parameters in one launch.
#include "update.cuh"

// `guard` is null or a scalar: nothing is changed unless it is finite. If `unscale`, gradients are multiplied by it.
KERNEL(UPDATE_THREADS)
sgd(const __grid_constant__ Parameters table, int32_t count, const double* step_params, const float* guard, int32_t unscale) {
    const float guarded = guard == nullptr ? 1.0f : *guard;
    if (!is_finite(guarded)) return;
    const Parameter& p = table.at[find_parameter(table, count, blockIdx.x)];
    const float weight_decay = float(step_params[WEIGHT_DECAY]), factor = unscale ? guarded : 1.0f;
    const Hyper hyper = {float(step_params[p.lr]), float(step_params[MOMENTUM]), weight_decay, factor, 1.0f};
    update_chunk(p, blockIdx.x, hyper);
}
EXPORT(sgd)
