#include "sampling.h"

#include <cstddef>

namespace harmonium {

namespace {
constexpr int kWidth = 4;  // what SSE2 and NEON, part of their base, hold
#include "sampling_body.h"
}  // namespace

const SamplingKernels kSamplingScalar = {block_max, block_exp_sum, exp_scaled};

}  // namespace harmonium
