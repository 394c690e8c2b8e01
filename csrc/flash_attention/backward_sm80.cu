// FlashAttention-2 backward for sm_80 and later: cp.async copies, mma.sync products.
//
//   S^T = K Q^T;  P^T = exp2(scale2 S^T - lse2);  dP^T = V dO^T;  dS^T = P^T (dP^T - delta)
//   dV += P^T dO;  dK += dS^T Q;  dQ += dS K          (dK, dQ times scale at the end)
//
// A block owns BN keys of one key/value head, a warp MT strips of 16 of them, and loops over the query heads of
// the group and over their tiles of 64 queries, QP at a time: dK and dV stay in registers for the whole group. Scores are kept
// transposed, so that P^T and dS^T leave the exponential as A operands in registers; only dS goes through
// shared memory, for dQ, which needs all keys of the block. dQ is added to fp32 sums in global memory
// (backward_helpers.cu); with `turn` the blocks of one query tile add in the order of their keys, so that the
// result repeats bit for bit. Grid: see Order in tile.cuh.
#include "mma.cuh"

namespace flash {
namespace {
using namespace ampere;

constexpr int BQ = 64;

template <class T, int D, int WARPS, int MT, int QP, int STAGES, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    backward_kernel(const Backward p, const Order order_of_blocks, const int t_pad) {
  constexpr int THREADS = 32 * WARPS, BN = 16 * MT * WARPS;
  constexpr int Q_BYTES = BQ * D * 2, KV_BYTES = BN * D * 2;
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t sk = shared_address(raw), sv = sk + KV_BYTES, sq = sv + KV_BYTES, sdo = sq + STAGES * Q_BYTES;
  const uint32_t sds = sdo + STAGES * Q_BYTES;  // dS^T: a row a key, 64 queries
  float* const lse2_of = reinterpret_cast<float*>(raw + 2 * KV_BYTES + 2 * STAGES * Q_BYTES + BN * BQ * 2);
  float* const delta_of = lse2_of + STAGES * BQ;

  // Which keys and heads.
  int tile_of_keys, rest;
  order_of_blocks.find(blockIdx.x, tile_of_keys, rest);
  const int key = tile_of_keys * BN;
  const int split = rest % p.splits;
  rest /= p.splits;
  const int g = rest % p.f.groups, b = rest / p.f.groups;
  const int group_heads = p.f.heads / p.f.groups / p.splits;
  const int head = g * (p.f.heads / p.f.groups) + split * group_heads;
  const int offset = p.f.mask.s - p.f.t;  // position of query 0
  const int last = min(key + BN, p.f.mask.s) - 1;
  const int tile_begin = max(visible_queries(p.f.mask, b, key).begin - offset, 0) / BQ;
  const int tile_end = (min(max(visible_queries(p.f.mask, b, last).end - offset, 0), p.f.t) + BQ - 1) / BQ;
  const int per_head = max(tile_end - tile_begin, 0), steps = per_head * group_heads;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto at = [&](const View& v, int h) { return static_cast<const uint16_t*>(v.data) + b * v.batch + h * v.head; };
  auto copy_step = [&](int i) {  // Q, dO and their rows' numbers for step i
    const int h = head + i / per_head, m = tile_begin + i % per_head, st = i % STAGES;
    copy_tile<BQ, D, THREADS>(sq + st * Q_BYTES, at(p.f.q, h), p.f.q.row, m * BQ, p.f.t);
    copy_tile<BQ, D, THREADS>(sdo + st * Q_BYTES, at(p.dout, h), p.dout.row, m * BQ, p.f.t);
    const int64_t line = (int64_t)(b * p.f.heads + h) * t_pad + m * BQ;
    if (threadIdx.x < BQ / 4) {
      copy16(shared_address(lse2_of + st * BQ + threadIdx.x * 4), p.lse2 + line + threadIdx.x * 4, true);
      copy16(shared_address(delta_of + st * BQ + threadIdx.x * 4), p.delta + line + threadIdx.x * 4, true);
    }
  };
  copy_tile<BN, D, THREADS>(sk, at(p.f.k, g), p.f.k.row, key, p.f.mask.s);
  copy_tile<BN, D, THREADS>(sv, at(p.f.v, g), p.f.v.row, key, p.f.mask.s);
  if (steps > 0) copy_step(0);
  copy_commit();

  // This lane's keys, and the queries that see every key of the warp.
  const int warp_key = key + 16 * MT * warp, row = warp_key + lane / 4;
  Interval seen[MT][2];
#pragma unroll
  for (int x = 0; x < MT; ++x)
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[x][r] = visible_queries(p.f.mask, b, row + 16 * x + 8 * r);
  const Interval seen_last = visible_queries(p.f.mask, b, warp_key + 16 * MT - 1);
  const int common_begin = seen_last.begin - offset;
  const int common_end = seen_last.end > 0 ? visible_queries(p.f.mask, b, warp_key).end - offset : 0;

  float dk[MT][D / 2], dv[MT][D / 2];
#pragma unroll
  for (int i = 0; i < MT * D / 2; ++i) dk[0][i] = dv[0][i] = 0.f;
  const float scale2 = p.f.scale * kLog2e;

  for (int i = 0; i < steps; ++i) {
    const int h = head + i / per_head, m = tile_begin + i % per_head, st = i % STAGES;
    const uint32_t q = sq + st * Q_BYTES, dout = sdo + st * Q_BYTES;
    copy_wait<0>();
    __syncthreads();  // step i is there; nobody reads the other stage or dS any more
    if (STAGES > 1 && i + 1 < steps) {
      copy_step(i + 1);
      copy_commit();
    }

#pragma unroll
    for (int part = 0; part < BQ / QP; ++part) {  // QP queries at a time, to save registers
      float s[MT][QP / 2], dp[MT][QP / 2];
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) {  // S^T = K Q^T, dP^T = V dO^T
        uint32_t ka[MT][4], va[MT][4], f[4];
#pragma unroll
        for (int x = 0; x < MT; ++x) {
          load_a<BN>(ka[x], sk, 16 * (MT * warp + x), 16 * kk);
          load_a<BN>(va[x], sv, 16 * (MT * warp + x), 16 * kk);
        }
#pragma unroll
        for (int j = 0; j < QP / 16; ++j) {
          load_b<BQ>(f, q, part * QP + 16 * j, 16 * kk);
#pragma unroll
          for (int x = 0; x < MT; ++x) {
            mma<T>(&s[x][8 * j], ka[x], f[0], f[1], kk == 0);
            mma<T>(&s[x][8 * j + 4], ka[x], f[2], f[3], kk == 0);
          }
          load_b<BQ>(f, dout, part * QP + 16 * j, 16 * kk);
#pragma unroll
          for (int x = 0; x < MT; ++x) {
            mma<T>(&dp[x][8 * j], va[x], f[0], f[1], kk == 0);
            mma<T>(&dp[x][8 * j + 4], va[x], f[2], f[3], kk == 0);
          }
        }
      }
      const int query0 = m * BQ + part * QP;
      if (query0 < common_begin || query0 + QP > common_end) {
#pragma unroll
        for (int x = 0; x < MT; ++x) mask_scores(s[x], query0 + offset + lane % 4 * 2, seen[x][0], seen[x][1]);
      }
      uint32_t prob[MT][QP / 16][4], ds[MT][QP / 16][4];
#pragma unroll
      for (int j = 0; j < QP / 8; ++j) {
        const int column = part * QP + 8 * j + lane % 4 * 2;
        const float2 lse2 = *reinterpret_cast<const float2*>(lse2_of + st * BQ + column);
        const float2 delta = *reinterpret_cast<const float2*>(delta_of + st * BQ + column);
#pragma unroll
        for (int x = 0; x < MT; ++x) {
          const float* d = &dp[x][4 * j];
          float y[4];
          y[0] = fast_exp2(fmaf(s[x][4 * j], scale2, -lse2.x));
          y[1] = fast_exp2(fmaf(s[x][4 * j + 1], scale2, -lse2.y));
          y[2] = fast_exp2(fmaf(s[x][4 * j + 2], scale2, -lse2.x));
          y[3] = fast_exp2(fmaf(s[x][4 * j + 3], scale2, -lse2.y));
          uint32_t* ds_pair = &ds[x][j / 2][j % 2 * 2];
          prob[x][j / 2][j % 2 * 2] = pack<T>(y[0], y[1]);
          prob[x][j / 2][j % 2 * 2 + 1] = pack<T>(y[2], y[3]);
          ds_pair[0] = pack<T>(y[0] * (d[0] - delta.x), y[1] * (d[1] - delta.y));
          ds_pair[1] = pack<T>(y[2] * (d[2] - delta.x), y[3] * (d[3] - delta.y));
          // Rows of keys, 16-byte chunks of queries.
          const int local = 16 * (MT * warp + x) + lane / 4, chunk = part * QP / 8 + j;
          uint8_t* to = raw + (sds - sk) + lane % 4 * 4;
          *reinterpret_cast<uint32_t*>(to + swizzle(local, chunk)) = ds_pair[0];
          *reinterpret_cast<uint32_t*>(to + swizzle(local + 8, chunk)) = ds_pair[1];
        }
      }
#pragma unroll
      for (int kk = 0; kk < QP / 16; ++kk) {  // dV += P^T dO, dK += dS^T Q
        uint32_t f[4];
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
          load_b_t<BQ>(f, dout, part * QP + 16 * kk, 16 * j);
#pragma unroll
          for (int x = 0; x < MT; ++x) {
            mma<T>(&dv[x][8 * j], prob[x][kk], f[0], f[1]);
            mma<T>(&dv[x][8 * j + 4], prob[x][kk], f[2], f[3]);
          }
          load_b_t<BQ>(f, q, part * QP + 16 * kk, 16 * j);
#pragma unroll
          for (int x = 0; x < MT; ++x) {
            mma<T>(&dk[x][8 * j], ds[x][kk], f[0], f[1]);
            mma<T>(&dk[x][8 * j + 4], ds[x][kk], f[2], f[3]);
          }
        }
      }
    }
    __syncthreads();  // dS is there; with one stage, nobody reads Q and dO any more
    if (STAGES == 1 && i + 1 < steps) {
      copy_step(i + 1);
      copy_commit();
    }

