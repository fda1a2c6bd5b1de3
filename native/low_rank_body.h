// The kernels of LowRankTable, written once. Each native/<isa>/ops.cpp includes this file inside its anonymous
// namespace, after ops_body.h, whose rules and vector primitives it shares.

inline V load_weight(const float* p) { return load(p); }
inline V load_weight(const std::uint16_t* p) { return load_bf16(p); }
inline V load_weight_n(const float* p, std::int64_t n) { return load_n(p, n); }
inline V load_weight_n(const std::uint16_t* p, std::int64_t n) { return load_bf16_n(p, n); }

// N dot products; each is one chain of vector sums whatever N is.
template <int N, typename T>
void shrink_block(const T* a, const float* x, std::int64_t width, float scale, float* u) {
  V sum[N];
  for (int n = 0; n < N; ++n) sum[n] = zero();
  const std::int64_t whole = width / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const V v = load(x + i);
    for (int n = 0; n < N; ++n) sum[n] = fma(v, load_weight(a + n * width + i), sum[n]);
  }
  if (whole < width) {
    const V v = load_n(x + whole, width - whole);
    for (int n = 0; n < N; ++n) sum[n] = fma(v, load_weight_n(a + n * width + whole, width - whole), sum[n]);
  }
  for (int n = 0; n < N; ++n) u[n] = scale * hsum(sum[n]);
}

template <typename T>
void shrink_typed(const LowRank& pair, std::int64_t expert, const float* x, float* u) {
  const std::int64_t width = pair.num_inputs;
  const T* a = static_cast<const T*>(pair.a) + expert * pair.rank * width;
  std::int64_t j = 0;
  for (; j + 4 <= pair.rank; j += 4) shrink_block<4>(a + j * width, x, width, pair.scale, u + j);
  for (; j < pair.rank; ++j) shrink_block<1>(a + j * width, x, width, pair.scale, u + j);
}

void shrink(const LowRank& pair, std::int64_t expert, const float* x, float* u) {
  if (pair.is_bf16) shrink_typed<std::uint16_t>(pair, expert, x, u);
  else shrink_typed<float>(pair, expert, x, u);
}

template <typename T>
void expand_typed(const LowRank& pair, std::int64_t expert, const float* u, std::int64_t first, std::int64_t count,
                  float* out) {
  const T* b = static_cast<const T*>(pair.b) + expert * pair.rank * pair.num_outputs + first;
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t n = smaller(count - i, kLanes);
    V sum = load_n(out + i, n);
    for (std::int64_t j = 0; j < pair.rank; ++j) {
      const T* w = b + j * pair.num_outputs + i;
      sum = fma(set1(u[j]), n == kLanes ? load_weight(w) : load_weight_n(w, n), sum);
    }
    store_n(out + i, n, sum);
  }
}

void expand(const LowRank& pair, std::int64_t expert, const float* u, std::int64_t first, std::int64_t count,
            float* out) {
  if (pair.is_bf16) expand_typed<std::uint16_t>(pair, expert, u, first, count, out);
  else expand_typed<float>(pair, expert, u, first, count, out);
}
