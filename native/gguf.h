// ggml's blocks to ours: what a GGUF file holds is read in place, and put in order on the way to a product.
// docs/checkpoints.md says what the files hold; harmonium/checkpoint/gguf_blocks.py is the specification in NumPy.
#pragma once

#include <cstdint>

namespace harmonium {

constexpr int kGgmlMxfp4Bytes = 17;  // of 32 numbers: a byte of scale (e8m0), then 16 bytes of two numbers each
constexpr int kGgmlQ8Bytes = 34;     // of 32 numbers: a float16 of scale, then an int8 each

// MXFP4 matrices of all experts as ggml keeps them. With `second`, rows come from both in turn (gate, up, gate, ...).
// is_split: byte j of a block holds numbers j and j + 16 (ggml's order); otherwise 2j and 2j + 1, as in ours.
struct GgmlMatrix {
  const std::uint8_t* first;
  const std::uint8_t* second;
  bool is_split;
};

// Bytes of a tile's rows (32) in our layout: blocks, then scales.
static inline std::int64_t ggml_tile_bytes(std::int64_t num_blocks) { return 32 * num_blocks * 17; }

// Rows row ... row + num_rows - 1, counted over all experts, as blocks [num_rows][num_blocks][16] and scales
// [num_rows][num_blocks]. On the caller's thread alone.
void read_ggml_rows(const GgmlMatrix& matrix, std::int64_t row, std::int64_t num_rows, std::int64_t num_blocks,
                    std::uint8_t* blocks, std::uint8_t* scales);

// Q8_0 blocks [num_blocks] to bf16, to nearest even; shared among the threads of the pool.
void q8_to_bf16(const std::uint8_t* data, std::int64_t num_blocks, std::uint16_t* out);

// Q8_0 rows [num_outputs][num_blocks] to int8 panels (matmul.h): the same integers, and scales rounded to bf16. A scale
// that is no number becomes NaN. Shared among the threads of the pool.
void q8_to_panels(const std::uint8_t* data, std::int64_t num_outputs, std::int64_t num_blocks, std::uint8_t* panels);

}  // namespace harmonium
