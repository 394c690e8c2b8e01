// int8 and int4 weights back to bf16 (weights.cuh has the layouts), for products of many rows.
//
// A thread makes 8 neighbours of a row from the 4 or 8 bytes that hold them. Bytes a weight: its code, 2 written.
#include "weights.cuh"

namespace tl {
namespace {

template <Format F>
__global__ void __launch_bounds__(256) dequantize_kernel(const Dequantize p) {
  using C = Chunk<F>;
  const int row = blockIdx.y, column = (blockIdx.x * 256 + threadIdx.x) * 8;
  if (column >= p.columns) return;
  const int shift = __ffs(p.group / 32) - 1, g = row % 8, j = column % 128 / 32, t = column % 32 / 8;
  const int64_t block = (int64_t)(row / 8) * ((p.columns + 127) / 128) + column / 128;
  const auto* codes = static_cast<const uint8_t*>(p.weight) + block * C::block_bytes(shift);
  const uint8_t* scale = codes + C::CODES + ((4 * g >> shift) + (j >> shift)) * C::SCALE;
  float q[8];
  if constexpr (F == Format::int4) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(codes)[16 * g + 4 * t + j];
    const float2 s = __half22float2(*reinterpret_cast<const __half2*>(scale));
#pragma unroll
    for (int e = 0; e < 8; ++e) q[e] = s.x * (word >> 4 * (e / 2 + e % 2 * 4) & 15) + s.y;
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(codes + 512 * (j / 2) + 64 * g + 16 * t + 8 * (j % 2));
    const float s = __half2float(*reinterpret_cast<const __half*>(scale));
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int byte = e % 4 == 1 ? 2 : e % 4 == 2 ? 1 : e % 4;  // e = 0 2 1 3
      q[e] = s * static_cast<int8_t>((e < 4 ? words.x : words.y) >> 8 * byte);
    }
  }
  Vector<bf16>::pack(q).store(static_cast<bf16*>(p.y) + (int64_t)row * p.columns + column);
}

}  // namespace

cudaError_t dequantize(const Dequantize& p, cudaStream_t stream) {
  if (p.columns % 8 || p.format == Format::plain) return cudaErrorInvalidValue;
  constexpr int MOST = 65528;  // rows a launch: the grid's limit, whole blocks
  const int shift = p.group == 32 ? 0 : p.group == 64 ? 1 : 2;
  const bool int4 = p.format == Format::int4;
  const int64_t row_of_blocks =
      (p.columns + 127) / 128 *
      (int4 ? Chunk<Format::int4>::block_bytes(shift) : Chunk<Format::int8>::block_bytes(shift));
  for (int from = 0; from < p.rows; from += MOST) {
    Dequantize part = p;
    part.rows = p.rows - from < MOST ? p.rows - from : MOST;
    part.weight = static_cast<const uint8_t*>(p.weight) + from / 8 * row_of_blocks;
    part.y = static_cast<uint8_t*>(p.y) + 2ll * from * p.columns;
    const dim3 grid((p.columns / 8 + 255) / 256, part.rows);
    const auto kernel = int4 ? dequantize_kernel<Format::int4> : dequantize_kernel<Format::int8>;
    kernel<<<grid, 256, 0, stream>>>(part);
  }
  return cudaGetLastError();
}

}  // namespace tl
