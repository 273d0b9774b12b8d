// The parts of a transformer block between its matrix products, forward and backward, in float32: LayerNorm, residual additions,
// dropout, GELU, and attention. training.py calls these functions, and torch computes the matrix products between them.
//
// Memory is what limits all of them except attention, so each reads and writes every number once, and what is quick to compute
// again is not stored: neither normalised rows, nor masks of dropout, nor attention weights.
//
// Results do not depend on the number of threads: every row is computed by one thread, and sums over rows are added in groups
// whose size depends on the number of rows only.
//
// N rows (tokens), C columns, B sequences of T tokens, H heads, D = C / H.
#include "vectors.h"

// Dropout. Whether a number is dropped is a function of a seed, the number's row and its column, so that the backward pass finds
// the same numbers again without a stored mask. `seed` is drawn from torch's generator for every pass through a block. A number
// is kept if 16 random bits are at least `threshold`, and kept numbers are multiplied by `scale`.
struct Dropout {
    uint64_t seed;
    uint32_t threshold;
    float scale;
};

// Mixes all bits of a number (the finaliser of SplitMix64; Steele, Lea & Flood, 2014).
inline uint64_t mixed(uint64_t z) {
    z += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

constexpr int GROUP = 32;  // columns whose random bits are computed together, 32 bits for two columns

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Writes 0 or the scale of dropout for `n` columns of a row, rounded up to GROUP, into `factors`. `first` is a multiple of GROUP.
inline void dropout_factors(const Dropout& dropout, uint64_t row, int first, int n, float* factors) {
    const uint64_t key = mixed(dropout.seed ^ mixed(row));
    const uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32), threshold = dropout.threshold;
    const float scale = dropout.scale;
    for (int start = 0; start < n; start += GROUP)
        for (int i = 0; i < GROUP / 2; i++) {
            // A 32-bit hash of the column (Wellons's triple32), with one half of the key before it and one within.
            uint32_t h = (uint32_t)((first + start) / 2 + i) ^ low;
            h = (h ^ (h >> 17)) * 0xed5ad4bbu ^ high;
            h = (h ^ (h >> 11)) * 0xac4c1b51u;
            h = (h ^ (h >> 15)) * 0x31848babu;
            h ^= h >> 14;
            factors[start + i] = (h & 0xffff) >= threshold ? scale : 0.0f;
            factors[start + GROUP / 2 + i] = (h >> 16) >= threshold ? scale : 0.0f;
        }
}

// A thread's own memory of at least n numbers, which later calls reuse.
template <int which> inline float* scratch(size_t n) {
    struct alignas(64) Line { float numbers[16]; };
    static thread_local std::vector<Line> memory;
    if (memory.size() * 16 < n) memory.resize((n + 15) / 16);
    return memory.data()->numbers;
}

// Calls `add(first row, last row, sums)` for groups of rows in several threads. Each call adds its rows to `sums` (width), which
// are 0 at first. Then adds the sums of all groups in their order, into `totals` (width).
template <class Add> void sum_over_rows(int N, int width, float* totals, int threads, Add add) {
    const int size = std::max(16, (N + 63) / 64), groups = (N + size - 1) / size;
    float* sums = scratch<0>((size_t)groups * width);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int group = 0; group < groups; group++) {
        float* own = sums + (size_t)group * width;
        std::fill_n(own, width, 0.0f);
        add(group * size, std::min(N, (group + 1) * size), own);
    }
    std::copy_n(sums, width, totals);
    for (int group = 1; group < groups; group++)
        for (int c = 0; c < width; c++) totals[c] += sums[(size_t)group * width + c];
}

