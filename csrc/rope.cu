// Rotary position embedding on the heads of a packed projection: forward in place, backward into another tensor, since
// a gradient may be somebody else's too. Heads that do not turn are copied there.
//
//   pair (a, b) = dimensions i and i + n/2 of a head at position t:
//   a' = a cos[t][i] - b sin[t][i];  b' = b cos[t][i] + a sin[t][i]        (backward: sin negated)
//
// fp32 inside, one rounding; in place, dimensions from n on are not touched. A thread turns V neighbouring pairs
// (V: 16 bytes, or 1 where the sizes do not allow it) of HEADS heads, so that a row's angles are read once for them.
// Bytes: every rotated value, out of place every value, is read and written once; angles come from L2.
// Reference: `rope_reference` in src/ops/rope.rs.
#include "vector.cuh"

namespace tl {
namespace {

constexpr int HEADS = 4;  // a thread

template <class T, int V>
__global__ void __launch_bounds__(256) rope_kernel(const Rope p, int chunks, int head_groups) {
  const int64_t at = blockIdx.x * 256ll + threadIdx.x;
  const int chunk = at % chunks, head = at / chunks % head_groups;
  const int64_t row = at / chunks / head_groups;
  if (row >= p.rows) return;
  const int half = p.n / 2;
  const int64_t angle = row % p.t * p.table_stride + chunk * V;
  const int64_t start = row * p.row_stride + chunk * V;
  T* x = static_cast<T*>(p.x) + start;
  const T* from = static_cast<const T*>(p.from) + start;

  T a[HEADS][V], b[HEADS][V];
  float c[V], s[V];
  auto copy = [](T* to, const T* from) {
    if (V * sizeof(T) == 16) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = from[i];
    }
  };
#pragma unroll
  for (int i = 0; i < HEADS; ++i) {
    const int h = head + i * head_groups;
    if (h >= p.all_heads) continue;
    copy(a[i], from + h * p.head_stride);
    copy(b[i], from + h * p.head_stride + half);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    c[i] = p.cos[angle + i];
    s[i] = p.backward ? -p.sin[angle + i] : p.sin[angle + i];
  }
#pragma unroll
  for (int i = 0; i < HEADS; ++i) {
    const int h = head + i * head_groups;
    if (h >= p.all_heads) continue;
#pragma unroll
    for (int e = 0; e < V && h < p.heads; ++e) {
      const float u = to_float(a[i][e]), v = to_float(b[i][e]);
      a[i][e] = from_float<T>(u * c[e] - v * s[e]);
      b[i][e] = from_float<T>(v * c[e] + u * s[e]);
    }
    copy(x + h * p.head_stride, a[i]);
    copy(x + h * p.head_stride + half, b[i]);
  }
}

template <class T, int V>
cudaError_t launch(const Rope& p, cudaStream_t stream) {
  const int chunks = p.n / 2 / V, head_groups = (p.all_heads + HEADS - 1) / HEADS;
  const int64_t threads = p.rows * chunks * head_groups;
  rope_kernel<T, V><<<(threads + 255) / 256, 256, 0, stream>>>(p, chunks, head_groups);
  return cudaGetLastError();
}

template <class T>
cudaError_t by_size(const Rope& p, cudaStream_t stream) {
  constexpr int V = Vector<T>::N;
  const bool wide = p.n / 2 % V == 0 && p.row_stride % V == 0 && p.head_stride % V == 0 &&
                    reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.from) % 16 == 0;
  return wide ? launch<T, V>(p, stream) : launch<T, 1>(p, stream);
}

}  // namespace

cudaError_t rope(const Rope& p, cudaStream_t stream) { return TL_DISPATCH(p.type, T, by_size<T>(p, stream)); }

}  // namespace tl
