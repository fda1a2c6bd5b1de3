#include "sampling.h"

#include <cstddef>

namespace harmonium {

namespace {
constexpr int kWidth = 8;
#include "sampling_body.h"
}  // namespace

const SamplingKernels kSamplingAvx2 = {block_max, block_exp_sum, exp_scaled};

}  // namespace harmonium
