// Augmentation: stored images (bytes) to the two normalised views of each, as src/data/augment makes them on the CPU,
// bit for bit: every value is computed by the same float operations in the same order, none of them fused.
//
// Three kernels. `augment_taps` works out the filters of each view once, in double as on the CPU. `augment_crop` cuts
// out, resizes and takes the colour jitter up to its contrast, whose mean luma it sums up. `augment_finish` does the
// rest: jitter, grey, blur, normalisation. Between the two lie planes of floats; the launcher takes so few views at a
// time that these stay in the second-level cache.
#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// What is to be done with a view; field for field the structs of src/ops/augment/descriptor.rs.

// The real interval of source columns (or rows) that is spread over the view, step by step, by a triangle of half width
// `support` that stays inside first..end. `taps`: weights of each output. `mirrored`: the outputs run backwards.
struct AugmentAxis {
    double start, step, support;
    int32_t first, end, taps, mirrored;
};

constexpr int MAX_BLUR_TAPS = 128;

struct AugmentView {
    int64_t offset; // of the image among the pixels, in bytes
    AugmentAxis axis[2]; // columns, rows
    int32_t row_bytes, channels;
    int32_t order[4]; // operations of the jitter
    float factor[4]; // by operation
    int32_t operations, before_contrast; // how many: 4 or 0, and those before the contrast
    int32_t grayscale;
    int32_t blur_taps; // at least 1
    float blur[MAX_BLUR_TAPS]; // centre and right half of the kernel
};
static_assert(sizeof(AugmentView) == 656, "as in Rust");

// Normalised value = level x scale + offset, by channel.
struct Normalisation {
    float scale[3], offset[3];
};

enum JitterOp { BRIGHTNESS, CONTRAST, SATURATION, HUE };

// Lumas are summed up in steps of 2^-14: the sum is exact, whatever its order.
constexpr float LUMA_BIAS = 512.0f; // what is added to it has steps of this size
constexpr double LUMA_STEPS = 16384.0;

// ---------------------------------------------------------------------------------------------------------------------
// Filters.

// The filters of a view's columns and rows: for each output the first source index, and weights tap by tap, so that
// neighbouring outputs lie side by side: weight i of output x is weights[i * size + x].
struct AugmentTaps {
    const int32_t* first;
    const float* weights;
    int taps;

    __device__ __forceinline__ AugmentTaps(const AugmentView& view, int axis, const int32_t* firsts,
                                           const float* weights, int size, int capacity)
        : first(firsts + (2 * int64_t{blockIdx.y} + axis) * size),
          weights(weights + (2 * int64_t{blockIdx.y} + axis) * capacity),
          taps(view.axis[axis].taps) {}
};

// The triangle of `Taps::compute` (src/data/augment/crop.rs) at source index i.
__device__ __forceinline__ double triangle(const AugmentAxis& axis, double centre, int low, int high, int i) {
    if (i < low || i >= high) return 0.0;
    return fmax(1.0 - fabs((i + 0.5 - centre) / axis.support), 0.0);
}

// Fills the tables of every view, first[views][2][size] and weights[views][2][capacity], of which the first taps * size
// are used, and sets its sum of lumas to zero. Grid: views x 2 axes; a thread for every output.
KERNEL(256) augment_taps(const AugmentView* views, int32_t* firsts, float* weights, uint64_t* lumas, int32_t size,
                         int32_t capacity) {
    const AugmentAxis axis = views[blockIdx.x].axis[blockIdx.y];
    const int64_t table = 2 * int64_t{blockIdx.x} + blockIdx.y;
    if (blockIdx.y == 0 && threadIdx.x == 0) lumas[blockIdx.x] = 0;
    for (int output = threadIdx.x; output < size; output += blockDim.x) {
        const int place = axis.mirrored ? size - 1 - output : output;
        const double centre = axis.start + (place + 0.5) * axis.step;
        const int low = min(max(static_cast<int>(fmax(centre - axis.support + 0.5, 0.0)), axis.first), axis.end - 1);
        const int high = min(max(static_cast<int>(centre + axis.support + 0.5), low + 1), axis.end);
        const int first = min(low, axis.end - axis.taps);
        double total = 0.0;
        for (int i = 0; i < axis.taps; ++i) total += triangle(axis, centre, low, high, first + i);
        firsts[table * size + output] = first;
        for (int i = 0; i < axis.taps; ++i) {
            const double weight = triangle(axis, centre, low, high, first + i) / total;
            weights[table * capacity + int64_t{i} * size + output] = static_cast<float>(weight);
        }
    }
}
EXPORT(augment_taps)

