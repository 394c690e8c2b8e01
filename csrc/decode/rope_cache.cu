// RoPE on the queries and keys of packed projections, and the keys and values into the paged cache: for prefill, where
// many tokens of a sequence come at once. (A decode step's attention does the same by itself.)
//
//   pair (a, b) = dimensions i and i + n/2 of a head at position t:  a' = a cos - b sin,  b' = b cos + a sin
//
// fp32 inside, one rounding. A warp a head of a token; a lane holds dimensions lane, lane + 32, ... so that any n
// works. Bytes a token: q, k read and written, v read, k and v written to the cache. Reference: `rope_reference` in
// src/ops/rope.rs.
#include "cache.cuh"

namespace tl {
namespace {

constexpr int MOST = 8;  // dimensions a lane: D up to 256

__global__ void __launch_bounds__(256) rope_cache_kernel(const RopeCache p) {
  const int heads = p.heads + 2 * p.groups, lane = threadIdx.x % 32, size = p.head_size;
  const int64_t at = blockIdx.x * 8ll + threadIdx.x / 32, token = at / heads;
  if (token >= p.tokens) return;
  const int head = at % heads, position = p.positions[token];
  if (position < 0) return;
  bf16* x = static_cast<bf16*>(p.qkv) + at * size;
  const bool value = head >= p.heads + p.groups;
  const int half = p.rotary.n / 2;
  const float *cos = p.rotary.cos + (int64_t)position * p.rotary.stride,
              *sin = p.rotary.sin + (int64_t)position * p.rotary.stride;

  float y[MOST], largest = 0.f;
#pragma unroll
  for (int i = 0; i < MOST; ++i) {
    const int d = i * 32 + lane;
    if (d >= size) continue;
    y[i] = to_float(x[d]);
    if (!value && d < 2 * half) {
      const int angle = d < half ? d : d - half;
      const float other = to_float(x[d < half ? d + half : d - half]);
      y[i] = y[i] * cos[angle] + (d < half ? -other : other) * sin[angle];
    }
    y[i] = to_float(from_float<bf16>(y[i]));
    largest = fmaxf(largest, fabsf(y[i]));
  }
  __syncwarp();  // all of the head was read
#pragma unroll
  for (int i = 0; i < MOST; ++i) {
    const int d = i * 32 + lane;
    if (d < size && !value) x[d] = from_float<bf16>(y[i]);
  }
  if (head < p.heads) return;
  const int sequence = p.sequences ? p.sequences[token] : token;
  const int64_t to = cache_place(p.cache, sequence, position, (head - p.heads) % p.groups);
  float inverse = 0.f;
  if (p.int8_cache) {
#pragma unroll
    for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float scale = largest / 127.f;
    inverse = scale > 0.f ? 1.f / scale : 0.f;
    if (lane == 0) (value ? p.cache.v_scale : p.cache.k_scale)[to / size] = scale;
  }
  void* cache = value ? p.cache.v : p.cache.k;
#pragma unroll
  for (int i = 0; i < MOST; ++i) {
    const int d = i * 32 + lane;
    if (d >= size) continue;
    if (p.int8_cache) {
      static_cast<int8_t*>(cache)[to + d] = min(127, max(-127, __float2int_rn(y[i] * inverse)));
    } else {
      static_cast<bf16*>(cache)[to + d] = from_float<bf16>(y[i]);
    }
  }
}

}  // namespace

cudaError_t rope_cache(const RopeCache& p, cudaStream_t stream) {
  if (p.head_size > 32 * MOST || p.rotary.n % 2 || p.rotary.n > p.head_size) return cudaErrorInvalidValue;
  const int64_t warps = p.tokens * (p.heads + 2 * p.groups);
  if (warps == 0) return cudaSuccess;
  rope_cache_kernel<<<(warps + 7) / 8, 256, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace tl
