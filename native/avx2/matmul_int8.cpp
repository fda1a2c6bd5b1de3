// Products with int8 activations, AVX2 and FMA. What each function does: matmul.h.
#include "avx2/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

// 32 int32 in four registers, in order, to bytes in order.
__m256i pack_bytes(const __m256i v[4]) {
  const __m256i b = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  return _mm256_permutevar8x32_epi32(b, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Bytes in order to [16 even][16 odd].
__m256i split_even_odd(__m256i bytes) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, order), 0xd8);
}

void quantize_row(const float* x, int64_t num_inputs, int offset, float factor, uint8_t* row) {
  const int64_t num_blocks = num_inputs / kBlock;
  auto* scale = reinterpret_cast<float*>(row + scale_offset(num_blocks));
  auto* start = reinterpret_cast<int32_t*>(row + start_offset(num_blocks));
  if (num_blocks % kGroupBlocks != 0) {
    const int64_t padding = num_groups(num_blocks) * kGroupBlocks - num_blocks;
    memset(row + num_blocks / kGroupBlocks * kGroupBytes, 0, kGroupBytes);
    memset(scale + num_blocks, 0, padding * 4);
    memset(start + num_blocks, 0, padding * 4);
  }
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int64_t b = 0; b < num_blocks; ++b) {
    __m256i most4 = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      most4 = _mm256_max_epu32(most4, _mm256_and_si256(load(x + b * kBlock + i * 8), magnitude));
    }
    const uint32_t most = reduce_max(most4);
    const float s = from_bits(most) / 127.0f;
    uint8_t* q = row + b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    if (most >= 0x7f800000u || s < 1.17549435e-38f) {
      scale[b] = most >= 0x7f800000u ? from_bits(kNan) : 0.0f;
      start[b] = 0;
      memset(q, 0, 16);
      memset(q + 64, 0, 16);
      continue;
    }
    const __m256 inverse = _mm256_set1_ps(1.0f / s);
    __m256i v[4], total = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + b * kBlock + i * 8), inverse));
      total = _mm256_add_epi32(total, v[i]);
    }
    const __m256i bytes = split_even_odd(pack_bytes(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 64), _mm256_extracti128_si256(bytes, 1));
    scale[b] = s * factor;
    start[b] = -offset * reduce_add(total);
  }
}

void quantize_panel(const uint16_t* weight, int num_rows, int64_t num_inputs, float most_q, uint8_t* panel) {
  const int64_t num_blocks = num_inputs / kBlock;
  clear_partner(panel, num_blocks);
  if (num_rows < kPanelRows) {
    for (int64_t b = 0; b < num_blocks; ++b) clear_block(panel, b, kInt8Offset);
  }
  for (int r = 0; r < num_rows; ++r) {
    BlockPlace place;
    for (int64_t b = 0; b < num_blocks; ++b, place.go_on()) {
      __m256 v[4];
      __m256i most4 = _mm256_setzero_si256();
      for (int i = 0; i < 4; ++i) {
        v[i] = expand_bf16(weight + r * num_inputs + b * kBlock + i * 8);
        most4 = _mm256_max_epu32(most4, _mm256_slli_epi32(_mm256_castps_si256(v[i]), 1));
      }
      const uint32_t most = reduce_max(most4) >> 1;
      // Rounded up to bf16, so that no quotient passes most_q.
      const uint32_t up = most >= 0x7f800000u ? 0x7fc0u : (to_bits(from_bits(most) / most_q) + 0xffffu) >> 16;
      reinterpret_cast<uint16_t*>(panel + place.scales)[r] = static_cast<uint16_t>(up);
      const bool none = most == 0 || most >= 0x7f800000u;
      const __m256 scale = _mm256_set1_ps(none ? 1.0f : from_bits(up << 16));
      __m256i q[4];
      for (int i = 0; i < 4; ++i) {
        q[i] = none ? _mm256_setzero_si256() : _mm256_cvtps_epi32(_mm256_div_ps(v[i], scale));
      }
      alignas(32) uint32_t bytes[8];
      store(bytes, _mm256_xor_si256(split_even_odd(pack_bytes(q)), _mm256_set1_epi8(static_cast<char>(kInt8Offset))));
      uint8_t* out = panel + place.weights + r * 4;
      for (int part = 0; part < 8; ++part) memcpy(out + part * 64, bytes + part, 4);
    }
  }
}

