// Products with bf16 activations, AVX-512 with VNNI and BF16. What each function does: matmul.h.
#include "avx512/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

#include "mxfp4_bf16_body.h"

// Tokens by rows of a tile: 16 sums, 4 weights and what they are made of are in registers, and four rows of activations
// leave L1 room for the weights. Six tokens are 20 % slower for it (measured).
constexpr int kMostTokens = 4;

// How many rows ahead MXFP4 is fetched (measured).
template <int NT>
constexpr int kRowsAhead = NT == 1 ? 8 : 12;

// To nearest even, in integers: vcvtneps2bf16 would make zeros of denormals.
inline __attribute__((always_inline)) __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan =
      _mm512_cmpgt_epu32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
  up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

void round_row(const float* x, int64_t num_inputs, uint16_t* row) {
  for (int64_t i = 0; i < num_inputs; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i), to_bf16(_mm512_loadu_ps(x + i)));
  }
}

// Blocks of the next run: four, as long as there are so many, then two and one.
inline int run_of(int64_t num_left) { return num_left >= 4 ? 4 : num_left >= 2 ? 2 : 1; }

// The order of inputs for MXFP4. The nibbles of a run of blocks are words of four; number 4i + s of the run, nibble s
// of word i, lies at place 8 * blocks * s + i: where one word permutation leaves its weight (see decode_run).
void round_mxfp4_row(const float* x, int64_t num_inputs, uint16_t* row) {
  const __m256i order = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const int64_t num_blocks = num_inputs / kBlock;
  for (int64_t b = 0, count; b < num_blocks; b += count) {
    count = run_of(num_blocks - b);
    for (int64_t i = 0; i < 8 * count; i += 4) {
      alignas(32) uint64_t piece[4];
      _mm256_store_si256(reinterpret_cast<__m256i*>(piece),
                         _mm256_permutexvar_epi16(order, to_bf16(_mm512_loadu_ps(x + b * kBlock + 4 * i))));
      for (int s = 0; s < 4; ++s) memcpy(row + b * kBlock + 8 * count * s + i, piece + s, 8);
    }
  }
}

// A run of blocks as words whose lowest nibbles come first, and what their exponents are lowered by. Of four blocks
// there is a register of words; of two they are there twice, of one four times, shifted so that registers are full.
struct Run {
  __m512i words, power;
};

template <int kBlocks>
inline __attribute__((always_inline)) Run load_run(const uint8_t* blocks, const uint8_t* scales) {
  // In each quarter of a register the byte of its block, as words.
  const __m512i of_four = _mm512_set_epi64(
      static_cast<int64_t>(0x8003800380038003), static_cast<int64_t>(0x8003800380038003),
      static_cast<int64_t>(0x8002800280028002), static_cast<int64_t>(0x8002800280028002),
      static_cast<int64_t>(0x8001800180018001), static_cast<int64_t>(0x8001800180018001),
      static_cast<int64_t>(0x8000800080008000), static_cast<int64_t>(0x8000800080008000));
  int32_t e = 0;
  memcpy(&e, scales, kBlocks);
  __m512i words, power = _mm512_set1_epi32(e);
  if (kBlocks == 4) {
    words = _mm512_loadu_si512(blocks);
    power = _mm512_shuffle_epi8(power, of_four);
  } else if (kBlocks == 2) {
    words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks)));
    words = _mm512_mask_srli_epi16(words, 0xffff0000u, words, 4);
    power = _mm512_broadcast_i64x4(_mm512_castsi512_si256(_mm512_shuffle_epi8(power, of_four)));
  } else {
    words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks)));
    words = _mm512_mask_srli_epi16(words, 0xff00ff00u, words, 4);
    words = _mm512_mask_srli_epi16(words, 0xffff0000u, words, 8);
    power = _mm512_set1_epi16(static_cast<short>(e));
  }
  return {words, _mm512_slli_epi16(_mm512_sub_epi16(_mm512_set1_epi16(127), power), 7)};
}

