// Checks of the arrays for native/ops.h: a ValueError names the argument, its value and what was expected.
#include <nanobind/stl/optional.h>

#include <climits>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "ops.h"
#include "program.h"

namespace harmonium {

namespace {

using Array = nb::ndarray<nb::device::cpu>;
using ReadOnly = nb::ndarray<nb::ro, nb::device::cpu>;

std::string text(std::int64_t value) { return std::to_string(value); }

template <typename A>
std::string shape_text(const A& array) {
  std::string out = "[";
  for (std::size_t i = 0; i < array.ndim(); ++i) out += (i ? ", " : "") + text(array.shape(i));
  return out + "]";
}

template <typename A>
std::string dtype_text(const A& array) {
  static const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const unsigned code = array.dtype().code;
  return (code < 7 ? kinds[code] : "dtype code " + text(code)) + text(array.dtype().bits);
}

// Check dtype, shape (-1: any size) and contiguity.
template <typename T, typename A>
void check(const A& array, const char* name, const char* dtype, const std::vector<std::int64_t>& shape) {
  const std::string argument = name;
  require(array.dtype() == nb::dtype<T>(), argument + " has dtype " + dtype_text(array) + "; expected " + dtype);
  bool is_same = array.ndim() == shape.size();
  std::string expected = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (is_same && shape[i] >= 0) is_same = static_cast<std::int64_t>(array.shape(i)) == shape[i];
    expected += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : text(shape[i]));
  }
  require(is_same, argument + " has shape " + shape_text(array) + "; expected " + expected + "]");
  std::int64_t step = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    require(array.size() == 0 || array.shape(i) <= 1 || array.stride(i) == step,
            argument + " is strided; expected a C-contiguous array");
    step *= static_cast<std::int64_t>(array.shape(i));
  }
}

template <typename T>
const T* input(const ReadOnly& array, const char* name, const char* dtype, const std::vector<std::int64_t>& shape) {
  check<T>(array, name, dtype, shape);
  return static_cast<const T*>(array.data());
}

template <typename T>
T* output(const Array& array, const char* name, const char* dtype, const std::vector<std::int64_t>& shape) {
  check<T>(array, name, dtype, shape);
  return static_cast<T*>(array.data());
}

template <typename A>
std::int64_t size_of(const A& array, const char* name, std::size_t rank, std::size_t axis) {
  require(array.ndim() == rank, std::string(name) + " has shape " + shape_text(array) + "; expected " + text(rank) +
                                    (rank == 1 ? " dimension" : " dimensions"));
  return static_cast<std::int64_t>(array.shape(axis));
}

using Buffer = std::shared_ptr<std::vector<float>>;

// A short vector that a checkpoint holds as bf16: float32 as it is, or bf16 bits widened into `buffer`.
const float* short_vector(const ReadOnly& array, const char* name, std::int64_t count, Buffer& buffer) {
  if (array.dtype() == nb::dtype<float>()) return input<float>(array, name, "float32", {count});
  const auto* bits = input<std::uint16_t>(array, name, "float32 or uint16 (bf16 bits)", {count});
  buffer = std::make_shared<std::vector<float>>(count);
  // Not by gather_rows: the thread pool may be busy, and the GIL is still held here.
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits[i]) << 16;
    std::memcpy(&(*buffer)[i], &wide, sizeof wide);
  }
  return buffer->data();
}

using Scales = std::optional<Array>;

std::uint16_t* check_scales(const Scales& scales, const char* name, const KeyValueCache& cache) {
  require(scales.has_value(), std::string("key_cache is int8 and ") + name + " is None; expected its scales");
  return output<std::uint16_t>(*scales, name, "uint16 (bf16 bits)",
                               {cache.num_blocks, cache.num_kv_heads, cache.block_size, scale_groups(cache.head_size)});
}

