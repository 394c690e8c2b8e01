// A whole decode step in one cooperative launch: all layers and the head, for 1 to 8 sequences.
//
//   for each layer:  qkv = Wqkv norm(x);  o = attention(qkv), RoPE and cache write included;  x += Wproj o;
//                    x += Wdown swiglu([Wgate; Wup] norm(x))
//   logits = Whead norm(x)
//
// Why: at batch 1 a layer's five kernels read 88 MB in 20 us (bf16, 4.3 TB/s), and each border between two of them costs
// 2 us in which memory rests, overlapped launches included. Here one block an SM stays, and its ring of copies
// (linear.cuh) goes on from matrix to matrix while blocks wait for each other at the five barriers of a layer: 192 KB an
// SM, 6 us of reading, are asked for ahead. What remains at the end of attention's split parts is put together by the
// next product (Input::weigh). Bytes: all weights once, the cache of the tokens so far once.
// Geometry: one block of 256 threads an SM; all must be on the card at once, hence cooperative.
// Reference: the model's forward pass over the whole sequence in fp32.
#pragma once
#include "attend.cuh"
#include "linear.cuh"

namespace tl {

// Chunks a warp has on the way: as many as fit beside the rest. Older cards have 99 to 163 KB a block.
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int kSplitTokens = 256;  // a block's share of a context before it is split (further): two tiles a warp
__host__ __device__ constexpr int step_stages(Format f, int head_size, bool hopper) {
  if (f == Format::plain) return !hopper ? 1 : head_size == 64 ? 3 : 2;
  return f == Format::int8 ? (hopper ? 5 : 2) : (hopper ? 8 : 4);
}

// Barrier over all blocks, in two halves, so that what needs no other block can be done in between.
struct GridBarrier {
  unsigned* arrived;  // zero at first; and a second word
  unsigned goal = 0;

  __device__ void arrive() {
    __syncthreads();
    goal += gridDim.x;
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
  }
  __device__ void wait() const {
    if (threadIdx.x == 0) {
      unsigned now;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
      } while (now < goal);
    }
    __syncthreads();
  }
  // The last block to leave makes both words zero again.
  __device__ void leave() {
    if (threadIdx.x == 0 && atomicInc(arrived + 1, gridDim.x - 1) == gridDim.x - 1) *arrived = 0;
  }
};

struct StepBuffers {  // of the workspace; 256 bytes for the barrier come first
  int64_t qkv, part, lse, act, bytes;
  __host__ __device__ explicit StepBuffers(const DecodeStep& p) {
    auto up = [](int64_t x) { return (x + 255) / 256 * 256; };
    qkv = 256;
    part = qkv + up(2ll * p.rows * (p.heads + 2 * p.groups) * p.head_size);
    lse = part + up(2ll * kDecodeRows * p.heads * p.head_size);
    act = lse + up(4ll * kDecodeRows * p.heads);
    bytes = act + up(2ll * p.rows * p.mlp_width);
  }
};

