// Tensors seen as rows of channels: how blocks share them, and sums over rows.
//
// A block of 256 threads owns a tile: `lanes` packs of channels side by side, in `chunk` successive rows of one group. A
// thread keeps its channels, so that what belongs to a channel stays in registers, and walks down the rows; neighbouring
// threads read neighbouring packs. src/ops/row_tiles.rs chooses the tiles, from the shape alone.
#pragma once
#include "common.cuh"

constexpr int TILE_THREADS = 256;
struct RowTiles {
    int64_t rows;     // of a group
    int64_t chunk;    // rows of a tile, a multiple of its threads' steps; the last one of a group may be shorter
    int32_t channels; // of a row
    int32_t lanes;    // packs of a tile's row, a power of two up to 32
};

// Calls f(Count<N>) with the widest pack that rows of `channels` allow.
template <class T, class F> __device__ __forceinline__ void with_width(int channels, F f) {
    if (channels % WIDTH<T> == 0) {
        f(Count<WIDTH<T>>{});
    } else {
        f(Count<1>{});
    }
}

// The tile of one block, and the part of it that is this thread's: N channels of every `step`-th row.
template <int N> struct Tile {
    int channels, lanes, step;
    int first_channel; // of the tile
    int channel;       // the first of this thread
    bool inside;       // whether there is such a channel: the last tile of a row may hang over
    int64_t group, chunk; // the chunk is counted through all groups
    int64_t first_row;    // of the tile, counted through all groups
    int row, end;         // this thread's rows, counted within the tile
    int64_t element;      // its first element
    int64_t stride;       // elements from one of its rows to the next

    __device__ __forceinline__ Tile(const RowTiles& tiles, int64_t block)
        : channels(tiles.channels), lanes(tiles.lanes), step(TILE_THREADS / tiles.lanes) {
        const int across = (channels + N * lanes - 1) / (N * lanes);
        const int64_t down = (tiles.rows + tiles.chunk - 1) / tiles.chunk;
        chunk = block / across;
        group = chunk / down;
        first_channel = int(block - chunk * across) * N * lanes;
        channel = first_channel + int(threadIdx.x) % lanes * N;
        inside = channel < channels;
        const int64_t first = (chunk - group * down) * tiles.chunk;
        const int64_t last = first + tiles.chunk < tiles.rows ? first + tiles.chunk : tiles.rows;
        row = int(threadIdx.x) / lanes;
        end = inside ? int(last - first) : 0;
        first_row = group * tiles.rows + first;
        element = (first_row + row) * channels + channel;
        stride = int64_t{step} * channels;
    }
};

// Calls f(row, i, Count<U>) for U of the thread's rows at a time, then for one: element i, which lies in row `row` of all, and
// those `tile.stride` and `tile.step` further on. U loads of each tensor are in flight together, which hides the latency of
// device memory.
template <int U, int N, class F> __device__ __forceinline__ void for_numbered_rows(const Tile<N>& tile, F f) {
    int row = tile.row;
    int64_t i = tile.element;
    for (; row + (U - 1) * tile.step < tile.end; row += U * tile.step, i += U * tile.stride)
        f(tile.first_row + row, i, Count<U>{});
    for (; row < tile.end; row += tile.step, i += tile.stride) f(tile.first_row + row, i, Count<1>{});
}

// The same with f(i, Count<U>).
template <int U, int N, class F> __device__ __forceinline__ void for_rows(const Tile<N>& tile, F f) {
    for_numbered_rows<U>(tile, [&](int64_t, int64_t i, auto count) { f(i, count); });
}

template <int U, int N, class T>
__device__ __forceinline__ void load_rows(float (&to)[U][N], const T* from, int64_t stride) {
#pragma unroll
    for (int u = 0; u < U; ++u) load(to[u], from + u * stride);
}

// Writes rows, or adds to what is there: all loads come before the first store, which they might wait for.
template <int U, int N, class T>
__device__ __forceinline__ void store_rows(T* to, float (&from)[U][N], int64_t stride, bool accumulate = false) {
    if (accumulate) {
        float old[U][N];
        load_rows(old, to, stride);
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int k = 0; k < N; ++k) from[u][k] += old[u][k];
    }
#pragma unroll
    for (int u = 0; u < U; ++u) store(to + u * stride, from[u]);
}

// The sum of U (a power of two) values, pairwise: adding it to a running sum makes chains U times shorter.
template <int U> __device__ __forceinline__ float tree_sum(float (&x)[U]) {
#pragma unroll
    for (int half = U / 2; half > 0; half /= 2)
#pragma unroll
        for (int u = 0; u < half; ++u) x[u] += x[u + half];
    return x[0];
}

// Adds U rows to the sums of their columns.
template <int U, int N> __device__ __forceinline__ void add_rows(float (&sums)[N], const float (&rows)[U][N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        float column[U];
#pragma unroll
        for (int u = 0; u < U; ++u) column[u] = rows[u][k];
        sums[k] += tree_sum(column);
    }
}

// Shared memory for so many sums over a tile; one array for all instances of a kernel's body.
constexpr int MOST_PADDED = 8 + 1;
template <int SUMS> __device__ __forceinline__ float* tile_scratch() {
    __shared__ float scratch[TILE_THREADS * SUMS * MOST_PADDED];
    return scratch;
}

// Adds up SUMS values of each channel over a tile's rows and calls write(channel, totals) once for each channel, from the
// thread next to that of the channel before.
template <int SUMS, int N, class F>
__device__ __forceinline__ void sum_over_rows(const float (&sums)[SUMS][N], const Tile<N>& tile, F write) {
    constexpr int PADDED = N + 1; // neither the writes nor the reads below meet in a bank
    static_assert(PADDED <= MOST_PADDED, "scratch of a tile");
    float* const scratch = tile_scratch<SUMS>();
#pragma unroll
    for (int s = 0; s < SUMS; ++s)
#pragma unroll
        for (int k = 0; k < N; ++k) scratch[(s * TILE_THREADS + threadIdx.x) * PADDED + k] = sums[s][k];
    __syncthreads();
    const int c = int(threadIdx.x), channel = tile.first_channel + c;
    if (c >= tile.lanes * N || channel >= tile.channels) return;
    float totals[SUMS];
#pragma unroll
    for (int s = 0; s < SUMS; ++s) {
        const float* const of_sum = scratch + s * TILE_THREADS * PADDED;
        float part[4] = {}; // a step has at least 8 rows
        for (int r = 0; r < tile.step; r += 4)
#pragma unroll
            for (int u = 0; u < 4; ++u) part[u] += of_sum[((r + u) * tile.lanes + c / N) * PADDED + c % N];
        totals[s] = tree_sum(part);
    }
    write(channel, totals);
}
