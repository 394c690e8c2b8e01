// How weights are stored, and how a chunk of them is multiplied: bf16, int8 and int4.
//
//   plain   w as it is, (N, K)
//   int8    w = scale q,            q in -128..127      one fp16 scale a group of 32, 64 or 128 columns
//   int4    w = scale q + minimum,  q in 0..15          two fp16 a group (Q4_0: minimum = -8 scale)
//
// A warp works on a chunk: 16 rows ("slots") x 256 columns, multiplied by tensor cores, with the weights as the 16-row
// operand and up to 8 vectors x as the columns: a weight costs 1/8 of an instruction where a multiply-add a weight
// would cost three. Lane 4 g + t holds slots g and g + 8.
//
// int8 and int4 lie in blocks of 8 rows x 128 columns, (ceil(N / 8), ceil(K / 128)) of them, the codes and scales that
// are missing at the edges 0: half a chunk is two of them side by side, in the order in which lanes read it. With g a
// row and column = 32 j + 8 t + e of the block (j, t in 0..3, e in 0..7):
//   int4: 512 bytes of codes: 32-bit word 16 g + 4 t + j, of which nibble r is e = 2 r for r < 4, e = 2 r - 7 for r >=
//   4;
//         then 8 x (128 / group) pairs of fp16 (scale, minimum), row by row.
//   int8: 1,024 bytes of codes: byte 512 (j / 2) + 64 g + 16 t + 8 (j % 2) + i is e = 0 2 1 3 4 6 5 7 for i = 0..7;
//         then 8 x (128 / group) fp16 scales, row by row.
// So a mask takes two codes that are neighbours in k into the halves of a register, where bits of an exponent make
// numbers of them: int4 0x4300 | q = 128 + q; the constant is taken off again with the minimum, which multiplies the
// sum of x over the group. int8 is exact in bf16 after one subtraction.
#pragma once
#include "device.cuh"

namespace tl {

constexpr int SLOTS = 16, COLUMNS = 256, BLOCKS = COLUMNS / 32;  // of a chunk

// `shift` is log2(group / 32).
template <Format F>
struct Chunk {
  static constexpr int CODES = F == Format::int8 ? 1024 : 512;  // bytes of a block of 128 columns
  static constexpr int SCALE = F == Format::int8 ? 2 : 4;       // bytes of a group
  static constexpr int HALF = F == Format::plain ? 8 * 2 * COLUMNS : 2 * (CODES + 32 * SCALE);  // of 8 slots, at most
  static constexpr int BYTES = 2 * HALF;

  __host__ __device__ static int block_bytes(int shift) { return CODES + (32 * SCALE >> shift); }
};

// One matrix as the kernels see it. Tile i has the slots of rows first(i) .. + 7 and first(i) + second .. + 7.
struct Matrix {
  const uint8_t* data;
  int out, in;  // N, K
  int second;   // 8; F where a slot and the slot 8 behind it are gate and up

  __device__ int tiles() const { return out + SLOTS - 1 >> 4; }
  __device__ int first(int tile) const { return second == 8 ? tile * SLOTS : tile * 8; }
  __device__ int row(int tile, int slot) const { return first(tile) + (slot & 7) + (slot & 8 ? second : 0); }
};

// Starts the copy of a chunk of a tile to `stage`, by one warp. Rows that do not exist are left out, and columns: what
// lies there meets an x of 0. (Few instructions matter more here than anywhere: a warp does this for each chunk. The
// copy engine, cp.async.bulk, was slower: a warp's 16 rows are 16 instructions one after another, 90 cycles each.)
// Plain: a row is 32 units of 16 bytes. Odd slots have the halves of each 128 bytes swapped, so that eight lanes of a
// quarter warp (two slots, four units) touch all banks once.
template <Format F>
__device__ inline void copy_chunk(uint32_t stage, const Matrix& w, int shift, int tile, int chunk) {
  using C = Chunk<F>;
  const int lane = threadIdx.x % 32, first = w.first(tile);
  if constexpr (F == Format::plain) {
    const int column = chunk * COLUMNS + lane * 8, left = column < w.in ? w.out - first : 0;  // rows that are there
    const uint8_t* from = w.data + 2 * ((int64_t)first * w.in + column);
    const uint32_t even = stage + lane * 16, odd = stage + (lane ^ 4) * 16;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      if (i == 8) from += 2 * (int64_t)(w.second - 8) * w.in;
      if ((i < 8 ? i : i + w.second - 8) < left) copy16_async((i % 2 ? odd : even) + i * 2 * COLUMNS, from);
      from += 2 * w.in;
    }
  } else {
    const int block = C::block_bytes(shift), across = w.in + 127 >> 7;
    const int bytes = min(2, across - 2 * chunk) * block;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + half * w.second;
      const uint8_t* from = w.data + ((int64_t)(row >> 3) * across + 2 * chunk) * block + lane * 16;
#pragma unroll
      for (int at = 0; at < C::HALF; at += 512) {
        if (row < w.out && at + lane * 16 < bytes) copy16_async(stage + half * C::HALF + lane * 16 + at, from + at);
      }
    }
  }
}

// The vectors' part of a chunk: lane 4 n + t has columns 32 j + 8 t .. + 7 of vector n.
struct Fragment {
  uint4 x[BLOCKS];
  float sum[BLOCKS][2];  // int4: sums over the group so far, block j included, of vectors 2 t and 2 t + 1
};