// Each split's share of a row's attention, 2^(lse - max) / sum. (rows, splits, H), splits a power of two up to 8.
__device__ inline void share_of_splits(const float* lse, float* weights, int rows, int splits, int heads) {
  const int split = threadIdx.x & splits - 1, bits = __popc(splits - 1);
  for (int row = 0; row < rows; ++row) {
    for (int first = 0; first < heads << bits; first += THREADS) {  // all threads: the shuffles need them
      const int head = first + threadIdx.x >> bits, at = ((row << bits) + split) * heads + head;
      const float own = head < heads ? __ldcg(lse + at) : -INFINITY;
      float largest = own;
      for (int step = 1; step < splits; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      const float weight = largest == -INFINITY ? 0.f : exp2f(own - largest);
      float sum = weight;
      for (int step = 1; step < splits; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (head < heads) weights[at] = sum > 0.f ? __fdividef(weight, sum) : 0.f;
    }
  }
  __syncthreads();
}

template <int D>
union StepShared {
  Scratch<WARPS> scratch;
  AttendShared<D, WARPS> attend;
};

// A layer's attention, by the first blocks; waits for qkv.
template <class T, bool INT8, int D>
__device__ __forceinline__ void attention(const DecodeStep& p, const DecodeLayer& layer, int splits,
                                       AttendShared<D, WARPS>& shared, const GridBarrier& barrier) {
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  const StepBuffers at(p);
  auto* part = reinterpret_cast<T*>(workspace + at.part);
  auto* lse = reinterpret_cast<float*>(workspace + at.lse);
  PagedAttention a = {};
  a.heads = p.heads, a.groups = p.groups, a.head_size = D, a.scale = p.scale;
  a.qkv = workspace + at.qkv, a.positions = p.positions, a.append = true, a.rotary = p.rotary;
  KvCache cache = p.cache;
  cache.k = layer.k, cache.v = layer.v, cache.k_scale = layer.k_scale, cache.v_scale = layer.v_scale;
  const int parts = (p.heads / p.groups + 7) / 8, items = p.rows * splits * p.groups * parts;
  bool waited = false;
  auto wait = [&] {
    if (!waited) barrier.wait();
    waited = true;
  };
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int head = item % (p.groups * parts), slot = item / (p.groups * parts), row = slot / splits;
    if (p.positions[row] < 0) continue;
    int first, last;
    split_range(p.positions[row] + 1, splits, slot % splits, first, last);
    attend<T, INT8, D, WARPS, false>(a, cache, shared, row, head / parts, head % parts, first, last,
                                     part + (int64_t)slot * p.heads * D, lse + slot * p.heads, wait);
    __syncthreads();  // `shared` is free again
  }
  wait();
}

template <class T, Format F, bool INT8, int D>
__global__ void __launch_bounds__(THREADS, 1) step_kernel(const __grid_constant__ DecodeStep p) {
  constexpr int STAGES = step_stages(F, D, kHopper);
  using Ring = Stream<F, STAGES, WARPS>;
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<StepShared<D>*>(memory + WARPS * Ring::BYTES);
  auto* matrices = reinterpret_cast<Matrix*>(&shared + 1);  // 4 a layer, then the head
  auto* weights = reinterpret_cast<float*>(matrices + 4 * p.layers + 1);  // of attention's splits
  const int qkv_rows = (p.heads + 2 * p.groups) * D, attention_width = p.heads * D;
  const int count = 4 * p.layers + (p.head ? 1 : 0);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int rows[5] = {qkv_rows, p.width, 2 * p.mlp_width, p.width, p.vocab};
    const int columns[5] = {p.width, attention_width, p.width, p.mlp_width, p.width};
    const int layer = i / 4, kind = layer == p.layers ? 4 : i % 4;
    const DecodeLayer& l = p.layer[min(layer, p.layers - 1)];
    const void* w = kind == 0 ? l.qkv : kind == 1 ? l.proj : kind == 2 ? l.gate_up : kind == 3 ? l.mlp_proj : p.head;
    int64_t dealt = 0;
    for (int k = 0; k < 4; ++k) dealt += (rows[k] + SLOTS - 1) / SLOTS * (layer + (k < kind));
    matrices[i] = {static_cast<const uint8_t*>(w), rows[kind], columns[kind], kind == 2 ? p.mlp_width : 8, static_cast<int>(dealt % gridDim.x)};
  }
  __syncthreads();
  Ring stream;
  stream.start(matrices, count, p.group, memory);

  auto* workspace = static_cast<uint8_t*>(p.workspace);
  const StepBuffers at(p);
  auto* x = static_cast<T*>(p.x);
  auto *qkv = reinterpret_cast<T*>(workspace + at.qkv), *part = reinterpret_cast<T*>(workspace + at.part);
  auto *lse = reinterpret_cast<float*>(workspace + at.lse);
  auto* act = reinterpret_cast<T*>(workspace + at.act);
  GridBarrier barrier{reinterpret_cast<unsigned*>(workspace)};
  // Long contexts are split, into as many parts as there are vectors left in a product.
  int longest = 0, splits = 1;
  for (int row = 0; row < p.rows; ++row) longest = max(longest, p.positions[row] + 1);
  while (2 * splits * p.rows <= kDecodeRows && longest > kSplitTokens * splits) splits *= 2;

  for (int i = 0; i < count; ++i) {
    const int kind = i == 4 * p.layers ? 4 : i % 4;
    const DecodeLayer& layer = p.layer[min(i / 4, p.layers - 1)];
    Input<T> input{x, nullptr, p.rows, p.width, p.eps};
    Output<T> output{Store::add, p.rows, x, p.width};
    if (kind == 0) {
      input.norm = static_cast<const T*>(layer.norm_1);
      output = Output<T>{Store::plain, p.rows, qkv, qkv_rows};
    } else if (kind == 1) {
      input = Input<T>{part, nullptr, p.rows * splits, attention_width, 0.f, splits > 1 ? weights : nullptr, D == 64 ? 6 : 7};
      output.splits = splits;
    } else if (kind == 2) {
      input.norm = static_cast<const T*>(layer.norm_2);
      output = Output<T>{Store::swiglu, p.rows, act, p.mlp_width};
    } else if (kind == 3) {
      input = Input<T>{act, nullptr, p.rows, p.mlp_width};
    } else {
      input.norm = static_cast<const T*>(p.norm);
      output = Output<T>{Store::fp32, p.rows, p.logits, p.logits_stride};
    }
    // The norm's weights into L2 while others are waited for.
    for (int c = threadIdx.x * 64; input.norm && c < p.width; c += THREADS * 64) prefetch_l2(input.norm + c);
    if (kind == 1) {
      attention<T, INT8, D>(p, layer, splits, shared.attend, barrier);
      barrier.arrive();
    }
    if (i > 0) barrier.wait();
    if (kind == 1 && splits > 1) share_of_splits(lse, weights, p.rows, splits, p.heads);
    linear<T>(matrices[i], input, output, stream, shared.scratch);
    if (i + 1 < count) barrier.arrive();
  }
  barrier.leave();
}

