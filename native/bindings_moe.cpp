// Python's side of the experts' kernels: checks every array, then releases the GIL and calls a driver of matmul.h.
#include <memory>
#include <vector>

#include "arrays.h"
#include "program.h"

namespace harmonium {

namespace {

// A pair of a and b as Python has it: both [rank, size] (num_experts 0) or [E, rank, size]; float32 or bf16 bits.
template <typename T>
LowRank typed_pair(nb::handle a_object, nb::handle b_object, std::int64_t num_experts) {
  const int rank = num_experts ? 3 : 2;
  const Array<T> a(a_object, "a", rank), b(b_object, "b", rank);
  if (num_experts) a.expect({num_experts, -1, -1}), b.expect({num_experts, a.shape(1), -1});
  else b.expect({a.shape(0), -1});
  LowRank pair;
  pair.a = a.data();
  pair.b = b.data();
  pair.is_bf16 = sizeof(T) == 2;
  pair.rank = a.shape(rank - 2);
  pair.num_inputs = a.shape(rank - 1);
  pair.num_outputs = b.shape(rank - 1);
  require(pair.rank >= 1, "a has rank 0; expected at least 1");
  return pair;
}

bool is_bf16(nb::handle object) {
  Py_buffer view;
  if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool found = view.format && std::string(view.format) == "H";
  PyBuffer_Release(&view);
  return found;
}

LowRank parse_pair(nb::handle a, nb::handle b, float scale, std::int64_t num_experts) {
  LowRank pair = is_bf16(a) ? typed_pair<std::uint16_t>(a, b, num_experts) : typed_pair<float>(a, b, num_experts);
  pair.scale = scale;
  return pair;
}

// An entry of an adapter's tuple: None, or (a, b, scale) of the experts' gate_up or down.
LowRank parse_expert_pair(nb::handle object, const Experts& experts, const Weight& weight) {
  if (object.is_none()) return {};
  const auto parts = nb::cast<nb::tuple>(object);
  require(parts.size() == 3, "adapter: a pair has " + std::to_string(parts.size()) + " parts; expected a, b, scale");
  const LowRank pair = parse_pair(parts[0], parts[1], nb::cast<float>(parts[2]), experts.num_experts);
  require(pair.num_inputs == weight.num_inputs && pair.num_outputs == weight.num_outputs,
          "adapter: a pair takes " + std::to_string(pair.num_inputs) + " inputs to " +
              std::to_string(pair.num_outputs) + " outputs; expected " + std::to_string(weight.num_inputs) + " and " +
              std::to_string(weight.num_outputs));
  return pair;
}

// The adapters of a moe call: a list of (gate_up, down) and the index of each token's, -1: none. The list may be None.
struct BoundAdapters {
  BoundAdapters(nb::handle list, nb::handle of_token, const Experts& experts, std::int64_t num_tokens) {
    if (list.is_none()) return;
    const Array<std::int32_t> index(of_token, "adapter_T", 1);
    index.expect({num_tokens});
    for (nb::handle object : nb::cast<nb::sequence>(list)) {
      const auto both = nb::cast<nb::tuple>(object);
      require(both.size() == 2, "adapter has " + std::to_string(both.size()) + " parts; expected gate_up and down");
      adapters.push_back({parse_expert_pair(both[0], experts, experts.gate_up),
                          parse_expert_pair(both[1], experts, experts.down)});
    }
    const auto count = static_cast<std::int32_t>(adapters.size());
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      require(index.data()[t] >= -1 && index.data()[t] < count,
              "adapter_T holds " + std::to_string(index.data()[t]) + " for token " + std::to_string(t) +
                  "; expected -1 to " + std::to_string(count - 1));
    }
    value = {adapters.data(), index.data(), 1};
    for (const ExpertAdapter& adapter : adapters) {
      for (const std::int64_t rank : {adapter.gate_up.rank, adapter.down.rank}) {
        if (rank > value.max_rank) value.max_rank = rank;
      }
    }
    is_given = true;
  }
  const ExpertAdapters* get() const { return is_given ? &value : nullptr; }

