// Which instruction sets were compiled in, which of them this processor can run, and which one is in use.
#pragma once

namespace harmonium {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };
constexpr int kNumIsa = 3;
constexpr const char* kIsaNames[kNumIsa] = {"scalar", "avx2", "avx512"};

// True if the kernels for `isa` were compiled in and this processor and its operating system run them.
// avx512 asks for F, BW, DQ, VL, VBMI, VNNI and BF16 together: Zen 4 and later, Sapphire Rapids and later.
bool isa_supported(Isa isa);

// The instruction set in use: the best supported one until set_isa is called. Not changed while kernels run.
Isa current_isa();
void set_isa(Isa isa);

}  // namespace harmonium
