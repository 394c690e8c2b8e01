// The functions of decode.h, one set an instruction set.
#pragma once
#include "decode.h"

namespace tl::cpu {

struct DecodeKernels {
  void (*attention)(const tl_paged_cache& cache, const uint32_t* table, int64_t group, int64_t past, int64_t t,
                    int64_t heads, float scale, const float* q, int64_t q_stride, float* out, int64_t out_stride,
                    float* scratch);
  void (*cache_store)(const tl_paged_cache& cache, int64_t slot, const float* k, const float* v);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  void (*swiglu)(const float* gate_up, int64_t n, float* y);
  void (*rope)(float* x, int64_t heads, int64_t head_size, int64_t rotated, const float* cos, const float* sin);
};
extern const DecodeKernels decode_portable, decode_avx2;

}  // namespace tl::cpu
