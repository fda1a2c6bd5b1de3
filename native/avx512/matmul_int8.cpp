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

void quantize_panel(const uint16_t* weight, int num_rows, int64_t num_inputs, float most_q, uint8_t* panel) {
  const int64_t num_blocks = num_inputs / kBlock;
  clear_partner(panel, num_blocks);
  if (num_rows < kPanelRows) {
    for (int64_t b = 0; b < num_blocks; ++b) clear_block(panel, b, kInt8Offset);
  }
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int r = 0; r < num_rows; ++r) {
    const uint16_t* w = weight + r * num_inputs;
    BlockPlace place;
    for (int64_t b = 0; b < num_blocks; ++b, place.go_on()) {
      const __m512i pair = _mm512_loadu_si512(w + b * kBlock);
      __m512i even = _mm512_slli_epi32(pair, 16), odd = _mm512_and_si512(pair, high);
      const __m512i bits = _mm512_max_epu32(_mm512_slli_epi32(even, 1), _mm512_slli_epi32(odd, 1));
      const uint32_t most = _mm512_reduce_max_epu32(bits) >> 1;
      // Rounded up to bf16, so that no quotient passes most_q.
      const uint32_t up = most >= 0x7f800000u ? 0x7fc0u : (to_bits(from_bits(most) / most_q) + 0xffffu) >> 16;
      reinterpret_cast<uint16_t*>(panel + place.scales)[r] = static_cast<uint16_t>(up);
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
      uint8_t* out = panel + place.weights + r * 4;
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

// Sixteen rows of a weight, `stride` bytes apart. Of the last rows of a weight there may be fewer: the last one then
// stands for those that are missing, and what comes of them is never looked at.
template <bool kWhole>
inline __attribute__((always_inline)) int64_t row_at(int r, int num_rows, int64_t stride) {
  return (kWhole || r < num_rows ? r : num_rows - 1) * stride;
}

template <bool kWhole>
inline __attribute__((always_inline)) void transpose_block(const uint8_t* block, int num_rows, int64_t stride,
                                                           __m512i out[4]) {
  __m128i row[16];
  for (int r = 0; r < 16; ++r) {
    row[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + row_at<kWhole>(r, num_rows, stride)));
  }
  transpose(row, out);
}

// Scales of `count` blocks (at most 16): byte i of lane r of register g belongs to block 4g + i of row r.
template <bool kWhole>
inline __attribute__((always_inline)) void transpose_scales(const uint8_t* scales, int num_rows, int64_t stride,
                                                            int64_t count, __m512i out[4]) {
  const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
  __m128i row[16];
  for (int r = 0; r < 16; ++r) row[r] = _mm_maskz_loadu_epi8(mask, scales + row_at<kWhole>(r, num_rows, stride));
  transpose(row, out);
}

// The same place of the next 16 rows, one line of each, into L2: sixteen streams are more than the hardware follows.
inline __attribute__((always_inline)) void prefetch_next_rows(const uint8_t* block, int64_t stride) {
  for (int r = 16; r < 32; ++r) _mm_prefetch(reinterpret_cast<const char*>(block + r * stride), _MM_HINT_T1);
}

// And their scales, which lie together. Whatever is fetched is a hint: an address past the end of a weight does no
// harm.
inline __attribute__((always_inline)) void prefetch_next_scales(const uint8_t* scales, int64_t num_blocks) {
  for (int64_t i = 0; i < 16 * num_blocks; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(scales + 16 * num_blocks + i), _MM_HINT_T1);
  }
}

// Scales of the block whose bytes are byte i of v.
inline __attribute__((always_inline)) __m512 scale_of(__m512i v, int i) {
  const __m512i exponent = _mm512_rolv_epi32(v, _mm512_set1_epi32((23 - 8 * i) & 31));
  return finish_e8m0(_mm512_and_si512(exponent, _mm512_set1_epi32(0x7f800000)));
}

