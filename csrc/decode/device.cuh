// The instructions that the decode kernels share: tensor-core product, copies to shared memory, loads past L1,
// programmatic dependent launch.
#pragma once
#include "../vector.cuh"
#include "decode.h"

namespace tl {

using bf16 = __nv_bfloat16;

// c (16 x 8) += A (16 x 16) B (16 x 8). Lane 4 g + t holds, with g in 0..7 and t in 0..3:
//   a0: row g, k 2t, 2t+1    a1: row g+8    a2, a3: the same rows, k + 8
//   b0: k 2t, 2t+1, column g     b1: k + 8
//   c0, c1: row g, columns 2t, 2t+1     c2, c3: row g+8
// k may be permuted, if A's and B's are alike: where a lane has 8 neighbours of a row, elements 0..3 are one product's
// (2t, 2t+1, 2t+8, 2t+9), elements 4..7 the next one's.
__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two values as one register.
__device__ inline uint32_t pack2(float low, float high) {
  const bf16 pair[2] = {from_float<bf16>(low), from_float<bf16>(high)};
  return *reinterpret_cast<const uint32_t*>(pair);
}

// Transposes an 8 x 8 matrix of 16-bit values of which lane 4 g + t holds row g, columns 2t and 2t+1.
__device__ inline uint32_t transpose8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Sum and maximum over the four lanes that share lane / 4.
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, past L1, while the thread goes on.
__device__ inline void copy16_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups of this thread are under way.
template <int N>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ inline uint4 load_shared16(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from));
  return x;
}

// What a kernel wrote that this one overlaps with: from L2, where L1 may be stale.
__device__ inline uint4 load_l2(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif

__device__ inline void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Programmatic dependent launch: the next kernel may start; wait for the one before to end. Nothing on older cards.
__device__ inline void launch_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches with or without overlap with the kernel before.
template <class Kernel, class Params>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, int shared, bool overlap, cudaStream_t stream,
                   const Params& params) {
  if (shared > 48 * 1024) {
    if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  if (auto error = cudaLaunchKernelEx(&config, kernel, params)) return error;
  return cudaGetLastError();
}

}  // namespace tl