    // dQ = dS K: a warp 16 queries and, where there are 8 warps, half of each panel's columns.
    constexpr int COLUMNS = WARPS == 4 ? 64 : 32;
    const int strip = warp % 4, half = warp / 4;
    const int64_t tile = ((int64_t)(b * p.f.heads + h) * (t_pad / 64) + m) * (D / 64);
    const int query = min(m * BQ, p.f.t - 1) + offset;
    const int order = p.turn ? (key - visible_keys(p.f.mask, b, query).begin / BN * BN) / BN : 0;
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel) {
      float dq[COLUMNS / 2];
#pragma unroll
      for (int kk = 0; kk < BN / 16; ++kk) {
        uint32_t a[4], f[4];
        load_a_t<BN>(a, sds, 16 * strip, 16 * kk);
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; ++j) {
          load_b_t<BN>(f, sk, 16 * kk, 64 * panel + half * COLUMNS + 16 * j);
          mma<T>(&dq[8 * j], a, f[0], f[1], kk == 0);
          mma<T>(&dq[8 * j + 4], a, f[2], f[3], kk == 0);
        }
      }
      if (p.turn && panel == 0) {
        if (threadIdx.x == 0) {
          while (*reinterpret_cast<volatile int32_t*>(p.turn + tile) != order) __nanosleep(64);
          __threadfence();
        }
        __syncthreads();
      }
      float* sums = p.dq_sum + (tile + panel) * 64 * 64 + half * 4 * 512 + (32 * strip + lane) * 4;
#pragma unroll
      for (int c = 0; c < COLUMNS / 8; ++c) {
#if __CUDA_ARCH__ >= 900
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + c * 512),
                     "f"(dq[4 * c]), "f"(dq[4 * c + 1]), "f"(dq[4 * c + 2]), "f"(dq[4 * c + 3])
                     : "memory");
