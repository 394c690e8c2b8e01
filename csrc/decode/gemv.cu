// y = W f(x) for 1 to 8 vectors, f an RMSNorm or nothing, y stored, added to the residual stream or put through SwiGLU.
//
//   f(x) = x w / sqrt(mean(x^2) + eps), x w rounded to the dtype;   y = W f(x)   |   y += W f(x)
//   y = silu(g) u with [g; u] = W f(x)
//
// Sums in fp32, one rounding. One kernel instead of norm, product and what follows: at batch 1 a launch costs as much
// as reading 8 MB. Every block computes the norm anew (2 C bytes from L2). Bytes: W once; the rest is small.
// Geometry: linear.cuh; kStages chunks a warp on the way, two blocks an SM at most, which take tiles in turn (a block a
// tile was 8 % slower in 16 bits and 18 % in int4). With `overlap` a block asks for its first weights before the
// kernel that computes x has ended; so that its blocks find room beside that kernel's, they take at most half of an
// SM's shared memory.
// Reference: `Linear` after `rms_norm_reference`, src/ops.
#include "linear.cuh"

namespace tl {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
template <Format F>
constexpr int kStages = F == Format::plain  ? 1
                        : F == Format::int8 ? 2
                                            : 3;

template <Format F>
struct Shared {
  Scratch<WARPS> scratch;
  Matrix matrix;
  alignas(128) uint8_t ring[WARPS * Stream<F, kStages<F>, WARPS>::BYTES];
};

template <class T, Format F>
__global__ void __launch_bounds__(THREADS, 2) gemv_kernel(const __grid_constant__ Gemv p) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<F>*>(memory);
  if (threadIdx.x == 0) {
    shared.matrix = {static_cast<const uint8_t*>(p.weight), p.out, p.in, p.store == Store::swiglu ? p.out / 2 : 8, 0};
  }
  __syncthreads();
  Stream<F, kStages<F>, WARPS> stream;
  stream.start(&shared.matrix, 1, p.group, shared.ring);
  launch_next();
  const Input<T> input{static_cast<const T*>(p.x), static_cast<const T*>(p.norm), p.rows, p.in, p.eps};
  wait_for_previous();
  linear<T>(shared.matrix, input, Output<T>{p.store, p.rows, p.y, p.y_stride}, stream, shared.scratch);
}

template <class T>
cudaError_t by_format(const Gemv& p, cudaStream_t stream) {
  const int tiles = (p.out + SLOTS - 1) / SLOTS, most = 2 * multiprocessors(), blocks = tiles < most ? tiles : most;
  auto go = [&](auto kernel, int shared) {
    return launch(kernel, dim3(blocks), THREADS, shared, p.overlap, false, stream, p);
  };
  switch (p.format) {
    case Format::int8:
      return go(gemv_kernel<T, Format::int8>, sizeof(Shared<Format::int8>));
    case Format::int4:
      return go(gemv_kernel<T, Format::int4>, sizeof(Shared<Format::int4>));
    default:
      return go(gemv_kernel<T, Format::plain>, sizeof(Shared<Format::plain>));
  }
}

}  // namespace

cudaError_t gemv(const Gemv& p, cudaStream_t stream) {
  if (p.rows < 1 || p.rows > kDecodeRows || p.in % 8 || (p.store == Store::swiglu && p.out % 16)) {
    return cudaErrorInvalidValue;
  }
  if (p.type == Type::bf16) return by_format<__nv_bfloat16>(p, stream);
  if (p.type == Type::fp16) return by_format<__half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace tl
