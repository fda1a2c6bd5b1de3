// Low-rank products: what a LoRA adapter adds to a product of the model, out += scale * (x . a^T) . b, for the rows
// that are its own. harmonium/kernels/reference_matmul.py is the specification in NumPy.
#pragma once

#include <cstdint>

namespace harmonium {

// A pair, or one for each expert. a: [E, rank, num_inputs], b: [E, rank, num_outputs], float32 or bf16 bits.
struct LowRank {
  const void* a = nullptr;  // null: there is none
  const void* b = nullptr;
  bool is_bf16 = false;
  float scale = 0;
  std::int64_t rank = 0, num_inputs = 0, num_outputs = 0;
};

// One instruction set's kernels; each runs on the calling thread. A result depends on its own row alone.
struct LowRankTable {
  // u[j] = scale * (a[j] . x) for j < rank, of expert `expert`.
  void (*shrink)(const LowRank& pair, std::int64_t expert, const float* x, float* u);
  // out[i] += sum over j of u[j] * b[j][first + i] for i < count, j in order.
  void (*expand)(const LowRank& pair, std::int64_t expert, const float* u, std::int64_t first, std::int64_t count,
                 float* out);
};

extern const LowRankTable kLowRankScalar;
extern const LowRankTable kLowRankAvx2;
extern const LowRankTable kLowRankAvx512;

// The table of the instruction set in use.
const LowRankTable& low_rank_table();

// What one adapter adds to the experts of a layer; either may be missing.
struct ExpertAdapter {
  LowRank gate_up;  // [E, rank, D], [E, rank, 2F]
  LowRank down;     // [E, rank, F], [E, rank, D]
};

// The adapters of a step. of_token: index into `list`, or -1: none.
struct ExpertAdapters {
  const ExpertAdapter* list;
  const std::int32_t* of_token;
  std::int64_t max_rank;
};

// out[row[i]][column...] += the product with x[row[i]], for num_rows different rows of x [., num_inputs] and
// out [., out_width]. Throws std::bad_alloc.
void low_rank(const float* x, const std::int32_t* row, std::int64_t num_rows, const LowRank& pair, float* out,
              std::int64_t out_width, std::int64_t column);

}  // namespace harmonium
