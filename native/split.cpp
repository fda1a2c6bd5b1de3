// Split weights: int8 in two halves of four bits, and logits that read the low halves only where they may matter.
//
// A weight's byte is v = q + 120 + d, where d (0 to 15) is a pseudorandom number of its input, the same in all rows.
// Whatever q is, the low half of v is then evenly distributed over d; so q is 16 high + 7.5 - 120 - d, give or take an
// error that takes each of -7.5, -6.5, ..., 7.5 with the same probability, independently for each input. (Such
// subtractive dither is what digital audio uses to make rounding errors independent of the signal: Lipshitz,
// Wannamaker, Vanderkooy, "Quantization and Dither: A Theoretical Survey", 1992.) Such an error is the sum of four
// fair coins (4, 2, 1 and 1/2), which Hoeffding's lemma bounds: the sum S of errors times c_i is above t with
// probability at most exp(-t^2 / (2 * 21.25 * sum c_i^2)), 21.25 being an error's variance.
//
// With t for a probability of 2^-79, an estimate of one of 2^18 logits is off by more in fewer than one row of 2^60:
// less often than memory flips a bit. A logit whose estimate plus t is below the k-th greatest exact one so far is
// none of the k greatest, and its low halves are not read. A draw takes the greatest logit / temperature + noise
// (noise.h), and the noise is known: there estimates plus t are held against the greatest such sum so far.
#include <cmath>
#include <limits>

#include "noise.h"
#include "tiles.h"

namespace harmonium {

namespace {

// 2 * 21.25 * ln(2^79): times the sum of c_i^2 it is t^2.
constexpr double kSquares = 2 * 21.25 * 79 * 0.6931471805599453;

// What sums in float32 may be off by, of the estimate and of the exact logit, as a factor of t. A block's term is at most
// 512 times the sum of its |c_i|, which is at most sqrt(inputs) times the root of the sum of their squares.
float rounding(std::int64_t num_inputs) {
  const double each = static_cast<double>(num_inputs / kBlock + 8) * 0x1p-24;
  return static_cast<float>(1 + 2 * each * 512 * std::sqrt(static_cast<double>(num_inputs) / kSquares));
}

// Estimates beyond these prove nothing: numbers may have overflowed or vanished on the way.
constexpr float kLeastVariance = 1e-30f;
constexpr float kMostEstimate = 1e30f;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A byte for each input.
std::vector<std::uint8_t> dither_of(std::int64_t num_inputs) {
  std::vector<std::uint8_t> dither(static_cast<std::size_t>(num_inputs));
  for (std::int64_t i = 0; i < num_inputs; ++i) dither[i] = random_number(0, i / 16) >> (i % 16 * 4) & 15;
  return dither;
}

// Element i of block b in an activation row.
std::int64_t byte_of(std::int64_t b, int i) {
  return b / kGroupBlocks * kGroupBytes + b % kGroupBlocks * 16 + (i & 1) * 64 + i / 2;
}

const std::uint8_t* high_of(const Weight& weight, std::int64_t panel) {
  return weight.data + panel * split_high_bytes(weight.num_inputs / kBlock);
}
const std::uint8_t* low_of(const Weight& weight, std::int64_t panel) {
  const std::int64_t num_blocks = weight.num_inputs / kBlock, num_panels = ceil_div(weight.num_outputs, kPanelRows);
  return weight.data + num_panels * split_high_bytes(num_blocks) + panel * split_low_bytes(num_blocks);
}

// What estimates need of a row of activations: center and square of each block.
void describe(const std::uint8_t* row, std::int64_t num_blocks, float* center, float* square) {
  const auto* q = reinterpret_cast<const std::int8_t*>(row);
  const auto* scale = reinterpret_cast<const float*>(row + scale_offset(num_blocks));
  const auto* start = reinterpret_cast<const std::int32_t*>(row + start_offset(num_blocks));
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    std::int32_t sum = 0, squares = 0;
    for (int i = 0; i < kBlock; ++i) {
      const std::int32_t value = q[byte_of(b, i)];
      sum += value;
      squares += value * value;
    }
    center[b] = scale[b] * (static_cast<float>(start[b]) + 7.5f * static_cast<float>(sum));
    square[b] = static_cast<float>(kSquares * squares) * scale[b] * scale[b];
  }
}

// The `keep` greatest logits that a thread has seen, and the least of them once there are so many.
class Best {
 public:
  explicit Best(std::int64_t keep) : keep_(static_cast<std::size_t>(keep)) {}

  // Returns the least of the kept, minus infinity while there are fewer.
  float add(float value) {
    if (heap_.size() < keep_) {
      heap_.push_back(value);
      std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
    } else if (keep_ && value > heap_.front()) {
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
      heap_.back() = value;
      std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
    }
    return heap_.size() < keep_ ? -kInfinity : heap_.front();
  }