// ---------------------------------------------------------------------------------------------------------------------
// Colour: the operations of src/data/augment/jitter.rs on one pixel, levels 0..255.

__device__ __forceinline__ float luma(const float (&p)[3]) { return 0.299f * p[0] + 0.587f * p[1] + 0.114f * p[2]; }

// The luma in steps of 2^-14, rounded to nearest even: 23 bits.
__device__ __forceinline__ uint32_t luma_steps(const float (&p)[3]) {
    return __float_as_uint(luma(p) + LUMA_BIAS) & 0x7fffff;
}

// level x factor + offset, clamped.
__device__ __forceinline__ void scale_levels(float (&p)[3], float factor, float offset) {
#pragma unroll
    for (float& level : p) level = fminf(fmaxf(level * factor + offset, 0.0f), 255.0f);
}

// Turns the hue, keeping the HSV value and saturation. Hues are counted in sixths of the circle.
__device__ __forceinline__ void turn_hue(float (&p)[3], float turn) {
    const float r = p[0], g = p[1], b = p[2];
    const float value = fmaxf(fmaxf(r, g), b), chroma = value - fminf(fminf(r, g), b);
    const float inverse = chroma > 0.0f ? 1.0f / chroma : 0.0f;
    const float red_largest = (g - b) * inverse;
    const float green_largest = 2.0f + (b - r) * inverse;
    const float blue_largest = 4.0f + (r - g) * inverse;
    const float not_red = value == g ? green_largest : blue_largest;
    float hue = turn + (value == r ? red_largest : not_red);
    hue = hue < 0.0f ? hue + 6.0f : hue;
    hue = hue >= 6.0f ? hue - 6.0f : hue;
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
        float place = (5.0f - 2.0f * channel) + hue;
        place = place >= 6.0f ? place - 6.0f : place;
        p[channel] = value - chroma * fminf(fmaxf(fminf(place, 4.0f - place), 0.0f), 1.0f);
    }
}

