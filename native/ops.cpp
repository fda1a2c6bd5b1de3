#include "ops.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace harmonium {

namespace {

// Slots 4 to 7 of thread_scratch are this file's.
constexpr int kTileSlot = 4;

// Rows of work that one task takes: enough to outweigh the hand-over to another core (about a microsecond).
constexpr std::int64_t kRowsPerTask = 8;
constexpr std::int64_t kRouterTokens = 16;
constexpr std::int64_t kRouterExperts = 16;

// Positions in one piece of a context that is split over tasks. Fixed, so that sums are taken in the same order for
// any number of threads.
constexpr std::int64_t kPiece = 512;
// A sequence with more tokens than kPieceTokens has pieces that are longer in proportion, which keeps the memory for
// its partial results what kPieceTokens need; one with more than kMaxSplitTokens has tasks enough and stays whole.
constexpr std::int64_t kPieceTokens = 4;
constexpr std::int64_t kMaxSplitTokens = 64;

const OpsTable& table() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512: return kOpsAvx512;
    case Isa::avx2: return kOpsAvx2;
    case Isa::scalar: break;
  }
#endif
  return kOpsScalar;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// fn(begin, end) for [0, count) in steps of `step`.
template <typename F>
void parallel_ranges(std::int64_t count, std::int64_t step, F&& fn) {
  parallel(ceil_div(count, step), [&](std::int64_t task, int) {
    fn(task * step, std::min(count, (task + 1) * step));
  });
}

// Floats that live as long as the calling thread and only grow. Two Python threads have two of them.
float* caller_floats(std::int64_t count) {
  thread_local std::vector<float> floats;
  if (static_cast<std::int64_t>(floats.size()) < count) floats.resize(count);
  return floats.data();
}

std::int64_t tile_tokens(std::int64_t group_size) {
  return std::clamp<std::int64_t>(kTileRows / group_size, 1, kMaxTileTokens);
}

// Positions in a piece of a sequence's context.
std::int64_t piece_positions(std::int64_t num_tokens, std::int64_t context) {
  return num_tokens <= kMaxSplitTokens ? kPiece * ceil_div(num_tokens, kPieceTokens) : context;
}

// One query tile of one sequence, for every kv head, and the pieces of the context that it reads.
struct TilePlan {
  std::int64_t sequence, first_token, num_tokens, first_position;
  std::int64_t begin, end, piece, num_pieces;
  std::int64_t partial;  // where its partial results start, in floats; of no use if num_pieces is 1
};

struct Plan {
  std::vector<TilePlan> tiles;
  std::vector<std::pair<std::int64_t, std::int64_t>> work;  // (tile, piece)
  std::vector<std::int64_t> split;                          // tiles of several pieces
  std::int64_t partial_floats = 0;
};

void plan_sequence(const AttentionBatch& batch, const KeyValueCache& cache, std::int64_t s, Plan& plan) {
  const std::int64_t group_size = batch.num_heads / cache.num_kv_heads, tokens = tile_tokens(group_size);
  const std::int64_t first = batch.query_start[s], count = batch.query_start[s + 1] - first;
  const std::int64_t context = batch.context_length[s], num_tiles = ceil_div(count, tokens);
  if (count == 0) return;
  const std::int64_t piece = piece_positions(count, context);
  // The last tile reads most: it comes first, so that no thread starts a long task at the end.
  for (std::int64_t i = num_tiles - 1; i >= 0; --i) {
    TilePlan t;
    t.sequence = s;
    t.first_token = first + i * tokens;
    t.num_tokens = std::min(tokens, count - i * tokens);
    t.first_position = context - count + i * tokens;
    t.begin = batch.window ? std::max<std::int64_t>(0, t.first_position - batch.window + 1) : 0;
    t.end = t.first_position + t.num_tokens;
    t.piece = piece;
    t.num_pieces = ceil_div(t.end - t.begin, piece);
    t.partial = plan.partial_floats;
    const std::int64_t index = static_cast<std::int64_t>(plan.tiles.size());
    if (t.num_pieces > 1) {
      plan.partial_floats +=
          t.num_pieces * cache.num_kv_heads * t.num_tokens * group_size * (cache.head_size + 2);
      plan.split.push_back(index);
    }
    for (std::int64_t p = 0; p < t.num_pieces; ++p) plan.work.emplace_back(index, p);
    plan.tiles.push_back(t);
  }
}

