// 16-byte vectors of fp32, bf16 or fp16, read into and written from fp32 registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace tl {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

// As many values as 16 bytes hold, still packed.
template <class T>
struct Vector {
  static constexpr int N = 16 / sizeof(T);
  uint4 bits;

  __device__ static Vector load(const T* p) { return {*reinterpret_cast<const uint4*>(p)}; }
  // For data that is read once: leaves the caches to others.
  __device__ static Vector load_streaming(const T* p) { return {__ldcs(reinterpret_cast<const uint4*>(p))}; }
  __device__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = bits; }

  __device__ void unpack(float (&x)[N]) const {
    const T* t = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(t[i]);
  }
  __device__ static Vector pack(const float (&x)[N]) {
    Vector v;
    T* t = reinterpret_cast<T*>(&v.bits);
#pragma unroll
    for (int i = 0; i < N; ++i) t[i] = from_float<T>(x[i]);
    return v;
  }
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Calls f<T>() with the element type that `type` names.
#define TL_DISPATCH(type, T, ...)                                 \
  [&] {                                                           \
    switch (type) {                                               \
      case Type::bf16: { using T = __nv_bfloat16; return __VA_ARGS__; } \
      case Type::fp16: { using T = __half; return __VA_ARGS__; }  \
      default: { using T = float; return __VA_ARGS__; }           \
    }                                                             \
  }()

// Multiprocessors of the current device.
int multiprocessors();

}  // namespace tl
