// From panels to their halves: included once by native/<isa>/split.cpp, inside an anonymous namespace. Loops over bytes
// that the compiler makes vectors of.

// Where the even (odd) elements of a panel's block lie: four parts of 64 bytes.
constexpr int kPart = 64;
constexpr int kOdd = 4 * kPart;

void split_panel(const std::uint8_t* panel, std::int64_t num_blocks, const std::uint8_t* dither, std::uint8_t* high,
                 std::uint8_t* low) {
  constexpr int kShift = kInt8Offset - kSplitOffset;
  if (num_blocks % 2) __builtin_memset(high + num_blocks / 2 * kSplitPairBytes, 0, kSplitPairBytes);
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    const std::uint8_t* from = panel + weights_at(b);
    std::uint8_t* to = high + b / 2 * kSplitPairBytes + b % 2 * 256;
    for (int g = 0; g < 4; ++g) {
      std::uint8_t even_shift[kPart], odd_shift[kPart];
      for (int i = 0; i < kPart; ++i) {
        const std::uint8_t* d = dither + b * kBlock + 2 * (4 * g + i % 4);
        even_shift[i] = static_cast<std::uint8_t>(d[0] - kShift);
        odd_shift[i] = static_cast<std::uint8_t>(d[1] - kShift);
      }
      for (int i = 0; i < kPart; ++i) {
        const auto even = static_cast<std::uint8_t>(from[g * kPart + i] + even_shift[i]);
        const auto odd = static_cast<std::uint8_t>(from[kOdd + g * kPart + i] + odd_shift[i]);
        to[g * kPart + i] = static_cast<std::uint8_t>(even >> 4 | (odd & 0xf0));
        low[b * kSplitLowBytes + g * kPart + i] = static_cast<std::uint8_t>((even & 15) | odd << 4);
      }
    }
    __builtin_memcpy(high + b / 2 * kSplitPairBytes + 512 + b % 2 * 32, panel + scales_at(b), kBlockScaleBytes);
  }
}
