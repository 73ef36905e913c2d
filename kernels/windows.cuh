// The windows of a max pooling on the way back: each has left a byte for each of its channels, which says where its gradient
// goes. And those of the ResNet stem, whose sizes are known when this is compiled.
#pragma once
#include "common.cuh"

// Instead of a position in the window, counted row by row: the gradient goes nowhere.
constexpr uint8_t NONE = 255;

// The pooling of the stem: 3x3 with stride 2 and padding 1.
constexpr int SIZE = 3, STRIDE = 2, PADDING = 1;

// Two by two pixels of x, and N channels of them: the least that whole windows can be said to lie over. The window (r, s) of four
// begins 2 r - 1 rows below and 2 s - 1 columns right of the first pixel, so which of its positions a pixel is at is known when
// this is compiled. P has the sizes of x (h, w, c) and of y (oh, ow).
template <int N> struct Quad {
    int64_t image;
    int row, column; // of its first pixel
    int channel;

    __device__ __forceinline__ Quad(int64_t image, int down, int across, int channel)
        : image(image), row(down * STRIDE), column(across * STRIDE), channel(channel) {}

    // By its number, of less than 2^31.
    template <class P> __device__ __forceinline__ static Quad numbered(int64_t number, int channel, const P& p) {
        const unsigned of_image = unsigned(p.oh) * unsigned(p.ow), of_all = unsigned(number);
        const unsigned image = of_all / of_image, rest = of_all - image * of_image, down = rest / unsigned(p.ow);
        return Quad(image, int(down), int(rest - down * unsigned(p.ow)), channel);
    }

    template <class P> __device__ __forceinline__ bool has(int i, int j, const P& p) const {
        return row + i < p.h && column + j < p.w;
    }

    // The first element of a pixel.
    template <class P> __device__ __forceinline__ int64_t element(int i, int j, const P& p) const {
        return image * (int64_t{p.h} * p.w * p.c) + ((row + i) * p.w + column + j) * p.c + channel;
    }

    // x in row i; 0 outside.
    template <class T, class P> __device__ __forceinline__ void load_pixels(float (&v)[2][N], const T* x, int i, const P& p) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int k = 0; k < N; ++k) v[j][k] = 0.0f;
            if (has(i, j, p)) load(v[j], x + element(i, j, p));
        }
    }
};

// The four windows over a quad: their gradients, and the positions that took them. As they lie in memory: they stay in registers
// while both rows of the quad are worked on.
template <int N, class T> struct QuadWindows {
    Pack<T, N> gradient[2][2];
    Pack<uint8_t, N> taken[2][2];

    template <class P>
    __device__ __forceinline__ QuadWindows(const Quad<N>& quad, const T* __restrict__ d_y, const uint8_t* __restrict__ taken_by,
                                           const P& p) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const int oy = quad.row / STRIDE + r, ox = quad.column / STRIDE + s;
                gradient[r][s] = {};
#pragma unroll
                for (int k = 0; k < N; ++k) taken[r][s].element[k] = NONE;
                if (oy >= p.oh || ox >= p.ow) continue;
                const int64_t from = quad.image * (int64_t{p.oh} * p.ow * p.c) + (oy * p.ow + ox) * p.c + quad.channel;
                gradient[r][s] = *reinterpret_cast<const Pack<T, N>*>(d_y + from);
                taken[r][s] = *reinterpret_cast<const Pack<uint8_t, N>*>(taken_by + from);
            }
    }

    // The gradient in front of the pooling in row i: of each pixel that of the windows that took it. 0 outside.
    __device__ __forceinline__ void gather(float (&g)[2][N], int i) const {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int k = 0; k < N; ++k) {
                float sum = 0.0f;
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int s = 0; s < 2; ++s) {
                        const int ky = i + PADDING - STRIDE * r, kx = j + PADDING - STRIDE * s;
                        if (ky < 0 || kx < 0) continue; // the window begins behind the pixel
                        sum += taken[r][s].element[k] == ky * SIZE + kx ? to_float(gradient[r][s].element[k]) : 0.0f;
                    }
                g[j][k] = sum;
            }
    }
};
