// Choosing a token from a row of logits: adjust, report log-probabilities, filter, draw.
// Ranks are by logit, ties by the lower id; of what the filters leave, the greatest logit / temperature + noise is drawn
// (noise.h). Nothing is sorted but the few alternatives that are reported: cuts are found by a radix search over the bits
// of the logits, linear in V whatever the row.
#include "sampling.h"

#include "isa.h"
#include "noise.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace harmonium {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Widens a bound on logits, so that rounding in exp and log cannot cut a token that belongs.
constexpr double kBoundSlack = 1e-2;

const SamplingKernels& kernels() {
#if defined(__x86_64__)
  if (current_isa() == Isa::avx512) return kSamplingAvx512;
  if (current_isa() == Isa::avx2) return kSamplingAvx2;
#endif
  return kSamplingScalar;
}

enum Slot { kSlotBlocks, kSlotAdjusted, kSlotCandidates };

// Tokens that are still in play, ids ascending. e is filled once a filter needs it.
struct Candidates {
  std::int64_t count = 0;
  std::int32_t* id;
  float* x;
  float* e;
};

// Keeps what is greater than `value` and the `ties` lowest ids of what equals it.
struct Cut {
  float value;
  std::int64_t ties;
};

struct Row {
  const SampleRow& spec;
  const SamplingKernels& fn;
  const float* x;  // the logits, adjusted
  std::int64_t vocabulary;
  std::int64_t num_blocks;
  float* block_max;
  double* block_sum;
  float max = -kInfinity;
  int thread;
};

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

// The three pieces of scratch: block maxima and sums; the adjusted logits and a bit a token; id, logit and exp of each
// candidate.
std::int64_t num_blocks_of(std::int64_t vocabulary) { return (vocabulary + kSampleBlock - 1) / kSampleBlock; }
std::int64_t blocks_bytes(std::int64_t vocabulary) { return num_blocks_of(vocabulary) * 12; }
std::int64_t logits_bytes(std::int64_t vocabulary) { return round_up(vocabulary * 4, 64); }
std::int64_t adjusted_bytes(std::int64_t vocabulary) { return logits_bytes(vocabulary) + round_up(vocabulary, 64) / 8; }
std::int64_t candidate_bytes(std::int64_t vocabulary) { return round_up(vocabulary, 16) * 12; }

bool find_max(Row& row) {
  const bool has_nan = row.fn.block_max(row.x, row.vocabulary, row.block_max);
  row.max = *std::max_element(row.block_max, row.block_max + row.num_blocks);
  return has_nan;
}

std::int32_t argmax(const Row& row) {
  const std::int64_t block = std::find(row.block_max, row.block_max + row.num_blocks, row.max) - row.block_max;
  const float* start = row.x + block * kSampleBlock;
  return static_cast<std::int32_t>(std::find(start, row.x + row.vocabulary, row.max) - row.x);
}

void apply_mask(float* x, std::int64_t vocabulary, const std::uint32_t* allowed) {
  for (std::int64_t word = 0; word * 32 < vocabulary; ++word) {
    if (allowed[word] == 0xFFFFFFFFu) continue;
    const int bits = static_cast<int>(std::min<std::int64_t>(32, vocabulary - word * 32));
    for (int bit = 0; bit < bits; ++bit) {
      if (!(allowed[word] >> bit & 1)) x[word * 32 + bit] = -kInfinity;
    }
  }
}

// Each id once, whether it stands in the prompt, the answer or both; `seen` is V zero bits.
void apply_repetition(float* x, const SampleRow& spec, std::uint64_t* seen) {
  const float penalty = static_cast<float>(spec.repetition_penalty);
  const auto apply = [&](const std::int32_t* ids, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint64_t bit = std::uint64_t{1} << (ids[i] % 64);
      if (seen[ids[i] / 64] & bit) continue;
      seen[ids[i] / 64] |= bit;
      float& logit = x[ids[i]];
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
  };
  apply(spec.prompt_ids, spec.num_prompt_ids);
  apply(spec.answer_ids, spec.num_answer_ids);
}

bool needs_adjusting(const SampleRow& spec) {
  const bool penalized = spec.presence_penalty != 0 || spec.frequency_penalty != 0;
  return spec.allowed || spec.num_bias || (penalized && spec.num_answer_ids) ||
         (spec.repetition_penalty != 1 && (spec.num_prompt_ids || spec.num_answer_ids));
}

