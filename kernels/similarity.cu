// SimSiam's two distances between predictions p [m][d] and targets z [r][d], and their gradients: negative cosine and
// the cross-entropy of softmaxes. Row i of p is paired with row (i + shift) mod r of z.
//
// All kernels: a team of threads per row (see row_teams.cuh), grid-stride over the rows. Sums are in float, over chains
// of d / 256 (short rows: at most 32) elements and then pairwise.
#include "cosine.cuh"

// rows[i] = -cos(p_i, z_pair); their mean is the loss.
template <class T>
__device__ __forceinline__ void negative_cosine(const T* p, const T* z, float* rows, int m, int r, int d,
                                                int shift) {
    for_row_length<T>(d, [=](auto width, auto team) {
        using TEAM = decltype(team);
        using ROW = Row<T, decltype(width)::value, TEAM>;
        TEAM::for_each_row(m, [=](int i) {
            const ROW a(row_at(p, i, d), d), b(row_at(z, partner(i, shift, r), d), d);
            float products[3];
            row_products(products, a, b);
            if (TEAM::lane() == 0) rows[i] = -Cosine(products[0], products[1], products[2]).value;
        });
    });
}

// The team's share of a row of zeros, for a row of z without a partner in p.
template <class T, int N, class TEAM> __device__ __forceinline__ void write_zeros(T* to, int d, bool accumulate) {
    if (accumulate) return;
    float zeros[N] = {};
    for (int first = TEAM::lane() * N; first < d; first += TEAM::lanes * N) store(to + first, zeros);
}

// d_a = -d_loss / m d cos(a, b) / d a for all rows of a, which is p or z. Row i of a is paired with row
// j = (i + shift) mod r of b where j < b_rows, and has no gradient elsewhere.
template <class T>
__device__ __forceinline__ void negative_cosine_backward(const float* d_loss, const T* a, const T* b, T* d_a, int m,
                                                         int a_rows, int b_rows, int r, int d, int shift,
                                                         bool accumulate) {
    const float scale = -*d_loss / m;
    for_row_length<T>(d, [=](auto width, auto team) {
        using TEAM = decltype(team);
        constexpr int N = decltype(width)::value;
        TEAM::for_each_row(a_rows, [=](int i) {
            const int j = partner(i, shift, r);
            if (j >= b_rows) return write_zeros<T, N, TEAM>(row_at(d_a, i, d), d, accumulate);
            const Row<T, N, TEAM> row_a(row_at(a, i, d), d), row_b(row_at(b, j, d), d);
            float products[3];
            row_products(products, row_a, row_b);
            const Cosine cosine(products[0], products[1], products[2]);
            write_cosine_gradient(row_a, row_b, cosine, scale, row_at(d_a, i, d), accumulate);
        });
    });
}

// Softmaxes of a pair of rows: s_k = exp(z_k - max_z) / sum_z, likewise for p; `expected` is the mean of p - max_p
// under s.
struct SoftmaxPair {
    float max_p, max_z, sum_p, sum_z, expected;

    // -s . log softmax(p)
    __device__ __forceinline__ float cross_entropy() const { return logf(sum_p) - expected; }
};

template <class T, int N, class TEAM>
__device__ __forceinline__ SoftmaxPair softmax_pair(const Row<T, N, TEAM>& p, const Row<T, N, TEAM>& z) {
    float largest[2] = {-INFINITY, -INFINITY};
    p.for_each_pair(z, [&](int, float(&p)[N], float(&z)[N]) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            largest[0] = fmaxf(largest[0], p[k]);
            largest[1] = fmaxf(largest[1], z[k]);
        }
    });
    TEAM::max(largest);
    const float max_p = largest[0], max_z = largest[1];
    float sums[3] = {0.0f, 0.0f, 0.0f};
    p.for_each_pair(z, [&, max_p, max_z](int, float(&p)[N], float(&z)[N]) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            const float weight = expf(z[k] - max_z);
            sums[0] += expf(p[k] - max_p);
            sums[1] += weight;
            sums[2] = fmaf(weight, p[k] - max_p, sums[2]);
        }
    });
    TEAM::sum(sums);
    return {max_p, max_z, sums[0], sums[1], sums[2] / sums[1]};
}

// rows[i] = -softmax(z_pair) . log softmax(p_i); their mean is the loss.
template <class T>
__device__ __forceinline__ void softmax_xent(const T* p, const T* z, float* rows, int m, int r, int d, int shift) {
    for_row_length<T>(d, [=](auto width, auto team) {
        using TEAM = decltype(team);
        using ROW = Row<T, decltype(width)::value, TEAM>;
        TEAM::for_each_row(m, [=](int i) {
            const ROW row_p(row_at(p, i, d), d), row_z(row_at(z, partner(i, shift, r), d), d);
            const float loss = softmax_pair(row_p, row_z).cross_entropy();
            if (TEAM::lane() == 0) rows[i] = loss;
        });
    });
}

