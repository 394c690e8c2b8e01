// The whole decode step (step.cuh) with int8 weights.
#include "step.cuh"

namespace tl {

cudaError_t decode_step_int8(const DecodeStep& p, cudaStream_t stream) {
  return decode_step_of<Format::int8>(p, stream);
}

}  // namespace tl
