// Products with int8 activations, in plain C++. What each function does: matmul.h.
#include "matmul.h"
#include "scalar/matmul_bits.h"

namespace harmonium {

namespace {

// Byte of element i (0 to 31) within its block's part of an activation row.
int64_t byte_of(int64_t block, int i) {
  return block / kGroupBlocks * kGroupBytes + block % kGroupBlocks * 16 + (i & 1) * 64 + i / 2;
}

void quantize_row(const float* x, int64_t num_inputs, int offset, float factor, uint8_t* row) {
  const int64_t num_blocks = num_inputs / kBlock;
  memset(row, 0, static_cast<size_t>(int8_row_bytes(num_blocks)));
  auto* q = reinterpret_cast<int8_t*>(row);
  auto* scale = reinterpret_cast<float*>(row + scale_offset(num_blocks));
  auto* start = reinterpret_cast<int32_t*>(row + start_offset(num_blocks));
  for (int64_t b = 0; b < num_blocks; ++b) {
    uint32_t most = 0;  // as bits: NaN and infinity compare above every number
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t bits = to_bits(x[b * kBlock + i]) & 0x7fffffffu;
      if (bits > most) most = bits;
    }
    const float s = from_bits(most) / 127.0f;
    if (most >= 0x7f800000u) scale[b] = from_bits(0x7fc00000u);
    if (most >= 0x7f800000u || s < 1.17549435e-38f) continue;
    const float inverse = 1.0f / s;
    int32_t sum = 0;
    for (int i = 0; i < kBlock; ++i) {
      const auto value = static_cast<int8_t>(lrintf(x[b * kBlock + i] * inverse));
      q[byte_of(b, i)] = value;
      sum += value;
    }
    scale[b] = s * factor;
    start[b] = -offset * sum;
  }
}

// Where element i of a block stands in its panel's 512 bytes, row 0.
int panel_byte(int i) { return ((i & 1) * 4 + i / 8) * 64 + i / 2 % 4; }

void quantize_panel(const uint16_t* weight, int num_rows, int64_t num_inputs, float most_q, uint8_t* panel) {
  const int64_t num_blocks = num_inputs / kBlock;
  clear_partner(panel, num_blocks);
  for (int64_t b = 0; b < num_blocks; ++b) clear_block(panel, b, kInt8Offset);
  for (int r = 0; r < num_rows; ++r) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      const uint16_t* w = weight + r * num_inputs + b * kBlock;
      uint32_t most = 0;
      for (int i = 0; i < kBlock; ++i) {
        const uint32_t bits = w[i] & 0x7fffu;
        if (bits > most) most = bits;
      }
      // Rounded up to bf16, so that no quotient passes most_q.
      const uint32_t up = most >= 0x7f80u ? 0x7fc0u : (to_bits(from_bits(most << 16) / most_q) + 0xffffu) >> 16;
      reinterpret_cast<uint16_t*>(panel + scales_at(b))[r] = static_cast<uint16_t>(up);
      if (most >= 0x7f80u || most == 0) continue;
      const float scale = from_bits(up << 16);
      for (int i = 0; i < kBlock; ++i) {
        panel[weights_at(b) + panel_byte(i) + r * 4] =
            static_cast<uint8_t>(lrintf(from_bf16(w[i]) / scale) + kInt8Offset);
      }
    }
  }
}

void mxfp4_to_panels(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint8_t* panels) {
  for (int p = 0; p < 2; ++p) {
    uint8_t* panel = panels + p * panel_bytes(num_blocks);
    for (int64_t b = 0; b < num_blocks; ++b) clear_block(panel, b, kMxfp4Offset);
    for (int r = 0; r < kPanelRows && p * kPanelRows + r < num_rows; ++r) {
      const int64_t first = (p * kPanelRows + r) * num_blocks;
      for (int64_t b = 0; b < num_blocks; ++b) {
        reinterpret_cast<uint16_t*>(panel + scales_at(b))[r] = static_cast<uint16_t>(e8m0_bits(scales[first + b]) >> 16);
        for (int i = 0; i < kBlock; ++i) {
          const int nibble = blocks[(first + b) * 16 + i / 2] >> (i & 1) * 4 & 15;
          panel[weights_at(b) + panel_byte(i) + r * 4] = static_cast<uint8_t>(kTwiceE2m1[nibble] + kMxfp4Offset);
        }
      }
    }
  }
}

void panel_product(const uint8_t* panels, int num_panels, int64_t num_blocks, int, const uint8_t* x, int64_t row_bytes,
                   const int32_t* token, int num_tokens, Next, float* tile) {
  for (int t = 0; t < num_tokens; ++t) {
    const uint8_t* row = x + token[t] * row_bytes;
    const auto* scale = reinterpret_cast<const float*>(row + scale_offset(num_blocks));
    const auto* start = reinterpret_cast<const int32_t*>(row + start_offset(num_blocks));
    for (int p = 0; p < num_panels; ++p) {
      const uint8_t* panel = panels + p * panel_bytes(num_blocks);
      float sum[kPanelRows] = {};
      for (int64_t b = 0; b < num_blocks; ++b) {
        int32_t acc[kPanelRows];
        for (int r = 0; r < kPanelRows; ++r) acc[r] = start[b];
        for (int part = 0; part < 8; ++part) {
          const auto* a = reinterpret_cast<const int8_t*>(row + byte_of(b, part / 4) + part % 4 * 4);
          const uint8_t* w = panel + weights_at(b) + part * 64;
          for (int r = 0; r < kPanelRows; ++r) {
            for (int i = 0; i < 4; ++i) acc[r] += w[r * 4 + i] * a[i];
          }
        }
        const auto* scales = reinterpret_cast<const uint16_t*>(panel + scales_at(b));
        for (int r = 0; r < kPanelRows; ++r) {
          sum[r] += static_cast<float>(acc[r]) * (from_bf16(scales[r]) * scale[b]);
        }
      }
      memcpy(tile + t * kTileRows + p * kPanelRows, sum, sizeof sum);
    }
  }
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  for (int r = 0; r < num_rows; ++r) {
    for (int t = 0; t < num_tokens; ++t) {
      const uint8_t* row = x + token[t] * row_bytes;
      const auto* scale = reinterpret_cast<const float*>(row + scale_offset(num_blocks));
      float sum = 0;
      for (int64_t b = 0; b < num_blocks; ++b) {
        const uint8_t* w = blocks + (r * num_blocks + b) * 16;
        const auto* even = reinterpret_cast<const int8_t*>(row + byte_of(b, 0));
        const int8_t* odd = even + 64;
        int32_t acc = 0;
        for (int i = 0; i < 16; ++i) acc += kTwiceE2m1[w[i] & 15] * even[i] + kTwiceE2m1[w[i] >> 4] * odd[i];
        sum += static_cast<float>(acc) * (from_bits(e8m0_bits(scales[r * num_blocks + b])) * scale[b]);
      }
      tile[t * kTileRows + r] = sum;
    }
  }
}

}  // namespace

const Int8Table kScalarInt8 = {2, quantize_row, quantize_panel, mxfp4_to_panels, panel_product, mxfp4_product};

}  // namespace harmonium
