// Products of many rows with a frozen int8 matrix, for training the layers around it: x Wᵀ in the forward pass, and dy W, the
// gradient of x, in the backward pass. Both use the same integers, so the gradient is exactly that of the forward pass.
//
// W is stored once, row by row. For each product, a thread copies a panel of W into its own cache, where it lies in the order in
// which it is read, as 16-bit integers; hundreds of rows of x are then multiplied with the panel, so the copy costs little. The
// rows of x are rounded to 16 bits, with one scale per row and block of K_BLOCK numbers. One instruction then multiplies twice as
// many 16-bit integers as floats.
#include "products.h"

namespace {

constexpr int SEGMENT = 8 * K_BLOCK;  // inputs of a panel: P x SEGMENT 16-bit integers fit in the L2 cache

// The matrix of a product with O outputs and I inputs: W itself, or Wᵀ. out and in are the steps from one output or input to the
// next, one of which is 1.
struct Matrix {
    const int8_t* weight;
    int64_t out, in;
    int32_t O, I;
};

// Rounds n numbers, multiplied by in_scale, to 16 bits, and fills the rest of the last pair with 0. Returns the value of a 1.
float round_block(const float* from, const float* in_scale, int n, int16_t* to) {
    alignas(64) float x[K_BLOCK];
    if (in_scale) for (int i = 0; i < n; i++) x[i] = from[i] * in_scale[i];
    if (n % 2) to[n] = 0;
    return round_to_16_bits(in_scale ? x : from, n, to);
}

// Copies P outputs and n inputs of the matrix into a panel (n / 2, P, 2), and fills it with 0 beyond the matrix.
void copy_panel(const Matrix& m, int output, int input, int n, int16_t* panel) {
    const int width = std::min(P, m.O - output);
    const int8_t* from = m.weight + output * m.out + input * m.in;
    if (width < P || n % 2) std::fill(panel, panel + (n + 1) / 2 * 2 * P, (int16_t)0);
    if (m.out == 1 && width == P) {
        for (int i = 0; i + 2 <= n; i += 2) {
            const int8_t *first = from + i * m.in, *second = first + m.in;
            for (int o = 0; o < P; o++) {
                panel[i * P + 2 * o] = first[o];
                panel[i * P + 2 * o + 1] = second[o];
            }
        }
        if (n % 2) for (int o = 0; o < P; o++) panel[(n - 1) * P + 2 * o] = from[(n - 1) * m.in + o];
        return;
    }
    for (int o = 0; o < width; o++)
        for (int i = 0; i < n; i++) panel[i / 2 * 2 * P + 2 * o + i % 2] = from[o * m.out + i * m.in];
}

// sums (R, P) = x (R, n) panel, for n inputs in blocks with their own scales.
template <int R> void multiply(const int16_t* panel, const int16_t* x, const float* scale, int n, float* sums) {
    vec total[R][3] = {};
    for (int first = 0; first < n; first += K_BLOCK, scale++) {
        ints sum[R][3] = {};
        const int end = std::min(n, first + K_BLOCK);
        for (int k = first; k < end; k += 2) {
            shorts w[3] = {load<shorts>(panel + k * P), load<shorts>(panel + k * P + 2 * LANES), load<shorts>(panel + k * P + 4 * LANES)};
            IN_REGISTERS(w[0], w[1], w[2]);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const int32_t pair = load<int32_t>(x + r * SEGMENT + k);
#pragma GCC unroll 3
                for (int i = 0; i < 3; i++) sum[r][i] = dot(sum[r][i], w[i], pair);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
            for (int i = 0; i < 3; i++)
                total[r][i] += __builtin_convertvector(sum[r][i], vec) * scale[r * (SEGMENT / K_BLOCK)];
    }
    std::memcpy(sums, total, sizeof total);
}
template <int R> void multiply(int rows, const int16_t* panel, const int16_t* x, const float* scale, int n, float* sums) {
    if constexpr (R > 1)
        if (rows < R) return multiply<R - 1>(rows, panel, x, scale, n, sums);
    multiply<R>(panel, x, scale, n, sums);
}

}  // namespace

// y (M, O) = x (M, I) Mᵀ + bias, where M (O, I) is W (N, K), or Wᵀ if `transposed`. scale (N) belongs to the rows of W. The rows
// of x and y start x_step and y_step numbers after each other. x16 has room for M x SEGMENT 16-bit integers, and x_scale for
// M x SEGMENT / K_BLOCK floats. Every output is added up in the same order, however many rows and threads there are.
extern "C" void frozen_product(const int8_t* weight, const float* scale, const float* bias, int32_t N, int32_t K, int32_t transposed,
                               const float* x, int64_t x_step, int32_t M, float* y, int64_t y_step, int16_t* x16, float* x_scale,
                               int32_t n_threads) {
    const Matrix m = transposed ? Matrix{weight, 1, K, K, N} : Matrix{weight, K, 1, N, K};
    const float *in_scale = transposed ? scale : nullptr, *out_scale = transposed ? nullptr : scale;
    const int n_panels = (m.O + P - 1) / P;
    (void)n_threads;
#pragma omp parallel num_threads(n_threads)
    for (int input = 0; input < m.I; input += SEGMENT) {
        const int n = std::min(SEGMENT, m.I - input);
#pragma omp for
        for (int row = 0; row < M; row++)
            for (int k = 0; k < n; k += K_BLOCK)
                x_scale[row * (SEGMENT / K_BLOCK) + k / K_BLOCK] =
                    round_block(x + row * x_step + input + k, in_scale ? in_scale + input + k : nullptr, std::min(K_BLOCK, n - k),
                                x16 + (int64_t)row * SEGMENT + k);
#pragma omp for schedule(dynamic)
        for (int p = 0; p < n_panels; p++) {
            alignas(64) int16_t panel[SEGMENT * P];
            const int output = p * P, width = std::min(P, m.O - output);
            copy_panel(m, output, input, n, panel);
            for (int row = 0; row < M; row += INT_ROWS) {
                alignas(64) float sums[INT_ROWS * P];
                const int n_rows = std::min(INT_ROWS, M - row);
                multiply<INT_ROWS>(n_rows, panel, x16 + (int64_t)row * SEGMENT, x_scale + row * (SEGMENT / K_BLOCK), n, sums);
                for (int r = 0; r < n_rows; r++) {
                    float *sum = sums + r * P, *to = y + (row + r) * y_step + output;
                    if (input > 0) for (int i = 0; i < width; i++) sum[i] += to[i];
                    if (input + n == m.I) {
                        if (out_scale) for (int i = 0; i < width; i++) sum[i] *= out_scale[output + i];
                        if (bias) for (int i = 0; i < width; i++) sum[i] += bias[output + i];
                    }
                    std::copy(sum, sum + width, to);
                }
            }
        }
    }
}

// The number of 16-bit integers of x16 and of floats of x_scale for each row.
extern "C" int32_t frozen_segment() { return SEGMENT; }
extern "C" int32_t frozen_blocks() { return SEGMENT / K_BLOCK; }
