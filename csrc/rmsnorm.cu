// RMSNorm over rows of C values, alone or fused with the addition before it.
//
//   forward    s = x + residual (rounded to the dtype);  rstd = 1 / sqrt(mean(s^2) + eps);  y = s rstd w
//   backward   xhat = s rstd;  g = dy w;  ds = rstd (g - xhat mean(g xhat)) + dsum;  dw = sum over rows dy xhat
//
// Statistics and sums in fp32, one rounding at the end. With a residual, ds is the gradient of x and of the
// residual alike.
//
// Forward: a group of 32 to 1,024 threads a row, K vectors of 16 bytes a thread, read once and kept in
// registers. Bytes a row: 2 C sizeof (x, y), 4 C sizeof with the residual (x, residual, sum, y).
// Backward: four blocks an SM stride over rows, so that a thread's columns never change: dw gathers in
// registers, one partial row a block, added up by a second kernel; no atomics. The next row is in flight while
// this one is summed. Bytes a row: 3 C sizeof, 4 with dsum. (One block of 1,024 threads an SM, with a quarter of
// the partial rows, was 10 % slower with dsum.)
// With a slot, y is written as e4m3 (fp8.cu): C bytes instead of 2 C.
// Reference: `rms_norm_reference` in src/ops/norm.rs.
#include <type_traits>

#include "fp8.cuh"

namespace tl {

int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

namespace {

// Sum over the THREADS threads of a row; `scratch` has a float a warp and must not be used again before the next
// sum but one.
template <int THREADS>
__device__ float row_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (THREADS == 32) return x;
  constexpr int WARPS = THREADS / 32;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : 0.f);
}

// THREADS a row, ROWS rows a block (one where a row needs more than a warp).
template <class T, int THREADS, int K, bool ADD, bool FP8>
__global__ void __launch_bounds__(THREADS == 32 ? 128 : THREADS) forward_kernel(const RmsNorm p) {
  using V = Vector<T>;
  constexpr int ROWS = THREADS == 32 ? 4 : 1;
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x * (int64_t)ROWS + (ROWS > 1 ? threadIdx.x / 32 : 0);
  const int thread = ROWS > 1 ? threadIdx.x % 32 : threadIdx.x;
  if (row >= p.rows) return;
  const int64_t start = row * p.columns;
  const auto *x = static_cast<const T*>(p.x) + start, *residual = static_cast<const T*>(p.residual) + start;

  V v[K], r[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int c = (k * THREADS + thread) * V::N;
    if (c < p.columns) {
      v[k] = V::load_streaming(x + c);
      if (ADD) r[k] = V::load_streaming(residual + c);
    }
  }
  float squares = 0.f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int c = (k * THREADS + thread) * V::N;
    if (c >= p.columns) continue;
    float a[V::N], b[V::N];
    v[k].unpack(a);
    if (ADD) {
      r[k].unpack(b);
#pragma unroll
      for (int i = 0; i < V::N; ++i) a[i] += b[i];
      v[k] = V::pack(a);
      v[k].store(static_cast<T*>(p.sum) + start + c);
      v[k].unpack(a);  // the norm is of the rounded sum, which the backward pass will read
    }
#pragma unroll
    for (int i = 0; i < V::N; ++i) squares += a[i] * a[i];
  }
  const float rstd = rsqrtf(row_sum<THREADS>(squares, scratch) / p.columns + p.eps);
  if (thread == 0) p.rstd[row] = rstd;
  const float scale = FP8 ? p.slot->scale : 1.f;
  float largest = 0.f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int c = (k * THREADS + thread) * V::N;
    if (c >= p.columns) continue;
    float a[V::N], w[V::N];
    v[k].unpack(a);
    V::load(static_cast<const T*>(p.weight) + c).unpack(w);
#pragma unroll
    for (int i = 0; i < V::N; ++i) a[i] *= rstd * w[i];
    if constexpr (FP8) {
      update_largest(largest, a);
      *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.y) + start + c) = to_fp8(a, scale);
    } else {
      V::pack(a).store(static_cast<T*>(p.y) + start + c);
    }
  }
  if constexpr (FP8) {
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) note(largest, p.slot);
  }
}

template <class T, int THREADS, int K, bool ADD>
__global__ void __launch_bounds__(THREADS) backward_kernel(const RmsNormBackward p) {
  using V = Vector<T>;
  __shared__ float scratch[2][32];
  const int thread = threadIdx.x;
  const auto *dy = static_cast<const T*>(p.dy), *x = static_cast<const T*>(p.x), *dsum = static_cast<const T*>(p.dsum);
  auto* dx = static_cast<T*>(p.dx);

  V vy[K], vx[K], vs[K], w[K];
  float rstd = 0.f, dw[K][V::N];
  auto read = [&](int64_t row) {
    rstd = p.rstd[row];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int c = (k * THREADS + thread) * V::N;
      if (c >= p.columns) continue;
      vy[k] = V::load_streaming(dy + row * p.columns + c);
      vx[k] = V::load_streaming(x + row * p.columns + c);
      if (ADD) vs[k] = V::load_streaming(dsum + row * p.columns + c);
    }
  };
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int c = (k * THREADS + thread) * V::N;
    if (c < p.columns) w[k] = V::load(static_cast<const T*>(p.weight) + c);
