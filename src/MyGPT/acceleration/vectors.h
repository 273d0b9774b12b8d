// Vector registers of any CPU, and functions of float32 numbers that the compiler turns into vector instructions.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Number of float32 numbers in a register: one vector instruction computes all of them.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));

template <class V, class T> inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

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
