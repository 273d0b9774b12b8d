// Sampling: the next token of a row of logits, chosen as sampling.py does, and with torch's random numbers.
//
// sampling.py draws one number q with an exponential distribution for each of V tokens, and takes the token with the largest
// p / q. torch needs 1.4 ms for 50,257 such numbers, because it computes V logarithms one by one. They are q = -log(1 - u), for
// u from 0 to 1, so q >= u. A token with a p / u below the largest p / q so far cannot win, and needs no logarithm: a dozen
// logarithms remain. u consists of two 32-bit numbers of the Mersenne Twister (Matsumoto & Nishimura, 1998), as in torch.
#pragma once
#include "vectors.h"

// The beginning of the tensor that torch.Generator.get_state returns for a CPU.
struct TorchState {
    uint64_t seed;
    int32_t left, seeded;
    uint64_t next, words[624];
};

// Writes the next n numbers of a Mersenne Twister to `out`, and advances its state.
inline void twister(TorchState& state, uint32_t* out, int64_t n) {
    constexpr int N = 624, M = 397;
    uint32_t s[N];
    for (int i = 0; i < N; i++) s[i] = state.words[i];
    auto twist = [&](int i, int after, int far) __attribute__((always_inline)) {
        const uint32_t both = (s[i] & 0x80000000u) | (s[after] & 0x7fffffffu);
        s[i] = s[far] ^ both >> 1 ^ (-(s[after] & 1) & 0x9908b0dfu);
    };
    int next = state.left == 1 ? N : state.next;
    while (n > 0) {
        if (next == N) {
            for (int i = 0; i < N - M; i++) twist(i, i + 1, i + M);
            for (int i = N - M; i < N - 1; i++) twist(i, i + 1, i + M - N);
            twist(N - 1, 0, M - 1);
            next = 0;
        }
        const int taken = std::min<int64_t>(n, N - next);
        for (int i = 0; i < taken; i++) {
            uint32_t y = s[next + i];
            y ^= y >> 11;
            y ^= y << 7 & 0x9d2c5680u;
            y ^= y << 15 & 0xefc60000u;
            out[i] = y ^ y >> 18;
        }
        out += taken, next += taken, n -= taken;
    }
    for (int i = 0; i < N; i++) state.words[i] = s[i];
    state.next = next, state.left = N + 1 - next;
}
// The exponential number that torch makes from two numbers of the twister: 53 bits are a number u from 0 to 1.
inline float exponential_number(const uint32_t* pair) {
    const uint64_t bits = (uint64_t)pair[0] << 32 | pair[1];
    return -std::log1p(-(double)(bits & ((1ull << 53) - 1)) * 0x1p-53);
}

// The options of SamplingConfig. A value of 0 means that an option is not set.
// `outside` is 1 - top_p.
struct Sampling { float temperature, outside, min_p, penalty; int32_t top_k; };

// Divides n values into buckets by size, again and again, until few are left that contain a wanted one. The values in a bucket
// are between those of its neighbours, so only the bucket's own values must be sorted.
struct Ranking {
    static constexpr int BUCKETS = 1024, FEW = 64;
    std::vector<float> values, inner, weights;
    std::vector<int16_t> bucket;
    double weight[BUCKETS];