__device__ inline void sum_blocks(Fragment& f, int shift) {
  const uint32_t one = pack2(1.f, 1.f);
  float c[4] = {};
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
    if ((j & (1 << shift) - 1) == 0) c[0] = c[1] = 0.f;
    mma(c, one, one, one, one, f.x[j].x, f.x[j].y);
    mma(c, one, one, one, one, f.x[j].z, f.x[j].w);
    f.sum[j][0] = c[0];
    f.sum[j][1] = c[1];
  }
}

// Eight codes of one int4 word: constant + q, as four registers of two.
__device__ inline void unpack4(uint32_t word, uint32_t (&q)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = (word >> 4 * i & 0x000f000fu) | 0x43004300u;
}
constexpr float OFFSET4 = 128.f;

// Two bytes in the halves of a register, as numbers: 128 + the low 7 bits, less 128, or less 256 where the sign is set.
__device__ inline uint32_t from_bytes(uint32_t pair) {
  const uint32_t low = (pair & 0x007f007fu) | 0x43004300u, sign = (pair & 0x00800080u) | 0x43004300u;
  const auto d = __hsub2(reinterpret_cast<const __nv_bfloat162&>(low), reinterpret_cast<const __nv_bfloat162&>(sign));
  return reinterpret_cast<const uint32_t&>(d);
}

// Four codes of one int8 word, exactly, as two registers of two.
__device__ inline void unpack8(uint32_t word, uint32_t (&q)[2]) { q[0] = from_bytes(word), q[1] = from_bytes(word >> 8); }

// y += the chunk at `stage` times the vectors. y: slots g (0, 1) and g + 8 (2, 3), vectors 2 t and 2 t + 1.
template <Format F>
__device__ inline void multiply_chunk(uint32_t stage, const Fragment& f, int shift, float (&y)[4]) {
  using C = Chunk<F>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (F == Format::plain) {
    float other[4] = {};  // an independent sum: a product waits for the one before it on the same sum
    const uint32_t from = stage + g * 2 * COLUMNS + 16 * t, swap = g % 2 * 64;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const uint32_t at = (j % 2 ? from - swap : from + swap) + 64 * j;
      const uint4 a = load_shared16(at), b = load_shared16(at + C::HALF);
      mma(y, a.x, b.x, a.y, b.y, f.x[j].x, f.x[j].y);
      mma(other, a.z, b.z, a.w, b.w, f.x[j].z, f.x[j].w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += other[i];
  } else {
    float even[4] = {}, odd[4] = {};
    const int block_bytes = C::block_bytes(shift);
    auto block = [&](int j, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
      mma(even, a[0], b[0], a[1], b[1], f.x[j].x, f.x[j].y);
      mma(odd, a[2], b[2], a[3], b[3], f.x[j].z, f.x[j].w);
      if ((j + 1 & (1 << shift) - 1) != 0) return;
      const uint32_t scales = stage + j / 4 * block_bytes + C::CODES + ((4 * g >> shift) + (j % 4 >> shift)) * C::SCALE;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t from = scales + half * C::HALF;
        const float first = even[2 * half] + odd[2 * half], second = even[2 * half + 1] + odd[2 * half + 1];
        if constexpr (F == Format::int4) {
          uint32_t bits;
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(from));
          const float2 s = __half22float2(reinterpret_cast<const __half2&>(bits));
          const float minimum = fmaf(-OFFSET4, s.x, s.y);
          y[2 * half] += s.x * first + minimum * f.sum[j][0];
          y[2 * half + 1] += s.x * second + minimum * f.sum[j][1];
        } else {
          unsigned short bits;
          asm volatile("ld.shared.b16 %0, [%1];" : "=h"(bits) : "r"(from));
          const float s = __half2float(__ushort_as_half(bits));
          y[2 * half] += s * first;
          y[2 * half + 1] += s * second;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) even[i] = odd[i] = 0.f;
    };
    uint32_t a[4], b[4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t from = stage + side * block_bytes + 16 * lane;
      if constexpr (F == Format::int4) {
        const uint4 la = load_shared16(from), lb = load_shared16(from + C::HALF);
        const uint32_t wa[4] = {la.x, la.y, la.z, la.w}, wb[4] = {lb.x, lb.y, lb.z, lb.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          unpack4(wa[j], a);
          unpack4(wb[j], b);
          block(4 * side + j, a, b);
        }
      } else {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint4 la = load_shared16(from + 512 * k), lb = load_shared16(from + C::HALF + 512 * k);
          const uint32_t wa[4] = {la.x, la.y, la.z, la.w}, wb[4] = {lb.x, lb.y, lb.z, lb.w};
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            uint32_t half[2];
            unpack8(wa[2 * j], half), a[0] = half[0], a[1] = half[1];
            unpack8(wa[2 * j + 1], half), a[2] = half[0], a[3] = half[1];
            unpack8(wb[2 * j], half), b[0] = half[0], b[1] = half[1];
            unpack8(wb[2 * j + 1], half), b[2] = half[0], b[3] = half[1];
            block(4 * side + 2 * k + j, a, b);
          }
        }
      }
    }
  }
}

}  // namespace tl