void mxfp4_to_panels(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint8_t* panels) {
  const __m256i table = mxfp4_table();
  const __m128i nibble = _mm_set1_epi8(15);
  for (int p = 0; p < 2; ++p) {
    uint8_t* panel = panels + p * panel_bytes(num_blocks);
    const int rows = num_rows - p * kPanelRows < kPanelRows ? num_rows - p * kPanelRows : kPanelRows;
    if (rows < kPanelRows) {
      for (int64_t b = 0; b < num_blocks; ++b) clear_block(panel, b, kMxfp4Offset);
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t first = (p * kPanelRows + r) * num_blocks;
      BlockPlace place;
      for (int64_t b = 0; b < num_blocks; ++b, place.go_on()) {
        reinterpret_cast<uint16_t*>(panel + place.scales)[r] = static_cast<uint16_t>(e8m0_bits(scales[first + b]) >> 16);
        const __m128i v = load128(blocks + (first + b) * 16);
        const __m256i index = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(v, 4), nibble), _mm_and_si128(v, nibble));
        alignas(32) uint32_t values[8];
        store(values, _mm256_shuffle_epi8(table, index));
        uint8_t* w = panel + place.weights + r * 4;
        for (int part = 0; part < 8; ++part) memcpy(w + part * 64, values + part, 4);
      }
    }
  }
}

// Adds one block's products of NT tokens to acc; any weights. `at`: where the block's activations lie in a row.
template <int NT>
inline __attribute__((always_inline)) void add_block(const uint8_t* weights, const uint8_t* const* row, int64_t at,
                                                     __m256i acc[NT][2]) {
  const __m256i low_byte = _mm256_set1_epi16(0xff);
  for (int part = 0; part < 8; ++part) {
    __m256i a0[NT], a1[NT];  // bytes 0 and 2 (1 and 3) of four activations, as words
    for (int t = 0; t < NT; ++t) {
      const __m256i a = _mm256_set1_epi32(dword(row[t] + at + part / 4 * 64 + part % 4 * 4));
      a0[t] = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8);
      a1[t] = _mm256_srai_epi16(a, 8);
    }
    for (int h = 0; h < 2; ++h) {
      const __m256i w = load(weights + part * 64 + h * 32);
      const __m256i w0 = _mm256_and_si256(w, low_byte), w1 = _mm256_srli_epi16(w, 8);
      for (int t = 0; t < NT; ++t) {
        acc[t][h] = _mm256_add_epi32(acc[t][h], _mm256_madd_epi16(w0, a0[t]));
        acc[t][h] = _mm256_add_epi32(acc[t][h], _mm256_madd_epi16(w1, a1[t]));
      }
    }
  }
}

// The same for weights of at most 24: a pair of products is at most 6,096, so four pairs fit 16 bits.
template <int NT>
inline __attribute__((always_inline)) void add_small_block(const uint8_t* weights, const uint8_t* const* row,
                                                           int64_t at, __m256i acc[NT][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; ++half) {
    __m256i words[NT][2];
    for (int t = 0; t < NT; ++t) words[t][0] = words[t][1] = _mm256_setzero_si256();
    for (int part = 0; part < 4; ++part) {
      const __m256i w0 = load(weights + half * 256 + part * 64), w1 = load(weights + half * 256 + part * 64 + 32);
      for (int t = 0; t < NT; ++t) {
        const __m256i a = _mm256_set1_epi32(dword(row[t] + at + half * 64 + part * 4));
        words[t][0] = _mm256_add_epi16(words[t][0], _mm256_maddubs_epi16(w0, a));
        words[t][1] = _mm256_add_epi16(words[t][1], _mm256_maddubs_epi16(w1, a));
      }
    }
    for (int t = 0; t < NT; ++t) {
      for (int h = 0; h < 2; ++h) acc[t][h] = _mm256_add_epi32(acc[t][h], _mm256_madd_epi16(words[t][h], ones));
    }
  }
}

