// The random numbers of a draw: for each token of a vocabulary standard Gumbel noise, which depends on a key and the
// token's id alone. The greatest of logit / temperature + noise belongs to each token with its softmax probability, so a
// token that cannot have the greatest needs no logit, and nothing has to be summed. The specification is
// harmonium/kernels/reference_sampling.py.
//
// Minus the logarithm of an exponential waiting time is such noise. Sixteen tokens (a panel) get their times together: the
// first of sixteen is as long as one of rate 16, each of them is it with the same probability, and the others take that
// long and, since such times have no memory, another exponential time of their own. So one number bounds sixteen.
//
// Source: the Gumbel-max trick, e.g. Maddison, Tarlow, Minka 2014 (arXiv:1411.0030), section 2; SplitMix64, S. Vigna.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace harmonium {

constexpr std::int64_t kNoisePanel = 16;

// Lower temperatures are computed as this one: 1 / temperature stays finite in float32.
constexpr double kMinTemperature = 1e-6;

constexpr double kLn2 = 0.6931471805599453;

// SplitMix64's output from its state.
inline std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The n-th number of the sequence that a key starts.
inline std::uint64_t random_number(std::uint64_t key, std::uint64_t n) {
  return mix(key + (n + 1) * 0x9e3779b97f4a7c15u);
}

// Evenly distributed above 0 and below 1: an odd multiple of 2^-53, from the upper 52 bits.
inline double fraction_of(std::uint64_t number) { return (static_cast<double>(number >> 12) + 0.5) * 0x1p-52; }

// The natural logarithm of a normal number, by operations that round alike everywhere; the C library's do not. x = 2^n m
// with m around 1, and ln m is twice the series s + s^3 / 3 + s^5 / 5 ... of s = (m - 1) / (m + 1), here to s^19.
inline double natural_log(double x) {
  std::int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::int64_t n = (bits - 0x3fe6a09e00000000) >> 52;  // less the bits of the root of 1/2
  bits -= n * (std::int64_t{1} << 52);
  double m;
  std::memcpy(&m, &bits, sizeof m);
  const double s = (m - 1) / (m + 1), z = s * s;
  double series = 1.0 / 19;
  series = series * z + 1.0 / 17;
  series = series * z + 1.0 / 15;
  series = series * z + 1.0 / 13;
  series = series * z + 1.0 / 11;
  series = series * z + 1.0 / 9;
  series = series * z + 1.0 / 7;
  series = series * z + 1.0 / 5;
  series = series * z + 1.0 / 3;
  return static_cast<double>(n) * kLn2 + (2 * s + 2 * s * (z * series));
}

// Exponentially distributed, mean 1.
inline double waiting_time(std::uint64_t number) { return -natural_log(1 - fraction_of(number)); }

inline double noise_of(std::uint64_t key, std::int64_t token) {
  constexpr std::uint64_t kTokens = std::uint64_t{1} << 32;  // behind the numbers of panels
  const std::uint64_t first = random_number(key, static_cast<std::uint64_t>(token / kNoisePanel));
  double time = waiting_time(first) * (1.0 / kNoisePanel);
  if (static_cast<std::int64_t>(first & (kNoisePanel - 1)) != token % kNoisePanel) {
    time += waiting_time(random_number(key, kTokens + static_cast<std::uint64_t>(token)));
  }
  return -natural_log(time);
}

// A bound on the noise of a panel's tokens, without a logarithm, and 0.06 too great at the most where noise is great: a
// waiting time is no less than its fraction, and a number's bits are a lower bound of its logarithm to base 2.
inline double most_noise(std::uint64_t key, std::int64_t panel) {
  const double fraction = fraction_of(random_number(key, static_cast<std::uint64_t>(panel)));
  std::int64_t bits;
  std::memcpy(&bits, &fraction, sizeof bits);
  constexpr double kSlack = 1e-9;  // for rounding
  return (1023 + 4) * kLn2 - static_cast<double>(bits) * (kLn2 * 0x1p-52) + kSlack;
}

// A choice among tokens that are offered: the one whose logit / temperature + noise is the greatest. Where that rounds to
// the same number, the greater logit, then the greater noise decides; so the order of offers does not matter.
class Race {
 public:
  Race(std::uint64_t key, double temperature)
      : key_(key), temperature_(std::max(temperature, kMinTemperature)), inverse_temperature_(1 / temperature_) {}

  double best() const { return best_; }
  std::int32_t token_id() const { return token_id_; }

  // Rises with both.
  double score(float logit, double noise) const { return static_cast<double>(logit) * inverse_temperature_ + noise; }

  double noise(std::int64_t token) const { return noise_of(key_, token); }

  // Logits below it cannot score `best`, whichever token of the panel they are of. Not a number: nothing is known.
  float least_logit(std::int64_t panel, double best) const {
    const double most = most_noise(key_, panel), slack = 1e-6 * (std::fabs(best) + most);  // for rounding
    return static_cast<float>((best - most - slack) * temperature_);
  }
  float least_logit(std::int64_t panel) const { return least_logit(panel, best_); }

  void offer(std::int64_t token, float logit) {
    if (!(logit > -std::numeric_limits<float>::infinity())) return;
    const double noise = noise_of(key_, token), found = score(logit, noise);
    if (found < best_ || (found == best_ && !(logit > logit_ || (logit == logit_ && noise > noise_)))) return;
    best_ = found;
    logit_ = logit;
    noise_ = noise;
    token_id_ = static_cast<std::int32_t>(token);
  }

 private:
  std::uint64_t key_;
  double temperature_, inverse_temperature_;
  double best_ = -std::numeric_limits<double>::infinity();
  float logit_ = -std::numeric_limits<float>::infinity();
  double noise_ = 0;
  std::int32_t token_id_ = -1;
};

}  // namespace harmonium
