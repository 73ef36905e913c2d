// The cosine of two rows and its gradient, as torch.nn.functional.cosine_similarity has them.
#pragma once
#include "row_teams.cuh"

constexpr float COSINE_EPS = 1e-8f; // clamp of each norm

// cos(a, b), and its gradient for a: `along_b` b + `along_a` a. `a_a`, `b_b` and `a_b` are the rows' products.
struct Cosine {
    float value, along_b, along_a;

    __device__ __forceinline__ Cosine(float a_a, float b_b, float a_b) {
        const float true_norm = sqrtf(a_a);
        const float norm_a = fmaxf(true_norm, COSINE_EPS), norm_b = fmaxf(sqrtf(b_b), COSINE_EPS);
        along_b = 1.0f / (norm_a * norm_b);
        value = a_b * along_b;
        // The clamp has no gradient.
        along_a = true_norm > 0.0f ? -value / (norm_a * true_norm) : 0.0f;
    }
};

// The products a a, b b and a b of two rows, in every thread of the team.
template <class T, int N, class TEAM>
__device__ __forceinline__ void row_products(float (&products)[3], const Row<T, N, TEAM>& a, const Row<T, N, TEAM>& b) {
#pragma unroll
    for (float& product : products) product = 0.0f;
    a.for_each_pair(b, [&](int, float(&a)[N], float(&b)[N]) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            products[0] = fmaf(a[k], a[k], products[0]);
            products[1] = fmaf(b[k], b[k], products[1]);
            products[2] = fmaf(a[k], b[k], products[2]);
        }
    });
    TEAM::sum(products);
}

// d_a = scale d cos(a, b) / d a, or added to what is there.
template <class T, int N, class TEAM>
__device__ __forceinline__ void write_cosine_gradient(const Row<T, N, TEAM>& a, const Row<T, N, TEAM>& b,
                                                      const Cosine& cosine, float scale, T* d_a, bool accumulate) {
    const float along_a = scale * cosine.along_a, along_b = scale * cosine.along_b;
    a.for_each_pair(b, [=](int first, float(&a)[N], float(&b)[N]) {
#pragma unroll
        for (int k = 0; k < N; ++k) a[k] = fmaf(along_a, a[k], along_b * b[k]);
        store_or_add(d_a + first, a, accumulate);
    });
}
