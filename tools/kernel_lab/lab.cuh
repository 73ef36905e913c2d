// What the programs of the kernel lab share: arrays on the device, launches, and the table of a ladder. The same source
// runs on a GPU and, with -DSIMSIAM_EMULATOR, under the emulator: there results are checked and nothing is timed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "../../kernels/ceilings.cu"

#ifdef SIMSIAM_EMULATOR
#include "emulator/launch.h"
#endif

namespace lab {

[[noreturn]] inline void fail(const char* what, const char* why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

// ---------------------------------------------------------------------------------------------------------------------
// The device.

#ifdef SIMSIAM_EMULATOR

constexpr bool EMULATED = true;

inline void* allocate(size_t bytes) { return simsiam_emulator_allocate(bytes); }
inline void release(void* memory) { simsiam_emulator_free(memory); }
inline void copy(void* to, const void* from, size_t bytes) { simsiam_emulator_copy(to, from, bytes); }

inline const emulator::Kernel* find(const char* name) {
    for (uint32_t i = 0; i < simsiam_emulator_kernels(); ++i) {
        const emulator::Kernel* kernel = simsiam_emulator_kernel(i);
        if (strcmp(kernel->name, name) == 0) return kernel;
    }
    fail(name, "not exported");
}

template <class... P, class... A> void launch(const char* name, void (*)(P...), dim3 grid, A... arguments) {
    std::tuple<P...> values(static_cast<P>(arguments)...);
    std::apply(
        [&](auto&... value) {
            const void* pointers[] = {&value...};
            const emulator::Kernel* kernel = find(name);
            const emulator::Launch launch = {
                kernel, const_cast<void* const*>(pointers), {grid.x, grid.y, grid.z}, {kernel->threads, 1, 1}, 0, 2, 0};
            char fault[1000];
            if (!simsiam_emulator_launch(&launch, fault, sizeof fault)) fail(name, fault);
        },
        values);
}
#define LAUNCH(kernel, grid, ...) lab::launch(#kernel, kernel, grid, __VA_ARGS__)

template <class F> double milliseconds(F) { return 0.0; }

#else

constexpr bool EMULATED = false;

inline void check(cudaError_t error) {
    if (error != cudaSuccess) fail("CUDA", cudaGetErrorString(error));
}

inline void* allocate(size_t bytes) {
    void* memory;
    check(cudaMalloc(&memory, bytes));
    return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void copy(void* to, const void* from, size_t bytes) { check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }

// All kernels of the lab have blocks of 256 threads.
#define LAUNCH(kernel, grid, ...)            \
    do {                                     \
        kernel<<<grid, 256>>>(__VA_ARGS__);  \
        lab::check(cudaGetLastError());      \
    } while (false)

// The median of 15 measurements of 10 runs each, after a few to warm up.
template <class F> double milliseconds(F run) {
    constexpr int MEASUREMENTS = 15, RUNS = 10;
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    for (int i = 0; i < RUNS; ++i) run();
    std::vector<float> times(MEASUREMENTS);
    for (float& time : times) {
        check(cudaEventRecord(begin));
        for (int i = 0; i < RUNS; ++i) run();
        check(cudaEventRecord(end));
        check(cudaEventSynchronize(end));
        check(cudaEventElapsedTime(&time, begin, end));
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    std::nth_element(times.begin(), times.begin() + MEASUREMENTS / 2, times.end());
    return times[MEASUREMENTS / 2] / RUNS;
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Arrays.

template <class T> class Array {
  public:
    explicit Array(size_t n) : n_(n), data_(static_cast<T*>(allocate(n * sizeof(T)))) {}
    explicit Array(const std::vector<T>& values) : Array(values.size()) { copy(data_, values.data(), n_ * sizeof(T)); }
    Array(Array&& other) : n_(other.n_), data_(std::exchange(other.data_, nullptr)) {}
    Array(const Array&) = delete;
    ~Array() { release(data_); }

    T* get() const { return data_; }
    std::vector<T> host() const {
        std::vector<T> values(n_);
        copy(values.data(), data_, n_ * sizeof(T));
        return values;
    }

  private:
    size_t n_;
    T* data_;
};

inline std::vector<float> normal(size_t n, float mean, float deviation, unsigned seed) {
    std::minstd_rand generator(seed);
    std::normal_distribution<float> draw(mean, deviation);
    std::vector<float> values(n);
    for (float& value : values) value = draw(generator);
    return values;
}

inline std::vector<bf16> to_bf16(const std::vector<float>& values) {
    std::vector<bf16> rounded(values.size());
    for (size_t i = 0; i < values.size(); ++i) rounded[i] = __float2bfloat16_rn(values[i]);
    return rounded;
}

// The largest error, relative to the largest value that is expected.
template <class T> double error(const std::vector<T>& got, const std::vector<double>& expected) {
    double largest = 1e-300, worst = 0.0;
    for (double value : expected) largest = std::max(largest, std::fabs(value));
    for (size_t i = 0; i < expected.size(); ++i) {
        const double difference = std::fabs(double(got[i]) - expected[i]);
        if (!(difference <= worst)) worst = difference; // a NaN stays
    }
    return worst / largest;
}

// Blocks of a grid-stride loop over `items`.
inline dim3 blocks(int64_t items) { return dim3(unsigned(std::clamp<int64_t>((items + 255) / 256, 1, 4096))); }

// ---------------------------------------------------------------------------------------------------------------------
// The table of a ladder; beside it, a copy that moves as many bytes.

class Ladder {
  public:
    Ladder(const char* name, double bytes) : bytes_(bytes) {
        printf("%s, %.1f MB\n", name, bytes / 1e6);
        printf("  %-44s %10s %8s %8s %10s\n", "variant", "us", "GB/s", "of copy", "error");
        const int64_t n = int64_t(bytes / 2 / sizeof(float));
        const Array<float> from(std::vector<float>(n, 1.0f)), to(n);
        copy_ = milliseconds([&] { LAUNCH(ceiling_copy, blocks(n / 4), from.get(), to.get(), n); });
        row("(device copy)", copy_, 0.0);
    }

    // Runs a variant, checks it by `error`, which looks at its result and is to be `allowed` at most, and times it.
    template <class F, class E> void variant(const char* name, F run, E error, double allowed) {
        run();
        const double e = error();
        row(name, milliseconds(run), e);
        if (!(e <= allowed)) {
            char why[100];
            snprintf(why, sizeof why, "error %.3g, allowed %.3g", e, allowed);
            fail(name, why);
        }
    }

  private:
    void row(const char* name, double time, double error) const {
        if (EMULATED) {
            printf("  %-44s %10s %8s %8s %10.2g\n", name, "-", "-", "-", error);
        } else {
            const double rate = bytes_ / time / 1e6, share = 100.0 * copy_ / time;
            printf("  %-44s %10.1f %8.0f %7.0f%% %10.2g\n", name, time * 1e3, rate, share, error);
        }
    }

    double bytes_, copy_;
};

} // namespace lab