#else
#pragma unroll
        for (int e = 0; e < 4; ++e) atomicAdd(sums + c * 512 + e, dq[4 * c + e]);
#endif
      }
    }
    if (p.turn) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        *reinterpret_cast<volatile int32_t*>(p.turn + tile) = order + 1;
      }
    }
  }
  copy_wait<0>();

  // dK, dV of this lane's keys.
#pragma unroll
  for (int x = 0; x < MT; ++x)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int s = row + 16 * x + 8 * r;
      if (s >= p.f.mask.s) continue;
      const int column = lane % 4 * 2;
      const float *k = dk[x] + 2 * r, *v = dv[x] + 2 * r;
      if (p.splits > 1) {
        const int64_t n = (int64_t)p.f.batch * p.f.mask.s * p.f.groups * D;
        float* to = p.dkv_sum + split * n + (((int64_t)b * p.f.mask.s + s) * p.f.groups + g) * D + column;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          *reinterpret_cast<float2*>(to + 8 * j) = make_float2(k[4 * j], k[4 * j + 1]);
          *reinterpret_cast<float2*>(to + p.splits * n + 8 * j) = make_float2(v[4 * j], v[4 * j + 1]);
        }
      } else {
        auto* to_k = static_cast<T*>(p.dk.data) + b * p.dk.batch + s * p.dk.row + g * p.dk.head + column;
        auto* to_v = static_cast<T*>(p.dv.data) + b * p.dv.batch + s * p.dv.row + g * p.dv.head + column;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          *reinterpret_cast<uint32_t*>(to_k + 8 * j) = pack<T>(k[4 * j] * p.f.scale, k[4 * j + 1] * p.f.scale);
          *reinterpret_cast<uint32_t*>(to_v + 8 * j) = pack<T>(v[4 * j], v[4 * j + 1]);
        }
      }
    }
}

