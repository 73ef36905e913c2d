// Every so many pixels of images, which is what a strided 1x1 convolution reads, and its gradient. Traffic: what is taken is
// read and written once; the gradient writes all of d_x, or reads and writes what is taken.
#include "common.cuh"

constexpr int THREADS = 256;

// Images [images][height][width][channels], of which pixels at multiples of the stride are taken, in packs of channels.
struct Pixels {
    int height, width, packs, stride;

    // The place in y of pack i of x, or -1.
    __device__ __forceinline__ int64_t taken(int64_t i) const {
        const int64_t pixel = i / packs, row = pixel / width, image = row / height;
        const int column = int(pixel - row * width), line = int(row - image * height);
        if (column % stride != 0 || line % stride != 0) return -1;
        const int rows = (height + stride - 1) / stride, columns = (width + stride - 1) / stride;
        return ((image * rows + line / stride) * columns + column / stride) * packs + (i - pixel * packs);
    }

    // The place in x of pack i of y.
    __device__ __forceinline__ int64_t source(int64_t i) const {
        const int rows = (height + stride - 1) / stride, columns = (width + stride - 1) / stride;
        const int64_t pixel = i / packs, row = pixel / columns, image = row / rows;
        const int64_t from = (image * height + (row - image * rows) * stride) * width + (pixel - row * columns) * stride;
        return from * packs + (i - pixel * packs);
    }
};

template <int N, class T>
__device__ __forceinline__ void take(const T* __restrict__ x, T* __restrict__ y, int64_t images, const Pixels& pixels) {
    const int64_t rows = (pixels.height + pixels.stride - 1) / pixels.stride;
    const int64_t columns = (pixels.width + pixels.stride - 1) / pixels.stride, all = images * rows * columns * pixels.packs;
    for (int64_t i = global_thread(); i < all; i += global_threads()) copy_pack<N>(y + i * N, x + pixels.source(i) * N);
}

template <int N, class T>
__device__ __forceinline__ void put(const T* __restrict__ d_y, T* d_x, int64_t images, const Pixels& pixels, bool accumulate) {
    const int64_t all = images * pixels.height * pixels.width * pixels.packs;
    for (int64_t i = global_thread(); i < all; i += global_threads()) {
        const int64_t from = pixels.taken(i);
        float value[N] = {};
        if (from >= 0) load(value, d_y + from * N);
        if (from >= 0 || !accumulate) store_or_add(d_x + i * N, value, accumulate);
    }
}

#define INSTANTIATE(T, S)                                                                                                   \
    KERNEL(THREADS)                                                                                                         \
    subsample_##S(const T* x, T* y, int64_t images, int32_t height, int32_t width, int32_t channels, int32_t stride) {      \
        if (channels % WIDTH<T> == 0) {                                                                                     \
            take<WIDTH<T>>(x, y, images, {height, width, channels / WIDTH<T>, stride});                                     \
        } else {                                                                                                            \
            take<1>(x, y, images, {height, width, channels, stride});                                                       \
        }                                                                                                                   \
    }                                                                                                                       \
    EXPORT(subsample_##S)                                                                                                   \
    KERNEL(THREADS)                                                                                                         \
    subsample_backward_##S(const T* d_y, T* d_x, int64_t images, int32_t height, int32_t width, int32_t channels,           \
                           int32_t stride, int32_t accumulate) {                                                            \
        if (channels % WIDTH<T> == 0) {                                                                                     \
            put<WIDTH<T>>(d_y, d_x, images, {height, width, channels / WIDTH<T>, stride}, accumulate != 0);                 \
        } else {                                                                                                            \
            put<1>(d_y, d_x, images, {height, width, channels, stride}, accumulate != 0);                                   \
        }                                                                                                                   \
    }                                                                                                                       \
    EXPORT(subsample_backward_##S)
FOR_EACH_TYPE(INSTANTIATE)
