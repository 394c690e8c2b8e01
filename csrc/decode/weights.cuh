// How weights are stored, copied to shared memory and multiplied: 16-bit, int8 and int4.
//
//   plain   w as it is, rows of K
//   int8    w = scale q,            q in -128..127      one fp16 scale a group of 32, 64 or 128 columns
//   int4    w = scale q + minimum,  q in 0..15          two fp16 a group (Q4_0: minimum = -8 scale)
//
// A warp works on a chunk: 16 rows ("slots") x 256 columns. It is copied as it lies in memory (rows of 512, 256 or 128
// bytes) and multiplied by tensor cores, the weights as the 16-row operand, up to 8 vectors x as the columns: a weight
// costs 1/8 of an instruction where a multiply-add a weight would cost three. Lane 4 g + t holds slots g and g + 8.
//
// Order of the codes, so that a lane's 16 bytes are what it multiplies. Rows are padded with zeros to whole blocks.
//   int8: blocks of 64 columns. Byte 16 t + 8 j + i of a block is column 32 j + 8 t + e, with
//         e = 0 2 1 3 4 6 5 7 for i = 0..7.
//   int4: blocks of 128 columns. 32-bit word 4 t + j of a block has columns 32 j + 8 t + e, e = 0..7; nibble r is
//         e = 2 r for r < 4, e = 2 r - 7 for r >= 4.
// So a mask takes two codes that are neighbours in k into the halves of a register, where bits of an exponent make
// numbers of them: int4 0x4300 | q = 128 + q in bf16, 0x6400 | q = 1024 + q in fp16; the constant is taken off again
// with the minimum, which multiplies the sum of x over the group. int8 is exact in 16 bits after one subtraction.
#pragma once
#include "device.cuh"

namespace tl {

constexpr int SLOTS = 16, COLUMNS = 256, BLOCKS = COLUMNS / 32;  // of a chunk

template <Format F>
struct Chunk {
  static constexpr int BITS = F == Format::plain ? 16 : F == Format::int8 ? 8 : 4;
  static constexpr int SCALE_BYTES = F == Format::plain ? 0 : F == Format::int8 ? 2 : 4;
  static constexpr int UNITS = COLUMNS * BITS / 128;  // of 16 bytes, a row
  static constexpr int ROW = UNITS * 16;              // bytes
  static constexpr int CODES = SLOTS * ROW;
  static constexpr int BYTES = CODES + SLOTS * BLOCKS * SCALE_BYTES;
  static constexpr int PAD = F == Format::plain ? 8 : F == Format::int8 ? 64 : 128;  // columns

  __host__ __device__ static int row_bytes(int columns) { return (columns + PAD - 1) / PAD * PAD * BITS / 8; }
  // `shift`: log2(group / 32)
  __host__ __device__ static int scale_row_bytes(int columns, int shift) {
    return (columns + COLUMNS - 1) / COLUMNS * (BLOCKS >> shift) * SCALE_BYTES;
  }
};

// One matrix as the kernels see it. Tile i has the slots of rows first(i) .. + 7 and first(i) + second .. + 7.
struct Matrix {
  const uint8_t *codes, *scales;
  int out, in;  // N, K
  int second;   // 8; F where a slot and the slot 8 behind it are gate and up
  int dealt;    // tiles that were dealt to blocks before this matrix

  __device__ int tiles() const { return (out + SLOTS - 1) / SLOTS; }
  __device__ int row(int tile, int slot) const {
    return tile * (second == 8 ? SLOTS : 8) + slot % 8 + slot / 8 * second;
  }
};

// Where unit `unit` of a slot lies: odd slots have the halves of each 128 bytes swapped, so that eight lanes of a
// quarter warp (two slots, four units) touch all banks once.
template <Format F>
__device__ inline int place(int slot, int unit) { return slot * Chunk<F>::ROW + (unit ^ (slot & 1) * 4) * 16; }

// Starts the copy of chunk `chunk` of a tile to `stage`, by one warp.
template <Format F>
__device__ inline void copy_chunk(uint32_t stage, const Matrix& w, int shift, int tile, int chunk) {
  using C = Chunk<F>;
  const int lane = threadIdx.x % 32, row_bytes = C::row_bytes(w.in);
#pragma unroll
  for (int i = 0; i < SLOTS * C::UNITS / 32; ++i) {
    const int slot = (i * 32 + lane) / C::UNITS, unit = (i * 32 + lane) % C::UNITS;
    const int row = min(w.row(tile, slot), w.out - 1), byte = chunk * C::ROW + unit * 16;
    const bool valid = byte < row_bytes;
    copy16_async(stage + place<F>(slot, unit), w.codes + (int64_t)row * row_bytes + (valid ? byte : 0), valid);
  }
  if constexpr (F != Format::plain) {
    const int scale_row = C::scale_row_bytes(w.in, shift), bytes = (BLOCKS >> shift) * C::SCALE_BYTES;
    for (int at = lane * 4; at < SLOTS * bytes; at += 32 * 4) {
      const int row = min(w.row(tile, at / bytes), w.out - 1);
      copy4_async(stage + C::CODES + at, w.scales + (int64_t)row * scale_row + chunk * bytes + at % bytes, true);
    }
  }
}

// The vectors' part of a chunk: lane 4 n + t has columns 32 j + 8 t .. + 7 of vector n.
struct Fragment {
  uint4 x[BLOCKS];
  float sum[BLOCKS][2];  // int4: sum over block j of vectors 2 t and 2 t + 1
};

template <class T>
__device__ inline void sum_blocks(Fragment& f) {
  const uint32_t one = pack2<T>(1.f, 1.f);
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
    float c[4] = {};
    mma<T>(c, one, one, one, one, f.x[j].x, f.x[j].y);
    mma<T>(c, one, one, one, one, f.x[j].z, f.x[j].w);
    f.sum[j][0] = c[0];
    f.sum[j][1] = c[1];
  }
}