template <bool kWhole>
void mxfp4_to_panel(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint8_t* panel) {
  const __m512i table = mxfp4_table(), nibble = _mm512_set1_epi8(15);
  if (kWhole) prefetch_next_scales(scales, num_blocks);
  for (int64_t chunk = 0; chunk < num_blocks; chunk += 16) {
    __m512i exponent[4];
    transpose_scales<kWhole>(scales + chunk, num_rows, num_blocks, num_blocks - chunk, exponent);
    for (int i = 0; i < 16 && chunk + i < num_blocks; ++i) {
      const int64_t b = chunk + i;
      if (kWhole && i % kGroupBlocks == 0) prefetch_next_rows(blocks + b * 16, num_blocks * 16);
      __m512i v[4];
      transpose_block<kWhole>(blocks + b * 16, num_rows, num_blocks * 16, v);
      uint8_t* w = panel + weights_at(b);
      for (int g = 0; g < 4; ++g) {
        _mm512_storeu_si512(w + g * 64, _mm512_shuffle_epi8(table, _mm512_and_si512(v[g], nibble)));
        _mm512_storeu_si512(w + 256 + g * 64,
                            _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v[g], 4), nibble)));
      }
      const __m512i bits = _mm512_castps_si512(scale_of(exponent[i / 4], i % 4));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + scales_at(b)),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
  }
}

void mxfp4_to_panels(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, uint8_t* panels) {
  for (; num_rows > 0; num_rows -= kPanelRows) {
    if (num_rows >= kPanelRows)
      mxfp4_to_panel<true>(blocks, scales, num_rows, num_blocks, panels);
    else
      mxfp4_to_panel<false>(blocks, scales, num_rows, num_blocks, panels);
    blocks += kPanelRows * num_blocks * 16;
    scales += kPanelRows * num_blocks;
    panels += panel_bytes(num_blocks);
  }
}

// How panels come from memory (measured: docs/performance.md). One pass: so far ahead of the loads; for one token panel
// by panel, which is one stream. Several passes: what will be read next comes into L2 evenly over the blocks of all of
// them, and the products hide the memory.
constexpr int64_t kStreamAhead = 6144;
inline __attribute__((always_inline)) void fetch(const uint8_t* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from + kStreamAhead), _MM_HINT_NTA);
}

// Whether every float's exponent is far from both ends, so that those of two factors can be added: 2^-63 to 2^63.
inline __attribute__((always_inline)) bool are_moderate(__m512i least, __m512i most) {
  return _mm512_reduce_min_epu32(least) >= 64u << 23 && _mm512_reduce_max_epu32(most) < 191u << 23;
}

bool are_moderate(const uint8_t* panels, int num_panels, int64_t num_blocks) {
  __m512i least = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();
  for (int p = 0; p < num_panels; ++p) {
    const uint8_t* panel = panels + p * panel_bytes(num_blocks);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const __m512i bits = _mm512_castps_si512(
          expand_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + scales_at(b)))));
      least = _mm512_min_epu32(least, bits);
      most = _mm512_max_epu32(most, bits);
    }
  }
  return are_moderate(least, most);
}

bool are_moderate(const uint8_t* x, int64_t row_bytes, const int32_t* token, int num_tokens, int64_t num_blocks) {
  __m512i least = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();
  for (int t = 0; t < num_tokens; ++t) {
    const uint8_t* scale = x + token[t] * row_bytes + scale_offset(num_blocks);
    for (int64_t b = 0; b < num_blocks; b += 16) {
      const auto mask = static_cast<__mmask16>(num_blocks - b >= 16 ? 0xffff : (1 << (num_blocks - b)) - 1);
      const __m512i bits = _mm512_maskz_loadu_epi32(mask, scale + b * 4);
      least = _mm512_mask_min_epu32(least, mask, least, bits);
      most = _mm512_max_epu32(most, bits);
    }
  }
  return are_moderate(least, most);
}