// d_p = d_loss / m (softmax(p) - softmax(z)).
template <class T>
__device__ __forceinline__ void softmax_xent_backward_p(const float* d_loss, const T* p, const T* z, T* d_p, int m,
                                                        int r, int d, int shift, bool accumulate) {
    const float scale = *d_loss / m;
    for_row_length<T>(d, [=](auto width, auto team) {
        using TEAM = decltype(team);
        constexpr int N = decltype(width)::value;
        TEAM::for_each_row(m, [=](int i) {
            const Row<T, N, TEAM> row_p(row_at(p, i, d), d), row_z(row_at(z, partner(i, shift, r), d), d);
            T* const out = row_at(d_p, i, d);
            const SoftmaxPair pair = softmax_pair(row_p, row_z);
            const float per_p = 1.0f / pair.sum_p, per_z = 1.0f / pair.sum_z;
            row_p.for_each_pair(row_z, [=](int first, float(&p)[N], float(&z)[N]) {
#pragma unroll
                for (int k = 0; k < N; ++k)
                    p[k] = scale * (expf(p[k] - pair.max_p) * per_p - expf(z[k] - pair.max_z) * per_z);
                store_or_add(out + first, p, accumulate);
            });
        });
    });
}

// With s = softmax(z) and l = log softmax(p): d_z = -d_loss / m s (l - s . l); zero for rows of z without a partner.
template <class T>
__device__ __forceinline__ void softmax_xent_backward_z(const float* d_loss, const T* p, const T* z, T* d_z, int m,
                                                        int r, int d, int shift, bool accumulate) {
    const float scale = -*d_loss / m;
    for_row_length<T>(d, [=](auto width, auto team) {
        using TEAM = decltype(team);
        constexpr int N = decltype(width)::value;
        TEAM::for_each_row(r, [=](int j) {
            const int i = partner(j, r - shift, r);
            if (i >= m) return write_zeros<T, N, TEAM>(row_at(d_z, j, d), d, accumulate);
            const Row<T, N, TEAM> row_p(row_at(p, i, d), d), row_z(row_at(z, j, d), d);
            T* const out = row_at(d_z, j, d);
            const SoftmaxPair pair = softmax_pair(row_p, row_z);
            const float per_z = scale / pair.sum_z;
            row_p.for_each_pair(row_z, [=](int first, float(&p)[N], float(&z)[N]) {
#pragma unroll
                for (int k = 0; k < N; ++k)
                    z[k] = expf(z[k] - pair.max_z) * per_z * (p[k] - pair.max_p - pair.expected);
                store_or_add(out + first, z, accumulate);
            });
        });
    });
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL_RESIDENT(256, 1)                                                                                            \
    negative_cosine_##S(const T* p, const T* z, float* rows, int m, int r, int d, int shift) {                         \
        negative_cosine(p, z, rows, m, r, d, shift);                                                                   \
    }                                                                                                                  \
    EXPORT(negative_cosine_##S)                                                                                        \
    KERNEL_RESIDENT(256, 1)                                                                                            \
    negative_cosine_backward_##S(const float* d_loss, const T* a, const T* b, T* d_a, int m, int a_rows, int b_rows,   \
                                 int r, int d, int shift, uint32_t accumulate) {                                       \
        negative_cosine_backward(d_loss, a, b, d_a, m, a_rows, b_rows, r, d, shift, accumulate != 0);                  \
    }                                                                                                                  \
    EXPORT(negative_cosine_backward_##S)                                                                               \
    KERNEL_RESIDENT(256, 1)                                                                                            \
    softmax_xent_##S(const T* p, const T* z, float* rows, int m, int r, int d, int shift) {                            \
        softmax_xent(p, z, rows, m, r, d, shift);                                                                      \
    }                                                                                                                  \
    EXPORT(softmax_xent_##S)                                                                                           \
    KERNEL_RESIDENT(256, 1)                                                                                            \
    softmax_xent_backward_p_##S(const float* d_loss, const T* p, const T* z, T* d_p, int m, int r, int d,              \
                                int shift, uint32_t accumulate) {                                                      \
        softmax_xent_backward_p(d_loss, p, z, d_p, m, r, d, shift, accumulate != 0);                                   \
    }                                                                                                                  \
    EXPORT(softmax_xent_backward_p_##S)                                                                                \
    KERNEL_RESIDENT(256, 1)                                                                                            \
    softmax_xent_backward_z_##S(const float* d_loss, const T* p, const T* z, T* d_z, int m, int r, int d,              \
                                int shift, uint32_t accumulate) {                                                      \
        softmax_xent_backward_z(d_loss, p, z, d_z, m, r, d, shift, accumulate != 0);                                   \
    }                                                                                                                  \
    EXPORT(softmax_xent_backward_z_##S)
FOR_EACH_TYPE(INSTANTIATE)
