// SimSiam's loss in one pass: mean negative cosine between predictions p [m][d] and targets z [r][d], its gradient for
// p, and the norms of z that the collapse figure needs. Row i of p is paired with row (i + shift) mod r of z.
#include "cosine.cuh"

// For row j of z and its partner i = (j - shift) mod r, where i < m:
//     rows[i] = -cos(p_i, z_j),   d_p_i = -d_loss / m d cos(p_i, z_j) / d p_i
// and for every j: rnorm[j] = 1 / max(|z_j|, 1e-12). There is no gradient for z: it is the target of a stop-gradient.
//
// A team of threads per row of z (see row_teams.cuh). p and z are read once: between the products and the gradient they
// stay in registers. 3 x 4 MiB move for m = r = 1024, d = 2048 in bf16.
template <class T>
__device__ __forceinline__ void cosine_loss(const float* d_loss, const T* p, const T* z, T* d_p, float* rows,
                                            float* rnorm, int m, int r, int d, int shift) {
    const float scale = -*d_loss / m;
    for_row_length<T>(d, [=](auto width, auto team) {
        using TEAM = decltype(team);
        using ROW = Row<T, decltype(width)::value, TEAM>;
        TEAM::for_each_row(r, [=](int j) {
            const int i = partner(j, r - shift, r);
            const bool paired = i < m;
            const ROW b(row_at(z, j, d), d), a = paired ? ROW(row_at(p, i, d), d) : b;
            float products[3];
            row_products(products, a, b);
            if (TEAM::lane() == 0) rnorm[j] = rnorm_of(products[1]);
            if (!paired) return;
            const Cosine cosine(products[0], products[1], products[2]);
            if (TEAM::lane() == 0) rows[i] = -cosine.value;
            write_cosine_gradient(a, b, cosine, scale, row_at(d_p, i, d), false);
        });
    });
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL_RESIDENT(256, 1)                                                                                            \
    cosine_loss_##S(const float* d_loss, const T* p, const T* z, T* d_p, float* rows, float* rnorm, int m, int r,      \
                    int d, int shift) {                                                                                \
        cosine_loss(d_loss, p, z, d_p, rows, rnorm, m, r, d, shift);                                                   \
    }                                                                                                                  \
    EXPORT(cosine_loss_##S)
FOR_EACH_TYPE(INSTANTIATE)
