// The instructions of sm_90a that the Hopper kernels use: mbarriers, TMA copies, wgmma.
//
// Tiles in shared memory are panels of rows of 64 elements (128 bytes), written by TMA with its 128-byte
// swizzle, each panel aligned to 1,024 bytes. A wgmma operand is such a panel read in one of two ways:
//   K-major:  the 64 elements of a row run along the product's inner dimension;
//   MN-major: they run along its M or N, and the rows along the inner dimension ("transposed").
// Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
#pragma once
#include <cuda.h>

#include "tile.cuh"

namespace flash::hopper {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers ---------------------------------------------------------------------------------------

__device__ inline void barrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals));
}
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives and says how many bytes the copies of this phase will bring.
__device__ inline void barrier_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
__device__ inline void barrier_wait(uint64_t* bar, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
  }
}
// Barrier `id` among `threads` threads of the block.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Makes this thread's ordinary writes to shared memory visible to wgmma and TMA.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA ---------------------------------------------------------------------------------------------

// Box at (column, row, head, batch) of a 4-D tensor -> a panel, swizzled where the map says so. Rows outside the
// tensor are zero.
__device__ inline void tma_load(void* panel, const CUtensorMap* map, uint64_t* bar, int column, int row, int head,
                                int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(panel)),
      "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// A panel -> its box in global memory; rows outside the tensor are not written.
__device__ inline void tma_store(const CUtensorMap* map, const void* panel, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(panel)), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}
// Waits until this thread's stores have read their shared memory.
__device__ inline void tma_store_wait() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
// ---- wgmma -------------------------------------------------------------------------------------------

// Operand descriptor of a 128-byte-swizzled panel: start, and strides in bytes between groups of eight rows
// (1,024) and, MN-major only, between panels along M or N.
__device__ inline uint64_t descriptor(const void* panel, int panel_stride = 16) {
  uint64_t d = (shared_address(panel) & 0x3ffff) >> 4;
  d |= (uint64_t)(panel_stride >> 4) << 16;
  d |= (uint64_t)(1024 >> 4) << 32;
  d |= (uint64_t)1 << 62;  // 128-byte swizzle
  return d;
}
// `bytes` further into the panel: 32 for the next 16 columns of a K-major operand, 2,048 for the next 16 rows
// of an MN-major one.
__device__ inline uint64_t advance(uint64_t d, int bytes) { return d + (bytes >> 4); }

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups are in flight; names the registers, so that no read of them moves up.
template <int PENDING, int N>
__device__ inline void wgmma_wait(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

enum Major { K_MAJOR = 0, MN_MAJOR = 1 };

// d += A B (d = A B where accumulate is 0), m64nNk16, fp32 sums.
//   ss: A and B in shared memory.  rs: A in registers.
template <class T, int N>
struct Wgmma;

#define FLASH_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASH_D16(i) FLASH_D4(i), FLASH_D4(i + 4), FLASH_D4(i + 8), FLASH_D4(i + 12)
#define FLASH_D32 FLASH_D16(0), FLASH_D16(16)
#define FLASH_D64 FLASH_D32, FLASH_D16(32), FLASH_D16(48)
#define FLASH_R32                                                                                         \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31"
#define FLASH_R64                                                                                          \
  FLASH_R32                                                                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63"
// `n` accumulator registers, so operands start at %n; i0.. are n, n+1, ...
#define FLASH_WGMMA(TYPE, NAME, N, REGS, OUT, i0, i1, i2, i3, i4, i5, i6, i7)                                     \
  template <>                                                                                                     \
  struct Wgmma<TYPE, N> {                                                                                         \
    template <int A_MAJOR, int B_MAJOR>                                                                           \
    __device__ static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i2 ", 0;\n"                                               \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, %" i0 ", %" i1    \
                   ", p, 1, 1, %" i3 ", %" i4 ";\n}"                                                              \
                   : OUT                                                                                          \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(A_MAJOR), "n"(B_MAJOR));                                \
    }                                                                                                             \
    template <int B_MAJOR>                                                                                        \
    __device__ static void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" i5 ", 0;\n"                                               \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, {%" i0 ",%" i1    \
                   ",%" i2 ",%" i3 "}, %" i4 ", p, 1, 1, %" i6 ";\n}"                                             \
                   : OUT                                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(B_MAJOR));          \
    }                                                                                                             \
  }
FLASH_WGMMA(bf16, "bf16", 64, FLASH_R32, FLASH_D32, "32", "33", "34", "35", "36", "37", "38", "39");
FLASH_WGMMA(fp16, "f16", 64, FLASH_R32, FLASH_D32, "32", "33", "34", "35", "36", "37", "38", "39");
FLASH_WGMMA(bf16, "bf16", 128, FLASH_R64, FLASH_D64, "64", "65", "66", "67", "68", "69", "70", "71");
FLASH_WGMMA(fp16, "f16", 128, FLASH_R64, FLASH_D64, "64", "65", "66", "67", "68", "69", "70", "71");

template <int REGISTERS>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Four 8x8 matrices of 16-bit values -> shared memory; lane l gives the address of row l%8 of matrix l/8.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ inline void add_float4(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

}  // namespace flash::hopper

namespace flash {
// A 4-D tensor map of a view: boxes of `rows` x 64 elements, 128-byte swizzle.
cudaError_t make_tensor_map(CUtensorMap* map, const View& view, int batch, int rows_total, int heads, int head_size,
                            bool fp16, int rows);
// A map of (B, H, T_pad) fp32: boxes of `columns` numbers at (column, head, batch, 0), not swizzled.
cudaError_t make_row_map(CUtensorMap* map, float* data, int batch, int heads, int64_t t_pad, int columns);
}  // namespace flash
