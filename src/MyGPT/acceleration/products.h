// Matrix products with packed weights: y (M, N) = x (M, K) weightᵀ + bias.
//
// A matrix (N, K) is stored in panels of P outputs, as (N / P, K, P). bf16 and int8 weights are stored as (N / P, K / 2, P, 2):
// two consecutive inputs of an output are adjacent. A panel is read from its first byte to its last, which is the fastest order.
// P is the width of three vector registers, so every lane sums its own output. The order of summation does not depend on M, so
// the result of a row does not depend on the other rows.
#pragma once
#include "team.h"
#include "vectors.h"

#if defined(__AVX2__)
// Without this, GCC loads the weights from memory again for each row.
#define IN_REGISTERS(a, b, c) asm("" : "+v"(a), "+v"(b), "+v"(c))
#else
#define IN_REGISTERS(a, b, c)
#endif

// Rows that are computed together, so that their sums (three registers per row) stay in registers. int8 needs one more register.
#if defined(__AVX512F__)
constexpr int ROWS = 8, INT_ROWS = 8;  // 32 registers
#elif defined(__AVX2__)
constexpr int ROWS = 4, INT_ROWS = 3;   // 16 registers
#else
constexpr int ROWS = 4, INT_ROWS = 4;
#endif
constexpr int P = 3 * LANES;
// Products that are summed before they are added to the total: more accurate, and the weights stay in L1 for all rows.
constexpr int K_BLOCK = 128;
constexpr int ROW_BLOCK = 128;  // rows that stay in the L2 cache while all panels are read

struct bf16 { uint16_t high; };  // the upper half of a float's bits
struct int8 { int8_t value; };
// Number of consecutive inputs of one output that are adjacent in a panel.
template <class W> constexpr int K_INTERLEAVE = sizeof(W) == 4 ? 1 : 2;
// Bytes to prefetch ahead, about what arrives within the latency of memory. int8 weights are multiplied so quickly that the
// nearer ones are needed first.
template <class W> constexpr int PREFETCH = sizeof(W) == 1 ? 1536 : 6144;

// Vector i of the weights for element k of a row, or for element k + 1 if `after`. k is even for bf16.
inline vec weights(const float* panel, int k, bool after, int i) { return load<vec>(panel + (k + after) * P + i * LANES); }
inline vec weights(const bf16* panel, int k, bool after, int i) {
    bits pairs = load<bits>(panel + k * P + i * 2 * LANES);
    return (vec)(after ? pairs & 0xffff0000u : pairs << 16);
}
#if defined(__AVX512BW__)
inline shorts widen(const int8* w) { return (shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((__m256i*)w)); }
inline ints dot(ints sum, shorts w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#else
    return sum + (ints)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#endif
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
inline shorts widen(const int8* w) { return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((__m128i*)w)); }
inline ints dot(ints sum, shorts w, int32_t x) {
    return sum + (ints)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
}
#else
inline shorts widen(const int8* w) {
    shorts v;
    for (int i = 0; i < 2 * LANES; i++) v[i] = w[i].value;
    return v;
}
// Adds to each sum two products: a pair of weights with the two 16-bit halves of x.
inline ints dot(ints sum, shorts w, int32_t x) {
    for (int i = 0; i < LANES; i++) sum[i] += w[2 * i] * (int16_t)x + w[2 * i + 1] * (x >> 16);
    return sum;
}
#endif

enum Type { FLOAT, BF16, INT8, INT4 };
struct Linear {
    const void* weight;  // panels of float, bf16, int8 or int4
    const float* scale;  // (N) or null: the value of an int8 weight of 1, and the factor of int4 weights
    const float* bias;   // (N) or null
    int32_t N, K, type;
};
enum Then { STORE, ADD, GELU, EXACT_GELU };  // the last step of a product