// NT tokens by one panel. 16 registers: more than two tokens spill.
template <int NT, bool kSmall>
void panel_tile(const uint8_t* panel, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                float* tile) {
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks);
  const uint8_t* row[NT];
  __m256 sum[NT][2];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    sum[t][0] = sum[t][1] = _mm256_setzero_ps();
  }
  BlockPlace place;
  for (int64_t b = 0; b < num_blocks; ++b, place.go_on()) {
    const int64_t at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    __m256i acc[NT][2];
    for (int t = 0; t < NT; ++t) acc[t][0] = acc[t][1] = _mm256_set1_epi32(dword(row[t] + start_at + b * 4));
    if (kSmall)
      add_small_block<NT>(panel + place.weights, row, at, acc);
    else
      add_block<NT>(panel + place.weights, row, at, acc);
    for (int h = 0; h < 2; ++h) {
      const __m256 ws = expand_bf16(reinterpret_cast<const uint16_t*>(panel + place.scales) + h * 8);
      for (int t = 0; t < NT; ++t) {
        const __m256 both = _mm256_mul_ps(ws, _mm256_set1_ps(from_bits(dword(row[t] + scale_at + b * 4))));
        sum[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[t][h]), both, sum[t][h]);
      }
    }
  }
  for (int t = 0; t < NT; ++t) {
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(tile + t * kTileRows + h * 8, sum[t][h]);
  }
}

template <bool kSmall>
void panel_tiles(const uint8_t* panel, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                 int num_tokens, float* tile) {
  int t = 0;
  for (; t + 2 <= num_tokens; t += 2) {
    panel_tile<2, kSmall>(panel, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  }
  if (t < num_tokens) panel_tile<1, kSmall>(panel, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
}

void panel_product(const uint8_t* panels, int num_panels, int64_t num_blocks, int offset, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, Next, float* tile) {
  for (int p = 0; p < num_panels; ++p) {
    const uint8_t* panel = panels + p * panel_bytes(num_blocks);
    float* out = tile + p * kPanelRows;
    if (offset == kMxfp4Offset)
      panel_tiles<true>(panel, num_blocks, x, row_bytes, token, num_tokens, out);
    else
      panel_tiles<false>(panel, num_blocks, x, row_bytes, token, num_tokens, out);
  }
}

// Eight rows of a weight, `stride` bytes apart. Of the last rows there may be fewer: the last one then stands for those
// that are missing, and what comes of them is never looked at.
template <bool kWhole>
inline __attribute__((always_inline)) int64_t row_at(int r, int num_rows, int64_t stride) {
  return (kWhole || r < num_rows ? r : num_rows - 1) * stride;
}

// 16 bytes of each of eight rows as four registers: lane r of register g holds bytes 4g..4g+3 of row r.
inline __attribute__((always_inline)) void transpose(const __m128i row[8], __m256i out[4]) {
  __m256i v[4];
  for (int i = 0; i < 4; ++i) v[i] = _mm256_set_m128i(row[i + 4], row[i]);
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  out[0] = _mm256_unpacklo_epi64(a, b);
  out[1] = _mm256_unpackhi_epi64(a, b);
  out[2] = _mm256_unpacklo_epi64(c, d);
  out[3] = _mm256_unpackhi_epi64(c, d);
}

// Scales of `count` blocks (at most 16): byte i of lane r of register g belongs to block 4g + i of row r.
template <bool kWhole>
void transpose_scales(const uint8_t* scales, int num_rows, int64_t stride, int64_t count, __m256i out[4]) {
  alignas(16) uint8_t copy[8][16] = {};
  __m128i row[8];
  for (int r = 0; r < 8; ++r) {
    const uint8_t* from = scales + row_at<kWhole>(r, num_rows, stride);
    if (count < 16) memcpy(copy[r], from, count);  // not past the end of the weight
    row[r] = load128(count < 16 ? copy[r] : from);
  }
  transpose(row, out);
}

// Scales of the block whose bytes are byte i of v.
inline __attribute__((always_inline)) __m256 scale_of(__m256i v, int i) {
  const __m256i infinity = _mm256_set1_epi32(0x7f800000), half = _mm256_set1_epi32(0x00400000);
  const __m256i top = _mm256_sllv_epi32(v, _mm256_set1_epi32(24 - 8 * i));
  const __m256i bits = _mm256_and_si256(_mm256_srli_epi32(top, 1), infinity);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(bits, infinity), half);
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_max_epu32(bits, half), nan));
}

