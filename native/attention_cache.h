// How attention reads a chunk of the key/value cache: as bf16, or as int8 with scales (native/ops.h: KeyValueCache).
// Included after ops_body.h, before attention_body.h, under the same rules.

// Where the positions of a chunk lie: rows of K elements from the start of the cache (this kv head's in block 0).
struct Rows {
  std::int64_t count;
  std::int64_t at[kKeyChunk];
};

struct Bf16Chunk {
  const std::uint16_t *keys, *values;
  std::int64_t head_size;
  const Rows* rows;

  Bf16Chunk(const AttentionTile& t, const Rows* found, float*, float*)
      : keys(static_cast<const std::uint16_t*>(t.key)),
        values(static_cast<const std::uint16_t*>(t.value)),
        head_size(t.head_size),
        rows(found) {}

  void load_scales() const {}

  // kLanes elements from element k of the value at position i; or n of them, the rest 0.
  V value(std::int64_t i, std::int64_t k) const { return load_bf16(values + rows->at[i] * head_size + k); }
  V value_n(std::int64_t i, std::int64_t k, std::int64_t n) const {
    return load_bf16_n(values + rows->at[i] * head_size + k, n);
  }

  // out[k * kKeyChunk + i] for `padded` positions: those past the count repeat the first.
  void load_keys(std::int64_t padded, float* out) const {
    const std::uint16_t* at[kKeyChunk];
    for (std::int64_t i = 0; i < padded; ++i) at[i] = keys + rows->at[i < rows->count ? i : 0] * head_size;
    for (std::int64_t i = 0; i < padded; i += kLanes) transpose_keys(at + i, head_size, out + i);
  }

  HARMONIUM_INLINE void ask_scales(std::int64_t) const {}

  // Step k of head_size: a piece of the memory of the keys of kPair positions from the given one.
  HARMONIUM_INLINE void ask_keys(std::int64_t position, std::int64_t k) const {
    prefetch(keys + rows->at[position] * head_size + k * kPair);
  }
  // That of kPair elements of one position's value.
  HARMONIUM_INLINE void ask_value(std::int64_t position, std::int64_t k) const {
    prefetch(values + rows->at[position] * head_size + k);
  }
};

struct Int8Chunk {
  const std::int8_t *keys, *values;
  const std::uint16_t *key_scales, *value_scales;
  std::int64_t head_size, groups;
  const Rows* rows;
  float *key_scale, *value_scale;  // [groups, kKeyChunk], filled by load_scales

  Int8Chunk(const AttentionTile& t, const Rows* found, float* key_floats, float* value_floats)
      : keys(static_cast<const std::int8_t*>(t.key)),
        values(static_cast<const std::int8_t*>(t.value)),
        key_scales(t.key_scale),
        value_scales(t.value_scale),
        head_size(t.head_size),
        groups(scale_groups(t.head_size)),
        rows(found),
        key_scale(key_floats),
        value_scale(value_floats) {}

  void load_scales() const {
    for (std::int64_t i = 0; i < round_up(rows->count, kPair); ++i) {
      const std::int64_t at = rows->at[i < rows->count ? i : 0] * groups;
      for (std::int64_t g = 0; g < groups; ++g) {
        key_scale[g * kKeyChunk + i] = widen1(key_scales[at + g]);
        value_scale[g * kKeyChunk + i] = widen1(value_scales[at + g]);
      }
    }
  }

  V scale_of(std::int64_t i, std::int64_t k) const { return set1(value_scale[k / kScaleGroup * kKeyChunk + i]); }
  V value(std::int64_t i, std::int64_t k) const {
    return mul(load_int8(values + rows->at[i] * head_size + k), scale_of(i, k));
  }
  V value_n(std::int64_t i, std::int64_t k, std::int64_t n) const {
    return mul(load_int8_n(values + rows->at[i] * head_size + k, n), scale_of(i, k));
  }

  void load_keys(std::int64_t padded, float* out) const {
    const std::int8_t* at[kKeyChunk];
    for (std::int64_t i = 0; i < padded; ++i) at[i] = keys + rows->at[i < rows->count ? i : 0] * head_size;
    for (std::int64_t i = 0; i < padded; i += kLanes) transpose_keys(at + i, head_size, key_scale + i, out + i);
  }

  // Those of kPair positions, a line of 32 at a time.
  HARMONIUM_INLINE void ask_scales(std::int64_t position) const {
    for (std::int64_t at = rows->at[position] * groups, end = at + kPair * groups; at < end; at += 32) {
      prefetch(key_scales + at);
      prefetch(value_scales + at);
    }
  }

  // At even steps alone: half the bytes of bf16 take half the requests.
  HARMONIUM_INLINE void ask_keys(std::int64_t position, std::int64_t k) const {
    if (!(k & 1)) prefetch(keys + rows->at[position] * head_size + k * kPair);
  }
  HARMONIUM_INLINE void ask_value(std::int64_t position, std::int64_t k) const {
    if (k % (2 * kPair) == 0) prefetch(values + rows->at[position] * head_size + k);
  }
};
