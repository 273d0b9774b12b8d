// GPT-2's forward pass for a few tokens at a time, at the speed at which memory delivers the weights.
//
// B sequences of T new tokens each, M = B T rows, C width, H heads, D = C / H, S tokens seen. All threads go through one
// step together; each `omp for` is a stage that they share, with a barrier at its end.
//
// A matrix (N, K) lies in panels of P outputs: (N / P, K, P). A panel is read from its first byte to its last, which is the
// order that memory is fastest in, and P is three vector registers, so that no sum ever crosses lanes. Every output is
// summed in the same order whatever M is: a row's result does not depend on the rows beside it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
// GCC would rather load the weights again for each row.
#define IN_REGISTERS(a, b, c) asm("" : "+v"(a), "+v"(b), "+v"(c))
#else
#define IN_REGISTERS(a, b, c)
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // 32 registers: 24 sums, 3 weights
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4;   // 16 registers: 12 sums, 3 weights
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int P = 3 * LANES;
constexpr int K_BLOCK = 128;    // this many products are summed apart: more accurate, and the weights stay in L1 for all rows
constexpr int ROW_BLOCK = 128;  // so many rows stay in L2 while panels pass
constexpr int AHEAD = 6144;     // bytes: about what arrives while memory answers once

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
struct bf16 { uint16_t high; };  // the upper half of a float
struct int8 { int8_t value; };

inline vec load(const float* w) {
    vec v;
    std::memcpy(&v, w, sizeof v);
    return v;
}
#if defined(__AVX512F__)
inline vec load(const bf16* w) { return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i*)w)), 16); }
inline vec load(const int8* w) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((__m128i*)w))); }
#elif defined(__AVX2__)
inline vec load(const bf16* w) { return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((__m128i*)w)), 16); }
inline vec load(const int8* w) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((__m128i*)w))); }
#else
inline vec load(const bf16* w) {
    bits b;
    for (int i = 0; i < LANES; i++) b[i] = (uint32_t)w[i].high << 16;
    return (vec)b;
}
inline vec load(const int8* w) {
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = w[i].value;
    return v;
}
#endif

struct Linear {
    const void* weight;  // (N / P, K, P) of float, bf16 or int8
    const float* scale;  // (N) or null: what an int8 weight of 1 means
    const float* bias;   // (N) or null
    int32_t N, K;
};
struct Norm { const float *weight, *bias; };
struct Block { Norm ln_1, ln_2; Linear c_attn, attn_proj, c_fc, mlp_proj; };
struct Model {
    const Block* blocks;
    Norm ln_f;
    Linear head;
    int32_t n_layers, n_heads, weight_bytes, exact_gelu;
    float eps;
};
enum Then { STORE, ADD, GELU, EXACT_GELU };

// e^x as 2^n e^r with |r| <= ln 2 / 2, where eight terms of the series are float's whole precision. Branchless: it vectorises.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    float n = std::nearbyint(x * 1.44269504f);
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
    float e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r / 5040.f))))));
    return e * __builtin_bit_cast(float, ((int32_t)n + 127) << 23);
}
// x (1 + tanh u) / 2 = x / (1 + e^-2u)
inline float gelu(float x) { return x / (1 + exponential(-1.595769122f * (x + 0.044715f * x * x * x))); }
inline float exact_gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.707106781f)); }

// sums (R, P) += x (R, K) panel (K, P), in BLOCKS blocks of K at the same time, each summed apart and added in its turn.
template <int R, int BLOCKS, class W> void multiply(const W* panel, const float* x, int64_t x_stride, int K, float* sums) {
    vec sum[BLOCKS][R][3] = {};
    for (int k = 0; k < K; k++)
#pragma GCC unroll 2
        for (int b = 0; b < BLOCKS; b++) {
            const W* from = panel + (int64_t)(b * K + k) * P;
            vec w[3] = {load(from), load(from + LANES), load(from + 2 * LANES)};
            if (sizeof(W) < 4) __builtin_prefetch((const char*)from + AHEAD);  // floats come in time by themselves
            IN_REGISTERS(w[0], w[1], w[2]);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 3
                for (int i = 0; i < 3; i++) sum[b][r][i] += w[i] * x[r * x_stride + b * K + k];
        }
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; b++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
            for (int i = 0; i < 3; i++) {
                vec total = load(sums + r * P + i * LANES) + sum[b][r][i];
                std::memcpy(sums + r * P + i * LANES, &total, sizeof total);
            }
}
// The same for n of at most R rows.
template <int R, class W> void multiply_rows(int n, const W* panel, const float* x, int64_t x_stride, int K, float* sums) {
    if constexpr (R > 1)
        if (n < R) return multiply_rows<R - 1>(n, panel, x, x_stride, K, sums);
    multiply<R, 1>(panel, x, x_stride, K, sums);
}

