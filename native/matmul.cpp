// The drivers: group tokens, cut the work into tasks, call the kernels of the instruction set in use.
#include "matmul.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace harmonium {

namespace {

constexpr std::int64_t kMaxTileTokens = 128;  // tokens of a task: a decoded panel is used for so many
constexpr std::int64_t kHugePage = 2 << 20;

enum Slot { kDecoded = 0, kTile = 1, kOrdered = 7 };

// The tables of the instruction set in use.
#if defined(__x86_64__)
template <typename Table>
const Table& choose(const Table& scalar, const Table& avx2, const Table& avx512) {
  if (current_isa() == Isa::avx512) return avx512;
  return current_isa() == Isa::avx2 ? avx2 : scalar;
}
const Int8Table& int8_table() { return choose(kScalarInt8, kAvx2Int8, kAvx512Int8); }
const PackedTable& packed_table() { return choose(kScalarPacked, kAvx2Packed, kAvx512Packed); }
const Bf16Table& bf16_table() { return choose(kScalarBf16, kAvx2Bf16, kAvx512Bf16); }
const TileTable& tile_table() { return choose(kScalarTile, kAvx2Tile, kAvx512Tile); }
#else
const Int8Table& int8_table() { return kScalarInt8; }
const PackedTable& packed_table() { return kScalarPacked; }
const Bf16Table& bf16_table() { return kScalarBf16; }
const TileTable& tile_table() { return kScalarTile; }
#endif

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// One buffer for what the threads of a call share. It grows and stays; a call holds the lock from take to its end.
struct Arena {
  std::mutex mutex;
  std::uint8_t* data = nullptr;
  std::int64_t size = 0;

  std::uint8_t* take(std::int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = nullptr;
      size = 0;
      const std::int64_t align = bytes >= kHugePage ? kHugePage : 4096;
      const std::int64_t wanted = round_up(bytes, align);
      data = static_cast<std::uint8_t*>(std::aligned_alloc(align, wanted));
      if (!data) throw std::bad_alloc();
      size = wanted;
#if defined(__linux__)
      if (align == kHugePage) madvise(data, wanted, MADV_HUGEPAGE);
#endif
    }
    return data;
  }
};

Arena& arena() {
  // Never destroyed: threads may outlive static destructors.
  static Arena* a = [] {
    auto* made = new Arena;
    // A child of fork has no other threads: a lock that one of them held would stay locked, so it starts afresh.
    pthread_atfork(nullptr, nullptr, [] { new (&arena()) Arena; });
    return made;
  }();
  return *a;
}

std::int64_t row_bytes_of(Activations activations, std::int64_t num_inputs) {
  return activations == Activations::int8 ? int8_row_bytes(num_inputs / kBlock) : round_up(num_inputs * 2, 64);
}

// Activations as the products take them: a row every row_bytes.
struct Rows {
  const std::uint8_t* data;
  std::int64_t row_bytes;
  Activations kind;
};

// What a weight needs done to int8 activations: its offset, and the half that doubled e2m1 values owe.
void prepare_row(const Weight& weight, Activations kind, const float* x, std::uint8_t* row) {
  if (kind == Activations::bf16) {
    bf16_table().round_row(x, weight.num_inputs, reinterpret_cast<std::uint16_t*>(row));
  } else if (weight.kind == Weight::Kind::mxfp4 || weight.kind == Weight::Kind::packed ||
             weight.kind == Weight::Kind::ggml) {
    int8_table().quantize_row(x, weight.num_inputs, kMxfp4Offset, 0.5f, row);
  } else {
    int8_table().quantize_row(x, weight.num_inputs, kInt8Offset, 1.0f, row);
  }
}

Rows prepare(const Weight& weight, Activations kind, const float* x, std::int64_t num_rows, std::uint8_t* memory) {
  const std::int64_t row_bytes = row_bytes_of(kind, weight.num_inputs);
  constexpr std::int64_t kRowsTogether = 4;  // about 4 microseconds
  parallel(ceil_div(num_rows, kRowsTogether), [&](std::int64_t task, int) {
    for (std::int64_t r = task * kRowsTogether; r < std::min(num_rows, (task + 1) * kRowsTogether); ++r) {
      prepare_row(weight, kind, x + r * weight.num_inputs, memory + r * row_bytes);
    }
  });
  return {memory, row_bytes, kind};
}

