// Matrix kernels: layouts, the tables of functions that each instruction set fills, and the drivers over them.
// docs/kernels.md draws the layouts; harmonium/kernels/reference_matmul.py is the specification in NumPy.
#pragma once

#include <cstdint>
#include <cstring>

#include "gguf.h"
#include "low_rank.h"

namespace harmonium {

constexpr int kBlock = 32;             // inputs that share one scale, in weights and in activations
constexpr int kGroupBlocks = 4;        // blocks of a group: 16 bytes each of even (or odd) elements fill a zmm register
constexpr int kGroupBytes = 128;       // int8 activations of a group
constexpr int kPanelRows = 16;         // outputs of a panel: int32 lanes of a zmm register
constexpr int kBlockBytes = 512;       // of a panel or a packed tile for one block, without the scales
constexpr int kBlockScaleBytes = 32;   // their scales
constexpr int kPairBytes = 1088;       // both, for two blocks
constexpr int kTileRows = 32;          // outputs of a task's tile: two panels
constexpr int kTileTokens = 6;         // tokens that the widest kernel multiplies with them at a time
constexpr int kFewTokens = 8;          // so many and fewer are bound by memory rather than by arithmetic
constexpr int kMxfp4Offset = 12;       // added to doubled e2m1 values (-12..12) so that they are unsigned
constexpr int kInt8Offset = 128;       // added to int8 weights for the same reason
constexpr int kSplitOffset = 120;      // and to those of a split weight, which are -119..119, beside their dither
constexpr int kSplitMost = 119;
constexpr int kSplitPairBytes = 576;   // high halves of a split panel for two blocks, with the scales
constexpr int kSplitLowBytes = 256;    // low halves for one block
constexpr int kScreenRows = 4;         // rows of logits that are screened in one pass

// Internal linkage: an inline function with external linkage, compiled once with AVX-512 and once without, is one
// function to the linker, and the wrong copy may win.
static inline std::int64_t num_groups(std::int64_t num_blocks) {
  return (num_blocks + kGroupBlocks - 1) / kGroupBlocks;
}

// A row of int8 activations, blocks padded with zeros to whole groups:
//   q      [groups][even, odd][4 blocks][16] int8: element 2i (2i + 1) of block b is byte i of its even (odd) part
//   scale  [groups * 4] float32
//   start  [groups * 4] int32: minus offset times the sum of the block's q: what an accumulator starts with, so that
//          unsigned weights (value + offset) give the product with the signed ones
static inline std::int64_t int8_row_bytes(std::int64_t num_blocks) {
  return (num_groups(num_blocks) * 160 + 63) / 64 * 64;
}
static inline std::int64_t scale_offset(std::int64_t num_blocks) { return num_groups(num_blocks) * kGroupBytes; }
static inline std::int64_t start_offset(std::int64_t num_blocks) { return num_groups(num_blocks) * (kGroupBytes + 16); }

// Panels and packed tiles lie in the order in which products read them, so that memory is one stream (scales that lie
// apart are another, and cost a twelfth of the speed: docs/performance.md): pairs of blocks, each the scales of both,
// one line of the cache, then the weights of both. Where the last block has no partner, that one's place is zero.
static inline std::int64_t pairs_bytes(std::int64_t num_blocks) { return (num_blocks + 1) / 2 * kPairBytes; }
static inline std::int64_t scales_at(std::int64_t block) { return (block >> 1) * kPairBytes + (block & 1) * kBlockScaleBytes; }
static inline std::int64_t weights_at(std::int64_t block) {
  return (block >> 1) * kPairBytes + 2 * kBlockScaleBytes + (block & 1) * kBlockBytes;
}

// Both for one block after the other, without the arithmetic.
struct BlockPlace {
  std::int64_t scales = 0, weights = 2 * kBlockScaleBytes;
  std::int64_t scales_step = kBlockScaleBytes, weights_step = kBlockBytes;

