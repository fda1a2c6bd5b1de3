// Products with packed MXFP4 tiles, AVX2. What each function does: matmul.h.
#include "avx2/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

constexpr int kHalf = kBlockBytes / 2;  // of one panel

// Scales of eight rows: e8m0 bytes to the float32 2^(e - 127); 0 becomes the denormal, 255 NaN.
inline __attribute__((always_inline)) __m256 expand_e8m0(const uint8_t* p) {
  const __m256i infinity = _mm256_set1_epi32(0x7f800000), half = _mm256_set1_epi32(0x00400000);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(bits, infinity), half);
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_max_epu32(bits, half), nan));
}

void to_panels(const uint8_t* packed, int64_t num_blocks, uint8_t* panels) {
  const __m256i table = mxfp4_table(), nibble = _mm256_set1_epi8(15);
  for (int p = 0; p < 2; ++p) {
    uint8_t* panel = panels + p * panel_bytes(num_blocks);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const uint8_t* from = packed + weights_at(b) + p * kHalf;
      uint8_t* to = panel + weights_at(b);
      auto* scales = reinterpret_cast<uint16_t*>(panel + scales_at(b));
      for (int i = 0; i < kHalf; i += 32) {
        const __m256i v = load(from + i);
        store(to + i, _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble)));
        store(to + kHalf + i, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)));
      }
      for (int r = 0; r < kPanelRows; ++r) {
        const uint8_t exponent = packed[scales_at(b) + p * kPanelRows + r];
        scales[r] = static_cast<uint16_t>(e8m0_bits(exponent) >> 16);
      }
    }
  }
}

// Rows first..first + 7 of a tile by NT tokens. Sums have the order of every other product.
template <int NT>
void eight(const uint8_t* packed, int first, int64_t num_blocks, const uint8_t* x, int64_t row_bytes,
           const int32_t* token, float* tile) {
  const __m256i table = mxfp4_table(), nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks);
  const uint8_t* row[NT];
  __m256 sum[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    sum[t] = _mm256_setzero_ps();
  }
  const int64_t panel_at = first / kPanelRows * kHalf + first % kPanelRows * 4;
  // By pairs of blocks, so that where a block lies in its pair is known to the compiler.
  const auto block = [&](const uint8_t* pair, int64_t b, int half) __attribute__((always_inline)) {
    const int64_t at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    const uint8_t* nibbles = pair + weights_at(half) + panel_at;
    __m256i even[NT], odd[NT];
    for (int t = 0; t < NT; ++t) even[t] = odd[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const __m256i v = load(nibbles + g * 64);
      const __m256i lo = _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble));
      const __m256i hi = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
      for (int t = 0; t < NT; ++t) {
        const __m256i a0 = _mm256_set1_epi32(dword(row[t] + at + g * 4));
        const __m256i a1 = _mm256_set1_epi32(dword(row[t] + at + 64 + g * 4));
        even[t] = _mm256_add_epi16(even[t], _mm256_maddubs_epi16(lo, a0));
        odd[t] = _mm256_add_epi16(odd[t], _mm256_maddubs_epi16(hi, a1));
      }
    }
    const __m256 scale = expand_e8m0(pair + scales_at(half) + first);
    for (int t = 0; t < NT; ++t) {
      __m256i acc = _mm256_set1_epi32(dword(row[t] + start_at + b * 4));
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even[t], ones));
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(odd[t], ones));
      const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(from_bits(dword(row[t] + scale_at + b * 4))));
      sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), both, sum[t]);
    }
  };
  for (int64_t b = 0; b < num_blocks; b += 2, packed += kPairBytes) {
    block(packed, b, 0);
    if (b + 1 < num_blocks) block(packed, b + 1, 1);
  }
  for (int t = 0; t < NT; ++t) _mm256_storeu_ps(tile + t * kTileRows, sum[t]);
}

void product(const uint8_t* packed, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
             int num_tokens, float* tile) {
  for (int r = 0; r < kTileRows; r += 8) {
    int t = 0;
    for (; t + 2 <= num_tokens; t += 2)
      eight<2>(packed, r, num_blocks, x, row_bytes, token + t, tile + t * kTileRows + r);
    if (t < num_tokens) eight<1>(packed, r, num_blocks, x, row_bytes, token + t, tile + t * kTileRows + r);
  }
}

}  // namespace

const PackedTable kAvx2Packed = {to_panels, product};

}  // namespace harmonium
