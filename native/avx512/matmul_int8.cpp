// Products with int8 activations, AVX-512 with VNNI and BF16. What each function does: matmul.h.
#include "avx512/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

void quantize_row(const float* x, int64_t num_inputs, int offset, float factor, uint8_t* row) {
  const int64_t num_blocks = num_inputs / kBlock;
  if (num_blocks % kGroupBlocks != 0) {
    memset(row + num_blocks / kGroupBlocks * kGroupBytes, 0, kGroupBytes);
    memset(row + scale_offset(num_blocks) + num_blocks * 4, 0,
           (num_groups(num_blocks) * kGroupBlocks - num_blocks) * 4);
    memset(row + start_offset(num_blocks) + num_blocks * 4, 0,
           (num_groups(num_blocks) * kGroupBlocks - num_blocks) * 4);
  }
  auto* scale = reinterpret_cast<float*>(row + scale_offset(num_blocks));
  auto* start = reinterpret_cast<int32_t*>(row + start_offset(num_blocks));
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t b = 0; b < num_blocks; ++b) {
    __m512 v0 = _mm512_loadu_ps(x + b * kBlock);
    __m512 v1 = _mm512_loadu_ps(x + b * kBlock + 16);
    const __m512i bits = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(v0), magnitude),
                                          _mm512_and_si512(_mm512_castps_si512(v1), magnitude));
    const auto most = static_cast<uint32_t>(_mm512_reduce_max_epi32(bits));
    float s = from_bits(most) / 127.0f;
    float inverse = 0;
    if (most >= 0x7f800000u || s < 1.17549435e-38f) {
      s = most >= 0x7f800000u ? from_bits(kNan) : 0.0f;
      v0 = v1 = _mm512_setzero_ps();
    } else {
      inverse = 1.0f / s;
    }
    const __m512 i = _mm512_set1_ps(inverse);
    const __m512 p0 = _mm512_mul_ps(v0, i), p1 = _mm512_mul_ps(v1, i);
    const __m512i even = _mm512_cvtps_epi32(_mm512_permutex2var_ps(p0, even_index(), p1));
    const __m512i odd = _mm512_cvtps_epi32(_mm512_permutex2var_ps(p0, odd_index(), p1));
    uint8_t* q = row + b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(even));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 64), _mm512_cvtepi32_epi8(odd));
    scale[b] = s * factor;
    start[b] = -offset * _mm512_reduce_add_epi32(_mm512_add_epi32(even, odd));
  }
}

void quantize_panel(const uint16_t* weight, int num_rows, int64_t num_inputs, uint8_t* panel) {
  const int64_t num_blocks = num_inputs / kBlock;
  auto* scales = reinterpret_cast<uint16_t*>(panel + num_blocks * kPanelBlockBytes);
  memset(scales, 0, panel_bytes(num_blocks) - num_blocks * kPanelBlockBytes);
  if (num_rows < kPanelRows) memset(panel, kInt8Offset, num_blocks * kPanelBlockBytes);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int r = 0; r < num_rows; ++r) {
    const uint16_t* w = weight + r * num_inputs;
    for (int64_t b = 0; b < num_blocks; ++b) {
      const __m512i pair = _mm512_loadu_si512(w + b * kBlock);
      __m512i even = _mm512_slli_epi32(pair, 16), odd = _mm512_and_si512(pair, high);
      const __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(even, 1), _mm512_slli_epi32(odd, 1));
      const uint32_t most = _mm512_reduce_max_epu32(bits) >> 1;
      // Rounded up to bf16, so that no quotient passes 127.
      const uint32_t up = most >= 0x7f800000u ? 0x7fc0u : (to_bits(from_bits(most) / 127.0f) + 0xffffu) >> 16;
      scales[b * kPanelRows + r] = static_cast<uint16_t>(up);
      if (most >= 0x7f800000u) even = odd = _mm512_setzero_si512();
      const __m512 scale = _mm512_set1_ps(most == 0 ? 1.0f : from_bits(up << 16));
      const __m512i offset = _mm512_set1_epi32(kInt8Offset);
      alignas(32) uint32_t q[8];
      _mm_store_si128(reinterpret_cast<__m128i*>(q),
                      _mm512_cvtepi32_epi8(_mm512_add_epi32(
                          offset, _mm512_cvtps_epi32(_mm512_div_ps(_mm512_castsi512_ps(even), scale)))));
      _mm_store_si128(reinterpret_cast<__m128i*>(q + 4),
                      _mm512_cvtepi32_epi8(_mm512_add_epi32(
                          offset, _mm512_cvtps_epi32(_mm512_div_ps(_mm512_castsi512_ps(odd), scale)))));
      uint8_t* out = panel + b * kPanelBlockBytes + r * 4;
      for (int part = 0; part < 8; ++part) memcpy(out + part * 64, q + part, 4);
    }
  }
}

