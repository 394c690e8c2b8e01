// Attention of one new token over a paged cache: what one block does for up to 8 query heads of one key-value head and
// one part ("split") of a sequence's tokens.
//
//   s_j = scale q . k_j;   o = sum_j exp(s_j) v_j / sum_j exp(s_j),   j in the split;   lse = log2 sum_j exp(s_j)
//
// Each warp takes every WARPS-th tile of 16 tokens: keys and values go from global memory straight to the registers
// that the tensor cores read, 16 bytes a lane; S = Q K^T with the query heads as rows (8 of 16 used; the products are
// not what limits), then P V with V transposed by movmatrix. The next tile is in flight while one is worked on.
// A lane holds d = 32 b + 8 t .. + 7 of token g: k may be permuted inside a product, and the d that movmatrix makes
// columns come out as 8 neighbours a lane, too. The warps' parts meet in shared memory.
#pragma once
#include "cache.cuh"

namespace tl {

template <int D, int WARPS>
struct AttendShared {
  float max[WARPS][8], sum[WARPS][8];
  float out[WARPS][8][D + 4];  // + 4: rows start in different banks
};

template <bool INT8, int D>
struct KvTile {  // 16 tokens: lane 4 g + t has 8 values of tokens g and g + 8 in each block of 32 dimensions
  static constexpr int N = D / 32;
  uint4 k[2][N], v[2][N];  // int8: 8 bytes of each are used
  float k_scale[2], v_scale[2];

  // Tokens of the cache before `end`; zeros after.
  __device__ void load(const KvCache& c, int sequence, int head, int tile, int end) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = tile * 16 + 8 * i + g;
      const bool valid = token < end;
      const int64_t from = valid ? cache_place(c, sequence, token, head) : 0;
#pragma unroll
      for (int b = 0; b < N; ++b) {
        if constexpr (INT8) {
          const int64_t at = from + 32 * b + 8 * t;
          const uint2 zero = {};
          reinterpret_cast<uint2&>(k[i][b]) =
              valid ? *reinterpret_cast<const uint2*>(static_cast<const int8_t*>(c.k) + at) : zero;
          reinterpret_cast<uint2&>(v[i][b]) =
              valid ? *reinterpret_cast<const uint2*>(static_cast<const int8_t*>(c.v) + at) : zero;
        } else {
          const int64_t at = from + 32 * b + 8 * t;
          k[i][b] = valid ? *reinterpret_cast<const uint4*>(static_cast<const bf16*>(c.k) + at) : uint4{};
          v[i][b] = valid ? *reinterpret_cast<const uint4*>(static_cast<const bf16*>(c.v) + at) : uint4{};
        }
      }
      if constexpr (INT8) {
        k_scale[i] = valid ? c.k_scale[from / D] : 0.f;
        v_scale[i] = valid ? c.v_scale[from / D] : 0.f;
      }
    }
  }

  // The new token, at `position`, where this tile has it: from qkv, turned, and written to the cache.
  __device__ void append(const KvCache& c, int sequence, int head, int tile, int position, const bf16* new_k,
                         const bf16* new_v, const float* cos, const float* sin, int turning) {
    if (position / 16 != tile) return;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, i = position % 16 / 8;
    if (g != position % 8) return;
    const uint32_t quad = 0xfu << 4 * g;
    const int64_t to = cache_place(c, sequence, position, head);
    uint4 x[N], y[N];
    float largest_k = 0.f, largest_v = 0.f;
#pragma unroll
    for (int b = 0; b < N; ++b) {
      x[b] = load_turned(new_k, 32 * b + 8 * t, cos, sin, turning);
      y[b] = load_l2(new_v + 32 * b + 8 * t);
      if (INT8) {
        largest_k = fmaxf(largest_k, largest(x[b]));
        largest_v = fmaxf(largest_v, largest(y[b]));
      }
    }
    float scale_k = 0.f, scale_v = 0.f;
    if constexpr (INT8) {
      for (int step = 1; step < 4; step *= 2) {
        largest_k = fmaxf(largest_k, __shfl_xor_sync(quad, largest_k, step));
        largest_v = fmaxf(largest_v, __shfl_xor_sync(quad, largest_v, step));
      }
      scale_k = largest_k / 127.f, scale_v = largest_v / 127.f;
      if (t == 0) c.k_scale[to / D] = scale_k, c.v_scale[to / D] = scale_v;
    }
#pragma unroll
    for (int b = 0; b < N; ++b) {
      const int64_t at = to + 32 * b + 8 * t;
      if constexpr (INT8) {
        const uint2 qk = to_int8(x[b], scale_k > 0.f ? 1.f / scale_k : 0.f);
        const uint2 qv = to_int8(y[b], scale_v > 0.f ? 1.f / scale_v : 0.f);
        *reinterpret_cast<uint2*>(static_cast<int8_t*>(c.k) + at) = qk;
        *reinterpret_cast<uint2*>(static_cast<int8_t*>(c.v) + at) = qv;
        x[b] = {qk.x, qk.y, 0, 0}, y[b] = {qv.x, qv.y, 0, 0};
      } else {
        *reinterpret_cast<uint4*>(static_cast<bf16*>(c.k) + at) = x[b];
        *reinterpret_cast<uint4*>(static_cast<bf16*>(c.v) + at) = y[b];
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // i is not a constant, and registers have no index
        if (i == j) k[j][b] = x[b], v[j][b] = y[b];
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (INT8 && i == j) k_scale[j] = scale_k, v_scale[j] = scale_v;
    }
  }
};