// GELU and its derivative. exact: x Phi(x), where the normal distribution Phi is 1 - erfc(x / sqrt 2) / 2 and
// erfc(z) = t P(t) e^(-z^2) with t = 1 / (1 + 0.35 z) for z >= 0. P was fitted to an error of 1e-8.
template <bool exact> inline void gelu_parts(float x, float& y, float& slope) {
    if (exact) {
        const float t = 1 / (1 + 0.247487373f * std::fabs(x)), e = exponential(-0.5f * x * x);
        const float p = t * (0.193880856f + t * (0.239461258f + t * (-0.0201643761f + t * (0.704378307f + t * (-0.699361384f
                        + t * (0.781714737f + t * -0.199909374f))))));
        const float half = 0.5f * p * e, phi = x > 0 ? 1 - half : half;
        y = x * phi;
        slope = phi + x * (0.398942280f * e);
    } else {  // x sigmoid(2 u), where u = sqrt(2 / pi) (x + 0.044715 x^3)
        const float s = 1 / (1 + exponential(-1.595769122f * (x + 0.044715f * x * x * x)));
        y = x * s;
        slope = s + y * (1 - s) * (1.595769122f + 0.2140644448f * x * x);
    }
}

// Matrix products of small blocks that are in the cache: c (M, N) = or += the product of a (M, K) and b (K, N). a[m][k] is
// a[m * a_row + k * a_k], so that a may be transposed. N is a multiple of LANES.
template <int R, int V>
inline void product_tile(const float* a, int a_row, int a_k, const float* b, int b_row, float* c, int c_row, int K, bool add) {
    vec sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sums[r][v] = add ? load<vec>(c + r * c_row + v * LANES) : vec{};
    for (int k = 0; k < K; k++, a += a_k, b += b_row) {
        vec right[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) right[v] = load<vec>(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const float left = a[r * a_row];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sums[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) std::memcpy(c + r * c_row + v * LANES, &sums[r][v], sizeof(vec));
}
template <int V>
inline void product_columns(int M, int K, const float* a, int a_row, int a_k, const float* b, int b_row, float* c, int c_row,
                            bool add) {
    int m = 0;
    for (; m + 6 <= M; m += 6) product_tile<6, V>(a + m * a_row, a_row, a_k, b, b_row, c + m * c_row, c_row, K, add);
    for (; m + 4 <= M; m += 4) product_tile<4, V>(a + m * a_row, a_row, a_k, b, b_row, c + m * c_row, c_row, K, add);
    for (; m < M; m++) product_tile<1, V>(a + m * a_row, a_row, a_k, b, b_row, c + m * c_row, c_row, K, add);
}
inline void small_product(int M, int N, int K, const float* a, int a_row, int a_k, const float* b, int b_row, float* c, int c_row,
                          bool add) {
    int n = 0;
    for (; n + 2 * LANES <= N; n += 2 * LANES) product_columns<2>(M, K, a, a_row, a_k, b + n, b_row, c + n, c_row, add);
    for (; n < N; n += LANES) product_columns<1>(M, K, a, a_row, a_k, b + n, b_row, c + n, c_row, add);
}

// Attention of one head, in blocks of QUERIES x KEYS weights, which stay in the L1 cache. Blocks in which no query sees a key are
// skipped. Rows are padded with zeros: to `width` numbers, a multiple of LANES, and to `length` tokens, a multiple of KEYS.
constexpr int QUERIES = 48, KEYS = 64;

struct Head {
    int T, D, width, length;
    const Dropout& dropout;
    uint64_t row;  // the number of the first query among the queries of all heads, for dropout

    size_t numbers() const { return (size_t)length * width; }

    // Copies rows of D numbers, `stride` apart and multiplied by `scale`, to `rows` (length, width).
    void copy(const float* from, int64_t stride, float scale, float* rows) const {
        for (int t = 0; t < T; t++) {
            for (int d = 0; d < D; d++) rows[(size_t)t * width + d] = from[t * stride + d] * scale;
            for (int d = D; d < width; d++) rows[(size_t)t * width + d] = 0;
        }
        std::fill(rows + (size_t)T * width, rows + numbers(), 0.0f);
    }
    // Writes the transpose (width, length) of `rows`.
    void transpose(const float* rows, float* columns) const {
        for (int t = 0; t < length; t += 16)
            for (int d = 0; d < width; d++)
                for (int i = t; i < t + 16; i++) columns[(size_t)d * length + i] = rows[(size_t)i * width + d];
    }
    // The number of keys from `key` on that a block with the last query `last` reads: a multiple of LANES, at most KEYS.
    static int keys(int last, int key) { return std::min(KEYS, round_up(last + 1 - key, LANES)); }
};

// y (T, stride) and log_sums (T): for each query, the logarithm of the sum over the keys of e^score.
void attend_head(const Head& head, const float* q, const float* k, const float* v, int64_t stride, float* y, int64_t y_stride,
                 float* log_sums) {
    const int width = head.width, length = head.length;
    float* queries = scratch<1>(4 * head.numbers() + QUERIES * (KEYS + width));
    float *keys = queries + head.numbers(), *values = keys + head.numbers(), *keys_t = values + head.numbers();
    float *weights = keys_t + head.numbers(), *sums = weights + QUERIES * KEYS;
    head.copy(q, stride, 1 / std::sqrt((float)head.D), queries);
    head.copy(k, stride, 1, keys);
    head.copy(v, stride, 1, values);
    head.transpose(keys, keys_t);
    for (int first = 0; first < head.T; first += QUERIES) {
        const int n = std::min(QUERIES, head.T - first);
        float largest[QUERIES], totals[QUERIES], factors[KEYS];
        std::fill_n(largest, n, -INFINITY);
        std::fill_n(totals, n, 0.0f);
        std::fill_n(sums, n * width, 0.0f);
        for (int key = 0; key < first + n; key += KEYS) {
            const int m = head.keys(first + n - 1, key);
            small_product(n, m, width, queries + (size_t)first * width, width, 1, keys_t + key, length, weights, KEYS, false);
            for (int i = 0; i < n; i++) {
                const int seen = std::min(m, first + i + 1 - key);
                float* weight = weights + i * KEYS;
                if (seen > 0) {
                    // The sums so far are scaled down when a larger score is found, so that no exponential overflows.
                    const float before = largest[i], now = std::max(before, maximum(weight, seen));
                    for (int s = 0; s < m; s++) weight[s] = exponential(weight[s] - now);
                    std::fill(weight + seen, weight + m, 0.0f);
                    if (now != before) {
                        const float shrink = exponential(before - now);
                        totals[i] *= shrink;
                        for (int d = 0; d < width; d++) sums[i * width + d] *= shrink;
                        largest[i] = now;
                    }
                    totals[i] += sum(weight, m, [](auto x) { return x; });
                    if (head.dropout.threshold) {
                        dropout_factors(head.dropout, head.row + first + i, key, m, factors);
                        for (int s = 0; s < m; s++) weight[s] *= factors[s];
                    }
                } else
                    std::fill_n(weight, m, 0.0f);
            }
            small_product(n, width, m, weights, KEYS, 1, values + (size_t)key * width, width, sums, width, true);
        }
        for (int i = 0; i < n; i++) {
            log_sums[first + i] = largest[i] + std::log(totals[i]);
            for (int d = 0; d < head.D; d++) y[(first + i) * y_stride + d] = sums[i * width + d] / totals[i];
        }
    }
}

// The gradients of q, k and v from the gradient of y. The attention weights are computed again. With weights P, factors F of
// dropout, dP = F (dY V') and dS = P (dP - rows of sums of P dP): dQ = dS K, dK = dS' Q and dV = (P F)' dY.
// The sum of P dP over the keys equals the sum of dY Y over the head.
void attend_head_backward(const Head& head, const float* q, const float* k, const float* v, int64_t stride, const float* y,
                          const float* y_grad, int64_t y_stride, const float* log_sums, float* q_grad, float* k_grad,
                          float* v_grad) {
    const int width = head.width, length = head.length, D = head.D;
    const size_t size = head.numbers();
    float* queries = scratch<1>(9 * size + QUERIES * (3 * KEYS + width));
    float *keys = queries + size, *values = keys + size, *keys_t = values + size, *values_t = keys_t + size;
    float *above = values_t + size, *k_sums = above + size, *v_sums = k_sums + size, *q_sums = v_sums + size;
    float *weights = q_sums + QUERIES * width, *scores = weights + QUERIES * KEYS, *dropped = scores + QUERIES * KEYS;
    const float scale = 1 / std::sqrt((float)D);
    head.copy(q, stride, scale, queries);
    head.copy(k, stride, 1, keys);
    head.copy(v, stride, 1, values);
    head.copy(y_grad, y_stride, 1, above);
    head.transpose(keys, keys_t);
    head.transpose(values, values_t);
    std::fill(k_sums, k_sums + 2 * size, 0.0f);
    for (int first = 0; first < head.T; first += QUERIES) {
        const int n = std::min(QUERIES, head.T - first);
        const float* y_sums = above + (size_t)first * width;
        float means[QUERIES], factors[KEYS];
        for (int i = 0; i < n; i++) {
            vec lanes = {};
            const float* out = y + (first + i) * y_stride;
            int d = 0;
            for (; d + LANES <= D; d += LANES) lanes += load<vec>(out + d) * load<vec>(y_sums + i * width + d);
            means[i] = 0;
            for (int lane = 0; lane < LANES; lane++) means[i] += lanes[lane];
            for (; d < D; d++) means[i] += out[d] * y_sums[i * width + d];
        }
        std::fill_n(q_sums, n * width, 0.0f);
        for (int key = 0; key < first + n; key += KEYS) {
            const int m = head.keys(first + n - 1, key);
            const float* rows = queries + (size_t)first * width;
            small_product(n, m, width, rows, width, 1, keys_t + key, length, weights, KEYS, false);
            small_product(n, m, width, y_sums, width, 1, values_t + key, length, scores, KEYS, false);
            for (int i = 0; i < n; i++) {
                const int seen = std::max(0, std::min(m, first + i + 1 - key));
                float *weight = weights + i * KEYS, *score = scores + i * KEYS, *drop = dropped + i * KEYS;
                const float log_sum = log_sums[first + i], mean = means[i];
                if (head.dropout.threshold) {
                    dropout_factors(head.dropout, head.row + first + i, key, m, factors);
                    for (int s = 0; s < m; s++) {
                        const float p = exponential(weight[s] - log_sum);
                        drop[s] = p * factors[s];
                        score[s] = p * (score[s] * factors[s] - mean);
                    }
                } else
                    for (int s = 0; s < m; s++) {
                        drop[s] = exponential(weight[s] - log_sum);
                        score[s] = drop[s] * (score[s] - mean);
                    }
                std::fill(drop + seen, drop + m, 0.0f);
                std::fill(score + seen, score + m, 0.0f);
            }
            small_product(m, width, n, dropped, 1, KEYS, y_sums, width, v_sums + (size_t)key * width, width, true);
            small_product(m, width, n, scores, 1, KEYS, rows, width, k_sums + (size_t)key * width, width, true);
            small_product(n, width, m, scores, KEYS, 1, keys + (size_t)key * width, width, q_sums, width, true);
        }
        for (int i = 0; i < n; i++)
            for (int d = 0; d < D; d++) q_grad[(first + i) * stride + d] = q_sums[i * width + d] * scale;
    }
    for (int t = 0; t < head.T; t++) {
        std::copy_n(k_sums + (size_t)t * width, D, k_grad + t * stride);
        std::copy_n(v_sums + (size_t)t * width, D, v_grad + t * stride);
    }
}

template <class Compute> void for_each_head(int B, int T, int H, int D, const Dropout& dropout, int threads, Compute compute) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int i = 0; i < B * H; i++) {
        const Head head{T, D, round_up(D, LANES), round_up(T, KEYS), dropout, (uint64_t)i * T};
        compute(head, (int64_t)(i / H) * T, i % H * D);
    }
}

