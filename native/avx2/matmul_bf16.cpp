// Products with bf16 activations, AVX2 and FMA. What each function does: matmul.h.
#include "avx2/matmul_bits.h"
#include "matmul.h"

namespace harmonium {

namespace {

#include "mxfp4_bf16_body.h"

constexpr int kMostTokens = 4;    // in one pass
constexpr int kDecodeTokens = 8;  // up to so many, each pass decodes MXFP4 again, in registers (measured)
constexpr int kDecodeRows = 16;   // rows decoded together for more
constexpr int kRowsAhead = 8;     // how many rows ahead MXFP4 is fetched there
constexpr int64_t kAhead = 4096;  // and how many bytes where it is decoded for more

void round_row(const float* x, int64_t num_inputs, uint16_t* row) {
  for (int64_t i = 0; i < num_inputs; ++i) {
    const uint32_t bits = to_bits(x[i]);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    row[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40 : rounded);
  }
}

// Where element i of blocks that are used together, two or one, lies among them: in registers of 16, first the even
// elements and then the odd ones, as interleaving makes them of bytes, in each half of a register.
inline int place_of(int i, int num_blocks) {
  const int block = i / kBlock, odd = i % 2, byte = i % kBlock / 2;
  return num_blocks == 2 ? odd * 32 + byte / 8 * 16 + block * 8 + byte % 8 : byte / 8 * 16 + odd * 8 + byte % 8;
}

void round_mxfp4_row(const float* x, int64_t num_inputs, uint16_t* row) {
  for (int64_t k = 0; k < num_inputs; k += 2 * kBlock) {
    const int count = num_inputs - k >= 2 * kBlock ? 2 : 1;
    uint16_t rounded[2 * kBlock];
    round_row(x + k, count * kBlock, rounded);
    for (int i = 0; i < count * kBlock; ++i) row[k + place_of(i, count)] = rounded[i];
  }
}

// Weights of two blocks (or one) to registers of 16 bf16. A shuffle gives the upper bytes of values, another the lower
// ones; -0 is taken as 0, which no sum can tell. Subtraction that stops at zero lowers the exponents and keeps zeros.
template <int kBlocks>
inline __attribute__((always_inline)) void decode(const uint8_t* blocks, const uint8_t* scales, __m256i* weight) {
  const __m256i upper = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0, static_cast<char>(0xbf), static_cast<char>(0xbf),
                    static_cast<char>(0xbf), static_cast<char>(0xc0), static_cast<char>(0xc0), static_cast<char>(0xc0),
                    static_cast<char>(0xc0)));
  const __m256i lower = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 0, static_cast<char>(0x80), static_cast<char>(0xc0), 0, 0x40, static_cast<char>(0x80),
                    static_cast<char>(0xc0), 0, 0, static_cast<char>(0x80), static_cast<char>(0xc0), 0, 0x40,
                    static_cast<char>(0x80), static_cast<char>(0xc0)));
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i power, index[2];
  if (kBlocks == 2) {
    uint16_t both;
    memcpy(&both, scales, sizeof both);
    const __m256i bytes =
        _mm256_set_m128i(_mm_set1_epi16(static_cast<short>(0x8001)), _mm_set1_epi16(static_cast<short>(0x8000)));
    power = _mm256_shuffle_epi8(_mm256_set1_epi16(static_cast<short>(both)), bytes);
    const __m256i v = load(blocks);
    index[0] = _mm256_and_si256(v, nibble);
    index[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
  } else {
    power = _mm256_set1_epi16(scales[0]);
    const __m128i v = load128(blocks);
    index[0] = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), nibble);
  }
  power = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_set1_epi16(127), power), 7);
  for (int i = 0; i < kBlocks; ++i) {
    const __m256i high = _mm256_shuffle_epi8(upper, index[i]), low = _mm256_shuffle_epi8(lower, index[i]);
    weight[2 * i] = _mm256_subs_epu16(_mm256_unpacklo_epi8(low, high), power);
    weight[2 * i + 1] = _mm256_subs_epu16(_mm256_unpackhi_epi8(low, high), power);
  }
}

// Sixteen bf16 as eight float32 of even and eight of odd places.
inline __attribute__((always_inline)) void split_bf16(__m256i v, __m256 out[2]) {
  out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  out[1] = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// A register of weights for each of NR rows by NT tokens. All products add up in this order: even places, then odd.
// Sixteen registers: eight sums (a multiplication takes four cycles, two begin in each), the activations of one or two
// tokens or the weights of two rows, and what they meet.
template <int NT, int NR>
inline __attribute__((always_inline)) void add_register(const __m256i* const (&weight)[NR], int i,
                                                        const uint16_t* const (&row)[NT], int64_t k,
                                                        __m256 (&sum)[NT][NR]) {
  if (NT < NR) {
    __m256 a[NT][2];
    for (int t = 0; t < NT; ++t) split_bf16(load(row[t] + k), a[t]);
    for (int r = 0; r < NR; ++r) {
      __m256 w[2];
      split_bf16(_mm256_loadu_si256(weight[r] + i), w);
      for (int half = 0; half < 2; ++half) {
        for (int t = 0; t < NT; ++t) sum[t][r] = _mm256_fmadd_ps(w[half], a[t][half], sum[t][r]);
      }
    }
    return;
  }
  __m256 w[NR][2];
  for (int r = 0; r < NR; ++r) split_bf16(_mm256_loadu_si256(weight[r] + i), w[r]);
  for (int t = 0; t < NT; ++t) {
    __m256 a[2];
    split_bf16(load(row[t] + k), a);
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < NR; ++r) sum[t][r] = _mm256_fmadd_ps(w[r][half], a[half], sum[t][r]);
    }
  }
}

