// AdamW with gradient clipping, the refresh of the bf16 weights that the model computes with and, where asked for, the
// clearing of the gradient in one pass over all tensors; and the global gradient norm, on the device.
//
//   g' = g clip
//   m  = b1 m + (1 - b1) g'
//   v  = b2 v + (1 - b2) g'^2
//   p  = p (1 - lr wd) - lr/(1 - b1^s) * m / (sqrt(v) / sqrt(1 - b2^s) + eps)
//   w  = bf16(p)                                 (where there are bf16 weights)
//   g  = 0                                       (where asked for: see gradients.h for where it is not needed)
//
// clip is one fp32 on the device; where it is not finite nothing is written, and the norm can keep it so: the CPU reads
// a norm a step late, when the next step has overwritten the gradients. Tensors are flat; a launch carries
// up to LIST of them in its parameters, so no table is copied. A block updates 1,024 elements, a thread one
// 16-byte vector of each fp32 array: blocks that stay on the chip and take several chunks were 10 % slower.
//
// p, m and v are fp32 while they are computed with. How they are kept, and bytes an element to read and write:
//
//   master fp32    p; w = p to the nearest                                  4 + 4, and 2 for w
//          split   w, and low = the 16 bits of p that it lacks              4 + 4
//          bf16    w = p rounded stochastically                             2 + 2
//   state  fp32    m, v                                                     8 + 8
//          bf16    m, v rounded stochastically                              4 + 4
//          int8    m = s sign(q) (q / 127)^2 and v = s (q / 255)^4,         2 + 2, and 16 / 256 for s
//                  codes q drawn from the two nearest, s = the largest
//                  magnitude of 256 elements that lie together
//   gradient       g                                                        4, and 4 for clearing it
//
// fp32 and fp32: 30 bytes, 34 with the clearing; at 3.0 TB/s, 1.1e9 elements in 11.0 and 12.5 ms. split and int8:
// 16 and 20; bf16 and int8: 12 and 16. With int8 the largest magnitude is found while m and v are in registers, so
// that this too is one pass: 256 elements are two warps' own. The powers spread the codes towards small values;
// that no v above 0 becomes 0, and why rounding is stochastic: see the reference.
// Why here: torch's fused AdamW neither refreshes a bf16 copy nor skips the step by a number on the device.
// Source of block-wise 8-bit moments: arXiv 2110.02861 (there a table of 256 values, rounded to the nearest).
// Reference: `AdamW::step_reference` in src/train/optimizer.rs and src/train/optimizer/low_memory.rs, whose
// formats these are bit for bit; torch.optim.AdamW.
#include "vector.cuh"

namespace tl {
namespace {

constexpr int THREADS = 256, LIST = 256;
constexpr int UPDATE_CHUNK = 4 * THREADS;        // elements a block of adamw
constexpr int NORM_CHUNK = 4 * 8 * THREADS;      // elements a block of the norm takes at a time

// Tensors and, for each, the number of chunks of all before it.
template <class Entry>
struct List {
  int count, chunk_size;
  int64_t chunks;
  int64_t first[LIST];
  Entry entry[LIST];

  __device__ int find(int64_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= chunk) low = middle; else high = middle - 1;
    }
    return low;
  }
};

template <class Entry>
List<Entry> make_list(const Entry* entries, int count, int chunk_size) {
  List<Entry> list{};
  list.chunk_size = chunk_size;
  for (list.count = 0; list.count < count && list.count < LIST; ++list.count) {
    list.first[list.count] = list.chunks;
    list.entry[list.count] = entries[list.count];
    list.chunks += (entries[list.count].n + chunk_size - 1) / chunk_size;
  }
  return list;
}

// ---- formats -------------------------------------------------------------------------------------------

// fp32 -> bf16 to the nearest, halves away from zero, as 16 bits. Not to even, which is what cvt.rn does: 65,537 fp32
// values go to an even bf16 value then, and `split` could not tell them apart with 16 bits more.
__device__ uint32_t nearest_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits >> 16 | (isnan(x) ? 0x40u : 0u);  // nan stays nan
  return (bits + 0x8000u) >> 16;
}

