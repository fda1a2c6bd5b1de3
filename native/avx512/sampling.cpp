#include "sampling.h"

#include <cstddef>

namespace harmonium {

namespace {
constexpr int kWidth = 16;
#include "sampling_body.h"
}  // namespace

const SamplingKernels kSamplingAvx512 = {block_max, block_exp_sum, exp_scaled};

}  // namespace harmonium