// Eight rows by NT tokens: weights are decoded in registers and used for all tokens at once. Sums have the same order
// as those of a panel, so a token's result does not depend on which of the two computes it.
template <int NT, bool kWhole>
void mxfp4_eight(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                 int64_t row_bytes, const int32_t* token, float* tile) {
  const __m256i table = mxfp4_table(), nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks), stride = num_blocks * 16;
  const uint8_t* row[NT];
  __m256 sum[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    sum[t] = _mm256_setzero_ps();
  }
  for (int64_t chunk = 0; chunk < num_blocks; chunk += 16) {
    __m256i exponent[4];
    transpose_scales<kWhole>(scales + chunk, num_rows, num_blocks, num_blocks - chunk, exponent);
    for (int i = 0; i < 16 && chunk + i < num_blocks; ++i) {
      const int64_t b = chunk + i, at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
      __m128i bytes[8];
      for (int r = 0; r < 8; ++r) {
        const uint8_t* from = blocks + b * 16 + row_at<kWhole>(r, num_rows, stride);
        // The same place of the next eight rows, a line of each.
        if (kWhole && i % kGroupBlocks == 0)
          _mm_prefetch(reinterpret_cast<const char*>(from + 8 * stride), _MM_HINT_T0);
        bytes[r] = load128(from);
      }
      __m256i v[4], even[NT], odd[NT];
      transpose(bytes, v);
      for (int t = 0; t < NT; ++t) even[t] = odd[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        const __m256i lo = _mm256_shuffle_epi8(table, _mm256_and_si256(v[g], nibble));
        const __m256i hi = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v[g], 4), nibble));
        for (int t = 0; t < NT; ++t) {
          const __m256i a0 = _mm256_set1_epi32(dword(row[t] + at + g * 4));
          const __m256i a1 = _mm256_set1_epi32(dword(row[t] + at + 64 + g * 4));
          even[t] = _mm256_add_epi16(even[t], _mm256_maddubs_epi16(lo, a0));
          odd[t] = _mm256_add_epi16(odd[t], _mm256_maddubs_epi16(hi, a1));
        }
      }
      const __m256 scale = scale_of(exponent[i / 4], i % 4);
      for (int t = 0; t < NT; ++t) {
        __m256i acc = _mm256_set1_epi32(dword(row[t] + start_at + b * 4));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even[t], ones));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(odd[t], ones));
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(from_bits(dword(row[t] + scale_at + b * 4))));
        sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), both, sum[t]);
      }
    }
  }
  for (int t = 0; t < NT; ++t) _mm256_storeu_ps(tile + t * kTileRows, sum[t]);
}

template <bool kWhole>
void mxfp4_tokens(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                  int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  int t = 0;
  for (; t + 2 <= num_tokens; t += 2) {
    mxfp4_eight<2, kWhole>(blocks, scales, num_rows, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  }
  if (t < num_tokens) {
    mxfp4_eight<1, kWhole>(blocks, scales, num_rows, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  }
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  for (int r = 0; r < num_rows; r += 8) {
    const uint8_t* b = blocks + r * num_blocks * 16;
    const uint8_t* s = scales + r * num_blocks;
    const int left = num_rows - r;
    if (left >= 8)
      mxfp4_tokens<true>(b, s, left, num_blocks, x, row_bytes, token, num_tokens, tile + r);
    else
      mxfp4_tokens<false>(b, s, left, num_blocks, x, row_bytes, token, num_tokens, tile + r);
  }
}

}  // namespace

const Int8Table kAvx2Int8 = {12, quantize_row, quantize_panel, mxfp4_to_panels, panel_product, mxfp4_product};

}  // namespace harmonium