// Up with the probability that the 16 bits below say; noise in [0, 65536).
__device__ uint32_t stochastic_bf16(float x, uint32_t noise) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? nearest_bf16(x) : (bits + noise) >> 16;
}

__device__ float from_bf16(uint16_t w) { return __uint_as_float(static_cast<uint32_t>(w) << 16); }

// Undoes w = nearest_bf16(x), low = the low half of x: a negative low says that w was rounded up.
__device__ float join(uint16_t w, int16_t low) {
  return __uint_as_float((static_cast<uint32_t>(w) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}

constexpr double SIGNED_TOP = 127. * 127., UNSIGNED_TOP = 255. * 255. * 255. * 255.;

__device__ float inverse(float scale, double top) { return scale > 1e-28f ? static_cast<float>(top) / scale : 0.f; }
__device__ float uniform(uint32_t noise) { return (static_cast<float>(noise) + 0.5f) * (1.f / 65536.f); }

// x -> sign(x) q with |x| between s (q / 127)^2 and its neighbour; inverse = 127^2 / s.
__device__ int encode_signed(float x, float inverse, float u) {
  const float y = fabsf(x) * inverse;
  float q = fminf(floorf(sqrtf(y)), 126.f);
  if (u * (2.f * q + 1.f) < y - q * q) q += 1.f;
  return x < 0.f ? -static_cast<int>(q) : static_cast<int>(q);
}
__device__ float decode_signed(int code, float unit) { return static_cast<float>(code * abs(code)) * unit; }

// The same of x >= 0 and s (q / 255)^4; inverse = 255^4 / s. Not 0 where x is not.
__device__ uint32_t encode_unsigned(float x, float inverse, float u) {
  const float z = sqrtf(x * inverse);
  const float q = fminf(floorf(sqrtf(z)), 254.f), q2 = q * q;
  const float step = (2.f * q + 1.f) * (2.f * q2 + (2.f * q + 1.f));  // (q + 1)^4 - q^4
  const bool up = u * step < (z - q2) * (z + q2);
  const float code = up ? q + 1.f : q;
  return static_cast<uint32_t>(z > 0.f ? fmaxf(code, 1.f) : code);
}
__device__ float decode_unsigned(uint32_t code, float unit) {
  const float q2 = static_cast<float>(code * code);
  return q2 * q2 * unit;
}

// The finaliser of MurmurHash3.
__device__ uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// ---- the update ----------------------------------------------------------------------------------------

// Products and sums are fused where it says so and nowhere else, so that every format gives the same bits.
struct Update {
  AdamWConfig c;
  float clip;
  __device__ float operator()(float p, float g, float& m, float& v) const {
    g = __fmul_rn(g, clip);
    m = __fmaf_rn(c.beta1, m, __fmul_rn(1.0f - c.beta1, g));
    v = __fmaf_rn(c.beta2, v, __fmul_rn(__fmul_rn(1.0f - c.beta2, g), g));
    const float denominator = __fmaf_rn(sqrtf(v), c.inv_sqrt_bias2, c.eps);
    return __fmaf_rn(p, c.decay, -__fdiv_rn(__fmul_rn(c.step_size, m), denominator));
  }
};

// The four elements of a thread.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Stores of four at once. In assembly: nvcc makes one store a member of an assignment to a float4 or uint2.
__device__ void store_vector(float* p, const Four<float>& f) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(f.x[0]), "f"(f.x[1]),
               "f"(f.x[2]), "f"(f.x[3])
               : "memory");
}
template <class T>
__device__ void store_vector(T* p, const Four<T>& f) {
  constexpr uint32_t BITS = 8 * sizeof(T), MASK = (1u << BITS) - 1;
  auto pair = [&](int e) {
    return (static_cast<uint32_t>(f.x[e]) & MASK) | (static_cast<uint32_t>(f.x[e + 1]) & MASK) << BITS;
  };
  if constexpr (BITS == 16)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(pair(0)), "r"(pair(2))
                 : "memory");
  else
    *reinterpret_cast<uint32_t*>(p) = pair(0) | pair(2) << 16;
}

