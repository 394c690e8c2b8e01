// Casts to fp8 (e4m3) with one scale a tensor, the transposed copies that fp8 matrix products need, and the scales.
//
//   q = e4m3(x scale), saturating at 448;  x ~ q inverse
//   scale = 448 / (2 largest),  largest = max(0.95 largest, amax of the last micro-step)      (delayed scaling)
//
// cuBLASLt multiplies fp8 matrices only where both are contiguous along the summed dimension, so a matrix that takes
// part in a forward and a backward product is needed in both orientations. One pass makes both: a block casts a tile of
// 128 x 128, writes it, keeps it in shared memory and writes the transposed tile in pieces of 16 rows a thread.
// The values come from one of three sources, so that they never exist in 16 bits in memory:
//   plain   a bf16 matrix
//   norm    s rstd w, the output of RMSNorm computed again from what it normalised
//   act     silu(gate) up, of a projection [gate | up]
// The backward pass of SwiGLU has a kernel of its own with three tiles: dgate, dup and act.
// Tiles of 64 x 64 would write pieces of 64 bytes; a Triton version with them was 2.4 times slower.
// Rows and columns are multiples of 16. Bytes a value: plain 2 read, 1 written for each orientation.
// Reference: `fp8_reference` in src/ops/fp8.rs.
#include "fp8.cuh"

namespace tl {
namespace {

using bf16 = __nv_bfloat16;
using V = Vector<bf16>;
constexpr int TILE = 128, THREADS = 256, PASS = THREADS / 16, PASSES = TILE / PASS;

// fp8 of 128 x 128 values. The words of a row are turned by 4 (row / 16): column reads of 16 rows then meet all banks.
struct Tile {
  uint32_t word[TILE][TILE / 4];

  __device__ void put(int row, int column, uint2 values) {
    *reinterpret_cast<uint2*>(&word[row][(column / 4 + 4 * (row / 16)) & 31]) = values;
  }

  // out (columns, rows): 16 rows of four columns a thread.
  __device__ void write_transposed(uint8_t* out, int64_t rows, int columns, int64_t row0, int column0) const {
    const int piece = threadIdx.x % 8, group = threadIdx.x / 8;
    const int64_t row = row0 + 16 * piece;
    if (row >= rows || column0 + 4 * group >= columns) return;
    uint32_t out4[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint32_t in[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) in[i] = word[16 * piece + 4 * q + i][(group + 4 * piece) & 31];
      const uint32_t low_ab = __byte_perm(in[0], in[1], 0x5140), high_ab = __byte_perm(in[0], in[1], 0x7362);
      const uint32_t low_cd = __byte_perm(in[2], in[3], 0x5140), high_cd = __byte_perm(in[2], in[3], 0x7362);
      out4[0][q] = __byte_perm(low_ab, low_cd, 0x5410);
      out4[1][q] = __byte_perm(low_ab, low_cd, 0x7632);
      out4[2][q] = __byte_perm(high_ab, high_cd, 0x5410);
      out4[3][q] = __byte_perm(high_ab, high_cd, 0x7632);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      *reinterpret_cast<uint4*>(out + (column0 + 4 * group + j) * rows + row) =
          make_uint4(out4[j][0], out4[j][1], out4[j][2], out4[j][3]);
  }
};

// The largest of the block's values, noted in the slot.
__device__ void note_largest(float largest, Fp8Slot* slot, float* scratch) {
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < THREADS / 32; ++i) largest = fmaxf(largest, scratch[i]);
  note(largest, slot);
}

__device__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

template <Fp8Source SOURCE, bool ROWS, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS) cast_kernel(const Fp8Cast p) {
  __shared__ Tile tile;
  __shared__ float scratch[THREADS / 32];
  const int64_t row0 = blockIdx.y * (int64_t)TILE;
  const int column0 = blockIdx.x * TILE, column = column0 + threadIdx.x % 16 * 8;
  const bool inside = column < p.columns;
  const float scale = p.slot->scale;
  const int stride = SOURCE == Fp8Source::act ? 2 * p.columns : p.columns;

  V v[PASSES], u[SOURCE == Fp8Source::act ? PASSES : 1];
#pragma unroll
  for (int i = 0; i < PASSES; ++i) {
    const int64_t row = row0 + i * PASS + threadIdx.x / 16;
    if (row >= p.rows || !inside) continue;
    const bf16* from = static_cast<const bf16*>(p.x) + row * stride + column;
    v[i] = V::load_streaming(from);
    if (SOURCE == Fp8Source::act) u[i] = V::load_streaming(from + p.columns);
  }
  float w[8];
  if (SOURCE == Fp8Source::norm && inside) V::load(static_cast<const bf16*>(p.weight) + column).unpack(w);

  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < PASSES; ++i) {
    const int local = i * PASS + threadIdx.x / 16;
    const int64_t row = row0 + local;
    if (row >= p.rows || !inside) continue;
    float x[8];
    v[i].unpack(x);
    if (SOURCE == Fp8Source::norm) {
      const float rstd = p.rstd[row];
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] *= rstd * w[k];
    }
    if (SOURCE == Fp8Source::act) {
      float up[8];
      u[i].unpack(up);
#pragma unroll
      for (int k = 0; k < 8; ++k) x[k] = x[k] * sigmoid(x[k]) * up[k];
    }
    update_largest(largest, x);
    const uint2 q = to_fp8(x, scale);
    if (ROWS) *reinterpret_cast<uint2*>(p.out + row * p.columns + column) = q;
    if (TRANSPOSED) tile.put(local, threadIdx.x % 16 * 8, q);
  }
  if (p.note) note_largest(largest, p.slot, scratch);
  if (TRANSPOSED) {
    __syncthreads();
    tile.write_transposed(p.out_t, p.rows, p.columns, row0, column0);
  }
}