// 16 bytes of each of 16 rows, `stride` apart, as four registers: lane r of register g holds bytes 4g..4g+3 of row r.
inline __attribute__((always_inline)) void transpose(const __m128i row[16], __m512i out[4]) {
  __m512i v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row[i]), row[i + 4], 1);
    v[i] = _mm512_inserti32x4(v[i], row[i + 8], 2);
    v[i] = _mm512_inserti32x4(v[i], row[i + 12], 3);
  }
  const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
  const __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
  out[0] = _mm512_unpacklo_epi64(a, b);
  out[1] = _mm512_unpackhi_epi64(a, b);
  out[2] = _mm512_unpacklo_epi64(c, d);
  out[3] = _mm512_unpackhi_epi64(c, d);
}

inline __attribute__((always_inline)) void transpose_block(const uint8_t* block, int64_t stride, __m512i out[4]) {
  __m128i row[16];
  for (int r = 0; r < 16; ++r) row[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + r * stride));
  transpose(row, out);
}

// Scales of `count` blocks (at most 16) of 16 rows: byte i of lane r of register g belongs to block 4g + i of row r.
inline __attribute__((always_inline)) void transpose_scales(const uint8_t* scales, int64_t stride, int64_t count,
                                                            __m512i out[4]) {
  const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
  __m128i row[16];
  for (int r = 0; r < 16; ++r) row[r] = _mm_maskz_loadu_epi8(mask, scales + r * stride);
  transpose(row, out);
}

// The same place of the next 16 rows, one line of each, into L2: sixteen streams are more than the hardware follows.
inline __attribute__((always_inline)) void prefetch_next_rows(const uint8_t* block, int64_t stride) {
  for (int r = 16; r < 32; ++r) _mm_prefetch(reinterpret_cast<const char*>(block + r * stride), _MM_HINT_T1);
}

// Scales of the block whose bytes are byte i of v.
inline __attribute__((always_inline)) __m512 scale_of(__m512i v, int i) {
  const __m512i exponent = _mm512_rolv_epi32(v, _mm512_set1_epi32((23 - 8 * i) & 31));
  return finish_e8m0(_mm512_and_si512(exponent, _mm512_set1_epi32(0x7f800000)));
}

// Not inlined: on a short panel GCC would see prefetches past the end of its copy and warn.
__attribute__((noinline)) void mxfp4_to_panel(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks,
                                              uint8_t* panel) {
  const __m512i table = mxfp4_table(), nibble = _mm512_set1_epi8(15);
  auto* out = reinterpret_cast<uint16_t*>(panel + num_blocks * kPanelBlockBytes);
  for (int64_t chunk = 0; chunk < num_blocks; chunk += 16) {
    __m512i exponent[4];
    transpose_scales(scales + chunk, num_blocks, num_blocks - chunk, exponent);
    for (int i = 0; i < 16 && chunk + i < num_blocks; ++i) {
      const int64_t b = chunk + i;
      if (i % kGroupBlocks == 0) prefetch_next_rows(blocks + b * 16, num_blocks * 16);
      __m512i v[4];
      transpose_block(blocks + b * 16, num_blocks * 16, v);
      uint8_t* w = panel + b * kPanelBlockBytes;
      for (int g = 0; g < 4; ++g) {
        _mm512_storeu_si512(w + g * 64, _mm512_shuffle_epi8(table, _mm512_and_si512(v[g], nibble)));
        _mm512_storeu_si512(w + 256 + g * 64,
                            _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v[g], 4), nibble)));
      }
      const __m512i bits = _mm512_castps_si512(scale_of(exponent[i / 4], i % 4));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + b * kPanelRows),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
  }
}

