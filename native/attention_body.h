// Attention of one tile of queries and the joining of partial results (native/ops.h: AttentionTile, AttentionMerge).
// Included after ops_body.h and attention_cache.h, under the same rules.
//
// Rows are (token, query head) pairs: row = token * R + head. Scores and values are two products of one kind,
// C[kRows, N] = A[kRows, depth] . B[depth, N] with B in float32 scratch: keys transposed (lanes are positions) for the
// scores, values as they lie (lanes are the head's elements) for the output. Keys and values are thus converted once
// for all rows of the tile.

// Lower than any finite score. Finite, so that exp(-inf - kLowest) is 0 and not NaN for a row that is masked as yet.
constexpr float kLowest = -3.0e38f;
// Up to so many rows, values are used where they lie: too few rows share their conversion.
constexpr std::int64_t kDirectRows = 8;

// What the loop over the depth does beside its sums, and where it finds the rows of B.
struct Plain {
  const float* b;
  std::int64_t stride;
  V at(std::int64_t k, std::int64_t lane) const { return load(b + k * stride + lane); }
  void beside(std::int64_t) const {}
};

// Asks for the keys of the next chunk, a little each step: spread over the arithmetic, these requests wait for memory
// while the sums go on. The memory is that of kPair positions, from `position` of the chunk, if they lie in one block.
template <typename Chunk>
struct KeysAhead : Plain {
  const Chunk* next;
  std::int64_t position;
  HARMONIUM_INLINE void beside(std::int64_t k) const { next->ask_keys(position, k); }
};

// Values as they lie in the cache, from position `low` of the chunk. Asks for those of the next chunk, for all that are
// asked for at once wait for each other.
template <typename Chunk>
struct Direct {
  const Chunk* chunk;
  const Chunk* next;
  std::int64_t low, column;
  V at(std::int64_t k, std::int64_t lane) const { return chunk->value(low + k, column + lane); }
  HARMONIUM_INLINE void beside(std::int64_t k) const {
    if (low + k < next->rows->count) next->ask_value(low + k, column);
  }
};

// c = a . b, or c = c * factor[row] + a . b, for kRows rows and 2 vectors.
template <bool kAccumulate, typename B>
inline void product_block(const float* a, std::int64_t a_stride, const B& b, std::int64_t depth, float* c,
                          std::int64_t c_stride, const float* factor) {
  V sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = kAccumulate ? mul(load(c + r * c_stride), set1(factor[r])) : zero();
    sum[r][1] = kAccumulate ? mul(load(c + r * c_stride + kLanes), set1(factor[r])) : zero();
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    b.beside(k);
    const V b0 = b.at(k, 0), b1 = b.at(k, kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = set1(a[r * a_stride + k]);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(c + r * c_stride, sum[r][0]);
    store(c + r * c_stride + kLanes, sum[r][1]);
  }
}

// A tile's working memory, carved out of AttentionTile.scratch.
struct Work {
  std::int64_t rows, padded_rows, width;  // width: K rounded up to whole pairs of vectors
  bool is_direct;                         // values are read where they lie: rows are too few to share a conversion
  float* query;                           // [padded_rows, K], scaled
  float* out;                             // [padded_rows, width], unnormalized
  float* top;                             // [padded_rows] highest score so far
  float* sum;                             // [padded_rows] sum of exp(score - top)
  float* score;                           // [kRows, kKeyChunk]
  float* key_scale;                       // [ceil(K / kScaleGroup), kKeyChunk], of an int8 cache
  float* value_scale;
  float* key;                             // [K, kKeyChunk]
  float* value;                           // [kKeyChunk, width]
};

inline Work carve(const AttentionTile& t) {
  Work w;
  w.rows = t.num_tokens * t.group_size;
  w.padded_rows = round_up(w.rows, kRows);
  w.width = round_up(t.head_size, kPair);
  w.is_direct = w.padded_rows <= kDirectRows && w.width == t.head_size;
  float* p = t.scratch;
  w.query = p, p += round_up(w.padded_rows * t.head_size, 16);
  w.out = p, p += round_up(w.padded_rows * w.width, 16);
  w.top = p, p += round_up(w.padded_rows, 16);
  w.sum = p, p += round_up(w.padded_rows, 16);
  w.score = p, p += kRows * kKeyChunk;
  w.key_scale = p, p += scale_groups(t.head_size) * kKeyChunk;
  w.value_scale = p, p += scale_groups(t.head_size) * kKeyChunk;
  w.key = p, p += t.head_size * kKeyChunk;
  w.value = p;
  return w;
}

