// AVX-512 kernels: vectors of sixteen floats.
#include "ops.h"

#include "low_rank.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for our mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace harmonium {

namespace {

typedef __m512 V;
constexpr std::int64_t kLanes = 16;
constexpr int kRows = 8;  // 16 sums: enough chains for 2 FMA a cycle, and gpt-oss has 8 query heads a kv head

inline V set1(float x) { return _mm512_set1_ps(x); }
inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline __mmask16 first_lanes(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline V load_n(const float* p, std::int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_n(float* p, std::int64_t n, V v) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }

inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline float hsum(V v) { return _mm512_reduce_add_ps(v); }
inline float hmax(V v) { return _mm512_reduce_max_ps(v); }

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) by its series. max(low, x) keeps a NaN, and
// scalef turns exp(low) into 0.
inline V vexp(V x) {
  const V y = _mm512_max_ps(set1(-110.0f), x);
  const V n = _mm512_roundscale_ps(mul(y, set1(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const V r = _mm512_fnmadd_ps(n, set1(-2.12194440e-4f), _mm512_fnmadd_ps(n, set1(0.693359375f), y));
  V p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline V widen_bits(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline V load_bf16(const std::uint16_t* p) {
  return widen_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline V load_bf16_n(const std::uint16_t* p, std::int64_t n) {
  return widen_bits(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

// Not by vcvtneps2bf16, which flushes denormals.
inline void store_bf16_n(std::uint16_t* p, std::int64_t n, V v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i nan = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
  const __m512i out = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtepi32_epi16(out));
}

inline V load_int8(const std::int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline V load_int8_n(const std::int8_t* p, std::int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}

inline void store_int8_n(std::int8_t* p, std::int64_t n, V v) {
  _mm_mask_storeu_epi8(p, first_lanes(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

// 16 rows of 16 words of 32 bits, transposed: b[c] holds word c of each row.
inline void transpose_words(__m512i (&a)[16], __m512i (&b)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  // a[4q + c] holds, in its 128-bit lane l, word 4l + c of rows 4q to 4q + 3.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    b[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    b[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    b[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    b[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// Pairs of bf16 are words, up to 16 of them at a time.
inline void transpose_keys(const std::uint16_t* const* row, std::int64_t head_size, float* out) {
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (std::int64_t k = 0; k < head_size; k += 32) {
    const std::int64_t pairs = head_size - k >= 32 ? 16 : (head_size - k) / 2;
    const __mmask16 mask = first_lanes(pairs);
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(mask, row[i] + k);
    transpose_words(a, b);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i >= pairs) break;
      float* to = out + (k + 2 * i) * kKeyChunk;
      store(to, _mm512_castsi512_ps(_mm512_slli_epi32(b[i], 16)));
      store(to + kKeyChunk, _mm512_castsi512_ps(_mm512_and_si512(b[i], odd)));
    }
  }
}

// Fours of int8 are words, up to 16 of them (of two scales) at a time.
inline void transpose_keys(const std::int8_t* const* row, std::int64_t head_size, const float* scale, float* out) {
  for (std::int64_t k = 0; k < head_size; k += 64, scale += 2 * kKeyChunk) {
    const std::int64_t count = head_size - k >= 64 ? 16 : (head_size - k) / 4;
    const __mmask16 mask = first_lanes(count);
    const V low = load(scale), high = count > 8 ? load(scale + kKeyChunk) : low;
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(mask, row[i] + k);
    transpose_words(a, b);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i >= count) break;
#pragma GCC unroll 16
      for (int j = 0; j < 4; ++j) {
        const __m512i x = _mm512_srai_epi32(_mm512_slli_epi32(b[i], 24 - 8 * j), 24);
        store(out + (k + 4 * i + j) * kKeyChunk, mul(_mm512_cvtepi32_ps(x), i < 8 ? low : high));
      }
    }
  }
}

HARMONIUM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

#include "ops_body.h"
#include "attention_cache.h"
#include "attention_body.h"
#include "low_rank_body.h"

}  // namespace

const OpsTable kOpsAvx512 = {rms_norm, rotate, narrow, quantize, widen, dots, softmax, attend, merge};
const LowRankTable kLowRankAvx512 = {shrink, expand};

}  // namespace harmonium
