// Split weights, AVX-512 with VNNI. What each function does: matmul.h.
#include "avx512/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

#include "split_body.h"

// How far ahead of its loads each half is fetched, and high halves alone.
constexpr int kBothAhead = 4096;
constexpr int kHighAhead = 6144;

template <int kAhead>
inline __attribute__((always_inline)) void fetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_NTA);
}

// kAhead 0: not to be fetched.
template <int kAhead>
inline __attribute__((always_inline)) __m512 scale_at_block(const uint8_t* high, int64_t b) {
  const uint8_t* from = high + b / 2 * kSplitPairBytes + 512 + b % 2 * 32;
  if (kAhead && b % 2 == 0) fetch<kAhead>(from);
  return expand_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Where both have 0xf0 the bits of a, where 0x0f those of b.
inline __attribute__((always_inline)) __m512i select(__m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(0xf0)), a, b, 0xca);
}

// NT tokens by NP panels. 32 registers: NT * NP integer and as many float sums, NP * 2 weights and a broadcast; 6 by 2
// fit. Sums have the order of every other product. kStream: one pass, and both streams are fetched ahead of it; else what
// `ahead` has comes meanwhile.
template <int NT, int NP, bool kStream>
void panels_of(const uint8_t* high, const uint8_t* low, int64_t num_blocks, const uint8_t* x, int64_t row_bytes,
              const int32_t* token, Ahead* ahead, float* tile) {
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks);
  const uint8_t* row[NT];
  const int64_t high_stride = split_high_bytes(num_blocks), low_stride = split_low_bytes(num_blocks);
  __m512 sum[NT][NP];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    for (int p = 0; p < NP; ++p) sum[t][p] = _mm512_setzero_ps();
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    const uint8_t* h = high + b / 2 * kSplitPairBytes + b % 2 * 256;
    const uint8_t* l = low + b * kSplitLowBytes;
    if (!kStream) ahead[0].go_on(), ahead[1].go_on();
    __m512i acc[NT][NP];
    for (int t = 0; t < NT; ++t) {
      for (int p = 0; p < NP; ++p) acc[t][p] = _mm512_set1_epi32(dword(row[t] + start_at + b * 4));
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      __m512i even[NP], odd[NP];
      for (int p = 0; p < NP; ++p) {
        const uint8_t *from = h + p * high_stride + g * kPart, *more = l + p * low_stride + g * kPart;
        if (kStream) fetch<kBothAhead>(from), fetch<kBothAhead>(more);
        const __m512i upper = _mm512_loadu_si512(from), lower = _mm512_loadu_si512(more);
        even[p] = select(_mm512_slli_epi16(upper, 4), lower);
        odd[p] = select(upper, _mm512_srli_epi16(lower, 4));
      }
      for (int t = 0; t < NT; ++t) {
        const __m512i a = _mm512_set1_epi32(dword(row[t] + at + g * 4));
        for (int p = 0; p < NP; ++p) acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], even[p], a);
        const __m512i c = _mm512_set1_epi32(dword(row[t] + at + 64 + g * 4));
        for (int p = 0; p < NP; ++p) acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], odd[p], c);
      }
    }
    for (int p = 0; p < NP; ++p) {
      const __m512 scale = scale_at_block<kStream ? kBothAhead : 0>(high + p * high_stride, b);
      for (int t = 0; t < NT; ++t) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(from_bits(dword(row[t] + scale_at + b * 4))));
        sum[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t][p]), both, sum[t][p]);
      }
    }
  }
  for (int t = 0; t < NT; ++t) {
    for (int p = 0; p < NP; ++p) _mm512_storeu_ps(tile + t * kTileRows + p * kPanelRows, sum[t][p]);
  }
}

