// FlashAttention backward for sm_90a: TMA copies, wgmma products, a producer warp and two working warpgroups.
//
//   S^T = K Q^T;  P^T = exp2(scale2 S^T - lse2);  dP^T = V dO^T;  dS^T = P^T (dP^T - delta)
//   dV += P^T dO;  dK += dS^T Q;  dQ += dS K          (dK, dQ times scale at the end)
//
// A block owns 128 keys of one key/value head and loops over the query heads of its group and over their tiles
// of BQ queries: dK and dV stay in registers for the whole group, and K and V are read once. Scores are kept
// transposed, so that P^T and dS^T leave the exponential as A operands in registers; only dS goes through
// shared memory, for dQ, which needs both warpgroups' keys. dQ is added to fp32 sums in global memory
// (backward_helpers.cu). With `turn`, the blocks of one query tile add in the order of their keys, so that the
// result repeats bit for bit.
//
// D = 64: BQ = 128, and warpgroup w computes dQ of queries 64 w ...  D = 128: BQ = 64, columns 64 w ... of dQ.
// Registers: two warpgroups at 240 a thread, the producer at 24. Grid: see Order in tile.cuh.
#include "hopper.cuh"

namespace flash {
namespace {
using namespace hopper;

constexpr int BN = 128, STAGES = 2;
constexpr int kWorkers = 256, kBlock = 384;

template <int D>
struct BackwardShared {
  static constexpr int P = D / 64, BQ = D == 64 ? 128 : 64;
  alignas(1024) uint16_t k[P][BN * 64];
  alignas(1024) uint16_t v[P][BN * 64];
  alignas(1024) uint16_t q[STAGES][P][BQ * 64];
  alignas(1024) uint16_t dout[STAGES][P][BQ * 64];
  alignas(1024) uint16_t ds[2][BQ / 64][BN * 64];  // dS^T: a row a key, panels of 64 queries
  alignas(128) float lse2[STAGES][BQ];  // TMA writes to multiples of 128 bytes
  alignas(128) float delta[STAGES][BQ];
  uint64_t kv_full, q_full[STAGES], q_empty[STAGES], dout_full[STAGES], dout_empty[STAGES];
};

struct BackwardMaps {
  CUtensorMap q, k, v, dout, lse2, delta;
};

// Where a block works: 128 keys from `key`, key/value head g of batch b, query heads [head, head + heads).
struct Place {
  int key, g, b, head, heads, split;
  int tile_begin, tile_end;  // query tiles
};

template <int BQ>
__device__ Place find_place(const Backward& p, const Order& order) {
  Place at;
  int rest;
  order.find(blockIdx.x, at.key, rest);
  at.key *= BN;
  at.split = rest % p.splits;
  rest /= p.splits;
  at.g = rest % p.f.groups;
  at.b = rest / p.f.groups;
  at.heads = p.f.heads / p.f.groups / p.splits;
  at.head = at.g * (p.f.heads / p.f.groups) + at.split * at.heads;
  const int offset = p.f.mask.s - p.f.t;
  const int last = min(at.key + BN, p.f.mask.s) - 1;
  at.tile_begin = max(visible_queries(p.f.mask, at.b, at.key).begin - offset, 0) / BQ;
  at.tile_end = (min(max(visible_queries(p.f.mask, at.b, last).end - offset, 0), p.f.t) + BQ - 1) / BQ;
  return at;
}

// The producer, one thread. Also lse2 and delta come by tensor maps: compute-sanitizer's racecheck takes plain bulk
// copies behind mbarriers for races.
template <int D>
__device__ void produce(BackwardShared<D>& sm, const BackwardMaps& maps, const Backward& p, const Place& at) {
  constexpr int P = D / 64, BQ = BackwardShared<D>::BQ;
  barrier_expect(&sm.kv_full, 2 * BN * D * 2);
  for (int c = 0; c < P; ++c) {
    tma_load(sm.k[c], &maps.k, &sm.kv_full, 64 * c, at.key, at.g, at.b);
    tma_load(sm.v[c], &maps.v, &sm.kv_full, 64 * c, at.key, at.g, at.b);
  }
  int i = 0;
  for (int h = at.head; h < at.head + at.heads; ++h) {
    for (int m = at.tile_begin; m < at.tile_end; ++m, ++i) {
      const int st = i % STAGES;
      const uint32_t phase = (i / STAGES & 1) ^ 1;
      barrier_wait(&sm.q_empty[st], phase);
      barrier_expect(&sm.q_full[st], BQ * D * 2 + BQ * 4);
      for (int c = 0; c < P; ++c) tma_load(sm.q[st][c], &maps.q, &sm.q_full[st], 64 * c, m * BQ, h, at.b);
      tma_load(sm.lse2[st], &maps.lse2, &sm.q_full[st], m * BQ, h, at.b, 0);
      barrier_wait(&sm.dout_empty[st], phase);
      barrier_expect(&sm.dout_full[st], BQ * D * 2 + BQ * 4);
      for (int c = 0; c < P; ++c) tma_load(sm.dout[st][c], &maps.dout, &sm.dout_full[st], 64 * c, m * BQ, h, at.b);
      tma_load(sm.delta[st], &maps.delta, &sm.dout_full[st], m * BQ, h, at.b, 0);
    }
  }
}

// Adds a warpgroup's 64 x 64 of dQ to its sums; in turn where the order must not vary.
__device__ inline void add_dq(const float (&dq)[32], float* sums, int32_t* turn, int order, int wg) {
  const int thread = threadIdx.x % 128;
  if (turn) {
    if (thread == 0) {
      while (*reinterpret_cast<volatile int32_t*>(turn) != order) __nanosleep(64);
      __threadfence();
    }
    named_barrier(2 + wg, 128);
  }
#pragma unroll
  for (int c = 0; c < 8; ++c)
    add_float4(sums + (c * 128 + thread) * 4, dq[4 * c], dq[4 * c + 1], dq[4 * c + 2], dq[4 * c + 3]);
  if (turn) {
    __threadfence();
    named_barrier(2 + wg, 128);
    if (thread == 0) {
      __threadfence();
      *reinterpret_cast<volatile int32_t*>(turn) = order + 1;
    }
  }
}

template <class T, int D>
__device__ void write_rows(const float (&x)[D / 2], float scale, const View& view, float* sums, const Backward& p,
                           const Place& at, int row) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int s = row + 8 * r;
    if (s >= p.f.mask.s) continue;
    if (sums) {
      float* to = sums + (((int64_t)at.b * p.f.mask.s + s) * p.f.groups + at.g) * D + column;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        *reinterpret_cast<float2*>(to + 8 * j) = make_float2(x[4 * j + 2 * r], x[4 * j + 2 * r + 1]);
    } else {
      T* to = static_cast<T*>(view.data) + at.b * view.batch + s * view.row + at.g * view.head + column;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        *reinterpret_cast<uint32_t*>(to + 8 * j) = pack<T>(x[4 * j + 2 * r] * scale, x[4 * j + 2 * r + 1] * scale);
    }
  }
}

