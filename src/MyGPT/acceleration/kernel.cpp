// GPT-2's forward pass with a cache. For a few tokens it is as fast as memory delivers the weights.
//
// The new tokens of several sequences are M rows, C embedding width, H heads, D = C / H, S tokens seen. All threads compute one
// layer together, and wait for each other after each stage (team.h). products.h describes the packed weights.
#include "attention.h"
#include "int4.h"
#include "packing.h"
#include "sample.h"

constexpr int OWN_ROWS = 2;  // rows of which every thread computes the LayerNorm itself

// A product or a row with weights of the type that the layer has.
void linear(const Team& team, const Linear& l, const float* x, int M, float* y, Then then) {
    switch ((Type)l.type) {
        case FLOAT: return linear<float>(team, l, x, M, y, then);
        case BF16: return linear<bf16>(team, l, x, M, y, then);
        case INT8: return linear<int8>(team, l, x, M, y, then);
        case INT4: return linear<int4>(team, l, x, M, y, then);
    }
}
void row_of(const Linear& l, int n, float* y) {
    switch ((Type)l.type) {
        case FLOAT: return row_of<float>(l, n, y);
        case BF16: return row_of<bf16>(l, n, y);
        case INT8: return row_of<int8>(l, n, y);
        case INT4: return row_of<int4>(l, n, y);
    }
}

struct Norm { const float *weight, *bias; };
struct Block { Norm ln_1, ln_2; Linear c_attn, attn_proj, c_fc, mlp_proj; };
struct Model {
    const float *wte, *wpe;  // (V, C), or null for the head's weights; (context, C)
    const Block* blocks;
    Norm ln_f;
    Linear head;
    int32_t n_layers, n_heads, exact_gelu;
    float eps;
};

// LayerNorm of one row: y (C).
void layer_norm(const Norm& norm, const float* x, int C, float eps, float* y) {
    const float mean = sum(x, C, [](auto v) { return v; }) / C;
    const float variance = sum(x, C, [mean](auto v) { return (v - mean) * (v - mean); }) / C;
    const float scale = 1 / std::sqrt(variance + eps);
    for (int c = 0; c < C; c++) y[c] = (x[c] - mean) * scale * norm.weight[c] + norm.bias[c];
}

// Returns LayerNorm of n rows of x, or of those with the indices `rows`, as (n, C). For few rows, every thread computes all of
// them in memory of its own, which takes less time than waiting for the others. For more rows, the threads share the work in h.
const float* layer_norm(const Team& team, const Norm& norm, const float* x, const int32_t* rows, int n, int C, float eps,
                        float* h) {
    static thread_local std::vector<float> own;
    const bool is_shared = n > OWN_ROWS && team.size > 1;
    if (!is_shared) own.resize(std::max<size_t>(own.size(), n * C));
    float* y = is_shared ? h : own.data();
    for (int row = is_shared ? team.first(n) : 0; row < (is_shared ? team.first(n, true) : n); row++)
        layer_norm(norm, x + (int64_t)(rows ? rows[row] : row) * C, C, eps, y + (int64_t)row * C);
    if (is_shared) team.wait();
    return y;
}

// New tokens of one sequence: n of them after `past` earlier tokens, in a slot of the cache. `first` is the index of the
// sequence's first token after its left padding.
struct Sequence { int32_t n, past, first, slot; };
// The new token of one row: its slot, its index in the cache, and the number of padding tokens before it.
struct Token { int32_t slot, index, first; };