extern "C" {

// The factors of dropout for N rows of n columns, for tests.
void train_dropout_factors(uint64_t seed, uint32_t threshold, float scale, int N, int n, float* y) {
    std::vector<float> row(round_up(n, GROUP));
    for (int i = 0; i < N; i++) {
        dropout_factors({seed, threshold, scale}, i, 0, n, row.data());
        std::copy_n(row.data(), n, y + (size_t)i * n);
    }
}

// x = residual + dropout(a + bias), then y = LayerNorm(x), and stats (N, 2) = its mean and the inverse standard deviation.
// Without a, x = residual and x is not written. Without a weight, only x is computed. x may be a.
void train_residual_norm(const float* a, const float* bias, const float* residual, uint64_t seed, uint32_t threshold, float scale,
                         const float* weight, const float* norm_bias, float eps, int N, int C, float* x, float* y, float* stats,
                         int threads) {
    const Dropout dropout{seed, threshold, scale};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> factors(round_up(C, GROUP), 1.0f);
#pragma omp for schedule(static)
        for (int n = 0; n < N; n++) {
            const size_t at = (size_t)n * C;
            const float* row = residual + at;
            if (a) {
                if (threshold) dropout_factors(dropout, n, 0, C, factors.data());
                for (int c = 0; c < C; c++) x[at + c] = residual[at + c] + factors[c] * (a[at + c] + bias[c]);
                row = x + at;
            }
            if (!weight) continue;
            const float mean = sum(row, C, [](auto v) { return v; }) / C;
            const float variance = sum(row, C, [=](auto v) { return (v - mean) * (v - mean); }) / C;
            const float inverse = 1 / std::sqrt(variance + eps);
            for (int c = 0; c < C; c++) y[at + c] = (row[c] - mean) * inverse * weight[c] + norm_bias[c];
            stats[2 * n] = mean;
            stats[2 * n + 1] = inverse;
        }
    }
}

