// The driver of low-rank products for dense weights; matmul.cpp calls the kernels itself for experts.
#include "low_rank.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace harmonium {

namespace {

constexpr std::int64_t kRowsPerTask = 4;
constexpr std::int64_t kColumnsPerTask = 1024;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

const LowRankTable& low_rank_table() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512: return kLowRankAvx512;
    case Isa::avx2: return kLowRankAvx2;
    case Isa::scalar: break;
  }
#endif
  return kLowRankScalar;
}

void low_rank(const float* x, const std::int32_t* row, std::int64_t num_rows, const LowRank& pair, float* out,
              std::int64_t out_width, std::int64_t column) {
  const LowRankTable& table = low_rank_table();
  std::vector<float> inner(num_rows * pair.rank);
  const std::int64_t row_tasks = ceil_div(num_rows, kRowsPerTask);
  parallel(row_tasks, [&](std::int64_t task, int) {
    for (std::int64_t i = task * kRowsPerTask; i < std::min(num_rows, (task + 1) * kRowsPerTask); ++i) {
      table.shrink(pair, 0, x + row[i] * pair.num_inputs, inner.data() + i * pair.rank);
    }
  });
  // Rows within a run of columns: that part of b stays in the cache.
  parallel(row_tasks * ceil_div(pair.num_outputs, kColumnsPerTask), [&](std::int64_t task, int) {
    const std::int64_t first = task / row_tasks * kColumnsPerTask, begin = task % row_tasks * kRowsPerTask;
    const std::int64_t count = std::min(kColumnsPerTask, pair.num_outputs - first);
    for (std::int64_t i = begin; i < std::min(num_rows, begin + kRowsPerTask); ++i) {
      table.expand(pair, 0, inner.data() + i * pair.rank, first, count, out + row[i] * out_width + column + first);
    }
  });
}

}  // namespace harmonium