// sums (R, P) += x (R, K) panel (K, P). BLOCKS blocks of K are summed at the same time and then added one after the other.
template <int R, int BLOCKS, class W> void multiply(const W* panel, const float* x, int64_t x_stride, int K, float* sums) {
    vec sum[BLOCKS][R][3] = {};
    auto add = [&](int k, bool after) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int b = 0; b < BLOCKS; b++) {
            const W* block = panel + (int64_t)b * K * P;
            vec w[3] = {weights(block, k, after, 0), weights(block, k, after, 1), weights(block, k, after, 2)};
            const char* later = (const char*)(block + (k + after) * P) + PREFETCH<W>;
            if (sizeof(W) < 4 || R > 1) __builtin_prefetch(later);  // for one row of floats the hardware prefetches in time
            if (sizeof(W) == 4 && R > 1) __builtin_prefetch(later + 64);
            IN_REGISTERS(w[0], w[1], w[2]);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 3
                for (int i = 0; i < 3; i++) sum[b][r][i] += w[i] * x[r * x_stride + b * K + k + after];
        }
    };
    int k = 0;
    if (K_INTERLEAVE<W> == 2)
        for (; k + 2 <= K; k += 2) add(k, false), add(k, true);
    for (; k < K; k++) add(k, false);
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; b++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
            for (int i = 0; i < 3; i++) {
                vec total = load<vec>(sums + r * P + i * LANES) + sum[b][r][i];
                std::memcpy(sums + r * P + i * LANES, &total, sizeof total);
            }
}
// sums (R, P) += scale x panel, for int8 weights and 16-bit rows x (R, K). A sum of 128 products does not overflow.
template <int R> void multiply_int(const int8* panel, const int16_t* x, int64_t x_stride, int K, const float* scale,
                                   int64_t scale_stride, float* sums) {
    ints sum[R][3] = {};
    for (int k = 0; k < K; k += 2, panel += 2 * P) {
        shorts w[3] = {widen(panel), widen(panel + 2 * LANES), widen(panel + 4 * LANES)};
        __builtin_prefetch((const char*)panel + PREFETCH<int8>);
        IN_REGISTERS(w[0], w[1], w[2]);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int32_t pair = load<int32_t>(x + r * x_stride + k);
#pragma GCC unroll 3
            for (int i = 0; i < 3; i++) sum[r][i] = dot(sum[r][i], w[i], pair);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {
            vec total = load<vec>(sums + r * P + i * LANES) + __builtin_convertvector(sum[r][i], vec) * scale[r * scale_stride];
            std::memcpy(sums + r * P + i * LANES, &total, sizeof total);
        }
}

// The rows that are multiplied with weights of type W: float rows, or rows rounded to 16 bits for int8 weights.
template <class W> struct Rows {
    const float* x;
    int64_t stride;
    Rows(const float* x, int, int K) : x(x), stride(K) {}

    template <int R> void times(int row, const W* block, int k, int K, float* sums) const {
        multiply<R, 1>(block, x + row * stride + k, stride, K, sums);
    }
};
// Rounds n numbers to 16 bits, and returns the value of a 1.
inline float round_to_16_bits(const float* from, int n, int16_t* to) {
    float largest = 0, poison = 0;  // poison becomes NaN if any number is NaN or infinite, and is 0 otherwise
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int i = 0; i < n; i++) {
        largest = std::max(largest, std::fabs(from[i]));
        poison += from[i] * 0;
    }
    // 32767 / largest would overflow for a smaller `largest`, and a NaN has no 16-bit value.
    const float inverse = largest > 1e-30f ? 32767 / largest : 0;
    if (poison != 0) std::fill(to, to + n, (int16_t)0);
    else for (int i = 0; i < n; i++) to[i] = (int16_t)(int32_t)std::nearbyint(from[i] * inverse);
    return largest / 32767 + poison;  // a NaN here makes every output of the row NaN
}
template <> struct Rows<int8> {
    int64_t stride, n_blocks;
    int16_t* x;
    float* scale;  // (n, n_blocks), the value of a 1 in each block of K of each row

    Rows(const float* from, int n, int K) : stride((K + 1) / 2 * 2), n_blocks((K + K_BLOCK - 1) / K_BLOCK) {
        static thread_local std::vector<int16_t> numbers;
        static thread_local std::vector<float> scales;
        numbers.resize(std::max<size_t>(numbers.size(), n * stride));
        scales.resize(std::max<size_t>(scales.size(), n * n_blocks));
        x = numbers.data(), scale = scales.data();
        for (int row = 0; row < n; row++, from += K) {
            for (int b = 0; b < n_blocks; b++) {
                const int first = b * K_BLOCK, end = std::min(K, first + K_BLOCK);
                scale[row * n_blocks + b] = round_to_16_bits(from + first, end - first, x + row * stride + first);
            }
            if (K % 2) x[row * stride + K] = 0;
        }
    }
    template <int R> void times(int row, const int8* block, int k, int K, float* sums) const {
        multiply_int<R>(block, x + row * stride + k, stride, K, scale + row * n_blocks + k / K_BLOCK, n_blocks, sums);
    }
};
// Multiplies n <= R rows, from `row` on.
template <int R, class W> void times(const Rows<W>& rows, int n, int row, const W* block, int k, int K, float* sums) {
    if constexpr (R > 1)
        if (n < R) return times<R - 1>(rows, n, row, block, k, K, sums);
    rows.template times<R>(row, block, k, K, sums);
}
// sums (n, P) += the n rows times a panel.
template <class W> void multiply_panel(const Rows<W>& rows, int n, const W* panel, int K, float* sums) {
    int k = 0;
    if constexpr (!std::is_same_v<W, int8>)
        if (n == 1)  // two blocks at once, because the additions of three sums alone would wait for each other
            for (; k + 2 * K_BLOCK <= K; k += 2 * K_BLOCK) multiply<1, 2>(panel + k * P, rows.x + k, K, K_BLOCK, sums);
    for (; k < K; k += K_BLOCK) {
        const int length = std::min(K_BLOCK, K - k);
        if constexpr (std::is_same_v<W, bf16>)
            if (n > ROWS) {  // convert the weights to float once for all rows
                alignas(64) float block[K_BLOCK * P];
                for (int j = 0; j < length; j++) {
                    for (int i = 0; i < 3; i++) {
                        vec w = weights(panel + k * P, j / 2 * 2, j % 2, i);
                        std::memcpy(block + j * P + i * LANES, &w, sizeof w);
                    }
                    __builtin_prefetch((const char*)(panel + (k + j) * P) + PREFETCH<W>);
                }
                for (int r = 0; r < n; r += ROWS)
                    times<ROWS>(Rows<float>(rows.x, n, K), std::min(ROWS, n - r), r, block, k, length, sums + r * P);
                continue;
            }
        constexpr int R = std::is_same_v<W, int8> ? INT_ROWS : ROWS;
        for (int r = 0; r < n; r += R)
            times<R>(rows, std::min(R, n - r), r, panel + (int64_t)k * P, k, length, sums + r * P);
    }
}