std::int64_t decoded_bytes(const Weight& weight, Activations kind) {
  if (kind == Activations::int8) return 2 * panel_bytes(weight.num_inputs / kBlock);
  return weight.num_inputs * kTileRows * 2;
}

// Columns first..first + 31 of a [K, N] weight, missing ones zero.
void copy_columns(const Weight& weight, const std::uint16_t* data, std::int64_t first, int num_rows,
                  std::uint16_t* out) {
  for (std::int64_t k = 0; k < weight.num_inputs; ++k) {
    const std::uint16_t* from = data + k * weight.num_outputs + first;
    std::copy(from, from + num_rows, out + k * kTileRows);
    std::fill(out + k * kTileRows + num_rows, out + (k + 1) * kTileRows, std::uint16_t{0});
  }
}

// The same for a packed tile: as it lies for few tokens, decoded once for many.
float* packed_product(const Weight& weight, std::int64_t expert, std::int64_t first, int num_panels,
                            const Rows& x, const std::int32_t* token, int num_tokens, int thread, float* tile) {
  const std::int64_t num_blocks = weight.num_inputs / kBlock;
  const std::int64_t at = expert * ceil_div(weight.num_outputs, kTileRows) + first / kTileRows;
  const std::uint8_t* packed = weight.data + at * packed_bytes(num_blocks);
  if (num_tokens < int8_table().panel_tokens) {
    packed_table().product(packed, num_blocks, x.data, x.row_bytes, token, num_tokens, tile);
    return tile;
  }
  auto* panels = static_cast<std::uint8_t*>(thread_scratch(thread, kDecoded, decoded_bytes(weight, x.kind)));
  if (!panels) return nullptr;
  packed_table().to_panels(packed, num_blocks, panels);
  const std::int64_t bytes = packed_bytes(num_blocks);
  int8_table().panel_product(panels, num_panels, num_blocks, kMxfp4Offset, x.data, x.row_bytes, token, num_tokens,
                             {packed + bytes, bytes}, tile);
  return tile;
}

