// ReLU: what 16-byte accesses are worth.
#include "lab.cuh"

#include "../../kernels/relu.cu"

// One element at a time.
KERNEL(256) relu_scalar(const bf16* x, bf16* y, int64_t n) {
    for (int64_t i = global_thread(); i < n; i += global_threads()) {
        const float v = to_float(x[i]);
        y[i] = from_float<bf16>(v > 0.0f ? v : 0.0f);
    }
}
EXPORT(relu_scalar)

// 8 bytes at a time.
KERNEL(256) relu_half(const bf16* x, bf16* y, int64_t n) {
    for_each_pack<WIDTH<bf16> / 2>(n, [=](int64_t i, auto count) {
        float v[decltype(count)::value];
        load(v, x + i);
        for (float& element : v) element = element > 0.0f ? element : 0.0f;
        store(y + i, v);
    });
}
EXPORT(relu_half)

int main() {
    const int64_t n = lab::EMULATED ? 100'003 : int64_t{256} * 56 * 56 * 256;
    const std::vector<bf16> values = lab::to_bf16(lab::normal(n, 0.1f, 1.0f, 1));
    const lab::Array<bf16> x(values), y(n);
    std::vector<double> expected(n);
    for (int64_t i = 0; i < n; ++i) expected[i] = std::max(__bfloat162float(values[i]), 0.0f);
    const auto error = [&] {
        std::vector<float> got;
        for (bf16 value : y.host()) got.push_back(__bfloat162float(value));
        return lab::error(got, expected);
    };

    lab::Ladder ladder("ReLU, bf16", 2.0 * n * sizeof(bf16));
    const auto by_2 = [&] { LAUNCH(relu_scalar, lab::blocks(n), x.get(), y.get(), n); };
    const auto by_8 = [&] { LAUNCH(relu_half, lab::blocks(n / 4), x.get(), y.get(), n); };
    const auto by_16 = [&] { LAUNCH(relu_bf16, lab::blocks(n / 8), x.get(), y.get(), n); };
    ladder.variant("2 bytes at a time", by_2, error, 0.0);
    ladder.variant("8 bytes", by_8, error, 0.0);
    ladder.variant("16 bytes (shipped)", by_16, error, 0.0);
}