// Number of weights of type W in a panel, with the zeros that fill it up. int4 has its own number.
template <class W> int64_t panel_size(int K) { return (int64_t)(K + K_INTERLEAVE<W> - 1) / K_INTERLEAVE<W> * K_INTERLEAVE<W> * P; }

// y (M, N) = x (M, K) weightᵀ + bias, followed by `then`. Each thread computes a range of consecutive panels.
template <class W> void linear(const Team& team, const Linear& l, const float* x, int M, float* y, Then then) {
    const int n_panels = (l.N + P - 1) / P, n_row_blocks = (M + ROW_BLOCK - 1) / ROW_BLOCK;
    const int n_units = n_panels * n_row_blocks, last = team.first(n_units, true);
    int unit = team.first(n_units);
    while (unit < last) {
        const int row = unit / n_panels * ROW_BLOCK, n_rows = std::min(ROW_BLOCK, M - row);
        const Rows<W> rows(x + (int64_t)row * l.K, n_rows, l.K);
        for (const int end = std::min(last, (unit / n_panels + 1) * n_panels); unit < end; unit++) {
            const int first = unit % n_panels * P, width = std::min(P, l.N - first);
            const W* panel = (const W*)l.weight + unit % n_panels * panel_size<W>(l.K);
            float sums[ROW_BLOCK * P];
            std::fill(sums, sums + n_rows * P, 0.0f);
            multiply_panel(rows, n_rows, panel, l.K, sums);
            for (int r = 0; r < n_rows; r++) {
                float *sum = sums + r * P, *to = y + (int64_t)(row + r) * l.N + first;
                if (l.scale) for (int i = 0; i < width; i++) sum[i] *= l.scale[first + i];
                if (l.bias) for (int i = 0; i < width; i++) sum[i] += l.bias[first + i];
                if (then == GELU) for (int i = 0; i < P; i++) sum[i] = gelu(sum[i]);
                if (then == EXACT_GELU) for (int i = 0; i < P; i++) sum[i] = exact_gelu(sum[i]);
                if (then == ADD) for (int i = 0; i < width; i++) to[i] += sum[i];
                else std::copy(sum, sum + width, to);
            }
        }
    }
    team.wait();
}

inline float to_float(float w) { return w; }
inline float to_float(bf16 w) { return __builtin_bit_cast(float, (uint32_t)w.high << 16); }
inline float to_float(int8 w) { return w.value; }
// Index of weight (n, k) in the panels.
template <class W> int64_t panel_index(const Linear& l, int n, int k) {
    constexpr int T = K_INTERLEAVE<W>;
    return ((int64_t)(n / P) * ((l.K + T - 1) / T) + k / T) * T * P + n % P * T + k % T;
}
// Writes row n of a matrix to y (K).
template <class W> void row_of(const Linear& l, int n, float* y) {
    for (int k = 0; k < l.K; k++) y[k] = to_float(((const W*)l.weight)[panel_index<W>(l, n, k)]) * (l.scale ? l.scale[n] : 1);
}
