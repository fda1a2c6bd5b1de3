// Python's side of the matrix kernels: checks every array, then releases the GIL and calls a driver of matmul.h.
#include <nanobind/stl/string.h>
#include <sys/mman.h>

#include <cstdlib>
#include <initializer_list>
#include <new>
#include <vector>

#include "bindings.h"
#include "matmul.h"

namespace harmonium {

namespace {

template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr char code = 'f';
  static constexpr const char* name = "float32";
};
template <>
struct Format<std::int32_t> {
  static constexpr char code = 'i';
  static constexpr const char* name = "int32";
};
template <>
struct Format<std::uint16_t> {
  static constexpr char code = 'H';
  static constexpr const char* name = "uint16";
};
template <>
struct Format<std::uint8_t> {
  static constexpr char code = 'B';
  static constexpr const char* name = "uint8";
};

enum class Access { read, write };

// An argument's memory, checked through the buffer protocol so that the error can name it. The caller's reference
// keeps the memory while the call lasts.
template <typename T>
class Array {
 public:
  Array(nb::handle object, const char* name, int rank, Access access = Access::read) : name_(name), rank_(rank) {
    Py_buffer view;
    const std::string expected =
        std::string("; expected a C-contiguous ") + Format<T>::name + " array of rank " + std::to_string(rank);
    if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_FORMAT | PyBUF_STRIDES) != 0) {
      PyErr_Clear();
      fail(std::string("is a ") + Py_TYPE(object.ptr())->tp_name + expected);
    }
    const std::string format = view.format ? view.format : "B";
    const bool typed = format.size() == 1 && format[0] == Format<T>::code;
    const bool contiguous = PyBuffer_IsContiguous(&view, 'C') != 0;
    const bool writable = !view.readonly;
    const int found_rank = view.ndim;
    data_ = static_cast<T*>(view.buf);
    for (int i = 0; i < found_rank && i < 4; ++i) shape_[i] = view.shape[i];
    PyBuffer_Release(&view);
    if (!typed) fail("has the element format '" + format + "'" + expected);
    if (found_rank != rank) fail("has rank " + std::to_string(found_rank) + expected);
    if (!contiguous) fail("is not contiguous" + expected);
    if (access == Access::write && !writable) fail("is read-only; expected an array that can be written");
  }

  T* data() const { return data_; }
  std::int64_t shape(int axis) const { return shape_[axis]; }

  // Raise unless the shape is this; -1 allows any size.
  void expect(std::initializer_list<std::int64_t> sizes) const {
    int axis = 0;
    for (const std::int64_t size : sizes) {
      if (size >= 0 && shape_[axis] != size) {
        fail("has size " + std::to_string(shape_[axis]) + " along axis " + std::to_string(axis) + "; expected " +
             std::to_string(size));
      }
      ++axis;
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw nb::value_error((std::string(name_) + " " + what).c_str());
  }

 private:
  const char* name_;
  int rank_;
  T* data_ = nullptr;
  std::int64_t shape_[4] = {};
};

// Bias may be None.
const std::uint16_t* bias_data(nb::handle object, std::int64_t size) {
  if (object.is_none()) return nullptr;
  const Array<std::uint16_t> bias(object, "bias", 1);
  bias.expect({size});
  return bias.data();
}

void check_blocks(std::int64_t num_inputs, const char* name) {
  require(num_inputs >= kBlock && num_inputs % kBlock == 0,
          std::string(name) + " has " + std::to_string(num_inputs) + " inputs; expected a multiple of 32");
}

Activations parse_activations(const std::string& name) {
  if (name == "int8") return Activations::int8;
  require(name == "bf16", "activations is '" + name + "'; expected 'int8' or 'bf16'");
  return Activations::bf16;
}

// x [T, K] and out [T, N] against a weight; then the product without the GIL.
void run_linear(nb::handle x_object, Weight weight, nb::handle bias, nb::handle out_object, Activations activations,
                bool add) {
  const Array<float> x(x_object, "x", 2), out(out_object, "out", 2, Access::write);
  x.expect({-1, weight.num_inputs});
  out.expect({x.shape(0), weight.num_outputs});
  weight.bias = bias_data(bias, weight.num_outputs);
  nb::gil_scoped_release release;
  linear(x.data(), x.shape(0), weight, activations, add, out.data());
}

void bind_quantize_weight(nb::handle weight_object, nb::handle panels_object) {
  const Array<std::uint16_t> weight(weight_object, "weight", 2);
  const Array<std::uint8_t> panels(panels_object, "panels", 2, Access::write);
  check_blocks(weight.shape(1), "weight");
  panels.expect({(weight.shape(0) + kPanelRows - 1) / kPanelRows, panel_bytes(weight.shape(1) / kBlock)});
  nb::gil_scoped_release release;
  quantize_weight(weight.data(), weight.shape(0), weight.shape(1), panels.data());
}

