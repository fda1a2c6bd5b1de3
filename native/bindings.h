// What every bindings file shares: array types that check dtype, rank and contiguity, and the list of binders.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace harmonium {

namespace nb = nanobind;

// C-contiguous CPU arrays. Bind them with nb::arg().noconvert(), so that a wrong dtype is an error and no copy.
// bf16 has no NumPy type: its bits travel as uint16.
template <typename T, std::size_t Rank>
using In = nb::ndarray<const T, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;
template <typename T, std::size_t Rank>
using Out = nb::ndarray<T, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;

// Raise ValueError naming the argument unless `ok`.
inline void require(bool ok, const std::string& message) {
  if (!ok) throw nb::value_error(message.c_str());
}

// Raised, with INTERFACE of harmonium/kernels/interface.py, whenever a bound function's arguments change.
constexpr int kInterface = 5;

void bind_threads(nb::module_& m);
void bind_matmul(nb::module_& m);
void bind_program(nb::module_& m);
void bind_split(nb::module_& m);
void bind_moe(nb::module_& m);
void bind_ops(nb::module_& m);
void bind_sampling(nb::module_& m);

}  // namespace harmonium