KeyValueCache check_cache(const Array& key, const Array& value, const Scales& key_scale, const Scales& value_scale) {
  KeyValueCache cache;
  cache.num_blocks = size_of(key, "key_cache", 4, 0);
  cache.num_kv_heads = static_cast<std::int64_t>(key.shape(1));
  cache.block_size = static_cast<std::int64_t>(key.shape(2));
  cache.head_size = static_cast<std::int64_t>(key.shape(3));
  const std::vector<std::int64_t> shape = {cache.num_blocks, cache.num_kv_heads, cache.block_size, cache.head_size};
  const bool is_int8 = key.dtype() == nb::dtype<std::int8_t>();
  if (is_int8) {
    cache.key = output<std::int8_t>(key, "key_cache", "int8", shape);
    cache.value = output<std::int8_t>(value, "value_cache", "int8", shape);
  } else {
    cache.key = output<std::uint16_t>(key, "key_cache", "uint16 (bf16 bits) or int8", shape);
    cache.value = output<std::uint16_t>(value, "value_cache", "uint16 (bf16 bits)", shape);
  }
  require(cache.num_kv_heads > 0 && cache.block_size > 0, "key_cache has shape " + shape_text(key) + "; expected no 0");
  require(cache.head_size > 0 && cache.head_size % 8 == 0,
          "key_cache has head size " + text(cache.head_size) + "; expected a multiple of 8");
  require(is_int8 || !(key_scale || value_scale), "key_scale or value_scale is given; a bf16 cache has none");
  cache.key_scale = is_int8 ? check_scales(key_scale, "key_scale", cache) : nullptr;
  cache.value_scale = is_int8 ? check_scales(value_scale, "value_scale", cache) : nullptr;
  return cache;
}

void check_heads(std::int64_t num_heads, std::int64_t num_kv_heads) {
  require(num_heads > 0 && num_heads % num_kv_heads == 0,
          "num_heads is " + text(num_heads) + "; expected a multiple of the cache's " + text(num_kv_heads) +
              " kv heads");
}

void bound_rms_norm(const ReadOnly& x, const ReadOnly& weight, float eps, const Array& out) {
  const std::int64_t T = size_of(x, "x", 2, 0), D = size_of(x, "x", 2, 1);
  require(D > 0, "x has shape " + shape_text(x) + "; expected at least 1 column");
  Buffer buffer;
  const auto* x_data = input<float>(x, "x", "float32", {T, D});
  auto* out_data = output<float>(out, "out", "float32", {T, D});
  const float* weight_data = short_vector(weight, "weight", D, buffer);
  perform([=] { (void)buffer, rms_norm(x_data, weight_data, eps, T, D, out_data); });
}

void bound_rope_and_store(const Array& qkv, const ReadOnly& cos, const ReadOnly& sin, const Array& key_cache,
                          const Array& value_cache, const ReadOnly& slot, std::int64_t num_heads,
                          const Scales& key_scale, const Scales& value_scale) {
  const KeyValueCache cache = check_cache(key_cache, value_cache, key_scale, value_scale);
  check_heads(num_heads, cache.num_kv_heads);
  const std::int64_t T = size_of(qkv, "qkv", 2, 0), half = cache.head_size / 2;
  auto* qkv_data = output<float>(qkv, "qkv", "float32", {T, (num_heads + 2 * cache.num_kv_heads) * cache.head_size});
  const auto* cos_data = input<float>(cos, "cos", "float32", {T, half});
  const auto* sin_data = input<float>(sin, "sin", "float32", {T, half});
  const auto* slots = input<std::int64_t>(slot, "slot", "int64", {T});
  const std::int64_t num_slots = cache.num_blocks * cache.block_size;
  perform([=] {
    for (std::int64_t t = 0; t < T; ++t) {
      if (slots[t] >= 0 && slots[t] < num_slots) continue;
      require(false, "slot[" + text(t) + "] is " + text(slots[t]) + "; expected 0 to " + text(num_slots - 1));
    }
    rope_and_store(qkv_data, cos_data, sin_data, cache, slots, T, num_heads);
  });
}

