// What both paths share: masks as intervals, number conversion, the softmax of a tile in registers.
//
// Accumulator layout of mma.m16n8 and wgmma.m64nN alike: lane l of a warp holds, for each 8 columns j,
// x[4j], x[4j+1] = row l/4, columns 8j + 2(l%4) + {0, 1} and x[4j+2], x[4j+3] = the same of row l/4 + 8.
// Two neighbouring j packed to 16 bits are an A operand of 16 columns: no shuffle between two products.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "flash_attention.h"

namespace flash {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr float kLog2e = 1.4426950408889634f;

struct Interval {
  int begin, end;
};

// Keys that the query at position p sees.
__device__ inline Interval visible_keys(const Mask& m, int b, int p) {
  Interval i{0, m.causal ? p + 1 : m.s};
  if (m.doc_start) {
    const int64_t at = (int64_t)b * m.s + p;
    i.begin = max(i.begin, m.doc_start[at]);
    i.end = min(i.end, m.doc_end[at]);
  }
  return i;
}

// Positions of the queries that see key c; none for a key beyond S.
__device__ inline Interval visible_queries(const Mask& m, int b, int c) {
  if (c >= m.s) return {0, 0};
  Interval i{m.causal ? c : 0, m.s};
  if (m.doc_start) {
    const int64_t at = (int64_t)b * m.s + c;
    i.begin = max(i.begin, m.doc_start[at]);
    i.end = min(i.end, m.doc_end[at]);
  }
  return i;
}

__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
__device__ inline uint32_t pack(float lo, float hi);
template <>
__device__ inline uint32_t pack<bf16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <>
__device__ inline uint32_t pack<fp16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}

template <class T>
__device__ inline float2 unpack(uint32_t x);
template <>
__device__ inline float2 unpack<bf16>(uint32_t x) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&x));
}
template <>
__device__ inline float2 unpack<fp16>(uint32_t x) {
  return __half22float2(*reinterpret_cast<__half2*>(&x));
}

// Byte offset of 16-byte chunk c of row r in a tile of 128-byte rows, swizzled so that eight rows of one
// column hit eight different bank groups. The same pattern as TMA's 128-byte swizzle.
__device__ inline uint32_t swizzle(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// -inf where a column of the tile is outside its row's interval. `col` is this lane's first column.
template <int N>
__device__ inline void mask_scores(float (&s)[N], int col, Interval row0, Interval row1) {
#pragma unroll
  for (int j = 0; j < N / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int c = col + 8 * j + e;
      if (c < row0.begin || c >= row0.end) s[4 * j + e] = -INFINITY;
      if (c < row1.begin || c >= row1.end) s[4 * j + 2 + e] = -INFINITY;
    }
  }
}

// Running maximum and sum of the two rows of a lane; `sum` is of this lane's columns only until the end.
struct SoftmaxState {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};
};

// Scores of one tile -> exp2(scale2 (s - max)) in place; updates the state and rescales the output.
// scale2 = scale * log2(e).
template <int N, int M>
__device__ inline void softmax_tile(float (&s)[N], float (&o)[M], SoftmaxState& state, float scale2) {
  float corr[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float m = s[2 * r];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    m = fmaxf(quad_max(m), state.max[r]);
    const float base = m == -INFINITY ? 0.f : m * scale2;  // a row that has seen no key yet
    corr[r] = fast_exp2(state.max[r] * scale2 - base);
    state.max[r] = m;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * j + 2 * r + e];
        x = fast_exp2(fmaf(x, scale2, -base));
        sum += x;
      }
    }
    state.sum[r] = state.sum[r] * corr[r] + sum;
  }
  // The maximum rarely moves after the first tiles; a warp votes, so that it does not diverge.
  if (__any_sync(~0u, corr[0] != 1.f || corr[1] != 1.f)) {
#pragma unroll
    for (int j = 0; j < M / 4; ++j) {
      o[4 * j] *= corr[0];
      o[4 * j + 1] *= corr[0];
      o[4 * j + 2] *= corr[1];
      o[4 * j + 3] *= corr[1];
    }
  }
}

// Sums the state over the quad; returns 1 / sum (0 for a row without keys) and the row's log sum exp.
__device__ inline float finish_row(SoftmaxState& state, int r, float scale, float& lse) {
  const float sum = quad_sum(state.sum[r]);
  lse = sum > 0.f ? state.max[r] * scale + logf(sum) : -INFINITY;
  return sum > 0.f ? 1.f / sum : 0.f;
}

}  // namespace flash
