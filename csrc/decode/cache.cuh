// Rows of heads: turned by RoPE as they are read, and written to or read from the paged cache.
#pragma once
#include "weights.cuh"

namespace tl {

// Eight values of a head, d .. d + 7, turned for the position whose angles `cos` and `sin` point to:
//   a' = a cos - b sin for d < n/2,  b' = b cos + a sin for n/2 <= d < n,  the pair being d and d + n/2.
__device__ inline uint4 load_turned(const bf16* head, int d, const float* cos, const float* sin, int n) {
  const uint4 own = load_l2(head + d);
  if (d >= n) return own;
  const int half = n / 2, i = d < half ? d : d - half;
  float x[8], y[8], c[8], s[8];
  Vector<bf16>{own}.unpack(x);
  Vector<bf16>{load_l2(head + (d < half ? d + half : d - half))}.unpack(y);
#pragma unroll
  for (int e = 0; e < 8; e += 4) {
    reinterpret_cast<float4&>(c[e]) = *reinterpret_cast<const float4*>(cos + i + e);
    reinterpret_cast<float4&>(s[e]) = *reinterpret_cast<const float4*>(sin + i + e);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = d < half ? x[e] * c[e] - y[e] * s[e] : x[e] * c[e] + y[e] * s[e];
  return Vector<bf16>::pack(x).bits;
}

// Eight int8 codes as bf16, exactly.
__device__ inline uint4 from_int8(uint2 codes) {
  uint4 x;
  auto* out = reinterpret_cast<uint32_t*>(&x);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = from_bytes(__byte_perm(i < 2 ? codes.x : codes.y, 0, i % 2 ? 0x4342 : 0x4140));  // bytes 2i, 2i+1
  }
  return x;
}

// Eight values times 1 / scale, rounded to int8.
__device__ inline uint2 to_int8(uint4 values, float inverse) {
  float x[8];
  Vector<bf16>{values}.unpack(x);
  uint32_t word[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int q = min(127, max(-127, __float2int_rn(x[i] * inverse)));
    word[i / 4] |= (q & 0xffu) << i % 4 * 8;
  }
  return {word[0], word[1]};
}

__device__ inline float largest(uint4 values) {
  float x[8], m = 0.f;
  Vector<bf16>{values}.unpack(x);
#pragma unroll
  for (int i = 0; i < 8; ++i) m = fmaxf(m, fabsf(x[i]));
  return m;
}

// First element of a token's head in the cache.
__device__ inline int64_t cache_place(const KvCache& c, int sequence, int token, int head) {
  const int bits = __ffs(c.block_size) - 1;  // a power of two: a division would cost more than all the rest
  const int block = c.table[(int64_t)sequence * c.max_blocks + (token >> bits)];
  return block * c.block_stride + (int64_t)(token & c.block_size - 1) * c.token_stride + (int64_t)head * c.head_stride;
}

}  // namespace tl
