// Products with packed MXFP4 tiles, in plain C++. What each function does: matmul.h.
#include "matmul.h"
#include "scalar/matmul_bits.h"

namespace harmonium {

namespace {

constexpr int kHalf = kBlockBytes / 2;  // of one panel

void to_panels(const uint8_t* packed, int64_t num_blocks, uint8_t* panels) {
  for (int p = 0; p < 2; ++p) {
    uint8_t* panel = panels + p * panel_bytes(num_blocks);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const uint8_t* from = packed + weights_at(b) + p * kHalf;
      uint8_t* to = panel + weights_at(b);
      auto* scales = reinterpret_cast<uint16_t*>(panel + scales_at(b));
      for (int i = 0; i < kHalf; ++i) {
        to[i] = static_cast<uint8_t>(kTwiceE2m1[from[i] & 15] + kMxfp4Offset);
        to[kHalf + i] = static_cast<uint8_t>(kTwiceE2m1[from[i] >> 4] + kMxfp4Offset);
      }
      for (int r = 0; r < kPanelRows; ++r) {
        const uint8_t exponent = packed[scales_at(b) + p * kPanelRows + r];
        scales[r] = static_cast<uint16_t>(e8m0_bits(exponent) >> 16);
      }
    }
  }
}

void product_one(const uint8_t* packed, int64_t num_blocks, const uint8_t* row, float* out) {
  const auto* scale = reinterpret_cast<const float*>(row + scale_offset(num_blocks));
  float sum[kTileRows] = {};
  for (int64_t b = 0; b < num_blocks; ++b) {
    const auto* even = reinterpret_cast<const int8_t*>(row + b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16);
    const int8_t* odd = even + 64;
    for (int r = 0; r < kTileRows; ++r) {
      const uint8_t* from = packed + weights_at(b) + r / kPanelRows * kHalf + r % kPanelRows * 4;
      int32_t acc = 0;
      for (int i = 0; i < 16; ++i) {
        const uint8_t byte = from[i / 4 * 64 + i % 4];
        acc += kTwiceE2m1[byte & 15] * even[i] + kTwiceE2m1[byte >> 4] * odd[i];
      }
      sum[r] += static_cast<float>(acc) * (from_bits(e8m0_bits(packed[scales_at(b) + r])) * scale[b]);
    }
  }
  memcpy(out, sum, sizeof sum);
}

void product(const uint8_t* packed, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
             int num_tokens, float* tile) {
  for (int t = 0; t < num_tokens; ++t) product_one(packed, num_blocks, x + token[t] * row_bytes, tile + t * kTileRows);
}

}  // namespace

const PackedTable kScalarPacked = {to_panels, product};

}  // namespace harmonium
