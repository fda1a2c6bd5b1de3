#include "gguf.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "matmul.h"
#include "threads.h"

namespace harmonium {

namespace {

// 16 bytes of numbers j and j + 16 to 16 bytes of numbers 2j and 2j + 1.
inline void join_pairs(const std::uint8_t* in, std::uint8_t* out) {
#if defined(__SSE2__)
  const __m128i nibble = _mm_set1_epi8(0x0f), word = _mm_set1_epi16(0x00ff);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  const __m128i low = _mm_and_si128(bytes, nibble), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
  // In a word of two neighbors a and b: a | b << 8 becomes a | b << 4 in its lower byte.
  const __m128i first = _mm_and_si128(_mm_or_si128(low, _mm_srli_epi16(low, 4)), word);
  const __m128i second = _mm_and_si128(_mm_or_si128(high, _mm_srli_epi16(high, 4)), word);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(first, second));
#else
  for (int j = 0; j < 8; ++j) {
    out[j] = static_cast<std::uint8_t>((in[2 * j] & 0x0f) | (in[2 * j + 1] & 0x0f) << 4);
    out[j + 8] = static_cast<std::uint8_t>(in[2 * j] >> 4 | (in[2 * j + 1] & 0xf0));
  }
#endif
}

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  const std::uint32_t exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
  std::uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 0x1f) bits = sign | 0x7f800000 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  if (exponent != 0) return value;
  const float tiny = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2 ** -24
  return sign ? -tiny : tiny;
}

inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

std::uint16_t half_at(const std::uint8_t* block) { return static_cast<std::uint16_t>(block[0] | block[1] << 8); }

// 32 int8 to unsigned ones, in the order of a panel: eight words of four numbers, the even ones first.
inline void to_words(const std::uint8_t* in, std::uint8_t* words) {
#if defined(__SSE2__)
  const __m128i sign = _mm_set1_epi8(static_cast<char>(kInt8Offset)), low = _mm_set1_epi16(0x00ff);
  const __m128i a = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)), sign);
  const __m128i b = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16)), sign);
  const __m128i even = _mm_packus_epi16(_mm_and_si128(a, low), _mm_and_si128(b, low));
  const __m128i odd = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words), even);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words + 16), odd);
#else
  for (int i = 0; i < 32; ++i) words[i % 2 * 16 + i / 2] = static_cast<std::uint8_t>(in[i] ^ kInt8Offset);
#endif
}

void q8_to_panel(const std::uint8_t* rows, int num_rows, std::int64_t num_blocks, std::uint8_t* panel) {
  clear_partner(panel, num_blocks);
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    auto* scales = reinterpret_cast<std::uint16_t*>(panel + scales_at(b));
    if (num_rows < kPanelRows) clear_block(panel, b, kInt8Offset);
    for (int r = 0; r < num_rows; ++r) {
      const std::uint8_t* block = rows + (r * num_blocks + b) * kGgmlQ8Bytes;
      const std::uint16_t scale = half_at(block);
      const bool is_number = (scale & 0x7c00) != 0x7c00;
      scales[r] = is_number ? to_bf16(half_to_float(scale)) : std::uint16_t{0x7fc0};
      std::uint8_t words[32];
      to_words(block + 2, words);
      std::uint8_t* out = panel + weights_at(b) + r * 4;
      for (int part = 0; part < 8; ++part) std::memcpy(out + part * 64, words + part * 4, 4);
    }
  }
}

}  // namespace

void read_ggml_rows(const GgmlMatrix& matrix, std::int64_t row, std::int64_t num_rows, std::int64_t num_blocks,
                    std::uint8_t* blocks, std::uint8_t* scales) {
  for (std::int64_t r = row; r < row + num_rows; ++r) {
    const std::int64_t at = matrix.second ? r / 2 : r;
    const std::uint8_t* from = (matrix.second && r % 2 ? matrix.second : matrix.first) + at * num_blocks * 17;
    for (std::int64_t b = 0; b < num_blocks; ++b, from += kGgmlMxfp4Bytes, blocks += 16) {
      *scales++ = from[0];
      if (matrix.is_split)
        join_pairs(from + 1, blocks);
      else
        std::memcpy(blocks, from + 1, 16);
    }
  }
}

void q8_to_bf16(const std::uint8_t* data, std::int64_t num_blocks, std::uint16_t* out) {
  constexpr std::int64_t kBlocksTogether = 4096;
  parallel((num_blocks + kBlocksTogether - 1) / kBlocksTogether, [&](std::int64_t task, int) {
    const std::int64_t end = std::min(num_blocks, (task + 1) * kBlocksTogether);
    for (std::int64_t b = task * kBlocksTogether; b < end; ++b) {
      const std::uint8_t* block = data + b * kGgmlQ8Bytes;
      const float scale = half_to_float(half_at(block));
      for (int i = 0; i < 32; ++i) {
        out[b * 32 + i] = to_bf16(scale * static_cast<float>(static_cast<std::int8_t>(block[2 + i])));
      }
    }
  });
}

void q8_to_panels(const std::uint8_t* data, std::int64_t num_outputs, std::int64_t num_blocks, std::uint8_t* panels) {
  parallel((num_outputs + kPanelRows - 1) / kPanelRows, [&](std::int64_t task, int) {
    const std::int64_t first = task * kPanelRows;
    const int num_rows = static_cast<int>(std::min<std::int64_t>(kPanelRows, num_outputs - first));
    q8_to_panel(data + first * num_blocks * kGgmlQ8Bytes, num_rows, num_blocks, panels + task * panel_bytes(num_blocks));
  });
}

}  // namespace harmonium
