// Copying a weight matrix from the memory of a model or a mapped file into the panels of products.h.
//
// The matrix can be stored by rows or by columns, in float, bf16 or fp16. A panel is first gathered as floats, (K, P), in a
// buffer that fits into the L2 cache. There the scales of int8 weights and NaN are found, so the matrix is read only once.
#pragma once
#include "products.h"

struct fp16 { uint16_t value; };  // IEEE 754's half precision

// A matrix (N, K) whose element (n, k) is at data[n * row_stride + k * column_stride].
struct Source {
    const void* data;
    int64_t row_stride, column_stride;
    int32_t type;  // 0: float, 1: bf16, 2: fp16
};

inline float to_float(fp16 w) {
    // The exponents of fp16 and float differ by 112, so a product with 2^112 gives the value, also of a subnormal number.
    const uint32_t magnitude = (uint32_t)(w.value & 0x7fff) << 13, sign = (uint32_t)(w.value & 0x8000) << 16;
    const float finite = __builtin_bit_cast(float, magnitude) * 0x1p112f;
    const bool is_finite = (w.value & 0x7c00) != 0x7c00;
    const uint32_t number = is_finite ? __builtin_bit_cast(uint32_t, finite) : magnitude | 0x7f800000;
    return __builtin_bit_cast(float, number | sign);
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

// Copies n rows, from `row` on, to a panel (K, P) of floats. The other columns of the panel stay as they are.
template <class S> void gather(const Source& source, int64_t row, int n, int K, float* panel) {
    const S* from = (const S*)source.data + row * source.row_stride;
    if (source.row_stride < source.column_stride)
        for (int k = 0; k < K; k++)
            for (int i = 0; i < n; i++) panel[k * P + i] = to_float(from[i * source.row_stride + k * source.column_stride]);
    else
        for (int i = 0; i < n; i++)
            for (int k = 0; k < K; k++) panel[k * P + i] = to_float(from[i * source.row_stride + k * source.column_stride]);
}

// Writes the int8 scale of each column of a panel (K, P), its largest absolute value / 127. Returns false if one is not finite.
inline bool find_scales(const float* panel, int K, float* scales) {
    float largest[P] = {}, poison[P] = {};  // poison becomes NaN if any number is NaN or infinite, and is 0 otherwise
    for (int k = 0; k < K; k++)
        for (int i = 0; i < P; i++) {
            largest[i] = std::max(largest[i], std::fabs(panel[k * P + i]));
            poison[i] += panel[k * P + i] * 0;
        }
    float all = 0;
    for (int i = 0; i < P; i++) {
        scales[i] = (largest[i] == 0 ? 1 : largest[i] / 127) + poison[i];
        all += poison[i];
    }
    return all == 0;
}

// Packs the n rows of `source`, which become the rows of `l` from `row` on, a multiple of P. Panels are rounded up to whole ones
// and filled with 0. With l.scale, the scales are written too. Returns false if a weight with a scale is NaN or infinite.
template <class W> bool pack(const Source& source, const Linear& l, int row, int n, int n_threads) {
    constexpr int T = K_INTERLEAVE<W>;
    const int K = (l.K + T - 1) / T * T;
    auto read = source.type == 0 ? gather<float> : source.type == 1 ? gather<bf16> : gather<fp16>;
    bool are_finite = true;
#pragma omp parallel num_threads(n_threads) reduction(&& : are_finite)
    {
        std::vector<float> panel;
#pragma omp for schedule(dynamic)
        for (int first = 0; first < n; first += P) {
            const int n_rows = std::min(P, n - first);
            float scales[P];
            panel.assign((int64_t)K * P, 0);
            read(source, first, n_rows, l.K, panel.data());
            if (l.scale) {
                are_finite = find_scales(panel.data(), l.K, scales) && are_finite;
                std::copy_n(scales, n_rows, (float*)l.scale + row + first);
            }
            W* to = (W*)l.weight + panel_index<W>(l, row + first, 0);
            for (int k = 0; k < K; k++)
                for (int i = 0; i < P; i++) from_float(panel[k * P + i], scales[i], to[(k / T * P + i) * T + k % T]);
        }
    }
    return are_finite;
}
