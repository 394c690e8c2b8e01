// The three small kernels around the main backward kernel; all limited by memory.
//
//   prepare:   delta = rowsum(dO * O), lse2 = lse log2(e) (+inf beyond T, so that P = 0 there), dq_sum = 0
//   store_dq:  dQ = scale dq_sum, turned back where q was turned (csrc/rope.cu), to 16 bits
//   store_dkv: dK = scale sum over splits, dV = sum over splits, to 16 bits
//
// dq_sum keeps dQ in the order in which the product's accumulators hold it, so that 32 lanes add 512
// contiguous bytes: [head][64 rows][64 columns as 8 chunks][128 threads][4], where thread 32 w + l holds in
// chunk c rows 16 w + l/4 (values 0, 1) and + 8 (values 2, 3), columns 8 c + 2 (l%4) + {0, 1}.
#include "tile.cuh"

namespace flash {
namespace {

template <class T>
__device__ T* row_of(const View& v, int b, int row, int head) {
  return static_cast<T*>(v.data) + b * v.batch + row * v.row + head * v.head;
}

// A block handles 64 rows of one head; D/8 lanes a row, 16 bytes a lane.
template <class T, int D>
__global__ void __launch_bounds__(256) prepare_kernel(const Backward p, int t_pad) {
  constexpr int LANES = D / 8, ROWS = 256 / LANES;
  const int h = blockIdx.y % p.f.heads, b = blockIdx.y / p.f.heads;
  const int64_t line = (int64_t)blockIdx.y * t_pad;
  auto* sum = reinterpret_cast<float4*>(p.dq_sum + (line + blockIdx.x * 64) * D);
  for (int i = threadIdx.x; i < 64 * D / 4; i += 256) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);

  const int lane = threadIdx.x % LANES;
#pragma unroll
  for (int pass = 0; pass < 64 / ROWS; ++pass) {
    const int row = blockIdx.x * 64 + pass * ROWS + threadIdx.x / LANES;
    float x = 0.f;
    if (row < p.f.t) {
      const uint4 o = *reinterpret_cast<const uint4*>(row_of<T>(p.f.out, b, row, h) + 8 * lane);
      const uint4 d = *reinterpret_cast<const uint4*>(row_of<T>(p.dout, b, row, h) + 8 * lane);
      const uint32_t os[4] = {o.x, o.y, o.z, o.w}, ds[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = unpack<T>(os[i]), c = unpack<T>(ds[i]);
        x += a.x * c.x + a.y * c.y;
      }
    }
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if (lane == 0) {
      p.delta[line + row] = x;
      // A row that saw no key has lse -inf; its P must be 0 as well.
      const float lse = row < p.f.t ? p.f.lse[line + row] : INFINITY;
      p.lse2[line + row] = lse == -INFINITY ? INFINITY : lse * kLog2e;
    }
  }
}

// (a, b) = two neighbouring values each of dimensions i and i + D/2, turned back by the angles of row t.
__device__ __forceinline__ void turn_back(const Rotary& r, int t, int i, float& a0, float& a1, float& b0, float& b1) {
  const float2 c = *reinterpret_cast<const float2*>(r.cos + t * r.stride + i);
  const float2 s = *reinterpret_cast<const float2*>(r.sin + t * r.stride + i);
  const float u0 = a0, u1 = a1;
  a0 = u0 * c.x + b0 * s.x;
  a1 = u1 * c.y + b1 * s.y;
  b0 = b0 * c.x - u0 * s.x;
  b1 = b1 * c.y - u1 * s.y;
}

// A block handles 64 rows x W columns of one head, through shared memory to write whole rows. TURN: W = D, so that a
// thread holds both values of a pair; else W = 64.
template <class T, int D, bool TURN>
__global__ void __launch_bounds__(128) store_dq_kernel(const Backward p, int t_pad) {
  constexpr int W = TURN ? D : 64, CHUNKS = W / 8;
  __shared__ __align__(16) T tile[64][W + 8];
  const int panel = blockIdx.x % (D / W), block = blockIdx.x / (D / W);
  const int h = blockIdx.y % p.f.heads, b = blockIdx.y / p.f.heads;
  const auto* sum = reinterpret_cast<const float4*>(p.dq_sum + ((int64_t)blockIdx.y * t_pad + block * 64) * D) +
                    panel * CHUNKS * 128;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  float4 x[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) x[c] = sum[c * 128 + threadIdx.x];
  if constexpr (TURN) {
    const int t = block * 64 + row, last = p.f.t - 1;  // rows beyond T hold nothing
#pragma unroll
    for (int c = 0; c < CHUNKS / 2; ++c) {
      const int i = 8 * c + lane % 4 * 2;
      float4 &a = x[c], &b = x[c + CHUNKS / 2];
      turn_back(p.rotary, min(t, last), i, a.x, a.y, b.x, b.y);
      turn_back(p.rotary, min(t + 8, last), i, a.z, a.w, b.z, b.w);
    }
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = 8 * c + lane % 4 * 2;
    *reinterpret_cast<uint32_t*>(&tile[row][column]) = pack<T>(x[c].x * p.f.scale, x[c].y * p.f.scale);
    *reinterpret_cast<uint32_t*>(&tile[row + 8][column]) = pack<T>(x[c].z * p.f.scale, x[c].w * p.f.scale);
  }
  __syncthreads();
  constexpr int ROWS = 128 / CHUNKS;  // a pass
#pragma unroll
  for (int pass = 0; pass < 64 / ROWS; ++pass) {
    const int r = pass * ROWS + threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    if (block * 64 + r < p.f.t)
      *reinterpret_cast<uint4*>(row_of<T>(p.dq, b, block * 64 + r, h) + panel * W + chunk * 8) =
          *reinterpret_cast<uint4*>(&tile[r][chunk * 8]);
  }
}

// One thread 8 values of dK (y = 0) or dV (y = 1).
template <class T, int D>
__global__ void __launch_bounds__(256) store_dkv_kernel(const Backward p) {
  const int64_t n = (int64_t)p.f.batch * p.f.mask.s * p.f.groups * D;
  const int64_t i = 8 * (blockIdx.x * 256ll + threadIdx.x);
  if (i >= n) return;
  const float* from = p.dkv_sum + blockIdx.y * p.splits * n + i;
  float x[8] = {};
  for (int split = 0; split < p.splits; ++split, from += n) {
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] += from[e];
  }
  const float scale = blockIdx.y == 0 ? p.f.scale : 1.f;
  uint4 out;
  out.x = pack<T>(x[0] * scale, x[1] * scale);
  out.y = pack<T>(x[2] * scale, x[3] * scale);
  out.z = pack<T>(x[4] * scale, x[5] * scale);
  out.w = pack<T>(x[6] * scale, x[7] * scale);
  const int column = i % D, g = i / D % p.f.groups, s = i / D / p.f.groups % p.f.mask.s;
  const int b = i / D / p.f.groups / p.f.mask.s;
  *reinterpret_cast<uint4*>(row_of<T>(blockIdx.y == 0 ? p.dk : p.dv, b, s, g) + column) = out;
}

