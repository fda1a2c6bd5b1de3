// What surrounds the products, AVX2 and FMA. What each function does: matmul.h.
#include "matmul.h"

#include "avx2/matmul_bits.h"

namespace harmonium {

namespace {

// e^x for x <= 88 to about one unit in the last place (avx512/matmul.cpp says how); below -87 zero.
__m256 exp_ps(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-88.0f), x);
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.0f / 5040);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

void swiglu(const float* gate_up, const uint16_t* bias, int num_units, float limit, float alpha, float* out) {
  alignas(32) float gate[16] = {}, up[16] = {};
  for (int u = 0; u < num_units; ++u) {
    gate[u] = gate_up[2 * u] + from_bits(static_cast<uint32_t>(bias[2 * u]) << 16);
    up[u] = gate_up[2 * u + 1] + from_bits(static_cast<uint32_t>(bias[2 * u + 1]) << 16);
  }
  const __m256 most = _mm256_set1_ps(limit), one = _mm256_set1_ps(1.0f);
  for (int u = 0; u < num_units; u += 8) {
    // The order of operands matters: min and max return the second where one is NaN.
    const __m256 g = _mm256_min_ps(most, _mm256_load_ps(gate + u));
    const __m256 v = _mm256_max_ps(_mm256_set1_ps(-limit), _mm256_min_ps(most, _mm256_load_ps(up + u)));
    const __m256 power = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_mul_ps(_mm256_set1_ps(-alpha), g));
    _mm256_store_ps(up + u, _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, exp_ps(power))), _mm256_add_ps(v, one)));
  }
  memcpy(out, up, num_units * sizeof(float));
}

void finish(const float* tile, const uint16_t* bias, int num_rows, float weight, bool add, float* out) {
  for (int r = 0; r < num_rows; ++r) {
    const float value = (tile[r] + (bias ? from_bits(static_cast<uint32_t>(bias[r]) << 16) : 0.0f)) * weight;
    out[r] = add ? out[r] + value : value;
  }
}

void add_parts(const float* part, int64_t stride, int num_parts, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    float sum = part[i];
    for (int a = 1; a < num_parts; ++a) sum += part[a * stride + i];
    out[i] += sum;
  }
}

double spin_int8(int64_t rounds) {
  __m256i acc[8];
  for (int i = 0; i < 8; ++i) acc[i] = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi32(static_cast<int>(rounds));
  const __m256i b = _mm256_set1_epi32(0x01020304);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __asm__ volatile("" : "+x"(a));  // a new value as far as the compiler knows: eight products, not one
      acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(a, b));
    }
  }
  for (int i = 1; i < 8; ++i) acc[0] = _mm256_add_epi32(acc[0], acc[i]);
  __asm__ volatile("" : "+x"(acc[0]));
  return static_cast<double>(rounds) * 8 * 32;
}

double spin_bf16(int64_t rounds) {
  __m256 acc[8];
  for (int i = 0; i < 8; ++i) acc[i] = _mm256_setzero_ps();
  __m256 a = _mm256_set1_ps(1.0f);
  const __m256 b = _mm256_set1_ps(0.0078125f);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __asm__ volatile("" : "+x"(a));
      acc[i] = _mm256_fmadd_ps(a, b, acc[i]);
    }
  }
  for (int i = 1; i < 8; ++i) acc[0] = _mm256_add_ps(acc[0], acc[i]);
  __asm__ volatile("" : "+x"(acc[0]));
  return static_cast<double>(rounds) * 8 * 16;
}

uint64_t read_all(const uint8_t* data, int64_t size_bytes) {
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int64_t i = 0; i < size_bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 4096), _MM_HINT_T0);
    a = _mm256_xor_si256(a, load(data + i));
    b = _mm256_xor_si256(b, load(data + i + 32));
  }
  alignas(32) uint64_t v[4];
  store(v, _mm256_xor_si256(a, b));
  return v[0] ^ v[1] ^ v[2] ^ v[3];
}

}  // namespace

const TileTable kAvx2Tile = {swiglu, finish, add_parts, spin_int8, spin_bf16, read_all};

}  // namespace harmonium