template <class T, int D, int WARPS, int MT, int QP, int STAGES, int BLOCKS>
cudaError_t launch(const Backward& p, cudaStream_t stream) {
  auto kernel = backward_kernel<T, D, WARPS, MT, QP, STAGES, BLOCKS>;
  constexpr int BN = 16 * MT * WARPS;
  constexpr int bytes = 2 * BN * D * 2 + 2 * STAGES * BQ * D * 2 + BN * BQ * 2 + 2 * STAGES * BQ * 4;
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code) return code;
  const int tiles = (p.f.mask.s + BN - 1) / BN, items = p.f.batch * p.f.groups * p.splits;
  const Order order = make_order(tiles, items, blocks_at_once(kernel, 32 * WARPS, bytes));
  kernel<<<tiles * items, 32 * WARPS, bytes, stream>>>(p, order, (int)padded(p.f.t));
  return cudaGetLastError();
}

template <class T>
cudaError_t by_size(const Backward& p, cudaStream_t stream) {
  return p.f.head_size == 64 ? launch<T, 64, 4, 2, 32, 2, 2>(p, stream) : launch<T, 128, 4, 1, 64, 1, 2>(p, stream);
}

}  // namespace

cudaError_t backward_sm80(const Backward& p, cudaStream_t stream) {
  return p.f.fp16 ? by_size<fp16>(p, stream) : by_size<bf16>(p, stream);
}

}  // namespace flash
