// AdamW with fp32 state, gradient clipping, the refresh of the bf16 working copy and the clearing of the gradient
// in one pass over all tensors; and the global gradient norm, on the device.
//
//   g' = g clip
//   m  = b1 m + (1 - b1) g'
//   v  = b2 v + (1 - b2) g'^2
//   p  = p (1 - lr wd) - lr/(1 - b1^s) * m / (sqrt(v) / sqrt(1 - b2^s) + eps)
//   w  = bf16(p)                                 (where a working copy exists)
//   g  = 0                                       (where asked for)
//
// clip is one fp32 on the device; where it is not finite nothing is written. Tensors are flat; a launch carries
// up to LIST of them in its parameters, so no table is copied. A block updates 1,024 elements, a thread one
// 16-byte vector of each array: blocks that stay on the chip and take several chunks were 10 % slower.
// Bytes an element: 30 with w (read p g m v = 16, write p m v = 12, w = 2), 34 with the clearing. At 3.0 TB/s,
// 1.1e9 elements: 11.0 and 12.5 ms.
// Why here: torch's fused AdamW neither refreshes a bf16 copy nor skips the step by a number on the device.
// Reference: `AdamW::step_reference` in src/train/optimizer.rs; torch.optim.AdamW.
#include "vector.cuh"

namespace tl {
namespace {

constexpr int THREADS = 256, LIST = 256;
constexpr int UPDATE_CHUNK = 4 * THREADS;        // elements a block of adamw
constexpr int NORM_CHUNK = 4 * 8 * THREADS;      // elements a block of the norm takes at a time

// Tensors and, for each, the number of chunks of all before it.
template <class Entry>
struct List {
  int count, chunk_size;
  int64_t chunks;
  int64_t first[LIST];
  Entry entry[LIST];

  __device__ int find(int64_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= chunk) low = middle; else high = middle - 1;
    }
    return low;
  }
};

template <class Entry>
List<Entry> make_list(const Entry* entries, int count, int chunk_size) {
  List<Entry> list{};
  list.chunk_size = chunk_size;
  for (list.count = 0; list.count < count && list.count < LIST; ++list.count) {
    list.first[list.count] = list.chunks;
    list.entry[list.count] = entries[list.count];
    list.chunks += (entries[list.count].n + chunk_size - 1) / chunk_size;
  }
  return list;
}

struct Update {
  AdamWConfig c;
  float clip;
  __device__ float operator()(float p, float g, float& m, float& v) const {
    g *= clip;
    m = c.beta1 * m + (1.0f - c.beta1) * g;
    v = c.beta2 * v + (1.0f - c.beta2) * g * g;
    return p * c.decay - c.step_size * m / (sqrtf(v) * c.inv_sqrt_bias2 + c.eps);
  }
};

__global__ void __launch_bounds__(THREADS)
    adamw_kernel(const __grid_constant__ List<AdamWTensor> list, const float* __restrict__ clip, const AdamWConfig c) {
  const Update update{c, *clip};
  if (!isfinite(update.clip)) return;  // the host reads the same norm and stops the run
  const int which = list.find(blockIdx.x);
  const AdamWTensor& t = list.entry[which];
  const int64_t i = (blockIdx.x - list.first[which]) * UPDATE_CHUNK + 4 * threadIdx.x;
  auto* w = static_cast<__nv_bfloat16*>(t.weight);
  if (i + 4 <= t.n) {
    auto at = [i](float* x) { return reinterpret_cast<float4*>(x + i); };
    float4 p = *at(t.param), m = *at(t.exp_avg), v = *at(t.exp_avg_sq);
    const float4 g = *at(t.grad);
    p.x = update(p.x, g.x, m.x, v.x);
    p.y = update(p.y, g.y, m.y, v.y);
    p.z = update(p.z, g.z, m.z, v.z);
    p.w = update(p.w, g.w, m.w, v.w);
    *at(t.param) = p;
    *at(t.exp_avg) = m;
    *at(t.exp_avg_sq) = v;
    if (c.clear_grad) *at(t.grad) = make_float4(0.f, 0.f, 0.f, 0.f);
    if (w) {
      __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(p.x, p.y), __floats2bfloat162_rn(p.z, p.w)};
      *reinterpret_cast<uint2*>(w + i) = *reinterpret_cast<uint2*>(pair);
    }
  } else {
    for (int64_t j = i; j < t.n; ++j) {
      t.param[j] = update(t.param[j], t.grad[j], t.exp_avg[j], t.exp_avg_sq[j]);
      if (c.clear_grad) t.grad[j] = 0.f;
      if (w) w[j] = __float2bfloat16_rn(t.param[j]);
    }
  }
}