// The next register of a run's weights. vpermw looks at five bits of an index: the table of sixteen is there twice, so
// the nibbles above need no mask. Subtraction that stops at zero keeps zeros; -0 is taken as 0, which no sum can tell.
template <int kBlocks>
inline __attribute__((always_inline)) __m512i next_weights(Run& run) {
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0, static_cast<short>(0xbf00),
      static_cast<short>(0xbf80), static_cast<short>(0xbfc0), static_cast<short>(0xc000), static_cast<short>(0xc040),
      static_cast<short>(0xc080), static_cast<short>(0xc0c0)));
  const __m512i weights = _mm512_subs_epu16(_mm512_permutexvar_epi16(run.words, table), run.power);
  run.words = _mm512_srli_epi16(run.words, kBlocks == 4 ? 4 : 8);
  return weights;
}

// A run's weights one at a time, for scales near the ends of the range.
void decode_unusual_run(const uint8_t* blocks, const uint8_t* scales, int num_blocks, uint16_t* weight) {
  for (int i = 0; i < num_blocks * kBlock; ++i) {
    weight[8 * num_blocks * (i % 4) + i / 4] = any_weight(blocks + i / kBlock * 16, scales[i / kBlock], i % kBlock);
  }
}

// Sums of the sixteen numbers of four registers, always in one order: those 8, 4, 2 and 1 places apart.
inline __attribute__((always_inline)) __m128 reduce_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
  return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, v));
}

template <int NT, int NR>
inline __attribute__((always_inline)) void write_sums(const __m512 (&sum)[NT][NR], float* tile) {
  for (int t = 0; t < NT; ++t) {
    for (int r = 0; r < NR; r += 4) {
      const auto at = [&](int i) { return r + i < NR ? sum[t][r + i < NR ? r + i : r] : _mm512_setzero_ps(); };
      const auto mask = static_cast<__mmask8>(NR - r >= 4 ? 15 : (1 << (NR - r)) - 1);
      _mm_mask_storeu_ps(tile + t * kTileRows + r, mask, reduce_four(at(0), at(1), at(2), at(3)));
    }
  }
}

template <int NT, int NR, int kBlocks>
inline __attribute__((always_inline)) void add_run(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks,
                                                   int64_t b, const uint16_t* const (&row)[NT], __m512 (&sum)[NT][NR]) {
  Run run[NR];
  for (int r = 0; r < NR; ++r) {
    const uint8_t* from = blocks + (r * num_blocks + b) * 16;
    // The same place of rows that come later: the hardware does not follow so many streams.
    if (kBlocks == 4) _mm_prefetch(reinterpret_cast<const char*>(from + kRowsAhead<NT> * num_blocks * 16), _MM_HINT_T0);
    run[r] = load_run<kBlocks>(from, scales + r * num_blocks + b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kBlocks; ++i) {
    __m512bh w[NR];
    for (int r = 0; r < NR; ++r) w[r] = (__m512bh)next_weights<kBlocks>(run[r]);
    for (int t = 0; t < NT; ++t) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(row[t] + (b + i) * kBlock);
      for (int r = 0; r < NR; ++r) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], w[r], a);
    }
  }
}

// NR rows of MXFP4 by NT tokens: weights are decoded in registers and used for all tokens at once.
template <int NT, int NR>
void mxfp4_rows(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, const uint8_t* x, int64_t row_bytes,
                const int32_t* token, float* tile) {
  __m512 sum[NT][NR];
  const uint16_t* row[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = reinterpret_cast<const uint16_t*>(x + token[t] * row_bytes);
    for (int r = 0; r < NR; ++r) sum[t][r] = _mm512_setzero_ps();
  }
  // The next tile's scales: all of them are looked at before its first product.
  const uint8_t* later = scales + kTileRows * num_blocks;
  for (int64_t i = 0; i < NR * num_blocks; i += 64) _mm_prefetch(reinterpret_cast<const char*>(later + i), _MM_HINT_T0);
  int64_t b = 0;
  for (; b + 4 <= num_blocks; b += 4) add_run<NT, NR, 4>(blocks, scales, num_blocks, b, row, sum);
  if (b + 2 <= num_blocks) {
    add_run<NT, NR, 2>(blocks, scales, num_blocks, b, row, sum);
    b += 2;
  }
  if (b < num_blocks) add_run<NT, NR, 1>(blocks, scales, num_blocks, b, row, sum);
  write_sums<NT, NR>(sum, tile);
}