// WHOLE: all four exist; else those before n, and zeros.
template <bool WHOLE, class T>
__device__ Four<T> load4(const void* base, int64_t i, int64_t n) {
  const T* t = static_cast<const T*>(base) + i;
  if constexpr (WHOLE) {
    return *reinterpret_cast<const Four<T>*>(t);
  } else {
    Four<T> four{};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (i + e < n) four.x[e] = t[e];
    return four;
  }
}

template <bool WHOLE, class T>
__device__ void store4(void* base, const Four<T>& four, int64_t i, int64_t n) {
  T* t = static_cast<T*>(base) + i;
  if constexpr (WHOLE) {
    store_vector(t, four);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (i + e < n) t[e] = four.x[e];
  }
}

// Largest m and v (>= 0) over the 64 threads whose elements share a scale. Called once by every thread.
__device__ float2 block_max(float m, float v) {
  static_assert(kStateBlock == 4 * 64, "two warps of four elements a thread");
  __shared__ uint2 scratch[THREADS / 32];
  // The bits of floats >= 0 are ordered as the floats are.
  const uint2 own = {__reduce_max_sync(~0u, __float_as_uint(m)), __reduce_max_sync(~0u, __float_as_uint(v))};
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) scratch[warp] = own;
  __syncthreads();
  const uint2 other = scratch[warp ^ 1];
  return {__uint_as_float(max(own.x, other.x)), __uint_as_float(max(own.y, other.y))};
}

