// LARS (You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, in the form of NVIDIA apex's
// LARC without clipping) around SGD with momentum. For each adapted parameter whose norms are not zero,
//
//     ratio = trust |w| / (|d_w| + weight_decay |w| + eps)
//     v = momentum v + ratio (d_w + weight_decay w),    w = w - lr v
//
// and for all others ratio = 1 and weight_decay = 0. Three launches, each for all parameters: sums of squares by chunk,
// the ratios, the update.
#include "update.cuh"

struct Squares {
    double w, d_w;
};

// How a parameter's gradient enters its momentum.
struct Scale {
    float ratio, weight_decay;
};

// squares[chunk] = the sums of w^2 and d_w^2. Grid: all chunks.
KERNEL(UPDATE_THREADS) lars_squares(const __grid_constant__ Parameters table, int32_t count, Squares* squares) {
    __shared__ double scratch[UPDATE_THREADS / WARP];
    const Parameter& p = table.at[find_parameter(table, count, blockIdx.x)];
    const int64_t first = int64_t{blockIdx.x - p.first_chunk} * CHUNK, end = first + CHUNK < p.n ? first + CHUNK : p.n;
    Squares sum = {0.0, 0.0};
    for (int64_t i = first + threadIdx.x; i < end; i += UPDATE_THREADS) {
        sum.w += double(p.w[i]) * double(p.w[i]);
        sum.d_w += double(p.d_w[i]) * double(p.d_w[i]);
    }
    sum.w = block_sum<UPDATE_THREADS>(sum.w, scratch);
    sum.d_w = block_sum<UPDATE_THREADS>(sum.d_w, scratch);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}
EXPORT(lars_squares)

// scales[parameter] from the sums of its chunks. Grid: all parameters.
KERNEL(UPDATE_THREADS)
lars_scales(const __grid_constant__ Parameters table, const Squares* squares, Scale* scales, const double* step_params,
            double trust, double eps) {
    __shared__ double scratch[UPDATE_THREADS / WARP];
    const Parameter& p = table.at[blockIdx.x];
    const uint32_t end = p.first_chunk + uint32_t((p.n + CHUNK - 1) / CHUNK);
    Squares sum = {0.0, 0.0};
    for (uint32_t chunk = p.first_chunk + threadIdx.x; chunk < end; chunk += UPDATE_THREADS) {
        sum.w += squares[chunk].w;
        sum.d_w += squares[chunk].d_w;
    }
    sum.w = block_sum<UPDATE_THREADS>(sum.w, scratch);
    sum.d_w = block_sum<UPDATE_THREADS>(sum.d_w, scratch);
    if (threadIdx.x != 0) return;
    const double w = sqrt(sum.w), d_w = sqrt(sum.d_w), weight_decay = step_params[WEIGHT_DECAY];
    Scale scale = {1.0f, 0.0f};
    if (p.adapted && w > 0.0 && d_w > 0.0) {
        scale = {float(trust * w / (d_w + w * weight_decay + eps)), float(weight_decay)};
    }
    scales[blockIdx.x] = scale;
}
EXPORT(lars_scales)

// The update. Grid: all chunks.
KERNEL(UPDATE_THREADS)
lars(const __grid_constant__ Parameters table, int32_t count, const Scale* scales, const double* step_params) {
    const int parameter = find_parameter(table, count, blockIdx.x);
    const Parameter& p = table.at[parameter];
    const Scale scale = scales[parameter];
    const Hyper hyper = {float(step_params[p.lr]), float(step_params[MOMENTUM]), scale.weight_decay, 1.0f, scale.ratio};
    update_chunk(p, blockIdx.x, hyper);
}
EXPORT(lars)
