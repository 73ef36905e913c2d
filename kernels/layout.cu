// Conversions between layouts: NCHW as PyTorch has it, NHWC as the engine has it, and NHWC with more channels
// (convolutions want multiples of 8; the added channels are zero). A convolution's weights, [c_out][kh][kw][c_in], pad
// like an image.
#include "common.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// NCHW and NHWC: a transposition of each image, [channels] x [pixels], tile by tile through shared memory, so that
// reads and writes both run along memory. A tile has all channels where they are few, else 32. Grid: tiles of pixels,
// tiles of channels, images.

constexpr int TILE = 1024;        // elements
constexpr int TILE_CHANNELS = 32; // at most

struct Tile {
    int channels, pixels; // size of a full tile
    int pitch;            // of a channel in shared memory; odd for 32 channels, which keeps its banks apart
    int c0, valid_channels, valid_pixels;
    int64_t p0;

    // The tile of this block where NHWC has `channels` channels.
    __device__ __forceinline__ Tile(int64_t pixels_of_image, int channels_of_image) {
        channels = channels_of_image < TILE_CHANNELS ? channels_of_image : TILE_CHANNELS;
        pixels = TILE / channels;
        pitch = pixels + 1;
        c0 = blockIdx.y * channels;
        p0 = int64_t{blockIdx.x} * pixels;
        valid_channels = channels_of_image - c0 < channels ? channels_of_image - c0 : channels;
        valid_pixels = int(pixels_of_image - p0 < pixels ? pixels_of_image - p0 : pixels);
    }
};

// y[n][p][c] = c < channels ? x[n][c][p] : 0 for c < padded.
template <class T>
__device__ __forceinline__ void nchw_to_nhwc(const float* __restrict__ x, T* __restrict__ y, int64_t images,
                                             int64_t pixels, int channels, int padded) {
    __shared__ float values[TILE + TILE_CHANNELS];
    const Tile tile(pixels, padded);
    for (int64_t n = blockIdx.z; n < images; n += gridDim.z) {
        __syncthreads(); // the image before has been written
        for (int e = threadIdx.x; e < tile.channels * tile.pixels; e += blockDim.x) {
            const int c = e / tile.pixels, p = e % tile.pixels;
            if (c >= tile.valid_channels || p >= tile.valid_pixels) continue;
            const bool exists = tile.c0 + c < channels;
            values[c * tile.pitch + p] = exists ? x[(n * channels + tile.c0 + c) * pixels + tile.p0 + p] : 0.0f;
        }
        __syncthreads();
        for (int e = threadIdx.x; e < tile.channels * tile.valid_pixels; e += blockDim.x) {
            const int p = e / tile.channels, c = e % tile.channels;
            if (c >= tile.valid_channels) continue;
            y[(n * pixels + tile.p0 + p) * padded + tile.c0 + c] = from_float<T>(values[c * tile.pitch + p]);
        }
    }
}

// y[n][c][p] = x[n][p][c] for c < channels, of the `padded` that x has.
template <class T>
__device__ __forceinline__ void nhwc_to_nchw(const T* __restrict__ x, float* __restrict__ y, int64_t images,
                                             int64_t pixels, int channels, int padded) {
    __shared__ float values[TILE + TILE_CHANNELS];
    const Tile tile(pixels, padded);
    for (int64_t n = blockIdx.z; n < images; n += gridDim.z) {
        __syncthreads();
        for (int e = threadIdx.x; e < tile.channels * tile.valid_pixels; e += blockDim.x) {
            const int p = e / tile.channels, c = e % tile.channels;
            if (c >= tile.valid_channels) continue;
            values[c * tile.pitch + p] = to_float(x[(n * pixels + tile.p0 + p) * padded + tile.c0 + c]);
        }
        __syncthreads();
        for (int e = threadIdx.x; e < tile.channels * tile.pixels; e += blockDim.x) {
            const int c = e / tile.pixels, p = e % tile.pixels;
            if (tile.c0 + c >= channels || p >= tile.valid_pixels) continue;
            y[(n * channels + tile.c0 + c) * pixels + tile.p0 + p] = values[c * tile.pitch + p];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Channels of NHWC. Grid-stride over what is written; neighbouring threads read neighbouring memory in both.

// a / b, by the much shorter division of 32 bits where that is enough.
__device__ __forceinline__ int64_t divide(int64_t a, int b) {
    return a <= UINT32_MAX ? int64_t{uint32_t(a) / uint32_t(b)} : a / b;
}

// N elements a thread: y[r][c] = c < channels ? x[r][c] : 0 for c < padded, a multiple of N.
template <int N, class T>
__device__ __forceinline__ void pad_channels(const T* __restrict__ x, T* __restrict__ y, int64_t rows, int channels,
                                             int padded) {
    for (int64_t i = global_thread(); i < rows * (padded / N); i += global_threads()) {
        const int64_t row = divide(i, padded / N);
        const int c = int(i - row * (padded / N)) * N;
        float v[N];
#pragma unroll
        for (int k = 0; k < N; ++k) v[k] = c + k < channels ? to_float(x[row * channels + c + k]) : 0.0f;
        store(y + row * padded + c, v);
    }
}

// d_x[r][c] = d_y[r][c] for c < channels, of the `padded` that d_y has; or added to it.
template <class T>
__device__ __forceinline__ void pad_channels_backward(const T* __restrict__ d_y, T* __restrict__ d_x, int64_t rows,
                                                      int channels, int padded, bool accumulate) {
    for (int64_t i = global_thread(); i < rows * channels; i += global_threads()) {
        const int64_t row = divide(i, channels);
        float v[1] = {to_float(d_y[row * padded + (i - row * channels)])};
        store_or_add(d_x + i, v, accumulate);
    }
}

#define INSTANTIATE(T, S)                                                                                              \
    KERNEL(256)                                                                                                        \
    nchw_to_nhwc_##S(const float* x, T* y, int64_t images, int64_t pixels, int32_t channels, int32_t padded) {         \
        nchw_to_nhwc(x, y, images, pixels, channels, padded);                                                          \
    }                                                                                                                  \
    EXPORT(nchw_to_nhwc_##S)                                                                                           \
    KERNEL(256)                                                                                                        \
    nhwc_to_nchw_##S(const T* x, float* y, int64_t images, int64_t pixels, int32_t channels, int32_t padded) {         \
        nhwc_to_nchw(x, y, images, pixels, channels, padded);                                                          \
    }                                                                                                                  \
    EXPORT(nhwc_to_nchw_##S)                                                                                           \
    KERNEL(256) pad_channels_##S(const T* x, T* y, int64_t rows, int32_t channels, int32_t padded) {                   \
        if (padded % WIDTH<T> == 0) {                                                                                  \
            pad_channels<WIDTH<T>>(x, y, rows, channels, padded);                                                      \
        } else {                                                                                                       \
            pad_channels<1>(x, y, rows, channels, padded);                                                             \
        }                                                                                                              \
    }                                                                                                                  \
    EXPORT(pad_channels_##S)                                                                                           \
    KERNEL(256)                                                                                                        \
    pad_channels_backward_##S(const T* d_y, T* d_x, int64_t rows, int32_t channels, int32_t padded,                    \
                              int32_t accumulate) {                                                                    \
        pad_channels_backward(d_y, d_x, rows, channels, padded, accumulate);                                           \
    }                                                                                                                  \
    EXPORT(pad_channels_backward_##S)
FOR_EACH_TYPE(INSTANTIATE)