// Elements i .. i + 3 of a tensor. Every thread of a block calls it, with the same WHOLE.
template <Master M, State S, bool WHOLE>
__device__ void update4(const AdamWTensor& t, int64_t i, const Update& update) {
  // Everything is asked for before anything is used.
  const Four<float> g = load4<WHOLE, float>(t.grad, i, t.n);
  Four<float> p, m, v;
  Four<uint16_t> w;
  Four<int16_t> low;
  Four<uint16_t> m16, v16;
  Four<int8_t> m8;
  Four<uint8_t> v8;
  float m_unit = 0.f, v_unit = 0.f;
  const int64_t block = i / kStateBlock;
  const bool any = WHOLE || i < t.n;
  if constexpr (M == Master::fp32) p = load4<WHOLE, float>(t.param, i, t.n);
  if constexpr (M != Master::fp32) w = load4<WHOLE, uint16_t>(t.weight, i, t.n);
  if constexpr (M == Master::split) low = load4<WHOLE, int16_t>(t.param, i, t.n);
  if constexpr (S == State::fp32) {
    m = load4<WHOLE, float>(t.exp_avg, i, t.n);
    v = load4<WHOLE, float>(t.exp_avg_sq, i, t.n);
  } else if constexpr (S == State::bf16) {
    m16 = load4<WHOLE, uint16_t>(t.exp_avg, i, t.n);
    v16 = load4<WHOLE, uint16_t>(t.exp_avg_sq, i, t.n);
  } else {
    m8 = load4<WHOLE, int8_t>(t.exp_avg, i, t.n);
    v8 = load4<WHOLE, uint8_t>(t.exp_avg_sq, i, t.n);
    if (any) {
      m_unit = t.exp_avg_scale[block] * static_cast<float>(1. / SIGNED_TOP);
      v_unit = t.exp_avg_sq_scale[block] * static_cast<float>(1. / UNSIGNED_TOP);
    }
  }

#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if constexpr (M == Master::split) p.x[e] = join(w.x[e], low.x[e]);
    if constexpr (M == Master::bf16) p.x[e] = from_bf16(w.x[e]);
    if constexpr (S == State::bf16) {
      m.x[e] = from_bf16(m16.x[e]);
      v.x[e] = from_bf16(v16.x[e]);
    }
    if constexpr (S == State::int8) {
      m.x[e] = decode_signed(m8.x[e], m_unit);
      v.x[e] = decode_unsigned(v8.x[e], v_unit);
    }
    p.x[e] = update(p.x[e], g.x[e], m.x[e], v.x[e]);
  }

  // What is kept, and the random bits for rounding to it.
  float m_inverse = 0.f, v_inverse = 0.f;
  if constexpr (S == State::int8) {
    float m_max = 0.f, v_max = 0.f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      m_max = fmaxf(m_max, fabsf(m.x[e]));
      v_max = fmaxf(v_max, v.x[e]);
    }
    const float2 scale = block_max(m_max, v_max);
    m_inverse = inverse(scale.x, SIGNED_TOP);
    v_inverse = inverse(scale.y, UNSIGNED_TOP);
    if (threadIdx.x % 64 == 0 && any) {
      t.exp_avg_scale[block] = scale.x;
      t.exp_avg_sq_scale[block] = scale.y;
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    uint32_t a = 0, b = 0;
    if constexpr (M == Master::bf16 || S != State::fp32) a = mix(static_cast<uint32_t>(i + e) ^ t.key[0]);
    if constexpr (S != State::fp32) b = mix(a + t.key[1]);
    w.x[e] = static_cast<uint16_t>(M == Master::bf16 ? stochastic_bf16(p.x[e], a >> 16) : nearest_bf16(p.x[e]));
    if constexpr (M == Master::split) low.x[e] = static_cast<int16_t>(__float_as_uint(p.x[e]));
    if constexpr (S == State::bf16) {
      m16.x[e] = static_cast<uint16_t>(stochastic_bf16(m.x[e], b >> 16));
      v16.x[e] = static_cast<uint16_t>(stochastic_bf16(v.x[e], b & 0xffffu));
    }
    if constexpr (S == State::int8) {
      m8.x[e] = static_cast<int8_t>(encode_signed(m.x[e], m_inverse, uniform(b >> 16)));
      v8.x[e] = static_cast<uint8_t>(encode_unsigned(v.x[e], v_inverse, uniform(b & 0xffffu)));
    }
  }

  if constexpr (M == Master::fp32) store4<WHOLE>(t.param, p, i, t.n);
  if constexpr (M == Master::split) store4<WHOLE>(t.param, low, i, t.n);
  if (t.weight) store4<WHOLE>(t.weight, w, i, t.n);
  if constexpr (S == State::fp32) {
    store4<WHOLE>(t.exp_avg, m, i, t.n);
    store4<WHOLE>(t.exp_avg_sq, v, i, t.n);
  } else if constexpr (S == State::bf16) {
    store4<WHOLE>(t.exp_avg, m16, i, t.n);
    store4<WHOLE>(t.exp_avg_sq, v16, i, t.n);
  } else {
    store4<WHOLE>(t.exp_avg, m8, i, t.n);
    store4<WHOLE>(t.exp_avg_sq, v8, i, t.n);
  }
  if (t.clear_grad) store4<WHOLE>(t.grad, Four<float>{}, i, t.n);
}

template <Master M, State S>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(const __grid_constant__ List<AdamWTensor> list, const float* __restrict__ clip, const AdamWConfig c) {
  const Update update{c, *clip};
  if (!isfinite(update.clip)) return;  // the host reads the same norm and stops the run
  const int which = list.find(blockIdx.x);
  const AdamWTensor& t = list.entry[which];
  const int64_t start = (blockIdx.x - list.first[which]) * UPDATE_CHUNK, i = start + 4 * threadIdx.x;
  if (start + UPDATE_CHUNK <= t.n)
    update4<M, S, true>(t, i, update);
  else
    update4<M, S, false>(t, i, update);
}

// Sum of squares over 256 threads, in thread 0.
__device__ float block_sum(float x) {
  __shared__ float scratch[THREADS / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(threadIdx.x < THREADS / 32 ? scratch[threadIdx.x] : 0.f);
}

template <class T>
__device__ float squares(const T* x, int64_t start, int64_t end) {
  using V = Vector<T>;
  constexpr int U = 4;  // vectors in flight
  float sum = 0.f;
  for (int64_t base = start + V::N * threadIdx.x; base < end; base += U * V::N * THREADS) {
    V v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = base + u * V::N * THREADS;
      if (i + V::N <= end) v[u] = V::load_streaming(x + i);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = base + u * V::N * THREADS;
      if (i + V::N <= end) {
        float y[V::N];
        v[u].unpack(y);
#pragma unroll
        for (int e = 0; e < V::N; ++e) sum += y[e] * y[e];
      } else {
        for (int64_t j = i; j < end; ++j) sum += to_float(x[j]) * to_float(x[j]);
      }
    }
  }
  return sum;
}

