// SwiGLU on a packed projection [gate | up].
//
//   forward    act = silu(gate) up,  silu(g) = g sigmoid(g)
//   backward   dgate = dact up sigmoid(g) (1 + g (1 - sigmoid(g)));  dup = dact silu(g);  act again if asked for
//
// fp32 inside, one rounding. The backward pass computes act anew instead of keeping it: 2 F bytes a row more
// written, F values a layer less kept. It may write over its inputs.
// A thread handles 16-byte vectors, U of them at a time so that enough loads are in flight.
// Bytes a row (16-bit): forward 6 F; backward 10 F, 12 F with act.
// Reference: `swiglu_reference` in src/ops/mlp.rs.
#include "vector.cuh"

namespace tl {
namespace {

constexpr int THREADS = 256, U = 2;

template <class T, bool BACKWARD>
__global__ void __launch_bounds__(THREADS) swiglu_kernel(const SwiGlu p, int64_t vectors, int row_vectors) {
  using V = Vector<T>;
  V gate[U], up[U], dact[U];
  int64_t at[U], row[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    at[u] = (blockIdx.x * (int64_t)U + u) * THREADS + threadIdx.x;
    if (at[u] >= vectors) continue;
    row[u] = at[u] / row_vectors;
    const T* from = static_cast<const T*>(p.gate_up) + (at[u] + row[u] * row_vectors) * V::N;
    gate[u] = V::load_streaming(from);
    up[u] = V::load_streaming(from + p.width);
    if (BACKWARD) dact[u] = V::load_streaming(static_cast<const T*>(p.dact) + at[u] * V::N);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (at[u] >= vectors) continue;
    float g[V::N], x[V::N], d[V::N], act[V::N];
    gate[u].unpack(g);
    up[u].unpack(x);
    if (BACKWARD) dact[u].unpack(d);
#pragma unroll
    for (int i = 0; i < V::N; ++i) {
      const float sigmoid = __fdividef(1.f, 1.f + __expf(-g[i]));
      const float silu = g[i] * sigmoid;
      act[i] = silu * x[i];
      if (BACKWARD) {
        const float dgate = d[i] * x[i] * (sigmoid + silu * (1.f - sigmoid));
        x[i] = d[i] * silu;
        g[i] = dgate;
      }
    }
    if (!BACKWARD || p.act) V::pack(act).store(static_cast<T*>(p.act) + at[u] * V::N);
    if (BACKWARD) {
      T* to = static_cast<T*>(p.dgate_up) + (at[u] + row[u] * row_vectors) * V::N;
      V::pack(g).store(to);
      V::pack(x).store(to + p.width);
    }
  }
}

template <class T, bool BACKWARD>
cudaError_t launch(const SwiGlu& p, cudaStream_t stream) {
  const int row_vectors = p.width / Vector<T>::N;
  const int64_t vectors = p.rows * row_vectors;
  const int64_t blocks = (vectors + THREADS * U - 1) / (THREADS * U);
  swiglu_kernel<T, BACKWARD><<<blocks, THREADS, 0, stream>>>(p, vectors, row_vectors);
  return cudaGetLastError();
}

}  // namespace

cudaError_t swiglu_forward(const SwiGlu& p, cudaStream_t stream) {
  return TL_DISPATCH(p.type, T, launch<T, false>(p, stream));
}
cudaError_t swiglu_backward(const SwiGlu& p, cudaStream_t stream) {
  return TL_DISPATCH(p.type, T, launch<T, true>(p, stream));
}

}  // namespace tl
