// Sums of the columns of a matrix, the gradient of a bias: who shares the rows, and how precise the sums are.
#include "lab.cuh"

#include "../../kernels/bias.cu"

// A thread per column, one chain in float.
KERNEL(256) column_sums_by_thread(const bf16* x, float* sums, int64_t rows, int32_t n) {
    const int64_t c = global_thread();
    if (c >= n) return;
    float sum = 0.0f;
    for (int64_t r = 0; r < rows; ++r) sum += to_float(x[r * n + c]);
    sums[c] = sum;
}
EXPORT(column_sums_by_thread)

int main() {
    const int64_t rows = lab::EMULATED ? 3001 : 100'003;
    const int32_t n = lab::EMULATED ? 264 : 2048;
    const std::vector<bf16> values = lab::to_bf16(lab::normal(rows * n, 0.5f, 1.0f, 2));
    const lab::Array<bf16> x(values);
    const lab::Array<float> sums(n);
    std::vector<double> expected(n);
    for (int64_t i = 0; i < rows * n; ++i) expected[i % n] += __bfloat162float(values[i]);
    const auto error = [&] { return lab::error(sums.host(), expected); };

    const unsigned tiles = (n + 255) / 256; // 32 lanes of 8 columns
    const auto in_parts = [&](unsigned parts, const lab::Array<double>& partial) {
        LAUNCH(sum_rows_bf16, dim3(tiles, parts), x.get(), partial.get(), rows, n, (rows + parts - 1) / parts);
        LAUNCH(sum_rows_finish, dim3((n + 31) / 32), partial.get(), sums.get(), int32_t(parts), n, 0);
    };
    const unsigned parts = unsigned((rows + 127) / 128); // chains of 16 rows in each of 8 warps
    const lab::Array<double> one(n), all(size_t(parts) * n);

    lab::Ladder ladder("column sums, bf16", double(rows) * n * sizeof(bf16));
    const auto by_thread = [&] { LAUNCH(column_sums_by_thread, dim3((n + 255) / 256), x.get(), sums.get(), rows, n); };
    ladder.variant("a thread per column, one chain", by_thread, error, 1e-3);
    ladder.variant("16 bytes a thread, a block per 256 columns", [&] { in_parts(1, one); }, error, 1e-5);
    ladder.variant("the rows in parts as well (shipped)", [&] { in_parts(parts, all); }, error, 5e-7);
}
