// The whole decode step (step.cuh) with int4 weights.
#include "step.cuh"

namespace tl {

cudaError_t decode_step_int4(const DecodeStep& p, cudaStream_t stream) {
  return decode_step_of<Format::int4>(p, stream);
}

}  // namespace tl