template <class T, int D>
__device__ void work(BackwardShared<D>& sm, const Backward& p, const Place& at, int t_pad) {
  constexpr int BQ = BackwardShared<D>::BQ;
  const int thread = threadIdx.x - 128, wg = thread / 128, lane = thread % 32, warp = thread % 128 / 32;
  const int offset = p.f.mask.s - p.f.t;
  const float scale2 = p.f.scale * kLog2e;

  // This lane's two keys; and the queries that every key of the warpgroup is seen by.
  const int row = at.key + 64 * wg + 16 * warp + lane / 4;
  const Interval seen0 = visible_queries(p.f.mask, at.b, row), seen1 = visible_queries(p.f.mask, at.b, row + 8);
  const int common_begin = visible_queries(p.f.mask, at.b, at.key + 64 * wg + 63).begin - offset;
  const int common_end = visible_queries(p.f.mask, at.b, at.key + 64 * wg + 63).end > 0
                             ? visible_queries(p.f.mask, at.b, at.key + 64 * wg).end - offset
                             : 0;

  float dk[D / 2], dv[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.f;
  const uint64_t k_desc = descriptor(sm.k[0] + 64 * wg * 64), v_desc = descriptor(sm.v[0] + 64 * wg * 64);
  const uint64_t k_columns = descriptor(sm.k[D == 64 ? 0 : wg]);  // B of dQ = dS K
  barrier_wait(&sm.kv_full, 0);

  int i = 0;
  for (int h = at.head; h < at.head + at.heads; ++h) {
    for (int m = at.tile_begin; m < at.tile_end; ++m, ++i) {
      const int st = i % STAGES;
      const uint32_t phase = i / STAGES & 1;
      const uint64_t q_desc = descriptor(sm.q[st][0], BQ * 128), do_desc = descriptor(sm.dout[st][0], BQ * 128);
      float s[BQ / 2], dp[32];
      auto start_dp = [&](int half) {  // dP^T = V dO^T of 64 queries: (64, D) x (D, 64)
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk)
          Wgmma<T, 64>::template ss<K_MAJOR, K_MAJOR>(
              dp, advance(v_desc, kk / 4 * BN * 128 + kk % 4 * 32),
              advance(do_desc, kk / 4 * BQ * 128 + half * 64 * 128 + kk % 4 * 32), kk > 0);
        wgmma_commit();
      };

      barrier_wait(&sm.q_full[st], phase);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk)  // S^T = K Q^T: (64, D) x (D, BQ)
        Wgmma<T, BQ>::template ss<K_MAJOR, K_MAJOR>(s, advance(k_desc, kk / 4 * BN * 128 + kk % 4 * 32),
                                                    advance(q_desc, kk / 4 * BQ * 128 + kk % 4 * 32), kk > 0);
      wgmma_commit();
      barrier_wait(&sm.dout_full[st], phase);
      start_dp(0);

      wgmma_wait<1>(s);
      if (m * BQ < common_begin || m * BQ + BQ > common_end)
        mask_scores(s, m * BQ + offset + lane % 4 * 2, seen0, seen1);
      uint32_t prob[BQ / 16][4], ds[BQ / 16][4];
#pragma unroll
      for (int j = 0; j < BQ / 8; ++j) {
        const float2 lse2 = *reinterpret_cast<const float2*>(&sm.lse2[st][8 * j + lane % 4 * 2]);
        s[4 * j] = fast_exp2(fmaf(s[4 * j], scale2, -lse2.x));
        s[4 * j + 1] = fast_exp2(fmaf(s[4 * j + 1], scale2, -lse2.y));
        s[4 * j + 2] = fast_exp2(fmaf(s[4 * j + 2], scale2, -lse2.x));
        s[4 * j + 3] = fast_exp2(fmaf(s[4 * j + 3], scale2, -lse2.y));
        prob[j / 2][j % 2 * 2] = pack<T>(s[4 * j], s[4 * j + 1]);
        prob[j / 2][j % 2 * 2 + 1] = pack<T>(s[4 * j + 2], s[4 * j + 3]);
      }
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < BQ / 16; ++kk)  // dV += P^T dO: (64, BQ) x (BQ, D)
        Wgmma<T, D>::template rs<MN_MAJOR>(dv, prob[kk], advance(do_desc, kk * 16 * 128), 1);
      wgmma_commit();

      // dS^T, 64 queries at a time to save registers, kept as A operands and written to shared memory. Two
      // buffers: the one written now was last read two tiles ago, before the barrier of the last tile.
      auto& buffer = sm.ds[i % 2];
      const int ds_row = 64 * wg + 16 * warp + lane % 16;
#pragma unroll
      for (int half = 0; half < BQ / 64; ++half) {
        if (half == 0) wgmma_wait<1>(dp); else wgmma_wait<0>(dp);
#pragma unroll
        for (int jj = 0; jj < 8; ++jj) {
          const int j = 8 * half + jj;
          const float2 delta = *reinterpret_cast<const float2*>(&sm.delta[st][8 * j + lane % 4 * 2]);
          ds[j / 2][j % 2 * 2] =
              pack<T>(s[4 * j] * (dp[4 * jj] - delta.x), s[4 * j + 1] * (dp[4 * jj + 1] - delta.y));
          ds[j / 2][j % 2 * 2 + 1] =
              pack<T>(s[4 * j + 2] * (dp[4 * jj + 2] - delta.x), s[4 * j + 3] * (dp[4 * jj + 3] - delta.y));
        }
        if (half + 1 < BQ / 64) start_dp(half + 1);
#pragma unroll
        for (int kk = 0; kk < 4; ++kk)
          store_matrices(shared_address(buffer[half]) + swizzle(ds_row, kk * 2 + lane / 16), ds[4 * half + kk]);
      }
      fence_async_proxy();
      named_barrier(1, kWorkers);

      float dq[32];
      const uint64_t ds_desc = descriptor(buffer[D == 64 ? wg : 0]);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < BN / 16; ++kk)  // dQ = dS K: (64, 128) x (128, 64)
        Wgmma<T, 64>::template ss<MN_MAJOR, MN_MAJOR>(dq, advance(ds_desc, kk * 16 * 128),
                                                      advance(k_columns, kk * 16 * 128), kk > 0);
      wgmma_commit();