// Tokens by panels. 32 registers: NT * NP integer and as many float sums, NP weights, a broadcast; 6 by 2 fit.
//
// kPower: weights' scales are powers of two (MXFP4's are), and all scales are moderate. Their product is then a sum of
// exponents, which every vector unit can make; a multiplication would take a turn of the units that the integer
// products need. The bits are the same.
template <int NT, int NP, bool kPower, bool kStream>
void panel_tile(const uint8_t* panels, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                Ahead& ahead, float* tile) {
  const uint8_t* row[NT];
  __m512 sum[NT][NP];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    for (int p = 0; p < NP; ++p) sum[t][p] = _mm512_setzero_ps();
  }
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks);
  const int64_t stride = panel_bytes(num_blocks);
  // By pairs of blocks, so that where a block lies in its pair is known to the compiler.
  const auto block = [&](const uint8_t* pair, int64_t b, int half) __attribute__((always_inline)) {
    const int64_t at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
    const uint8_t* w = pair + weights_at(half);
    const uint8_t* scales = pair + scales_at(half);
    ahead.go_on();
    if (kStream && half == 0) {
      for (int p = 0; p < NP; ++p) fetch(scales + p * stride);
    }
    __m512i acc[NT][NP];
    for (int t = 0; t < NT; ++t) {
      for (int p = 0; p < NP; ++p) acc[t][p] = _mm512_set1_epi32(dword(row[t] + start_at + b * 4));
    }
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
      __m512i v[NP];
      for (int p = 0; p < NP; ++p) {
        const uint8_t* from = w + p * stride + part * 64;
        if (kStream) fetch(from);
        v[p] = _mm512_loadu_si512(from);
      }
      for (int t = 0; t < NT; ++t) {
        const __m512i a = _mm512_set1_epi32(dword(row[t] + at + part / 4 * 64 + part % 4 * 4));
        for (int p = 0; p < NP; ++p) acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], v[p], a);
      }
    }
    for (int p = 0; p < NP; ++p) {
      const __m512 scale = expand_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + p * stride)));
      const __m512i power = _mm512_sub_epi32(_mm512_castps_si512(scale), _mm512_set1_epi32(127 << 23));
      for (int t = 0; t < NT; ++t) {
        const __m512i own = _mm512_set1_epi32(dword(row[t] + scale_at + b * 4));
        const __m512 both = kPower ? _mm512_castsi512_ps(_mm512_add_epi32(power, own))
                                   : _mm512_mul_ps(scale, _mm512_castsi512_ps(own));
        sum[t][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[t][p]), both, sum[t][p]);
      }
    }
  };
  for (int64_t b = 0; b < num_blocks; b += 2, panels += kPairBytes) {
    block(panels, b, 0);
    if (b + 1 < num_blocks) block(panels, b + 1, 1);
  }
  for (int t = 0; t < NT; ++t) {
    for (int p = 0; p < NP; ++p) _mm512_storeu_ps(tile + t * kTileRows + p * kPanelRows, sum[t][p]);
  }
}

template <int NP, bool kPower>
void panel_tiles(const uint8_t* panels, int64_t num_blocks, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                 int num_tokens, Next next, float* tile) {
  using Fn = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, const int32_t*, Ahead&, float*);
  constexpr Fn by_count[kTileTokens] = {panel_tile<1, NP, kPower, false>, panel_tile<2, NP, kPower, false>,
                                        panel_tile<3, NP, kPower, false>, panel_tile<4, NP, kPower, false>,
                                        panel_tile<5, NP, kPower, false>, panel_tile<6, NP, kPower, false>};
  constexpr Fn streamed[kTileTokens] = {panel_tile<1, NP, kPower, true>, panel_tile<2, NP, kPower, true>,
                                        panel_tile<3, NP, kPower, true>,  panel_tile<4, NP, kPower, true>,
                                        panel_tile<5, NP, kPower, true>,  panel_tile<6, NP, kPower, true>};
  int passes = (num_tokens + kTileTokens - 1) / kTileTokens;
  if (passes == 1) next.bytes = 0;
  Ahead ahead(next, passes * num_blocks);
  const Fn* tiles = passes == 1 ? streamed : by_count;
  // Equal shares: eight tokens are four and four, so that what is fetched ahead comes evenly.
  for (int t = 0, count; t < num_tokens; t += count, --passes) {
    count = (num_tokens - t + passes - 1) / passes;
    tiles[count - 1](panels, num_blocks, x, row_bytes, token + t, ahead, tile + t * kTileRows);
  }
}

