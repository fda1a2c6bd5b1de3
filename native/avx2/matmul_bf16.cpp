// Products with bf16 activations, AVX2 and FMA. What each function does: matmul.h.
#include "avx2/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

void round_row(const float* x, int64_t num_inputs, uint16_t* row) {
  for (int64_t i = 0; i < num_inputs; ++i) {
    const uint32_t bits = to_bits(x[i]);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    row[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : rounded);
  }
}

void mxfp4_to_bf16(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint16_t* weight) {
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  const __m128i nibble = _mm_set1_epi8(15);
  for (int64_t b = 0; b < num_rows * num_blocks; ++b) {
    const __m128i v = load128(blocks + b * 16);
    const __m128i lo = _mm_and_si128(v, nibble), hi = _mm_and_si128(_mm_srli_epi16(v, 4), nibble);
    const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(lo, hi), _mm_unpacklo_epi8(lo, hi));
    alignas(32) int8_t value[kBlock];
    store(value, _mm256_shuffle_epi8(twice, index));
    // Two factors: half of 2^-127 is exact only after the product.
    const __m256 scale = _mm256_set1_ps(from_bits(e8m0_bits(scales[b])));
    for (int i = 0; i < kBlock; i += 8) {
      const __m256 f = _mm256_mul_ps(
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(value + i)))),
          _mm256_set1_ps(0.5f));
      const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(_mm256_mul_ps(f, scale)), 16);
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xd8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(weight + b * kBlock + i), _mm256_castsi256_si128(words));
    }
  }
}

// Sixteen bf16 as eight float32 of even and eight of odd places: the order of a sum does not matter.
inline __attribute__((always_inline)) void split_bf16(const uint16_t* p, __m256 out[2]) {
  const __m256i v = load(p);
  out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  out[1] = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

template <int NT, int NR>
void bf16_rows(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes, const int32_t* token,
               float* tile) {
  const uint16_t* row[NT];
  __m256 sum[NT][NR][2];
  for (int t = 0; t < NT; ++t) {
    row[t] = reinterpret_cast<const uint16_t*>(x + token[t] * row_bytes);
    for (int r = 0; r < NR; ++r) sum[t][r][0] = sum[t][r][1] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < num_inputs; k += 16) {
    __m256 a[NT][2];
    for (int t = 0; t < NT; ++t) split_bf16(row[t] + k, a[t]);
    for (int r = 0; r < NR; ++r) {
      __m256 w[2];
      split_bf16(weight + r * num_inputs + k, w);
      for (int t = 0; t < NT; ++t) {
        for (int i = 0; i < 2; ++i) sum[t][r][i] = _mm256_fmadd_ps(w[i], a[t][i], sum[t][r][i]);
      }
    }
  }
  for (int t = 0; t < NT; ++t) {
    for (int r = 0; r < NR; ++r) tile[t * kTileRows + r] = reduce(_mm256_add_ps(sum[t][r][0], sum[t][r][1]));
  }
}

template <int NR>
void bf16_tokens(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                 int num_tokens, float* tile) {
  int t = 0;
  for (; t + 2 <= num_tokens; t += 2)
    bf16_rows<2, NR>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
  if (t < num_tokens) bf16_rows<1, NR>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
}

void bf16_product(const uint16_t* weight, int num_rows, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                  const int32_t* token, int num_tokens, float* tile) {
  int r = 0;
  for (; r + 2 <= num_rows; r += 2)
    bf16_tokens<2>(weight + r * num_inputs, num_inputs, x, row_bytes, token, num_tokens, tile + r);
  if (r < num_rows) bf16_tokens<1>(weight + r * num_inputs, num_inputs, x, row_bytes, token, num_tokens, tile + r);
}

template <int NT>
void bf16_columns(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                  float* tile) {
  __m256 sum[NT][4];
  const uint8_t* row[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    for (int i = 0; i < 4; ++i) sum[t][i] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < num_inputs; ++k) {
    __m256 a[NT];
    for (int t = 0; t < NT; ++t) {
      uint16_t bits;
      memcpy(&bits, row[t] + k * 2, sizeof bits);
      a[t] = _mm256_set1_ps(from_bits(static_cast<uint32_t>(bits) << 16));
    }
    for (int i = 0; i < 4; ++i) {
      const __m256 w = expand_bf16(weight + k * kTileRows + i * 8);
      for (int t = 0; t < NT; ++t) sum[t][i] = _mm256_fmadd_ps(w, a[t], sum[t][i]);
    }
  }
  for (int t = 0; t < NT; ++t) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(tile + t * kTileRows + i * 8, sum[t][i]);
  }
}

void bf16_column_product(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                         const int32_t* token, int num_tokens, float* tile) {
  int t = 0;
  for (; t + 2 <= num_tokens; t += 2)
    bf16_columns<2>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
  if (t < num_tokens) bf16_columns<1>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, uint16_t* decoded, float* tile) {
  // Four rows at a time: they are still in L1 when the products read them.
  for (int r = 0; r < num_rows; r += 4) {
    const int few = num_rows - r < 4 ? num_rows - r : 4;
    mxfp4_to_bf16(blocks + r * num_blocks * 16, scales + r * num_blocks, few, num_blocks, decoded);
    bf16_product(decoded, few, num_blocks * kBlock, x, row_bytes, token, num_tokens, tile + r);
  }
}

}  // namespace

const Bf16Table kAvx2Bf16 = {round_row, round_row, mxfp4_product, bf16_product, bf16_column_product};

}  // namespace harmonium
