// Products with packed MXFP4 tiles, AVX-512 with VBMI and VNNI. What each function does: matmul.h.
#include "avx512/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

constexpr int kHalf = kBlockBytes / 2;  // of one panel

// How far ahead of its loads a tile is prefetched: it is one stream, and the next tile lies behind it.
constexpr int64_t kAhead = 6144;
inline __attribute__((always_inline)) void fetch(const uint8_t* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_NTA);
}

// vpermb looks at six bits of an index: a table of 16 values four times over needs no mask for the other nibble.
inline __attribute__((always_inline)) __m512i low_values(__m512i v) { return _mm512_permutexvar_epi8(v, mxfp4_table()); }
inline __attribute__((always_inline)) __m512i high_values(__m512i v) {
  return _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), mxfp4_table());
}

inline __attribute__((always_inline)) __m512i exponents(const uint8_t* scales) {
  return _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales))), 23);
}

void to_panels(const uint8_t* packed, int64_t num_blocks, uint8_t* panels) {
  const int64_t stride = panel_bytes(num_blocks);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const uint8_t* from = packed + weights_at(b);
    if (b % 2 == 0) fetch(packed + scales_at(b));
    for (int p = 0; p < 2; ++p) {
      uint8_t* w = panels + p * stride + weights_at(b);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g, from += 64) {
        fetch(from);
        const __m512i v = _mm512_loadu_si512(from);
        _mm512_storeu_si512(w + g * 64, low_values(v));
        _mm512_storeu_si512(w + kHalf + g * 64, high_values(v));
      }
      const __m512i bits = _mm512_castps_si512(finish_e8m0(exponents(packed + scales_at(b) + p * kPanelRows)));
      auto* scales = panels + p * stride + scales_at(b);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
  }
}

// NT tokens by both panels of a tile: weights are decoded in registers and used for all tokens at once.
template <int NT>
void tile_of(const uint8_t* packed, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
             float* tile) {
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks);
  const uint8_t* row[NT];
  __m512 sum[NT][2];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    sum[t][0] = sum[t][1] = _mm512_setzero_ps();
  }
  // By pairs of blocks, so that where a block lies in its pair is known to the compiler.
  const auto block = [&](const uint8_t* pair, int64_t b, int half) __attribute__((always_inline)) {
    const int64_t at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    const uint8_t* nibbles = pair + weights_at(half);
    if (half == 0) fetch(pair);
    __m512i acc[NT][2];
    for (int t = 0; t < NT; ++t) acc[t][0] = acc[t][1] = _mm512_set1_epi32(dword(row[t] + start_at + b * 4));
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      __m512i low[2], high[2];
      for (int p = 0; p < 2; ++p) {
        const uint8_t* from = nibbles + p * kHalf + g * 64;
        fetch(from);
        const __m512i v = _mm512_loadu_si512(from);
        low[p] = low_values(v);
        high[p] = high_values(v);
      }
      for (int t = 0; t < NT; ++t) {
        const __m512i even = _mm512_set1_epi32(dword(row[t] + at + g * 4));
        const __m512i odd = _mm512_set1_epi32(dword(row[t] + at + 64 + g * 4));
        for (int p = 0; p < 2; ++p) {
          acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], low[p], even);
          acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], high[p], odd);
        }
      }
    }
    for (int p = 0; p < 2; ++p) {
      const __m512 scale = finish_e8m0(exponents(pair + scales_at(half) + p * kPanelRows));
      for (int t = 0; t < NT; ++t) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(from_bits(dword(row[t] + scale_at + b * 4))));
        sum[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t][p]), both, sum[t][p]);
      }
    }
  };
  for (int64_t b = 0; b < num_blocks; b += 2, packed += kPairBytes) {
    block(packed, b, 0);
    if (b + 1 < num_blocks) block(packed, b + 1, 1);
  }
  for (int t = 0; t < NT; ++t) {
    for (int p = 0; p < 2; ++p) _mm512_storeu_ps(tile + t * kTileRows + p * kPanelRows, sum[t][p]);
  }
}

void product(const uint8_t* packed, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
             int num_tokens, float* tile) {
  using Fn = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, const int32_t*, float*);
  constexpr Fn by_count[4] = {tile_of<1>, tile_of<2>, tile_of<3>, tile_of<4>};  // more than four tokens spill
  for (int t = 0; t < num_tokens; t += 4) {
    const int count = num_tokens - t < 4 ? num_tokens - t : 4;
    by_count[count - 1](packed, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  }
}

}  // namespace

const PackedTable kAvx512Packed = {to_panels, product};

}  // namespace harmonium
