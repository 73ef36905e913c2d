// The convolution that begins an ImageNet ResNet, and the gradient of its weights: 7x7, stride 2, padding 3, images of 3
// channels padded to 4, elements of 16 bits.
//
//     x [n][h][w][4]    w [c_out][7][7][4]    y [n][oh][ow][c_out]    c_out: a multiple of 64
//
// Both are products of matrices on the tensor cores whose larger operand is never written down. With 4 channels of 16
// bits two pixels are 16 bytes, and an output pixel (oy, ox) reads of input row 2 oy - 3 + ky the 8 pixels from
// 2 ox - 4 on: 64 bytes that begin 16 bytes after those of its left neighbour. In a patch of x in shared memory the row
// of such a matrix is a place, and `ldmatrix` reads eight of them, 128 bytes in one piece, without a bank conflict. The
// first of the 8 taps lies left of the kernel and has weight 0 (so an infinite pixel there gives NaN); to begin one
// pixel later would save nothing and part a pixel from its pair, which global memory has at a multiple of 16 bytes.
// A row of the patch serves all rows of the output that see it, three or four: it is loaded once for all of them.
//
// A block of four warps works on tiles of 8x16 pixels of y. While it computes, the patch of its next tile is on the way.
//
// What bounds them, for 512 views of 224 pixels and 64 channels (50,176 tiles) on an H100, where tensor cores do a `mma`
// in 1.6 cycles of a multiprocessor and shared memory an `ldmatrix` of 512 bytes in 4:
//     bytes     x 0.2 GB, y or d_y 0.8 GB: 0.36 ms at 2.85 TB/s
//     mma       896 a tile, 45 million: 1430 cycles a tile, 0.31 ms
//     ldmatrix  forward 104 a tile (416 cycles), weight gradient 148 (592 cycles), each a third of the time of its mma
//     halo      a patch has 1.56 times the pixels of its tile, most of which come from the second-level cache
// The three overlap between the two blocks that a multiprocessor has: 0.45 to 0.6 ms each. cuDNN takes 3.6 and 1.8.
#include "async_copy.cuh"
#include "mma.cuh"

constexpr int STEM_THREADS = 128;
constexpr int TAPS = 7;            // rows and columns of the kernel
constexpr int PIXEL = 4;           // elements of a pixel of x
constexpr int TILE_ROWS = 8;       // of y
constexpr int TILE_COLUMNS = 16;   // pixels of y: the rows of a matrix operand
constexpr int TILE_CHANNELS = 64;  // of y
constexpr int PAIR_TAPS = 4;       // pairs of taps that an output pixel reads of a row: 16 bytes each
constexpr int ROW_ELEMENTS = 32;   // the elements of all of them
constexpr int PATCH_ROWS = 2 * (TILE_ROWS - 1) + TAPS;
constexpr int PATCH_PAIRS = TILE_COLUMNS - 1 + PAIR_TAPS;
constexpr int PIXEL_CHUNKS = TILE_CHANNELS * 2 / 16; // pieces of 16 bytes of a pixel of d_y

// Sizes of a call: those of the tensors, and tiles across and down an image and in all.
struct StemSizes {
    int32_t h, w, oh, ow, c_out, across, down, tiles;
};

// Where a tile lies: its image, and its first pixel of y.
struct StemTile {
    int n, oy, ox;
    __device__ __forceinline__ StemTile(const StemSizes& s, int index)
        : n(index / (s.across * s.down)),
          oy(index / s.across % s.down * TILE_ROWS),
          ox(index % s.across * TILE_COLUMNS) {}

    // Whether row i and column k of the tile lie within y, and the pixel there.
    __device__ __forceinline__ bool has(const StemSizes& s, int i, int k) const { return oy + i < s.oh && ox + k < s.ow; }
    __device__ __forceinline__ int64_t pixel(const StemSizes& s, int i, int k) const {
        return (int64_t{n} * s.oh + oy + i) * s.ow + ox + k;
    }
};

// The pixels of x that a tile reads: [PATCH_ROWS][PATCH_PAIRS] pairs, zeros where the image has none.
struct StemPatch {
    uint4 pair[PATCH_ROWS * PATCH_PAIRS];
};