// y = LayerNorm(x), with the stats of train_residual_norm.
void train_norm_again(const float* x, const float* stats, const float* weight, const float* bias, int N, int C, float* y,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < N; n++) {
        const size_t at = (size_t)n * C;
        const float mean = stats[2 * n], inverse = stats[2 * n + 1];
        for (int c = 0; c < C; c++) y[at + c] = (x[at + c] - mean) * inverse * weight[c] + bias[c];
    }
}

// x_grad = residual_grad + the gradient of LayerNorm's input, from the gradient of its output. sums (2, C) receives the gradients
// of the weight and of the bias. x_grad may be residual_grad.
void train_norm_backward(const float* y_grad, const float* x, const float* stats, const float* weight, const float* residual_grad,
                         int N, int C, float* x_grad, float* sums, int threads) {
    sum_over_rows(N, 2 * C, sums, threads, [=](int first, int last, float* own) {
        std::vector<float> scaled(C), normal(C);
        for (int n = first; n < last; n++) {
            const size_t at = (size_t)n * C;
            const float mean = stats[2 * n], inverse = stats[2 * n + 1];
#pragma GCC ivdep
            for (int c = 0; c < C; c++) {
                const float g = y_grad[at + c], z = (x[at + c] - mean) * inverse;
                own[c] += g * z;
                own[C + c] += g;
                scaled[c] = g * weight[c];
                normal[c] = z;
            }
            vec lanes = {}, products = {};
            int c = 0;
            for (; c + LANES <= C; c += LANES) {
                const vec g = load<vec>(&scaled[c]);
                lanes += g;
                products += g * load<vec>(&normal[c]);
            }
            float total = 0, product = 0;
            for (int lane = 0; lane < LANES; lane++) total += lanes[lane], product += products[lane];
            for (; c < C; c++) total += scaled[c], product += scaled[c] * normal[c];
            total /= C;
            product /= C;
            for (int d = 0; d < C; d++)
                x_grad[at + d] = residual_grad[at + d] + (scaled[d] - total - normal[d] * product) * inverse;
        }
    });
}