void panel_product(const uint8_t* panels, int num_panels, int64_t num_blocks, int offset, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, Next next, float* tile) {
  const bool is_power = offset == kMxfp4Offset && are_moderate(panels, num_panels, num_blocks) &&
                        are_moderate(x, row_bytes, token, num_tokens, num_blocks);
  if (num_tokens == 1) {
    for (int p = 0; p < num_panels; ++p) {
      (is_power ? panel_tiles<1, true> : panel_tiles<1, false>)(panels + p * panel_bytes(num_blocks), num_blocks, x,
                                                                row_bytes, token, 1, next, tile + p * kPanelRows);
    }
    return;
  }
  const auto tiles = num_panels == 2 ? (is_power ? panel_tiles<2, true> : panel_tiles<2, false>)
                                     : (is_power ? panel_tiles<1, true> : panel_tiles<1, false>);
  tiles(panels, num_blocks, x, row_bytes, token, num_tokens, next, tile);
}

// 16 rows by NT tokens without a panel: weights are decoded in registers and used for all tokens at once.
template <int NT, bool kWhole>
void mxfp4_sixteen(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, float* tile) {
  const __m512i table = mxfp4_table(), nibble = _mm512_set1_epi8(15);
  const int64_t scale_at = scale_offset(num_blocks), start_at = start_offset(num_blocks), stride = num_blocks * 16;
  const uint8_t* row[NT];
  __m512 sum[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    sum[t] = _mm512_setzero_ps();
  }
  if (kWhole) prefetch_next_scales(scales, num_blocks);
  for (int64_t chunk = 0; chunk < num_blocks; chunk += 16) {
    __m512i exponent[4];
    transpose_scales<kWhole>(scales + chunk, num_rows, num_blocks, num_blocks - chunk, exponent);
    for (int i = 0; i < 16 && chunk + i < num_blocks; ++i) {
      const int64_t b = chunk + i, at = b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16;
      if (kWhole && i % kGroupBlocks == 0) prefetch_next_rows(blocks + b * 16, stride);
      __m512i v[4], acc[NT];
      transpose_block<kWhole>(blocks + b * 16, num_rows, stride, v);
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
template <bool kWhole>
void mxfp4_tokens(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                  int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  using Fn = void (*)(const uint8_t*, const uint8_t*, int, int64_t, const uint8_t*, int64_t, const int32_t*, float*);
  constexpr Fn by_count[8] = {mxfp4_sixteen<1, kWhole>, mxfp4_sixteen<2, kWhole>, mxfp4_sixteen<3, kWhole>,
                              mxfp4_sixteen<4, kWhole>, mxfp4_sixteen<5, kWhole>, mxfp4_sixteen<6, kWhole>,
                              mxfp4_sixteen<7, kWhole>, mxfp4_sixteen<8, kWhole>};
  for (int t = 0; t < num_tokens; t += 8) {
    const int count = num_tokens - t < 8 ? num_tokens - t : 8;
    by_count[count - 1](blocks, scales, num_rows, num_blocks, x, row_bytes, token + t, tile + t * kTileRows);
  }
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, float* tile) {
  for (int r = 0; r < num_rows; r += kPanelRows) {
    const uint8_t* b = blocks + r * num_blocks * 16;
    const uint8_t* s = scales + r * num_blocks;
    const int left = num_rows - r;
    if (left >= kPanelRows)
      mxfp4_tokens<true>(b, s, left, num_blocks, x, row_bytes, token, num_tokens, tile + r);
    else
      mxfp4_tokens<false>(b, s, left, num_blocks, x, row_bytes, token, num_tokens, tile + r);
  }
}

}  // namespace

const Int8Table kAvx512Int8 = {9, quantize_row, quantize_panel, mxfp4_to_panels, panel_product, mxfp4_product};

}  // namespace harmonium
