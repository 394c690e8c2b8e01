// FlashAttention forward for sm_90a: TMA copies, wgmma products, softmax in registers.
//
//   S = Q K^T;  P = exp2(scale2 S - base);  O = P V / sum(P);  lse = base ln 2 + ln sum(P)
//
// A block owns BM = 64 x WGS queries of one head; each of its warpgroups owns 64 of them, so a softmax row lies
// in the four lanes of a quad. It walks over tiles of 128 keys from the last one that its queries see (the
// diagonal) to the first; tiles that no query sees are never loaded. K and V come through rings of STAGES
// tiles, refilled by thread 0 as soon as all warpgroups have read a tile; "full" and "empty" mbarriers guard
// each.
//
// D = 64: two warpgroups a block at 128 registers a thread and two blocks an SM, so that four independent
// warpgroups share the tensor cores: while one computes its exponentials the others multiply. At D = 64 the
// exponentials cost as much as the products (16 a clock against 4,096 FLOP a clock: 1/16 clock a score each).
// D = 128: three warpgroups at 168 registers, one block an SM.
//
// Grid: one block a (query tile, head, batch), longest first; heads of a group are neighbours, so K and V of a
// group are read from L2. Bytes: Q, O once; K, V once per query tile (L2).
#include "hopper.cuh"

namespace flash {
namespace {
using namespace hopper;

constexpr int BN = 128;

template <int D, int WGS, int STAGES>
struct ForwardShared {
  static constexpr int P = D / 64;  // panels
  alignas(1024) uint16_t q[WGS][P][64 * 64];
  alignas(1024) uint16_t k[STAGES][P][BN * 64];
  alignas(1024) uint16_t v[STAGES][P][BN * 64];
  uint64_t q_full, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

struct ForwardMaps {
  CUtensorMap q, k, v, out;
};

template <class T, int D, int WGS, int STAGES>
__global__ void __launch_bounds__(128 * WGS, D == 64 ? 2 : 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps, const Forward p, const int row_tiles, const int t_pad) {
#if __CUDA_ARCH__ == 900
  constexpr int P = D / 64, BM = 64 * WGS;
  extern __shared__ uint8_t raw[];
  auto& sm = *reinterpret_cast<ForwardShared<D, WGS, STAGES>*>(raw);

  const int heads = p.batch * p.heads;
  const int m = row_tiles - 1 - blockIdx.x / heads;  // longest first
  const int b = blockIdx.x % heads / p.heads, h = blockIdx.x % p.heads;
  const int g = h / (p.heads / p.groups);
  const int wg = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int offset = p.mask.s - p.t;  // position of query 0

  // Keys that the block's first and last query see bound its tiles.
  const int first = m * BM, last = min(first + BM, p.t) - 1;
  const int tile_begin = visible_keys(p.mask, b, first + offset).begin / BN;
  const int tile_end = (visible_keys(p.mask, b, last + offset).end + BN - 1) / BN;
  const int tiles = tile_end - tile_begin;

  auto load = [&](int i, auto& ring, uint64_t* full, const CUtensorMap& map) {
    const int st = i % STAGES;
    barrier_expect(&full[st], BN * D * 2);
    for (int c = 0; c < P; ++c) tma_load(ring[st][c], &map, &full[st], 64 * c, (tile_end - 1 - i) * BN, g, b);
  };
  if (threadIdx.x == 0) {
    barrier_init(&sm.q_full, 1);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(&sm.k_full[i], 1);
      barrier_init(&sm.v_full[i], 1);
      barrier_init(&sm.k_empty[i], 4 * WGS);
      barrier_init(&sm.v_empty[i], 4 * WGS);
    }
    barrier_init_done();
    barrier_expect(&sm.q_full, BM * D * 2);
    for (int w = 0; w < WGS; ++w)
      for (int c = 0; c < P; ++c) tma_load(sm.q[w][c], &maps.q, &sm.q_full, 64 * c, first + 64 * w, h, b);
    for (int i = 0; i < min(STAGES, tiles); ++i) {
      load(i, sm.k, sm.k_full, maps.k);
      load(i, sm.v, sm.v_full, maps.v);
    }
  }
  __syncthreads();

  // This lane's two rows, and the tiles that need no mask for any row of the warpgroup.
  const int row = first + 64 * wg + 16 * warp + lane / 4;
  auto keys_of = [&](int r) { return visible_keys(p.mask, b, min(r, p.t - 1) + offset); };
  const Interval keys0 = keys_of(row), keys1 = keys_of(row + 8);
  const int common_begin = keys_of(first + 64 * wg + 63).begin, common_end = keys_of(first + 64 * wg).end;

  float scores[1][BN / 2], output[1][D / 2];
  auto& s = scores[0];
  auto& o = output[0];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
  SoftmaxState state[1];
  const float scale2 = p.scale * kLog2e;
  const uint64_t q_desc = descriptor(sm.q[wg][0]);
  barrier_wait(&sm.q_full, 0);