void bind_linear_int8(nb::handle x, nb::handle panels_object, std::int64_t num_outputs, nb::handle bias, nb::handle out,
                      bool add) {
  const Array<float> activations(x, "x", 2);
  check_blocks(activations.shape(1), "x");
  const Array<std::uint8_t> panels(panels_object, "panels", 2);
  panels.expect({(num_outputs + kPanelRows - 1) / kPanelRows, panel_bytes(activations.shape(1) / kBlock)});
  const Weight weight{Weight::Kind::panels, panels.data(), nullptr, nullptr, num_outputs, activations.shape(1)};
  run_linear(x, weight, bias, out, Activations::int8, add);
}

void bind_linear_bf16(nb::handle x, nb::handle weight_object, nb::handle bias, nb::handle out, bool add) {
  const Array<std::uint16_t> data(weight_object, "weight", 2);
  check_blocks(data.shape(1), "weight");
  const Weight weight{Weight::Kind::bf16_rows,
                      reinterpret_cast<const std::uint8_t*>(data.data()),
                      nullptr,
                      nullptr,
                      data.shape(0),
                      data.shape(1)};
  run_linear(x, weight, bias, out, Activations::bf16, add);
}

void bind_matmul_mxfp4(nb::handle x, nb::handle blocks_object, nb::handle scales_object, nb::handle bias,
                       nb::handle out, const std::string& activations) {
  const Array<std::uint8_t> blocks(blocks_object, "blocks", 3), scales(scales_object, "scales", 2);
  blocks.expect({-1, -1, 16});
  scales.expect({blocks.shape(0), blocks.shape(1)});
  check_blocks(blocks.shape(1) * kBlock, "blocks");
  const Weight weight{Weight::Kind::mxfp4, blocks.data(),           scales.data(), nullptr,
                      blocks.shape(0),     blocks.shape(1) * kBlock};
  run_linear(x, weight, bias, out, parse_activations(activations), false);
}

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
  const BoundAdapters adapters(adapter_list, adapter_of, experts, num_tokens);
  nb::gil_scoped_release release;
  moe(x.data(), num_tokens, id.data(), weight.data(), static_cast<int>(num_active), experts, adapters.get(),
      activations, out.data());
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