template <int NT>
void mxfp4_tokens(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                  int64_t row_bytes, const int32_t* token, float* tile) {
  constexpr int kRows = NT == 1 ? 8 : 4;  // eight sums at least: a multiplication takes six cycles, two are in flight
  int r = 0;
  for (; r + kRows <= num_rows; r += kRows) {
    mxfp4_rows<NT, kRows>(blocks + r * num_blocks * 16, scales + r * num_blocks, num_blocks, x, row_bytes, token,
                          tile + r);
  }
  for (; r < num_rows; ++r) {
    mxfp4_rows<NT, 1>(blocks + r * num_blocks * 16, scales + r * num_blocks, num_blocks, x, row_bytes, token, tile + r);
  }
}

// NR rows of bf16 by NT tokens.
template <int NT, int NR>
void bf16_rows(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes, const int32_t* token,
               float* tile) {
  __m512 sum[NT][NR];
  const uint16_t* row[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = reinterpret_cast<const uint16_t*>(x + token[t] * row_bytes);
    for (int r = 0; r < NR; ++r) sum[t][r] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < num_inputs; k += kBlock) {
    __m512bh w[NR];
    for (int r = 0; r < NR; ++r) w[r] = (__m512bh)_mm512_loadu_si512(weight + r * num_inputs + k);
    for (int t = 0; t < NT; ++t) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(row[t] + k);
      for (int r = 0; r < NR; ++r) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], w[r], a);
    }
  }
  write_sums<NT, NR>(sum, tile);
}

template <int NT>
void bf16_tokens(const uint16_t* weight, int num_rows, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                 const int32_t* token, float* tile) {
  int r = 0;
  for (; r + 4 <= num_rows; r += 4) {
    bf16_rows<NT, 4>(weight + r * num_inputs, num_inputs, x, row_bytes, token, tile + r);
  }
  for (; r < num_rows; ++r) bf16_rows<NT, 1>(weight + r * num_inputs, num_inputs, x, row_bytes, token, tile + r);
}

void bf16_product(const uint16_t* weight, int num_rows, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                  const int32_t* token, int num_tokens, float* tile) {
  using Fn = void (*)(const uint16_t*, int, int64_t, const uint8_t*, int64_t, const int32_t*, float*);
  constexpr Fn by_count[kMostTokens] = {bf16_tokens<1>, bf16_tokens<2>, bf16_tokens<3>, bf16_tokens<4>};
  for (int t = 0, count; t < num_tokens; t += count) {
    count = num_tokens - t < kMostTokens ? num_tokens - t : kMostTokens;
    by_count[count - 1](weight, num_rows, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
  }
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, uint16_t* decoded, float* tile) {
  if (!are_usual(scales, num_rows * num_blocks)) {
    for (int64_t b = 0, count; b < num_rows * num_blocks; b += count) {
      count = run_of(num_blocks - b % num_blocks);
      decode_unusual_run(blocks + b * 16, scales + b, static_cast<int>(count), decoded + b * kBlock);
    }
    bf16_product(decoded, num_rows, num_blocks * kBlock, x, row_bytes, token, num_tokens, tile);
    return;
  }
  using Fn = void (*)(const uint8_t*, const uint8_t*, int, int64_t, const uint8_t*, int64_t, const int32_t*, float*);
  constexpr Fn by_count[kMostTokens] = {mxfp4_tokens<1>, mxfp4_tokens<2>, mxfp4_tokens<3>, mxfp4_tokens<4>};
  for (int t = 0, count; t < num_tokens; t += count) {
    count = num_tokens - t < kMostTokens ? num_tokens - t : kMostTokens;
    by_count[count - 1](blocks, scales, num_rows, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  }
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

const Bf16Table kAvx512Bf16 = {round_row, round_mxfp4_row, mxfp4_product, bf16_product, bf16_column_product};

}  // namespace harmonium
