// From the halves back to panels, behind split_body.h: for instruction sets whose products take panels.
// How far ahead of its loads each half is fetched.
constexpr int kJoinAhead = 4096;

void join(const std::uint8_t* high, const std::uint8_t* low, std::int64_t num_blocks, std::uint8_t* panel) {
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    const std::uint8_t* __restrict h = high + b / 2 * kSplitPairBytes + b % 2 * 256;
    const std::uint8_t* __restrict l = low + b * kSplitLowBytes;
    std::uint8_t* __restrict even = panel + weights_at(b);
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(h + kJoinAhead + i * kPart);
      __builtin_prefetch(l + kJoinAhead + i * kPart);
    }
    for (int i = 0; i < 4 * kPart; ++i) {
      even[i] = static_cast<std::uint8_t>((h[i] & 15) << 4 | (l[i] & 15));
      even[kOdd + i] = static_cast<std::uint8_t>((h[i] & 0xf0) | l[i] >> 4);
    }
    __builtin_memcpy(panel + scales_at(b), high + b / 2 * kSplitPairBytes + 512 + b % 2 * 32, kBlockScaleBytes);
  }
}
