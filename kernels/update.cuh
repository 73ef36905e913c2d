// What works on all parameters in one launch shares: a table of them, passed to the kernel by value, and the update of one
// chunk of one of them. A block works on one chunk.
#pragma once

#include "common.cuh"

constexpr float LARGEST_FLOAT = 3.402823466e38f;
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= LARGEST_FLOAT; } // NaN compares false

constexpr int UPDATE_THREADS = 256;
constexpr int CHUNK = 4096;    // elements of one block
constexpr int CAPACITY = 512;  // parameters of one launch: ResNet-152 with its heads has 476
constexpr int UPDATE_PACK = 4; // elements of one thread and round

// Positions in the buffer of hyper-parameters (StepParam in src/ops/sgd); those of the learning rates are in the table.
constexpr int MOMENTUM = 2;
constexpr int WEIGHT_DECAY = 3;

struct Parameter {
    float* w;
    float* v;         // momentum
    const float* d_w; // gradient
    void* copy;       // the weight in the activations' type, where copies are made
    int64_t n;
    uint32_t first_chunk;
    uint16_t lr;      // position of its learning rate
    uint16_t adapted; // whether LARS scales its gradient
};

struct Parameters {
    Parameter at[CAPACITY];
};

// The parameter that chunk number `chunk` belongs to: the last of the `count` that begins at or before it.
__device__ __forceinline__ int find_parameter(const Parameters& table, int count, uint32_t chunk) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.at[middle].first_chunk <= chunk) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Calls f(i, Count<N>) for the elements of chunk number `chunk` of the launch: N of them from the parameter's i-th on.
template <class F> __device__ __forceinline__ void for_chunk(const Parameter& p, uint32_t chunk, F f) {
    const int64_t first = int64_t{chunk - p.first_chunk} * CHUNK;
    const int n = int(p.n - first < CHUNK ? p.n - first : CHUNK);
    const int packed = n / UPDATE_PACK * UPDATE_PACK;
    for (int i = threadIdx.x * UPDATE_PACK; i < packed; i += UPDATE_THREADS * UPDATE_PACK) f(first + i, Count<UPDATE_PACK>{});
    for (int i = packed + threadIdx.x; i < n; i += UPDATE_THREADS) f(first + i, Count<1>{});
}

struct Hyper {
    float lr, momentum, weight_decay;
    float unscale; // of the gradient, and
    float scale;   // of the gradient with its weight decay; 1 changes no bit
};

// v = momentum v + scale (unscale d_w + weight_decay w), w = w - lr v, in chunk number `chunk` of the launch. The order of the
// operations is that of the CPU: equal bits.
__device__ __forceinline__ void update_chunk(const Parameter& p, uint32_t chunk, const Hyper hyper) {
    for_chunk(p, chunk, [&](int64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float w[N], v[N], d_w[N];
        load(w, p.w + i);
        load(v, p.v + i);
        load(d_w, p.d_w + i);
#pragma unroll
        for (int k = 0; k < N; ++k) {
            v[k] = hyper.momentum * v[k] + hyper.scale * (hyper.unscale * d_w[k] + hyper.weight_decay * w[k]);
            w[k] -= hyper.lr * v[k];
        }
        store(p.v + i, v);
        store(p.w + i, w);
    });
}