void forward(const Model& model, const Sequence* sequences, int n_sequences, const int64_t* ids, float* cache,
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
    // Without padding and with one block per sequence, nobody but the block itself needs the keys and values of its tokens.
    int n_seen = 0;
    for (const auto& block : blocks) n_seen += block.second;
    const bool is_alone = n_blocks == n_sequences && n_seen == M;
    Barrier barrier;
#pragma omp parallel num_threads(n_threads)
    {
        const Team team{barrier};
        auto copy = [&](int row, int head, float* keys, float* values) {  // keys and values of a token into the cache
            const Token& token = tokens[row];
            const float* k = wide + (int64_t)row * 3 * C + C + head * D;
            const int64_t to = (token.slot * H + head) * head_size + (int64_t)token.index * D;
            std::copy_n(k, D, keys + to);
            std::copy_n(k + C, D, values + to);
        };
        for (int row = team.first(M); row < team.first(M, true); row++) {
            float* to = x + (int64_t)row * C;
            if (model.wte) std::copy_n(model.wte + ids[row] * C, C, to);
            else row_of(model.head, ids[row], to);
            const float* position = model.wpe + (int64_t)std::max(0, tokens[row].index - tokens[row].first) * C;
            for (int c = 0; c < C; c++) to[c] += position[c];
        }
        team.wait();
        for (int layer = 0; layer < model.n_layers; layer++) {
            const Block& block = model.blocks[layer];
            float *keys = cache + (int64_t)layer * 2 * slots * H * head_size, *values = keys + slots * H * head_size;
            const float* y = layer_norm(team, block.ln_1, x, nullptr, M, C, model.eps, h);
            linear(team, block.c_attn, y, M, wide, STORE);
            if (!is_alone) {
                for (int row = team.first(M); row < team.first(M, true); row++) {
                    for (int head = 0; head < H; head++) copy(row, head, keys, values);
                    // A padding token sees only itself, as in cache.py.
                    if (tokens[row].index < tokens[row].first)
                        std::copy_n(wide + (int64_t)row * 3 * C + 2 * C, C, h + (int64_t)row * C);
                }
                team.wait();
            }
#pragma omp for schedule(dynamic) nowait
            for (int unit = 0; unit < n_blocks * H; unit++) {
                const auto [row, n] = blocks[n_blocks - 1 - unit / H];  // the last blocks of a long prompt take longest
                const int head = unit % H, column = head * D;
                const Token& token = tokens[row];
                const int64_t from = (token.slot * H + head) * head_size + (int64_t)token.first * D;
                if (is_alone)
                    for (int i = row; i < row + n; i++) copy(i, head, keys, values);
                attend(wide + (int64_t)row * 3 * C + column, n, token.index - token.first + 1, C, D, keys + from, values + from,
                       h + (int64_t)row * C + column);
            }
            team.wait();
            linear(team, block.attn_proj, h, M, x, ADD);
            y = layer_norm(team, block.ln_2, x, nullptr, M, C, model.eps, h);
            linear(team, block.c_fc, y, M, wide, model.exact_gelu ? EXACT_GELU : GELU);
            linear(team, block.mlp_proj, wide, M, x, ADD);
        }
        const float* y = layer_norm(team, model.ln_f, x, wanted, n_wanted, C, model.eps, h);
        linear(team, model.head, y, n_wanted, logits, STORE);
    }
}

extern "C" int32_t gpt2_panel() { return P; }

// Packs n rows of a matrix, from `row` on. Returns 0 if a weight with an int8 scale is NaN or infinite, and otherwise 1. int4.py
// packs int4.
extern "C" int32_t gpt2_pack(const Source* source, const Linear* l, int32_t row, int32_t n, int32_t n_threads) {
    auto run = l->type == FLOAT ? pack<float> : l->type == BF16 ? pack<bf16> : pack<int8>;
    return run(*source, *l, row, n, n_threads);
}

// Writes the rows of a matrix for n ids to y (n, K).
extern "C" void gpt2_rows(const Linear* l, const int64_t* ids, int32_t n, float* y) {
    for (int i = 0; i < n; i++) row_of(*l, ids[i], y + (int64_t)i * l->K);
}

// Writes the logits (n_wanted, V) of the rows with the indices `wanted`. ids (M) are the new tokens of all sequences, one sequence
// after another, cache (n_layers, 2, slots, H, capacity, D) holds the earlier tokens, and scratch has room for 6 M C numbers.
extern "C" void gpt2_forward(const Model* model, const Sequence* sequences, int32_t n_sequences, const int64_t* ids, float* cache,
                             int32_t slots, int32_t capacity, const int32_t* wanted, int32_t n_wanted, float* logits,
                             float* scratch, int32_t n_threads) {
    forward(*model, sequences, n_sequences, ids, cache, slots, capacity, wanted, n_wanted, logits, scratch, n_threads);
}

extern "C" void gpt2_linear(const Linear* l, const float* x, int32_t M, float* y, int32_t then, int32_t n_threads) {
    Barrier barrier;
#pragma omp parallel num_threads(n_threads)
    linear(Team{barrier}, *l, x, M, y, (Then)then);
}

// Chooses the next token of each row of logits (B, V), see sample.h. Returns 0 if a row's largest logit is NaN or infinite.
extern "C" int32_t gpt2_pick(const Sampling* options, const float* logits, const uint8_t* seen, int32_t B, int32_t V,
                             TorchState* const* states, int32_t n_states, int64_t* tokens, int32_t n_threads) {
    return pick(*options, logits, seen, B, V, states, n_states, tokens, n_threads);
}

// Writes n numbers with an exponential distribution to y, as torch draws them, and advances the state of the generator.
extern "C" void gpt2_exponential(TorchState* state, int32_t n, float* y) {
    std::vector<uint32_t> pairs(2 * n);
    twister(*state, pairs.data(), 2 * n);
    for (int i = 0; i < n; i++) y[i] = exponential_number(&pairs[2 * i]);
}