// Check one sequence's place in the batch and the block ids of the positions that it reads.
void check_sequence(const AttentionBatch& b, const KeyValueCache& cache, std::int64_t s) {
  const std::int64_t first = b.query_start[s], count = b.query_start[s + 1] - first, context = b.context_length[s];
  if (count < 0) {
    require(false, "query_start[" + text(s + 1) + "] is " + text(b.query_start[s + 1]) + "; expected at least " +
                       text(first));
  }
  if (count == 0) return;
  const std::int64_t capacity = b.blocks_per_sequence * cache.block_size;
  if (context < count || context > capacity) {
    require(false, "context_length[" + text(s) + "] is " + text(context) + "; expected " + text(count) +
                       " (its tokens) to " + text(capacity) + " (its block table)");
  }
  const std::int64_t lowest = b.window ? context - count - b.window + 1 : 0;
  const std::int64_t begin = (lowest > 0 ? lowest : 0) / cache.block_size;
  const std::int64_t end = (context - 1) / cache.block_size;
  for (std::int64_t i = begin; i <= end; ++i) {
    const std::int64_t block = b.block[s * b.blocks_per_sequence + i];
    if (block < 0 || block >= cache.num_blocks) {
      require(false, "block[" + text(s) + ", " + text(i) + "] is " + text(block) + "; expected 0 to " +
                         text(cache.num_blocks - 1));
    }
  }
}

void check_batch(const AttentionBatch& b, const KeyValueCache& cache, std::int64_t num_tokens) {
  if (b.query_start[0] != 0) require(false, "query_start[0] is " + text(b.query_start[0]) + "; expected 0");
  for (std::int64_t s = 0; s < b.num_sequences; ++s) check_sequence(b, cache, s);
  const std::int64_t end = b.query_start[b.num_sequences];
  if (end == num_tokens) return;
  require(false, "query_start ends at " + text(end) + "; expected qkv's " + text(num_tokens) + " rows");
}

void bound_attention(const ReadOnly& qkv, const Array& key_cache, const Array& value_cache, const ReadOnly& block,
                     const ReadOnly& query_start, const ReadOnly& context_length, const ReadOnly& sink,
                     std::int64_t window, float scale, const Array& out, const Scales& key_scale,
                     const Scales& value_scale) {
  const KeyValueCache cache = check_cache(key_cache, value_cache, key_scale, value_scale);
  AttentionBatch b;
  b.num_heads = size_of(sink, "sink", 1, 0);
  check_heads(b.num_heads, cache.num_kv_heads);
  const std::int64_t T = size_of(qkv, "qkv", 2, 0);
  b.qkv = input<float>(qkv, "qkv", "float32", {T, (b.num_heads + 2 * cache.num_kv_heads) * cache.head_size});
  b.out = output<float>(out, "out", "float32", {T, b.num_heads * cache.head_size});
  b.num_sequences = size_of(block, "block", 2, 0);
  b.blocks_per_sequence = size_of(block, "block", 2, 1);
  b.block = input<std::int32_t>(block, "block", "int32", {-1, -1});
  b.query_start = input<std::int32_t>(query_start, "query_start", "int32", {b.num_sequences + 1});
  b.context_length = input<std::int32_t>(context_length, "context_length", "int32", {b.num_sequences});
  require(window >= 0 && window <= INT_MAX, "window is " + text(window) + "; expected 0 (full) or more");
  b.window = window;
  b.scale = scale;
  Buffer buffer;
  b.sink = short_vector(sink, "sink", b.num_heads, buffer);
  perform([=] {
    (void)buffer;
    check_batch(b, cache, T);
    attention(b, cache);
  });
}