// Starts the copies of a patch, in pieces of so many pixels: 2, or 1 where rows of x begin at any multiple of 8 bytes.
template <int PIXELS, class T>
__device__ __forceinline__ void fetch_pieces(AsyncCopies& copies, StemPatch& patch, const T* x, const StemSizes& s,
                                             const StemTile& tile) {
    constexpr int ACROSS = 2 * PATCH_PAIRS / PIXELS, PIECE = PIXELS * PIXEL;
    T* const to = reinterpret_cast<T*>(patch.pair);
    for (int i = threadIdx.x; i < PATCH_ROWS * ACROSS; i += STEM_THREADS) {
        const int iy = 2 * tile.oy - 3 + i / ACROSS, ix = 2 * tile.ox - 4 + i % ACROSS * PIXELS;
        const bool inside = iy >= 0 && iy < s.h && ix >= 0 && ix < s.w;
        const int64_t pixel = inside ? (int64_t{tile.n} * s.h + iy) * s.w + ix : 0;
        copies.copy<PIECE * sizeof(T)>(to + i * PIECE, x + pixel * PIXEL, inside);
    }
}

template <class T>
__device__ __forceinline__ void fetch_patch(AsyncCopies& copies, StemPatch& patch, const T* x, const StemSizes& s,
                                            const StemTile& tile) {
    if (s.w % 2 == 0) return fetch_pieces<2>(copies, patch, x, s, tile);
    fetch_pieces<1>(copies, patch, x, s, tile);
}

// The pair that a lane names to `ldmatrix` in a row of a patch: matrices of 8 output pixels and a pair of taps, in the
// order (pixels 0 to 7, pair 0), (pixels 8 to 15, pair 0), (0 to 7, 1), (8 to 15, 1).
__device__ __forceinline__ int lane_pair() {
    const int lane = threadIdx.x % WARP, matrix = lane / 8;
    return lane % 8 + 8 * (matrix % 2) + matrix / 2;
}

// Calls compute(tile, stage) for the tiles of this block, after fetch(copies, tile, stage) has filled stage 0 or 1 of
// shared memory.
template <class FETCH, class COMPUTE>
__device__ __forceinline__ void for_each_tile(const StemSizes& s, FETCH fetch, COMPUTE compute) {
    AsyncCopies copies;
    const int blocks = gridDim.x;
    const auto start = [&](int tile, int stage) {
        if (tile < s.tiles) fetch(copies, StemTile(s, tile), stage);
        copies.commit();
    };
    start(blockIdx.x, 0);
    start(blockIdx.x + blocks, 1);
    int stage = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < s.tiles; tile += blocks) {
        copies.wait<1>();
        __syncthreads(); // the copies of all threads have arrived
        compute(StemTile(s, tile), stage);
        __syncthreads(); // all threads have read
        start(tile + 2 * blocks, stage);
        stage ^= 1;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// y = conv(x, w). A = pixels x elements of x, B = elements x channels.
//
// A warp makes 4 rows of a tile and 32 of its channels, whose weights stay in registers (112 of them) for all tiles of
// the block. Channel 8 t + 2 j + e of the 32 is column 2 t + e of matrix j: so lane (g, t) ends with 8 channels of
// pixel g that follow each other, and writes them in one piece of 16 bytes; a quad writes 64, two whole sectors.

constexpr int WARP_ROWS = 4, WARP_CHANNELS = 32, MATRICES = WARP_CHANNELS / 8, STEPS = 2 * TAPS; // steps of 16 elements

template <class T> struct StemWeights {
    uint32_t word[STEPS][MATRICES][2];

    // Those of the channels from `first` on.
    __device__ __forceinline__ void load(const T* w, int first) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int j = 0; j < MATRICES; ++j) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int element = step % 2 * 16 + 8 * i + 2 * t, tap = element / PIXEL - 1;
                    const int channel = first + g / 2 * 8 + 2 * j + g % 2;
                    const T* const from = w + ((channel * TAPS + step / 2) * TAPS + tap) * PIXEL + element % PIXEL;
                    word[step][j][i] = tap < 0 ? 0 : *reinterpret_cast<const uint32_t*>(from);
                }
            }
        }
    }
};