AttentionTile make_tile(const AttentionBatch& batch, const KeyValueCache& cache, const TilePlan& plan,
                        std::int64_t piece, std::int64_t kv_head, float* partial) {
  const std::int64_t K = cache.head_size, G = cache.num_kv_heads, R = batch.num_heads / G;
  AttentionTile t;
  t.query_stride = (batch.num_heads + 2 * G) * K;
  t.query = batch.qkv + plan.first_token * t.query_stride + kv_head * R * K;
  t.num_tokens = plan.num_tokens;
  t.group_size = R;
  t.head_size = K;
  const bool is_int8 = cache.key_scale != nullptr;
  const std::int64_t first_row = kv_head * cache.block_size, head_bytes = first_row * K * (is_int8 ? 1 : 2);
  t.key = static_cast<const char*>(cache.key) + head_bytes;
  t.value = static_cast<const char*>(cache.value) + head_bytes;
  t.key_scale = is_int8 ? cache.key_scale + first_row * scale_groups(K) : nullptr;
  t.value_scale = is_int8 ? cache.value_scale + first_row * scale_groups(K) : nullptr;
  t.block_rows = G * cache.block_size;
  t.block_size = cache.block_size;
  t.block = batch.block + plan.sequence * batch.blocks_per_sequence;
  t.first_position = plan.first_position;
  t.begin = plan.begin + piece * plan.piece;
  t.end = std::min(plan.end, t.begin + plan.piece);
  t.window = batch.window;
  t.scale = batch.scale;
  t.scratch = nullptr;
  t.out_stride = batch.num_heads * K;
  t.sink = batch.sink + kv_head * R;
  const bool is_split = plan.num_pieces > 1;
  t.out = is_split ? nullptr : batch.out + plan.first_token * t.out_stride + kv_head * R * K;
  const std::int64_t piece_floats = plan.num_tokens * R * (K + 2);
  t.partial = is_split ? partial + plan.partial + (kv_head * plan.num_pieces + piece) * piece_floats : nullptr;
  return t;
}

void merge_pieces(const AttentionBatch& batch, const KeyValueCache& cache, const Plan& plan, const float* partial,
                  const OpsTable& ops) {
  const std::int64_t K = cache.head_size, G = cache.num_kv_heads, R = batch.num_heads / G;
  parallel(static_cast<std::int64_t>(plan.split.size()) * G, [&](std::int64_t task, int) {
    const TilePlan& t = plan.tiles[plan.split[task / G]];
    const std::int64_t kv_head = task % G;
    AttentionMerge m;
    m.partial = partial + t.partial + kv_head * t.num_pieces * t.num_tokens * R * (K + 2);
    m.num_pieces = t.num_pieces;
    m.num_tokens = t.num_tokens;
    m.group_size = R;
    m.head_size = K;
    m.sink = batch.sink + kv_head * R;
    m.out_stride = batch.num_heads * K;
    m.out = batch.out + t.first_token * m.out_stride + kv_head * R * K;
    ops.merge(m);
  });
}

// True if expert a comes before expert b: higher logit, then lower id; NaN counts as lowest.
bool comes_before(const float* logit, std::int64_t a, std::int64_t b) {
  const float x = logit[a], y = logit[b];
  if (x > y) return true;
  if (x < y) return false;
  const bool x_is_nan = x != x, y_is_nan = y != y;
  return x_is_nan == y_is_nan ? a < b : y_is_nan;
}

// The A first experts of logit[0..E), by insertion into the list of those chosen so far: ids are valid and different
// whatever the values.
void choose_experts(const float* logit, std::int64_t E, std::int64_t A, std::int32_t* expert_id,
                    float* expert_weight, const OpsTable& ops) {
  std::int64_t chosen = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    std::int64_t at = chosen;
    while (at > 0 && comes_before(logit, e, expert_id[at - 1])) --at;
    if (at == A) continue;
    if (chosen < A) ++chosen;
    for (std::int64_t i = chosen - 1; i > at; --i) expert_id[i] = expert_id[i - 1];
    expert_id[at] = static_cast<std::int32_t>(e);
  }
  for (std::int64_t a = 0; a < A; ++a) expert_weight[a] = logit[expert_id[a]];
  ops.softmax(expert_weight, A);
}

// Write K floats to a row of a cache.
void store_head(const OpsTable& ops, const float* x, std::int64_t K, std::int64_t row, void* cache,
                std::uint16_t* scale) {
  if (scale) ops.quantize(x, K, static_cast<std::int8_t*>(cache) + row * K, scale + row * scale_groups(K));
  else ops.narrow(x, K, static_cast<std::uint16_t*>(cache) + row * K);
}

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, std::int64_t T, std::int64_t D, float* out) {
  const OpsTable& ops = table();
  parallel_ranges(T, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) ops.rms_norm(x + t * D, weight, eps, D, out + t * D);
  });
}

