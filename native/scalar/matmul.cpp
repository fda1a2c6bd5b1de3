// What surrounds the products, in plain C++. What each function does: matmul.h.
#include "matmul.h"

#include "scalar/matmul_bits.h"

namespace harmonium {

namespace {

void swiglu(const float* gate_up, const uint16_t* bias, int num_units, float limit, float alpha, float* out) {
  for (int u = 0; u < num_units; ++u) {
    float gate = gate_up[2 * u] + from_bf16(bias[2 * u]);
    float up = gate_up[2 * u + 1] + from_bf16(bias[2 * u + 1]);
    // Written so that NaN passes through.
    if (gate > limit) gate = limit;
    if (up > limit) up = limit;
    if (up < -limit) up = -limit;
    out[u] = gate / (1.0f + expf(-alpha * gate)) * (up + 1.0f);
  }
}

void finish(const float* tile, const uint16_t* bias, int num_rows, float weight, bool add, float* out) {
  for (int r = 0; r < num_rows; ++r) {
    const float value = (tile[r] + (bias ? from_bf16(bias[r]) : 0.0f)) * weight;
    out[r] = add ? out[r] + value : value;
  }
}

void add_parts(const float* part, int64_t stride, int num_parts, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) {
    float sum = part[i];
    for (int a = 1; a < num_parts; ++a) sum += part[a * stride + i];
    out[i] += sum;
  }
}

double spin_int8(int64_t rounds) {
  volatile int32_t seed = 1;
  int32_t acc[64], w[64];
  for (int i = 0; i < 64; ++i) acc[i] = 0, w[i] = seed + i;
  for (int64_t n = 0; n < rounds; ++n) {
    for (int i = 0; i < 64; ++i) acc[i] += w[i] * static_cast<int32_t>(n & 127);
  }
  for (int i = 0; i < 64; ++i) seed = acc[i];
  return static_cast<double>(rounds) * 128.0;
}

double spin_bf16(int64_t rounds) {
  volatile float seed = 1;
  float acc[64], w[64];
  for (int i = 0; i < 64; ++i) acc[i] = 0, w[i] = seed + static_cast<float>(i);
  for (int64_t n = 0; n < rounds; ++n) {
    for (int i = 0; i < 64; ++i) acc[i] += w[i] * static_cast<float>(n & 127);
  }
  for (int i = 0; i < 64; ++i) seed = acc[i];
  return static_cast<double>(rounds) * 128.0;
}

uint64_t read_all(const uint8_t* data, int64_t size_bytes) {
  uint64_t a = 0, b = 0;
  for (int64_t i = 0; i < size_bytes; i += 16) {
    uint64_t v[2];
    memcpy(v, data + i, sizeof v);
    a ^= v[0];
    b ^= v[1];
  }
  return a ^ b;
}

}  // namespace

const TileTable kScalarTile = {swiglu, finish, add_parts, spin_int8, spin_bf16, read_all};

}  // namespace harmonium
