#include "bindings.h"
namespace harmonium { void bind_sampling(nb::module_&) {} }