// Copy the logits to scratch of this thread and apply mask, penalties and bias to the copy. nullptr: no memory.
float* adjusted_logits(const Row& row) {
  const SampleRow& spec = row.spec;
  auto* x = static_cast<float*>(thread_scratch(row.thread, kSlotAdjusted, adjusted_bytes(row.vocabulary)));
  if (!x) return nullptr;
  std::memcpy(x, row.x, row.vocabulary * sizeof(float));
  if (spec.allowed) apply_mask(x, row.vocabulary, spec.allowed);
  if (spec.repetition_penalty != 1) {
    auto* seen = reinterpret_cast<std::uint64_t*>(reinterpret_cast<char*>(x) + logits_bytes(row.vocabulary));
    std::memset(seen, 0, round_up(row.vocabulary, 64) / 8);
    apply_repetition(x, spec, seen);
  }
  for (std::int64_t i = 0; i < spec.num_answer_ids; ++i) {
    if (spec.answer_counts[i] <= 0) continue;
    x[spec.answer_ids[i]] -=
        static_cast<float>(spec.frequency_penalty * spec.answer_counts[i] + spec.presence_penalty);
  }
  for (std::int64_t i = 0; i < spec.num_bias; ++i) x[spec.bias_ids[i]] += spec.bias[i];
  return x;
}

// The limit of a softmax with infinite logits: those share the probability evenly, all others have none.
bool flatten_infinite(Row& row) {
  auto* x = static_cast<float*>(thread_scratch(row.thread, kSlotAdjusted, adjusted_bytes(row.vocabulary)));
  if (!x) return false;
  for (std::int64_t i = 0; i < row.vocabulary; ++i) x[i] = row.x[i] == kInfinity ? 0.0f : -kInfinity;
  row.x = x;
  find_max(row);
  return true;
}

// Point row.x at logits that are adjusted and have a finite maximum.
SampleStatus prepare(Row& row) {
  if (find_max(row)) return SampleStatus::nan;  // before the mask, so that a broken model never passes
  if (needs_adjusting(row.spec)) {
    row.x = adjusted_logits(row);
    if (!row.x) return SampleStatus::out_of_memory;
    find_max(row);
  }
  if (row.max == -kInfinity) return SampleStatus::nothing_allowed;
  if (row.max == kInfinity && !flatten_infinite(row)) return SampleStatus::out_of_memory;
  return SampleStatus::ok;
}

double exp_total(const Row& row, float inverse_temperature) {
  row.fn.block_exp_sum(row.x, row.vocabulary, row.max, inverse_temperature, row.block_sum);
  double total = 0;
  for (std::int64_t b = 0; b < row.num_blocks; ++b) total += row.block_sum[b];
  return total;
}

bool allocate(const Row& row, Candidates& found) {
  const std::int64_t words = round_up(row.vocabulary, 16);
  auto* memory = static_cast<char*>(thread_scratch(row.thread, kSlotCandidates, candidate_bytes(row.vocabulary)));
  if (!memory) return false;
  found.id = reinterpret_cast<std::int32_t*>(memory);
  found.x = reinterpret_cast<float*>(memory + words * 4);
  found.e = reinterpret_cast<float*>(memory + words * 8);
  return true;
}

// A value that at least k logits reach, or minus infinity: k blocks have a maximum that is no less.
float bound_of_top(const Row& row, std::int64_t k, float* work) {
  if (k > row.num_blocks) return -kInfinity;
  std::copy(row.block_max, row.block_max + row.num_blocks, work);
  std::nth_element(work, work + (k - 1), work + row.num_blocks, [](float a, float b) { return a > b; });
  return work[k - 1];
}

// All tokens whose logit is at least `bound`, without those that have no probability at all.
void collect(const Row& row, float bound, Candidates& found) {
  bound = std::max(bound, std::numeric_limits<float>::lowest());
  std::int64_t count = 0;
  for (std::int64_t b = 0; b < row.num_blocks; ++b) {
    if (row.block_max[b] < bound) continue;
    const std::int64_t end = std::min(row.vocabulary, (b + 1) * kSampleBlock);
    for (std::int64_t i = b * kSampleBlock; i < end; ++i) {
      // Written always and counted when it belongs: no branch to mispredict. There are V places.
      found.id[count] = static_cast<std::int32_t>(i);
      found.x[count] = row.x[i];
      count += row.x[i] >= bound;
    }
  }
  found.count = count;
}