// A panel with rows missing: the last one of a weight. Rows that are not there are zeros.
void mxfp4_to_short_panel(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks,
                          uint8_t* panel) {
  for (int64_t b = 0; b < num_blocks; ++b) {
    alignas(64) uint8_t copy[kPanelRows * 16] = {};
    alignas(64) uint8_t e[kPanelRows] = {};
    for (int r = 0; r < num_rows; ++r) {
      memcpy(copy + r * 16, blocks + (r * num_blocks + b) * 16, 16);
      e[r] = scales[r * num_blocks + b];
    }
    alignas(64) uint8_t one[kPanelBlockBytes + 64];  // a panel of one block
    mxfp4_to_panel(copy, e, 1, one);
    memcpy(panel + b * kPanelBlockBytes, one, kPanelBlockBytes);
    memcpy(panel + num_blocks * kPanelBlockBytes + b * kPanelRows * 2, one + kPanelBlockBytes, kPanelRows * 2);
  }
}

void mxfp4_to_panels(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint8_t* panels) {
  for (int p = 0; p < 2; ++p) {
    const int64_t first = p * kPanelRows * num_blocks;
    const int rows = num_rows - p * kPanelRows;
    uint8_t* panel = panels + p * panel_bytes(num_blocks);
    if (rows >= kPanelRows)
      mxfp4_to_panel(blocks + first * 16, scales + first, num_blocks, panel);
    else
      mxfp4_to_short_panel(blocks + first * 16, scales + first, rows < 0 ? 0 : rows, num_blocks, panel);
  }
}

// Tokens by panels. 32 registers: NT * NP integer and as many float sums, NP weights, one or two broadcasts, NP
// scales; 4 by 2 and 8 by 1 fit, more spills.
template <int NT, int NP>
void panel_tile(const uint8_t* panels, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                float* tile) {
  const uint8_t* row[NT];
  __m512 sum[NT][NP];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    for (int p = 0; p < NP; ++p) sum[t][p] = _mm512_setzero_ps();
  }
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks);
  const int64_t stride = panel_bytes(num_blocks);
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    const uint8_t* w = panels + b * kPanelBlockBytes;
    __m512i acc[NT][NP];
    for (int t = 0; t < NT; ++t) {
      for (int p = 0; p < NP; ++p) acc[t][p] = _mm512_set1_epi32(dword(row[t] + start_at + b * 4));
    }
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
      __m512i v[NP];
      for (int p = 0; p < NP; ++p) v[p] = _mm512_loadu_si512(w + p * stride + part * 64);
      for (int t = 0; t < NT; ++t) {
        const __m512i a = _mm512_set1_epi32(dword(row[t] + at + part / 4 * 64 + part % 4 * 4));
        for (int p = 0; p < NP; ++p) acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], v[p], a);
      }
    }
    for (int p = 0; p < NP; ++p) {
      const __m512 scale = expand_bf16(_mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(panels + p * stride + num_blocks * kPanelBlockBytes + b * kPanelRows * 2)));
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
void panel_tiles(const uint8_t* panels, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                 int num_tokens, float* tile) {
  int t = 0;
  for (; t + 4 <= num_tokens; t += 4)
    panel_tile<4, NP>(panels, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  if (num_tokens - t == 3) panel_tile<3, NP>(panels, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  if (num_tokens - t == 2) panel_tile<2, NP>(panels, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  if (num_tokens - t == 1) panel_tile<1, NP>(panels, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
}

void panel_product(const uint8_t* panels, int num_panels, int64_t num_blocks, int, const uint8_t* x, int64_t row_bytes,
                   const int32_t* token, int num_tokens, float* tile) {
  if (num_panels == 2)
    panel_tiles<2>(panels, num_blocks, x, row_bytes, token, num_tokens, tile);
  else
    panel_tiles<1>(panels, num_blocks, x, row_bytes, token, num_tokens, tile);
}

// 16 rows by NT tokens without a panel: weights are decoded in registers and used for all tokens at once.
template <int NT>
void mxfp4_sixteen(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, float* tile) {
  const __m512i table = mxfp4_table(), nibble = _mm512_set1_epi8(15);
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks), stride = num_blocks * 16;
  const uint8_t* row[NT];
  __m512 sum[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    sum[t] = _mm512_setzero_ps();
  }
  for (int64_t chunk = 0; chunk < num_blocks; chunk += 16) {
    __m512i exponent[4];
    transpose_scales(scales + chunk, num_blocks, num_blocks - chunk, exponent);
    for (int i = 0; i < 16 && chunk + i < num_blocks; ++i) {
      const int64_t b = chunk + i, at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
      if (i % kGroupBlocks == 0) prefetch_next_rows(blocks + b * 16, stride);
      __m512i v[4], acc[NT];
      transpose_block(blocks + b * 16, stride, v);
      for (int t = 0; t < NT; ++t) acc[t] = _mm512_set1_epi32(dword(row[t] + start_at + b * 4));
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        const __m512i lo = _mm512_shuffle_epi8(table, _mm512_and_si512(v[g], nibble));
        const __m512i hi = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v[g], 4), nibble));
        for (int t = 0; t < NT; ++t) {
          acc[t] = _mm512_dpbusd_epi32(acc[t], lo, _mm512_set1_epi32(dword(row[t] + at + g * 4)));
          acc[t] = _mm512_dpbusd_epi32(acc[t], hi, _mm512_set1_epi32(dword(row[t] + at + 64 + g * 4)));
        }
      }
      const __m512 scale = scale_of(exponent[i / 4], i % 4);
      for (int t = 0; t < NT; ++t) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(from_bits(dword(row[t] + scale_at + b * 4))));
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t]), both, sum[t]);
      }
    }
  }
  for (int t = 0; t < NT; ++t) _mm512_storeu_ps(tile + t * kTileRows, sum[t]);
}