 private:
  std::size_t keep_;
  std::vector<float> heap_;
};

void raise(std::atomic<double>& least, double value) {
  double seen = least.load(std::memory_order_relaxed);
  while (value > seen && !least.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

static_assert(kPanelRows == kNoisePanel);

// What a thread has seen of a row: the greatest of those that are looked for.
class Seen {
 public:
  explicit Seen(const ScreenRow& row) : draws_(row.draws()), best_(row.keep), race_(row.key, row.temperature) {}

  // Returns what another must reach to matter, as far as this thread knows.
  double add(std::int64_t output, float logit) {
    if (!draws_) return best_.add(logit);
    race_.offer(output, logit);
    return race_.best();
  }

 private:
  bool draws_;
  Best best_;
  Race race_;
};

// One call: what its threads share.
struct Screening {
  const Weight& weight;
  const ScreenRow* rows;
  int num_rows;
  Rows x;
  const float* center;
  const float* square;
  float* out;
  float margin;
  std::vector<Race> race;  // of each row
  std::atomic<double> least[kScreenRows];  // what another logit, or its score in the race, must reach
  std::atomic<std::int64_t> num_read{0};

  // The outputs of a panel that a row allows: a bit for each.
  unsigned allowed(int row, std::int64_t panel) const {
    const std::int64_t first = panel * kPanelRows, left = weight.num_outputs - first;
    const unsigned there = left >= kPanelRows ? 0xffffu : (1u << left) - 1;
    const std::uint32_t* bits = rows[row].allowed;
    return bits ? bits[first / 32] >> (first % 32) & there : there;
  }

  // Whether all of the panel are certainly below `needed`, which most panels are: no roots, no branches. The bound is below
  // it if its square is below the distance's; the last factor is more than the squares are rounded by.
  bool are_below(const Estimate& estimate, float needed) const {
    const float factor = margin * margin * 1.00001f;
    int count = 0;
    for (int lane = 0; lane < kPanelRows; ++lane) {
      const float value = estimate.value[lane], variance = estimate.variance[lane], distance = needed - value;
      count += (variance >= kLeastVariance) & (std::fabs(value) <= kMostEstimate) & (distance > 0) &
               (variance * factor < distance * distance);
    }
    return count == kPanelRows;
  }

  // Whether an output of the panel may be one of those that a row keeps or draws.
  bool may_matter(int row, std::int64_t panel, unsigned lanes, const Estimate& estimate) const {
    const double threshold = least[row].load(std::memory_order_relaxed);
    const bool draws = rows[row].draws();
    const float needed = draws ? race[row].least_logit(panel, threshold) : static_cast<float>(threshold);
    if (are_below(estimate, needed)) return false;
    for (int lane = 0; lane < kPanelRows; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      const float value = estimate.value[lane], variance = estimate.variance[lane];
      if (!(variance >= kLeastVariance) || !(std::fabs(value) <= kMostEstimate)) return true;
      const float bound = value + margin * std::sqrt(variance);
      if (bound < needed) continue;
      if (!draws || !(race[row].score(bound, race[row].noise(panel * kPanelRows + lane)) < threshold)) return true;
    }
    return false;
  }

  bool is_wanted(std::int64_t panel, unsigned* lanes) const {
    unsigned any = 0, whole = 0;
    for (int row = 0; row < num_rows; ++row) {
      any |= lanes[row] = allowed(row, panel);
      if (rows[row].takes_all()) whole |= lanes[row];
    }
    if (!any || whole) return any != 0;
    Estimate estimate[kScreenRows];
    split_table().estimate(high_of(weight, panel), weight.num_inputs / kBlock, x.data, x.row_bytes, center, square,
                           num_rows, estimate);
    for (int row = 0; row < num_rows; ++row) {
      if (may_matter(row, panel, lanes[row], estimate[row])) return true;
    }
    return false;
  }

  void write(std::int64_t panel, const unsigned* lanes, const float* tile, std::vector<Seen>& seen) {
    const std::int64_t first = panel * kPanelRows;
    const auto count = std::min<std::int64_t>(kPanelRows, weight.num_outputs - first);
    for (int row = 0; row < num_rows; ++row) {
      float* to = out + row * weight.num_outputs + first;
      double known = -kInfinity;
      for (std::int64_t lane = 0; lane < count; ++lane) {
        const bool is_there = tile && (lanes[row] >> lane & 1);
        to[lane] = is_there ? tile[row * kTileRows + lane] : -kInfinity;
        if (is_there && !rows[row].takes_all()) known = seen[row].add(first + lane, to[lane]);
      }
      raise(least[row], known);
    }
  }
};

}  // namespace

void quantize_split_row(const float* x, std::int64_t num_inputs, std::uint8_t* row) {
  int8_table().quantize_row(x, num_inputs, kSplitOffset, 1.0f, row);
  const std::vector<std::uint8_t> dither = dither_of(num_inputs);
  const std::int64_t num_blocks = num_inputs / kBlock;
  const auto* q = reinterpret_cast<const std::int8_t*>(row);
  auto* start = reinterpret_cast<std::int32_t*>(row + start_offset(num_blocks));
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    for (int i = 0; i < kBlock; ++i) start[b] -= dither[b * kBlock + i] * q[byte_of(b, i)];
  }
}

void quantize_split(const std::uint16_t* weight, std::int64_t num_outputs, std::int64_t num_inputs,
                    std::uint8_t* split) {
  const std::int64_t num_blocks = num_inputs / kBlock, num_panels = ceil_div(num_outputs, kPanelRows);
  const std::vector<std::uint8_t> dither = dither_of(num_inputs);
  std::uint8_t* low = split + num_panels * split_high_bytes(num_blocks);
  std::atomic<bool> out_of_memory{false};
  parallel(num_panels, [&](std::int64_t task, int thread) {
    const std::int64_t first = task * kPanelRows;
    const int num_rows = static_cast<int>(std::min<std::int64_t>(kPanelRows, num_outputs - first));
    auto* panel = static_cast<std::uint8_t*>(thread_scratch(thread, kDecoded, panel_bytes(num_blocks)));
    if (!panel) {
      out_of_memory = true;
      return;
    }
    int8_table().quantize_panel(weight + first * num_inputs, num_rows, num_inputs, kSplitMost, panel);
    split_table().split_panel(panel, num_blocks, dither.data(), split + task * split_high_bytes(num_blocks),
                              low + task * split_low_bytes(num_blocks));
  });
  if (out_of_memory) throw std::bad_alloc();
}

void split_product(const Weight& weight, std::int64_t first, int num_panels, const Rows& x, const std::int32_t* token,
                   int num_tokens, std::uint8_t* decoded, Next next, float* tile) {
  const SplitTable& table = split_table();
  const std::int64_t num_blocks = weight.num_inputs / kBlock, panel = first / kPanelRows;
  if (table.product) {
    table.product(high_of(weight, panel), low_of(weight, panel), num_panels, num_blocks, x.data, x.row_bytes, token,
                  num_tokens, next, tile);
    return;
  }
  for (int p = 0; p < num_panels; ++p) {
    table.join(high_of(weight, panel + p), low_of(weight, panel + p), num_blocks,
               decoded + p * panel_bytes(num_blocks));
  }
  int8_table().panel_product(decoded, num_panels, num_blocks, kInt8Offset, x.data, x.row_bytes, token, num_tokens, next,
                             tile);
}

std::int64_t screen(const float* x, std::int64_t num_rows, const Weight& weight, const ScreenRow* rows, float* out) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  std::uint8_t* memory = arena().take(linear_scratch_bytes(num_rows, weight.num_inputs));
  const std::int64_t num_blocks = weight.num_inputs / kBlock, num_panels = ceil_div(weight.num_outputs, kPanelRows);
  std::vector<float> center(num_rows * num_blocks), square(num_rows * num_blocks);
  std::vector<std::int32_t> token(num_rows);
  Screening screening{weight,        rows,          static_cast<int>(num_rows),
                      prepare(weight, Activations::int8, x, nullptr, num_rows, memory),
                      center.data(), square.data(), out, rounding(weight.num_inputs), {}, {}, {}};
  for (int row = 0; row < screening.num_rows; ++row) {
    describe(memory + row * screening.x.row_bytes, num_blocks, &center[row * num_blocks], &square[row * num_blocks]);
    token[row] = row;
    screening.race.emplace_back(rows[row].key, rows[row].temperature);
    screening.least[row] = -kInfinity;
  }
  std::atomic<std::int64_t> taken{0};
  std::atomic<bool> out_of_memory{false};
  const auto ends = run_ends(num_panels, true);
  const auto num_runs = static_cast<std::int64_t>(ends.size());
  parallel(std::min<std::int64_t>(num_threads(), num_runs), [&](std::int64_t, int thread) {
    auto* decoded = static_cast<std::uint8_t*>(thread_scratch(thread, kDecoded, 2 * panel_bytes(num_blocks)));
    if (!decoded) {
      out_of_memory = true;
      return;
    }
    std::vector<Seen> seen(rows, rows + num_rows);
    float tile[kScreenRows * kTileRows];
    std::int64_t num_read = 0;
    for (std::int64_t run = taken++; run < num_runs; run = taken++) {
      for (std::int64_t panel = run ? ends[run - 1] : 0; panel < ends[run]; ++panel) {
        unsigned lanes[kScreenRows];
        const bool is_read = screening.is_wanted(panel, lanes);
        if (is_read) {
          split_product(weight, panel * kPanelRows, 1, screening.x, token.data(), screening.num_rows, decoded,
                        Next{nullptr, 0}, tile);
        }
        num_read += is_read;
        screening.write(panel, lanes, is_read ? tile : nullptr, seen);
      }
    }
    screening.num_read += num_read;
  });
  if (out_of_memory) throw std::bad_alloc();
  return screening.num_read;
}

}  // namespace harmonium