// y (M, N) = x (M, K) weightᵀ + bias, then what `then` says. Each thread takes panels that lie one after the other.
template <class W> void linear(const Linear& l, const float* x, int M, float* y, Then then) {
    const int n_panels = (l.N + P - 1) / P, n_row_blocks = (M + ROW_BLOCK - 1) / ROW_BLOCK;
#pragma omp for schedule(static)
    for (int unit = 0; unit < n_panels * n_row_blocks; unit++) {
        const int first = unit % n_panels * P, row = unit / n_panels * ROW_BLOCK, n_rows = std::min(ROW_BLOCK, M - row);
        const W* panel = (const W*)l.weight + (int64_t)first * l.K;
        float sums[ROW_BLOCK * P];
        std::fill(sums, sums + n_rows * P, 0.0f);
        int k = 0;
        if (n_rows == 1)  // whose three sums alone would wait for each other
            for (; k + 2 * K_BLOCK <= l.K; k += 2 * K_BLOCK)
                multiply<1, 2>(panel + k * P, x + (int64_t)row * l.K + k, l.K, K_BLOCK, sums);
        for (; k < l.K; k += K_BLOCK)
            for (int r = 0; r < n_rows; r += ROWS)
                multiply_rows<ROWS>(std::min(ROWS, n_rows - r), panel + k * P, x + (int64_t)(row + r) * l.K + k, l.K,
                                    std::min(K_BLOCK, l.K - k), sums + r * P);
        const int width = std::min(P, l.N - first);
        for (int r = 0; r < n_rows; r++) {
            float *sum = sums + r * P, *to = y + (int64_t)(row + r) * l.N + first;
            if (l.scale) for (int i = 0; i < width; i++) sum[i] *= l.scale[first + i];
            if (l.bias) for (int i = 0; i < width; i++) sum[i] += l.bias[first + i];
            if (then == ADD) for (int i = 0; i < width; i++) to[i] += sum[i];
            else if (then == GELU) for (int i = 0; i < width; i++) to[i] = gelu(sum[i]);
            else if (then == EXACT_GELU) for (int i = 0; i < width; i++) to[i] = exact_gelu(sum[i]);
            else std::copy(sum, sum + width, to);
        }
    }
}

// The last n of each sequence's T rows of x, normalised: y (B n, C).
void normalise(const Norm& norm, const float* x, int B, int T, int n, int C, float eps, float* y) {
#pragma omp for
    for (int row = 0; row < B * n; row++) {
        const float* from = x + (int64_t)(row / n * T + T - n + row % n) * C;
        float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
        for (int c = 0; c < C; c++) mean += from[c];
        mean /= C;
#pragma omp simd reduction(+ : variance)
        for (int c = 0; c < C; c++) variance += (from[c] - mean) * (from[c] - mean);
        const float scale = 1 / std::sqrt(variance / C + eps);
        for (int c = 0; c < C; c++) y[(int64_t)row * C + c] = (from[c] - mean) * scale * norm.weight[c] + norm.bias[c];
    }
}

// One head of one sequence: qkv (T, 3 C) begins at its queries. keys and values (S, D) get the new tokens; y (T, C).
void attend(const float* qkv, int T, int C, int D, int first, int past, float* keys, float* values, float* y) {
    std::vector<float> weights(past + T);
    const float scale = 1 / std::sqrt((float)D);
    for (int t = 0; t < T; t++, qkv += 3 * C, y += C) {
        const int S = past + t + 1;
        std::copy(qkv + C, qkv + C + D, keys + (int64_t)(S - 1) * D);
        std::copy(qkv + 2 * C, qkv + 2 * C + D, values + (int64_t)(S - 1) * D);
        // A padding token sees itself, as in model.py.
        const int begin = std::min(first, S - 1);
        float largest = -INFINITY, total = 0;
        for (int s = begin; s < S; s++) {
            float score = 0;
#pragma omp simd reduction(+ : score)
            for (int d = 0; d < D; d++) score += qkv[d] * keys[(int64_t)s * D + d];
            weights[s] = score * scale;
            largest = std::max(largest, weights[s]);
        }
#pragma omp simd reduction(+ : total)
        for (int s = begin; s < S; s++) total += weights[s] = exponential(weights[s] - largest);
        std::fill(y, y + D, 0.0f);
        for (int s = begin; s < S; s++)
            for (int d = 0; d < D; d++) y[d] += weights[s] / total * values[(int64_t)s * D + d];
    }
}