// The gradient of a in dropout(a + bias), from the gradient of the result, and the gradient of the bias. Without dropout, the
// gradient of a is that of the result and is not written.
void train_dropout_backward(const float* y_grad, uint64_t seed, uint32_t threshold, float scale, int N, int C, float* a_grad,
                            float* bias_grad, int threads) {
    const Dropout dropout{seed, threshold, scale};
    sum_over_rows(N, C, bias_grad, threads, [=](int first, int last, float* own) {
        std::vector<float> factors(round_up(C, GROUP));
        for (int n = first; n < last; n++) {
            const float* row = y_grad + (size_t)n * C;
            if (threshold) {
                float* result = a_grad + (size_t)n * C;
                dropout_factors(dropout, n, 0, C, factors.data());
                for (int c = 0; c < C; c++) {
                    const float g = row[c] * factors[c];
                    result[c] = g;
                    own[c] += g;
                }
            } else
                for (int c = 0; c < C; c++) own[c] += row[c];
        }
    });
}

// y = GELU(x + bias), without a bias in x.
void train_gelu(const float* x, const float* bias, int exact, int N, int C, float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int n = 0; n < N; n++) {
        const float* row = x + (size_t)n * C;
        float *result = y + (size_t)n * C, slope;
        if (exact)
            for (int c = 0; c < C; c++) gelu_parts<true>(row[c] + bias[c], result[c], slope);
        else
            for (int c = 0; c < C; c++) gelu_parts<false>(row[c] + bias[c], result[c], slope);
    }
}

