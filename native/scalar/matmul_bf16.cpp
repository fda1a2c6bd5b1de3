// Products with bf16 activations, in plain C++. What each function does: matmul.h.
#include "matmul.h"
#include "scalar/matmul_bits.h"

namespace harmonium {

namespace {

void round_row(const float* x, int64_t num_inputs, uint16_t* row) {
  for (int64_t i = 0; i < num_inputs; ++i) {
    const uint32_t bits = to_bits(x[i]);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
      row[i] = static_cast<uint16_t>((bits >> 16) | 0x40);
    else
      row[i] = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
}

void mxfp4_to_bf16(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint16_t* weight) {
  for (int64_t b = 0; b < num_rows * num_blocks; ++b) {
    const float scale = from_bits(e8m0_bits(scales[b]));
    for (int i = 0; i < kBlock; ++i) {
      const int nibble = blocks[b * 16 + i / 2] >> (i & 1) * 4 & 15;
      // Exact: one bit of mantissa at most, and 0.5 * 2^-127 is still a bf16 denormal.
      weight[b * kBlock + i] = static_cast<uint16_t>(to_bits(kTwiceE2m1[nibble] * 0.5f * scale) >> 16);
    }
  }
}

void bf16_product(const uint16_t* weight, int num_rows, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                  const int32_t* token, int num_tokens, float* tile) {
  for (int r = 0; r < num_rows; ++r) {
    const uint16_t* w = weight + r * num_inputs;
    for (int t = 0; t < num_tokens; ++t) {
      const auto* row = reinterpret_cast<const uint16_t*>(x + token[t] * row_bytes);
      float sum[8] = {};
      for (int64_t k = 0; k < num_inputs; k += 8) {
        for (int i = 0; i < 8; ++i) sum[i] += from_bf16(w[k + i]) * from_bf16(row[k + i]);
      }
      float total = 0;
      for (int i = 0; i < 8; ++i) total += sum[i];
      tile[t * kTileRows + r] = total;
    }
  }
}

void bf16_column_product(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                         const int32_t* token, int num_tokens, float* tile) {
  for (int t = 0; t < num_tokens; ++t) {
    const auto* row = reinterpret_cast<const uint16_t*>(x + token[t] * row_bytes);
    float sum[kTileRows] = {};
    for (int64_t k = 0; k < num_inputs; ++k) {
      const float value = from_bf16(row[k]);
      for (int r = 0; r < kTileRows; ++r) sum[r] += from_bf16(weight[k * kTileRows + r]) * value;
    }
    memcpy(tile + t * kTileRows, sum, sizeof sum);
  }
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, uint16_t* decoded, float* tile) {
  // Four rows at a time: they are still in L1 when the products read them.
  for (int r = 0; r < num_rows; r += 4) {
    const int few = num_rows - r < 4 ? num_rows - r : 4;
    mxfp4_to_bf16(blocks + r * num_blocks * 16, scales + r * num_blocks, few, num_blocks, decoded);
    bf16_product(decoded, few, num_blocks * kBlock, x, row_bytes, token, num_tokens, tile + r);
  }
}

}  // namespace

const Bf16Table kScalarBf16 = {round_row, round_row, mxfp4_product, bf16_product, bf16_column_product};

}  // namespace harmonium
