// The kernels that are no matrix products: RMS norm, rotary embedding, paged attention, router, embedding rows.
// Dimension letters are those of docs/architecture.md. Arrays are C-contiguous; bf16 travels as uint16 bits.
#pragma once

#include <cstdint>

// GCC takes a function that only prefetches for one without effect, and drops calls of it that it has not inlined yet:
// such functions, and those that only call them, need this.
#define HARMONIUM_INLINE __attribute__((always_inline)) inline

namespace harmonium {

// Positions of keys that are converted to float32 and scored at a time.
constexpr std::int64_t kKeyChunk = 64;
// Rows (tokens x query heads of one kv head) that a query tile aims at, and the most tokens it holds.
constexpr std::int64_t kTileRows = 128;
constexpr std::int64_t kMaxTileTokens = 32;

// Values of a head that share a scale in an int8 cache: elements 0 to 31, 32 to 63 and so on; the last may be fewer.
constexpr std::int64_t kScaleGroup = 32;
static inline std::int64_t scale_groups(std::int64_t head_size) { return (head_size + kScaleGroup - 1) / kScaleGroup; }

// One key/value cache of one layer: [N, G, P, K] bf16; or int8 with bf16 scales [N, G, P, ceil(K / kScaleGroup)].
struct KeyValueCache {
  void* key;
  void* value;
  std::uint16_t* key_scale;  // null: bf16
  std::uint16_t* value_scale;
  std::int64_t num_blocks, num_kv_heads, block_size, head_size;
};

// A tile of queries of one sequence and one kv head against the positions [begin, end) of that sequence.
struct AttentionTile {
  const float* query;             // first token, first query head of the kv head; heads are adjacent
  std::int64_t query_stride;      // floats from one token to the next
  std::int64_t num_tokens;        // at most kMaxTileTokens
  std::int64_t group_size;        // R
  std::int64_t head_size;         // K
  const void* key;                // this kv head in block 0: bf16, or int8 where there are scales
  const void* value;
  const std::uint16_t* key_scale;  // null: bf16
  const std::uint16_t* value_scale;
  std::int64_t block_rows;        // rows of K elements from a block to the next: G*P
  std::int64_t block_size;        // P
  const std::int32_t* block;      // the sequence's block table
  std::int64_t first_position;    // of the tile's first token; the others follow
  std::int64_t begin, end;        // positions to read; every token of the tile may see a part of them
  std::int64_t window;            // 0: all earlier positions
  float scale;
  float* scratch;                 // attention_tile_floats(...) floats, 64-byte aligned
  // Where the result goes. out: final, one row of R*K floats a token, normalized with the sinks. Or, if out is
  // null, partial: num_rows maxima, num_rows sums, num_rows x K unnormalized values.
  float* out;
  std::int64_t out_stride;
  const float* sink;              // R logits of this kv head's query heads
  float* partial;
};

// Partial results of a tile over consecutive ranges of positions, to be joined in order.
struct AttentionMerge {
  const float* partial;           // num_pieces x num_rows * (K + 2), as AttentionTile.partial
  std::int64_t num_pieces, num_tokens, group_size, head_size;
  const float* sink;
  float* out;
  std::int64_t out_stride;
};

// One instruction set's kernels; each runs on the calling thread.
struct OpsTable {
  // out_row = x_row * rsqrt(mean(x_row^2) + eps) * weight; x may be out.
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t width, float* out);
  // num_heads heads of K floats, rotated in place: halves, with K/2 cosines and sines.
  void (*rotate)(float* x, const float* cos, const float* sin, std::int64_t num_heads, std::int64_t head_size);
  // float32 to bf16, to nearest even; NaN stays NaN.
  void (*narrow)(const float* x, std::int64_t count, std::uint16_t* out);
  // float32 to int8 with a bf16 scale for each kScaleGroup of them: |x| / 127 at its largest, rounded up, so that
  // quotients stay in -127 to 127; those are rounded to nearest even. Where a number is not finite the scale is NaN.
  void (*quantize)(const float* x, std::int64_t count, std::int8_t* out, std::uint16_t* scale);
  // bf16 to float32.
  void (*widen)(const std::uint16_t* x, std::int64_t count, float* out);
  // out[t * out_stride + n] = x[t] . weight[n] for num_x rows of x and num_weight rows of weight.
  void (*dots)(const float* x, std::int64_t num_x, const std::uint16_t* weight, std::int64_t num_weight,
               std::int64_t width, float* out, std::int64_t out_stride);
  // In place: exp(x - max(x)) / sum.
  void (*softmax)(float* x, std::int64_t count);
  void (*attend)(const AttentionTile& tile);
  void (*merge)(const AttentionMerge& merge);
};

extern const OpsTable kOpsScalar;
extern const OpsTable kOpsAvx2;
extern const OpsTable kOpsAvx512;

// Floats of scratch that one tile needs, on any instruction set.
std::int64_t attention_tile_floats(std::int64_t group_size, std::int64_t head_size);

// The drivers: split the work into tasks of native/threads.h and run the instruction set in use. Arguments are
// valid: bindings_ops.cpp has checked them. They throw std::bad_alloc when scratch cannot be had.

// out_TD = x_TD normalized; x may be out.
void rms_norm(const float* x, const float* weight, float eps, std::int64_t T, std::int64_t D, float* out);

// Rotate q and k of qkv [T, (H+2G)*K] in place, and write k and v to slot[t] = block * P + offset.
void rope_and_store(float* qkv, const float* cos, const float* sin, const KeyValueCache& cache,
                    const std::int64_t* slot, std::int64_t T, std::int64_t H);

struct AttentionBatch {
  const float* qkv;                       // [T, (H+2G)*K], q rotated
  const std::int32_t* block;              // [S, B]
  const std::int32_t* query_start;        // [S + 1]
  const std::int32_t* context_length;     // [S]
  const float* sink;                      // [H]
  float* out;                             // [T, H*K]
  std::int64_t num_sequences, blocks_per_sequence, num_heads;
  std::int64_t window;
  float scale;
};
void attention(const AttentionBatch& batch, const KeyValueCache& cache);

// Bytes that `attention` allocates beside its arguments, at most, for steps of up to num_tokens tokens in up to
// num_sequences sequences of up to max_context positions.
std::int64_t attention_scratch_bytes(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_size,
                                     std::int64_t num_tokens, std::int64_t num_sequences, std::int64_t max_context,
                                     int num_threads);

// logits = x_TD . weight_ED + bias_E (+ extra_TE, unless it is null); the top A by logit (ties: lower id first; NaN counts as lowest) and the
// softmax over them.
void router(const float* x, const std::uint16_t* weight, const float* bias, const float* extra, std::int64_t T,
            std::int64_t D, std::int64_t E, std::int64_t A, std::int32_t* expert_id, float* expert_weight);

// out_TD = table_VD[token_id_T] widened.
void gather_rows(const std::uint16_t* table, const std::int32_t* token_id, std::int64_t T, std::int64_t D, float* out);

}  // namespace harmonium
