// Rows of a matrix, each worked on by a team of threads: the whole block, or one warp where rows are short.
#pragma once
#include "common.cuh"

constexpr int ROW_THREADS = 256;

// The threads that share a row; LANES is ROW_THREADS or WARP. All of a team's functions are called by all its threads.
template <int LANES> struct Team {
    static constexpr int lanes = LANES;
    static constexpr int teams = ROW_THREADS / LANES; // in a block

    __device__ __forceinline__ static int lane() { return threadIdx.x % LANES; }

    // Calls f(row) for every row of this team: a grid-stride loop.
    template <class F> __device__ __forceinline__ static void for_each_row(int rows, F f) {
        const unsigned end = rows; // the step past the last row may exceed an int
        for (unsigned row = blockIdx.x * teams + threadIdx.x / LANES; row < end; row += gridDim.x * teams) f(int(row));
    }

    // Replaces each of the K values by its sum over the team.
    template <int K> __device__ __forceinline__ static void sum(float (&x)[K]) {
#pragma unroll
        for (float& value : x) value = warp_sum(value);
        combine(x, [](float a, float b) { return a + b; });
    }

    // Replaces each of the K values by its maximum over the team.
    template <int K> __device__ __forceinline__ static void max(float (&x)[K]) {
#pragma unroll
        for (float& value : x) value = warp_max(value);
        combine(x, [](float a, float b) { return fmaxf(a, b); });
    }

private:
    // Combines what the warps of a block found, in their order.
    template <int K, class F> __device__ __forceinline__ static void combine(float (&x)[K], F f) {
        if (LANES == WARP) return;
        constexpr int WARPS = ROW_THREADS / WARP;
        __shared__ float scratch[WARPS][K];
        __syncthreads(); // the last reader of `scratch` is done
        if (threadIdx.x % WARP == 0) {
#pragma unroll
            for (int k = 0; k < K; ++k) scratch[threadIdx.x / WARP][k] = x[k];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < K; ++k) {
            x[k] = scratch[0][k];
#pragma unroll
            for (int warp = 1; warp < WARPS; ++warp) x[k] = f(x[k], scratch[warp][k]);
        }
    }
};

// Calls f(Count<N>, Team) with the widest access and the team that fit rows of `d` elements. Must agree with
// `row_grid`.
template <class T, class F> __device__ __forceinline__ void for_row_length(int d, F f) {
    constexpr int SHORT_ROW = 1024;
    if (d % WIDTH<T> == 0) {
        if (d <= SHORT_ROW) f(Count<WIDTH<T>>{}, Team<WARP>{});
        else f(Count<WIDTH<T>>{}, Team<ROW_THREADS>{});
    } else {
        if (d <= SHORT_ROW) f(Count<1>{}, Team<WARP>{});
        else f(Count<1>{}, Team<ROW_THREADS>{});
    }
}

// A row of `d` elements that is gone over several times. Each thread keeps its first KEPT packs in registers, with two
// of them all of a row up to d = 2048 in float; what lies behind is read again, from a cache.
template <class T, int N, class TEAM, int KEPT = 2> struct Row {
    __device__ __forceinline__ Row(const T* from, int d) : from(from), d(d) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i)
            if (at(i) < d) kept[i] = *reinterpret_cast<const Pack<T, N>*>(from + at(i));
    }

    // Calls f(first, float (&a)[N]): the elements from `first` on.
    template <class F> __device__ __forceinline__ void for_each(F f) const {
        float a[N];
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            if (at(i) < d) {
                unpack(a, kept[i]);
                f(at(i), a);
            }
        }
        for (int first = at(KEPT); first < d; first += TEAM::lanes * N) {
            load(a, from + first);
            f(first, a);
        }
    }

    // Calls f(first, float (&a)[N], float (&b)[N]) with the elements from `first` on of this row and of another as
    // long.
    template <class F> __device__ __forceinline__ void for_each_pair(const Row& other, F f) const {
        float a[N], b[N];
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            if (at(i) < d) {
                unpack(a, kept[i]);
                unpack(b, other.kept[i]);
                f(at(i), a, b);
            }
        }
        for (int first = at(KEPT); first < d; first += TEAM::lanes * N) {
            load(a, from + first);
            load(b, other.from + first);
            f(first, a, b);
        }
    }

private:
    __device__ __forceinline__ static int at(int pack) { return (pack * TEAM::lanes + TEAM::lane()) * N; }

    __device__ __forceinline__ static void unpack(float (&to)[N], const Pack<T, N>& pack) {
#pragma unroll
        for (int k = 0; k < N; ++k) to[k] = to_float(pack.element[k]);
    }

    const T* from;
    int d;
    Pack<T, N> kept[KEPT];
};

// (i + shift) mod r, for i < r and shift <= r.
__device__ __forceinline__ int partner(int i, int shift, int r) {
    const int wraps = r - shift; // from here on
    return i < wraps ? i + shift : i - wraps;
}

// Row i of a matrix with `d` columns.
template <class T> __device__ __forceinline__ T* row_at(T* matrix, int i, int d) { return matrix + int64_t{i} * d; }

// 1 / max(|v|, 1e-12), as torch.nn.functional.normalize divides, from v's sum of squares.
__device__ __forceinline__ float rnorm_of(float square) { return 1.0f / fmaxf(sqrtf(square), 1e-12f); }
