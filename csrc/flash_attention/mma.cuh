// The instructions of sm_80 that the mma.sync kernels use: cp.async, ldmatrix, mma.m16n8k16.
//
// Tiles in shared memory are panels of rows of 64 elements (128 bytes), swizzled (tile.cuh).
#pragma once
#include "tile.cuh"

namespace flash::ampere {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory; zeros where `valid` is false.
__device__ inline void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Rows [row, row + ROWS) of one head -> D/64 panels of ROWS x 64; rows from `limit` on are zero.
template <int ROWS, int D, int THREADS>
__device__ inline void copy_tile(uint32_t panels, const void* data, int64_t row_stride, int row, int limit) {
  constexpr int CHUNKS = D / 8;
  static_assert(ROWS * CHUNKS % THREADS == 0, "each thread copies as many chunks");
  const auto* base = static_cast<const uint16_t*>(data);
#pragma unroll
  for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
    const int at = i * THREADS + threadIdx.x, r = at / CHUNKS, c = at % CHUNKS;
    const bool valid = row + r < limit;
    copy16(panels + c / 8 * ROWS * 128 + swizzle(r, c % 8), base + (valid ? (row + r) * row_stride : 0) + 8 * c, valid);
  }
}

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// Operands out of a panel. `row` and `column` are the corner of the 16 x 16 piece; ROWS is the panel's height.
//   a:   A (16 rows x 16 inner), rows of the panel are rows of A
//   a_t: A, rows of the panel run along the inner dimension
//   b:   B (16 inner x 16), rows of the panel are columns of B: r[0], r[1] the first 8, r[2], r[3] the next
//   b_t: B, rows of the panel run along the inner dimension
template <int ROWS>
__device__ inline void load_a(uint32_t (&r)[4], uint32_t panels, int row, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices(r, panels + column / 64 * ROWS * 128 + swizzle(row + lane % 16, column % 64 / 8 + lane / 16));
}
template <int ROWS>
__device__ inline void load_a_t(uint32_t (&r)[4], uint32_t panels, int row, int inner) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(r, panels + row / 64 * ROWS * 128 +
                                  swizzle(inner + lane % 8 + lane / 16 * 8, row % 64 / 8 + lane / 8 % 2));
}
template <int ROWS>
__device__ inline void load_b(uint32_t (&r)[4], uint32_t panels, int column, int inner) {
  const int lane = threadIdx.x % 32;
  load_matrices(r, panels + inner / 64 * ROWS * 128 +
                       swizzle(column + lane % 8 + lane / 16 * 8, inner % 64 / 8 + lane / 8 % 2));
}
template <int ROWS>
__device__ inline void load_b_t(uint32_t (&r)[4], uint32_t panels, int inner, int column) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(r, panels + column / 64 * ROWS * 128 +
                                  swizzle(inner + lane % 16, column % 64 / 8 + lane / 16));
}

// d += A B, or d = A B where `first` (a constant after unrolling: it saves clearing d), 16 x 8 x 16, fp32 sums.
template <class T>
__device__ inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool first = false);
template <>
__device__ inline void mma<bf16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool first) {
  const float c[4] = {first ? 0.f : d[0], first ? 0.f : d[1], first ? 0.f : d[2], first ? 0.f : d[3]};
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ inline void mma<fp16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool first) {
  const float c[4] = {first ? 0.f : d[0], first ? 0.f : d[1], first ? 0.f : d[2], first ? 0.f : d[3]};
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

}  // namespace flash::ampere
