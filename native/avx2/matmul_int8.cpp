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

void quantize_panel(const uint16_t* weight, int num_rows, int64_t num_inputs, uint8_t* panel) {
  const int64_t num_blocks = num_inputs / kBlock;
  auto* scales = reinterpret_cast<uint16_t*>(panel + num_blocks * kPanelBlockBytes);
  memset(scales, 0, panel_bytes(num_blocks) - num_blocks * kPanelBlockBytes);
  if (num_rows < kPanelRows) memset(panel, kInt8Offset, num_blocks * kPanelBlockBytes);
  for (int r = 0; r < num_rows; ++r) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      __m256 v[4];
      __m256i most4 = _mm256_setzero_si256();
      for (int i = 0; i < 4; ++i) {
        v[i] = expand_bf16(weight + r * num_inputs + b * kBlock + i * 8);
        most4 = _mm256_max_epu32(most4, _mm256_slli_epi32(_mm256_castps_si256(v[i]), 1));
      }
      const uint32_t most = reduce_max(most4) >> 1;
      // Rounded up to bf16, so that no quotient passes 127.
      const uint32_t up = most >= 0x7f800000u ? 0x7fc0u : (to_bits(from_bits(most) / 127.0f) + 0xffffu) >> 16;
      scales[b * kPanelRows + r] = static_cast<uint16_t>(up);
      const bool none = most == 0 || most >= 0x7f800000u;
      const __m256 scale = _mm256_set1_ps(none ? 1.0f : from_bits(up << 16));
      __m256i q[4];
      for (int i = 0; i < 4; ++i) {
        q[i] = none ? _mm256_setzero_si256() : _mm256_cvtps_epi32(_mm256_div_ps(v[i], scale));
      }
      alignas(32) uint32_t bytes[8];
      store(bytes, _mm256_xor_si256(split_even_odd(pack_bytes(q)), _mm256_set1_epi8(static_cast<char>(kInt8Offset))));
      uint8_t* out = panel + b * kPanelBlockBytes + r * 4;
      for (int part = 0; part < 8; ++part) memcpy(out + part * 64, bytes + part, 4);
    }
  }
}

void mxfp4_to_panels(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint8_t* panels) {
  const __m256i table = mxfp4_table();
  const __m128i nibble = _mm_set1_epi8(15);
  for (int p = 0; p < 2; ++p) {
    uint8_t* panel = panels + p * panel_bytes(num_blocks);
    auto* out = reinterpret_cast<uint16_t*>(panel + num_blocks * kPanelBlockBytes);
    const int rows = num_rows - p * kPanelRows < kPanelRows ? num_rows - p * kPanelRows : kPanelRows;
    if (rows < kPanelRows) {
      memset(panel, kMxfp4Offset, num_blocks * kPanelBlockBytes);
      memset(out, 0, panel_bytes(num_blocks) - num_blocks * kPanelBlockBytes);
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t first = (p * kPanelRows + r) * num_blocks;
      for (int64_t b = 0; b < num_blocks; ++b) {
        out[b * kPanelRows + r] = static_cast<uint16_t>(e8m0_bits(scales[first + b]) >> 16);
        const __m128i v = load128(blocks + (first + b) * 16);
        const __m256i index = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(v, 4), nibble), _mm_and_si128(v, nibble));
        alignas(32) uint32_t values[8];
        store(values, _mm256_shuffle_epi8(table, index));
        uint8_t* w = panel + b * kPanelBlockBytes + r * 4;
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
  const auto* scales = reinterpret_cast<const uint16_t*>(panel + num_blocks * kPanelBlockBytes);
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks);
  const uint8_t* row[NT];
  __m256 sum[NT][2];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    sum[t][0] = sum[t][1] = _mm256_setzero_ps();
  }
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    __m256i acc[NT][2];
    for (int t = 0; t < NT; ++t) acc[t][0] = acc[t][1] = _mm256_set1_epi32(dword(row[t] + start_at + b * 4));
    if (kSmall)
      add_small_block<NT>(panel + b * kPanelBlockBytes, row, at, acc);
    else
      add_block<NT>(panel + b * kPanelBlockBytes, row, at, acc);
    for (int h = 0; h < 2; ++h) {
      const __m256 ws = expand_bf16(scales + b * kPanelRows + h * 8);
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
                   int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  for (int p = 0; p < num_panels; ++p) {
    const uint8_t* panel = panels + p * panel_bytes(num_blocks);
    float* out = tile + p * kPanelRows;
    if (offset == kMxfp4Offset)
      panel_tiles<true>(panel, num_blocks, x, row_bytes, token, num_tokens, out);
    else
      panel_tiles<false>(panel, num_blocks, x, row_bytes, token, num_tokens, out);
  }
}

// One row: a register holds two blocks, four int32 lanes each. Unsigned values up to 24 do not saturate vpmaddubsw.
float mxfp4_dot(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, const uint8_t* row) {
  const __m256i table = mxfp4_table(), nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const auto* scale = reinterpret_cast<const float*>(row + scale_offset(num_blocks));
  const auto* start = reinterpret_cast<const int32_t*>(row + start_offset(num_blocks));
  __m256 sum = _mm256_setzero_ps();
  for (int64_t b = 0; b < num_blocks; b += 2) {
    const bool pair = b + 1 < num_blocks;
    const __m256i v = pair ? load(blocks + b * 16) : _mm256_zextsi128_si256(load128(blocks + b * 16));
    const __m256i lo = _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble));
    const __m256i hi = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
    const uint8_t* q = row + b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    const __m256i words = _mm256_add_epi16(_mm256_maddubs_epi16(lo, load(q)), _mm256_maddubs_epi16(hi, load(q + 64)));
    const __m256i first = _mm256_setr_epi32(start[b], 0, 0, 0, start[b + 1], 0, 0, 0);  // zero after the last block
    const __m256i acc = _mm256_add_epi32(_mm256_madd_epi16(words, ones), first);
    const float s0 = from_bits(e8m0_bits(scales[b])) * scale[b];
    const float s1 = pair ? from_bits(e8m0_bits(scales[b + 1])) * scale[b + 1] : 0.0f;
    const __m256 both = _mm256_set_m128(_mm_set1_ps(s1), _mm_set1_ps(s0));
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), both, sum);
  }
  return reduce(sum);
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  for (int r = 0; r < num_rows; ++r) {
    for (int t = 0; t < num_tokens; ++t) {
      tile[t * kTileRows + r] =
          mxfp4_dot(blocks + r * num_blocks * 16, scales + r * num_blocks, num_blocks, x + token[t] * row_bytes);
    }
  }
}

}  // namespace

const Int8Table kAvx2Int8 = {2, quantize_row, quantize_panel, mxfp4_to_panels, panel_product, mxfp4_product};

}  // namespace harmonium
