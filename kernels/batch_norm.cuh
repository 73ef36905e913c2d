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

// Which elements of d_y pass the ReLU (`Mask` in src/ops/batch_norm).
enum Masking { MASK_NONE, MASK_OF_X, MASK_STORED };

// The gradient at the output of the normalisation, of rows from element i on: d_y behind the mask of the ReLU. `v` are the rows
// of x; `mask` is read for MASK_STORED only: a byte for each pack, which has a bit for each of its elements.
template <int MASK, int U, int N, class T>
__device__ __forceinline__ void load_masked(float (&g)[U][N], const T* d_y, const float (&v)[U][N], const Channels<N>& of,
                                            const uint8_t* mask, int64_t i, int64_t stride) {
    load_rows(g, d_y + i, stride);
    if (MASK == MASK_NONE) return;
    unsigned bits[U] = {};
    if (MASK == MASK_STORED) {
#pragma unroll
        for (int u = 0; u < U; ++u) bits[u] = mask[(i + u * stride) / N];
    }
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
        for (int k = 0; k < N; ++k) {
            // Rounded as y was, so that what became 0 in y is 0 here.
            const bool open = MASK == MASK_STORED ? (bits[u] >> k & 1u) != 0
                                                  : to_float(from_float<T>(of.normalised(k, v[u][k]))) > 0.0f;
            g[u][k] = open ? g[u][k] : 0.0f;
        }
}

// A byte for each pack of U rows: the k-th bit says whether its k-th element, rounded to T, is greater than 0.
template <class T, int U, int N>
__device__ __forceinline__ void store_mask(uint8_t* mask, const float (&y)[U][N], int64_t stride) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
        unsigned bits = 0;
#pragma unroll
        for (int k = 0; k < N; ++k) bits |= unsigned(to_float(from_float<T>(y[u][k])) > 0.0f) << k;
        mask[u * stride] = uint8_t(bits);
    }
}
