// Python's side of the matrix kernels: checks every array, then releases the GIL and calls a driver of matmul.h.
#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "arrays.h"
#include "program.h"

namespace harmonium {

namespace {

// Bias may be None.
const std::uint16_t* bias_data(nb::handle object, std::int64_t size) {
  if (object.is_none()) return nullptr;
  const Array<std::uint16_t> bias(object, "bias", 1);
  bias.expect({size});
  return bias.data();
}

// x [T, K] and out [T, N] against a weight; then the product without the GIL.
void run_linear(nb::handle x_object, Weight weight, nb::handle bias, nb::handle out_object, Activations activations,
                bool add) {
  const Array<float> x(x_object, "x", 2), out(out_object, "out", 2, Access::write);
  x.expect({-1, weight.num_inputs});
  out.expect({x.shape(0), weight.num_outputs});
  weight.bias = bias_data(bias, weight.num_outputs);
  perform([=] { linear(x.data(), x.shape(0), weight, activations, add, out.data()); });
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

void bind_q8_to_panels(nb::handle rows_object, nb::handle panels_object) {
  const Array<std::uint8_t> rows(rows_object, "rows", 2);
  require(rows.shape(1) % kGgmlQ8Bytes == 0, "rows are no multiple of 34 bytes");
  const std::int64_t num_blocks = rows.shape(1) / kGgmlQ8Bytes;
  const Array<std::uint8_t> panels(panels_object, "panels", 2, Access::write);
  panels.expect({(rows.shape(0) + kPanelRows - 1) / kPanelRows, panel_bytes(num_blocks)});
  nb::gil_scoped_release release;
  q8_to_panels(rows.data(), rows.shape(0), num_blocks, panels.data());
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
  m.def("read_ggml", &bind_read_ggml, nb::arg("first"), nb::arg("second").none(), nb::arg("is_split"),
        nb::arg("blocks"), nb::arg("scales"));
  m.def("q8_to_bf16", &bind_q8_to_bf16, nb::arg("rows"), nb::arg("out"));
  m.def("q8_to_panels", &bind_q8_to_panels, nb::arg("rows"), nb::arg("panels"));
  m.def("packed_bytes", [](std::int64_t num_inputs) { return packed_bytes(num_inputs / kBlock); },
        nb::arg("num_inputs"));
  m.def("pack_mxfp4", &bind_pack_mxfp4, nb::arg("blocks"), nb::arg("scales"), nb::arg("packed"));
  m.def("linear_scratch_bytes", &linear_scratch_bytes, nb::arg("num_tokens"), nb::arg("num_inputs"));
  m.def("matmul_thread_bytes", &matmul_thread_bytes, nb::arg("max_inputs"));
  m.def("measure_read_bandwidth", &bind_read_bandwidth, nb::arg("data"), nb::arg("repeats"));
  m.def("measure_int8_ops", &measure_int8_ops, nb::arg("rounds"), nb::call_guard<nb::gil_scoped_release>());
  m.def("measure_bf16_ops", &measure_bf16_ops, nb::arg("rounds"), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace harmonium
