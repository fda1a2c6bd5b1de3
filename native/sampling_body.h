// The hot loops of sampling, included once by native/<isa>/sampling.cpp, inside an anonymous namespace that defines
// kWidth. GCC's and Clang's vector types let one body compile to each instruction set; a type wider than the
// registers would be taken apart into single floats. Products and sums are never fused and sums always have 16
// lanes, so that every instruction set gives the same bits: the same seed then draws the same token on each.

constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;  // registers that hold the 16 lanes; kWidth: floats a register holds
typedef float Lanes __attribute__((vector_size(kWidth * sizeof(float))));
typedef std::int32_t IntLanes __attribute__((vector_size(kWidth * sizeof(std::int32_t))));

constexpr float kLowest = -__builtin_inff();

inline Lanes splat(float value) { return Lanes{} + value; }

inline Lanes load(const float* p) {
  Lanes v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The last `count` < kLanes values in `buffer`, minus infinity behind them: it is no maximum and its exp is 0.
inline const float* pad(const float* p, std::int64_t count, float* buffer) {
  for (int i = 0; i < kLanes; ++i) buffer[i] = i < count ? p[i] : kLowest;
  return buffer;
}

inline Lanes greater_of(Lanes a, Lanes b) { return b > a ? b : a; }

// exp(x) for x <= 0 (minus infinity included), relative error about 2e-7; 0 below -87, where floats turn denormal.
// x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial of degree 6 in r. Adding 1.5 * 2^23 rounds to a whole
// number in the low bits of the sum. ln 2 in two parts, the first with zeros at its end, makes n * part exact.
inline Lanes exp_lanes(Lanes x) {
  const Lanes floor = splat(-87.0f);
  const Lanes clamped = x > floor ? x : floor;
  const Lanes magic = splat(12582912.0f);
  const Lanes shifted = clamped * splat(1.44269504f) + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (clamped - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Lanes p = splat(1.0f / 720.0f);
  p = p * r + splat(1.0f / 120.0f);
  p = p * r + splat(1.0f / 24.0f);
  p = p * r + splat(1.0f / 6.0f);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  IntLanes bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;  // 0x4B400000: the bits of 1.5 * 2^23
  Lanes scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return x > floor ? p * scale : Lanes{};
}

bool block_max(const float* x, std::int64_t n, float* max_of_block) {
  float buffer[kLanes];
  IntLanes nan[kParts] = {};
  for (std::int64_t start = 0; start < n; start += kSampleBlock) {
    const std::int64_t end = start + kSampleBlock < n ? start + kSampleBlock : n;
    Lanes best[kParts];
    for (int part = 0; part < kParts; ++part) best[part] = splat(kLowest);
    for (std::int64_t i = start; i < end; i += kLanes) {
      const float* from = i + kLanes <= end ? x + i : pad(x + i, end - i, buffer);
      for (int part = 0; part < kParts; ++part) {
        const Lanes v = load(from + part * kWidth);
        best[part] = greater_of(best[part], v);
        nan[part] |= v != v;
      }
    }
    float found = kLowest;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = best[lane / kWidth][lane % kWidth];
      found = value > found ? value : found;
    }
    max_of_block[start / kSampleBlock] = found;
  }
  std::int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= nan[lane / kWidth][lane % kWidth];
  return any != 0;
}

void block_exp_sum(const float* x, std::int64_t n, float max, float inverse_temperature, double* sum_of_block) {
  float buffer[kLanes];
  const Lanes shift = splat(max);
  const Lanes factor = splat(inverse_temperature);
  for (std::int64_t start = 0; start < n; start += kSampleBlock) {
    const std::int64_t end = start + kSampleBlock < n ? start + kSampleBlock : n;
    Lanes sum[kParts] = {};
    for (std::int64_t i = start; i < end; i += kLanes) {
      const float* from = i + kLanes <= end ? x + i : pad(x + i, end - i, buffer);
      for (int part = 0; part < kParts; ++part) sum[part] += exp_lanes((load(from + part * kWidth) - shift) * factor);
    }
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(sum[lane / kWidth][lane % kWidth]);
    sum_of_block[start / kSampleBlock] = total;
  }
}

void exp_scaled(const float* x, std::int64_t n, float max, float inverse_temperature, float* out) {
  const Lanes shift = splat(max);
  const Lanes factor = splat(inverse_temperature);
  for (std::int64_t i = 0; i < n; i += kWidth) {
    float buffer[kLanes];
    const std::int64_t count = i + kWidth <= n ? kWidth : n - i;
    const Lanes v = load(count == kWidth ? x + i : pad(x + i, count, buffer));
    const Lanes e = exp_lanes((v - shift) * factor);
    __builtin_memcpy(out + i, &e, static_cast<std::size_t>(count) * sizeof(float));
  }
}