inline void start(const AttentionTile& t, const Work& w) {
  const V scale = set1(t.scale);
  const std::int64_t token_floats = t.group_size * t.head_size;  // a multiple of 8
  for (std::int64_t j = 0; j < t.num_tokens; ++j) {
    for (std::int64_t i = 0; i < token_floats; i += kLanes) {
      const std::int64_t n = smaller(token_floats - i, kLanes);
      store_n(w.query + j * token_floats + i, n, mul(load_n(t.query + j * t.query_stride + i, n), scale));
    }
  }
  for (std::int64_t i = w.rows * t.head_size; i < w.padded_rows * t.head_size; ++i) w.query[i] = 0.0f;
  for (std::int64_t i = 0; i < w.padded_rows * w.width; ++i) w.out[i] = 0.0f;
  for (std::int64_t i = 0; i < w.padded_rows; ++i) {
    w.top[i] = kLowest;
    w.sum[i] = 0.0f;
  }
}

inline void find_rows(const AttentionTile& t, std::int64_t begin, Rows& rows) {
  rows.count = smaller(kKeyChunk, t.end - begin);
  std::int64_t block = begin / t.block_size, offset = begin % t.block_size;
  for (std::int64_t i = 0; i < rows.count; ++block, offset = 0) {
    const std::int64_t run = smaller(t.block_size - offset, rows.count - i);
    std::int64_t at = t.block[block] * t.block_rows + offset;
    for (const std::int64_t end = i + run; i < end; ++i) rows.at[i] = at++;
  }
}

// Convert the keys of a chunk into scratch, and the values unless they are used as they lie; lanes past its count
// hold some key.
template <typename Chunk>
inline void load_chunk(const AttentionTile& t, const Work& w, const Chunk& chunk) {
  const std::int64_t K = t.head_size, count = chunk.rows->count;
  chunk.load_scales();
  for (std::int64_t i = 0; i < (w.is_direct ? 0 : count); ++i) {
    float* out = w.value + i * w.width;
    std::int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) store(out + k, chunk.value(i, k));
    if (k < K) store(out + k, chunk.value_n(i, k, K - k)), k += kLanes;
    for (; k < w.width; k += kLanes) store(out + k, zero());
  }
  chunk.load_keys(round_up(count, kPair), w.key);
}

// Turn one row of scores [n0, n1) into exp(score - top), and update its maximum and sum. Returns the factor for what
// was summed before.
inline float weigh_row(float* score, std::int64_t n0, std::int64_t n1, float* top, float* sum) {
  V high = load(score + n0);
  for (std::int64_t n = n0 + kLanes; n < n1; n += kLanes) high = vmax(high, load(score + n));
  const float before = *top;
  const float chunk_top = hmax(high);
  const float now = chunk_top > before ? chunk_top : before;
  const V shift = set1(now);
  V total = zero();
  for (std::int64_t n = n0; n < n1; n += kLanes) {
    const V p = vexp(sub(load(score + n), shift));
    store(score + n, p);
    total = add(total, p);
  }
  const float factor = now == before ? 1.0f : exp1(before - now);
  *top = now;
  *sum = *sum * factor + hsum(total);
  return factor;
}

// score = query . key for kRows rows and the chunk's positions [n0, n1). The first rows of a tile bring in the next
// chunk: its blocks lie anywhere, and the processor's own prefetch stops at the end of a page.
template <typename Chunk>
inline void score_rows(const AttentionTile& t, const Work& w, std::int64_t row, std::int64_t n0, std::int64_t n1,
                       const Chunk& next) {
  const float* query = w.query + row * t.head_size;
  for (std::int64_t n = n0; n < n1; n += kPair) {
    const Plain keys = {w.key + n, kKeyChunk};
    if (row == 0 && n < next.rows->count) {
      const KeysAhead<Chunk> ahead = {keys, &next, n};
      next.ask_scales(n);
      product_block<false>(query, t.head_size, ahead, t.head_size, w.score + n, kKeyChunk, nullptr);
      for (std::int64_t i = n; !w.is_direct && i < smaller(n + kPair, next.rows->count); ++i) {
        for (std::int64_t k = 0; k < t.head_size; k += kPair) next.ask_value(i, k);
      }
    } else {
      product_block<false>(query, t.head_size, keys, t.head_size, w.score + n, kKeyChunk, nullptr);
    }
  }
}

// out = out * factor + weight . value for kRows rows and the chunk's positions [low, high].
template <typename Chunk>
inline void add_values(const Work& w, std::int64_t row, std::int64_t low, std::int64_t high, const Chunk& chunk,
                       const Chunk& next, const float* factor) {
  for (std::int64_t n = 0; n < w.width; n += kPair) {
    float* out = w.out + row * w.width + n;
    if (w.is_direct) {
      const Direct<Chunk> values = {&chunk, &next, low, n};
      product_block<true>(w.score + low, kKeyChunk, values, high + 1 - low, out, w.width, factor);
    } else {
      const Plain values = {w.value + low * w.width + n, w.width};
      product_block<true>(w.score + low, kKeyChunk, values, high + 1 - low, out, w.width, factor);
    }
  }
}

