// Python's side of split weights (matmul.h, native/split.cpp).
#include <nanobind/stl/vector.h>

#include "arrays.h"

#include <bitset>
#include <vector>

namespace harmonium {

namespace {

std::int64_t split_bytes(std::int64_t num_outputs, std::int64_t num_inputs) {
  const std::int64_t num_panels = (num_outputs + kPanelRows - 1) / kPanelRows, num_blocks = num_inputs / kBlock;
  return num_panels * (split_high_bytes(num_blocks) + split_low_bytes(num_blocks));
}

void bind_quantize_split(nb::handle weight_object, nb::handle split_object) {
  const Array<std::uint16_t> weight(weight_object, "weight", 2);
  const Array<std::uint8_t> split(split_object, "split", 1, Access::write);
  check_blocks(weight.shape(1), "weight");
  split.expect({split_bytes(weight.shape(0), weight.shape(1))});
  nb::gil_scoped_release release;
  quantize_split(weight.data(), weight.shape(0), weight.shape(1), split.data());
}

Weight split_weight(const Array<float>& x, const Array<std::uint8_t>& split, std::int64_t num_outputs) {
  check_blocks(x.shape(1), "x");
  split.expect({split_bytes(num_outputs, x.shape(1))});
  return {Weight::Kind::split, split.data(), nullptr, nullptr, num_outputs, x.shape(1)};
}

void bind_linear_split(nb::handle x_object, nb::handle split_object, std::int64_t num_outputs, nb::handle out_object) {
  const Array<float> x(x_object, "x", 2), out(out_object, "out", 2, Access::write);
  const Array<std::uint8_t> split(split_object, "split", 1);
  const Weight weight = split_weight(x, split, num_outputs);
  out.expect({x.shape(0), num_outputs});
  nb::gil_scoped_release release;
  linear(x.data(), x.shape(0), weight, Activations::int8, false, out.data());
}

// For each row: keep, key and temperature; allowed: a list of None or uint32 words.
std::int64_t bind_screen_split(nb::handle x_object, nb::handle split_object, std::int64_t num_outputs,
                               const std::vector<std::int64_t>& keep, const std::vector<std::uint64_t>& key,
                               const std::vector<double>& temperature, nb::list allowed, nb::handle out_object) {
  const Array<float> x(x_object, "x", 2), out(out_object, "out", 2, Access::write);
  const Array<std::uint8_t> split(split_object, "split", 1);
  const Weight weight = split_weight(x, split, num_outputs);
  const std::int64_t num_rows = x.shape(0);
  require(num_rows >= 1 && num_rows <= kScreenRows,
          "x has " + std::to_string(num_rows) + " rows; expected 1 to " + std::to_string(kScreenRows));
  out.expect({num_rows, num_outputs});
  const auto has_all = [&](std::size_t count) { return static_cast<std::int64_t>(count) == num_rows; };
  require(has_all(keep.size()) && has_all(key.size()) && has_all(temperature.size()) && has_all(allowed.size()),
          "keep, key, temperature and allowed are not one for each row of x");
  std::vector<ScreenRow> rows;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    require(keep[row] >= 0, "keep is " + std::to_string(keep[row]) + "; expected at least 0");
    require(temperature[row] >= 0, "temperature is " + std::to_string(temperature[row]) + "; expected at least 0");
    require(!keep[row] || temperature[row] == 0, "a row has both keep and a temperature");
    const nb::handle given = allowed[row];
    const std::uint32_t* bits = nullptr;
    if (!given.is_none()) {
      const Array<std::uint32_t> words(given, "allowed", 1);
      const std::int64_t needed = (num_outputs + 31) / 32;
      require(words.shape(0) >= needed, "allowed has too few words; expected " + std::to_string(needed));
      bits = words.data();
    }
    rows.push_back({keep[row], bits, key[row], temperature[row]});
  }
  nb::gil_scoped_release release;
  return screen(x.data(), num_rows, weight, rows.data(), out.data());
}

std::int64_t count_bits(nb::handle words_object) {
  const Array<std::uint32_t> words(words_object, "words", 1);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < words.shape(0); ++i) count += std::bitset<32>(words.data()[i]).count();
  return count;
}

}  // namespace

void bind_split(nb::module_& m) {
  m.def("split_bytes", &split_bytes, nb::arg("num_outputs"), nb::arg("num_inputs"));
  m.def("quantize_split", &bind_quantize_split, nb::arg("weight"), nb::arg("split"));
  m.def("linear_split", &bind_linear_split, nb::arg("x"), nb::arg("split"), nb::arg("num_outputs"), nb::arg("out"));
  m.def("screen_split", &bind_screen_split, nb::arg("x"), nb::arg("split"), nb::arg("num_outputs"), nb::arg("keep"),
        nb::arg("key"), nb::arg("temperature"), nb::arg("allowed"), nb::arg("out"));
  m.def("count_bits", &count_bits, nb::arg("words"));
}

}  // namespace harmonium
