// GPT-2's forward pass with a cache. For a few tokens it is as fast as memory delivers the weights.
//
// The new tokens of several sequences are M rows, C embedding width, H heads, D = C / H, S tokens seen. All threads compute one
// layer together. Each `omp for` divides a stage among them and ends with a barrier.
//
// A matrix (N, K) is stored in panels of P outputs, as (N / P, K, P). bf16 and int8 weights are stored as (N / P, K / 2, P, 2):
// two consecutive inputs of an output are adjacent. A panel is read from its first byte to its last, which is the fastest order.
// P is the width of three vector registers, so every lane sums its own output. The order of summation does not depend on M, so
// the result of a row does not depend on the other rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif
#if defined(__AVX2__)
#include <immintrin.h>
// Without this, GCC loads the weights from memory again for each row.
#define IN_REGISTERS(a, b, c) asm("" : "+v"(a), "+v"(b), "+v"(c))
#else
#define IN_REGISTERS(a, b, c)
#endif

// Rows that are computed together, so that their sums (three registers per row) stay in registers. int8 needs one more register.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, INT_ROWS = 8;  // 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4, INT_ROWS = 3;   // 16 registers
#else
constexpr int LANES = 4, ROWS = 4, INT_ROWS = 4;
#endif
constexpr int P = 3 * LANES;
// Products that are summed before they are added to the total: more accurate, and the weights stay in L1 for all rows.
constexpr int K_BLOCK = 128;
constexpr int ROW_BLOCK = 128;  // rows that stay in the L2 cache while all panels are read
constexpr int PREFETCH = 6144;  // bytes to prefetch ahead, about what arrives within the latency of memory
constexpr int KEYS = 8;         // keys that are multiplied with a query together, so that their sums stay in registers
constexpr int VALUES = 64;      // values that stay in the L1 cache while all queries of a block read them
constexpr int QUERIES = 32;     // tokens of a sequence whose attention is computed together, so that keys are read less often

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));
struct bf16 { uint16_t high; };  // the upper half of a float's bits
struct int8 { int8_t value; };
// Number of consecutive inputs of one output that are adjacent in a panel.
template <class W> constexpr int K_INTERLEAVE = sizeof(W) == 4 ? 1 : 2;

template <class V, class T> inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
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

struct Linear {
    const void* weight;  // panels of float, bf16 or int8
    const float* scale;  // (N) or null: the value of an int8 weight of 1
    const float* bias;   // (N) or null
    int32_t N, K;
};
struct Norm { const float *weight, *bias; };
struct Block { Norm ln_1, ln_2; Linear c_attn, attn_proj, c_fc, mlp_proj; };
struct Model {
    const float *wte, *wpe;  // (V, C), or null for the head's weights; (context, C)
    const Block* blocks;
    Norm ln_f;
    Linear head;
    int32_t n_layers, n_heads, weight_bytes, exact_gelu;
    float eps;
};
enum Then { STORE, ADD, GELU, EXACT_GELU };  // the last step of a product

// e^x = 2^n e^r with |r| <= ln 2 / 2, where eight terms of the series reach float precision. Without branches, so it vectorises.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    float n = std::nearbyint(x * 1.44269504f);
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 as the sum of two floats
    float e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r / 5040.f))))));
    return e * __builtin_bit_cast(float, ((int32_t)n + 127) << 23);
}
// x (1 + tanh u) / 2 = x / (1 + e^-2u)
inline float gelu(float x) { return x / (1 + exponential(-1.595769122f * (x + 0.044715f * x * x * x))); }
inline float exact_gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.707106781f)); }