// blame: null, or a number for each tensor of the list, to be 1 where its squares are not finite; unless *stopped.
__global__ void __launch_bounds__(THREADS)
    squares_kernel(const __grid_constant__ List<NormTensor> list, float* partial, bool add, int* blame,
                   const int* stopped) {
  float sum = 0.f;
  for (int64_t chunk = blockIdx.x; chunk < list.chunks; chunk += gridDim.x) {
    const int which = list.find(chunk);
    const NormTensor& t = list.entry[which];
    const int64_t start = (chunk - list.first[which]) * NORM_CHUNK, end = min(start + NORM_CHUNK, t.n);
    float part;
    if (t.type == Type::fp32)
      part = squares(static_cast<const float*>(t.grad), start, end);
    else if (t.type == Type::bf16)
      part = squares(static_cast<const __nv_bfloat16*>(t.grad), start, end);
    else
      part = squares(static_cast<const __half*>(t.grad), start, end);
    if (!isfinite(part) && blame && !*stopped) blame[which] = 1;
    sum += part;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = add ? partial[blockIdx.x] + sum : sum;
}

__global__ void __launch_bounds__(THREADS)
    norm_kernel(const float* partial, float max_norm, float* norm, float* clip, int* stopped) {
  float sum = 0.f;
  for (int i = threadIdx.x; i < kNormBlocks; i += THREADS) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    const float x = sqrtf(sum);
    *norm = x;
    if (stopped && !isfinite(x)) *stopped = 1;
    // As torch's clip_grad_norm_; x * 0 carries inf and nan over.
    *clip = stopped && *stopped ? nanf("") : fminf(max_norm / (x + 1e-6f), 1.f) + x * 0.f;
  }
}

}  // namespace

using AdamWKernel = void (*)(List<AdamWTensor>, const float*, AdamWConfig);

template <Master M>
static AdamWKernel kernel_of(State state) {
  switch (state) {
    case State::bf16: return adamw_kernel<M, State::bf16>;
    case State::int8: return adamw_kernel<M, State::int8>;
    default: return adamw_kernel<M, State::fp32>;
  }
}

static AdamWKernel kernel_of(Master master, State state) {
  switch (master) {
    case Master::split: return kernel_of<Master::split>(state);
    case Master::bf16: return kernel_of<Master::bf16>(state);
    default: return kernel_of<Master::fp32>(state);
  }
}

cudaError_t adamw(const AdamWTensor* tensors, int count, Master master, State state, const float* clip, AdamWConfig c,
                  cudaStream_t stream) {
  const AdamWKernel kernel = kernel_of(master, state);
  for (int at = 0; at < count; at += LIST) {
    const auto list = make_list(tensors + at, count - at, UPDATE_CHUNK);
    if (list.chunks > 0) kernel<<<list.chunks, THREADS, 0, stream>>>(list, clip, c);
  }
  return cudaGetLastError();
}

cudaError_t grad_norm(const NormTensor* tensors, int count, float max_norm, float* partial, float* norm, float* clip,
                      int* watch, cudaStream_t stream) {
  int* stopped = watch ? watch + count : nullptr;
  for (int at = 0; at < count; at += LIST) {
    const auto list = make_list(tensors + at, count - at, NORM_CHUNK);
    squares_kernel<<<kNormBlocks, THREADS, 0, stream>>>(list, partial, at > 0, watch ? watch + at : nullptr, stopped);
  }
  norm_kernel<<<1, THREADS, 0, stream>>>(partial, max_norm, norm, clip, stopped);
  return cudaGetLastError();
}

}  // namespace tl