template <class T, Format F, bool INT8, int D>
cudaError_t launch_step(const DecodeStep& p, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  if (auto error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  const int ring = WARPS * (major >= 9 ? Stream<F, step_stages(F, D, true), WARPS>::BYTES : Stream<F, step_stages(F, D, false), WARPS>::BYTES);
  const int shared = ring + sizeof(StepShared<D>) + (4 * p.layers + 1) * sizeof(Matrix) +
                     kDecodeRows * p.heads * sizeof(float);
  return launch(step_kernel<T, F, INT8, D>, dim3(multiprocessors()), THREADS, shared, false, true, stream, p);
}

template <Format F>
cudaError_t decode_step_of(const DecodeStep& p, cudaStream_t stream) {
#ifdef TL_QUICK
  return launch_step<__nv_bfloat16, F, false, 64>(p, stream);
#else
  auto by_size = [&](auto zero) {
    using T = decltype(zero);
    if (p.head_size == 64) {
      return p.int8_cache ? launch_step<T, F, true, 64>(p, stream) : launch_step<T, F, false, 64>(p, stream);
    }
    return p.int8_cache ? launch_step<T, F, true, 128>(p, stream) : launch_step<T, F, false, 128>(p, stream);
  };
  return p.type == Type::bf16 ? by_size(__nv_bfloat16{}) : by_size(__half{});
#endif
}

// One a file, so that they compile side by side.
cudaError_t decode_step_plain(const DecodeStep& p, cudaStream_t stream);
cudaError_t decode_step_int8(const DecodeStep& p, cudaStream_t stream);
cudaError_t decode_step_int4(const DecodeStep& p, cudaStream_t stream);

}  // namespace tl