// Replaces x by y = GELU(x + bias) and the gradient of y by that of x, and computes the gradient of the bias.
void train_gelu_backward(float* x, const float* bias, float* grad, int exact, int N, int C, float* bias_grad, int threads) {
    sum_over_rows(N, C, bias_grad, threads, [=](int first, int last, float* own) {
        auto rows = [=](auto parts) {
            for (int n = first; n < last; n++) {
                float *row = x + (size_t)n * C, *g = grad + (size_t)n * C;
                for (int c = 0; c < C; c++) {
                    float y, slope;
                    parts(row[c] + bias[c], y, slope);
                    row[c] = y;
                    const float product = g[c] * slope;
                    g[c] = product;
                    own[c] += product;
                }
            }
        };
        if (exact)
            rows([](float x, float& y, float& slope) { gelu_parts<true>(x, y, slope); });
        else
            rows([](float x, float& y, float& slope) { gelu_parts<false>(x, y, slope); });
    });
}

// Causal attention: y (B, T, C) and log_sums (B, H, T) from qkv (B, T, 3 C).
void train_attend(const float* qkv, int B, int T, int H, int D, uint64_t seed, uint32_t threshold, float scale, float* y,
                  float* log_sums, int threads) {
    const int64_t C = (int64_t)H * D;
    for_each_head(B, T, H, D, {seed, threshold, scale}, threads, [=](const Head& head, int64_t token, int column) {
        const float* q = qkv + token * 3 * C + column;
        attend_head(head, q, q + C, q + 2 * C, 3 * C, y + token * C + column, C, log_sums + head.row);
    });
}

// The gradient of qkv from that of y.
void train_attend_backward(const float* qkv, const float* y, const float* y_grad, const float* log_sums, int B, int T, int H,
                           int D, uint64_t seed, uint32_t threshold, float scale, float* qkv_grad, int threads) {
    const int64_t C = (int64_t)H * D;
    for_each_head(B, T, H, D, {seed, threshold, scale}, threads, [=](const Head& head, int64_t token, int column) {
        const int64_t at = token * C + column;
        const float* q = qkv + token * 3 * C + column;
        float* grad = qkv_grad + token * 3 * C + column;
        attend_head_backward(head, q, q + C, q + 2 * C, 3 * C, y + at, y_grad + at, C, log_sums + head.row, grad, grad + C,
                             grad + 2 * C);
    });
}
}