// What one warp knows of its heads so far. Lane 4 g + t: head g; o[4 b + r]: dimensions 32 b + 8 t + 2 r, + 1.
template <bool INT8, int D>
struct Attend {
  static constexpr int N = D / 32;
  uint4 q[N];
  float o[4 * N][2] = {}, max = -INFINITY, sum = 0.f;

  __device__ void load_q(const bf16* head, bool valid, const float* cos, const float* sin, int turning) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int b = 0; b < N; ++b) {
      const int d = 32 * b + 8 * t;
      q[b] = valid ? load_turned(head, d, cos, sin, turning) : uint4{};
    }
  }

  // Tokens 16 tile .. of which those before `end` count, at least one. scale: with log2 e.
  __device__ void add(const KvTile<INT8, D>& kv, int tile, int end, float scale) {
    const int t = threadIdx.x % 4;
    float s[2][2], largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float c[4] = {}, other[4] = {};
#pragma unroll
      for (int b = 0; b < N; ++b) {
        const uint4 k = INT8 ? from_int8(uint2{kv.k[i][b].x, kv.k[i][b].y}) : kv.k[i][b];
        mma(c, q[b].x, 0, q[b].y, 0, k.x, k.y);
        mma(other, q[b].z, 0, q[b].w, 0, k.z, k.w);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // token 8 i + 2 t + e, whose scale its own lanes 4 (2 t + e) .. hold
        s[i][e] = (c[e] + other[e]) * scale;
        if (INT8) s[i][e] *= __shfl_sync(~0u, kv.k_scale[i], 4 * (2 * t + e));
        if (tile * 16 + 8 * i + 2 * t + e >= end) s[i][e] = -INFINITY;
        largest = fmaxf(largest, s[i][e]);
      }
    }
    largest = fmaxf(max, quad_max(largest));
    const float old = exp2f(max - largest);
    max = largest;
    sum *= old;
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) o[i][0] *= old, o[i][1] *= old;
    uint32_t p[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float e[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        e[j] = exp2f(s[i][j] - max);
        sum += e[j];
        if (INT8) e[j] *= __shfl_sync(~0u, kv.v_scale[i], 4 * (2 * t + j));
      }
      p[i] = pack2(e[0], e[1]);
    }
#pragma unroll
    for (int b = 0; b < N; ++b) {
      const uint4 v0 = INT8 ? from_int8(uint2{kv.v[0][b].x, kv.v[0][b].y}) : kv.v[0][b];
      const uint4 v1 = INT8 ? from_int8(uint2{kv.v[1][b].x, kv.v[1][b].y}) : kv.v[1][b];
      const uint32_t a[4] = {v0.x, v0.y, v0.z, v0.w}, c[4] = {v1.x, v1.y, v1.z, v1.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float y[4] = {o[4 * b + r][0], o[4 * b + r][1], 0.f, 0.f};
        mma(y, p[0], 0, p[1], 0, transpose8(a[r]), transpose8(c[r]));
        o[4 * b + r][0] = y[0], o[4 * b + r][1] = y[1];
      }
    }
  }
};

