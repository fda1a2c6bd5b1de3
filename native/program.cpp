#include "program.h"

namespace harmonium {

namespace {

thread_local Program* recorded = nullptr;

}  // namespace

Program* Program::current() { return recorded; }

void Program::begin() {
  require(!recorded, "this thread records another program");
  recorded = this;
}

void Program::end() {
  require(recorded == this, "this thread does not record this program");
  recorded = nullptr;
}

void Program::run() const {
  require(!recorded, "a program is being recorded");
  nb::gil_scoped_release release;
  for (const auto& call : calls_) call();
}

void bind_program(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("begin", &Program::begin)
      .def("end", &Program::end)
      .def("run", &Program::run)
      .def("__len__", &Program::size);
}

}  // namespace harmonium
