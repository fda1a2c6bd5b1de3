// The experts' driver: tokens grouped by expert, both products, the SwiGLU between them.
#include "tiles.h"

namespace harmonium {

namespace {

// Slots (token, active expert) that have an expert, sorted by it, tokens in order within one.
struct Groups {
  std::vector<Chunk> chunks;
  std::vector<std::int32_t> slot;   // t * A + a
  std::vector<std::int32_t> token;  // t
  std::vector<std::int32_t> row;    // place of t in `used`
  std::vector<std::int32_t> used;   // tokens that have a slot here, in order
};

// A negative id: the slot has no expert in this call.
Groups group_by_expert(const std::int32_t* expert_id, std::int64_t num_slots, int num_active,
                       std::int64_t num_experts) {
  Groups groups;
  std::vector<std::int64_t> next(num_experts + 1, 0);
  for (std::int64_t s = 0; s < num_slots; ++s) {
    if (expert_id[s] >= 0) ++next[expert_id[s] + 1];
  }
  for (std::int64_t e = 0; e < num_experts; ++e) {
    add_chunks(e, next[e], next[e] + next[e + 1], groups.chunks);
    next[e + 1] += next[e];
  }
  const std::int64_t num_used = next[num_experts];
  groups.slot.resize(num_used);
  groups.token.resize(num_used);
  groups.row.resize(num_used);
  for (std::int64_t s = 0; s < num_slots; ++s) {
    if (expert_id[s] < 0) continue;
    const auto token = static_cast<std::int32_t>(s / num_active);
    if (groups.used.empty() || groups.used.back() != token) groups.used.push_back(token);
    const std::int64_t at = next[expert_id[s]]++;
    groups.slot[at] = static_cast<std::int32_t>(s);
    groups.token[at] = token;
    groups.row[at] = static_cast<std::int32_t>(groups.used.size() - 1);
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

// What moe_parts does, with the arena's lock held. parts null: they take the place of the units in the arena. Returns
// the parts.
float* run_parts(const float* x, std::int64_t num_tokens, const std::int32_t* expert_id, const float* expert_weight,
                 int num_active, const Experts& experts, const ExpertAdapters* adapters, Activations activations,
                 float* parts) {
  const TileTable& table = tile_table();
  const std::int64_t hidden = experts.down.num_outputs, size = experts.down.num_inputs;
  const Groups groups = group_by_expert(expert_id, num_tokens * num_active, num_active, experts.num_experts);
  const auto num_used = static_cast<std::int64_t>(groups.used.size());
  const auto num_slots = static_cast<std::int64_t>(groups.slot.size());
  std::uint8_t* memory = arena().take(moe_scratch_bytes(num_tokens, hidden, size, num_active));
  const Rows rows = prepare(experts.gate_up, activations, x, groups.used.data(), num_used, memory);
  std::uint8_t* inner_memory = memory + linear_scratch_bytes(num_used, hidden);
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
  for_each_tile(experts.gate_up, groups.chunks, rows, groups.row.data(), activate);

  pass.shrink(&ExpertAdapter::down, units, nullptr);
  const Rows inner = prepare(experts.down, activations, units, nullptr, num_slots, inner_memory);
  std::vector<std::int32_t> position(num_slots);
  for (std::int64_t i = 0; i < num_slots; ++i) position[i] = static_cast<std::int32_t>(i);
  if (!parts) parts = units;
  const auto weigh = [&](const Chunk& chunk, std::int64_t first, int num_rows, float* tile) {
    pass.expand(chunk, first, num_rows, tile);
    const std::uint16_t* bias = experts.down.bias + chunk.expert * hidden + first;
    for (int i = 0; i < chunk.count; ++i) {
      const std::int64_t slot = groups.slot[chunk.begin + i];
      table.finish(tile + i * kTileRows, bias, num_rows, expert_weight[slot], false, parts + slot * hidden + first);
    }
  };
  for_each_tile(experts.down, groups.chunks, inner, position.data(), weigh);
  return parts;
}

}  // namespace

std::int64_t moe_scratch_bytes(std::int64_t num_tokens, std::int64_t hidden, std::int64_t expert_size, int num_active) {
  const std::int64_t num_slots = num_tokens * num_active;
  return linear_scratch_bytes(num_tokens, hidden) + linear_scratch_bytes(num_slots, expert_size) +
         round_up(num_slots * std::max(hidden, expert_size) * 4, 64);
}

void moe(const float* x, std::int64_t num_tokens, const std::int32_t* expert_id, const float* expert_weight,
         int num_active, const Experts& experts, const ExpertAdapters* adapters, Activations activations, float* out) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  const float* parts = run_parts(x, num_tokens, expert_id, expert_weight, num_active, experts, adapters, activations,
                                 nullptr);
  add_moe_parts(parts, num_tokens, num_active, experts.down.num_outputs, out);
}

void moe_parts(const float* x, std::int64_t num_tokens, const std::int32_t* expert_id, const float* expert_weight,
               int num_active, const Experts& experts, const ExpertAdapters* adapters, Activations activations,
               float* parts) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  run_parts(x, num_tokens, expert_id, expert_weight, num_active, experts, adapters, activations, parts);
}

void add_moe_parts(const float* parts, std::int64_t num_tokens, int num_active, std::int64_t hidden, float* out) {
  const TileTable& table = tile_table();
  parallel(num_tokens, [&](std::int64_t t, int) {
    table.add_parts(parts + t * num_active * hidden, hidden, num_active, hidden, out + t * hidden);
  });
}

}  // namespace harmonium