// Sum of squares over 256 threads, in thread 0.
__device__ float block_sum(float x) {
  __shared__ float scratch[THREADS / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x < THREADS / 32 ? scratch[threadIdx.x] : 0.f);
}

template <class T>
__device__ float squares(const T* x, int64_t start, int64_t end) {
  using V = Vector<T>;
  constexpr int U = 4;  // vectors in flight
  float sum = 0.f;
  for (int64_t base = start + V::N * threadIdx.x; base < end; base += U * V::N * THREADS) {
    V v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = base + u * V::N * THREADS;
      if (i + V::N <= end) v[u] = V::load_streaming(x + i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = base + u * V::N * THREADS;
      if (i + V::N <= end) {
        float y[V::N];
        v[u].unpack(y);
#pragma unroll
        for (int e = 0; e < V::N; ++e) sum += y[e] * y[e];
      } else {
        for (int64_t j = i; j < end; ++j) sum += to_float(x[j]) * to_float(x[j]);
      }
    }
  }
  return sum;
}

__global__ void __launch_bounds__(THREADS)
    squares_kernel(const __grid_constant__ List<NormTensor> list, float* partial, bool add) {
  float sum = 0.f;
  for (int64_t chunk = blockIdx.x; chunk < list.chunks; chunk += gridDim.x) {
    const int which = list.find(chunk);
    const NormTensor& t = list.entry[which];
    const int64_t start = (chunk - list.first[which]) * NORM_CHUNK, end = min(start + NORM_CHUNK, t.n);
    if (t.type == Type::fp32)
      sum += squares(static_cast<const float*>(t.grad), start, end);
    else if (t.type == Type::bf16)
      sum += squares(static_cast<const __nv_bfloat16*>(t.grad), start, end);
    else
      sum += squares(static_cast<const __half*>(t.grad), start, end);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = add ? partial[blockIdx.x] + sum : sum;
}

__global__ void __launch_bounds__(THREADS)
    norm_kernel(const float* partial, float max_norm, float* norm, float* clip) {
  float sum = 0.f;
  for (int i = threadIdx.x; i < kNormBlocks; i += THREADS) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    const float x = sqrtf(sum);
    *norm = x;
    // As torch's clip_grad_norm_; x * 0 carries inf and nan over.
    *clip = fminf(max_norm / (x + 1e-6f), 1.f) + x * 0.f;
  }
}

}  // namespace

cudaError_t adamw(const AdamWTensor* tensors, int count, const float* clip, AdamWConfig c, cudaStream_t stream) {
  for (int at = 0; at < count; at += LIST) {
    const auto list = make_list(tensors + at, count - at, UPDATE_CHUNK);
    if (list.chunks > 0) adamw_kernel<<<list.chunks, THREADS, 0, stream>>>(list, clip, c);
  }
  return cudaGetLastError();
}

cudaError_t grad_norm(const NormTensor* tensors, int count, float max_norm, float* partial, float* norm, float* clip,
                      cudaStream_t stream) {
  for (int at = 0; at < count; at += LIST) {
    const auto list = make_list(tensors + at, count - at, NORM_CHUNK);
    squares_kernel<<<kNormBlocks, THREADS, 0, stream>>>(list, partial, at > 0);
  }
  norm_kernel<<<1, THREADS, 0, stream>>>(partial, max_norm, norm, clip);
  return cudaGetLastError();
}

}  // namespace tl
