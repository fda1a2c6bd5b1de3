#include "bindings.h"
namespace harmonium { void bind_matmul(nb::module_&) {} }