  std::vector<ExpertAdapter> adapters;
  ExpertAdapters value{};
  bool is_given = false;
};

// out[row][column...] += scale * (x[row] . a^T) . b for each of the rows.
void bind_low_rank(nb::handle x_object, nb::handle row_object, nb::handle a, nb::handle b, float scale,
                   nb::handle out_object, std::int64_t column) {
  const Array<float> x(x_object, "x", 2), out(out_object, "out", 2, Access::write);
  const Array<std::int32_t> row(row_object, "row", 1);
  const LowRank pair = parse_pair(a, b, scale, 0);
  x.expect({-1, pair.num_inputs});
  out.expect({x.shape(0), -1});
  require(column >= 0 && column + pair.num_outputs <= out.shape(1),
          "column is " + std::to_string(column) + "; expected 0 to " +
              std::to_string(out.shape(1) - pair.num_outputs) + " (out has " + std::to_string(out.shape(1)) +
              " columns, b " + std::to_string(pair.num_outputs) + ")");
  for (std::int64_t i = 0; i < row.shape(0); ++i) {
    const std::int64_t least = i ? row.data()[i - 1] + 1 : 0;
    require(row.data()[i] >= least && row.data()[i] < x.shape(0),
            "row[" + std::to_string(i) + "] is " + std::to_string(row.data()[i]) + "; expected " +
                std::to_string(least) + " to " + std::to_string(x.shape(0) - 1));
  }
  nb::gil_scoped_release release;
  low_rank(x.data(), row.data(), row.shape(0), pair, out.data(), out.shape(1), column);
}

// Everything about a moe call that is not a weight; E, D and F come from the weights.
void run_moe(nb::handle x_object, nb::handle id_object, nb::handle weight_object, Experts& experts,
             nb::handle gate_up_bias, nb::handle down_bias, nb::handle out_object, Activations activations,
             nb::handle adapter_list, nb::handle adapter_of) {
  const Array<float> x(x_object, "x", 2), weight(weight_object, "expert_weight", 2),
      out(out_object, "out", 2, Access::write);
  const Array<std::int32_t> id(id_object, "expert_id", 2);
  const std::int64_t hidden = experts.gate_up.num_inputs, num_tokens = x.shape(0), num_active = id.shape(1);
  check_blocks(hidden, "gate_up");
  check_blocks(experts.down.num_inputs, "down");
  x.expect({-1, hidden});
  out.expect({num_tokens, hidden});
  id.expect({num_tokens, -1});
  weight.expect({num_tokens, num_active});
  require(num_active >= 1, "expert_id has no columns; expected at least 1 expert a token");
  const Array<std::uint16_t> up(gate_up_bias, "gate_up_bias", 2), down(down_bias, "down_bias", 2);
  up.expect({experts.num_experts, experts.gate_up.num_outputs});
  down.expect({experts.num_experts, hidden});
  experts.gate_up.bias = up.data();
  experts.down.bias = down.data();
  for (std::int64_t i = 0; i < num_tokens * num_active; ++i) {
    if (id.data()[i] < 0 || id.data()[i] >= experts.num_experts) {
      throw nb::index_error(("expert_id holds " + std::to_string(id.data()[i]) + " for token " +
                             std::to_string(i / num_active) + "; expected 0 to " +
                             std::to_string(experts.num_experts - 1))
                                .c_str());
    }
  }
  const auto adapters = std::make_shared<BoundAdapters>(adapter_list, adapter_of, experts, num_tokens);
  perform([=, copy = experts] {
    moe(x.data(), num_tokens, id.data(), weight.data(), static_cast<int>(num_active), copy, adapters->get(),
        activations, out.data());
  });
}

void bind_moe_mxfp4(nb::handle x, nb::handle expert_id, nb::handle expert_weight, nb::handle gate_up_blocks,
                    nb::handle gate_up_scales, nb::handle gate_up_bias, nb::handle down_blocks, nb::handle down_scales,
                    nb::handle down_bias, nb::handle out, float limit, float alpha, const std::string& activations,
                    nb::handle adapters, nb::handle adapter_of) {
  const Array<std::uint8_t> up(gate_up_blocks, "gate_up_blocks", 4), up_scales(gate_up_scales, "gate_up_scales", 3);
  const Array<std::uint8_t> down(down_blocks, "down_blocks", 4), scales(down_scales, "down_scales", 3);
  const std::int64_t num_experts = up.shape(0), hidden = up.shape(2) * kBlock, size = down.shape(2) * kBlock;
  up.expect({-1, 2 * size, -1, 16});
  up_scales.expect({num_experts, 2 * size, up.shape(2)});
  down.expect({num_experts, hidden, -1, 16});
  scales.expect({num_experts, hidden, down.shape(2)});
  const auto kind = Weight::Kind::mxfp4;
  Experts experts{{kind, up.data(), up_scales.data(), nullptr, 2 * size, hidden},
                  {kind, down.data(), scales.data(), nullptr, hidden, size},
                  num_experts,
                  limit,
                  alpha};
  run_moe(x, expert_id, expert_weight, experts, gate_up_bias, down_bias, out, parse_activations(activations),
          adapters, adapter_of);
}

void bind_moe_packed(nb::handle x, nb::handle expert_id, nb::handle expert_weight, nb::handle gate_up_packed,
                     nb::handle gate_up_bias, nb::handle down_packed, nb::handle down_bias, nb::handle out, float limit,
                     float alpha, nb::handle adapters, nb::handle adapter_of) {
  const Array<std::uint8_t> up(gate_up_packed, "gate_up_packed", 3), down(down_packed, "down_packed", 3);
  const Array<std::uint16_t> up_bias(gate_up_bias, "gate_up_bias", 2), bias(down_bias, "down_bias", 2);
  const std::int64_t num_experts = up.shape(0), hidden = bias.shape(1), size = up_bias.shape(1) / 2;
  up_bias.expect({num_experts, 2 * size});
  check_blocks(hidden, "gate_up");
  check_blocks(size, "down");
  up.expect({-1, (2 * size + kTileRows - 1) / kTileRows, packed_bytes(hidden / kBlock)});
  down.expect({num_experts, (hidden + kTileRows - 1) / kTileRows, packed_bytes(size / kBlock)});
  const auto kind = Weight::Kind::packed;
  Experts experts{{kind, up.data(), nullptr, nullptr, 2 * size, hidden},
                  {kind, down.data(), nullptr, nullptr, hidden, size},
                  num_experts,
                  limit,
                  alpha};
  run_moe(x, expert_id, expert_weight, experts, gate_up_bias, down_bias, out, Activations::int8, adapters, adapter_of);
}

// ggml's experts: `second` None where gate and up are rows of one matrix in turn.
void bind_moe_ggml(nb::handle x, nb::handle expert_id, nb::handle expert_weight, nb::handle gate, nb::handle up_object,
                   bool is_split, nb::handle gate_up_bias, nb::handle down_rows, nb::handle down_bias, nb::handle out,
                   float limit, float alpha, const std::string& activations, nb::handle adapters,
                   nb::handle adapter_of) {
  const Array<std::uint8_t> first(gate, "gate", 3), down(down_rows, "down", 3);
  const bool has_two = !up_object.is_none();
  const Array<std::uint8_t> second(has_two ? up_object : gate, "up", 3);
  require(first.shape(2) % kGgmlMxfp4Bytes == 0 && down.shape(2) % kGgmlMxfp4Bytes == 0,
          "gate or down has rows that are no multiple of 17 bytes");
  const std::int64_t num_experts = first.shape(0), hidden = first.shape(2) / kGgmlMxfp4Bytes * kBlock;
  const std::int64_t size = down.shape(2) / kGgmlMxfp4Bytes * kBlock;
  check_blocks(hidden, "gate");
  check_blocks(size, "down");
  first.expect({-1, has_two ? size : 2 * size, -1});
  second.expect({num_experts, first.shape(1), first.shape(2)});
  down.expect({num_experts, hidden, -1});
  const auto kind = Weight::Kind::ggml;
  Experts experts{{kind, nullptr, nullptr, nullptr, 2 * size, hidden,
                   {first.data(), has_two ? second.data() : nullptr, is_split}},
                  {kind, nullptr, nullptr, nullptr, hidden, size, {down.data(), nullptr, is_split}},
                  num_experts,
                  limit,
                  alpha};
  run_moe(x, expert_id, expert_weight, experts, gate_up_bias, down_bias, out, parse_activations(activations),
          adapters, adapter_of);
}

void bind_moe_bf16(nb::handle x, nb::handle expert_id, nb::handle expert_weight, nb::handle gate_up_weight,
                   nb::handle gate_up_bias, nb::handle down_weight, nb::handle down_bias, nb::handle out, float limit,
                   float alpha, nb::handle adapters, nb::handle adapter_of) {
  const Array<std::uint16_t> up(gate_up_weight, "gate_up_weight", 3), down(down_weight, "down_weight", 3);
  const std::int64_t num_experts = up.shape(0), hidden = up.shape(1), size = down.shape(1);
  up.expect({-1, -1, 2 * size});
  down.expect({num_experts, -1, hidden});
  const auto kind = Weight::Kind::bf16_columns;
  Experts experts{{kind, reinterpret_cast<const std::uint8_t*>(up.data()), nullptr, nullptr, 2 * size, hidden},
                  {kind, reinterpret_cast<const std::uint8_t*>(down.data()), nullptr, nullptr, hidden, size},
                  num_experts,
                  limit,
                  alpha};
  run_moe(x, expert_id, expert_weight, experts, gate_up_bias, down_bias, out, Activations::bf16, adapters, adapter_of);
}

// Experts wherever they are in `pool`: place [E, 4] holds the first byte of gate_up's matrix, its scales, down's matrix,
// its scales, and is looked at for the ids of this call alone. ggml None: blocks as in our layout; else (gate and up
// are two matrices, nibbles are split), and a place of scales is that of the second matrix.
Experts placed_experts(const Array<std::uint8_t>& pool, const Array<std::int64_t>& place, nb::handle ggml,
                       std::int64_t hidden, std::int64_t size) {
  const bool is_ggml = !ggml.is_none();
  const auto kind = is_ggml ? Weight::Kind::ggml : Weight::Kind::mxfp4;
  Experts experts{{kind, pool.data(), nullptr, nullptr, 2 * size, hidden},
                  {kind, pool.data(), nullptr, nullptr, hidden, size},
                  place.shape(0),
                  0,
                  0};
  experts.gate_up.place = place.data();
  experts.down.place = place.data() + 2;
  if (is_ggml) {
    const auto both = nb::cast<nb::tuple>(ggml);
    require(both.size() == 2, "ggml has " + std::to_string(both.size()) + " parts; expected has_two and is_split");
    const bool is_split = nb::cast<bool>(both[1]);
    experts.gate_up.ggml = {pool.data(), nb::cast<bool>(both[0]) ? pool.data() : nullptr, is_split};
    experts.down.ggml = {pool.data(), nullptr, is_split};
  }
  return experts;
}

// The matrices of an expert must lie in the pool.
void check_place(const Weight& weight, const char* name, std::int64_t expert, std::int64_t pool_bytes) {
  const bool is_ggml = weight.kind == Weight::Kind::ggml;
  const std::int64_t blocks = weight.num_outputs * weight.num_inputs / kBlock;
  const std::int64_t share = is_ggml && weight.ggml.second ? 2 : 1;
  const std::int64_t bytes[2] = {blocks * (is_ggml ? kGgmlMxfp4Bytes : 16) / share,
                                 is_ggml ? (share - 1) * blocks * kGgmlMxfp4Bytes / share : blocks};
  for (int part = 0; part < 2; ++part) {
    const std::int64_t at = weight.place[kPlaceStride * expert + part];
    require(bytes[part] == 0 || (at >= 0 && at <= pool_bytes - bytes[part]),
            "place of expert " + std::to_string(expert) + "'s " + name + " is " + std::to_string(at) + "; its " +
                std::to_string(bytes[part]) + " bytes must lie within the pool of " + std::to_string(pool_bytes));
  }
}

void bind_moe_parts(nb::handle x_object, nb::handle id_object, nb::handle weight_object, nb::handle pool_object,
                    nb::handle place_object, nb::handle ggml, nb::handle gate_up_bias, nb::handle down_bias,
                    nb::handle parts_object, float limit, float alpha, const std::string& activations_name,
                    nb::handle adapter_list, nb::handle adapter_of) {
  const Array<float> x(x_object, "x", 2), weight(weight_object, "expert_weight", 2),
      parts(parts_object, "parts", 3, Access::write);
  const Array<std::int32_t> id(id_object, "expert_id", 2);
  const Array<std::uint8_t> pool(pool_object, "pool", 1);
  const Array<std::int64_t> place(place_object, "place", 2);
  const Array<std::uint16_t> up(gate_up_bias, "gate_up_bias", 2), down(down_bias, "down_bias", 2);
  const std::int64_t num_tokens = x.shape(0), num_active = id.shape(1), num_experts = place.shape(0);
  const std::int64_t hidden = down.shape(1), size = up.shape(1) / 2;
  check_blocks(hidden, "gate_up");
  check_blocks(size, "down");
  place.expect({-1, kPlaceStride});
  up.expect({num_experts, 2 * size});
  down.expect({num_experts, -1});
  x.expect({-1, hidden});
  id.expect({num_tokens, -1});
  weight.expect({num_tokens, num_active});
  parts.expect({num_tokens, num_active, hidden});
  require(num_active >= 1, "expert_id has no columns; expected at least 1 expert a token");
  Experts experts = placed_experts(pool, place, ggml, hidden, size);
  experts.limit = limit;
  experts.alpha = alpha;
  experts.gate_up.bias = up.data();
  experts.down.bias = down.data();
  std::vector<bool> is_checked(num_experts, false);
  for (std::int64_t i = 0; i < num_tokens * num_active; ++i) {
    const std::int32_t expert = id.data()[i];
    if (expert >= num_experts) {
      throw nb::index_error(("expert_id holds " + std::to_string(expert) + " for token " +
                             std::to_string(i / num_active) + "; expected at most " + std::to_string(num_experts - 1))
                                .c_str());
    }
    if (expert < 0 || is_checked[expert]) continue;
    check_place(experts.gate_up, "gate_up", expert, pool.shape(0));
    check_place(experts.down, "down", expert, pool.shape(0));
    is_checked[expert] = true;
  }
  const Activations activations = parse_activations(activations_name);
  const BoundAdapters adapters(adapter_list, adapter_of, experts, num_tokens);
  nb::gil_scoped_release release;
  moe_parts(x.data(), num_tokens, id.data(), weight.data(), static_cast<int>(num_active), experts, adapters.get(),
            activations, parts.data());
}

void bind_add_moe_parts(nb::handle parts_object, nb::handle out_object) {
  const Array<float> parts(parts_object, "parts", 3), out(out_object, "out", 2, Access::write);
  out.expect({parts.shape(0), parts.shape(2)});
  require(parts.shape(1) >= 1, "parts has size 0 along axis 1; expected at least 1 expert a token");
  nb::gil_scoped_release release;
  add_moe_parts(parts.data(), parts.shape(0), static_cast<int>(parts.shape(1)), parts.shape(2), out.data());
}

}  // namespace