template <class W> void forward(const Model& model, float* x, int B, int T, int past, int length, const int32_t* first,
                                float* cache, int n_logits, float* logits, float* scratch) {
    const int C = model.head.K, H = model.n_heads, D = C / H, M = B * T;
    float *h = scratch, *wide = scratch + (int64_t)M * C;  // (M, C) and (M, 4 C)
    const int64_t one = (int64_t)length * D;               // keys or values of a head, (length, D)
#pragma omp parallel
    {
        for (int layer = 0; layer < model.n_layers; layer++) {
            const Block& block = model.blocks[layer];
            float *keys = cache + layer * 2 * B * H * one, *values = keys + B * H * one;
            normalise(block.ln_1, x, B, T, T, C, model.eps, h);
            linear<W>(block.c_attn, h, M, wide, STORE);
#pragma omp for schedule(dynamic)
            for (int head = 0; head < B * H; head++) {
                const int b = head / H, column = head % H * D;
                attend(wide + (int64_t)b * T * 3 * C + column, T, C, D, first[b], past, keys + head * one,
                       values + head * one, h + (int64_t)b * T * C + column);
            }
            linear<W>(block.attn_proj, h, M, x, ADD);
            normalise(block.ln_2, x, B, T, T, C, model.eps, h);
            linear<W>(block.c_fc, h, M, wide, model.exact_gelu ? EXACT_GELU : GELU);
            linear<W>(block.mlp_proj, wide, M, x, ADD);
        }
        normalise(model.ln_f, x, B, T, n_logits, C, model.eps, h);
        linear<W>(model.head, h, B * n_logits, logits, STORE);
    }
}

inline void narrow(float w, float, float& to) { to = w; }
inline void narrow(float w, float, bf16& to) {
    uint32_t b = __builtin_bit_cast(uint32_t, w);
    to.high = (b + 0x7fff + (b >> 16 & 1)) >> 16;  // to the nearest, of two the even
}
inline void narrow(float w, float scale, int8& to) { to.value = (int8_t)std::nearbyint(w / scale); }

// weight (N, K) to panels.
template <class W> void pack(const float* weight, const float* scale, int N, int K, W* panels) {
#pragma omp parallel for schedule(dynamic)
    for (int n = 0; n < (N + P - 1) / P * P; n += P)
        for (int k = 0; k < K; k++)
            for (int i = 0; i < P; i++) {
                W& to = panels[((int64_t)n * K) + k * P + i];
                if (n + i < N) narrow(weight[(int64_t)(n + i) * K + k], scale ? scale[n + i] : 1, to);
                else to = W{};
            }
}

extern "C" int32_t gpt2_panel() { return P; }

extern "C" void gpt2_pack(const float* weight, const float* scale, int32_t weight_bytes, int32_t N, int32_t K, void* to) {
    if (weight_bytes == 4) pack(weight, scale, N, K, (float*)to);
    else if (weight_bytes == 2) pack(weight, scale, N, K, (bf16*)to);
    else pack(weight, scale, N, K, (int8*)to);
}

// x (B, T, C), embeddings, is used up; first (B) is where each sequence begins, after its padding; logits (B, n_logits, V).
extern "C" void gpt2_forward(const Model* model, float* x, int32_t B, int32_t T, int32_t past, int32_t length,
                             const int32_t* first, float* cache, int32_t n_logits, float* logits, float* scratch) {
    auto run = model->weight_bytes == 4 ? forward<float> : model->weight_bytes == 2 ? forward<bf16> : forward<int8>;
    run(*model, x, B, T, past, length, first, cache, n_logits, logits, scratch);
}

extern "C" void gpt2_linear(const Linear* l, int32_t weight_bytes, const float* x, int32_t M, float* y, int32_t then) {
    auto run = weight_bytes == 4 ? linear<float> : weight_bytes == 2 ? linear<bf16> : linear<int8>;
#pragma omp parallel
    run(*l, x, M, y, (Then)then);
}