// The block's part: tokens of tiles [first, last) of the sequence, for head block `part` of key-value head `head`.
// Writes o, normalised, and lse (unless null) for the block's heads. `before` is called once after the first loads from
// the cache and before anything of qkv is read. `cos` and `sin` are the angles of `position`.
// NEXT: the next tile is asked for while one is worked on, which costs registers.
template <bool INT8, int D, int WARPS, bool NEXT, class Wait>
__device__ void attend(const PagedAttention& p, const KvCache& cache, AttendShared<D, WARPS>& shared, int sequence,
                       int position, const float* cos, const float* sin, int head, int part, int first, int last,
                       bf16* out, float* lse, Wait before) {
  constexpr int N = D / 32;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int end = position + 1, cached = p.append ? position : end, turning = p.append ? p.rotary.n : 0;
  const int per_group = p.heads / p.groups, query = head * per_group + part * 8 + g;
  const int count = min(8, per_group - part * 8);  // query heads of this block
  const bf16* row = static_cast<const bf16*>(p.qkv) + (int64_t)sequence * (p.heads + 2 * p.groups) * D;
  const bf16 *new_k = row + (p.heads + head) * D, *new_v = new_k + p.groups * D;
  const float scale = p.scale * 1.4426950408889634f;

  KvTile<INT8, D> tile, next;
  int at = first + warp;
  if (at < last) tile.load(cache, sequence, head, at, cached);
  before();
  Attend<INT8, D> a;
  a.load_q(row + query * D, g < count, cos, sin, turning);
  for (; at < last; at += WARPS) {
    if (NEXT && at + WARPS < last) next.load(cache, sequence, head, at + WARPS, cached);
    if (p.append) tile.append(cache, sequence, head, at, position, new_k, new_v, cos, sin, turning);
    __syncwarp();
    a.add(tile, at, end, scale);
    if (NEXT)
      tile = next;
    else if (at + WARPS < last)
      tile.load(cache, sequence, head, at + WARPS, cached);
  }
  a.sum = quad_sum(a.sum);

  if constexpr (WARPS == 1) {
    const float inverse = a.sum > 0.f ? 1.f / a.sum : 0.f;
    if (g < count) {
#pragma unroll
      for (int b = 0; b < N; ++b) {
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = a.o[4 * b + i / 2][i % 2] * inverse;
        Vector<bf16>::pack(y).store(out + query * D + 32 * b + 8 * t);
      }
      if (lse && t == 0) lse[query] = a.max + log2f(a.sum);
    }
    return;
  }
  if (t == 0) shared.max[warp][g] = a.max, shared.sum[warp][g] = a.sum;
#pragma unroll
  for (int i = 0; i < 4 * N; i += 2) {
    *reinterpret_cast<float4*>(&shared.out[warp][g][32 * (i / 4) + 8 * t + 2 * (i % 4)]) =
        float4{a.o[i][0], a.o[i][1], a.o[i + 1][0], a.o[i + 1][1]};
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * (D / 2); i += WARPS * 32) {  // two dimensions of a head
    const int h = i / (D / 2), d = i % (D / 2) * 2, query = head * per_group + part * 8 + h;
    float largest = -INFINITY, sum = 0.f, y[2] = {};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, shared.max[w][h]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {  // a warp without tokens: sum and o are 0
      const float weight = shared.sum[w][h] > 0.f ? exp2f(shared.max[w][h] - largest) : 0.f;
      const float2 o = *reinterpret_cast<const float2*>(&shared.out[w][h][d]);
      sum += weight * shared.sum[w][h], y[0] += weight * o.x, y[1] += weight * o.y;
    }
    const float inverse = sum > 0.f ? __fdividef(1.f, sum) : 0.f;
    *reinterpret_cast<uint32_t*>(out + query * D + d) = pack2(y[0] * inverse, y[1] * inverse);
    if (lse && d == 0) lse[query] = largest + log2f(sum);  // -inf where the split is empty
  }
}

// Tiles of 16 tokens of split `split` of a sequence of `length` tokens.
__device__ inline void split_range(int length, int splits, int split, int& first, int& last) {
  const int tiles = (length + 15) / 16, each = (tiles + splits - 1) / splits;
  first = min(tiles, split * each), last = min(tiles, first + each);
}

}  // namespace tl