  for (int i = 0; i < tiles; ++i) {
    const int st = i % STAGES;
    const uint32_t phase = i / STAGES & 1;
    const uint64_t k_desc = descriptor(sm.k[st][0]), v_desc = descriptor(sm.v[st][0], BN * 128);

    barrier_wait(&sm.k_full[st], phase);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk)  // S = Q K^T: (64, D) x (D, 128)
      Wgmma<T, BN>::template ss<K_MAJOR, K_MAJOR>(s, advance(q_desc, kk / 4 * 64 * 128 + kk % 4 * 32),
                                                  advance(k_desc, kk / 4 * BN * 128 + kk % 4 * 32), kk > 0);
    wgmma_commit();
    if (threadIdx.x == 0 && i >= 1 && i - 1 + STAGES < tiles) {  // refill what the last tile left
      const int old = (i - 1) % STAGES;
      const uint32_t old_phase = (i - 1) / STAGES & 1;
      barrier_wait(&sm.k_empty[old], old_phase);
      load(i - 1 + STAGES, sm.k, sm.k_full, maps.k);
      barrier_wait(&sm.v_empty[old], old_phase);
      load(i - 1 + STAGES, sm.v, sm.v_full, maps.v);
    }
    __syncwarp();
    wgmma_wait<0>(s);
    if (lane == 0) barrier_arrive(&sm.k_empty[st]);

    const int key = (tile_end - 1 - i) * BN;
    if (key < common_begin || key + BN > common_end) mask_scores(s, key + lane % 4 * 2, keys0, keys1);
    softmax_tile(scores, output, state, scale2);

    uint32_t prob[BN / 16][4];  // P as A operands of 16 keys
#pragma unroll
    for (int kk = 0; kk < BN / 16; ++kk)
#pragma unroll
      for (int e = 0; e < 4; ++e) prob[kk][e] = pack<T>(s[8 * kk + 2 * e], s[8 * kk + 2 * e + 1]);
    barrier_wait(&sm.v_full[st], phase);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < BN / 16; ++kk)  // O += P V: (64, 128) x (128, D)
      Wgmma<T, D>::template rs<MN_MAJOR>(o, prob[kk], advance(v_desc, kk * 16 * 128), 1);
    wgmma_commit();
    wgmma_wait<0>(o);
    if (lane == 0) barrier_arrive(&sm.v_empty[st]);
  }

  // O / sum through this warpgroup's part of Q's memory, which nobody else reads.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float lse;
    const float inverse = finish_row(state[0], r, lse);
    const int tile_row = 16 * warp + lane / 4 + 8 * r;
    if (lane % 4 == 0 && row + 8 * r < p.t) p.lse[(int64_t)(b * p.heads + h) * t_pad + row + 8 * r] = lse;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      char* panel = reinterpret_cast<char*>(sm.q[wg][j / 8]);
      *reinterpret_cast<uint32_t*>(panel + swizzle(tile_row, j % 8) + lane % 4 * 4) =
          pack<T>(o[4 * j + 2 * r] * inverse, o[4 * j + 2 * r + 1] * inverse);
    }
  }
  fence_async_proxy();
  named_barrier(1 + wg, 128);
  if (threadIdx.x % 128 == 0 && first + 64 * wg < p.t) {
    for (int c = 0; c < P; ++c) tma_store(&maps.out, sm.q[wg][c], 64 * c, first + 64 * wg, h, b);
    tma_store_wait();
  }
#endif
}

template <class T, int D, int WGS, int STAGES>
cudaError_t launch(const Forward& p, cudaStream_t stream) {
  ForwardMaps maps;
  const int g = p.groups, t = p.t, s = p.mask.s;
  cudaError_t code = make_tensor_map(&maps.q, p.q, p.batch, t, p.heads, D, p.fp16, 64);
  if (!code) code = make_tensor_map(&maps.k, p.k, p.batch, s, g, D, p.fp16, BN);
  if (!code) code = make_tensor_map(&maps.v, p.v, p.batch, s, g, D, p.fp16, BN);
  if (!code) code = make_tensor_map(&maps.out, p.out, p.batch, t, p.heads, D, p.fp16, 64);
  if (code) return code;
  auto kernel = forward_kernel<T, D, WGS, STAGES>;
  constexpr int bytes = sizeof(ForwardShared<D, WGS, STAGES>);
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code) return code;
  const int row_tiles = (t + 64 * WGS - 1) / (64 * WGS);
  kernel<<<row_tiles * p.batch * p.heads, 128 * WGS, bytes, stream>>>(maps, p, row_tiles, (int)padded(t));
  return cudaGetLastError();
}

template <class T>
cudaError_t by_size(const Forward& p, cudaStream_t stream) {
  return p.head_size == 64 ? launch<T, 64, 2, 3>(p, stream) : launch<T, 128, 3, 2>(p, stream);
}

}  // namespace

cudaError_t forward_sm90(const Forward& p, cudaStream_t stream) {
  return p.fp16 ? by_size<fp16>(p, stream) : by_size<bf16>(p, stream);
}

}  // namespace flash
