// The whole decode step (step.cuh) with 16-bit weights, and the choice among the three formats.
#include "step.cuh"

namespace tl {

cudaError_t decode_step_plain(const DecodeStep& p, cudaStream_t stream) {
  return decode_step_of<Format::plain>(p, stream);
}

int64_t decode_step_workspace(const DecodeStep& p) { return StepBuffers(p).bytes; }

cudaError_t decode_step(const DecodeStep& p, cudaStream_t stream) {
  const bool sizes = p.rows >= 1 && p.rows <= kDecodeRows && (p.head_size == 64 || p.head_size == 128) &&
                     p.layers > 0 && p.groups > 0 && p.heads % p.groups == 0 && p.width % 8 == 0 &&
                     p.mlp_width % 8 == 0 && p.rotary.n % 16 == 0 && (p.type == Type::bf16 || p.type == Type::fp16);
  if (!sizes) return cudaErrorInvalidValue;
  switch (p.format) {
    case Format::int8:
      return decode_step_int8(p, stream);
    case Format::int4:
      return decode_step_int4(p, stream);
    default:
      return decode_step_plain(p, stream);
  }
}

}  // namespace tl
