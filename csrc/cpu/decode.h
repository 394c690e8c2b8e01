// What stands between two quantised products on the CPU: attention over a paged cache, RMSNorm, SwiGLU and RoPE, fp32.
//
// A result depends on its own token, sequence and head alone, never on what else is in the batch, how a prompt was cut
// into chunks, or how the caller splits work over threads; all instruction sets give the same bits. No allocation and
// no thread inside.
#pragma once
#include <stdint.h>

#include "quant_matmul.h"

#ifdef __cplusplus
extern "C" {
#endif

// How keys and values are stored.
enum { TL_CACHE_F32 = 0, TL_CACHE_BF16 = 1, TL_CACHE_F16 = 2, TL_CACHE_INT8 = 3 };

// Keys and values of one layer, (slots, G, D). Position p of a sequence lies in slot
// table[p / block_size] * block_size + p % block_size.
typedef struct {
  void *k, *v;
  float *k_scale, *v_scale;  // (slots, G), INT8: x = scale q
  int32_t type;
  int64_t block_size, groups, head_size;  // G, D: a multiple of 8, at most 256
} tl_paged_cache;

// Puts the keys and values (G, D) of one token into a slot. INT8: scale = max |x| / 127.
void tl_cpu_cache_store(int isa, const tl_paged_cache* cache, int64_t slot, const float* k, const float* v);

// Attention of the H / G = `heads` query heads of one group, for T new tokens of one sequence, which has `past` tokens
// before them: token t sees positions 0 to past + t, itself included, whose keys and values the cache has.
//   out = softmax(scale q K^T) V
// q and out: (T, heads, D), token t at t * stride from the first. scratch: tl_cpu_attention_scratch(heads, D) floats of
// this thread alone.
void tl_cpu_paged_attention(int isa, const tl_paged_cache* cache, const uint32_t* table, int64_t group, int64_t past,
                        int64_t t, int64_t heads, float scale, const float* q, int64_t q_stride, float* out,
                        int64_t out_stride, float* scratch);
int64_t tl_cpu_attention_scratch(int64_t heads, int64_t head_size);

// y = x / sqrt(mean x^2 + eps) * weight of one row of n; n a multiple of 8.
void tl_cpu_rms_norm(int isa, const float* x, const float* weight, float eps, int64_t n, float* y);

// y = gate sigmoid(gate) up, of one row [gate | up] of 2 n; n a multiple of 8. y may be gate_up.
void tl_cpu_swiglu(int isa, const float* gate_up, int64_t n, float* y);

// Turns heads of one token: of each pair (x[i], x[i + rotated / 2]), i < rotated / 2, by angle i.
// cos, sin: (rotated / 2).
void tl_cpu_rope(int isa, float* x, int64_t heads, int64_t head_size, int64_t rotated, const float* cos,
             const float* sin);

#ifdef __cplusplus
}
#endif
