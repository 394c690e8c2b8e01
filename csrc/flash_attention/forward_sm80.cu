// FlashAttention-2 forward for sm_80 and later: cp.async copies, mma.sync products, softmax in registers.
//
//   S = Q K^T;  P = exp2(scale2 S - base);  O = P V / sum(P);  lse = base ln 2 + ln sum(P)
//
// A block owns BM queries of one head, each of its warps MT strips of 16 of them, so a softmax row lies in a
// quad. It walks over tiles of BN keys from the last one that its queries see (the diagonal) to the first;
// tiles that no query sees are never loaded. The copy of V(n) runs during S, that of K(n-1) during P V.
//
// Two strips a warp share each K and V fragment read from shared memory, the bottleneck of one strip.
// Grid: one block a (query tile, head, batch), longest first; heads of a group are neighbours, so K and V of a
// group are read from L2. Bytes: Q, O once; K, V once per query tile (L2).
#include "mma.cuh"

namespace flash {
namespace {
using namespace ampere;

template <class T, int D, int BM, int BN, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    forward_kernel(const Forward p, const int row_tiles, const int t_pad) {
  constexpr int THREADS = 32 * WARPS, MT = BM / (16 * WARPS);
  extern __shared__ __align__(1024) uint8_t raw[];
  const uint32_t sq = shared_address(raw), sk = sq + BM * D * 2, sv = sk + BN * D * 2;

  const int heads = p.batch * p.heads;
  const int m = row_tiles - 1 - blockIdx.x / heads;  // longest first
  const int b = blockIdx.x % heads / p.heads, h = blockIdx.x % p.heads;
  const int g = h / (p.heads / p.groups);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int offset = p.mask.s - p.t;  // position of query 0

  const int first = m * BM, last = min(first + BM, p.t) - 1;
  const int tile_begin = visible_keys(p.mask, b, first + offset).begin / BN;
  const int tile_end = (visible_keys(p.mask, b, last + offset).end + BN - 1) / BN;

  auto at = [&](const View& v, int head) { return static_cast<const uint16_t*>(v.data) + b * v.batch + head * v.head; };
  const uint16_t *q = at(p.q, h), *k = at(p.k, g), *v = at(p.v, g);
  copy_tile<BM, D, THREADS>(sq, q, p.q.row, first, p.t);
  if (tile_begin < tile_end) copy_tile<BN, D, THREADS>(sk, k, p.k.row, (tile_end - 1) * BN, p.mask.s);
  copy_commit();

  // This lane's rows, and the tiles that need no mask for any row of the warp.
  const int row = first + 16 * MT * warp + lane / 4;
  auto keys_of = [&](int r) { return visible_keys(p.mask, b, min(r, p.t - 1) + offset); };
  Interval keys[2 * MT];
#pragma unroll
  for (int r = 0; r < 2 * MT; ++r) keys[r] = keys_of(row + 8 * r);
  const int common_begin = keys_of(first + 16 * MT * warp + 16 * MT - 1).begin;
  const int common_end = keys_of(first + 16 * MT * warp).end;

  float o[MT][D / 2];
#pragma unroll
  for (int i = 0; i < MT * D / 2; ++i) o[0][i] = 0.f;
  SoftmaxState state[MT];
  const float scale2 = p.scale * kLog2e;

  for (int n = tile_end - 1; n >= tile_begin; --n) {
    copy_wait<0>();
    __syncthreads();  // K(n) is there; nobody reads V(n+1) any more
    copy_tile<BN, D, THREADS>(sv, v, p.v.row, n * BN, p.mask.s);
    copy_commit();

    float s[MT][BN / 2];
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {  // S = Q K^T
      uint32_t a[MT][4], kf[4];
#pragma unroll
      for (int i = 0; i < MT; ++i) load_a<BM>(a[i], sq, 16 * (MT * warp + i), 16 * kk);
#pragma unroll
      for (int j = 0; j < BN / 16; ++j) {
        load_b<BN>(kf, sk, 16 * j, 16 * kk);
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          mma<T>(&s[i][8 * j], a[i], kf[0], kf[1], kk == 0);
          mma<T>(&s[i][8 * j + 4], a[i], kf[2], kf[3], kk == 0);
        }
      }
    }
    copy_wait<0>();
    __syncthreads();  // V(n) is there; nobody reads K(n) any more
    if (n > tile_begin) copy_tile<BN, D, THREADS>(sk, k, p.k.row, (n - 1) * BN, p.mask.s);
    copy_commit();

    const bool masked = n * BN < common_begin || n * BN + BN > common_end;
    if (masked) {
#pragma unroll
      for (int i = 0; i < MT; ++i) mask_scores(s[i], n * BN + lane % 4 * 2, keys[2 * i], keys[2 * i + 1]);
    }
    softmax_tile(s, o, state, scale2);
#pragma unroll
    for (int kk = 0; kk < BN / 16; ++kk) {  // O += P V
      uint32_t a[MT][4], vf[4];
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) a[i][e] = pack<T>(s[i][8 * kk + 2 * e], s[i][8 * kk + 2 * e + 1]);
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        load_b_t<BN>(vf, sv, 16 * kk, 16 * j);
#pragma unroll
        for (int i = 0; i < MT; ++i) {
          mma<T>(&o[i][8 * j], a[i], vf[0], vf[1]);
          mma<T>(&o[i][8 * j + 4], a[i], vf[2], vf[3]);
        }
      }
    }
  }
  copy_wait<0>();
  __syncthreads();

  // O / sum through Q's memory (each warp its own rows), to write whole rows.
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float lse;
      const float inverse = finish_row(state[i], r, lse);
      const int query = row + 16 * i + 8 * r;
      if (lane % 4 == 0 && query < p.t) p.lse[(int64_t)(b * p.heads + h) * t_pad + query] = lse;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        *reinterpret_cast<uint32_t*>(raw + j / 8 * BM * 128 + swizzle(query - first, j % 8) + lane % 4 * 4) =
            pack<T>(o[i][4 * j + 2 * r] * inverse, o[i][4 * j + 2 * r + 1] * inverse);
    }
  __syncwarp();
  auto* out = static_cast<uint16_t*>(p.out.data) + b * p.out.batch + h * p.out.head;
