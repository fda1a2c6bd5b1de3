// Small things that the matrix files of this folder share.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

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

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

// Bits of 2^(e - 127); 0 is a denormal, 255 is NaN.
inline uint32_t e8m0_bits(uint8_t e) {
  if (e == 255) return 0x7fc00000u;
  return e == 0 ? 0x00400000u : static_cast<uint32_t>(e) << 23;
}

}  // namespace

}  // namespace harmonium