template <int NT, int NR, int kBlocks>
inline __attribute__((always_inline)) void add_blocks(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks,
                                                      int64_t b, const uint16_t* const (&row)[NT],
                                                      __m256 (&sum)[NT][NR]) {
  __m256i weight[NR][2 * kBlocks];
  const __m256i* from[NR];
  for (int r = 0; r < NR; ++r) {
    const int64_t at = r * num_blocks + b;
    decode<kBlocks>(blocks + at * 16, scales + at, weight[r]);
    from[r] = weight[r];
    // The same place of rows that come later, a line at a time.
    if (b % 4 == 0) _mm_prefetch(reinterpret_cast<const char*>(blocks + (at + kRowsAhead * num_blocks) * 16), _MM_HINT_T0);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 2 * kBlocks; ++i) add_register<NT, NR>(from, i, row, b * kBlock + i * 16, sum);
}

template <int NT, int NR>
inline __attribute__((always_inline)) void begin(const uint8_t* x, int64_t row_bytes, const int32_t* token,
                                                 const uint16_t* (&row)[NT], __m256 (&sum)[NT][NR]) {
  for (int t = 0; t < NT; ++t) {
    row[t] = reinterpret_cast<const uint16_t*>(x + token[t] * row_bytes);
    for (int r = 0; r < NR; ++r) sum[t][r] = _mm256_setzero_ps();
  }
}

template <int NT, int NR>
inline __attribute__((always_inline)) void write_sums(const __m256 (&sum)[NT][NR], float* tile) {
  for (int t = 0; t < NT; ++t) {
    for (int r = 0; r < NR; ++r) tile[t * kTileRows + r] = reduce(sum[t][r]);
  }
}

// NR rows by NT tokens: MXFP4, decoded in registers, or bf16.
struct Mxfp4Rows {
  const uint8_t* blocks;
  const uint8_t* scales;
  int64_t num_inputs;

  Mxfp4Rows from(int r) const {
    return {blocks + r * num_inputs / 2, scales + r * (num_inputs / kBlock), num_inputs};
  }
  template <int NT, int NR>
  void multiply(const uint8_t* x, int64_t row_bytes, const int32_t* token, float* tile) const {
    const uint16_t* row[NT];
    __m256 sum[NT][NR];
    begin<NT, NR>(x, row_bytes, token, row, sum);
    const int64_t num_blocks = num_inputs / kBlock;
    // The next tile's scales: all of them are looked at before its first product.
    const uint8_t* later = scales + kTileRows * num_blocks;
    for (int64_t i = 0; i < NR * num_blocks; i += 64) _mm_prefetch(reinterpret_cast<const char*>(later + i), _MM_HINT_T0);
    int64_t b = 0;
    for (; b + 2 <= num_blocks; b += 2) add_blocks<NT, NR, 2>(blocks, scales, num_blocks, b, row, sum);
    if (b < num_blocks) add_blocks<NT, NR, 1>(blocks, scales, num_blocks, b, row, sum);
    write_sums<NT, NR>(sum, tile);
  }
};

struct Bf16Rows {
  const uint16_t* weight;
  int64_t num_inputs;

  Bf16Rows from(int r) const { return {weight + r * num_inputs, num_inputs}; }
  template <int NT, int NR>
  void multiply(const uint8_t* x, int64_t row_bytes, const int32_t* token, float* tile) const {
    const uint16_t* row[NT];
    __m256 sum[NT][NR];
    begin<NT, NR>(x, row_bytes, token, row, sum);
    for (int64_t k = 0; k < num_inputs; k += 16) {
      const __m256i* from[NR];
      for (int r = 0; r < NR; ++r) from[r] = reinterpret_cast<const __m256i*>(weight + r * num_inputs + k);
      add_register<NT, NR>(from, 0, row, k, sum);
    }
    write_sums<NT, NR>(sum, tile);
  }
};

template <int NT, typename Rows>
void multiply_tokens(const Rows& rows, int num_rows, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                     float* tile) {
  constexpr int kRows = NT == 1 ? 8 : NT == 2 ? 4 : 2;
  int r = 0;
  for (; r + kRows <= num_rows; r += kRows) {
    rows.from(r).template multiply<NT, kRows>(x, row_bytes, token, tile + r);
  }
  for (; r < num_rows; ++r) rows.from(r).template multiply<NT, 1>(x, row_bytes, token, tile + r);
}