// sums (R, P) += x (R, K) panel (K, P). BLOCKS blocks of K are summed at the same time and then added one after the other.
template <int R, int BLOCKS, class W> void multiply(const W* panel, const float* x, int64_t x_stride, int K, float* sums) {
    vec sum[BLOCKS][R][3] = {};
    auto add = [&](int k, bool after) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int b = 0; b < BLOCKS; b++) {
            const W* block = panel + (int64_t)b * K * P;
            vec w[3] = {weights(block, k, after, 0), weights(block, k, after, 1), weights(block, k, after, 2)};
            const char* later = (const char*)(block + (k + after) * P) + PREFETCH;
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
        __builtin_prefetch((const char*)panel + PREFETCH);
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
                float largest = 0, poison = 0;  // poison becomes NaN if any number is NaN or infinite, and is 0 otherwise
#pragma omp simd reduction(max : largest) reduction(+ : poison)
                for (int k = first; k < end; k++) {
                    largest = std::max(largest, std::fabs(from[k]));
                    poison += from[k] * 0;
                }
                scale[row * n_blocks + b] = largest / 32767 + poison;  // a NaN here makes every output of the row NaN
                // 32767 / largest would overflow for a smaller `largest`, and a NaN has no 16-bit value.
                const float inverse = largest > 1e-30f ? 32767 / largest : 0;
                int16_t* to = x + row * stride;
                if (poison != 0) std::fill(to + first, to + end, (int16_t)0);
                else for (int k = first; k < end; k++) to[k] = (int16_t)(int32_t)std::nearbyint(from[k] * inverse);
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
                    __builtin_prefetch((const char*)(panel + (k + j) * P) + PREFETCH);
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

// y (M, N) = x (M, K) weightᵀ + bias, followed by `then`. Each thread computes a range of consecutive panels.
template <class W> void linear(const Linear& l, const float* x, int M, float* y, Then then) {
    const int n_panels = (l.N + P - 1) / P, n_row_blocks = (M + ROW_BLOCK - 1) / ROW_BLOCK;
    const int64_t panel_size = (int64_t)(l.K + K_INTERLEAVE<W> - 1) / K_INTERLEAVE<W> * K_INTERLEAVE<W> * P;
    const int thread = omp_get_thread_num(), n_threads = omp_get_num_threads(), n_units = n_panels * n_row_blocks;
    int unit = (int64_t)n_units * thread / n_threads;
    const int last = (int64_t)n_units * (thread + 1) / n_threads;
    while (unit < last) {
        const int row = unit / n_panels * ROW_BLOCK, n_rows = std::min(ROW_BLOCK, M - row);
        const Rows<W> rows(x + (int64_t)row * l.K, n_rows, l.K);
        for (const int end = std::min(last, (unit / n_panels + 1) * n_panels); unit < end; unit++) {
            const int first = unit % n_panels * P, width = std::min(P, l.N - first);
            const W* panel = (const W*)l.weight + unit % n_panels * panel_size;
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
#pragma omp barrier
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

// The sum of term(x) over n numbers x, in an order that depends only on n.
template <class Term> float sum(const float* x, int n, Term term) {
    vec lanes = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) lanes += term(load<vec>(x + i));
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
    for (; i < n; i++) total += term(x[i]);
    return total;
}

// LayerNorm of n rows of x, or of those with the indices `rows`: y (n, C).
void layer_norm(const Norm& norm, const float* x, const int32_t* rows, int n, int C, float eps, float* y) {
#pragma omp for
    for (int row = 0; row < n; row++) {
        const float* from = x + (int64_t)(rows ? rows[row] : row) * C;
        const float mean = sum(from, C, [](auto v) { return v; }) / C;
        const float variance = sum(from, C, [mean](auto v) { return (v - mean) * (v - mean); }) / C;
        const float scale = 1 / std::sqrt(variance + eps);
        for (int c = 0; c < C; c++) y[(int64_t)row * C + c] = (from[c] - mean) * scale * norm.weight[c] + norm.bias[c];
    }
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

// The largest of n numbers.
inline float maximum(const float* x, int n) {
    float largest = -INFINITY;
    int i = 0;
    if (n >= LANES) {
        vec lanes = load<vec>(x);
        for (i = LANES; i + LANES <= n; i += LANES) {
            const vec next = load<vec>(x + i);
            lanes = next > lanes ? next : lanes;
        }
        for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, lanes[lane]);
    }
    for (; i < n; i++) largest = std::max(largest, x[i]);
    return largest;
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

// New tokens of one sequence: n of them after `past` earlier tokens, in a slot of the cache. `first` is the index of the
// sequence's first token after its left padding.
struct Sequence { int32_t n, past, first, slot; };
// The new token of one row: its slot, its index in the cache, and the number of padding tokens before it.
struct Token { int32_t slot, index, first; };

template <class W> void forward(const Model& model, const Sequence* sequences, int n_sequences, const int64_t* ids, float* cache,
                                int slots, int capacity, const int32_t* wanted, int n_wanted, float* logits, float* scratch,
                                int n_threads) {
    std::vector<Token> tokens;
    std::vector<std::pair<int, int>> blocks;  // first row and number of rows, whose attention is computed together
    for (int i = 0; i < n_sequences; i++) {
        const Sequence& sequence = sequences[i];
        for (int t = 0; t < sequence.n; t++) {
            const int index = sequence.past + t;
            if (index >= sequence.first) {
                if (t == 0 || index == sequence.first || blocks.back().second == QUERIES) blocks.emplace_back(tokens.size(), 0);
                blocks.back().second++;
            }
            tokens.push_back({sequence.slot, index, sequence.first});
        }
    }
    const int C = model.head.K, H = model.n_heads, D = C / H, M = tokens.size(), n_blocks = blocks.size();
    float *x = scratch, *h = x + (int64_t)M * C, *wide = h + (int64_t)M * C;  // (M, C), (M, C) and (M, 4 C)
    const int64_t head_size = (int64_t)capacity * D;       // numbers in the keys of one head, (capacity, D)
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp for
        for (int row = 0; row < M; row++) {
            float* to = x + (int64_t)row * C;
            if (model.wte) std::copy_n(model.wte + ids[row] * C, C, to);
            else row_of<W>(model.head, ids[row], to);
            const float* position = model.wpe + (int64_t)std::max(0, tokens[row].index - tokens[row].first) * C;
            for (int c = 0; c < C; c++) to[c] += position[c];
        }
        for (int layer = 0; layer < model.n_layers; layer++) {
            const Block& block = model.blocks[layer];
            float *keys = cache + (int64_t)layer * 2 * slots * H * head_size, *values = keys + slots * H * head_size;
            layer_norm(block.ln_1, x, nullptr, M, C, model.eps, h);
            linear<W>(block.c_attn, h, M, wide, STORE);
#pragma omp for
            for (int row = 0; row < M; row++) {
                const Token& token = tokens[row];
                const float* qkv = wide + (int64_t)row * 3 * C;
                for (int head = 0; head < H; head++) {
                    const int64_t to = (token.slot * H + head) * head_size + (int64_t)token.index * D;
                    std::copy_n(qkv + C + head * D, D, keys + to);
                    std::copy_n(qkv + 2 * C + head * D, D, values + to);
                }
                // A padding token sees only itself, as in cache.py.
                if (token.index < token.first) std::copy_n(qkv + 2 * C, C, h + (int64_t)row * C);
            }
#pragma omp for schedule(dynamic)
            for (int unit = 0; unit < n_blocks * H; unit++) {
                const auto [row, n] = blocks[n_blocks - 1 - unit / H];  // the last blocks of a long prompt take longest
                const int head = unit % H, column = head * D;
                const Token& token = tokens[row];
                const int64_t from = (token.slot * H + head) * head_size + (int64_t)token.first * D;
                attend(wide + (int64_t)row * 3 * C + column, n, token.index - token.first + 1, C, D, keys + from, values + from,
                       h + (int64_t)row * C + column);
            }
            linear<W>(block.attn_proj, h, M, x, ADD);
            layer_norm(block.ln_2, x, nullptr, M, C, model.eps, h);
            linear<W>(block.c_fc, h, M, wide, model.exact_gelu ? EXACT_GELU : GELU);
            linear<W>(block.mlp_proj, wide, M, x, ADD);
        }
        layer_norm(model.ln_f, x, wanted, n_wanted, C, model.eps, h);
        linear<W>(model.head, h, n_wanted, logits, STORE);
    }
}

// Converts a weight to the type in which it is stored; int8 weights are divided by their scale first.
inline void from_float(float w, float, float& to) { to = w; }
inline void from_float(float w, float, bf16& to) {
    uint32_t b = __builtin_bit_cast(uint32_t, w);
    to.high = w == w ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : 0x7fc0;  // to nearest, ties to even; NaN stays NaN
}
inline void from_float(float w, float scale, int8& to) {
    const float rounded = std::nearbyint(w / scale);
    to.value = rounded == rounded ? (int8_t)rounded : 0;  // the scale of a row with a NaN is NaN
}

// Copies weight (N, K) into panels. Panels are rounded up to whole ones and filled with 0.
template <class W> void pack(const float* weight, const Linear& l, W* panels) {
    constexpr int T = K_INTERLEAVE<W>;
#pragma omp parallel for schedule(dynamic)
    for (int panel = 0; panel < (l.N + P - 1) / P; panel++)
        for (int k = 0; k < (l.K + T - 1) / T * T; k++)
            for (int n = panel * P; n < (panel + 1) * P; n++) {
                W& to = panels[panel_index<W>(l, n, k)];
                if (n < l.N && k < l.K) from_float(weight[(int64_t)n * l.K + k], l.scale ? l.scale[n] : 1, to);
                else to = W{};
            }
}

extern "C" int32_t gpt2_panel() { return P; }

extern "C" void gpt2_pack(const float* weight, const Linear* l, int32_t weight_bytes) {
    if (weight_bytes == 4) pack(weight, *l, (float*)l->weight);
    else if (weight_bytes == 2) pack(weight, *l, (bf16*)l->weight);
    else pack(weight, *l, (int8*)l->weight);
}

// Writes the rows of a matrix for n ids to y (n, K).
extern "C" void gpt2_rows(const Linear* l, int32_t weight_bytes, const int64_t* ids, int32_t n, float* y) {
    auto row = weight_bytes == 4 ? row_of<float> : weight_bytes == 2 ? row_of<bf16> : row_of<int8>;
    for (int i = 0; i < n; i++) row(*l, ids[i], y + (int64_t)i * l->K);
}

// Writes the logits (n_wanted, V) of the rows with the indices `wanted`. ids (M) are the new tokens of all sequences, one sequence
// after another, cache (n_layers, 2, slots, H, capacity, D) holds the earlier tokens, and scratch has room for 6 M C numbers.
extern "C" void gpt2_forward(const Model* model, const Sequence* sequences, int32_t n_sequences, const int64_t* ids, float* cache,
                             int32_t slots, int32_t capacity, const int32_t* wanted, int32_t n_wanted, float* logits,
                             float* scratch, int32_t n_threads) {
    auto run = model->weight_bytes == 4 ? forward<float> : model->weight_bytes == 2 ? forward<bf16> : forward<int8>;
    run(*model, sequences, n_sequences, ids, cache, slots, capacity, wanted, n_wanted, logits, scratch, n_threads);
}

extern "C" void gpt2_linear(const Linear* l, int32_t weight_bytes, const float* x, int32_t M, float* y, int32_t then,
                            int32_t n_threads) {
    auto run = weight_bytes == 4 ? linear<float> : weight_bytes == 2 ? linear<bf16> : linear<int8>;
#pragma omp parallel num_threads(n_threads)
    run(*l, x, M, y, (Then)then);
}