#pragma unroll
    for (int i = 0; i < V::N; ++i) dw[k][i] = 0.f;
  }
  if (blockIdx.x < p.rows) read(blockIdx.x);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    float g[K][V::N], xhat[K][V::N], dot = 0.f;
    V s[K];
    const float scale = rstd;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int c = (k * THREADS + thread) * V::N;
      if (c >= p.columns) continue;
      float weight[V::N];
      w[k].unpack(weight);
      vy[k].unpack(g[k]);
      vx[k].unpack(xhat[k]);
      s[k] = vs[k];
#pragma unroll
      for (int i = 0; i < V::N; ++i) {
        xhat[k][i] *= scale;
        dw[k][i] += g[k][i] * xhat[k][i];
        g[k][i] *= weight[i];
        dot += g[k][i] * xhat[k][i];
      }
    }
    if (row + gridDim.x < p.rows) read(row + gridDim.x);
    const float mean = row_sum<THREADS>(dot, scratch[turn]) / p.columns;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int c = (k * THREADS + thread) * V::N;
      if (c >= p.columns) continue;
      float d[V::N];
      if (ADD) s[k].unpack(d);
#pragma unroll
      for (int i = 0; i < V::N; ++i) d[i] = scale * (g[k][i] - xhat[k][i] * mean) + (ADD ? d[i] : 0.f);
      V::pack(d).store(dx + row * p.columns + c);
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int c = (k * THREADS + thread) * V::N;
    if (c >= p.columns) continue;
#pragma unroll
    for (int i = 0; i < V::N; i += 4)
      *reinterpret_cast<float4*>(p.partial + (int64_t)blockIdx.x * p.columns + c + i) =
          make_float4(dw[k][i], dw[k][i + 1], dw[k][i + 2], dw[k][i + 3]);
  }
}

// dw = sum over the partial rows; 32 columns a block, 32 rows at a time.
template <class T>
__global__ void __launch_bounds__(1024) dweight_kernel(const RmsNormBackward p) {
  __shared__ float sums[32][33];
  const int c = blockIdx.x * 32 + threadIdx.x;
  float x = 0.f;
  if (c < p.columns)
#pragma unroll 8
    for (int row = threadIdx.y; row < p.partial_rows; row += 32) x += p.partial[(int64_t)row * p.columns + c];
  sums[threadIdx.y][threadIdx.x] = x;
  __syncthreads();
  x = warp_sum(sums[threadIdx.x][threadIdx.y]);
  const int column = blockIdx.x * 32 + threadIdx.y;
  if (threadIdx.x == 0 && column < p.columns) static_cast<T*>(p.dweight)[column] = from_float<T>(x);
}

template <class T, int THREADS, int K>
cudaError_t launch(const RmsNorm& p, cudaStream_t stream) {
  constexpr int ROWS = THREADS == 32 ? 4 : 1;
  const int64_t blocks = (p.rows + ROWS - 1) / ROWS;
  auto run = [&](auto* kernel) { kernel<<<blocks, THREADS * ROWS, 0, stream>>>(p); };
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (p.slot) {
      run(p.residual ? forward_kernel<T, THREADS, K, true, true> : forward_kernel<T, THREADS, K, false, true>);
      return cudaGetLastError();
    }
  }
  run(p.residual ? forward_kernel<T, THREADS, K, true, false> : forward_kernel<T, THREADS, K, false, false>);
  return cudaGetLastError();
}
template <class T, int THREADS, int K>
cudaError_t launch(const RmsNormBackward& p, cudaStream_t stream) {
  if (p.dsum)
    backward_kernel<T, THREADS, K, true><<<p.partial_rows, THREADS, 0, stream>>>(p);
  else
    backward_kernel<T, THREADS, K, false><<<p.partial_rows, THREADS, 0, stream>>>(p);
  dweight_kernel<T><<<(p.columns + 31) / 32, dim3(32, 32), 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t by_columns(const RmsNorm& p, cudaStream_t stream) {
  const int vectors = p.columns / Vector<T>::N;
  if (vectors <= 128) return launch<T, 32, 4>(p, stream);
  if (vectors <= 256) return launch<T, 32, 8>(p, stream);
  if (vectors <= 512) return launch<T, 128, 4>(p, stream);
  if (vectors <= 1024) return launch<T, 256, 4>(p, stream);
  return launch<T, 512, 4>(p, stream);
}
template <class T>
cudaError_t by_columns(const RmsNormBackward& p, cudaStream_t stream) {
  const int vectors = p.columns / Vector<T>::N;
  if (vectors <= 128) return launch<T, 128, 1>(p, stream);
  if (vectors <= 256) return launch<T, 256, 1>(p, stream);
  if (vectors <= 512) return launch<T, 256, 2>(p, stream);
  if (vectors <= 1024) return launch<T, 512, 2>(p, stream);
  return launch<T, 1024, 2>(p, stream);
}

}  // namespace

int rms_norm_max_columns(Type type) { return type == Type::fp32 ? 8192 : 16384; }

int rms_norm_partial_rows(int64_t rows) {
  const int64_t blocks = 4 * multiprocessors();
  return static_cast<int>(rows < blocks ? rows : blocks);
}

cudaError_t rms_norm_forward(const RmsNorm& p, cudaStream_t stream) {
  return TL_DISPATCH(p.type, T, by_columns<T>(p, stream));
}
cudaError_t rms_norm_backward(const RmsNormBackward& p, cudaStream_t stream) {
  return TL_DISPATCH(p.type, T, by_columns<T>(p, stream));
}

}  // namespace tl