template <class T, int D>
cudaError_t prepare(const Backward& p, cudaStream_t stream) {
  const int t_pad = padded(p.f.t);
  prepare_kernel<T, D><<<dim3(t_pad / 64, p.f.batch * p.f.heads), 256, 0, stream>>>(p, t_pad);
  return cudaGetLastError();
}
template <class T, int D>
cudaError_t store_dq(const Backward& p, cudaStream_t stream) {
  const int blocks = (p.f.t + 63) / 64, lines = p.f.batch * p.f.heads;
  if (p.rotary.cos) {
    store_dq_kernel<T, D, true><<<dim3(blocks, lines), 128, 0, stream>>>(p, padded(p.f.t));
  } else {
    store_dq_kernel<T, D, false><<<dim3(blocks * (D / 64), lines), 128, 0, stream>>>(p, padded(p.f.t));
  }
  return cudaGetLastError();
}
template <class T, int D>
cudaError_t store_dkv(const Backward& p, cudaStream_t stream) {
  const int64_t n = (int64_t)p.f.batch * p.f.mask.s * p.f.groups * D / 8;
  store_dkv_kernel<T, D><<<dim3((n + 255) / 256, 2), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

#define FLASH_DISPATCH(FUNCTION)                                                                           \
  (p.f.fp16 ? (p.f.head_size == 64 ? FUNCTION<fp16, 64>(p, stream) : FUNCTION<fp16, 128>(p, stream)) \
            : (p.f.head_size == 64 ? FUNCTION<bf16, 64>(p, stream) : FUNCTION<bf16, 128>(p, stream)))

}  // namespace

cudaError_t backward_prepare(const Backward& p, cudaStream_t stream) { return FLASH_DISPATCH(prepare); }
cudaError_t backward_store_dq(const Backward& p, cudaStream_t stream) { return FLASH_DISPATCH(store_dq); }
cudaError_t backward_store_dkv(const Backward& p, cudaStream_t stream) { return FLASH_DISPATCH(store_dkv); }

}  // namespace flash
