// Small things that the matrix files of this folder share.
#pragma once

#include <immintrin.h>
#include <string.h>

#include <cstdint>

#include "matmul.h"

namespace harmonium {

namespace {

using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr uint32_t kNan = 0x7fc00000u;

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline int32_t dword(const uint8_t* p) {
  int32_t value;
  memcpy(&value, p, sizeof value);
  return value;
}

inline __m512 expand_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Positions of the even (odd) of 32 elements in two registers.
inline __m512i even_index() { return _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0); }
inline __m512i odd_index() { return _mm512_add_epi32(even_index(), _mm512_set1_epi32(1)); }

// Doubled e2m1 values + 12, in each 128-bit lane.
inline __m512i mxfp4_table() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
}

// Dwords e << 23 to the float32 2^(e - 127): 0 becomes the denormal, 255 (infinity so far) NaN.
inline __m512 finish_e8m0(__m512i shifted) {
  const __m512 value = _mm512_castsi512_ps(_mm512_max_epu32(shifted, _mm512_set1_epi32(0x00400000)));
  // Four bits for each class of number: class 5, plus infinity, becomes 3, the default NaN; the rest stay (0).
  return _mm512_fixupimm_ps(value, value, _mm512_set1_epi32(3 << 20), 0);
}

// Memory that comes into L2 evenly over the steps of a loop.
struct Ahead {
  const char* at;
  const char* end;
  int64_t rest = 0;    // of a line, in 1/1024
  int64_t step;  // lines a block, in 1/1024

  Ahead(Next next, int64_t num_steps)
      : at(reinterpret_cast<const char*>(next.data)),
        end(at + next.bytes),
        step((next.bytes / 64 * 1024 + num_steps - 1) / num_steps) {}

  inline __attribute__((always_inline)) void go_on() {
    for (rest += step; rest >= 1024 && at < end; rest -= 1024, at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

}  // namespace

}  // namespace harmonium
