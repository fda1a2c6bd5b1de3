// Portable kernels: vectors of four floats by the compiler's vector extension (SSE2 on x86-64, NEON on ARM).
#include "ops.h"

#include "low_rank.h"

namespace harmonium {

namespace {

typedef float V __attribute__((vector_size(16)));
typedef std::int32_t VInt __attribute__((vector_size(16)));
typedef std::uint32_t VBits __attribute__((vector_size(16)));

constexpr std::int64_t kLanes = 4;
constexpr int kRows = 4;

inline V set1(float x) { return V{x, x, x, x}; }
inline V zero() { return set1(0.0f); }

inline V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline V load_n(const float* p, std::int64_t n) {
  if (n == kLanes) return load(p);
  V v = zero();
  for (std::int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

inline void store_n(float* p, std::int64_t n, V v) {
  if (n == kLanes) return store(p, v);
  for (std::int64_t i = 0; i < n; ++i) p[i] = v[i];
}

inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V vmax(V a, V b) { return a > b ? a : b; }
inline float hsum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }

inline float hmax(V v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}

// exp(x) = 2^n exp(r): n is x / ln 2 rounded by adding 1.5 * 2^23, |r| <= ln 2 / 2, exp(r) by its series.
inline V vexp(V x) {
  const V low = set1(-87.0f);
  const V y = x < low ? low : x;
  const V magic = set1(12582912.0f);
  const V t = y * set1(1.44269504f) + magic;
  const V n = t - magic;
  const V r = (y - n * set1(0.693359375f)) - n * set1(-2.12194440e-4f);
  V p = set1(1.0f / 720);
  p = p * r + set1(1.0f / 120);
  p = p * r + set1(1.0f / 24);
  p = p * r + set1(1.0f / 6);
  p = p * r + set1(0.5f);
  p = p * r + set1(1.0f);
  p = p * r + set1(1.0f);
  const VBits scale = ((VBits)t - (VBits)magic + 127u) << 23;
  return x < low ? zero() : p * (V)scale;
}

inline V load_bf16_n(const std::uint16_t* p, std::int64_t n) {
  VBits v = {0, 0, 0, 0};
  for (std::int64_t i = 0; i < n; ++i) v[i] = static_cast<std::uint32_t>(p[i]) << 16;
  return (V)v;
}

inline V load_bf16(const std::uint16_t* p) { return load_bf16_n(p, kLanes); }

inline void store_bf16_n(std::uint16_t* p, std::int64_t n, V v) {
  const VBits bits = (VBits)v;
  const VBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VBits nan = (bits >> 16) | 0x40u;
  const VBits out = v == v ? rounded : nan;
  for (std::int64_t i = 0; i < n; ++i) p[i] = static_cast<std::uint16_t>(out[i]);
}

inline void transpose_keys(const std::uint16_t* const* row, std::int64_t head_size, float* out) {
  for (std::int64_t k = 0; k < head_size; ++k) {
    const VBits v = {row[0][k], row[1][k], row[2][k], row[3][k]};
    store(out + k * kKeyChunk, (V)(v << 16));
  }
}

inline V load_int8_n(const std::int8_t* p, std::int64_t n) {
  V v = zero();
  for (std::int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

inline V load_int8(const std::int8_t* p) { return load_int8_n(p, kLanes); }

inline void store_int8_n(std::int8_t* p, std::int64_t n, V v) {
  for (std::int64_t i = 0; i < n; ++i) p[i] = static_cast<std::int8_t>(v[i]);
}

inline void transpose_keys(const std::int8_t* const* row, std::int64_t head_size, const float* scale, float* out) {
  for (std::int64_t k = 0; k < head_size; ++k) {
    const V v = {static_cast<float>(row[0][k]), static_cast<float>(row[1][k]), static_cast<float>(row[2][k]),
                 static_cast<float>(row[3][k])};
    store(out + k * kKeyChunk, v * load(scale + k / kScaleGroup * kKeyChunk));
  }
}

HARMONIUM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#include "ops_body.h"
#include "attention_cache.h"
#include "attention_body.h"
#include "low_rank_body.h"

}  // namespace

const OpsTable kOpsScalar = {rms_norm, rotate, narrow, quantize, widen, dots, softmax, attend, merge};
const LowRankTable kLowRankScalar = {shrink, expand};

}  // namespace harmonium
