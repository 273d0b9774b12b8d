// Four-bit weights in groups of 32 inputs: weight = scale * (step * (code - 8) + offset), with a float scale per output, an
// 8-bit step and an 8-bit offset per group, and codes from 0 to 15. int4.py chooses these numbers. 4.5 bits per weight are read.
//
// A panel of P outputs stores, group after group: P pairs of step and offset, and 16 P bytes with two codes each. Byte 4 n + j of chunk c
// belongs to output n: its low half is the code of input 8 c + j of the group, and its high half that of input 8 c + 4 + j.
// So an int32 lane holds four inputs of one output, which is how the CPU multiplies bytes.
//
// Rows are rounded to 8 bits, with a scale per group. All sums within a group are exact integers.
#pragma once
#include "products.h"

constexpr int GROUP = 32;
constexpr int GROUP_BLOCK = 8;  // groups of a panel that stay in the L1 cache for all rows
constexpr int GROUP_BYTES = (2 + GROUP / 2) * P;  // bytes of a group in a panel
#if defined(__AVX512F__)
constexpr int INT4_ROWS = 6;
#else
constexpr int INT4_ROWS = 3;
#endif
typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));

struct int4 { uint8_t pair; };
template <> inline int64_t panel_size<int4>(int K) { return (int64_t)(K + GROUP - 1) / GROUP * GROUP_BYTES; }

// Returns step * sum + offset * x_sum, given 2^16 x_sum. A sum of 32 products of -8 to 7 and -127 to 127 has 16 bits, as has x_sum.
inline ints with_step(shorts step_and_offset, ints sum, int32_t x_sum_high) {
    const ints pairs = (sum & 0xffff) | x_sum_high;
#if defined(__AVX512BW__)
    return (ints)_mm512_madd_epi16((__m512i)step_and_offset, (__m512i)pairs);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (ints)_mm256_madd_epi16((__m256i)step_and_offset, (__m256i)pairs);
#else
    const ints numbers = (ints)step_and_offset;
    return (numbers << 16 >> 16) * (pairs << 16 >> 16) + (numbers >> 16) * (pairs >> 16);
#endif
}