#pragma unroll
      for (int kk = 0; kk < BQ / 16; ++kk)  // dK += dS^T Q: (64, BQ) x (BQ, D)
        Wgmma<T, D>::template rs<MN_MAJOR>(dk, ds[kk], advance(q_desc, kk * 16 * 128), 1);
      wgmma_commit();

      wgmma_wait<1>(dq);
      if (lane == 0) barrier_arrive(&sm.dout_empty[st]);
      const int block = D == 64 ? 2 * m + wg : m;  // 64 queries
      const int64_t tile = ((int64_t)(at.b * p.f.heads + h) * (t_pad / 64) + block) * (D / 64) + (D == 64 ? 0 : wg);
      const int query = min(m * BQ, p.f.t - 1) + offset;
      const int order = p.turn ? (at.key - visible_keys(p.f.mask, at.b, query).begin / BN * BN) / BN : 0;
      add_dq(dq, p.dq_sum + tile * 64 * 64, p.turn ? p.turn + tile : nullptr, order, wg);
      wgmma_wait<0>(dk);
      if (lane == 0) barrier_arrive(&sm.q_empty[st]);
    }
  }
  wgmma_wait<0>(dv);

  const int64_t n = (int64_t)p.f.batch * p.f.mask.s * p.f.groups * D;
  float* sums = p.splits > 1 ? p.dkv_sum : nullptr;
  write_rows<T, D>(dk, p.f.scale, p.dk, sums ? sums + at.split * n : nullptr, p, at, row);
  write_rows<T, D>(dv, 1.f, p.dv, sums ? sums + (p.splits + at.split) * n : nullptr, p, at, row);
}

