// e4m3 values and the largest magnitude of what was cast; see fp8.cu.
#pragma once
#include <cuda_fp8.h>

#include "vector.cuh"

namespace tl {

// Eight values times `scale`, saturating at 448.
__device__ inline uint2 to_fp8(const float (&x)[8], float scale) {
  uint2 out;
  auto* pairs = reinterpret_cast<__nv_fp8x2_storage_t*>(&out);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = __nv_cvt_float2_to_fp8x2({x[2 * i] * scale, x[2 * i + 1] * scale}, __NV_SATFINITE, __NV_E4M3);
  return out;
}

__device__ inline void update_largest(float& largest, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Numbers that are not negative are ordered as their bits are. Mostly there is a larger one already.
__device__ inline void note(float largest, Fp8Slot* slot) {
  if (largest > *reinterpret_cast<volatile float*>(&slot->amax))
    atomicMax(reinterpret_cast<int*>(&slot->amax), __float_as_int(largest));
}

}  // namespace tl
