// What the products of MXFP4 with bf16 activations share: each native/<isa>/matmul_bf16.cpp includes this file inside
// its anonymous namespace, after its matmul_bits.h.

// Whether all scales are 2^-125 to 1, as those of real weights are: the exponents of e2m1 values in bf16 can then be
// lowered in place by 127 less the scale byte, and none gets too small.
inline bool are_usual(const uint8_t* scales, int64_t count) {
  uint8_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto above = static_cast<uint8_t>(scales[i] - 2);
    most = above > most ? above : most;
  }
  return most <= 125;
}

// Element i of a block in bf16, whatever its scale.
inline uint16_t any_weight(const uint8_t* block, uint8_t e, int i) {
  static const float value[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const float scale = from_bits(e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : static_cast<uint32_t>(e) << 23);
  const int nibble = block[i / 2] >> (i & 1) * 4 & 15;
  // Exact: one bit of mantissa at most, and 0.5 * 2^-127 is still a bf16 denormal.
  return static_cast<uint16_t>(to_bits(value[nibble & 7] * (nibble & 8 ? -scale : scale)) >> 16);
}
