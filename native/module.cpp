// The Python module harmonium._native: arrays in, arrays out. Reached through harmonium.kernels alone.
#include "bindings.h"
#include "isa.h"
#include "threads.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace harmonium {

namespace {

Isa parse_isa(const std::string& name) {
  for (int i = 0; i < kNumIsa; ++i) {
    if (name == kIsaNames[i]) {
      require(isa_supported(static_cast<Isa>(i)), "instruction set '" + name + "' is not available on this processor");
      return static_cast<Isa>(i);
    }
  }
  throw nb::value_error(("unknown instruction set '" + name + "'; expected scalar, avx2 or avx512").c_str());
}

}  // namespace

void bind_threads(nb::module_& m) {
  m.def("supported_isa", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kNumIsa; ++i) {
      if (isa_supported(static_cast<Isa>(i))) names.emplace_back(kIsaNames[i]);
    }
    return names;
  });
  m.def("get_isa", [] { return std::string(kIsaNames[static_cast<int>(current_isa())]); });
  m.def("set_isa", [](const std::string& name) { set_isa(parse_isa(name)); }, nb::arg("name"));
  m.def("get_num_threads", &num_threads);
  m.def(
      "set_num_threads",
      [](int count, const std::vector<int>& cores) {
        require(count >= 1 && count <= 256, "count is " + std::to_string(count) + "; expected 1 to 256");
        set_num_threads(count, cores.data(), static_cast<int>(cores.size()));
      },
      nb::arg("count"), nb::arg("cores"));
}

}  // namespace harmonium

NB_MODULE(_native, m) {
  m.attr("interface") = harmonium::kInterface;
  harmonium::bind_threads(m);
  harmonium::bind_matmul(m);
  harmonium::bind_program(m);
  harmonium::bind_split(m);
  harmonium::bind_moe(m);
  harmonium::bind_ops(m);
  harmonium::bind_sampling(m);
}