// Unsigned integers in the order of floats; both zeros are one value.
std::uint32_t order_key(float x) {
  x += 0.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float value_of_key(std::uint32_t key) {
  const std::uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

constexpr int kMaxBuckets = 2048;
struct Digit {
  int shift, bits;
};
constexpr Digit kDigits[] = {{21, 11}, {10, 11}, {0, 10}};

// The bucket, from the top down, in which `before` (what lies above) grows to the target; else the last that
// holds anything. Adds what lies above it to `before`.
std::uint32_t crossing_bucket(const double* bucket, int count, double target, double& before) {
  int last = 0;
  double above = before, above_last = before;
  for (int b = count - 1; b >= 0; --b) {
    if (bucket[b] == 0) continue;
    last = b;
    above_last = above;
    above += bucket[b];
    if (above >= target) break;
  }
  before = above_last;
  return static_cast<std::uint32_t>(last);
}

// The shortest prefix, by rank, whose weights reach the target. weight nullptr: each counts 1.
Cut find_cut(const Candidates& from, const float* weight, double target) {
  double bucket[kMaxBuckets];
  double before = 0;
  std::uint64_t prefix = 0;
  for (const Digit& digit : kDigits) {
    const std::uint32_t mask = (1u << digit.bits) - 1;
    std::fill(bucket, bucket + mask + 1, 0.0);
    for (std::int64_t i = 0; i < from.count; ++i) {
      const std::uint64_t key = order_key(from.x[i]);
      if (key >> (digit.shift + digit.bits) != prefix) continue;
      bucket[key >> digit.shift & mask] += weight ? static_cast<double>(weight[i]) : 1.0;
    }
    prefix = prefix << digit.bits | crossing_bucket(bucket, static_cast<int>(mask) + 1, target, before);
  }
  const float value = value_of_key(static_cast<std::uint32_t>(prefix));
  double each = 1;
  for (std::int64_t i = 0; weight && i < from.count; ++i) {
    if (from.x[i] == value) {
      each = static_cast<double>(weight[i]);
      break;
    }
  }
  const double ties = each > 0 ? std::ceil((target - before) / each) : 1;
  return {value, static_cast<std::int64_t>(std::min(std::max(ties, 1.0), 4294967296.0))};
}

void keep(Candidates& among, Cut cut, bool with_e) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < among.count; ++i) {
    if (among.x[i] < cut.value || (among.x[i] == cut.value && cut.ties-- <= 0)) continue;
    among.id[count] = among.id[i];
    among.x[count] = among.x[i];
    if (with_e) among.e[count] = among.e[i];
    ++count;
  }
  among.count = count;
}

void select_top(const Row& row, std::int64_t k, Candidates& found) {
  collect(row, bound_of_top(row, k, found.e), found);
  if (found.count > k) keep(found, find_cut(found, nullptr, static_cast<double>(k)), false);
}

// A logit below which no token is in the result of the filters that follow top_k.
float bound_of_filters(const Row& row, double temperature, double total) {
  const SampleRow& spec = row.spec;
  double least = 0;  // of e, so relative to the best token
  // Tokens below (1 - top_p) / V of the whole sum to less than 1 - top_p: the others reach top_p without them.
  if (spec.top_p < 1) least = (1 - spec.top_p) * total / static_cast<double>(row.vocabulary);
  least = std::max(least, spec.min_p);
  if (!(least > 0)) return -kInfinity;
  return static_cast<float>(row.max + temperature * (std::log(least) - kBoundSlack) -
                            kBoundSlack * 1e-4 * std::fabs(row.max));
}

std::int32_t draw_filtered(const Row& row, Candidates& found) {
  const SampleRow& spec = row.spec;
  const double temperature = std::max(spec.temperature, kMinTemperature);
  const float inverse = static_cast<float>(1 / temperature);
  const bool has_top_k = spec.top_k > 0 && spec.top_k < row.vocabulary;
  double total = 0;
  if (has_top_k) {
    select_top(row, spec.top_k, found);
  } else {
    if (spec.top_p < 1) total = exp_total(row, inverse);
    collect(row, bound_of_filters(row, temperature, total), found);
  }
  if (spec.top_p < 1 || spec.min_p > 0) row.fn.exp_scaled(found.x, found.count, row.max, inverse, found.e);
  if (spec.top_p < 1) {
    if (has_top_k) {
      for (std::int64_t i = 0; i < found.count; ++i) total += static_cast<double>(found.e[i]);
    }
    keep(found, find_cut(found, found.e, spec.top_p * total), true);
  }
  const float least = static_cast<float>(spec.min_p);
  Race race(spec.key, spec.temperature);
  std::int64_t panel = -1;
  float least_logit = 0;
  for (std::int64_t i = 0; i < found.count; ++i) {
    if (spec.min_p > 0 && found.e[i] < least) continue;
    if (found.id[i] / kNoisePanel != panel) {
      panel = found.id[i] / kNoisePanel;
      least_logit = race.least_logit(panel);
    }
    if (!(found.x[i] < least_logit)) race.offer(found.id[i], found.x[i]);
  }
  return race.token_id();
}