// Products of outputs first..first + num_rows - 1 of one expert with the rows token[0..num_tokens) of x.
// Returns the tile, or null when memory is out.
float* product(const Weight& weight, std::int64_t expert, std::int64_t first, int num_rows, const Rows& x,
                     const std::int32_t* token, int num_tokens, int thread) {
  const Int8Table& int8 = int8_table();
  const Bf16Table& bf16 = bf16_table();
  auto* tile = static_cast<float*>(thread_scratch(thread, kTile, kMaxTileTokens * kTileRows * sizeof(float)));
  if (!tile) return nullptr;
  const std::int64_t num_blocks = weight.num_inputs / kBlock;
  const std::int64_t row = expert * weight.num_outputs + first;
  const int num_panels = static_cast<int>(ceil_div(num_rows, kPanelRows));
  if (weight.kind == Weight::Kind::panels) {
    const std::uint8_t* panels = weight.data + first / kPanelRows * panel_bytes(num_blocks);
    const std::int64_t bytes = num_panels * panel_bytes(num_blocks);
    int8.panel_product(panels, num_panels, num_blocks, kInt8Offset, x.data, x.row_bytes, token, num_tokens,
                       {panels + bytes, bytes}, tile);
    return tile;
  }
  if (weight.kind == Weight::Kind::bf16_rows) {
    const auto* rows = reinterpret_cast<const std::uint16_t*>(weight.data) + row * weight.num_inputs;
    bf16.bf16_product(rows, num_rows, weight.num_inputs, x.data, x.row_bytes, token, num_tokens, tile);
    return tile;
  }
  if (weight.kind == Weight::Kind::packed) {
    return packed_product(weight, expert, first, num_panels, x, token, num_tokens, thread, tile);
  }
  const std::uint8_t* blocks = weight.data + row * num_blocks * 16;
  const std::uint8_t* scales = weight.scales + row * num_blocks;
  if (weight.kind == Weight::Kind::ggml) {
    // In order for this tile alone, in memory that stays in the nearest cache: a pass over what is read anyway.
    auto* ordered = static_cast<std::uint8_t*>(thread_scratch(thread, kOrdered, ggml_tile_bytes(num_blocks)));
    if (!ordered) return nullptr;
    blocks = ordered;
    scales = ordered + kTileRows * num_blocks * 16;
    read_ggml_rows(weight.ggml, row, num_rows, num_blocks, ordered, ordered + kTileRows * num_blocks * 16);
  }
  const bool is_mxfp4 = weight.kind == Weight::Kind::mxfp4 || weight.kind == Weight::Kind::ggml;
  if (is_mxfp4 && x.kind == Activations::int8 && num_tokens < int8.panel_tokens) {
    int8.mxfp4_product(blocks, scales, num_rows, num_blocks, x.data, x.row_bytes, token, num_tokens, tile);
    return tile;
  }
  void* decoded = thread_scratch(thread, kDecoded, decoded_bytes(weight, x.kind));
  if (!decoded) return nullptr;
  auto* words = static_cast<std::uint16_t*>(decoded);
  if (weight.kind == Weight::Kind::bf16_columns) {
    const auto* data = reinterpret_cast<const std::uint16_t*>(weight.data);
    copy_columns(weight, data + expert * weight.num_outputs * weight.num_inputs, first, num_rows, words);
    bf16.bf16_column_product(words, weight.num_inputs, x.data, x.row_bytes, token, num_tokens, tile);
  } else if (x.kind == Activations::int8) {
    auto* panels = static_cast<std::uint8_t*>(decoded);
    int8.mxfp4_to_panels(blocks, scales, num_rows, num_blocks, panels);
    const std::int64_t bytes = num_rows * num_blocks * 16;
    int8.panel_product(panels, num_panels, num_blocks, kMxfp4Offset, x.data, x.row_bytes, token, num_tokens,
                       {blocks + bytes, bytes}, tile);
  } else {
    // Four rows at a time: they are still in L1 when the products read them.
    for (int r = 0; r < num_rows; r += 4) {
      const int few = std::min(4, num_rows - r);
      bf16.mxfp4_to_bf16(blocks + r * num_blocks * 16, scales + r * num_blocks, few, num_blocks, words);
      bf16.bf16_product(words, few, weight.num_inputs, x.data, x.row_bytes, token, num_tokens, tile + r);
    }
  }
  return tile;
}

// Tokens of one expert, at most kMaxTileTokens: rows [begin, begin + count) of the grouped order.
struct Chunk {
  std::int64_t expert;
  std::int64_t begin;
  int count;
};

// Ends of the runs of neighboring tiles that make the tasks: a kernel prefetches the rows that follow, so long runs
// read best. Few tokens are bound by memory: runs shrink towards the end, so that the threads end together. Many are
// bound by arithmetic and by what stays in L2: short runs throughout.
std::vector<std::int64_t> run_ends(std::int64_t num_tiles, bool is_few) {
  constexpr std::int64_t kLongest = 16, kShortest = 2, kManyLongest = 4;
  std::vector<std::int64_t> ends;
  const std::int64_t even = std::clamp<std::int64_t>(num_tiles / (32 * num_threads()), 1, kManyLongest);
  for (std::int64_t done = 0; done < num_tiles;) {
    const std::int64_t left = num_tiles - done;
    const std::int64_t run = is_few ? std::clamp(left / (4 * num_threads()), kShortest, kLongest) : even;
    done += std::min(run, left);
    ends.push_back(done);
  }
  return ends;
}