void bind_moe(nb::module_& m) {
  m.def("moe_mxfp4", &bind_moe_mxfp4, nb::arg("x"), nb::arg("expert_id"), nb::arg("expert_weight"),
        nb::arg("gate_up_blocks"), nb::arg("gate_up_scales"), nb::arg("gate_up_bias"), nb::arg("down_blocks"),
        nb::arg("down_scales"), nb::arg("down_bias"), nb::arg("out"), nb::arg("limit"), nb::arg("alpha"),
        nb::arg("activations"), nb::arg("adapters").none(), nb::arg("adapter_T").none());
  m.def("moe_bf16", &bind_moe_bf16, nb::arg("x"), nb::arg("expert_id"), nb::arg("expert_weight"),
        nb::arg("gate_up_weight"), nb::arg("gate_up_bias"), nb::arg("down_weight"), nb::arg("down_bias"),
        nb::arg("out"), nb::arg("limit"), nb::arg("alpha"), nb::arg("adapters").none(), nb::arg("adapter_T").none());
  m.def("moe_ggml", &bind_moe_ggml, nb::arg("x"), nb::arg("expert_id"), nb::arg("expert_weight"), nb::arg("gate"),
        nb::arg("up").none(), nb::arg("is_split"), nb::arg("gate_up_bias"), nb::arg("down"), nb::arg("down_bias"),
        nb::arg("out"), nb::arg("limit"), nb::arg("alpha"), nb::arg("activations"), nb::arg("adapters").none(),
        nb::arg("adapter_T").none());
  m.def("low_rank", &bind_low_rank, nb::arg("x"), nb::arg("row"), nb::arg("a"), nb::arg("b"), nb::arg("scale"),
        nb::arg("out"), nb::arg("column"));
  m.def("moe_packed", &bind_moe_packed, nb::arg("x"), nb::arg("expert_id"), nb::arg("expert_weight"),
        nb::arg("gate_up_packed"), nb::arg("gate_up_bias"), nb::arg("down_packed"), nb::arg("down_bias"),
        nb::arg("out"), nb::arg("limit"), nb::arg("alpha"), nb::arg("adapters").none(), nb::arg("adapter_T").none());
  m.def("moe_scratch_bytes", &moe_scratch_bytes, nb::arg("num_tokens"), nb::arg("hidden"), nb::arg("expert_size"),
        nb::arg("num_active"));
  m.def("moe_parts", &bind_moe_parts, nb::arg("x"), nb::arg("expert_id"), nb::arg("expert_weight"), nb::arg("pool"),
        nb::arg("place"), nb::arg("ggml").none(), nb::arg("gate_up_bias"), nb::arg("down_bias"), nb::arg("parts"),
        nb::arg("limit"), nb::arg("alpha"), nb::arg("activations"), nb::arg("adapters").none(),
        nb::arg("adapter_T").none());
  m.def("add_moe_parts", &bind_add_moe_parts, nb::arg("parts"), nb::arg("out"));
}

}  // namespace harmonium