static_assert(kSampleBlock % kNoisePanel == 0);

void offer_block(const Row& row, std::int64_t block, Race& race) {
  const std::int64_t end = std::min(row.vocabulary, (block + 1) * kSampleBlock);
  for (std::int64_t first = block * kSampleBlock; first < end; first += kNoisePanel) {
    const float least = race.least_logit(first / kNoisePanel);
    if (row.block_max[block] < least) continue;
    for (std::int64_t i = first; i < std::min(end, first + kNoisePanel); ++i) {
      if (!(row.x[i] < least)) race.offer(i, row.x[i]);
    }
  }
}

std::int32_t draw_unfiltered(const Row& row) {
  Race race(row.spec.key, row.spec.temperature);
  // The greatest first: the better the best so far, the fewer of the others need their noise.
  const std::int64_t greatest = std::find(row.block_max, row.block_max + row.num_blocks, row.max) - row.block_max;
  offer_block(row, greatest, race);
  for (std::int64_t block = 0; block < row.num_blocks; ++block) {
    if (block != greatest && row.block_max[block] > -kInfinity) offer_block(row, block, race);
  }
  return race.token_id();
}

SampleStatus draw(const Row& row, std::int32_t* token_id) {
  const SampleRow& spec = row.spec;
  if (spec.temperature == 0) {
    *token_id = argmax(row);
    return SampleStatus::ok;
  }
  const bool has_top_k = spec.top_k > 0 && spec.top_k < row.vocabulary;
  if (!has_top_k && spec.top_p >= 1 && spec.min_p <= 0) {
    *token_id = draw_unfiltered(row);
    return SampleStatus::ok;
  }
  Candidates found;
  if (!allocate(row, found)) return SampleStatus::out_of_memory;
  *token_id = draw_filtered(row, found);
  return SampleStatus::ok;
}

SampleStatus report(const Row& row, const SampleOut& out) {
  const double log_total = std::log(exp_total(row, 1.0f));
  const auto logprob = [&](float x) {
    // Never minus infinity for a token that is allowed: two ends of float32's range lie further apart than it is long.
    const double exact = static_cast<double>(x) - static_cast<double>(row.max) - log_total;
    return static_cast<float>(std::max(exact, static_cast<double>(std::numeric_limits<float>::lowest())));
  };
  *out.logprob = logprob(row.x[*out.token_id]);
  if (row.spec.num_top <= 0) return SampleStatus::ok;
  Candidates found;
  if (!allocate(row, found)) return SampleStatus::out_of_memory;
  select_top(row, std::min<std::int64_t>(row.spec.num_top, row.vocabulary), found);
  std::int32_t* ids = found.id;
  std::sort(ids, ids + found.count, [&](std::int32_t a, std::int32_t b) {
    return row.x[a] != row.x[b] ? row.x[a] > row.x[b] : a < b;
  });
  for (std::int64_t i = 0; i < found.count; ++i) {
    out.top_id[i] = ids[i];
    out.top_logprob[i] = logprob(row.x[ids[i]]);
  }
  return SampleStatus::ok;
}

}  // namespace

std::int64_t sampling_thread_bytes(std::int64_t vocabulary) {
  return blocks_bytes(vocabulary) + adjusted_bytes(vocabulary) + candidate_bytes(vocabulary);
}

void sample_row(const float* logits, std::int64_t vocabulary, const SampleRow& spec, int max_top, int thread,
                const SampleOut& out) {
  *out.token_id = -1;
  *out.logprob = kNaN;
  std::fill(out.top_id, out.top_id + max_top, -1);
  std::fill(out.top_logprob, out.top_logprob + max_top, kNaN);
  const std::int64_t num_blocks = num_blocks_of(vocabulary);
  auto* sums = static_cast<double*>(thread_scratch(thread, kSlotBlocks, blocks_bytes(vocabulary)));
  if (!sums) {
    *out.status = SampleStatus::out_of_memory;
    return;
  }
  Row row{spec, kernels(), logits, vocabulary, num_blocks, reinterpret_cast<float*>(sums + num_blocks), sums,
          -kInfinity, thread};
  *out.status = prepare(row);
  if (*out.status == SampleStatus::ok) *out.status = draw(row, out.token_id);
  if (*out.status == SampleStatus::ok && spec.num_top >= 0) *out.status = report(row, out);
}

}  // namespace harmonium