template <class T>
__device__ __forceinline__ void stem_conv(const T* x, const T* w, T* y, const StemSizes& s) {
    __shared__ StemPatch patches[2];
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int first_channel = TILE_CHANNELS * blockIdx.y + warp % 2 * WARP_CHANNELS, first_row = warp / 2 * WARP_ROWS;
    StemWeights<T> weights;
    weights.load(w, first_channel);

    const auto fetch = [&](AsyncCopies& copies, const StemTile& tile, int stage) {
        fetch_patch(copies, patches[stage], x, s, tile);
    };
    const auto compute = [&](const StemTile& tile, int stage) {
        const uint4* const from = patches[stage].pair + 2 * first_row * PATCH_PAIRS + lane_pair();
        float sums[WARP_ROWS][MATRICES][4] = {};
#pragma unroll
        for (int r = 0; r < 2 * (WARP_ROWS - 1) + TAPS; ++r) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t pixels[4];
                load_matrices(pixels, from + r * PATCH_PAIRS + 2 * half);
#pragma unroll
                for (int i = 0; i < WARP_ROWS; ++i) {
                    const int ky = r - 2 * i;
                    if (ky < 0 || ky >= TAPS) continue;
#pragma unroll
                    for (int j = 0; j < MATRICES; ++j) mma<T>(sums[i][j], pixels, weights.word[2 * ky + half][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < WARP_ROWS; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + i, column = g + 8 * half;
                if (!tile.has(s, row, column)) continue;
                float channels[2 * MATRICES];
#pragma unroll
                for (int c = 0; c < 2 * MATRICES; ++c) channels[c] = sums[i][c / 2][2 * half + c % 2];
                store(y + tile.pixel(s, row, column) * s.c_out + first_channel + 8 * t, channels);
            }
        }
    };
    for_each_tile(s, fetch, compute);
}

// ---------------------------------------------------------------------------------------------------------------------
// d_w = sum over pixels of d_y and x. A = channels x pixels, which is d_y transposed; B = pixels x elements of x.
//
// The four warps share the 64 channels x 224 elements of d_w that a block sums up, each a half of both (112 registers).
// Each block sums the tiles it has in float and writes that; a second kernel adds up what the blocks have written.

// The gradients of a tile: [TILE_ROWS][TILE_COLUMNS] pixels of 8 pieces of 8 channels. Piece c of column k lies at
// c ^ (k % 8), so that neither copies nor `ldmatrix` meet in a bank.
struct StemGradients {
    uint4 piece[TILE_ROWS * TILE_COLUMNS * PIXEL_CHUNKS];
};

template <class T>
__device__ __forceinline__ void fetch_gradients(AsyncCopies& copies, StemGradients& gradients, const T* d_y,
                                                const StemSizes& s, const StemTile& tile) {
    static_assert(STEM_THREADS == TILE_COLUMNS * PIXEL_CHUNKS, "a thread has one piece of each row");
    const int column = threadIdx.x / PIXEL_CHUNKS, piece = threadIdx.x % PIXEL_CHUNKS;
    const int channel = TILE_CHANNELS * blockIdx.y + piece * 8, place = piece ^ column % 8;
#pragma unroll
    for (int row = 0; row < TILE_ROWS; ++row) {
        const bool inside = tile.has(s, row, column);
        const int64_t from = inside ? tile.pixel(s, row, column) * s.c_out + channel : 0;
        copies.copy<16>(gradients.piece + (row * TILE_COLUMNS + column) * PIXEL_CHUNKS + place, d_y + from, inside);
    }
}

template <class T>
__device__ __forceinline__ void stem_wgrad(const T* x, const T* d_y, float* partials, const StemSizes& s) {
    __shared__ StemPatch patches[2];
    __shared__ StemGradients gradients[2];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first_channel = warp % 2 * 32, first_pair = warp / 2 * 2;
    float sums[TAPS][2][2][4] = {}; // of a row of the kernel, 16 channels, a pair of taps

    const auto fetch = [&](AsyncCopies& copies, const StemTile& tile, int stage) {
        fetch_patch(copies, patches[stage], x, s, tile);
        fetch_gradients(copies, gradients[stage], d_y, s, tile);
    };
    const auto compute = [&](const StemTile&, int stage) {
        const uint4* const pixels = patches[stage].pair + lane_pair() + first_pair;
        // Matrices of 8 pixels and 8 channels, in the order (pixels 0 to 7, channels 0 to 7), (0, 8), (8, 0), (8, 8).
        const uint4* const rows = gradients[stage].piece + (lane % 8 + lane / 16 * 8) * PIXEL_CHUNKS;
        uint32_t a[TILE_ROWS][2][4];
#pragma unroll
        for (int r = 0; r < PATCH_ROWS; ++r) {
            if (r % 2 == 0 && r / 2 < TILE_ROWS) {
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const int piece = first_channel / 8 + 2 * m + lane / 8 % 2;
                    const uint4* const row = rows + r / 2 * TILE_COLUMNS * PIXEL_CHUNKS;
                    load_transposed(a[r / 2][m], row + (piece ^ lane % 8));
                }
            }
            uint32_t b[4];
            load_transposed(b, pixels + r * PATCH_PAIRS);
            const uint32_t pairs[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
            for (int row = 0; row < TILE_ROWS; ++row) {
                const int ky = r - 2 * row;
                if (ky < 0 || ky >= TAPS) continue;
#pragma unroll
                for (int m = 0; m < 2; ++m) {
#pragma unroll
                    for (int p = 0; p < 2; ++p) mma<T>(sums[ky][m][p], a[row][m], pairs[p]);
                }
            }
        }
    };
    for_each_tile(s, fetch, compute);

    const int channel = TILE_CHANNELS * blockIdx.y + first_channel + g, element = 8 * first_pair + 2 * t;
    float* const to = partials + (int64_t{blockIdx.x} * s.c_out + channel) * TAPS * ROW_ELEMENTS + element;
#pragma unroll
    for (int ky = 0; ky < TAPS; ++ky) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int p = 0; p < 2; ++p) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float* const at = to + ((16 * m + 8 * half) * TAPS + ky) * ROW_ELEMENTS + 8 * p;
                    *reinterpret_cast<float2*>(at) = make_float2(sums[ky][m][p][2 * half], sums[ky][m][p][2 * half + 1]);
                }
            }
        }
    }
}

