// Products with bf16 activations, AVX-512 with VNNI and BF16. What each function does: matmul.h.
#include "avx512/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

void round_row(const float* x, int64_t num_inputs, uint16_t* row) {
  for (int64_t i = 0; i < num_inputs; i += 16) {
    // In integers: vcvtneps2bf16 would make zeros of denormals.
    const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan =
        _mm512_cmpgt_epu32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
  }
}

// One block to bf16 by way of float32, for scales near the ends of the range.
void mxfp4_block_to_bf16(const uint8_t* block, uint8_t scale_byte, uint16_t* weight) {
  const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f,
                                      -3.0f, -4.0f, -6.0f);
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block)), mask = _mm_set1_epi8(15);
  const __m128i lo = _mm_and_si128(v, mask), hi = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
  const __m512 scale = finish_e8m0(_mm512_set1_epi32(scale_byte << 23));
  const __m128i half[2] = {_mm_unpacklo_epi8(lo, hi), _mm_unpackhi_epi8(lo, hi)};
  for (int h = 0; h < 2; ++h) {
    const __m512 value = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(half[h]), table), scale);
    // Exact: one bit of mantissa at most, and 0.5 * 2^-127 is still a bf16 denormal.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight + h * 16),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(value), 16)));
  }
}

void mxfp4_to_bf16(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint16_t* weight) {
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, static_cast<short>(0x8000), static_cast<short>(0xbf00),
      static_cast<short>(0xbf80), static_cast<short>(0xbfc0), static_cast<short>(0xc000), static_cast<short>(0xc040),
      static_cast<short>(0xc080), static_cast<short>(0xc0c0)));
  const __m512i low = _mm512_set1_epi32(0xf), high = _mm512_set1_epi32(0xf0000), magnitude = _mm512_set1_epi16(0x7fff);
  for (int64_t b = 0; b < num_rows * num_blocks; ++b) {
    const int e = scales[b];
    // 0.5 has the exponent 126 and 6 has 129: with these scales the sum of exponents stays within 1..254.
    if (e < 2 || e > 252) {
      mxfp4_block_to_bf16(blocks + b * 16, scales[b], weight + b * kBlock);
      continue;
    }
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks + b * 16)));
    const __m512i index =
        _mm512_or_si512(_mm512_and_si512(byte, low), _mm512_and_si512(_mm512_slli_epi32(byte, 12), high));
    const __m512i value = _mm512_permutexvar_epi16(index, table);
    const __mmask32 is_not_zero = _mm512_test_epi16_mask(value, magnitude);
    const __m512i power = _mm512_set1_epi16(static_cast<short>((e - 127) * 128));
    _mm512_storeu_si512(weight + b * kBlock, _mm512_mask_add_epi16(value, is_not_zero, value, power));
  }
}

template <int NT, int NR>
void bf16_rows(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes, const int32_t* token,
               float* tile) {
  __m512 sum[NT][NR];
  const uint16_t* row[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = reinterpret_cast<const uint16_t*>(x + token[t] * row_bytes);
    for (int r = 0; r < NR; ++r) sum[t][r] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < num_inputs; k += 32) {
    __m512bh w[NR];
    for (int r = 0; r < NR; ++r) w[r] = (__m512bh)_mm512_loadu_si512(weight + r * num_inputs + k);
    for (int t = 0; t < NT; ++t) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(row[t] + k);
      for (int r = 0; r < NR; ++r) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], w[r], a);
    }
  }
  for (int t = 0; t < NT; ++t) {
    for (int r = 0; r < NR; ++r) tile[t * kTileRows + r] = _mm512_reduce_add_ps(sum[t][r]);
  }
}

template <int NR>
void bf16_tokens(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                 int num_tokens, float* tile) {
  int t = 0;
  for (; t + 4 <= num_tokens; t += 4)
    bf16_rows<4, NR>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
  for (; t < num_tokens; ++t) bf16_rows<1, NR>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
}

void bf16_product(const uint16_t* weight, int num_rows, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                  const int32_t* token, int num_tokens, float* tile) {
  int r = 0;
  for (; r + 4 <= num_rows; r += 4)
    bf16_tokens<4>(weight + r * num_inputs, num_inputs, x, row_bytes, token, num_tokens, tile + r);
  for (; r < num_rows; ++r)
    bf16_tokens<1>(weight + r * num_inputs, num_inputs, x, row_bytes, token, num_tokens, tile + r);
}

template <int NT>
void bf16_columns(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                  float* tile) {
  // Word i of one row beside word i of the next: pairs along the inputs, which is what vdpbf16ps sums.
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 32; ++i) {
    order[2 * i] = static_cast<uint16_t>(i);
    order[2 * i + 1] = static_cast<uint16_t>(32 + i);
  }
  const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  __m512 sum[NT][2];
  const uint8_t* row[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    sum[t][0] = sum[t][1] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < num_inputs; k += 2) {
    const __m512i a = _mm512_loadu_si512(weight + k * kTileRows), b = _mm512_loadu_si512(weight + (k + 1) * kTileRows);
    const __m512bh w0 = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
    const __m512bh w1 = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
    for (int t = 0; t < NT; ++t) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(dword(row[t] + k * 2));
      sum[t][0] = _mm512_dpbf16_ps(sum[t][0], w0, pair);
      sum[t][1] = _mm512_dpbf16_ps(sum[t][1], w1, pair);
    }
  }
  for (int t = 0; t < NT; ++t) {
    _mm512_storeu_ps(tile + t * kTileRows, sum[t][0]);
    _mm512_storeu_ps(tile + t * kTileRows + 16, sum[t][1]);
  }
}

void bf16_column_product(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                         const int32_t* token, int num_tokens, float* tile) {
  int t = 0;
  for (; t + 8 <= num_tokens; t += 8)
    bf16_columns<8>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
  for (; t + 2 <= num_tokens; t += 2)
    bf16_columns<2>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
  if (t < num_tokens) bf16_columns<1>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
}

}  // namespace

const Bf16Table kAvx512Bf16 = {round_row, mxfp4_to_bf16, bf16_product, bf16_column_product};

}  // namespace harmonium