// kRows rows, from row `row`, against the chunk at position `begin`.
template <typename Chunk>
inline void attend_rows(const AttentionTile& t, const Work& w, std::int64_t row, std::int64_t begin,
                        const Chunk& chunk, const Chunk& next) {
  const std::int64_t count = chunk.rows->count;
  const std::int64_t last_row = smaller(row + kRows, w.rows) - 1;
  const std::int64_t window = t.window ? t.window : t.first_position + t.num_tokens;
  // What the rows may see, relative to begin: the first row's window to the last row's own position.
  const std::int64_t low = larger(0, t.first_position + row / t.group_size - window + 1 - begin);
  const std::int64_t high = smaller(count - 1, t.first_position + last_row / t.group_size - begin);
  if (low > high) return;
  const std::int64_t n0 = low / kPair * kPair, n1 = round_up(high + 1, kPair);
  score_rows(t, w, row, n0, n1, next);
  float factor[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) {
    float* score = w.score + r * kKeyChunk;
    const std::int64_t position = t.first_position + smaller(row + r, last_row) / t.group_size - begin;
    const std::int64_t first = larger(n0, smaller(n1, position - window + 1));
    const std::int64_t last = larger(n0, smaller(n1, smaller(count, position + 1)));
    for (std::int64_t n = n0; n < first; ++n) score[n] = -__builtin_inff();
    for (std::int64_t n = last; n < n1; ++n) score[n] = -__builtin_inff();
    factor[r] = weigh_row(score, n0, n1, w.top + row + r, w.sum + row + r);
  }
  add_values(w, row, low, high, chunk, next, factor);
}

// out = value / (sum + exp(sink - top)), written so that neither exponent is positive.
inline void write_row(const float* value, std::int64_t head_size, float top, float sum, float sink, float* out) {
  const float high = top > sink ? top : sink;
  const float shrink = exp1(top - high);
  const V factor = set1(shrink / (sum * shrink + exp1(sink - high)));
  for (std::int64_t k = 0; k < head_size; k += kLanes) {
    const std::int64_t n = smaller(head_size - k, kLanes);
    store_n(out + k, n, mul(load_n(value + k, n), factor));
  }
}

inline void finish(const AttentionTile& t, const Work& w) {
  const std::int64_t K = t.head_size;
  for (std::int64_t row = 0; row < w.rows; ++row) {
    const float* value = w.out + row * w.width;
    if (t.out) {
      const std::int64_t head = row % t.group_size;
      write_row(value, K, w.top[row], w.sum[row], t.sink[head],
                t.out + row / t.group_size * t.out_stride + head * K);
    } else {
      t.partial[row] = w.top[row];
      t.partial[w.rows + row] = w.sum[row];
      __builtin_memcpy(t.partial + 2 * w.rows + row * K, value, sizeof(float) * K);
    }
  }
}

template <typename Chunk>
inline void attend_chunks(const AttentionTile& t) {
  const Work w = carve(t);
  Rows rows[2];
  const Chunk chunks[2] = {Chunk(t, rows, w.key_scale, w.value_scale), Chunk(t, rows + 1, w.key_scale, w.value_scale)};
  find_rows(t, t.begin, rows[0]);
  start(t, w);
  int now = 0;
  for (std::int64_t begin = t.begin; begin < t.end; begin += kKeyChunk, now = 1 - now) {
    find_rows(t, smaller(begin + kKeyChunk, t.end), rows[1 - now]);
    load_chunk(t, w, chunks[now]);
    for (std::int64_t row = 0; row < w.padded_rows; row += kRows) {
      attend_rows(t, w, row, begin, chunks[now], chunks[1 - now]);
    }
  }
  finish(t, w);
}

void attend(const AttentionTile& t) {
  if (t.key_scale) attend_chunks<Int8Chunk>(t);
  else attend_chunks<Bf16Chunk>(t);
}

void merge(const AttentionMerge& m) {
  const std::int64_t K = m.head_size, rows = m.num_tokens * m.group_size, piece_floats = rows * (K + 2);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t head = row % m.group_size;
    float* out = m.out + row / m.group_size * m.out_stride + head * K;
    float top = kLowest, sum = 0.0f;
    for (std::int64_t p = 0; p < m.num_pieces; ++p) {
      const float piece_top = m.partial[p * piece_floats + row];
      top = piece_top > top ? piece_top : top;
    }
    for (std::int64_t k = 0; k < K; ++k) out[k] = 0.0f;
    for (std::int64_t p = 0; p < m.num_pieces; ++p) {
      const float* piece = m.partial + p * piece_floats;
      const float weight = exp1(piece[row] - top);
      sum += weight * piece[rows + row];
      for (std::int64_t k = 0; k < K; k += kLanes) {
        const std::int64_t n = smaller(K - k, kLanes);
        store_n(out + k, n, fma(set1(weight), load_n(piece + 2 * rows + row * K + k, n), load_n(out + k, n)));
      }
    }
    write_row(out, K, top, sum, m.sink[head], out);
  }
}
