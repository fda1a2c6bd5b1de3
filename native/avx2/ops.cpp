// AVX2 and FMA kernels: vectors of eight floats.
#include "ops.h"

#include "low_rank.h"

#include <immintrin.h>

namespace harmonium {

namespace {

typedef __m256 V;
constexpr std::int64_t kLanes = 8;
constexpr int kRows = 4;  // 8 sums, 2 of B and 1 of A in 16 registers; 8 chains cover 2 FMA a cycle at latency 4

inline V set1(float x) { return _mm256_set1_ps(x); }
inline V zero() { return _mm256_setzero_ps(); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }

inline __m256i first_lanes(std::int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline V load_n(const float* p, std::int64_t n) {
  return n == kLanes ? load(p) : _mm256_maskload_ps(p, first_lanes(n));
}

inline void store_n(float* p, std::int64_t n, V v) {
  if (n == kLanes) return store(p, v);
  _mm256_maskstore_ps(p, first_lanes(n), v);
}

inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V vmax(V a, V b) { return _mm256_max_ps(a, b); }

inline float hsum(V v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

inline float hmax(V v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) by its series. max(low, x) keeps a NaN.
inline V vexp(V x) {
  const V low = set1(-87.0f);
  const V y = _mm256_max_ps(low, x);
  const V n = _mm256_round_ps(mul(y, set1(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const V r = _mm256_fnmadd_ps(n, set1(-2.12194440e-4f), _mm256_fnmadd_ps(n, set1(0.693359375f), y));
  V p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  const __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(_mm256_cmp_ps(x, low, _CMP_LT_OQ), mul(p, _mm256_castsi256_ps(scale)));
}

inline V widen_bits(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline V load_bf16(const std::uint16_t* p) {
  return widen_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline V load_bf16_n(const std::uint16_t* p, std::int64_t n) {
  alignas(16) std::uint16_t lane[kLanes] = {0};
  for (std::int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return load_bf16(lane);
}

inline void store_bf16_n(std::uint16_t* p, std::int64_t n, V v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i top = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i out = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), nan, is_nan);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
  if (n == kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    return;
  }
  alignas(16) std::uint16_t lane[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(lane), packed);
  for (std::int64_t i = 0; i < n; ++i) p[i] = lane[i];
}

inline V load_int8(const std::int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

inline V load_int8_n(const std::int8_t* p, std::int64_t n) {
  std::int8_t lane[kLanes] = {0};
  for (std::int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return load_int8(lane);
}

inline void store_int8_n(std::int8_t* p, std::int64_t n, V v) {
  const __m256i whole = _mm256_cvtps_epi32(v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const __m128i bytes = _mm_packs_epi16(words, words);
  if (n == kLanes) return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  std::int8_t lane[kLanes];
  _mm_storel_epi64(reinterpret_cast<__m128i*>(lane), bytes);
  for (std::int64_t i = 0; i < n; ++i) p[i] = lane[i];
}

// 8 rows of 8 words of 32 bits, transposed: b[c] holds word c of each row.
inline void transpose_words(__m256i (&a)[8], __m256i (&b)[8]) {
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
}

// Pairs of bf16 are words, 8 of them (or 4, at the end of a head) at a time.
inline void transpose_keys(const std::uint16_t* const* row, std::int64_t head_size, float* out) {
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (std::int64_t k = 0; k < head_size; k += 16) {
    const bool half = head_size - k < 16;
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i) {
      const __m128i* p = reinterpret_cast<const __m128i*>(row[i] + k);
      a[i] = half ? _mm256_castsi128_si256(_mm_loadu_si128(p))
                  : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    transpose_words(a, b);
    for (int i = 0; i < (half ? 4 : 8); ++i) {
      float* to = out + (k + 2 * i) * kKeyChunk;
      store(to, _mm256_castsi256_ps(_mm256_slli_epi32(b[i], 16)));
      store(to + kKeyChunk, _mm256_castsi256_ps(_mm256_and_si256(b[i], odd)));
    }
  }
}

// Fours of int8 are words, up to 8 of them at a time: the elements of one scale.
inline void transpose_keys(const std::int8_t* const* row, std::int64_t head_size, const float* scale, float* out) {
  const __m256i words = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (std::int64_t k = 0; k < head_size; k += kScaleGroup, scale += kKeyChunk) {
    const int count = head_size - k < kScaleGroup ? static_cast<int>(head_size - k) / 4 : 8;
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), words);
    const V factor = load(scale);
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_maskload_epi32(reinterpret_cast<const int*>(row[i] + k), mask);
    transpose_words(a, b);
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < 4; ++j) {
        const __m256i x = _mm256_srai_epi32(_mm256_slli_epi32(b[i], 24 - 8 * j), 24);
        store(out + (k + 4 * i + j) * kKeyChunk, mul(_mm256_cvtepi32_ps(x), factor));
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

const OpsTable kOpsAvx2 = {rms_norm, rotate, narrow, quantize, widen, dots, softmax, attend, merge};
const LowRankTable kLowRankAvx2 = {shrink, expand};

}  // namespace harmonium