template <class T, int D>
__global__ void __launch_bounds__(kBlock, 1)
    backward_kernel(const __grid_constant__ BackwardMaps maps, const Backward p, const Order order, const int t_pad) {
#if __CUDA_ARCH__ == 900
  extern __shared__ uint8_t raw[];
  auto& sm = *reinterpret_cast<BackwardShared<D>*>(raw);
  if (threadIdx.x == 0) {
    barrier_init(&sm.kv_full, 1);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&sm.q_full[i], 1);
      barrier_init(&sm.dout_full[i], 1);
      barrier_init(&sm.q_empty[i], kWorkers / 32);
      barrier_init(&sm.dout_empty[i], kWorkers / 32);
    }
    barrier_init_done();
  }
  __syncthreads();
  const Place at = find_place<BackwardShared<D>::BQ>(p, order);
  if (threadIdx.x < 128) {
    fewer_registers<24>();
    if (threadIdx.x == 0) produce<D>(sm, maps, p, at);
  } else {
    more_registers<240>();
    work<T, D>(sm, p, at, t_pad);
  }
#endif
}

template <class T, int D>
cudaError_t launch(const Backward& p, cudaStream_t stream) {
  constexpr int BQ = BackwardShared<D>::BQ;
  BackwardMaps maps;
  const Forward& f = p.f;
  cudaError_t code = make_tensor_map(&maps.q, f.q, f.batch, f.t, f.heads, D, f.fp16, BQ);
  if (!code) code = make_tensor_map(&maps.dout, p.dout, f.batch, f.t, f.heads, D, f.fp16, BQ);
  if (!code) code = make_tensor_map(&maps.k, f.k, f.batch, f.mask.s, f.groups, D, f.fp16, BN);
  if (!code) code = make_tensor_map(&maps.v, f.v, f.batch, f.mask.s, f.groups, D, f.fp16, BN);
  if (!code) code = make_row_map(&maps.lse2, p.lse2, f.batch, f.heads, padded(f.t), BQ);
  if (!code) code = make_row_map(&maps.delta, p.delta, f.batch, f.heads, padded(f.t), BQ);
  if (code) return code;
  auto kernel = backward_kernel<T, D>;
  constexpr int bytes = sizeof(BackwardShared<D>);
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code) return code;
  const int tiles = (f.mask.s + BN - 1) / BN, items = f.batch * f.groups * p.splits;
  const Order order = make_order(tiles, items, blocks_at_once(kernel, kBlock, bytes));
  kernel<<<tiles * items, kBlock, bytes, stream>>>(maps, p, order, (int)padded(f.t));
  return cudaGetLastError();
}

template <class T>
cudaError_t by_size(const Backward& p, cudaStream_t stream) {
  return p.f.head_size == 64 ? launch<T, 64>(p, stream) : launch<T, 128>(p, stream);
}

}  // namespace

cudaError_t backward_sm90(const Backward& p, cudaStream_t stream) {
  return p.f.fp16 ? by_size<fp16>(p, stream) : by_size<bf16>(p, stream);
}

}  // namespace flash
