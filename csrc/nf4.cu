// NF4 weights back to fp32, bf16 or fp16, for a product of many rows. src/quant/nf4.rs has the format.
//
//   y[i] = TABLE[code[i]] * s[i / 64],   code[i] 4 bits: the high half of byte i / 2 where i is even, else the low half
//   s[b] = absmax[b],   or of two levels   map[absmax_code[b]] * nested_absmax[b / 256] + nested_offset
//
// each operation one rounding of fp32, and the product one more to y's type: the bits of the ATen reference.
//
// Shapes: n values in memory order of the matrix, any n; codes (ceil(n / 2),), scales (ceil(n / 64),).
//
// Geometry: a thread makes the 16 bytes of y that it stores, 8 values (fp32: 4), of the 4 bytes (2) that hold their
// codes, so that a warp reads and writes whole lines; all of a vector's values have one scale, which neighbouring
// threads share through L1. It does so kVectors times, a block apart, with all codes and scales on their way before the
// first is used. The 16 table values lie in 16 banks of shared memory: no two lanes of a warp wait for each other. (In
// constant memory lanes with different codes would go one by one.)
//
// Bytes a value: 1/2 read, 2 written (fp32: 4), 1/16 of scales, 1/64 where they are of two levels. Codes are read past
// the caches; y is left in them for the product that reads it next.
#include <type_traits>

#include "vector.cuh"

namespace tl {
namespace {

constexpr int kThreads = 256, kVectors = 4;
constexpr int kBlock = 64, kNestedBlock = 256;

__constant__ float kTable[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// Code i of a word: bytes in order, the high half of each first.
template <class Word>
__device__ int code_of(Word word, int i) {
  return word >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15;
}

template <bool Nested>
__device__ float scale_of(const Nf4Dequantize& p, int64_t block) {
  if constexpr (Nested) {
    const float value = __ldg(p.nested_map + __ldg(static_cast<const uint8_t*>(p.absmax) + block));
    // Not a fused product and sum, which would round once.
    return __fadd_rn(__fmul_rn(value, __ldg(p.nested_absmax + block / kNestedBlock)), __ldg(p.nested_offset));
  } else {
    return __ldg(static_cast<const float*>(p.absmax) + block);
  }
}

template <class T, bool Nested>
__global__ void __launch_bounds__(kThreads) nf4_kernel(const Nf4Dequantize p) {
  constexpr int N = Vector<T>::N;
  using Word = std::conditional_t<N == 8, uint32_t, uint16_t>;  // N codes
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = kTable[threadIdx.x];
  __syncthreads();

  const int64_t whole = p.n / N;  // vectors
  const int64_t first = int64_t{blockIdx.x} * kThreads * kVectors + threadIdx.x;
  const auto* words = static_cast<const Word*>(p.codes);
  auto* y = static_cast<T*>(p.y);
  Word word[kVectors];
  float scale[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + v * kThreads;
    if (at >= whole) break;
    word[v] = __ldcs(words + at);
    scale[v] = scale_of<Nested>(p, at * N / kBlock);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = first + v * kThreads;
    if (at >= whole) break;
    float x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(table[code_of(word[v], i)], scale[v]);
    Vector<T>::pack(x).store(y + at * N);
  }

  // The values behind the last whole vector, fewer than N, by the first thread.
  if (first == 0) {
    for (int64_t i = whole * N; i < p.n; ++i) {
      const int code = static_cast<const uint8_t*>(p.codes)[i / 2] >> (i % 2 ? 0 : 4) & 15;
      y[i] = from_float<T>(__fmul_rn(table[code], scale_of<Nested>(p, i / kBlock)));
    }
  }
}

template <class T>
cudaError_t launch(const Nf4Dequantize& p, cudaStream_t stream) {
  const int64_t a_block = int64_t{kThreads} * kVectors * Vector<T>::N;
  const auto grid = static_cast<unsigned>((p.n + a_block - 1) / a_block);
  const auto kernel = p.nested_map ? nf4_kernel<T, true> : nf4_kernel<T, false>;
  kernel<<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t nf4_dequantize(const Nf4Dequantize& p, cudaStream_t stream) {
  return TL_DISPATCH(p.type, T, launch<T>(p, stream));
}

}  // namespace tl
