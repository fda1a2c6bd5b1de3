// Arrays as arguments of the matrix kernels: checked through the buffer protocol, with errors that name them.
#pragma once

#include <nanobind/stl/string.h>

#include <initializer_list>
#include <string>

#include "bindings.h"
#include "matmul.h"

namespace harmonium {

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
struct Format<std::uint32_t> {
  static constexpr char code = 'I';
  static constexpr const char* name = "uint32";
};
template <>
struct Format<std::int64_t> {
  static constexpr char code = sizeof(long) == 8 ? 'l' : 'q';
  static constexpr const char* name = "int64";
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

inline void check_blocks(std::int64_t num_inputs, const char* name) {
  require(num_inputs >= kBlock && num_inputs % kBlock == 0,
          std::string(name) + " has " + std::to_string(num_inputs) + " inputs; expected a multiple of 32");
}

inline Activations parse_activations(const std::string& name) {
  if (name == "int8") return Activations::int8;
  require(name == "bf16", "activations is '" + name + "'; expected 'int8' or 'bf16'");
  return Activations::bf16;
}

}  // namespace harmonium
