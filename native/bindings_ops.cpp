#include "bindings.h"
namespace harmonium { void bind_ops(nb::module_&) {} }
