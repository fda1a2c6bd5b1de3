// The kernels of OpsTable, written once over vectors of kLanes floats. Each native/<isa>/ops.cpp includes this file
// and the attention_*.h inside its anonymous namespace, after it has defined
//   V (a vector of floats), kLanes, kRows (rows of the register block: kRows x 2 accumulators fit the registers),
//   zero, set1, load, load_n (1 <= n <= kLanes, the rest 0), store, store_n, add, sub, mul,
//   fma(a, b, c) = a * b + c,
//   vmax, vexp (x <= 0; 0 below about -87; relative error about 2e-7), hsum, hmax,
//   div, load_bf16, load_bf16_n, store_bf16_n (n <= kLanes; to nearest even, NaN stays NaN),
//   load_int8, load_int8_n, store_int8_n (of whole numbers from -128 to 127),
//   transpose_keys(row, head_size, out): out[k * kKeyChunk + i] = row[i][k] for kLanes rows, as float32, of bf16; and
//   of int8 transpose_keys(row, head_size, scale, out), times scale[k / kScaleGroup * kKeyChunk + i],
//   prefetch(p).
// Nothing here may come from a C++ library header: an inline function compiled for AVX-512 and merged by the linker
// with its twin from the common build would crash older processors (tools/check_symbols.py looks for that).

constexpr std::int64_t kPair = 2 * kLanes;

inline std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

void rms_norm(const float* x, const float* weight, float eps, std::int64_t width, float* out) {
  V sum[4] = {zero(), zero(), zero(), zero()};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const V v = load(x + i + j * kLanes);
      sum[j] = fma(v, v, sum[j]);
    }
  }
  for (; i < width; i += kLanes) {
    const V v = width - i < kLanes ? load_n(x + i, width - i) : load(x + i);
    sum[0] = fma(v, v, sum[0]);
  }
  const float mean = hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) / static_cast<float>(width);
  const V factor = set1(1.0f / __builtin_sqrtf(mean + eps));
  for (i = 0; i + kLanes <= width; i += kLanes) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
  if (i < width) {
    const std::int64_t n = width - i;
    store_n(out + i, n, mul(mul(load_n(x + i, n), factor), load_n(weight + i, n)));
  }
}

// Products and sums round separately, as in the NumPy specification: the stored bf16 keys are then bitwise the same.
void rotate(float* x, const float* cos, const float* sin, std::int64_t num_heads, std::int64_t head_size) {
  const std::int64_t half = head_size / 2;
  for (std::int64_t h = 0; h < num_heads; ++h) {
    float* first = x + h * head_size;
    float* second = first + half;
    for (std::int64_t i = 0; i < half; i += kLanes) {
      const std::int64_t n = smaller(half - i, kLanes);
      const V a = load_n(first + i, n), b = load_n(second + i, n);
      const V c = load_n(cos + i, n), s = load_n(sin + i, n);
      store_n(first + i, n, sub(mul(a, c), mul(b, s)));
      store_n(second + i, n, add(mul(b, c), mul(a, s)));
    }
  }
}

void narrow(const float* x, std::int64_t count, std::uint16_t* out) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t n = smaller(count - i, kLanes);
    store_bf16_n(out + i, n, load_n(x + i, n));
  }
}

inline float widen1(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float x;
  __builtin_memcpy(&x, &wide, sizeof x);
  return x;
}

// The scale of numbers whose largest is `top`, as bf16 bits: top / 127, rounded up.
inline std::uint16_t scale_bits(float top) {
  const float scale = top / 127.0f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &scale, sizeof bits);
  return static_cast<std::uint16_t>((bits + 0xffffu) >> 16);
}

void quantize(const float* x, std::int64_t count, std::int8_t* out, std::uint16_t* scale) {
  for (std::int64_t begin = 0; begin < count; begin += kScaleGroup, ++scale) {
    const std::int64_t size = smaller(count - begin, kScaleGroup);
    V high = zero(), not_finite = zero();
    for (std::int64_t i = 0; i < size; i += kLanes) {
      const V v = load_n(x + begin + i, smaller(size - i, kLanes));
      high = vmax(high, vmax(v, sub(zero(), v)));
      not_finite = add(not_finite, sub(v, v));  // 0, or NaN for what is not finite
    }
    const bool is_finite = hsum(not_finite) == 0.0f;
    *scale = is_finite ? scale_bits(hmax(high)) : static_cast<std::uint16_t>(0x7fc0);
    const float divisor = widen1(*scale);
    const bool is_zero = !is_finite || divisor == 0.0f;
    const V magic = set1(12582912.0f);  // 1.5 * 2^23: a sum with it is a whole number, rounded to nearest even
    for (std::int64_t i = 0; i < size; i += kLanes) {
      const std::int64_t n = smaller(size - i, kLanes);
      const V v = is_zero ? zero() : div(load_n(x + begin + i, n), set1(divisor));
      store_int8_n(out + begin + i, n, sub(add(v, magic), magic));
    }
  }
}

void widen(const std::uint16_t* x, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load_bf16(x + i));
  if (i < count) store_n(out + i, count - i, load_bf16_n(x + i, count - i));
}

// Each dot product is one chain of vector sums whatever the block's size, so that a token's logits do not depend on
// the tokens beside it.
template <int M, int N>
void dots_block(const float* x, const std::uint16_t* weight, std::int64_t width, float* out, std::int64_t out_stride) {
  V sum[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) sum[m][n] = zero();
  }
  const std::int64_t whole = width / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    V a[M];
    for (int m = 0; m < M; ++m) a[m] = load(x + m * width + i);
    for (int n = 0; n < N; ++n) {
      const V b = load_bf16(weight + n * width + i);
      for (int m = 0; m < M; ++m) sum[m][n] = fma(a[m], b, sum[m][n]);
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < M; ++m) {
      if (whole < width) {
        const V b = load_bf16_n(weight + n * width + whole, width - whole);
        sum[m][n] = fma(load_n(x + m * width + whole, width - whole), b, sum[m][n]);
      }
      out[m * out_stride + n] = hsum(sum[m][n]);
    }
  }
}

void dots(const float* x, std::int64_t num_x, const std::uint16_t* weight, std::int64_t num_weight,
          std::int64_t width, float* out, std::int64_t out_stride) {
  std::int64_t n = 0;
  for (; n + 4 <= num_weight; n += 4) {
    std::int64_t m = 0;
    for (; m + 2 <= num_x; m += 2)
      dots_block<2, 4>(x + m * width, weight + n * width, width, out + m * out_stride + n, out_stride);
    if (m < num_x) dots_block<1, 4>(x + m * width, weight + n * width, width, out + m * out_stride + n, out_stride);
  }
  for (; n < num_weight; ++n) {
    for (std::int64_t m = 0; m < num_x; ++m)
      dots_block<1, 1>(x + m * width, weight + n * width, width, out + m * out_stride + n, out_stride);
  }
}

// exp of one float, by the vector function so that it is the same everywhere.
inline float exp1(float x) {
  float lane[kLanes];
  store(lane, vexp(set1(x)));
  return lane[0];
}

void softmax(float* x, std::int64_t count) {
  float top = x[0], sum = 0.0f;
  for (std::int64_t i = 1; i < count; ++i) top = x[i] > top ? x[i] : top;
  for (std::int64_t i = 0; i < count; ++i) {
    x[i] = exp1(x[i] - top);
    sum += x[i];
  }
  for (std::int64_t i = 0; i < count; ++i) x[i] /= sum;
}