std::int64_t bound_scratch_bytes(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_size,
                                 std::int64_t num_tokens, std::int64_t num_sequences, std::int64_t max_context,
                                 int num_threads) {
  require(num_kv_heads > 0, "num_kv_heads is " + text(num_kv_heads) + "; expected 1 or more");
  check_heads(num_heads, num_kv_heads);
  return attention_scratch_bytes(num_heads, num_kv_heads, head_size, num_tokens, num_sequences, max_context,
                                 num_threads);
}

void bound_router(const ReadOnly& x, const ReadOnly& weight, const ReadOnly& bias, const Array& expert_id,
                  const Array& expert_weight, std::optional<ReadOnly> extra) {
  const std::int64_t T = size_of(x, "x", 2, 0), D = size_of(x, "x", 2, 1), E = size_of(weight, "weight", 2, 0);
  const std::int64_t A = size_of(expert_id, "expert_id", 2, 1);
  require(A >= 1 && A <= E, "expert_id has " + text(A) + " columns; expected 1 to " + text(E) + " (experts)");
  Buffer buffer;
  const auto* x_data = input<float>(x, "x", "float32", {T, D});
  const auto* weight_data = input<std::uint16_t>(weight, "weight", "uint16 (bf16 bits)", {E, D});
  const float* bias_data = short_vector(bias, "bias", E, buffer);
  const float* extra_data = extra ? input<float>(*extra, "extra", "float32", {T, E}) : nullptr;
  auto* id_data = output<std::int32_t>(expert_id, "expert_id", "int32", {T, A});
  auto* out_data = output<float>(expert_weight, "expert_weight", "float32", {T, A});
  perform([=] { (void)buffer, router(x_data, weight_data, bias_data, extra_data, T, D, E, A, id_data, out_data); });
}

void bound_gather_rows(const ReadOnly& table, const ReadOnly& token_id, const Array& out) {
  const std::int64_t V = size_of(table, "table", 2, 0), D = size_of(table, "table", 2, 1);
  const std::int64_t T = size_of(token_id, "token_id", 1, 0);
  const auto* table_data = input<std::uint16_t>(table, "table", "uint16 (bf16 bits)", {V, D});
  const auto* id_data = input<std::int32_t>(token_id, "token_id", "int32", {T});
  auto* out_data = output<float>(out, "out", "float32", {T, D});
  for (std::int64_t t = 0; t < T; ++t) {
    require(id_data[t] >= 0 && id_data[t] < V,
            "token_id[" + text(t) + "] is " + text(id_data[t]) + "; expected 0 to " + text(V - 1));
  }
  nb::gil_scoped_release release;
  gather_rows(table_data, id_data, T, D, out_data);
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.def("rms_norm", &bound_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"));
  m.def("rope_and_store", &bound_rope_and_store, nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"), nb::arg("key_cache"),
        nb::arg("value_cache"), nb::arg("slot"), nb::arg("num_heads"), nb::arg("key_scale").none() = nb::none(),
        nb::arg("value_scale").none() = nb::none());
  m.def("attention", &bound_attention, nb::arg("qkv"), nb::arg("key_cache"), nb::arg("value_cache"), nb::arg("block"),
        nb::arg("query_start"), nb::arg("context_length"), nb::arg("sink"), nb::arg("window"), nb::arg("scale"),
        nb::arg("out"), nb::arg("key_scale").none() = nb::none(), nb::arg("value_scale").none() = nb::none());
  m.def("attention_scratch_bytes", &bound_scratch_bytes, nb::arg("num_heads"), nb::arg("num_kv_heads"),
        nb::arg("head_size"), nb::arg("num_tokens"), nb::arg("num_sequences"), nb::arg("max_context"),
        nb::arg("num_threads"));
  m.def("router", &bound_router, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("expert_id"),
        nb::arg("expert_weight"), nb::arg("extra").none() = nb::none());
  m.def("gather_rows", &bound_gather_rows, nb::arg("table"), nb::arg("token_id"), nb::arg("out"));
}

}  // namespace harmonium