    // Begins with those of n values that are not minus infinity.
    void start(const float* x, int n) {
        values.resize(n);
        size_t n_finite = 0;
        for (int i = 0; i < n; i++) {
            values[n_finite] = x[i];
            n_finite += x[i] > -INFINITY;
        }
        values.resize(n_finite);
    }
    // Sums weigh(value) in each bucket. Bucket 0 has the largest values. Returns false if all values are in one bucket.
    template <class Weigh> bool divide(Weigh weigh) {
        const float high = maximum(values.data(), values.size());
        weights.resize(values.size());
        for (size_t i = 0; i < values.size(); i++) weights[i] = -values[i];
        const float low = -maximum(weights.data(), weights.size());
        const float scale = (BUCKETS - 1) / (high - low);
        if (!(scale > 0 && scale < INFINITY)) return false;
        bucket.resize(values.size());
        const float* from = values.data();
        int16_t* to = bucket.data();
        for (size_t i = 0; i < values.size(); i++) to[i] = (int32_t)std::min((high - from[i]) * scale, BUCKETS - 1.0f);
        for (size_t i = 0; i < values.size(); i++) weights[i] = weigh(from[i]);
        std::fill_n(weight, BUCKETS, 0.0);
        for (size_t i = 0; i < values.size(); i++) weight[to[i]] += weights[i];
        return true;
    }
    // Keeps only the values of one bucket. Returns false if this leaves all of them.
    bool keep(int b) {
        inner.clear();
        for (size_t i = 0; i < values.size(); i++)
            if (bucket[i] == b) inner.push_back(values[i]);
        values.swap(inner);
        return values.size() < inner.size();
    }
    // The k-th largest of n values, or minus infinity if fewer are above that. If k blocks of values have a maximum of at least
    // `bound`, so have k values.
    float kth(size_t k, const float* x, int n) {
        constexpr int BLOCK = 32;
        const int n_blocks = (n + BLOCK - 1) / BLOCK;
        float bound = -INFINITY;
        auto block_maximum = [&](int b) { return maximum(x + b * BLOCK, std::min(BLOCK, n - b * BLOCK)); };
        if (k <= (size_t)n_blocks) {
            inner.resize(n_blocks);
            for (int b = 0; b < n_blocks; b++) inner[b] = block_maximum(b);
            std::nth_element(inner.begin(), inner.begin() + k - 1, inner.end(), std::greater<float>());
            bound = inner[k - 1];
        }
        if (bound == -INFINITY) start(x, n);
        else {
            values.clear();
            for (int b = 0; b < n_blocks; b++)
                if (block_maximum(b) >= bound)
                    for (int i = b * BLOCK; i < std::min(n, (b + 1) * BLOCK); i++)
                        if (x[i] >= bound) values.push_back(x[i]);
        }
        if (k > values.size()) return -INFINITY;
        while (values.size() > FEW && divide([](float) { return 1.0f; })) {
            int b = 0;
            for (; weight[b] < k; b++) k -= weight[b];
            if (!keep(b)) break;
        }
        std::nth_element(values.begin(), values.begin() + k - 1, values.end(), std::greater<float>());
        return values[k - 1];
    }
    // The smallest value that is kept if values are left out from the smallest on, as long as the probabilities of those left
    // out sum to at most `most`. n_tied becomes the number of values equal to it that are left out.
    template <class Probability> float smallest_kept(float most, Probability probability, int& n_tied) {
        double outside = 0;
        while (values.size() > FEW && divide(probability)) {
            int b = BUCKETS - 1;
            for (; b > 0 && (float)(outside + weight[b]) <= most; b--) outside += weight[b];
            if (!keep(b)) break;
        }
        std::sort(values.begin(), values.end());
        size_t i = 0;
        for (; i + 1 < values.size(); i++) {
            outside += probability(values[i]);
            if ((float)outside > most) break;
        }
        n_tied = i - (std::lower_bound(values.begin(), values.end(), values[i]) - values.begin());
        return values[i];
    }
};

// Applies the penalty, the temperature and the filters to one row. x (V) becomes numbers that are proportional to the
// probabilities, or the logits if the temperature is 0. Returns false if the largest logit is NaN or infinite.
inline bool filter(const Sampling& options, const float* logits, const uint8_t* seen, int V, float* x, float& total) {
    const float n_nan = ::sum(logits, V, [](auto v) { return v == v ? decltype(v){} : decltype(v){} + 1; });
    float high = maximum(logits, V);
    if (n_nan != 0 || !std::isfinite(high)) return false;
    std::copy_n(logits, V, x);
    if (options.penalty != 0 && seen)
        for (int i = 0; i < V; i++)
            if (seen[i] && std::isfinite(x[i])) {
                const float penalized = x[i] > 0 ? x[i] / options.penalty : x[i] * options.penalty;
                x[i] = std::min(std::max(penalized, -1e7f), 1e7f);
            }
    if (options.temperature == 0) return true;
    for (int i = 0; i < V; i++) x[i] /= options.temperature;
    static thread_local Ranking ranking;
    if (options.top_k != 0 && options.top_k < V) {
        const float smallest = ranking.kth(options.top_k, x, V);
        for (int i = 0; i < V; i++) x[i] = x[i] < smallest ? -INFINITY : x[i];
    }
    high = maximum(x, V);
    if (!std::isfinite(high)) return false;
    auto weight = [&](float v) { return v > high - 87 ? exponential(v - high) : 0.0f; };
    auto sum_of_weights = [&] { return (float)::sum(x, V, [](auto v) { return v; }); };
    if (options.outside != 0) {
        total = 0;
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < V; i++) total += weight(x[i]);
        ranking.start(x, V);
        int n_tied = 0;
        const float smallest = ranking.smallest_kept(options.outside, [&](float v) { return weight(v) / total; }, n_tied);
        for (int i = 0; i < V && n_tied > 0; i++)  // of the tokens that are equal, the first ones are left out
            if (x[i] == smallest) x[i] = -INFINITY, n_tied--;
        for (int i = 0; i < V; i++) x[i] = x[i] < smallest ? -INFINITY : x[i];
    }
    for (int i = 0; i < V; i++) x[i] = weight(x[i]);
    total = sum_of_weights();
    if (options.min_p != 0) {
        const float least = options.min_p * (1 / total);  // the most likely token has the weight 1
        for (int i = 0; i < V; i++) x[i] = x[i] / total < least ? 0 : x[i];
        total = sum_of_weights();
    }
    return true;
}