// multiply_bytes adds four products to each int32 lane: of four codes and the four signed bytes of x. With AVX2, two 16-bit
// halves of a lane hold the sums of a group: at most 16 products of 15 and 127, which is less than 2^15. `lane_sums` adds the halves.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef ints byte_sums;
inline byte_sums multiply_bytes(byte_sums sum, bytes w, int32_t x) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
}
inline ints lane_sums(byte_sums sum) { return sum; }
#elif defined(__AVX512BW__)
typedef shorts byte_sums;
inline byte_sums multiply_bytes(byte_sums sum, bytes w, int32_t x) {
    return sum + (shorts)_mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(x));
}
inline ints lane_sums(byte_sums sum) { return (ints)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1)); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
typedef shorts byte_sums;
inline byte_sums multiply_bytes(byte_sums sum, bytes w, int32_t x) {
    return sum + (shorts)_mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
}
inline ints lane_sums(byte_sums sum) { return (ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#else
typedef ints byte_sums;
inline byte_sums multiply_bytes(byte_sums sum, bytes w, int32_t x) {
    for (int j = 0; j < 4; j++) sum += ((ints)w >> 8 * j & 15) * (int32_t)(int8_t)(x >> 8 * j);
    return sum;
}
inline ints lane_sums(byte_sums sum) { return sum; }
#endif

// Rows rounded to 8 bits in groups of 32.
template <> struct Rows<int4> {
    struct Group { float scale; int32_t sum_times_8, high_sum; };  // the value of a 1, and 8 and 2^16 times the sum of all numbers
    int64_t stride, n_groups;
    int8_t* x;
    Group* groups;  // (n, n_groups)

    Rows(const float* from, int n, int K) : stride((K + GROUP - 1) / GROUP * GROUP), n_groups(stride / GROUP) {
        static thread_local std::vector<int8_t> numbers;
        static thread_local std::vector<Group> all_groups;
        numbers.resize(std::max<size_t>(numbers.size(), n * stride));
        all_groups.resize(std::max<size_t>(all_groups.size(), n * n_groups));
        x = numbers.data(), groups = all_groups.data();
        for (int row = 0; row < n; row++, from += K)
            for (int g = 0; g < n_groups; g++) {
                const int first = g * GROUP;
                const float* group = from + first;
                float padded[GROUP] = {};
                if (K - first < GROUP) group = (const float*)std::memcpy(padded, group, (K - first) * sizeof(float));
                round_group(group, x + row * stride + first, groups[row * n_groups + g]);
            }
    }
    static void round_group(const float* from, int8_t* to, Group& group) {
        // The parts of a group are added before the lanes of a vector, which is faster. poison becomes NaN if any number is NaN
        // or infinite, and is 0 otherwise.
        vec largest = {}, poison = {};
        for (int k = 0; k < GROUP; k += LANES) {
            const vec x = load<vec>(from + k), size = (vec)((bits)x & 0x7fffffff);
            largest = size > largest ? size : largest;
            poison += x * 0;
        }
        const float top = maximum((const float*)&largest, LANES), bad = sum((const float*)&poison, LANES, [](auto v) { return v; });
        group.scale = top / 127 + bad;  // a NaN here makes every output of the row NaN
        // 127 / top would overflow for a smaller `top`, and a NaN has no 8-bit value.
        const float inverse = top > 1e-30f && bad == 0 ? 127 / top : 0;
        int32_t rounded[GROUP], x_sum = 0;
        ints total = {};
        for (int k = 0; k < GROUP; k += LANES) {
            // Adding 1.5 * 2^23 rounds to a whole number, which is then in the lowest bits of the sum.
            ints whole = (ints)(load<vec>(from + k) * inverse + 12582912.0f) - 0x4b400000;
            if (bad != 0) whole = ints{};
            total += whole;
            std::memcpy(rounded + k, &whole, sizeof whole);
        }
        for (int k = 0; k < GROUP; k++) to[k] = (int8_t)rounded[k];
        for (int lane = 0; lane < LANES; lane++) x_sum += total[lane];
        group.sum_times_8 = 8 * x_sum, group.high_sum = x_sum << 16;
    }
};

// sums (R, P) += the R rows, from `row` on, times the groups of a panel from `first` to `end`.
template <int R> void multiply_groups(const Rows<int4>& rows, int row, const int4* panel, int first, int end, float* sums) {
    const int8_t* x = rows.x + row * rows.stride + first * GROUP;
    const Rows<int4>::Group* group = rows.groups + row * rows.n_groups + first;
    const char* from = (const char*)panel + first * GROUP_BYTES;
    vec total[R][3];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 3; i++) total[r][i] = load<vec>(sums + r * P + i * LANES);
    for (int g = first; g < end; g++, x += GROUP, group++) {
        const char* steps = from;
        from += 2 * P;
        byte_sums sum[R][3] = {};
#pragma GCC unroll 4
        for (int chunk = 0; chunk < 4; chunk++, from += 4 * P) {
            if (row == 0) {  // later rows find the panel in the L1 cache
                __builtin_prefetch(from + PREFETCH<int4>);
                __builtin_prefetch(from + PREFETCH<int4> + 64);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                bytes w[3];
#pragma GCC unroll 3
                for (int i = 0; i < 3; i++) {
                    const bytes pairs = load<bytes>(from + i * 4 * LANES);
                    w[i] = half ? pairs >> 4 : pairs & 15;
                }
                IN_REGISTERS(w[0], w[1], w[2]);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const int32_t four = load<int32_t>(x + r * rows.stride + 8 * chunk + 4 * half);
#pragma GCC unroll 3
                    for (int i = 0; i < 3; i++) sum[r][i] = multiply_bytes(sum[r][i], w[i], four);
                }
            }
        }
#pragma GCC unroll 3
        for (int i = 0; i < 3; i++) {
            const shorts step_and_offset = widen((const int8*)steps + i * 2 * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const Rows<int4>::Group& of_row = group[r * rows.n_groups];
                const ints product = with_step(step_and_offset, lane_sums(sum[r][i]) - of_row.sum_times_8, of_row.high_sum);
                total[r][i] += __builtin_convertvector(product, vec) * of_row.scale;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 3; i++) std::memcpy(sums + r * P + i * LANES, &total[r][i], sizeof(vec));
}

// Multiplies n <= R rows, from `row` on.
template <int R>
void multiply_groups(const Rows<int4>& rows, int n, int row, const int4* panel, int first, int end, float* sums) {
    if constexpr (R > 1)
        if (n < R) return multiply_groups<R - 1>(rows, n, row, panel, first, end, sums);
    multiply_groups<R>(rows, row, panel, first, end, sums);
}
template <> inline void multiply_panel(const Rows<int4>& rows, int n, const int4* panel, int, float* sums) {
    const int n_groups = rows.n_groups;
    for (int first = 0; first < n_groups; first += GROUP_BLOCK)
        for (int row = 0; row < n; row += INT4_ROWS)
            multiply_groups<INT4_ROWS>(rows, std::min(INT4_ROWS, n - row), row, panel, first,
                                       std::min(first + GROUP_BLOCK, n_groups), sums + row * P);
}

// Writes row n of a matrix to y (K).
template <> inline void row_of<int4>(const Linear& l, int n, float* y) {
    const char* panel = (const char*)l.weight + n / P * panel_size<int4>(l.K);
    const int output = n % P;
    for (int k = 0; k < l.K; k++) {
        const char* group = panel + k / GROUP * GROUP_BYTES;
        const int chunk = k % GROUP / 8, j = k % 4;
        const int pair = (uint8_t)group[2 * P + chunk * 4 * P + 4 * output + j];
        const int code = k % 8 < 4 ? pair & 15 : pair >> 4;
        y[k] = l.scale[n] * (float)((int8_t)group[2 * output] * (code - 8) + (int8_t)group[2 * output + 1]);
    }
}
