#include "isa.h"

namespace harmonium {

namespace {

Isa best_isa() {
  if (isa_supported(Isa::avx512)) return Isa::avx512;
  if (isa_supported(Isa::avx2)) return Isa::avx2;
  return Isa::scalar;
}

Isa g_isa = best_isa();

}  // namespace

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system (xgetbv) whether it saves the wide registers.
  __builtin_cpu_init();
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  }
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::scalar;
}

Isa current_isa() { return g_isa; }
void set_isa(Isa isa) { g_isa = isa; }

}  // namespace harmonium