// Eight codes of one int4 word: constant + q, as four registers of two.
template <class T>
__device__ inline void unpack4(uint32_t word, uint32_t (&q)[4]) {
  constexpr uint32_t exponent = Is<T>::bf16 ? 0x43004300u : 0x64006400u;
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = (word >> 4 * i & 0x000f000fu) | exponent;
}
template <class T>
constexpr float kOffset4 = Is<T>::bf16 ? 128.f : 1024.f;

// Four codes of one int8 word, exactly, as two registers of two.
template <class T>
__device__ inline void unpack8(uint32_t word, uint32_t (&q)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i, word >>= 8) {
    if constexpr (Is<T>::bf16) {  // 128 + the low 7 bits, less 128, or less 256 where the sign is set
      const uint32_t low = (word & 0x007f007fu) | 0x43004300u, sign = (word & 0x00800080u) | 0x43004300u;
      const auto d = __hsub2(reinterpret_cast<const __nv_bfloat162&>(low), reinterpret_cast<const __nv_bfloat162&>(sign));
      q[i] = reinterpret_cast<const uint32_t&>(d);
    } else {  // 1024 + 128 + q, less 1152
      const uint32_t biased = (word & 0x00ff00ffu) ^ 0x64806480u, bias = 0x64806480u;
      const auto d = __hsub2(reinterpret_cast<const __half2&>(biased), reinterpret_cast<const __half2&>(bias));
      q[i] = reinterpret_cast<const uint32_t&>(d);
    }
  }
}

// y += the chunk at `stage` times the vectors. y: slots g (0, 1) and g + 8 (2, 3), vectors 2 t and 2 t + 1.
template <class T, Format F>
__device__ inline void multiply_chunk(uint32_t stage, const Fragment& f, int shift, float (&y)[4]) {
  using C = Chunk<F>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if constexpr (F == Format::plain) {
    float more[3][4] = {};  // independent sums: a product waits for the one before it on the same sum
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const uint4 a = load_shared16(stage + place<F>(g, 4 * j + t)), b = load_shared16(stage + place<F>(g + 8, 4 * j + t));
      mma<T>(j % 2 ? more[0] : y, a.x, b.x, a.y, b.y, f.x[j].x, f.x[j].y);
      mma<T>(j % 2 ? more[1] : more[2], a.z, b.z, a.w, b.w, f.x[j].z, f.x[j].w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] += more[0][i] + (more[1][i] + more[2][i]);
  } else {
    float even[4] = {}, odd[4] = {}, sum[2] = {};
    const int groups = BLOCKS >> shift;
    auto block = [&](int j, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
      mma<T>(even, a[0], b[0], a[1], b[1], f.x[j].x, f.x[j].y);
      mma<T>(odd, a[2], b[2], a[3], b[3], f.x[j].z, f.x[j].w);
      if (F == Format::int4) sum[0] += f.sum[j][0], sum[1] += f.sum[j][1];
      if ((j + 1 & (1 << shift) - 1) != 0) return;
      const uint32_t scales = stage + C::CODES + (g * groups + (j >> shift)) * C::SCALE_BYTES;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t from = scales + half * 8 * groups * C::SCALE_BYTES;
        if constexpr (F == Format::int4) {
          uint32_t bits;
          asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(from));
          const float2 s = __half22float2(reinterpret_cast<const __half2&>(bits));
          const float minimum = fmaf(-kOffset4<T>, s.x, s.y);
          y[2 * half] += s.x * (even[2 * half] + odd[2 * half]) + minimum * sum[0];
          y[2 * half + 1] += s.x * (even[2 * half + 1] + odd[2 * half + 1]) + minimum * sum[1];
        } else {
          unsigned short bits;
          asm volatile("ld.shared.b16 %0, [%1];" : "=h"(bits) : "r"(from));
          const float s = __half2float(__ushort_as_half(bits));
          y[2 * half] += s * (even[2 * half] + odd[2 * half]);
          y[2 * half + 1] += s * (even[2 * half + 1] + odd[2 * half + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) even[i] = odd[i] = 0.f;
      sum[0] = sum[1] = 0.f;
    };
#pragma unroll
    for (int k = 0; k < C::UNITS / 4; ++k) {  // 16 bytes a slot and lane: 4 blocks of int4, 2 of int8
      const uint4 la = load_shared16(stage + place<F>(g, 4 * k + t)), lb = load_shared16(stage + place<F>(g + 8, 4 * k + t));
      const uint32_t wa[4] = {la.x, la.y, la.z, la.w}, wb[4] = {lb.x, lb.y, lb.z, lb.w};
      uint32_t a[4], b[4];
      if constexpr (F == Format::int4) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          unpack4<T>(wa[j], a);
          unpack4<T>(wb[j], b);
          block(4 * k + j, a, b);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t half[2];
          unpack8<T>(wa[2 * j], half), a[0] = half[0], a[1] = half[1];
          unpack8<T>(wa[2 * j + 1], half), a[2] = half[0], a[3] = half[1];
          unpack8<T>(wb[2 * j], half), b[0] = half[0], b[1] = half[1];
          unpack8<T>(wb[2 * j + 1], half), b[2] = half[0], b[3] = half[1];
          block(2 * k + j, a, b);
        }
      }
    }
  }
}

}  // namespace tl