// NT is a template argument so that the sums stay in registers.
void mxfp4_sixteen_rows(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, const uint8_t* x,
                        int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  for (int t = 0; t < num_tokens; t += 8, token += 8, tile += 8 * kTileRows) {
    switch (num_tokens - t) {
      case 1:
        mxfp4_sixteen<1>(blocks, scales, num_blocks, x, row_bytes, token, tile);
        break;
      case 2:
        mxfp4_sixteen<2>(blocks, scales, num_blocks, x, row_bytes, token, tile);
        break;
      case 3:
        mxfp4_sixteen<3>(blocks, scales, num_blocks, x, row_bytes, token, tile);
        break;
      case 4:
        mxfp4_sixteen<4>(blocks, scales, num_blocks, x, row_bytes, token, tile);
        break;
      case 5:
        mxfp4_sixteen<5>(blocks, scales, num_blocks, x, row_bytes, token, tile);
        break;
      case 6:
        mxfp4_sixteen<6>(blocks, scales, num_blocks, x, row_bytes, token, tile);
        break;
      case 7:
        mxfp4_sixteen<7>(blocks, scales, num_blocks, x, row_bytes, token, tile);
        break;
      default:
        mxfp4_sixteen<8>(blocks, scales, num_blocks, x, row_bytes, token, tile);
        break;
    }
  }
}

// NR rows by NT tokens, four blocks of 32 inputs at a time: lane 4i + j of the sums holds block i.
template <int NT, int NR>
struct Mxfp4Tile {
  const uint8_t* blocks;
  const uint8_t* scales;
  int64_t num_blocks;
  const uint8_t* row[NT];
  int64_t scale_at, start_at;
  __m512 sum[NT][NR];

