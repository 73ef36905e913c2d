// Walking over the positions of images.
#pragma once
#include "common.cuh"

// Calls f(image, row, column, channel) for each pack of N channels of `images` x h x w x c, in a grid-stride loop. A single
// image has less than 2^31 elements.
template <int N, class F>
__device__ __forceinline__ void for_each_position(int64_t images, int h, int w, int c, F f) {
    const int packs = c / N, of_image = h * w * packs;
    for (int64_t i = global_thread(); i < images * of_image; i += global_threads()) {
        const int64_t image = i / of_image;
        const unsigned rest = unsigned(i - image * of_image), position = rest / unsigned(packs);
        const unsigned row = position / unsigned(w);
        f(image, int(row), int(position - row * unsigned(w)), int(rest - position * unsigned(packs)) * N);
    }
}