  void go_on() {
    scales += scales_step;
    weights += weights_step;
    scales_step = kPairBytes - scales_step;
    weights_step = kPairBytes - weights_step;
  }
};

// A panel: 16 outputs by all inputs.
//   scales  [16 rows] bf16
//   weights [8][16 rows][4] uint8 (value + offset): part 0..3 are the even elements of the block, four at a time,
//           4..7 the odd ones
static inline std::int64_t panel_bytes(std::int64_t num_blocks) { return pairs_bytes(num_blocks); }

// Scales of a block to zero, weights to `value`.
static inline void clear_block(std::uint8_t* panel, std::int64_t block, int value) {
  std::memset(panel + scales_at(block), 0, kBlockScaleBytes);
  std::memset(panel + weights_at(block), value, kBlockBytes);
}

// The place that an odd last block leaves, to zero.
static inline void clear_partner(std::uint8_t* panel, std::int64_t num_blocks) {
  if (num_blocks % 2) clear_block(panel, num_blocks, 0);
}

// A packed tile: 32 outputs of an MXFP4 matrix by all inputs, four bits each.
//   scales  [32 rows] e8m0
//   weights [2 panels][4][16 rows][4] uint8: part g holds bytes 4g..4g+3 of each row's 16 bytes of the block
// Rows that a matrix lacks are zero.
static inline std::int64_t packed_bytes(std::int64_t num_blocks) { return pairs_bytes(num_blocks); }

// A split panel: the same 16 outputs by all inputs, each weight's byte v = q + 120 + d in two halves of four bits, so
// that the high halves alone can be read. d, 0 to 15, is the dither of the weight's input (native/split.cpp).
//   high  [pairs of blocks][2 blocks][4][16 rows][4] uint8, then the pair's scales [2][16 rows] bf16: part g holds
//         elements 8g, 8g + 2, 8g + 4, 8g + 6 of the block in the low bits, those behind them in the high bits
//   low   [blocks][4][16 rows][4] uint8, the same
// A weight is the high parts of all its panels, then the low parts of all.
static inline std::int64_t split_high_bytes(std::int64_t num_blocks) { return (num_blocks + 1) / 2 * kSplitPairBytes; }
static inline std::int64_t split_low_bytes(std::int64_t num_blocks) { return num_blocks * kSplitLowBytes; }

// What an instruction set provides: five tables, each filled by a file of its own. A "tile" is float32
// [num_tokens][kTileRows]; x is activations with a row every row_bytes, token[i] the row that token i of the tile
// takes. Columns of a tile beyond num_rows hold anything. Nothing here allocates, fails or prints.
struct Next {
  const std::uint8_t* data;
  std::int64_t bytes;
};

struct Int8Table {
  // From so many tokens on, MXFP4 rows are decoded to panels rather than used as they lie (measured).
  int panel_tokens;
  // One row of activations to int8; `factor` is multiplied into the scales.
  void (*quantize_row)(const float* x, std::int64_t num_inputs, int offset, float factor, std::uint8_t* row);
  // bf16 weights [num_rows <= 16][num_inputs] to one panel of -most_q..most_q; missing rows become zeros.
  void (*quantize_panel)(const std::uint16_t* weight, int num_rows, std::int64_t num_inputs, float most_q,
                         std::uint8_t* panel);
  // MXFP4 rows (num_rows <= 32) to one or two panels; rows that are missing hold anything finite or not.
  void (*mxfp4_to_panels)(const std::uint8_t* blocks, const std::uint8_t* scales, int num_rows, std::int64_t num_blocks,
                          std::uint8_t* panels);
  // Products with one or two panels whose weights carry `offset`, int8 activations. `next`: what will be read after
  // them, to be fetched meanwhile; a hint.
  void (*panel_product)(const std::uint8_t* panels, int num_panels, std::int64_t num_blocks, int offset,
                        const std::uint8_t* x, std::int64_t row_bytes, const std::int32_t* token, int num_tokens,
                        Next next, float* tile);
  // Products with MXFP4 rows as they lie (num_rows <= 32), int8 activations: for few tokens.
  void (*mxfp4_product)(const std::uint8_t* blocks, const std::uint8_t* scales, int num_rows, std::int64_t num_blocks,
                        const std::uint8_t* x, std::int64_t row_bytes, const std::int32_t* token, int num_tokens,
                        float* tile);
};

struct PackedTable {
  // A packed tile to two panels as mxfp4_to_panels makes them.
  void (*to_panels)(const std::uint8_t* packed, std::int64_t num_blocks, std::uint8_t* panels);
  // Products with a packed tile, int8 activations: for few tokens. The same bits as the other products.
  void (*product)(const std::uint8_t* packed, std::int64_t num_blocks, const std::uint8_t* x, std::int64_t row_bytes,
                  const std::int32_t* token, int num_tokens, float* tile);
};

// What is known of logits from high halves alone, for one row of activations.
struct Estimate {
  float value[kPanelRows];     // the middle of what the low halves leave open
  float variance[kPanelRows];  // of the rest, over the dither, times a constant of the driver's
};

struct SplitTable {
  // A panel of -119..119 to the halves of a split one. dither: a byte for each input.
  void (*split_panel)(const std::uint8_t* panel, std::int64_t num_blocks, const std::uint8_t* dither,
                      std::uint8_t* high, std::uint8_t* low);
  // The halves to a panel, whose weights carry offset and dither; null where `product` is not.
  void (*join)(const std::uint8_t* high, const std::uint8_t* low, std::int64_t num_blocks, std::uint8_t* panel);
  // Products with one or two split panels; null: join, then panel_product. next: the high halves of what will be read after
  // them.
  void (*product)(const std::uint8_t* high, const std::uint8_t* low, int num_panels, std::int64_t num_blocks,
                  const std::uint8_t* x, std::int64_t row_bytes, const std::int32_t* token, int num_tokens,
                  Next next, float* tile);
  // Estimates for rows 0..num_rows - 1 of x (at most kScreenRows). center, square [num_rows][num_blocks]: of the
  // block's activations, as the driver makes them.
  void (*estimate)(const std::uint8_t* high, std::int64_t num_blocks, const std::uint8_t* x, std::int64_t row_bytes,
                   const float* center, const float* square, int num_rows, Estimate* estimate);
};

struct Bf16Table {
  // One row of activations to bf16, to nearest even.
  void (*round_row)(const float* x, std::int64_t num_inputs, std::uint16_t* row);
  // The same for products with MXFP4, inputs in the order in which this instruction set decodes it.
  void (*round_mxfp4_row)(const float* x, std::int64_t num_inputs, std::uint16_t* row);
  // Products with MXFP4 rows (num_rows <= 32), activations of round_mxfp4_row. A token's sums are the same to the bit
  // with any number of others. `decoded`: room for [num_rows][num_blocks * 32] bf16.
  void (*mxfp4_product)(const std::uint8_t* blocks, const std::uint8_t* scales, int num_rows, std::int64_t num_blocks,
                        const std::uint8_t* x, std::int64_t row_bytes, const std::int32_t* token, int num_tokens,
                        std::uint16_t* decoded, float* tile);
  // Products with bf16 rows [num_rows <= 32][num_inputs], bf16 activations.
  void (*bf16_product)(const std::uint16_t* weight, int num_rows, std::int64_t num_inputs, const std::uint8_t* x,
                       std::int64_t row_bytes, const std::int32_t* token, int num_tokens, float* tile);
  // Products with bf16 columns [num_inputs][kTileRows], bf16 activations.
  void (*bf16_column_product)(const std::uint16_t* weight, std::int64_t num_inputs, const std::uint8_t* x,
                              std::int64_t row_bytes, const std::int32_t* token, int num_tokens, float* tile);
};

struct TileTable {
  // gate_up [2 * num_units] (gate, up, gate, up, ...) and its bias to out [num_units]; num_units <= 16.
  void (*swiglu)(const float* gate_up, const std::uint16_t* bias, int num_units, float limit, float alpha, float* out);
  // out = (tile + bias) * weight, or out += that; bias may be null.
  void (*finish)(const float* tile, const std::uint16_t* bias, int num_rows, float weight, bool add, float* out);
  // out[i] += sum over a of part[a * stride + i], a in order.
  void (*add_parts)(const float* part, std::int64_t stride, int num_parts, std::int64_t size, float* out);
  // Multiply-adds as fast as the machine can, `rounds` times: what the products are measured against. Returns the
  // number of multiplications and additions done.
  double (*spin_int8)(std::int64_t rounds);
  double (*spin_bf16)(std::int64_t rounds);
  // Reads all of data (a multiple of 256 bytes); the value returned only keeps the loads.
  std::uint64_t (*read_all)(const std::uint8_t* data, std::int64_t size_bytes);
};

extern const Int8Table kScalarInt8;
extern const PackedTable kScalarPacked;
extern const SplitTable kScalarSplit;
extern const Bf16Table kScalarBf16;
extern const TileTable kScalarTile;
#if defined(__x86_64__)
extern const Int8Table kAvx2Int8;
extern const PackedTable kAvx2Packed;
extern const SplitTable kAvx2Split;
extern const Bf16Table kAvx2Bf16;
extern const TileTable kAvx2Tile;
extern const Int8Table kAvx512Int8;
extern const PackedTable kAvx512Packed;
extern const SplitTable kAvx512Split;
extern const Bf16Table kAvx512Bf16;
extern const TileTable kAvx512Tile;
#endif

enum class Activations : int { int8 = 0, bf16 = 1 };

// A weight of num_outputs by num_inputs, or num_experts of them one after another.
struct Weight {
  enum class Kind { panels, split, mxfp4, packed, ggml, bf16_rows, bf16_columns } kind;
  const std::uint8_t* data;
  const std::uint8_t* scales;  // mxfp4 only
  const std::uint16_t* bias;   // null: none
  std::int64_t num_outputs;
  std::int64_t num_inputs;
  GgmlMatrix ggml = {nullptr, nullptr, false};  // ggml only; data is not used then
  // mxfp4 and ggml only. Null: experts lie one after another. Else those of expert e begin so many bytes behind `data`:
  // place[kPlaceStride * e] its matrix, the next one its scales (ggml: its second matrix, if there are two).
  const std::int64_t* place = nullptr;
};
constexpr int kPlaceStride = 4;  // gate_up, its scales, down, its scales

struct Experts {
  Weight gate_up;  // [E, 2F, D]
  Weight down;     // [E, D, F]
  std::int64_t num_experts;
  float limit;
  float alpha;
};

// The drivers: they share the work among the threads of the pool. All throw std::bad_alloc when memory is out.
void quantize_weight(const std::uint16_t* weight, std::int64_t num_outputs, std::int64_t num_inputs,
                     std::uint8_t* panels);
// MXFP4 rows [num_outputs] to packed tiles, on the caller's thread alone.
void pack_mxfp4(const std::uint8_t* blocks, const std::uint8_t* scales, std::int64_t num_outputs,
                std::int64_t num_blocks, std::uint8_t* packed);
// The same to a split weight, whose values are -119..119.
void quantize_split(const std::uint16_t* weight, std::int64_t num_outputs, std::int64_t num_inputs,
                    std::uint8_t* split);
void linear(const float* x, std::int64_t num_tokens, const Weight& weight, Activations activations, bool add,
            float* out);
// adapters: null, or what LoRA adapters add to the products of some tokens.
void moe(const float* x, std::int64_t num_tokens, const std::int32_t* expert_id, const float* expert_weight,
         int num_active, const Experts& experts, const ExpertAdapters* adapters, Activations activations, float* out);
// The same in two halves, so that experts may be computed in several calls: the weighted result of each slot (token,
// active expert) to parts [T, A, D]; slots with a negative id are left as they are. Then out += each token's parts.
void moe_parts(const float* x, std::int64_t num_tokens, const std::int32_t* expert_id, const float* expert_weight,
               int num_active, const Experts& experts, const ExpertAdapters* adapters, Activations activations,
               float* parts);
void add_moe_parts(const float* parts, std::int64_t num_tokens, int num_active, std::int64_t hidden, float* out);

// What a row of logits is for. keep: so many of the greatest must be there. temperature: above 0, the one must be there
// that a draw with this key takes at this temperature (noise.h). Neither: all that are allowed. allowed: null, or a bit for
// each output.
struct ScreenRow {
  std::int64_t keep;
  const std::uint32_t* allowed;
  std::uint64_t key;
  double temperature;

  bool draws() const { return temperature > 0; }
  bool takes_all() const { return !keep && !draws(); }
};
// Products of at most kScreenRows rows of x with a split weight, as far as they are asked for: out is what `linear`
// gives, to the bit, or minus infinity. Returns the number of panels whose low halves were read.
std::int64_t screen(const float* x, std::int64_t num_rows, const Weight& weight, const ScreenRow* rows, float* out);

// Bytes of shared scratch that a call takes (kept for the next one) and bytes that each thread takes.
std::int64_t linear_scratch_bytes(std::int64_t num_tokens, std::int64_t num_inputs);
std::int64_t moe_scratch_bytes(std::int64_t num_tokens, std::int64_t hidden, std::int64_t expert_size, int num_active);
std::int64_t matmul_thread_bytes(std::int64_t max_inputs);

double measure_read_bandwidth(const std::uint8_t* data, std::int64_t size_bytes, int repeats);  // bytes a second
double measure_int8_ops(std::int64_t rounds);                                                   // operations a second
double measure_bf16_ops(std::int64_t rounds);

}  // namespace harmonium
