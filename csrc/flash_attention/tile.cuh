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

constexpr int kEverywhere = 1 << 30;  // full attention: queries may be more than keys, so at negative positions

// Positions of the queries that see key c; none for a key beyond S.
__device__ inline Interval visible_queries(const Mask& m, int b, int c) {
  if (c >= m.s) return {0, 0};
  Interval i{m.causal ? c : -kEverywhere, m.causal || m.doc_start ? m.s : kEverywhere};
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

// What a softmax needs of a lane's two rows: the exponent subtracted so far (base 2), and the sum of this lane's
// columns.
struct SoftmaxState {
  float base[2] = {-1e30f, -1e30f};  // finite, so that a row without keys gives exp2(-inf) = 0
  float sum[2] = {0.f, 0.f};
};

// Scores of a tile -> exp2(scale2 s - base) in place; updates state and output; scale2 = scale log2(e) > 0.
//
// The base need not be the maximum, only near it: it moves, and the output is rescaled, when a score exceeds it
// by more than 2^kSlack. After the first tiles that is rare, and the usual tile then needs no shuffle and no
// multiplication of the output. Results are the same to rounding; P stays below 2^kSlack, the sums are fp32.
constexpr float kSlack = 8.f;

template <int MT, int N, int M>
__device__ inline void softmax_tile(float (&s)[MT][N], float (&o)[MT][M], SoftmaxState (&state)[MT], float scale2) {
  float top[MT][2];
  bool moved = false;
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m[2] = {s[i][2 * r], s[i][2 * r + 1]};  // two chains, so that their latencies overlap
#pragma unroll
      for (int j = 1; j < N / 4; ++j) {
        m[0] = fmaxf(m[0], s[i][4 * j + 2 * r]);
        m[1] = fmaxf(m[1], s[i][4 * j + 2 * r + 1]);
      }
      top[i][r] = fmaxf(m[0], m[1]) * scale2;
      moved |= top[i][r] > state[i].base[r] + kSlack;
    }
  if (__any_sync(~0u, moved)) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float base = fmaxf(quad_max(top[i][r]), state[i].base[r]);
        const float corr = fast_exp2(state[i].base[r] - base);
        state[i].base[r] = base;
        state[i].sum[r] *= corr;
#pragma unroll
        for (int j = 0; j < M / 4; ++j) {
          o[i][4 * j + 2 * r] *= corr;
          o[i][4 * j + 2 * r + 1] *= corr;
        }
      }
  }
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum[2] = {0.f, 0.f};
#pragma unroll
      for (int j = 0; j < N / 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[i][4 * j + 2 * r + e];
          x = fast_exp2(fmaf(x, scale2, -state[i].base[r]));
          sum[e] += x;
        }
      state[i].sum[r] += sum[0] + sum[1];
    }
}

// Sums the state over the quad; returns 1 / sum (0 for a row without keys) and the row's log sum exp.
__device__ inline float finish_row(const SoftmaxState& state, int r, float& lse) {
  const float sum = quad_sum(state.sum[r]);
  lse = sum > 0.f ? state.base[r] / kLog2e + logf(sum) : -INFINITY;
  return sum > 0.f ? 1.f / sum : 0.f;
}

// Order of the blocks of the backward kernels: `item` is a (batch, key/value head, split), `tile` its keys.
//
// Items are taken as many at a time as fill the chip, so that all tiles of an item run together and its queries
// and dQ stay in L2; within those, tile 0 first, which has the most queries in a causal row. A tile comes after
// the tiles before it of the same item, which it may wait for.
struct Order {
  int tiles, items, together;
  __device__ void find(int block, int& tile, int& item) const {
    const int first = block / (tiles * together) * together, n = min(together, items - first);
    const int rest = block - first * tiles;
    tile = rest / n;
    item = first + rest % n;
  }
};
inline Order make_order(int tiles, int items, int blocks_at_once) {
  const int together = blocks_at_once / tiles;
  return {tiles, items, together < 1 ? 1 : together};
}

// Blocks of `kernel` that run at once on the current device.
template <class Kernel>
int blocks_at_once(Kernel kernel, int threads, int shared_bytes) {
  int device = 0, count = 0, blocks = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
  return count * blocks;
}

}  // namespace flash
