// Matrix kernels in plain C++: for processors without AVX2, and the model of the other two files.
#include "matmul.h"

#include <math.h>
#include <string.h>

namespace harmonium {

namespace {

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr int8_t kTwiceE2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

float from_bf16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

// Bits of 2^(e - 127); 0 is a denormal, 255 is NaN.
uint32_t e8m0_bits(uint8_t e) {
  if (e == 255) return 0x7fc00000u;
  return e == 0 ? 0x00400000u : static_cast<uint32_t>(e) << 23;
}

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

void round_row(const float* x, int64_t num_inputs, uint16_t* row) {
  for (int64_t i = 0; i < num_inputs; ++i) {
    const uint32_t bits = to_bits(x[i]);
    if ((bits & 0x7fffffffu) > 0x7f800000u) row[i] = static_cast<uint16_t>((bits >> 16) | 0x40);
    else row[i] = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
}

// Where element i of a block stands in its panel's 512 bytes, row 0.
int panel_byte(int i) { return ((i & 1) * 4 + i / 8) * 64 + i / 2 % 4; }

void quantize_panel(const uint16_t* weight, int num_rows, int64_t num_inputs, uint8_t* panel) {
  const int64_t num_blocks = num_inputs / kBlock;
  memset(panel, kInt8Offset, static_cast<size_t>(num_blocks * kPanelBlockBytes));
  auto* scales = reinterpret_cast<uint16_t*>(panel + num_blocks * kPanelBlockBytes);
  memset(scales, 0, static_cast<size_t>(panel_bytes(num_blocks) - num_blocks * kPanelBlockBytes));
  for (int r = 0; r < num_rows; ++r) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      const uint16_t* w = weight + r * num_inputs + b * kBlock;
      uint32_t most = 0;
      for (int i = 0; i < kBlock; ++i) {
        const uint32_t bits = w[i] & 0x7fffu;
        if (bits > most) most = bits;
      }
      // Rounded up to bf16, so that no quotient passes 127.
      const uint32_t up = most >= 0x7f80u ? 0x7fc0u : (to_bits(from_bits(most << 16) / 127.0f) + 0xffffu) >> 16;
      scales[b * kPanelRows + r] = static_cast<uint16_t>(up);
      if (most >= 0x7f80u || most == 0) continue;
      const float scale = from_bits(up << 16);
      for (int i = 0; i < kBlock; ++i) {
        panel[b * kPanelBlockBytes + panel_byte(i) + r * 4] =
            static_cast<uint8_t>(lrintf(from_bf16(w[i]) / scale) + kInt8Offset);
      }
    }
  }
}

void mxfp4_to_panels(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint8_t* panels) {
  for (int p = 0; p < 2; ++p) {
    uint8_t* panel = panels + p * panel_bytes(num_blocks);
    memset(panel, kMxfp4Offset, static_cast<size_t>(num_blocks * kPanelBlockBytes));
    auto* out = reinterpret_cast<uint16_t*>(panel + num_blocks * kPanelBlockBytes);
    memset(out, 0, static_cast<size_t>(panel_bytes(num_blocks) - num_blocks * kPanelBlockBytes));
    for (int r = 0; r < kPanelRows && p * kPanelRows + r < num_rows; ++r) {
      const int64_t first = (p * kPanelRows + r) * num_blocks;
      for (int64_t b = 0; b < num_blocks; ++b) {
        out[b * kPanelRows + r] = static_cast<uint16_t>(e8m0_bits(scales[first + b]) >> 16);
        for (int i = 0; i < kBlock; ++i) {
          const int nibble = blocks[(first + b) * 16 + i / 2] >> (i & 1) * 4 & 15;
          panel[b * kPanelBlockBytes + panel_byte(i) + r * 4] = static_cast<uint8_t>(kTwiceE2m1[nibble] + kMxfp4Offset);
        }
      }
    }
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

void panel_product(const uint8_t* panels, int num_panels, int64_t num_blocks, int, const uint8_t* x, int64_t row_bytes,
                   const int32_t* token, int num_tokens, float* tile) {
  for (int t = 0; t < num_tokens; ++t) {
    const uint8_t* row = x + token[t] * row_bytes;
    const auto* scale = reinterpret_cast<const float*>(row + scale_offset(num_blocks));
    const auto* start = reinterpret_cast<const int32_t*>(row + start_offset(num_blocks));
    for (int p = 0; p < num_panels; ++p) {
      const uint8_t* panel = panels + p * panel_bytes(num_blocks);
      const auto* scales = reinterpret_cast<const uint16_t*>(panel + num_blocks * kPanelBlockBytes);
      float sum[kPanelRows] = {};
      for (int64_t b = 0; b < num_blocks; ++b) {
        int32_t acc[kPanelRows];
        for (int r = 0; r < kPanelRows; ++r) acc[r] = start[b];
        for (int part = 0; part < 8; ++part) {
          const auto* a = reinterpret_cast<const int8_t*>(row + byte_of(b, part / 4) + part % 4 * 4);
          const uint8_t* w = panel + b * kPanelBlockBytes + part * 64;
          for (int r = 0; r < kPanelRows; ++r) {
            for (int i = 0; i < 4; ++i) acc[r] += w[r * 4 + i] * a[i];
          }
        }
        for (int r = 0; r < kPanelRows; ++r) {
          sum[r] += static_cast<float>(acc[r]) * (from_bf16(scales[b * kPanelRows + r]) * scale[b]);
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

void swiglu(const float* gate_up, const uint16_t* bias, int num_units, float limit, float alpha, float* out) {
  for (int u = 0; u < num_units; ++u) {
    float gate = gate_up[2 * u] + from_bf16(bias[2 * u]);
    float up = gate_up[2 * u + 1] + from_bf16(bias[2 * u + 1]);
    // Written so that NaN passes through.
    if (gate > limit) gate = limit;
    if (up > limit) up = limit;
    if (up < -limit) up = -limit;
    out[u] = gate / (1.0f + expf(-alpha * gate)) * (up + 1.0f);
  }
}

void finish(const float* tile, const uint16_t* bias, int num_rows, float weight, bool add, float* out) {
  for (int r = 0; r < num_rows; ++r) {
    const float value = (tile[r] + (bias ? from_bf16(bias[r]) : 0.0f)) * weight;
    out[r] = add ? out[r] + value : value;
  }
}

void add_parts(const float* part, int64_t stride, int num_parts, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    float sum = part[i];
    for (int a = 1; a < num_parts; ++a) sum += part[a * stride + i];
    out[i] += sum;
  }
}

double spin_int8(int64_t rounds) {
  volatile int32_t seed = 1;
  int32_t acc[64], w[64];
  for (int i = 0; i < 64; ++i) acc[i] = 0, w[i] = seed + i;
  for (int64_t n = 0; n < rounds; ++n) {
    for (int i = 0; i < 64; ++i) acc[i] += w[i] * static_cast<int32_t>(n & 127);
  }
  for (int i = 0; i < 64; ++i) seed = acc[i];
  return static_cast<double>(rounds) * 128.0;
}

uint64_t read_all(const uint8_t* data, int64_t size_bytes) {
  uint64_t a = 0, b = 0;
  for (int64_t i = 0; i < size_bytes; i += 16) {
    uint64_t v[2];
    memcpy(v, data + i, sizeof v);
    a ^= v[0];
    b ^= v[1];
  }
  return a ^ b;
}

}  // namespace

const MatmulTable kScalarMatmul = {2, quantize_row, round_row,     quantize_panel, mxfp4_to_panels,     mxfp4_to_bf16,
                                   panel_product, mxfp4_product, bf16_product,   bf16_column_product, swiglu,
                                   finish,        add_parts,     spin_int8,      read_all};

}  // namespace harmonium