// The index of the first of the largest numbers.
inline int largest_index(const float* x, int n) {
    constexpr int BLOCK = 256;
    int first = 0;
    for (int i = BLOCK; i < n; i += BLOCK)
        if (maximum(x + i, std::min(BLOCK, n - i)) > maximum(x + first, BLOCK)) first = i;
    const int length = std::min(BLOCK, n - first);
    return std::find(x + first, x + first + length, maximum(x + first, length)) - x;
}

// The token with the largest p / q, where p is weight / total and q comes from two numbers of the twister.
inline int race(const float* weight, float total, const uint32_t* pairs, int V) {
    constexpr int BLOCK = 64;
    float best = 0;
    int winner = -1;
    for (int first = 0; first < V; first += BLOCK) {
        const int last = std::min(V, first + BLOCK);
        // The upper 21 of u's bits give a number that is not above u. A little less allows for the rounding of the quotients.
        const float limit = best * total * (1 - 1e-5f) * 0x1p-21f;
        int n_possible = 0;
        for (int i = first; i < last; i++) n_possible += weight[i] > (float)(int32_t)(pairs[2 * i] & 0x1fffff) * limit;
        if (n_possible == 0) continue;
        for (int i = first; i < last; i++) {
            if (!(weight[i] > (float)(int32_t)(pairs[2 * i] & 0x1fffff) * (best * total * (1 - 1e-5f) * 0x1p-21f))) continue;
            const float ratio = weight[i] / total / exponential_number(pairs + 2 * i);
            if (ratio > best) best = ratio, winner = i;
        }
    }
    return winner;
}

// Writes the next token of each of B rows of logits (B, V) to `tokens`, and advances the states of the generators: none if the
// temperature is 0, one for all rows, or one per row. Returns false if the largest logit of a row is NaN or infinite.
inline bool pick(const Sampling& options, const float* logits, const uint8_t* seen, int B, int V, TorchState* const* states,
                 int n_states, int64_t* tokens, int n_threads) {
    static thread_local std::vector<float> memory;
    static thread_local std::vector<uint32_t> numbers;
    const int64_t size = V;
    memory.resize(std::max<size_t>(memory.size(), B * size));
    numbers.resize(std::max<size_t>(numbers.size(), n_states ? 2 * B * size : 0));
    float* x = memory.data();
    uint32_t* pairs = numbers.data();
    std::vector<float> totals(B, 1.0f);
    std::vector<char> is_right(B, 1);
    // The random numbers do not depend on the logits, so one thread can draw them while another one filters.
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int unit = 0; unit < n_states + B; unit++) {
            if (unit < n_states) {
                const int64_t n = 2 * size * (n_states == 1 ? B : 1);
                twister(*states[unit], pairs + 2 * size * unit, n);
            } else {
                const int row = unit - n_states;
                is_right[row] = filter(options, logits + row * size, seen ? seen + row * size : nullptr, V, x + row * size, totals[row]);
            }
        }
#pragma omp for
        for (int row = 0; row < B; row++)
            if (is_right[row]) {
                const float* weights = x + row * size;
                tokens[row] = n_states ? race(weights, totals[row], pairs + 2 * size * row, V) : largest_index(weights, V);
                is_right[row] = tokens[row] >= 0;
            }
    }
    return std::all_of(is_right.begin(), is_right.end(), [](char right) { return right; });
}