  // `count` blocks of group g; the constants are passed so that they stay in registers.
  template <bool kWhole>
  inline __attribute__((always_inline)) void add(int64_t g, int count, __m512i table, __m512i nibble, __m512i lane,
                                                 __m512i byte) {
    __m512i even[NT], odd[NT], start[NT];
    __m512 scale[NT];
    for (int t = 0; t < NT; ++t) {
      even[t] = _mm512_loadu_si512(row[t] + g * kGroupBytes);
      odd[t] = _mm512_loadu_si512(row[t] + g * kGroupBytes + 64);
      const __m128i s = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[t] + scale_at + g * 16));
      scale[t] = _mm512_castsi512_ps(_mm512_permutexvar_epi32(lane, _mm512_castsi128_si512(s)));
      const __m128i n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[t] + start_at + g * 16));
      start[t] = _mm512_maskz_permutexvar_epi32(0x1111, lane, _mm512_castsi128_si512(n));
    }
    for (int r = 0; r < NR; ++r) {
      const uint8_t* w = blocks + (r * num_blocks + g * kGroupBlocks) * 16;
      const uint8_t* e = scales + r * num_blocks + g * kGroupBlocks;
      __m512i v;
      uint32_t four = 0;
      if (kWhole) {
        // The same place NR rows on: a whole line of each row, once.
        _mm_prefetch(reinterpret_cast<const char*>(w + NR * num_blocks * 16), _MM_HINT_T0);
        v = _mm512_loadu_si512(w);
        memcpy(&four, e, 4);
      } else {
        v = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1 << count * 4) - 1), w);
        for (int i = 0; i < count; ++i) four |= static_cast<uint32_t>(e[i]) << i * 8;
      }
      const __m512i lo = _mm512_shuffle_epi8(table, _mm512_and_si512(v, nibble));
      const __m512i hi = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble));
      const __m512i exponent = _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(four)), byte);
      const __m512 ws = finish_e8m0(_mm512_slli_epi32(exponent, 7));
      for (int t = 0; t < NT; ++t) {
        const __m512i acc = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start[t], lo, even[t]), hi, odd[t]);
        sum[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_mul_ps(ws, scale[t]), sum[t][r]);
      }
    }
  }

  inline __attribute__((always_inline)) void run(float* tile) {
    const __m512i table = mxfp4_table(), nibble = _mm512_set1_epi8(15);
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    // Byte i of a dword to the third byte (so << 7 makes it an exponent) of each dword of 128-bit lane i.
    const __m512i byte = _mm512_or_si512(_mm512_slli_epi32(lane, 16), _mm512_set1_epi32(static_cast<int>(0x80008080u)));
    for (int t = 0; t < NT; ++t) {
      for (int r = 0; r < NR; ++r) sum[t][r] = _mm512_setzero_ps();
    }
    const int64_t whole = num_blocks / kGroupBlocks;
    for (int64_t g = 0; g < whole; ++g) add<true>(g, kGroupBlocks, table, nibble, lane, byte);
    const int rest = static_cast<int>(num_blocks % kGroupBlocks);
    if (rest != 0) add<false>(whole, rest, table, nibble, lane, byte);
    for (int t = 0; t < NT; ++t) {
      for (int r = 0; r < NR; ++r) tile[t * kTileRows + r] = _mm512_reduce_add_ps(sum[t][r]);
    }
  }
};

template <int NT, int NR>
void mxfp4_rows(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, const uint8_t* x, int64_t row_bytes,
                const int32_t* token, float* tile) {
  Mxfp4Tile<NT, NR> work;
  work.blocks = blocks;
  work.scales = scales;
  work.num_blocks = num_blocks;
  work.scale_at = scale_offset(num_blocks);
  work.start_at = start_offset(num_blocks);
  for (int t = 0; t < NT; ++t) work.row[t] = x + token[t] * row_bytes;
  work.run(tile);
}

template <int NR>
void mxfp4_tokens(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, const uint8_t* x, int64_t row_bytes,
                  const int32_t* token, int num_tokens, float* tile) {
  int t = 0;
  for (; t + 2 <= num_tokens; t += 2) {
    mxfp4_rows<2, NR>(blocks, scales, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  }
  if (t < num_tokens) mxfp4_rows<1, NR>(blocks, scales, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  int r = 0;
  if (num_tokens > 1) {
    for (; r + kPanelRows <= num_rows; r += kPanelRows) {
      mxfp4_sixteen_rows(blocks + r * num_blocks * 16, scales + r * num_blocks, num_blocks, x, row_bytes, token,
                         num_tokens, tile + r);
    }
  }
  // Four rows, then all tokens: the rows (6 kB) stay in L1, so memory is read once.
  for (; r + 4 <= num_rows; r += 4) {
    mxfp4_tokens<4>(blocks + r * num_blocks * 16, scales + r * num_blocks, num_blocks, x, row_bytes, token, num_tokens,
                    tile + r);
  }
  for (; r < num_rows; ++r) {
    mxfp4_tokens<1>(blocks + r * num_blocks * 16, scales + r * num_blocks, num_blocks, x, row_bytes, token, num_tokens,
                    tile + r);
  }
}

}  // namespace

const Int8Table kAvx512Int8 = {9, quantize_row, quantize_panel, mxfp4_to_panels, panel_product, mxfp4_product};

}  // namespace harmonium
