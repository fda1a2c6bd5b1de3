// What surrounds the products, AVX-512 with VNNI and BF16. What each function does: matmul.h.
#include "matmul.h"

#include "avx512/matmul_bits.h"

namespace harmonium {

namespace {

// e^x to about one unit in the last place: 2^n times a polynomial in the rest, |rest| <= ln(2) / 2 (Taylor, degree
// 7). Overflow gives infinity and underflow zero; NaN stays.
__m512 exp_ps(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts, the first short
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

void swiglu(const float* gate_up, const uint16_t* bias, int num_units, float limit, float alpha, float* out) {
  const int size = 2 * num_units;
  const auto m0 = static_cast<__mmask16>(size >= 16 ? 0xffff : (1 << size) - 1);
  const auto m1 = static_cast<__mmask16>(size >= 16 ? (1u << (size - 16)) - 1 : 0);
  const __m512 v0 = _mm512_add_ps(_mm512_maskz_loadu_ps(m0, gate_up), expand_bf16(_mm256_maskz_loadu_epi16(m0, bias)));
  const __m512 v1 =
      _mm512_add_ps(_mm512_maskz_loadu_ps(m1, gate_up + 16), expand_bf16(_mm256_maskz_loadu_epi16(m1, bias + 16)));
  const __m512 most = _mm512_set1_ps(limit);
  // The order of operands matters: min and max return the second where one is NaN.
  const __m512 gate = _mm512_min_ps(most, _mm512_permutex2var_ps(v0, even_index(), v1));
  __m512 up = _mm512_min_ps(most, _mm512_permutex2var_ps(v0, odd_index(), v1));
  up = _mm512_max_ps(_mm512_set1_ps(-limit), up);
  const __m512 one = _mm512_set1_ps(1.0f);
  // At 88 the sum is 1.6e38: beyond it the quotient is zero for every gate that a model can produce.
  const __m512 power = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_mul_ps(_mm512_set1_ps(-alpha), gate));
  const __m512 value = _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, exp_ps(power))), _mm512_add_ps(up, one));
  _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << num_units) - 1), value);
}

void finish(const float* tile, const uint16_t* bias, int num_rows, float weight, bool add, float* out) {
  for (int r = 0; r < num_rows; r += 16) {
    const int left = num_rows - r;
    const auto m = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    __m512 value = _mm512_maskz_loadu_ps(m, tile + r);
    if (bias) value = _mm512_add_ps(value, expand_bf16(_mm256_maskz_loadu_epi16(m, bias + r)));
    value = _mm512_mul_ps(value, _mm512_set1_ps(weight));
    if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(m, out + r));
    _mm512_mask_storeu_ps(out + r, m, value);
  }
}

void add_parts(const float* part, int64_t stride, int num_parts, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += 16) {
    const auto m = static_cast<__mmask16>(size - i >= 16 ? 0xffff : (1 << (size - i)) - 1);
    __m512 sum = _mm512_maskz_loadu_ps(m, part + i);
    for (int a = 1; a < num_parts; ++a) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(m, part + a * stride + i));
    _mm512_mask_storeu_ps(out + i, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, out + i), sum));
  }
}

double spin_int8(int64_t rounds) {
  __m512i acc[16];
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
  __m512i a = _mm512_set1_epi32(static_cast<int>(rounds));
  const __m512i b = _mm512_set1_epi32(0x01020304);
  for (int64_t n = 0; n < rounds; ++n) {
    __asm__ volatile("" : "+v"(a));  // a new value as far as the compiler knows: nothing leaves the loop
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
  }
  for (int i = 1; i < 16; ++i) acc[0] = _mm512_add_epi32(acc[0], acc[i]);
  __asm__ volatile("" : "+v"(acc[0]));
  return static_cast<double>(rounds) * 16 * 128;
}

double spin_bf16(int64_t rounds) {
  __m512 acc[16];
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
  __m512i a = _mm512_set1_epi32(0x3f803f80);
  const auto b = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  for (int64_t n = 0; n < rounds; ++n) {
    __asm__ volatile("" : "+v"(a));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)a, b);
  }
  for (int i = 1; i < 16; ++i) acc[0] = _mm512_add_ps(acc[0], acc[i]);
  __asm__ volatile("" : "+v"(acc[0]));
  return static_cast<double>(rounds) * 16 * 64;
}

uint64_t read_all(const uint8_t* data, int64_t size_bytes) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (int64_t i = 0; i < size_bytes; i += 256) {
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 4096), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 4160), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 4224), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 4288), _MM_HINT_T0);
    a = _mm512_xor_si512(a, _mm512_loadu_si512(data + i));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(data + i + 64));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(data + i + 128));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(data + i + 192));
  }
  return static_cast<uint64_t>(
      _mm512_reduce_or_epi64(_mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d))));
}

}  // namespace

const TileTable kAvx512Tile = {swiglu, finish, add_parts, spin_int8, spin_bf16, read_all};

}  // namespace harmonium