// Two blocks of a multiprocessor share its registers: 255 for each thread.
#define INSTANTIATE(T, S)                                                                                      \
    /* Grid: blocks that share the tiles x 64 channels. */                                                     \
    KERNEL_RESIDENT(STEM_THREADS, 2) stem_conv_##S(const T* x, const T* w, T* y, StemSizes sizes) {            \
        stem_conv(x, w, y, sizes);                                                                             \
    }                                                                                                          \
    EXPORT(stem_conv_##S)                                                                                      \
    /* partials[blocks][c_out][7][8][4]. Grid: blocks that share the tiles x 64 channels. */                   \
    KERNEL_RESIDENT(STEM_THREADS, 2) stem_wgrad_##S(const T* x, const T* d_y, float* partials, StemSizes sizes) { \
        stem_wgrad(x, d_y, partials, sizes);                                                                   \
    }                                                                                                          \
    EXPORT(stem_wgrad_##S)
INSTANTIATE(bf16, bf16)
INSTANTIATE(f16, f16)

constexpr int FINISH_SLICES = 16, FINISH_TAPS = 16; // slices of the partials, and taps of all channels, of a block

// d_w[c_out][7][7][4] = the sum of all partials, in float64 and in one order; added to what is there if `accumulate`.
// Grid: FINISH_TAPS of the c_out * 49 taps a block.
KERNEL(256) stem_wgrad_finish(const float* partials, int32_t blocks, float* d_w, int32_t taps, int32_t accumulate) {
    static_assert(FINISH_SLICES * FINISH_TAPS == 256, "a thread for each");
    __shared__ double sums[FINISH_SLICES][FINISH_TAPS * PIXEL];
    const int own = threadIdx.x % FINISH_TAPS, slice = threadIdx.x / FINISH_TAPS;
    const int first = blockIdx.x * FINISH_TAPS, tap = first + own;
    double sum[PIXEL] = {};
    if (tap < taps) {
        const int rows = taps / TAPS; // of all kernels: ROW_ELEMENTS in `partials`, of which the first pixel is no tap
        const float* const from = partials + tap / TAPS * ROW_ELEMENTS + (tap % TAPS + 1) * PIXEL;
#pragma unroll 4
        for (int block = slice; block < blocks; block += FINISH_SLICES) {
            float pixel[PIXEL];
            load(pixel, from + int64_t{block} * rows * ROW_ELEMENTS);
#pragma unroll
            for (int c = 0; c < PIXEL; ++c) sum[c] += pixel[c];
        }
    }
#pragma unroll
    for (int c = 0; c < PIXEL; ++c) sums[slice][own * PIXEL + c] = sum[c];
    __syncthreads();
    const int element = threadIdx.x;
    if (element >= FINISH_TAPS * PIXEL || first * PIXEL + element >= taps * PIXEL) return;
    double total = 0.0;
#pragma unroll
    for (int i = 0; i < FINISH_SLICES; ++i) total += sums[i][element];
    float* const to = d_w + first * PIXEL + element;
    *to = static_cast<float>(accumulate ? *to + total : total);
}
EXPORT(stem_wgrad_finish)