// Operations from..to of the jitter, on an image of this mean luma.
template <int N>
__device__ __forceinline__ void jitter(float (&pixels)[N][3], const AugmentView& view, int from, int to, float mean) {
    for (int i = from; i < to; ++i) {
        const int op = view.order[i];
        const float factor = view.factor[op];
        if (op == HUE) {
#pragma unroll
            for (auto& p : pixels) turn_hue(p, 6.0f * factor);
        } else if (op == SATURATION) {
#pragma unroll
            for (auto& p : pixels) scale_levels(p, factor, (1.0f - factor) * luma(p));
        } else {
            const float offset = op == CONTRAST ? (1.0f - factor) * mean : 0.0f;
#pragma unroll
            for (auto& p : pixels) scale_levels(p, factor, offset);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: a block of 16 warps makes 32 x 32 pixels of a view; lane x of a warp has those of column x in two rows.

constexpr int TILE = 32;
constexpr int TILE_WARPS = 16;
constexpr int TILE_THREADS = TILE_WARPS * WARP;
constexpr int OWN_ROWS = TILE / TILE_WARPS;
static_assert(TILE == WARP, "a warp makes a row of a tile");

struct Tile {
    int left, top, lane, warp;

    __device__ __forceinline__ explicit Tile(int size) : lane(threadIdx.x % WARP), warp(threadIdx.x / WARP) {
        const int across = (size + TILE - 1) / TILE;
        left = static_cast<int>(blockIdx.x) % across * TILE;
        top = static_cast<int>(blockIdx.x) / across * TILE;
    }

    // The thread's column of the view, and the k-th of its rows; of tiles that reach over the border some are outside.
    __device__ __forceinline__ int x() const { return left + lane; }
    __device__ __forceinline__ int y(int k) const { return top + warp + k * TILE_WARPS; }
    __device__ __forceinline__ bool has(int k, int size) const { return x() < size && y(k) < size; }
};

// Copies a descriptor to shared memory, where its fields cost little. A barrier must follow.
__device__ __forceinline__ void fetch_view(AugmentView& to, const AugmentView& from) {
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(&from);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(AugmentView) / 4); i += TILE_THREADS) {
        reinterpret_cast<uint32_t*>(&to)[i] = words[i];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Crop and resize: source rows are read piece by piece into shared memory, resampled to the columns of the tile, and
// added to the sums of the outputs that they belong to. Windows of any size pass through the same memory.

constexpr int SOURCE_ROWS = 48; // resampled at a time: enough for all of a tile that shrinks them by up to 1.4
constexpr int SOURCE_PIXELS = 80; // of each row at a time
constexpr int SOURCE_BLOCKS = 16; // of 16 bytes: as many pixels of 3 bytes that start anywhere in the first block
static_assert(15 + 3 * SOURCE_PIXELS <= 16 * SOURCE_BLOCKS, "pixels fit in the blocks");
static_assert(SOURCE_ROWS % TILE_WARPS == 0, "every warp has as many rows");

struct CropMemory {
    Pack<uint32_t, 4> source[SOURCE_ROWS][SOURCE_BLOCKS];
    float resized[SOURCE_ROWS][3][TILE];
};

// Where a piece of a source row lies, and how far into its 16-byte block it starts.
struct SourcePiece {
    int64_t block;
    int lead;

    __device__ __forceinline__ SourcePiece(const AugmentView& view, int row, int column) {
        const int64_t first = view.offset + int64_t{row} * view.row_bytes + int64_t{column} * view.channels;
        lead = static_cast<int>(first % 16);
        block = first / 16;
    }
};

// Reads `pixels` pixels from `column` on of `rows` source rows from `row` on.
__device__ __forceinline__ void read_source(CropMemory& memory, const AugmentView& view,
                                            const Pack<uint32_t, 4>* __restrict__ from, int row, int rows, int column,
                                            int pixels) {
    for (int i = threadIdx.x; i < rows * SOURCE_BLOCKS; i += TILE_THREADS) {
        const int r = i / SOURCE_BLOCKS, block = i % SOURCE_BLOCKS;
        const SourcePiece piece(view, row + r, column);
        if (16 * block < piece.lead + pixels * view.channels) memory.source[r][block] = from[piece.block + block];
    }
}

// Resamples `rows` source rows from `row` on to the columns of the tile.
template <int CHANNELS>
__device__ __forceinline__ void resize_columns(CropMemory& memory, const AugmentView& view,
                                               const Pack<uint32_t, 4>* __restrict__ pixels, const AugmentTaps& columns,
                                               const Tile& tile, int row, int rows, int size) {
    constexpr int EACH = SOURCE_ROWS / TILE_WARPS;
    const int x = min(tile.x(), size - 1);
    const int first = columns.first[x];
    // Of a mirrored axis the last output comes first.
    const int one_end = columns.first[tile.left], other_end = columns.first[min(tile.left + TILE, size) - 1];
    const int begin = min(one_end, other_end), end = max(one_end, other_end) + columns.taps;
    float sum[EACH][CHANNELS] = {};
    for (int column = begin; column < end; column += SOURCE_PIXELS) {
        const int stop = min(column + SOURCE_PIXELS, end);
        if (column > begin) __syncthreads(); // the last piece is used up
        read_source(memory, view, pixels, row, rows, column, stop - column);
        __syncthreads();
        const unsigned char* piece[EACH];
#pragma unroll
        for (int k = 0; k < EACH; ++k) {
            const int r = tile.warp + k * TILE_WARPS;
            const int lead = SourcePiece(view, row + r, column).lead;
            piece[k] = reinterpret_cast<const unsigned char*>(memory.source[r]) + lead;
        }
#pragma unroll 1 // three rows at a time are enough to do; more would not fit the registers
        for (int i = max(first, column); i < min(first + columns.taps, stop); ++i) {
            const float weight = columns.weights[int64_t{i - first} * size + x];
#pragma unroll
            for (int k = 0; k < EACH; ++k) {
                if (tile.warp + k * TILE_WARPS >= rows) continue;
#pragma unroll
                for (int c = 0; c < CHANNELS; ++c) {
                    sum[k][c] += weight * static_cast<float>(piece[k][(i - column) * CHANNELS + c]);
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            memory.resized[tile.warp + k * TILE_WARPS][c][tile.lane] = sum[k][CHANNELS == 3 ? c : 0];
        }
    }
}

// Cuts out and resizes views, takes them through the jitter up to its contrast and sums up the lumas for its mean.
// pixels: bytes of all images, readable up to the next multiple of 16; planes[views][3][size][size].
// Grid: tiles of a view x views. Tiles above each other both resample the rows at their border, fewer than 2 * support.
KERNEL_RESIDENT(TILE_THREADS, 2)
augment_crop(const Pack<uint32_t, 4>* pixels, const AugmentView* views, const int32_t* firsts, const float* weights,
             float* planes, uint64_t* lumas, int32_t size, int32_t capacity) {
    __shared__ AugmentView view;
    __shared__ CropMemory memory;
    __shared__ uint32_t sums[TILE_WARPS];
    fetch_view(view, views[blockIdx.y]);
    __syncthreads();
    const Tile tile(size);
    const AugmentTaps columns(view, 0, firsts, weights, size, capacity);
    const AugmentTaps rows(view, 1, firsts, weights, size, capacity);

    float levels[OWN_ROWS][3] = {};
    const int end = rows.first[min(tile.top + TILE, size) - 1] + rows.taps;
    for (int row = rows.first[tile.top]; row < end; row += SOURCE_ROWS) {
        const int stop = min(row + SOURCE_ROWS, end);
        if (view.channels == 3) {
            resize_columns<3>(memory, view, pixels, columns, tile, row, stop - row, size);
        } else {
            resize_columns<1>(memory, view, pixels, columns, tile, row, stop - row, size);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < OWN_ROWS; ++k) {
            const int y = min(tile.y(k), size - 1);
            const int first = rows.first[y];
#pragma unroll 1
            for (int r = max(first, row); r < min(first + rows.taps, stop); ++r) {
                const float weight = rows.weights[int64_t{r - first} * size + y];
#pragma unroll
                for (int c = 0; c < 3; ++c) levels[k][c] += weight * memory.resized[r - row][c][tile.lane];
            }
        }
    }

    jitter(levels, view, 0, view.before_contrast, 0.0f);
    uint32_t sum = 0;
    const int plane = size * size;
#pragma unroll
    for (int k = 0; k < OWN_ROWS; ++k) {
        if (!tile.has(k, size)) continue;
        sum += luma_steps(levels[k]);
        float* const to = planes + 3 * int64_t{plane} * blockIdx.y + tile.y(k) * size + tile.x();
#pragma unroll
        for (int c = 0; c < 3; ++c) to[c * plane] = levels[k][c];
    }
    if (view.operations > 0) {
        sum = block_sum<TILE_THREADS>(sum, sums); // of 1024 pixels: at most 1024 * 255 * 2^14 < 2^32
        // Of integers: their order changes nothing.
        if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long*>(lumas + blockIdx.y), uint64_t{sum});
    }
}
EXPORT(augment_crop)

// ---------------------------------------------------------------------------------------------------------------------
// The rest: a tile with as many pixels around it as the blur reaches is coloured strip by strip, its rows are blurred
// to the columns of the tile, then its columns.

// Which of 0..size stands in for place i: PIL repeats the border, torchvision reflects at it.
__device__ __forceinline__ int inside(int i, int size, bool reflect) {
    const int last = size - 1;
    if (reflect) i = i < 0 ? -i : i > last ? 2 * last - i : i;
    return min(max(i, 0), last);
}

// sums[p] = half[0] * centre + sum of half[i] * (before + after) over the neighbours at distance i in steps of stride,
// for PLANES planes that lie `plane` apart.
template <int PLANES>
__device__ __forceinline__ void convolve(const AugmentView& view, const float* centre, int stride, int plane,
                                         float (&sums)[PLANES]) {
#pragma unroll
    for (int p = 0; p < PLANES; ++p) sums[p] = view.blur[0] * centre[p * plane];
#pragma unroll 2
    for (int i = 1; i < view.blur_taps; ++i) {
        const float weight = view.blur[i];
#pragma unroll
        for (int p = 0; p < PLANES; ++p) {
            const float* const value = centre + p * plane;
            sums[p] += weight * (value[-i * stride] + value[i * stride]);
        }
    }
}

// The tile's levels of the channels from `channel` on, after all changes. Each of the dynamic shared memory's two parts
// has PLANES planes: a strip of [strip_rows][extent] and blurred rows of [extent][TILE], extent = TILE + 2 * reach.
template <int PLANES>
__device__ __forceinline__ void change_tile(const AugmentView& view, const float* __restrict__ planes, const Tile& tile,
                                            float mean, int size, bool reflect, float* shared, int strip_rows,
                                            int channel, float (&levels)[OWN_ROWS][3]) {
    const int reach = view.blur_taps - 1, extent = TILE + 2 * reach;
    const int strip_plane = strip_rows * extent, blurred_plane = extent * TILE;
    float* const strip = shared;
    float* const blurred = shared + PLANES * strip_plane;
    const int plane = size * size;
    for (int top = 0; top < extent; top += strip_rows) {
        const int rows = min(strip_rows, extent - top);
#pragma unroll 1 // all warps of a full multiprocessor hide more than two pixels a thread would
        for (int i = threadIdx.x; i < rows * extent; i += TILE_THREADS) {
            const int y = inside(tile.top - reach + top + i / extent, size, reflect);
            const int x = inside(tile.left - reach + i % extent, size, reflect);
            float pixel[1][3];
#pragma unroll
            for (int c = 0; c < 3; ++c) pixel[0][c] = planes[c * plane + y * size + x];
            jitter(pixel, view, view.before_contrast, view.operations, mean);
            if (view.grayscale) pixel[0][0] = pixel[0][1] = pixel[0][2] = luma(pixel[0]);
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                if (PLANES == 3 || c == channel) strip[(c % PLANES) * strip_plane + i] = pixel[0][c];
            }
        }
        __syncthreads();
        for (int r = tile.warp; r < rows; r += TILE_WARPS) {
            float sums[PLANES];
            convolve(view, strip + r * extent + reach + tile.lane, 1, strip_plane, sums);
#pragma unroll
            for (int p = 0; p < PLANES; ++p) blurred[p * blurred_plane + (top + r) * TILE + tile.lane] = sums[p];
        }
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < OWN_ROWS; ++k) {
        const int row = tile.warp + k * TILE_WARPS + reach;
        float sums[PLANES];
        convolve(view, blurred + row * TILE + tile.lane, TILE, blurred_plane, sums);
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            if (PLANES == 3 || c == channel) levels[k][c] = sums[c % PLANES];
        }
    }
}

// A pixel of so many channels, of which those after the third are zero.
template <int CHANNELS, class T> __device__ __forceinline__ void write_padded(T* to, const float (&p)[3]) {
    constexpr int PIECE = CHANNELS < WIDTH<T> ? CHANNELS : WIDTH<T>;
    const float padded[CHANNELS] = {p[0], p[1], p[2]};
#pragma unroll
    for (int first = 0; first < CHANNELS; first += PIECE) {
        float pack[PIECE];
#pragma unroll
        for (int i = 0; i < PIECE; ++i) pack[i] = padded[first + i];
        store(to + first, pack);
    }
}

// A pixel of 3, 4 or 8 channels.
template <class T> __device__ __forceinline__ void write_pixel(T* to, const float (&p)[3], int channels) {
    if (channels == 8) return write_padded<8>(to, p);
    if (channels == 4) return write_padded<4>(to, p);
#pragma unroll
    for (int c = 0; c < 3; ++c) to[c] = from_float<T>(p[c]);
}

template <int PLANES, class T>
__device__ __forceinline__ void finish(const float* planes, const AugmentView* views, const uint64_t* lumas, T* out,
                                       int size, int channels, bool reflect, int strip_rows,
                                       const Normalisation& normalisation) {
    DYNAMIC_SHARED(float, shared);
    __shared__ AugmentView view;
    __shared__ float mean;
    fetch_view(view, views[blockIdx.y]);
    const int plane = size * size;
    if (threadIdx.x == 0) mean = static_cast<float>(lumas[blockIdx.y] / (LUMA_STEPS * plane));
    __syncthreads();
    const Tile tile(size);
    const float* const from = planes + 3 * int64_t{plane} * blockIdx.y;
    float levels[OWN_ROWS][3];
    for (int channel = 0; channel < 3; channel += PLANES) {
        if (channel > 0) __syncthreads(); // the last channel's blurred rows are used up
        change_tile<PLANES>(view, from, tile, mean, size, reflect, shared, strip_rows, channel, levels);
    }
#pragma unroll
    for (int k = 0; k < OWN_ROWS; ++k) {
        if (!tile.has(k, size)) continue;
#pragma unroll
        for (int c = 0; c < 3; ++c) levels[k][c] = levels[k][c] * normalisation.scale[c] + normalisation.offset[c];
        const int64_t pixel = int64_t{plane} * blockIdx.y + tile.y(k) * size + tile.x();
        write_pixel(out + pixel * channels, levels[k], channels);
    }
}

// Finishes the views of `augment_crop`: out[views][size][size][channels], 3, 4 or 8 channels. `reflect`: how the blur goes
// on past the border. The second is for a blur that reaches so far that shared memory has room for one channel only.
// Grid: tiles of a view x views; shared memory as `change_tile` says, for the largest reach.
#define FINISH(name, T, PLANES)                                                                                        \
    KERNEL_RESIDENT(TILE_THREADS, 3)                                                                                   \
    name(const float* planes, const AugmentView* views, const uint64_t* lumas, T* out, int32_t size, int32_t channels, \
         int32_t reflect, int32_t strip_rows, Normalisation normalisation) {                                           \
        finish<PLANES>(planes, views, lumas, out, size, channels, reflect != 0, strip_rows, normalisation);            \
    }                                                                                                                  \
    EXPORT(name)
#define INSTANTIATE(T, S)            \
    FINISH(augment_finish_##S, T, 3) \
    FINISH(augment_finish_far_##S, T, 1)
FOR_EACH_TYPE(INSTANTIATE)
