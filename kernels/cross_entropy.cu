// Softmax cross-entropy of logits [m][classes] against labels [m], with the count of right answers: the linear head's
// loss.
//
// A label outside 0..classes makes its row's loss and gradient NaN, and with them the mean; nothing is read for it.
#include "row_teams.cuh"

// The class that a label names, or -1.
__device__ __forceinline__ int class_of(int64_t label, int classes) {
    return label >= 0 && label < classes ? static_cast<int>(label) : -1;
}

// Per row: rows[i] = -log softmax(logits_i)[label], rank[i] = the classes that rank before the label (a larger logit,
// or an equal one of a lower class), and softmax[i] = {max, 1 / sum exp(logit - max)} for the backward pass.
//
// A team of threads per row (see row_teams.cuh), grid-stride over the rows.
template <class T>
__device__ __forceinline__ void cross_entropy(const T* logits, const int64_t* labels, float* rows, int32_t* rank,
                                              float2* softmax, int m, int classes) {
    for_row_length<T>(classes, [=](auto width, auto team) {
        using TEAM = decltype(team);
        constexpr int N = decltype(width)::value;
        TEAM::for_each_row(m, [=](int i) {
            const Row<T, N, TEAM, 1> row(row_at(logits, i, classes), classes);
            const int label = class_of(labels[i], classes);
            const float target = label >= 0 ? to_float(row_at(logits, i, classes)[max(label, 0)]) : NAN;
            float largest[1] = {-INFINITY}, sums[2] = {}; // of exponentials; classes before the label, exact below 2^24
            row.for_each([&, label, target](int first, float(&v)[N]) {
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    largest[0] = fmaxf(largest[0], v[k]);
                    // Written so that NaN ranks before everything.
                    if (!(v[k] <= target) || (v[k] == target && first + k < label)) sums[1] += 1.0f;
                }
            });
            TEAM::max(largest);
            const float max = largest[0];
            row.for_each([&, max](int, float(&v)[N]) {
#pragma unroll
                for (int k = 0; k < N; ++k) sums[0] += expf(v[k] - max);
            });
            TEAM::sum(sums);
            if (TEAM::lane() == 0) {
                rows[i] = logf(sums[0]) - (target - max);
                rank[i] = label >= 0 ? static_cast<int32_t>(sums[1]) : INT32_MAX;
                softmax[i] = make_float2(max, 1.0f / sums[0]);
            }
        });
    });
}

// d_logits = d_loss / m (softmax(logits) - one_hot(label)). Teams and grid as `cross_entropy`.
template <class T>
__device__ __forceinline__ void cross_entropy_backward(const float* d_loss, const T* logits, const int64_t* labels,
                                                       const float2* softmax, T* d_logits, int m, int classes,
                                                       bool accumulate) {
    const float scale = *d_loss / m;
    for_row_length<T>(classes, [=](auto width, auto team) {
        using TEAM = decltype(team);
        constexpr int N = decltype(width)::value;
        TEAM::for_each_row(m, [=](int i) {
            const int label = class_of(labels[i], classes);
            const T* const row = row_at(logits, i, classes);
            T* const out = row_at(d_logits, i, classes);
            const float max = softmax[i].x, per_sum = label >= 0 ? softmax[i].y : NAN;
            for (int first = TEAM::lane() * N; first < classes; first += TEAM::lanes * N) {
                float v[N];
                load(v, row + first);
#pragma unroll
                for (int k = 0; k < N; ++k) {
                    const float probability = expf(v[k] - max) * per_sum;
                    v[k] = scale * (first + k == label ? probability - 1.0f : probability);
                }
                store_or_add(out + first, v, accumulate);
            }
        });
    });
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL_RESIDENT(256, 1)                                                                                            \
    cross_entropy_##S(const T* logits, const int64_t* labels, float* rows, int32_t* rank, float2* softmax, int m,      \
                      int classes) {                                                                                   \
        cross_entropy(logits, labels, rows, rank, softmax, m, classes);                                                \
    }                                                                                                                  \
    EXPORT(cross_entropy_##S)                                                                                          \
    KERNEL_RESIDENT(256, 1)                                                                                            \
    cross_entropy_backward_##S(const float* d_loss, const T* logits, const int64_t* labels, const float2* softmax,     \
                               T* d_logits, int m, int classes, uint32_t accumulate) {                                 \
        cross_entropy_backward(d_loss, logits, labels, softmax, d_logits, m, classes, accumulate != 0);                \
    }                                                                                                                  \
    EXPORT(cross_entropy_backward_##S)
FOR_EACH_TYPE(INSTANTIATE)

// loss = mean of rows; correct = {rows of rank 0, rows of rank below 5}. One block.
KERNEL(256) cross_entropy_totals(const float* rows, const int32_t* rank, float* loss, int64_t* correct, int m) {
    __shared__ double scratch[ROW_THREADS / WARP];
    double sum = 0.0, top1 = 0.0, top5 = 0.0; // counts are exact
    for (int i = threadIdx.x; i < m; i += ROW_THREADS) {
        sum += double{rows[i]};
        top1 += rank[i] < 1 ? 1.0 : 0.0;
        top5 += rank[i] < 5 ? 1.0 : 0.0;
    }
    sum = block_sum<ROW_THREADS>(sum, scratch);
    top1 = block_sum<ROW_THREADS>(top1, scratch);
    top5 = block_sum<ROW_THREADS>(top5, scratch);
    if (threadIdx.x == 0) {
        *loss = static_cast<float>(sum / m);
        correct[0] = static_cast<int64_t>(top1);
        correct[1] = static_cast<int64_t>(top5);
    }
}
EXPORT(cross_entropy_totals)