void bind_pack_mxfp4(nb::handle blocks_object, nb::handle scales_object, nb::handle packed_object) {
  const Array<std::uint8_t> blocks(blocks_object, "blocks", 3), scales(scales_object, "scales", 2);
  const Array<std::uint8_t> packed(packed_object, "packed", 2, Access::write);
  const std::int64_t num_outputs = blocks.shape(0), num_blocks = blocks.shape(1);
  blocks.expect({-1, -1, 16});
  scales.expect({num_outputs, num_blocks});
  packed.expect({(num_outputs + kTileRows - 1) / kTileRows, packed_bytes(num_blocks)});
  nb::gil_scoped_release release;
  pack_mxfp4(blocks.data(), scales.data(), num_outputs, num_blocks, packed.data());
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

// One expert's rows in our layout: what packing takes.
void bind_read_ggml(nb::handle first_object, nb::handle second_object, bool is_split, nb::handle blocks_object,
                    nb::handle scales_object) {
  const Array<std::uint8_t> first(first_object, "first", 2);
  const bool has_two = !second_object.is_none();
  const Array<std::uint8_t> second(has_two ? second_object : first_object, "second", 2);
  require(first.shape(1) % kGgmlMxfp4Bytes == 0, "first has rows that are no multiple of 17 bytes");
  const std::int64_t num_rows = first.shape(0) * (has_two ? 2 : 1), num_blocks = first.shape(1) / kGgmlMxfp4Bytes;
  second.expect({first.shape(0), first.shape(1)});
  const Array<std::uint8_t> blocks(blocks_object, "blocks", 3, Access::write);
  const Array<std::uint8_t> scales(scales_object, "scales", 2, Access::write);
  blocks.expect({num_rows, num_blocks, 16});
  scales.expect({num_rows, num_blocks});
  nb::gil_scoped_release release;
  read_ggml_rows({first.data(), has_two ? second.data() : nullptr, is_split}, 0, num_rows, num_blocks, blocks.data(),
                 scales.data());
}

void bind_q8_to_bf16(nb::handle rows_object, nb::handle out_object) {
  const Array<std::uint8_t> rows(rows_object, "rows", 2);
  require(rows.shape(1) % kGgmlQ8Bytes == 0, "rows are no multiple of 34 bytes");
  const Array<std::uint16_t> out(out_object, "out", 2, Access::write);
  out.expect({rows.shape(0), rows.shape(1) / kGgmlQ8Bytes * kBlock});
  nb::gil_scoped_release release;
  q8_to_bf16(rows.data(), rows.shape(0) * (rows.shape(1) / kGgmlQ8Bytes), out.data());
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

// uint8 memory on huge pages where the system gives them; contents undefined.
nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>> allocate(std::int64_t size_bytes) {
  require(size_bytes >= 0, "size_bytes is " + std::to_string(size_bytes) + "; expected 0 or more");
  constexpr std::int64_t huge_page = 2 << 20;
  const std::int64_t align = size_bytes >= huge_page ? huge_page : 64;
  if (size_bytes > (std::int64_t{1} << 46)) throw std::bad_alloc();
  const std::int64_t size = (size_bytes + align - 1) / align * align;
  void* data = std::aligned_alloc(align, size ? size : align);
  if (!data) throw std::bad_alloc();
#if defined(__linux__)
  if (align == huge_page) madvise(data, size, MADV_HUGEPAGE);
#endif
  const nb::capsule owner(data, [](void* p) noexcept { std::free(p); });
  return nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>(data, {static_cast<std::size_t>(size_bytes)}, owner);
}

double bind_read_bandwidth(nb::handle data_object, int repeats) {
  const Array<std::uint8_t> data(data_object, "data", 1);
  require(data.shape(0) >= 1 << 20, "data has " + std::to_string(data.shape(0)) + " bytes; expected at least 1 MiB");
  nb::gil_scoped_release release;
  return measure_read_bandwidth(data.data(), data.shape(0), repeats);
}

}  // namespace

void bind_matmul(nb::module_& m) {
  m.def("allocate", &allocate, nb::arg("size_bytes"));
  m.def("panel_bytes", [](std::int64_t num_inputs) { return panel_bytes(num_inputs / kBlock); }, nb::arg("num_inputs"));
  m.def("quantize_weight", &bind_quantize_weight, nb::arg("weight"), nb::arg("panels"));
  m.def("linear_int8", &bind_linear_int8, nb::arg("x"), nb::arg("panels"), nb::arg("num_outputs"),
        nb::arg("bias").none(), nb::arg("out"), nb::arg("add"));
  m.def("linear_bf16", &bind_linear_bf16, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"),
        nb::arg("add"));
  m.def("matmul_mxfp4", &bind_matmul_mxfp4, nb::arg("x"), nb::arg("blocks"), nb::arg("scales"), nb::arg("bias").none(),
        nb::arg("out"), nb::arg("activations"));
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
  m.def("read_ggml", &bind_read_ggml, nb::arg("first"), nb::arg("second").none(), nb::arg("is_split"),
        nb::arg("blocks"), nb::arg("scales"));
  m.def("q8_to_bf16", &bind_q8_to_bf16, nb::arg("rows"), nb::arg("out"));
  m.def("low_rank", &bind_low_rank, nb::arg("x"), nb::arg("row"), nb::arg("a"), nb::arg("b"), nb::arg("scale"),
        nb::arg("out"), nb::arg("column"));
  m.def("packed_bytes", [](std::int64_t num_inputs) { return packed_bytes(num_inputs / kBlock); },
        nb::arg("num_inputs"));
  m.def("pack_mxfp4", &bind_pack_mxfp4, nb::arg("blocks"), nb::arg("scales"), nb::arg("packed"));
  m.def("moe_packed", &bind_moe_packed, nb::arg("x"), nb::arg("expert_id"), nb::arg("expert_weight"),
        nb::arg("gate_up_packed"), nb::arg("gate_up_bias"), nb::arg("down_packed"), nb::arg("down_bias"),
        nb::arg("out"), nb::arg("limit"), nb::arg("alpha"), nb::arg("adapters").none(), nb::arg("adapter_T").none());
  m.def("linear_scratch_bytes", &linear_scratch_bytes, nb::arg("num_tokens"), nb::arg("num_inputs"));
  m.def("moe_scratch_bytes", &moe_scratch_bytes, nb::arg("num_tokens"), nb::arg("hidden"), nb::arg("expert_size"),
        nb::arg("num_active"));
  m.def("matmul_thread_bytes", &matmul_thread_bytes, nb::arg("max_inputs"));
  m.def("measure_read_bandwidth", &bind_read_bandwidth, nb::arg("data"), nb::arg("repeats"));
  m.def("measure_int8_ops", &measure_int8_ops, nb::arg("rounds"), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace harmonium