void rope_and_store(float* qkv, const float* cos, const float* sin, const KeyValueCache& cache,
                    const std::int64_t* slot, std::int64_t T, std::int64_t H) {
  const OpsTable& ops = table();
  const std::int64_t K = cache.head_size, G = cache.num_kv_heads, P = cache.block_size;
  parallel_ranges(T, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* row = qkv + t * (H + 2 * G) * K;
      ops.rotate(row, cos + t * (K / 2), sin + t * (K / 2), H + G, K);
      const std::int64_t at = slot[t] / P * G * P + slot[t] % P;
      for (std::int64_t g = 0; g < G; ++g) {
        store_head(ops, row + (H + g) * K, K, at + g * P, cache.key, cache.key_scale);
        store_head(ops, row + (H + G + g) * K, K, at + g * P, cache.value, cache.value_scale);
      }
    }
  });
}

std::int64_t attention_tile_floats(std::int64_t group_size, std::int64_t head_size) {
  // Rows are padded to at most 8, the width to at most 32, and arrays to 16 (ops_body.h: carve).
  const std::int64_t rows = ceil_div(tile_tokens(group_size) * group_size, 8) * 8;
  const std::int64_t width = ceil_div(head_size, 32) * 32;
  return rows * (head_size + width + 2) + 4 * 16 + kKeyChunk * (8 + head_size + width + 2 * scale_groups(head_size));
}

void attention(const AttentionBatch& batch, const KeyValueCache& cache) {
  const OpsTable& ops = table();
  const std::int64_t G = cache.num_kv_heads, group_size = batch.num_heads / G;
  Plan plan;
  for (std::int64_t s = 0; s < batch.num_sequences; ++s) plan_sequence(batch, cache, s, plan);
  float* partial = caller_floats(plan.partial_floats);
  const std::int64_t scratch_bytes = attention_tile_floats(group_size, cache.head_size) * sizeof(float);
  std::atomic<bool> out_of_memory{false};
  parallel(static_cast<std::int64_t>(plan.work.size()) * G, [&](std::int64_t task, int thread) {
    const auto [index, piece] = plan.work[task / G];
    AttentionTile tile = make_tile(batch, cache, plan.tiles[index], piece, task % G, partial);
    tile.scratch = static_cast<float*>(thread_scratch(thread, kTileSlot, scratch_bytes));
    if (!tile.scratch) out_of_memory = true;
    else ops.attend(tile);
  });
  if (out_of_memory) throw std::bad_alloc();
  merge_pieces(batch, cache, plan, partial, ops);
}

std::int64_t attention_scratch_bytes(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_size,
                                     std::int64_t num_tokens, std::int64_t num_sequences, std::int64_t max_context,
                                     int num_threads) {
  const std::int64_t group_size = num_heads / num_kv_heads, tokens = tile_tokens(group_size);
  const std::int64_t tiles = std::min(num_tokens, ceil_div(num_tokens, tokens) + num_sequences);
  // Partial results: rows times pieces; pieces grow with a sequence's tokens, rounding adds less than one piece.
  const std::int64_t pieces = ceil_div(max_context, kPiece);
  const std::int64_t split_rows = std::min(num_tokens, num_sequences * kPieceTokens) * pieces +
                                  std::min(num_tokens, num_sequences * kMaxSplitTokens);
  const std::int64_t partial = split_rows * num_heads * (head_size + 2);
  const std::int64_t work = tiles * pieces;
  return static_cast<std::int64_t>(sizeof(float)) *
             (num_threads * attention_tile_floats(group_size, head_size) + partial) +
         static_cast<std::int64_t>(sizeof(TilePlan)) * 2 * tiles + 32 * work;
}

void router(const float* x, const std::uint16_t* weight, const float* bias, const float* extra, std::int64_t T,
            std::int64_t D, std::int64_t E, std::int64_t A, std::int32_t* expert_id, float* expert_weight) {
  const OpsTable& ops = table();
  float* logits = caller_floats(T * E);
  const std::int64_t expert_tasks = ceil_div(E, kRouterExperts);
  parallel(ceil_div(T, kRouterTokens) * expert_tasks, [&](std::int64_t task, int) {
    const std::int64_t t = task / expert_tasks * kRouterTokens, e = task % expert_tasks * kRouterExperts;
    ops.dots(x + t * D, std::min(kRouterTokens, T - t), weight + e * D, std::min(kRouterExperts, E - e), D,
             logits + t * E + e, E);
  });
  parallel_ranges(T, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* row = logits + t * E;
      for (std::int64_t e = 0; e < E; ++e) row[e] += bias[e];
      for (std::int64_t e = 0; extra && e < E; ++e) row[e] += extra[t * E + e];
      choose_experts(row, E, A, expert_id + t * A, expert_weight + t * A, ops);
    }
  });
}

void gather_rows(const std::uint16_t* table_VD, const std::int32_t* token_id, std::int64_t T, std::int64_t D,
                 float* out) {
  const OpsTable& ops = table();
  parallel_ranges(T, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) ops.widen(table_VD + token_id[t] * D, D, out + t * D);
  });
}

}  // namespace harmonium
