// What the kernels of batch norm share.
#pragma once
#include "rows.cuh"

// Two sums of one channel over the rows of one tile; arrays are [groups][chunks][channels].
typedef Pack<float, 2> Partial;

// scale = gamma rstd; without gamma (null) it counts as 1. Of the rounded rstd: the backward pass, which has no other, then
// computes the very same values again.
__device__ __forceinline__ float scale_of(const float* gamma, float rstd) { return gamma ? *gamma * rstd : rstd; }

// The scales of N channels.
template <int N> __device__ __forceinline__ void load_scale(float (&scale)[N], const float* rstd, const float* gamma) {
    load(scale, rstd);
#pragma unroll
    for (int k = 0; k < N; ++k) scale[k] = scale_of(gamma ? gamma + k : nullptr, scale[k]);
}

// What the normalisation does to N channels of a group: y = (x - mean) scale + beta.
template <int N> struct Channels {
    float mean[N], scale[N], beta[N];

    // `beta` may be null: 0.
    __device__ __forceinline__ void load_mean_and_beta(const float* of_group, const float* of_channels) {
        load(mean, of_group);
#pragma unroll
        for (int k = 0; k < N; ++k) beta[k] = 0.0f;
        if (of_channels) load(beta, of_channels);
    }

    __device__ __forceinline__ float normalised(int k, float x) const { return (x - mean[k]) * scale[k] + beta[k]; }
};