// [dgate | dup] in both orientations and act transposed.
__global__ void __launch_bounds__(THREADS) swiglu_backward_kernel(const Fp8SwiGluBackward p) {
  extern __shared__ Tile tiles[];  // dgate, dup, act
  __shared__ float scratch[THREADS / 32];
  const int64_t row0 = blockIdx.y * (int64_t)TILE;
  const int column0 = blockIdx.x * TILE, column = column0 + threadIdx.x % 16 * 8;
  const float scale = p.slot->scale, act_scale = p.act_slot->scale;
  float largest = 0.f;
  constexpr int AT_ONCE = 2;
  if (column < p.width) {
    for (int first = 0; first < PASSES; first += AT_ONCE) {
      V gate[AT_ONCE], up[AT_ONCE], dact[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int64_t row = row0 + (first + i) * PASS + threadIdx.x / 16;
        if (row >= p.rows) continue;
        const bf16* from = static_cast<const bf16*>(p.gate_up) + row * 2 * p.width + column;
        gate[i] = V::load_streaming(from);
        up[i] = V::load_streaming(from + p.width);
        dact[i] = V::load_streaming(static_cast<const bf16*>(p.dact) + row * p.width + column);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int local = (first + i) * PASS + threadIdx.x / 16;
        const int64_t row = row0 + local;
        if (row >= p.rows) continue;
        float g[8], x[8], d[8], act[8];
        gate[i].unpack(g);
        up[i].unpack(x);
        dact[i].unpack(d);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const float s = sigmoid(g[k]), silu = g[k] * s;
          act[k] = silu * x[k];
          g[k] = d[k] * x[k] * (s + silu * (1.f - s));
          x[k] = d[k] * silu;
        }
        update_largest(largest, g);
        update_largest(largest, x);
        const uint2 dgate = to_fp8(g, scale), dup = to_fp8(x, scale);
        uint8_t* to = p.dgate_up + row * 2 * p.width + column;
        *reinterpret_cast<uint2*>(to) = dgate;
        *reinterpret_cast<uint2*>(to + p.width) = dup;
        tiles[0].put(local, threadIdx.x % 16 * 8, dgate);
        tiles[1].put(local, threadIdx.x % 16 * 8, dup);
        tiles[2].put(local, threadIdx.x % 16 * 8, to_fp8(act, act_scale));
      }
    }
  }
  note_largest(largest, p.slot, scratch);  // a barrier for all
  tiles[0].write_transposed(p.dgate_up_t, p.rows, p.width, row0, column0);
  tiles[1].write_transposed(p.dgate_up_t + p.width * p.rows, p.rows, p.width, row0, column0);
  tiles[2].write_transposed(p.act_t, p.rows, p.width, row0, column0);
}

__global__ void update_kernel(Fp8Slot* slots, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  Fp8Slot& s = slots[i];
  const float amax = s.amax;
  s.amax = 0.f;
  if (amax == 0.f) return;  // not used since
  s.last = amax;
  if (!(amax * s.scale <= 448.f)) s.overflows += 1.f;
  if (isfinite(amax)) s.largest = fmaxf(0.95f * s.largest, amax);
  s.scale = 448.f / (2.f * fmaxf(s.largest, 1e-30f));
  s.inverse = 1.f / s.scale;
}

template <Fp8Source SOURCE>
cudaError_t launch(const Fp8Cast& p, cudaStream_t stream) {
  const dim3 grid((p.columns + TILE - 1) / TILE, (p.rows + TILE - 1) / TILE);
  if (p.out && p.out_t) cast_kernel<SOURCE, true, true><<<grid, THREADS, 0, stream>>>(p);
  else if (p.out) cast_kernel<SOURCE, true, false><<<grid, THREADS, 0, stream>>>(p);
  else cast_kernel<SOURCE, false, true><<<grid, THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t fp8_cast(const Fp8Cast& p, cudaStream_t stream) {
  switch (p.source) {
    case Fp8Source::plain: return launch<Fp8Source::plain>(p, stream);
    case Fp8Source::norm: return launch<Fp8Source::norm>(p, stream);
    default: return launch<Fp8Source::act>(p, stream);
  }
}

cudaError_t fp8_swiglu_backward(const Fp8SwiGluBackward& p, cudaStream_t stream) {
  constexpr int bytes = 3 * sizeof(Tile);
  const cudaError_t code =
      cudaFuncSetAttribute(swiglu_backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code) return code;
  const dim3 grid((p.width + TILE - 1) / TILE, (p.rows + TILE - 1) / TILE);
  swiglu_backward_kernel<<<grid, THREADS, bytes, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t fp8_update(Fp8Slot* slots, int count, cudaStream_t stream) {
  update_kernel<<<(count + 127) / 128, 128, 0, stream>>>(slots, count);
  return cudaGetLastError();
}

}  // namespace tl
