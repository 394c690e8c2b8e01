// Entry points of decode.h, and its plain form.
#define TL_VECTOR 0
#define TL_KERNELS decode_portable
#include "decode_tile.h"

namespace {

const tl::cpu::DecodeKernels& kernels(int isa) {
#if defined(__x86_64__)
  if (isa >= TL_ISA_AVX2) return tl::cpu::decode_avx2;
#endif
  (void)isa;
  return tl::cpu::decode_portable;
}

}  // namespace

void tl_cpu_cache_store(int isa, const tl_paged_cache* cache, int64_t slot, const float* k, const float* v) {
  kernels(isa).cache_store(*cache, slot, k, v);
}

void tl_cpu_paged_attention(int isa, const tl_paged_cache* cache, const uint32_t* table, int64_t group, int64_t past,
                        int64_t t, int64_t heads, float scale, const float* q, int64_t q_stride, float* out,
                        int64_t out_stride, float* scratch) {
  kernels(isa).attention(*cache, table, group, past, t, heads, scale, q, q_stride, out, out_stride, scratch);
}

int64_t tl_cpu_attention_scratch(int64_t heads, int64_t head_size) {
  const int64_t rows = heads < tl::cpu::ROWS ? tl::cpu::ROWS : heads;
  return 2 * tl::cpu::TILE * head_size + rows * static_cast<int64_t>(sizeof(tl::cpu::Row) / sizeof(float));
}

void tl_cpu_rms_norm(int isa, const float* x, const float* weight, float eps, int64_t n, float* y) {
  kernels(isa).rms_norm(x, weight, eps, n, y);
}

void tl_cpu_swiglu(int isa, const float* gate_up, int64_t n, float* y) { kernels(isa).swiglu(gate_up, n, y); }

void tl_cpu_rope(int isa, float* x, int64_t heads, int64_t head_size, int64_t rotated, const float* cos, const float* sin) {
  kernels(isa).rope(x, heads, head_size, rotated, cos, sin);
}
