// Split weights, in plain C++. What each function does: matmul.h.
#include "matmul.h"
#include "scalar/matmul_bits.h"

namespace harmonium {

namespace {

#include "split_body.h"

#include "join_body.h"

void estimate(const uint8_t* high, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const float* center,
              const float* square, int num_rows, Estimate* found) {
  for (int t = 0; t < num_rows; ++t) {
    const uint8_t* row = x + t * row_bytes;
    const auto* scale = reinterpret_cast<const float*>(row + scale_offset(num_blocks));
    float value[kPanelRows] = {}, variance[kPanelRows] = {};
    for (int64_t b = 0; b < num_blocks; ++b) {
      const uint8_t* pair = high + b / 2 * kSplitPairBytes;
      const auto* even = reinterpret_cast<const int8_t*>(row + b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16);
      const int8_t* odd = even + 64;
      const auto* scales = reinterpret_cast<const uint16_t*>(pair + 512) + b % 2 * kPanelRows;
      for (int r = 0; r < kPanelRows; ++r) {
        const uint8_t* w = pair + b % 2 * 256 + r * 4;
        int32_t acc = 0;
        for (int i = 0; i < 16; ++i) {
          const uint8_t byte = w[i / 4 * kPart + i % 4];
          acc += (byte & 15) * 16 * even[i] + (byte & 0xf0) * odd[i];
        }
        const float s = from_bf16(scales[r]);
        value[r] += s * (static_cast<float>(acc) * scale[b] + center[t * num_blocks + b]);
        variance[r] += s * s * square[t * num_blocks + b];
      }
    }
    memcpy(found[t].value, value, sizeof value);
    memcpy(found[t].variance, variance, sizeof variance);
  }
}

}  // namespace

const SplitTable kScalarSplit = {split_panel, join, nullptr, estimate};

}  // namespace harmonium