#pragma unroll
  for (int i = 0; i < 16 * MT * D / 8 / 32; ++i) {
    const int chunk = (i * 32 + lane) % (D / 8), r = 16 * MT * warp + (i * 32 + lane) / (D / 8);
    if (first + r < p.t)
      *reinterpret_cast<uint4*>(out + (first + r) * p.out.row + 8 * chunk) =
          *reinterpret_cast<uint4*>(raw + chunk / 8 * BM * 128 + swizzle(r, chunk % 8));
  }
}

template <class T, int D, int BM, int BN, int WARPS, int BLOCKS>
cudaError_t launch(const Forward& p, cudaStream_t stream) {
  auto kernel = forward_kernel<T, D, BM, BN, WARPS, BLOCKS>;
  constexpr int bytes = (BM + 2 * BN) * D * 2;
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code) return code;
  const int row_tiles = (p.t + BM - 1) / BM;
  kernel<<<row_tiles * p.batch * p.heads, 32 * WARPS, bytes, stream>>>(p, row_tiles, (int)padded(p.t));
  return cudaGetLastError();
}

template <class T>
cudaError_t by_size(const Forward& p, cudaStream_t stream) {
  return p.head_size == 64 ? launch<T, 64, 128, 64, 4, 2>(p, stream) : launch<T, 128, 128, 32, 4, 2>(p, stream);
}

}  // namespace

cudaError_t forward_sm80(const Forward& p, cudaStream_t stream) {
  return p.fp16 ? by_size<fp16>(p, stream) : by_size<bf16>(p, stream);
}

}  // namespace flash
