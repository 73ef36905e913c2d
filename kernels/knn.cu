// Weighted kNN: the k bank rows nearest in cosine to each query, kept up to date while the bank passes by in tiles of
// products, and their vote.
//
// A neighbour is one number that is greater the nearer it is: the cosine's bits, made to order as integers do, then the
// complement of the bank row, so that of equal cosines the lower row is nearer. 0 is no neighbour. No two are equal, so
// the best k do not depend on the order in which they were found.
#include "common.cuh"

constexpr int KNN_THREADS = 256;
constexpr int MOST_NEIGHBOURS = 256;
// Neighbours that may wait before they are sorted in; a round of the tile adds up to 4 a thread.
constexpr int MOST_WAITING = 768;
constexpr int KNN_KEYS = MOST_NEIGHBOURS + MOST_WAITING + 4 * KNN_THREADS;
static_assert((KNN_KEYS & (KNN_KEYS - 1)) == 0, "sorted as a power of two");

__device__ __forceinline__ uint64_t neighbour(float cosine, int64_t row) {
    const uint32_t bits = __float_as_uint(cosine);
    const uint32_t ordered = bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
    return uint64_t{ordered} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(row));
}

__device__ __forceinline__ float cosine_of(uint64_t neighbour) {
    const uint32_t ordered = static_cast<uint32_t>(neighbour >> 32);
    return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

__device__ __forceinline__ int64_t bank_row_of(uint64_t neighbour) {
    return 0xFFFFFFFFu - static_cast<uint32_t>(neighbour);
}

// Sorts keys[0..filled), the greatest first, with zeros behind up to the next power of two (bitonic). All threads call
// it.
__device__ __forceinline__ void sort_descending(uint64_t* keys, int filled) {
    int n = 2;
    while (n < filled) n *= 2;
    for (int i = filled + threadIdx.x; i < n; i += KNN_THREADS) keys[i] = 0;
    for (int size = 2; size <= n; size *= 2) {
        for (int stride = size / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int t = threadIdx.x; t < n / 2; t += KNN_THREADS) {
                const int low = (t & ~(stride - 1)) * 2 | (t & (stride - 1)), high = low + stride;
                const uint64_t a = keys[low], b = keys[high];
                if (((low & size) == 0) == (a < b)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    }
    __syncthreads();
}

// Appends every thread's nonzero candidates to keys[filled..]; returns the new number of keys. Positions follow the
// threads' order. All threads call it.
template <int N> __device__ __forceinline__ int append(uint64_t* keys, int filled, const uint64_t (&candidate)[N]) {
    __shared__ int warp_total[KNN_THREADS / WARP];
    int count = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) count += candidate[i] != 0;
    if (!__syncthreads_or(count)) return filled;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int upto = count; // in this lane and those before it
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const int before = __shfl_up_sync(ALL_LANES, upto, distance);
        if (lane >= distance) upto += before;
    }
    if (lane == WARP - 1) warp_total[warp] = upto;
    __syncthreads();
    int at = filled + upto - count;
    for (int w = 0; w < KNN_THREADS / WARP; ++w) {
        if (w < warp) at += warp_total[w];
        filled += warp_total[w];
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (candidate[i] != 0) keys[at++] = candidate[i];
    return filled;
}

// Merges one tile into best [queries][k], nearest first: cosine = products[query][column] query_scale[query]
// bank_scale[column], bank row range[0] + column. The tile holds the bank rows from range[0] to range[1]; columns
// behind them are ignored. A tile that starts at row 0 begins a new search.
//
// A block per query, grid-stride. N products a thread and round; what cannot be among the best any more is dropped at
// once, the rest waits in shared memory until there is enough to be worth a sort. 4 bytes move per product.
template <int N>
__device__ __forceinline__ void merge_tile(const float* products, const float* query_scale, const float* bank_scale,
                                           const int64_t* range, uint64_t* best, int64_t queries, int tile, int k) {
    __shared__ uint64_t keys[KNN_KEYS];
    const int64_t first_row = range[0], rows = range[1] - first_row;
    const int columns = rows < 0 ? 0 : rows < tile ? static_cast<int>(rows) : tile;
    for (int64_t query = blockIdx.x; query < queries; query += gridDim.x) {
        const float scale = query_scale[query];
        for (int i = threadIdx.x; i < k; i += KNN_THREADS) keys[i] = first_row == 0 ? 0 : best[query * k + i];
        __syncthreads();
        uint64_t farthest = keys[k - 1];
        int filled = k;
        for (int start = 0; start < columns; start += KNN_THREADS * N) {
            const int column = start + threadIdx.x * N;
            uint64_t candidate[N] = {};
            if (column < columns) {
                float product[N], per_bank[N];
                load(product, products + query * tile + column);
                load(per_bank, bank_scale + column);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const uint64_t found = neighbour(product[i] * scale * per_bank[i], first_row + column + i);
                    candidate[i] = column + i < columns && found > farthest ? found : 0;
                }
            }
            filled = append(keys, filled, candidate);
            if (filled > k + MOST_WAITING) {
                sort_descending(keys, filled);
                filled = k;
                farthest = keys[k - 1];
            }
        }
        if (filled > k) sort_descending(keys, filled);
        for (int i = threadIdx.x; i < k; i += KNN_THREADS) best[query * k + i] = keys[i];
        __syncthreads(); // before the next query takes `keys`
    }
}

KERNEL(256)
knn_merge(const float* products, const float* query_scale, const float* bank_scale, const int64_t* range,
          uint64_t* best, int64_t queries, int tile, int k) {
    constexpr int N = WIDTH<float>;
    if (tile % N == 0) merge_tile<N>(products, query_scale, bank_scale, range, best, queries, tile, k);
    else merge_tile<1>(products, query_scale, bank_scale, range, best, queries, tile, k);
}
EXPORT(knn_merge)

// predictions[query] = the class with the most votes, of equal ones the lowest; each of the k neighbours votes for its
// label with weight exp((cosine - 1) / temperature), added in double in the order of distance. -1 where one of them has
// no row in the bank or no label below `classes`. A block per query, a thread per neighbour, grid-stride.
KERNEL(256)
knn_vote(const uint64_t* best, const int64_t* labels, int64_t* predictions, int64_t queries, int64_t bank_rows,
         int64_t classes, int k, double temperature) {
    __shared__ double weight[MOST_NEIGHBOURS], votes[MOST_NEIGHBOURS];
    __shared__ int64_t label[MOST_NEIGHBOURS], elected[MOST_NEIGHBOURS];
    const int own = threadIdx.x;
    for (int64_t query = blockIdx.x; query < queries; query += gridDim.x) {
        bool valid = true;
        label[own] = -1;
        if (own < k) {
            const uint64_t near = best[query * k + own];
            const int64_t row = bank_row_of(near);
            valid = row < bank_rows && labels[row] >= 0 && labels[row] < classes;
            if (valid) label[own] = labels[row];
            weight[own] = exp((double{cosine_of(near)} - 1.0) / temperature);
        }
        const bool all_valid = __syncthreads_and(valid);
        double sum = 0.0;
        if (own < k) {
            for (int i = 0; i < k; ++i)
                if (label[i] == label[own]) sum += weight[i];
        }
        // Without any votes, as when all weights are too small for a double, class 0.
        votes[own] = sum;
        elected[own] = sum > 0.0 ? label[own] : 0;
        for (int half = MOST_NEIGHBOURS / 2; half > 0; half /= 2) {
            __syncthreads();
            if (own < half) {
                const double other = votes[own + half];
                if (other > votes[own] || (other == votes[own] && elected[own + half] < elected[own])) {
                    votes[own] = other;
                    elected[own] = elected[own + half];
                }
            }
        }
        if (own == 0) predictions[query] = all_valid ? elected[0] : -1;
        __syncthreads(); // before the next query takes the shared memory
    }
}
EXPORT(knn_vote)