template <int NP>
void tokens_of(const uint8_t* high, const uint8_t* low, int64_t num_blocks, const uint8_t* x, int64_t row_bytes,
               const int32_t* token, int num_tokens, Next next, float* tile) {
  using Fn = void (*)(const uint8_t*, const uint8_t*, int64_t, const uint8_t*, int64_t, const int32_t*, Ahead*, float*);
  constexpr Fn alone[kTileTokens] = {panels_of<1, NP, true>, panels_of<2, NP, true>, panels_of<3, NP, true>,
                                     panels_of<4, NP, true>, panels_of<5, NP, true>, panels_of<6, NP, true>};
  constexpr Fn several[kTileTokens] = {panels_of<1, NP, false>, panels_of<2, NP, false>, panels_of<3, NP, false>,
                                     panels_of<4, NP, false>, panels_of<5, NP, false>, panels_of<6, NP, false>};
  // Equal shares: 8 tokens are 4 and 4.
  const int passes = (num_tokens + kTileTokens - 1) / kTileTokens;
  const uint8_t* next_low = low + (next.data ? next.data - high : 0) / split_high_bytes(num_blocks) *
                                      split_low_bytes(num_blocks);
  const int64_t next_low_bytes = next.bytes / split_high_bytes(num_blocks) * split_low_bytes(num_blocks);
  Ahead ahead[2] = {{next, passes * num_blocks}, {{next_low, next_low_bytes}, passes * num_blocks}};
  for (int pass = 0, t = 0; pass < passes; ++pass) {
    const int count = (num_tokens - t + passes - pass - 1) / (passes - pass);
    (passes > 1 ? several : alone)[count - 1](high, low, num_blocks, x, row_bytes, token + t, ahead,
                                             tile + t * kTileRows);
    t += count;
  }
}

void product(const uint8_t* high, const uint8_t* low, int num_panels, int64_t num_blocks, const uint8_t* x,
             int64_t row_bytes, const int32_t* token, int num_tokens, Next next, float* tile) {
  if (num_panels == 2)
    tokens_of<2>(high, low, num_blocks, x, row_bytes, token, num_tokens, next, tile);
  else
    tokens_of<1>(high, low, num_blocks, x, row_bytes, token, num_tokens, next, tile);
}

template <int NT>
void estimate_of(const uint8_t* high, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const float* center,
                 const float* square, Estimate* found) {
  const int64_t scale_at = scale_offset(num_blocks);
  const __m512i lower = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512 value[NT], variance[NT];
  for (int t = 0; t < NT; ++t) value[t] = variance[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    const uint8_t* h = high + b / 2 * kSplitPairBytes + b % 2 * 256;
    __m512i even[NT], odd[NT];
    for (int t = 0; t < NT; ++t) even[t] = odd[t] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      fetch<kHighAhead>(h + g * kPart);
      const __m512i v = _mm512_loadu_si512(h + g * kPart);
      // The odd ones stay where they are, 16 times as great.
      const __m512i e = _mm512_and_si512(v, lower), o = _mm512_and_si512(v, upper);
      for (int t = 0; t < NT; ++t) {
        const uint8_t* a = x + t * row_bytes + at + g * 4;
        even[t] = _mm512_dpbusd_epi32(even[t], e, _mm512_set1_epi32(dword(a)));
        odd[t] = _mm512_dpbusd_epi32(odd[t], o, _mm512_set1_epi32(dword(a + 64)));
      }
    }
    const __m512 s = scale_at_block<kHighAhead>(high, b);
    const __m512 squared = _mm512_mul_ps(s, s);
    for (int t = 0; t < NT; ++t) {
      const __m512 acc = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(even[t], 4), odd[t]));
      const __m512 own = _mm512_set1_ps(from_bits(dword(x + t * row_bytes + scale_at + b * 4)));
      const __m512 middle = _mm512_fmadd_ps(acc, own, _mm512_set1_ps(center[t * num_blocks + b]));
      value[t] = _mm512_fmadd_ps(s, middle, value[t]);
      variance[t] = _mm512_fmadd_ps(squared, _mm512_set1_ps(square[t * num_blocks + b]), variance[t]);
    }
  }
  for (int t = 0; t < NT; ++t) {
    _mm512_storeu_ps(found[t].value, value[t]);
    _mm512_storeu_ps(found[t].variance, variance[t]);
  }
}

void estimate(const uint8_t* high, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const float* center,
              const float* square, int num_rows, Estimate* found) {
  using Fn = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, const float*, const float*, Estimate*);
  constexpr Fn by_count[kScreenRows] = {estimate_of<1>, estimate_of<2>, estimate_of<3>, estimate_of<4>};
  by_count[num_rows - 1](high, num_blocks, x, row_bytes, center, square, found);
}

}  // namespace

const SplitTable kAvx512Split = {split_panel, nullptr, product, estimate};

}  // namespace harmonium
