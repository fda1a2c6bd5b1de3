// Choosing a token from a row of logits. The specification is harmonium/kernels/reference_sampling.py.
#pragma once

#include <cstdint>

namespace harmonium {

// Logits a block of the hot loops: 256 makes 786 blocks of the real vocabulary, so that the k-th best block maximum
// bounds the k-th best logit for every usual k, and a block of floats lies in the first-level cache.
constexpr std::int64_t kSampleBlock = 256;

// The loops over all V logits, compiled once an instruction set from one body: the same bits from each of them.
// Blocks are kSampleBlock long, the last one may be shorter.
struct SamplingKernels {
  // max_of_block[b] = greatest logit of block b, NaN skipped; true if any logit is NaN.
  bool (*block_max)(const float* x, std::int64_t n, float* max_of_block);
  // sum_of_block[b] = sum over block b of exp((x - max) * inverse_temperature); max is finite.
  void (*block_exp_sum)(const float* x, std::int64_t n, float max, float inverse_temperature, double* sum_of_block);
  // out[i] = exp((x[i] - max) * inverse_temperature); exactly 1 where x[i] is max, 0 below about 1e-38.
  void (*exp_scaled)(const float* x, std::int64_t n, float max, float inverse_temperature, float* out);
};

extern const SamplingKernels kSamplingScalar;
extern const SamplingKernels kSamplingAvx2;
extern const SamplingKernels kSamplingAvx512;

// What one row asks for. Ids are checked by the caller: 0 <= id < V.
struct SampleRow {
  std::int64_t row = 0;   // which row of the logits
  std::uint64_t key = 0;  // of the draw's random numbers (noise.h)
  double temperature = 0;
  std::int64_t top_k = 0;  // 0: off
  double top_p = 1;
  double min_p = 0;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  double repetition_penalty = 1;
  int num_top = -1;  // alternatives to report; -1: not even the chosen token's log-probability
  const std::int32_t* prompt_ids = nullptr;
  std::int64_t num_prompt_ids = 0;
  const std::int32_t* answer_ids = nullptr;
  const std::int32_t* answer_counts = nullptr;
  std::int64_t num_answer_ids = 0;
  const std::int32_t* bias_ids = nullptr;
  const float* bias = nullptr;
  std::int64_t num_bias = 0;
  const std::uint32_t* allowed = nullptr;  // bit id % 32 of word id / 32
};

enum class SampleStatus : std::int32_t { ok = 0, nan = 1, nothing_allowed = 2, out_of_memory = 3 };

struct SampleOut {
  SampleStatus* status;
  std::int32_t* token_id;
  float* logprob;         // NaN unless asked
  std::int32_t* top_id;   // [max_top], -1 past the last
  float* top_logprob;     // [max_top], NaN past the last
};

// Scratch that a thread keeps once it has sampled a row with every setting in use.
std::int64_t sampling_thread_bytes(std::int64_t vocabulary);

// Sample one row in the calling thread; `thread` names its scratch.
void sample_row(const float* logits, std::int64_t vocabulary, const SampleRow& row, int max_top, int thread,
                const SampleOut& out);

}  // namespace harmonium
