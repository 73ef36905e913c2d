// SGD over the parameters of ResNet-50: what a launch for each of the 159 costs.
#include "lab.cuh"

#include "../../kernels/sgd.cu"

// One parameter, N elements at a time.
template <int N>
__device__ __forceinline__ void sgd_alone(float* w, float* v, const float* d_w, int64_t n, const double* step_params) {
    const Hyper hyper = {float(step_params[0]), float(step_params[MOMENTUM]), float(step_params[WEIGHT_DECAY]), 1.0f};
    for_each_pack<N>(n, [=](int64_t i, auto count) {
        constexpr int M = decltype(count)::value;
        float a[M], b[M], g[M];
        load(a, w + i);
        load(b, v + i);
        load(g, d_w + i);
#pragma unroll
        for (int k = 0; k < M; ++k) {
            b[k] = hyper.momentum * b[k] + (g[k] + hyper.weight_decay * a[k]);
            a[k] -= hyper.lr * b[k];
        }
        store(v + i, b);
        store(w + i, a);
    });
}

KERNEL(256) sgd_scalar(float* w, float* v, const float* d_w, int64_t n, const double* step_params) {
    sgd_alone<1>(w, v, d_w, n, step_params);
}
EXPORT(sgd_scalar)

KERNEL(256) sgd_packs(float* w, float* v, const float* d_w, int64_t n, const double* step_params) {
    sgd_alone<4>(w, v, d_w, n, step_params);
}
EXPORT(sgd_packs)

// Sizes of all parameters but the classifier's; `width` is 64.
static std::vector<int64_t> resnet50(int64_t width) {
    std::vector<int64_t> sizes = {width * 7 * 7 * 3, width, width};
    const auto conv = [&](int64_t from, int64_t to, int64_t kernel) {
        sizes.insert(sizes.end(), {from * to * kernel * kernel, to, to}); // with its batch norm
    };
    int64_t from = width;
    const int depths[] = {3, 4, 6, 3};
    for (int stage = 0; stage < 4; ++stage) {
        const int64_t inner = width << stage;
        for (int block = 0; block < depths[stage]; ++block) {
            conv(from, inner, 1);
            conv(inner, inner, 3);
            conv(inner, 4 * inner, 1);
            if (block == 0) conv(from, 4 * inner, 1);
            from = 4 * inner;
        }
    }
    return sizes;
}

int main() {
    const std::vector<int64_t> sizes = resnet50(lab::EMULATED ? 5 : 64);
    const std::vector<double> hyper = {0.05, 0.05, 0.9, 1e-4};
    const lab::Array<double> step_params(hyper);
    std::vector<lab::Array<float>> w, v, d_w;
    std::vector<double> expected;
    std::vector<std::vector<float>> start[2];
    Parameters table = {};
    uint32_t chunks = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
        const int64_t n = sizes[i];
        const std::vector<float> g = lab::normal(n, 0.0f, 0.1f, unsigned(3 * i + 2));
        for (unsigned which : {0u, 1u}) start[which].push_back(lab::normal(n, 0.0f, 1.0f, unsigned(3 * i + which)));
        w.emplace_back(start[0][i]);
        v.emplace_back(start[1][i]);
        d_w.emplace_back(g);
        for (int64_t k = 0; k < n; ++k) {
            const float new_v = float(hyper[2]) * start[1][i][k] + (g[k] + float(hyper[3]) * start[0][i][k]);
            expected.push_back(start[0][i][k] - float(hyper[0]) * new_v);
        }
        table.at[i] = {w[i].get(), v[i].get(), d_w[i].get(), nullptr, n, chunks, 0, 0};
        chunks += uint32_t((n + CHUNK - 1) / CHUNK);
    }
    // Every variant starts from the same values; what is timed goes on from there.
    const auto restore = [&] {
        for (size_t i = 0; i < sizes.size(); ++i) {
            lab::copy(w[i].get(), start[0][i].data(), sizes[i] * sizeof(float));
            lab::copy(v[i].get(), start[1][i].data(), sizes[i] * sizeof(float));
        }
    };
    const auto error = [&] {
        std::vector<float> got;
        for (const auto& array : w) {
            const std::vector<float> values = array.host();
            got.insert(got.end(), values.begin(), values.end());
        }
        return lab::error(got, expected);
    };

    printf("%zu parameters, %zu elements: ", sizes.size(), expected.size());
    lab::Ladder ladder("SGD", 5.0 * expected.size() * sizeof(float));
    const auto for_each_parameter = [&](auto launch) {
        for (size_t i = 0; i < sizes.size(); ++i) launch(w[i].get(), v[i].get(), d_w[i].get(), sizes[i]);
    };
    const auto by_4 = [&](float* w, float* v, const float* d_w, int64_t n) {
        LAUNCH(sgd_scalar, lab::blocks(n), w, v, d_w, n, step_params.get());
    };
    const auto by_16 = [&](float* w, float* v, const float* d_w, int64_t n) {
        LAUNCH(sgd_packs, lab::blocks(n / 4), w, v, d_w, n, step_params.get());
    };
    const auto all = [&] { LAUNCH(sgd_f32, dim3(chunks), table, int32_t(sizes.size()), step_params.get()); };
    ladder.variant("a launch for each, 4 bytes at a time", [&] { for_each_parameter(by_4); }, error, 0.0);
    restore();
    ladder.variant("a launch for each, 16 bytes", [&] { for_each_parameter(by_16); }, error, 0.0);
    restore();
    ladder.variant("one launch for all (shipped)", all, error, 0.0);
}