// Call use(chunk, first output, number of outputs, tile) for every tile of the products of all chunks.
template <typename Use>
void for_each_tile(const Weight& weight, const std::vector<Chunk>& chunks, const Rows& x, const std::int32_t* token,
                   const Use& use) {
  const std::int64_t tiles = ceil_div(weight.num_outputs, kTileRows);
  const bool is_few = !chunks.empty() && chunks.front().count <= 8;
  const auto ends = run_ends(tiles * static_cast<std::int64_t>(chunks.size()), is_few);
  std::atomic<bool> out_of_memory{false};
  parallel(static_cast<std::int64_t>(ends.size()), [&](std::int64_t task, int thread) {
    for (std::int64_t at = task ? ends[task - 1] : 0; at < ends[task]; ++at) {
      const Chunk& chunk = chunks[at / tiles];
      const std::int64_t first = at % tiles * kTileRows;
      const int num_rows = static_cast<int>(std::min<std::int64_t>(kTileRows, weight.num_outputs - first));
      float* tile = product(weight, chunk.expert, first, num_rows, x, token + chunk.begin, chunk.count, thread);
      if (tile)
        use(chunk, first, num_rows, tile);
      else
        out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

// Slots (token, active expert) sorted by expert, tokens in order within one.
struct Groups {
  std::vector<Chunk> chunks;
  std::vector<std::int32_t> slot;   // t * A + a
  std::vector<std::int32_t> token;  // t
};

void add_chunks(std::int64_t expert, std::int64_t begin, std::int64_t end, std::vector<Chunk>& chunks) {
  // Equal shares: 130 tokens are 65 and 65, not 128 and 2.
  const std::int64_t parts = ceil_div(end - begin, kMaxTileTokens);
  const std::int64_t share = parts ? round_up(ceil_div(end - begin, parts), 4) : 0;
  for (std::int64_t at = begin; at < end; at += share) {
    chunks.push_back({expert, at, static_cast<int>(std::min(share, end - at))});
  }
}

Groups group_by_expert(const std::int32_t* expert_id, std::int64_t num_slots, int num_active,
                       std::int64_t num_experts) {
  Groups groups;
  std::vector<std::int64_t> next(num_experts + 1, 0);
  for (std::int64_t s = 0; s < num_slots; ++s) ++next[expert_id[s] + 1];
  for (std::int64_t e = 0; e < num_experts; ++e) {
    add_chunks(e, next[e], next[e] + next[e + 1], groups.chunks);
    next[e + 1] += next[e];
  }
  groups.slot.resize(num_slots);
  groups.token.resize(num_slots);
  for (std::int64_t s = 0; s < num_slots; ++s) {
    const std::int64_t at = next[expert_id[s]]++;
    groups.slot[at] = static_cast<std::int32_t>(s);
    groups.token[at] = static_cast<std::int32_t>(s / num_active);
  }
  // Big chunks first, so that the threads end together.
  std::stable_sort(groups.chunks.begin(), groups.chunks.end(),
                   [](const Chunk& a, const Chunk& b) { return a.count > b.count; });
  return groups;
}

// What adapters add to one product of all experts after the other. Without adapters it does nothing.
class AdapterPass {
 public:
  AdapterPass(const ExpertAdapters* adapters, const Groups& groups) : adapters_(adapters), groups_(groups) {
    if (adapters_) inner_.resize(groups.token.size() * adapters_->max_rank);
  }

  // The products with `a` of every slot that has an adapter. x: the inputs; row: those of a slot in grouped order,
  // null: the slot's own.
  void shrink(LowRank ExpertAdapter::* which, const float* x, const std::int32_t* row) {
    if (!adapters_) return;
    which_ = which;
    parallel(static_cast<std::int64_t>(groups_.chunks.size()), [&](std::int64_t task, int) {
      const Chunk& chunk = groups_.chunks[task];
      for (std::int64_t at = chunk.begin; at < chunk.begin + chunk.count; ++at) {
        const LowRank* pair = pair_of(at);
        const std::int64_t from = row ? row[at] : at;
        if (pair) low_rank_table().shrink(*pair, chunk.expert, x + from * pair->num_inputs, inner(at));
      }
    });
  }

  // Adds the products with `b` to a tile of outputs first..first + num_rows - 1.
  void expand(const Chunk& chunk, std::int64_t first, int num_rows, float* tile) {
    if (!adapters_) return;
    for (int i = 0; i < chunk.count; ++i) {
      const std::int64_t at = chunk.begin + i;
      const LowRank* pair = pair_of(at);
      if (pair) low_rank_table().expand(*pair, chunk.expert, inner(at), first, num_rows, tile + i * kTileRows);
    }
  }

 private:
  const LowRank* pair_of(std::int64_t at) const {
    const std::int32_t index = adapters_->of_token[groups_.token[at]];
    if (index < 0) return nullptr;
    const LowRank& pair = adapters_->list[index].*which_;
    return pair.a ? &pair : nullptr;
  }
  float* inner(std::int64_t at) { return inner_.data() + at * adapters_->max_rank; }

  const ExpertAdapters* adapters_;
  const Groups& groups_;
  LowRank ExpertAdapter::* which_ = nullptr;
  std::vector<float> inner_;
};

}  // namespace

void quantize_weight(const std::uint16_t* weight, std::int64_t num_outputs, std::int64_t num_inputs,
                     std::uint8_t* panels) {
  const Int8Table& table = int8_table();
  parallel(ceil_div(num_outputs, kPanelRows), [&](std::int64_t task, int) {
    const std::int64_t first = task * kPanelRows;
    const int num_rows = static_cast<int>(std::min<std::int64_t>(kPanelRows, num_outputs - first));
    table.quantize_panel(weight + first * num_inputs, num_rows, num_inputs,
                         panels + task * panel_bytes(num_inputs / kBlock));
  });
}

void pack_mxfp4(const std::uint8_t* blocks, const std::uint8_t* scales, std::int64_t num_outputs,
                std::int64_t num_blocks, std::uint8_t* packed) {
  for (std::int64_t first = 0; first < num_outputs; first += kTileRows, packed += packed_bytes(num_blocks)) {
    const std::int64_t num_rows = std::min<std::int64_t>(kTileRows, num_outputs - first);
    const std::int64_t used = num_blocks * kTileRows, scale_bytes = packed_scale_bytes(num_blocks);
    if (num_rows < kTileRows) std::fill_n(packed, packed_bytes(num_blocks), std::uint8_t{0});
    std::fill_n(packed + used, scale_bytes - used, std::uint8_t{0});
    for (std::int64_t r = 0; r < num_rows; ++r) {
      const std::uint8_t* from = blocks + (first + r) * num_blocks * 16;
      const std::uint8_t* scale = scales + (first + r) * num_blocks;
      std::uint8_t* to = packed + scale_bytes + r / kPanelRows * (kPackedBlockBytes / 2) + r % kPanelRows * 4;
      for (std::int64_t b = 0; b < num_blocks; ++b) {
        packed[b * kTileRows + r] = scale[b];
        for (int part = 0; part < 4; ++part) {
          std::memcpy(to + b * kPackedBlockBytes + part * 64, from + b * 16 + part * 4, 4);
        }
      }
    }
  }
}

std::int64_t linear_scratch_bytes(std::int64_t num_tokens, std::int64_t num_inputs) {
  return num_tokens *
         std::max(row_bytes_of(Activations::int8, num_inputs), row_bytes_of(Activations::bf16, num_inputs));
}

std::int64_t moe_scratch_bytes(std::int64_t num_tokens, std::int64_t hidden, std::int64_t expert_size, int num_active) {
  const std::int64_t num_slots = num_tokens * num_active;
  return linear_scratch_bytes(num_tokens, hidden) + linear_scratch_bytes(num_slots, expert_size) +
         round_up(num_slots * std::max(hidden, expert_size) * 4, 64);
}

std::int64_t matmul_thread_bytes(std::int64_t max_inputs) {
  return max_inputs * kTileRows * 2 + kMaxTileTokens * kTileRows * 4;
}

void linear(const float* x, std::int64_t num_tokens, const Weight& weight, Activations activations, bool add,
            float* out) {
  const TileTable& table = tile_table();
  std::lock_guard<std::mutex> lock(arena().mutex);
  std::uint8_t* memory = arena().take(linear_scratch_bytes(num_tokens, weight.num_inputs));
  const Rows rows = prepare(weight, activations, x, num_tokens, memory);
  std::vector<std::int32_t> token(num_tokens);
  for (std::int64_t t = 0; t < num_tokens; ++t) token[t] = static_cast<std::int32_t>(t);
  std::vector<Chunk> chunks;
  add_chunks(0, 0, num_tokens, chunks);
  const auto use = [&](const Chunk& chunk, std::int64_t first, int num_rows, const float* tile) {
    const std::uint16_t* bias = weight.bias ? weight.bias + first : nullptr;
    for (int i = 0; i < chunk.count; ++i) {
      float* to = out + (chunk.begin + i) * weight.num_outputs + first;
      table.finish(tile + i * kTileRows, bias, num_rows, 1.0f, add, to);
    }
  };
  for_each_tile(weight, chunks, rows, token.data(), use);
}

void moe(const float* x, std::int64_t num_tokens, const std::int32_t* expert_id, const float* expert_weight,
         int num_active, const Experts& experts, const ExpertAdapters* adapters, Activations activations, float* out) {
  const TileTable& table = tile_table();
  const std::int64_t hidden = experts.down.num_outputs, size = experts.down.num_inputs;
  const std::int64_t num_slots = num_tokens * num_active;
  std::lock_guard<std::mutex> lock(arena().mutex);
  std::uint8_t* memory = arena().take(moe_scratch_bytes(num_tokens, hidden, size, num_active));
  const Groups groups = group_by_expert(expert_id, num_slots, num_active, experts.num_experts);
  const Rows rows = prepare(experts.gate_up, activations, x, num_tokens, memory);
  std::uint8_t* inner_memory = memory + linear_scratch_bytes(num_tokens, hidden);
  // Units in grouped order; later the parts [T, A, D], when the units are rounded and no longer needed.
  auto* units = reinterpret_cast<float*>(inner_memory + linear_scratch_bytes(num_slots, size));

  AdapterPass pass(adapters, groups);

  pass.shrink(&ExpertAdapter::gate_up, x, groups.token.data());
  const auto activate = [&](const Chunk& chunk, std::int64_t first, int num_rows, float* tile) {
    pass.expand(chunk, first, num_rows, tile);
    const std::uint16_t* bias = experts.gate_up.bias + chunk.expert * experts.gate_up.num_outputs + first;
    for (int i = 0; i < chunk.count; ++i) {
      float* to = units + (chunk.begin + i) * size + first / 2;
      table.swiglu(tile + i * kTileRows, bias, num_rows / 2, experts.limit, experts.alpha, to);
    }
  };
  for_each_tile(experts.gate_up, groups.chunks, rows, groups.token.data(), activate);

  pass.shrink(&ExpertAdapter::down, units, nullptr);
  const Rows inner = prepare(experts.down, activations, units, num_slots, inner_memory);
  std::vector<std::int32_t> position(num_slots);
  for (std::int64_t i = 0; i < num_slots; ++i) position[i] = static_cast<std::int32_t>(i);
  float* parts = units;
  const auto weigh = [&](const Chunk& chunk, std::int64_t first, int num_rows, float* tile) {
    pass.expand(chunk, first, num_rows, tile);
    const std::uint16_t* bias = experts.down.bias + chunk.expert * hidden + first;
    for (int i = 0; i < chunk.count; ++i) {
      const std::int64_t slot = groups.slot[chunk.begin + i];
      table.finish(tile + i * kTileRows, bias, num_rows, expert_weight[slot], false, parts + slot * hidden + first);
    }
  };
  for_each_tile(experts.down, groups.chunks, inner, position.data(), weigh);

  parallel(num_tokens, [&](std::int64_t t, int) {
    table.add_parts(parts + t * num_active * hidden, hidden, num_active, hidden, out + t * hidden);
  });
}

double measure_read_bandwidth(const std::uint8_t* data, std::int64_t size_bytes, int repeats) {
  const TileTable& table = tile_table();
  const std::int64_t piece = 256 << 10;
  std::atomic<std::uint64_t> keep{0};
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    parallel(size_bytes / piece, [&](std::int64_t task, int) { keep += table.read_all(data + task * piece, piece); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(size_bytes / piece * piece) / seconds.count());
  }
  return best;
}

double measure_int8_ops(std::int64_t rounds) {
  const TileTable& table = tile_table();
  std::atomic<std::int64_t> done{0};
  const auto begin = std::chrono::steady_clock::now();
  parallel(64 * num_threads(), [&](std::int64_t, int) { done += static_cast<std::int64_t>(table.spin_int8(rounds)); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(done) / seconds.count();
}

}  // namespace harmonium
