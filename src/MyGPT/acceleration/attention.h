// Attention of one head, for consecutive tokens of one sequence.
#pragma once
#include "vectors.h"

constexpr int KEYS = 8;      // keys that are multiplied with a query together, so that their sums stay in registers
constexpr int VALUES = 64;   // values that stay in the L1 cache while all queries of a block read them
constexpr int QUERIES = 32;  // tokens of a sequence whose attention is computed together, so that keys are read less often

// Writes the sum of the lanes of each of KEYS vectors to y (KEYS).
inline void add_lanes(const vec* v, float* y) {
#if defined(__AVX2__)
    __m256 part[KEYS];
    for (int j = 0; j < KEYS; j++) {
#if defined(__AVX512F__)
        const __m512d both = (__m512d)v[j];
        part[j] = (__m256)_mm512_castpd512_pd256(both) + (__m256)_mm512_extractf64x4_pd(both, 1);
#else
        part[j] = (__m256)v[j];
#endif
    }
    auto add4 = [&](int j) {  // four sums for each half of the vectors
        return _mm256_hadd_ps(_mm256_hadd_ps(part[j], part[j + 1]), _mm256_hadd_ps(part[j + 2], part[j + 3]));
    };
    const __m256 one = add4(0), other = add4(4);
    _mm256_storeu_ps(y, _mm256_permute2f128_ps(one, other, 0x20) + _mm256_permute2f128_ps(one, other, 0x31));
#else
    for (int j = 0; j < KEYS; j++) {
        y[j] = 0;
        for (int lane = 0; lane < LANES; lane++) y[j] += v[j][lane];
    }
#endif
}

// The dot products of q (D) with KEYS rows of keys (n, D), n >= 1. Rows after the last are replaced by the last.
inline void dots(const float* q, const float* keys, int n, int D, float* scores) {
    const float* key[KEYS];
    for (int j = 0; j < KEYS; j++) key[j] = keys + (int64_t)std::min(j, n - 1) * D;
    vec sums[KEYS] = {};
    int d = 0;
    for (; d + LANES <= D; d += LANES) {
        const vec part = load<vec>(q + d);
#pragma GCC unroll 8
        for (int j = 0; j < KEYS; j++) sums[j] += part * load<vec>(key[j] + d);
    }
    add_lanes(sums, scores);
    for (; d < D; d++)
        for (int j = 0; j < KEYS; j++) scores[j] += q[d] * key[j][d];
}

// y (V * LANES) += the sum of weight[s] * row s of values (n, D), in the order of s.
template <int V> inline void add_weighted(const float* weight, const float* values, int n, int D, float* y) {
    vec sums[V];
    for (int i = 0; i < V; i++) sums[i] = load<vec>(y + i * LANES);
    for (int s = 0; s < n; s++, values += D)
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) sums[i] += weight[s] * load<vec>(values + i * LANES);
    for (int i = 0; i < V; i++) std::memcpy(y + i * LANES, &sums[i], sizeof(vec));
}
inline void add_weighted(const float* weight, const float* values, int n, int D, float* y) {
    int d = 0;
    for (; d + 8 * LANES <= D; d += 8 * LANES) add_weighted<8>(weight, values + d, n, D, y + d);
    for (; d + 4 * LANES <= D; d += 4 * LANES) add_weighted<4>(weight, values + d, n, D, y + d);
    for (; d + LANES <= D; d += LANES) add_weighted<1>(weight, values + d, n, D, y + d);
    for (; d < D; d++)
        for (int s = 0; s < n; s++) y[d] += weight[s] * values[(int64_t)s * D + d];
}

// Attention of one head for n <= QUERIES consecutive tokens: y (n, C). The first of them sees S tokens, itself included, and each
// of the others sees one more. q (n, 3 C) points at the head's queries; keys and values (S + n - 1, D) begin with the first token
// that is seen. The order of every sum depends only on D and on the number of tokens that the query sees.
void attend(const float* q, int n, int S, int C, int D, const float* keys, const float* values, float* y) {
    struct alignas(64) Line { float numbers[16]; };
    static thread_local std::vector<Line> memory;
    // An odd number of lines, because rows at distances of powers of two would share few places in the L1 cache.
    auto line_up = [](int n) { return ((n + 15) / 16 | 1) * 16; };
    const int longest = S + n - 1, size = line_up(D), stride = line_up(longest);
    memory.resize(std::max<size_t>(memory.size(), n * (2 * size + stride) / 16));
    float *queries = memory[0].numbers, *sums = queries + n * size, *weights = sums + n * size, totals[QUERIES];
    for (int i = 0; i < n; i++) std::copy_n(q + (int64_t)i * 3 * C, D, queries + i * size);
    for (int s = 0; s < longest; s += KEYS)  // a block of keys is read once for all queries
        for (int i = std::max(0, s - S + 1); i < n; i++)
            dots(queries + i * size, keys + (int64_t)s * D, longest - s, D, weights + i * stride + s);
    const float scale = 1 / std::sqrt((float)D);
    for (int i = 0; i < n; i++) {
        float* weight = weights + i * stride;
        const float largest = maximum(weight, S + i);
        for (int s = 0; s < (S + i + LANES - 1) / LANES * LANES; s++) weight[s] = exponential((weight[s] - largest) * scale);
        totals[i] = sum(weight, S + i, [](auto v) { return v; });
        std::fill_n(sums + i * size, D, 0.0f);
    }
    for (int s = 0; s < longest; s += VALUES)
        for (int i = std::max(0, s - S + 1); i < n; i++)
            add_weighted(weights + i * stride + s, values + (int64_t)s * D, std::min(VALUES, S + i - s), D, sums + i * size);
    for (int i = 0; i < n; i++)
        for (int d = 0; d < D; d++) y[(int64_t)i * C + d] = sums[i * size + d] / totals[i];
}