template <typename Rows>
void multiply_all(const Rows& rows, int num_rows, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                  int num_tokens, float* tile) {
  using Fn = void (*)(const Rows&, int, const uint8_t*, int64_t, const int32_t*, float*);
  constexpr Fn by_count[kMostTokens] = {multiply_tokens<1, Rows>, multiply_tokens<2, Rows>, multiply_tokens<3, Rows>,
                                        multiply_tokens<4, Rows>};
  for (int t = 0, count; t < num_tokens; t += count) {
    count = num_tokens - t < kMostTokens ? num_tokens - t : kMostTokens;
    by_count[count - 1](rows, num_rows, x, row_bytes, token + t, tile + t * kTileRows);
  }
}

void bf16_product(const uint16_t* weight, int num_rows, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                  const int32_t* token, int num_tokens, float* tile) {
  multiply_all(Bf16Rows{weight, num_inputs}, num_rows, x, row_bytes, token, num_tokens, tile);
}

// A pair of blocks, or a single one, in the order of round_mxfp4_row.
template <int kBlocks>
inline __attribute__((always_inline)) void decode_to(const uint8_t* blocks, const uint8_t* scales, bool is_usual,
                                                     uint16_t* out) {
  if (is_usual) {
    __m256i weight[2 * kBlocks];
    decode<kBlocks>(blocks, scales, weight);
    for (int i = 0; i < 2 * kBlocks; ++i) store(out + i * 16, weight[i]);
    return;
  }
  for (int i = 0; i < kBlocks * kBlock; ++i) {
    out[place_of(i, kBlocks)] = any_weight(blocks + i / kBlock * 16, scales[i / kBlock], i % kBlock);
  }
}

void decode_row(const uint8_t* blocks, const uint8_t* scales, int64_t num_blocks, bool is_usual, uint16_t* out) {
  int64_t b = 0;
  for (; b + 2 <= num_blocks; b += 2) {
    _mm_prefetch(reinterpret_cast<const char*>(blocks + b * 16 + kAhead), _MM_HINT_T0);
    decode_to<2>(blocks + b * 16, scales + b, is_usual, out + b * kBlock);
  }
  if (b < num_blocks) decode_to<1>(blocks + b * 16, scales + b, is_usual, out + b * kBlock);
}

void mxfp4_product(const uint8_t* blocks, const uint8_t* scales, int num_rows, int64_t num_blocks, const uint8_t* x,
                   int64_t row_bytes, const int32_t* token, int num_tokens, uint16_t* decoded, float* tile) {
  const int64_t num_inputs = num_blocks * kBlock;
  const bool is_usual = are_usual(scales, num_rows * num_blocks);
  if (is_usual && num_tokens <= kDecodeTokens) {
    multiply_all(Mxfp4Rows{blocks, scales, num_inputs}, num_rows, x, row_bytes, token, num_tokens, tile);
    return;
  }
  for (int first = 0; first < num_rows; first += kDecodeRows) {
    const int count = num_rows - first < kDecodeRows ? num_rows - first : kDecodeRows;
    for (int r = 0; r < count; ++r) {
      const int64_t at = (first + r) * num_blocks;
      decode_row(blocks + at * 16, scales + at, num_blocks, is_usual, decoded + r * num_inputs);
    }
    bf16_product(decoded, count, num_inputs, x, row_bytes, token, num_tokens, tile + first);
  }
}

template <int NT>
void bf16_columns(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes, const int32_t* token,
                  float* tile) {
  __m256 sum[NT][4];
  const uint8_t* row[NT];
  for (int t = 0; t < NT; ++t) {
    row[t] = x + token[t] * row_bytes;
    for (int i = 0; i < 4; ++i) sum[t][i] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < num_inputs; ++k) {
    __m256 a[NT];
    for (int t = 0; t < NT; ++t) {
      uint16_t bits;
      memcpy(&bits, row[t] + k * 2, sizeof bits);
      a[t] = _mm256_set1_ps(from_bits(static_cast<uint32_t>(bits) << 16));
    }
    for (int i = 0; i < 4; ++i) {
      const __m256 w = expand_bf16(weight + k * kTileRows + i * 8);
      for (int t = 0; t < NT; ++t) sum[t][i] = _mm256_fmadd_ps(w, a[t], sum[t][i]);
    }
  }
  for (int t = 0; t < NT; ++t) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(tile + t * kTileRows + i * 8, sum[t][i]);
  }
}

void bf16_column_product(const uint16_t* weight, int64_t num_inputs, const uint8_t* x, int64_t row_bytes,
                         const int32_t* token, int num_tokens, float* tile) {
  int t = 0;
  for (; t + 2 <= num_tokens; t += 2)
    bf16_columns<2>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
  if (t < num_tokens) bf16_columns<1>(weight, num_inputs, x, row_bytes, token + t, tile + t * kTileRows);
}

}  // namespace

const Bf16Table kAvx2Bf16 = {round_row, round_mxfp4_row, mxfp4_product, bf16_product, bf16_column_product};

}  // namespace harmonium
