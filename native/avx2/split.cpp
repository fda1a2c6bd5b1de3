// Split weights, AVX2. What each function does: matmul.h.
#include "avx2/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

#include "split_body.h"

#include "join_body.h"

// Eight rows of a panel. A pair of products is at most 2 * 15 * 127, so that four pairs fit 16 bits.
void estimate_eight(const uint8_t* high, int64_t num_blocks, const uint8_t* row, const float* center,
                    const float* square, int first, Estimate* found) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int64_t scale_at = scale_offset(num_blocks);
  __m256 value = _mm256_setzero_ps(), variance = _mm256_setzero_ps();
  for (int64_t b = 0; b < num_blocks; ++b) {
    const uint8_t* pair = high + b / 2 * kSplitPairBytes;
    const uint8_t* w = pair + b % 2 * 256 + first * 4;
    const uint8_t* a = row + b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    __m256i even = _mm256_setzero_si256(), odd = even;
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const __m256i v = load(w + g * kPart);
      const __m256i lo = _mm256_and_si256(v, nibble), hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
      even = _mm256_add_epi16(even, _mm256_maddubs_epi16(lo, _mm256_set1_epi32(dword(a + g * 4))));
      odd = _mm256_add_epi16(odd, _mm256_maddubs_epi16(hi, _mm256_set1_epi32(dword(a + 64 + g * 4))));
    }
    const __m256i acc = _mm256_slli_epi32(
        _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)), 4);
    const __m256 s = expand_bf16(reinterpret_cast<const uint16_t*>(pair + 512) + b % 2 * kPanelRows + first);
    const __m256 own = _mm256_set1_ps(from_bits(dword(row + scale_at + b * 4)));
    value = _mm256_fmadd_ps(s, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), own, _mm256_set1_ps(center[b])), value);
    variance = _mm256_fmadd_ps(_mm256_mul_ps(s, s), _mm256_set1_ps(square[b]), variance);
  }
  _mm256_storeu_ps(found->value + first, value);
  _mm256_storeu_ps(found->variance + first, variance);
}

void estimate(const uint8_t* high, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const float* center,
              const float* square, int num_rows, Estimate* found) {
  for (int t = 0; t < num_rows; ++t) {
    for (int first = 0; first < kPanelRows; first += 8) {
      estimate_eight(high, num_blocks, x + t * row_bytes, center + t * num_blocks, square + t * num_blocks, first,
                     found + t);
    }
  }
}

}  // namespace

const SplitTable kAvx2Split = {split_panel, join, nullptr, estimate};

}  // namespace harmonium
