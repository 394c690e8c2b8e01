// A whole decode step in one cooperative launch: all layers and the head, for 1 to 8 sequences.
//
//   for each layer:  qkv = Wqkv norm(x);  o = attention(qkv), RoPE and cache write included;  x += Wproj o;
//                    x += Wdown swiglu([Wgate; Wup] norm(x))
//   logits = Whead norm(x)
//
// Why: at batch 1 a layer's five kernels read 88 MB in 20 us (bf16, 4.3 TB/s), and each border between two of them
// costs 2 us in which memory rests, overlapped launches included. Here one block an SM stays, and its ring of copies
// (linear.cuh) goes on from matrix to matrix while blocks wait for each other at the five barriers of a layer: 192 KB
// an SM, 6 us of reading, are asked for ahead. What remains at the end of attention's split parts is put together by
// the next product (Input::weights). Bytes: all weights once, the cache of the tokens so far once. Geometry: one block
// of 256 threads an SM; all must be on the card at once, hence cooperative. Reference: the model's forward pass over
// the whole sequence in fp32.
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

// A copy of what does not change during a step and would be read from far in each layer.
constexpr int kTable = 256;
// One block's part of a layer's attention: a split of a row's tokens, for up to 8 query heads of a key-value head.
struct Item {
  int row, head, part, slot, first, last;  // slot: of the split; tiles [first, last)
};
struct StepConstants {
  Item item;  // this block's first
  int positions[kDecodeRows];
  int table[kTable];  // cache blocks of this block's part of attention, the first of them
};
struct LayerPointers {
  const void* norm[2];
  void *k, *v;
  float *k_scale, *v_scale;
};
constexpr int kStagedBytes = 12 * 1024;  // of a long input: Input::staged

template <int D>
struct StepShared {
  union {  // a barrier over all blocks lies between the two uses
    struct {
      Scratch<WARPS> scratch;
      uint8_t staged[kStagedBytes];
    };
    AttendShared<D, WARPS> attend;
  };
  StepConstants constants;
  alignas(16) float cos[kDecodeRows][D / 2];  // of the positions
  alignas(16) float sin[kDecodeRows][D / 2];
};

__device__ inline Item item_of(const DecodeStep& p, const StepConstants& constants, int splits, int item) {
  const int parts = (p.heads / p.groups + 7) / 8, heads = p.groups * parts;
  Item i;
  i.slot = item / heads, i.row = i.slot / splits, i.head = item % heads / parts, i.part = item % parts;
  split_range(constants.positions[i.row] + 1, splits, i.slot % splits, i.first, i.last);
  return i;
}
__device__ inline int item_count(const DecodeStep& p, int splits) {
  return p.rows * splits * p.groups * ((p.heads / p.groups + 7) / 8);
}
__device__ inline KvCache cache_of(const DecodeStep& p, const LayerPointers& layer) {
  KvCache c = p.cache;
  c.k = layer.k, c.v = layer.v, c.k_scale = layer.k_scale, c.v_scale = layer.v_scale;
  return c;
}
// With the part of the block table that is in shared memory, where it is all that the item needs.
__device__ inline void use_table(KvCache& c, const Item& i, const StepConstants& constants) {
  const int per_block = c.block_size >> 4, from = per_block ? i.first >> __ffs(per_block) - 1 : 0;
  if (per_block && i.last - i.first <= kTable - per_block) c.table = constants.table - (i.row * c.max_blocks + from);
}

// A layer's attention, by the first blocks; waits for qkv.
template <class T, bool INT8, int D>
__device__ __forceinline__ void attention(const DecodeStep& p, const LayerPointers& layer, int splits,
                                          StepShared<D>& shared, const GridBarrier& barrier) {
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  const StepBuffers at(p);
  auto* part = reinterpret_cast<T*>(workspace + at.part);
  auto* lse = splits > 1 ? reinterpret_cast<float*>(workspace + at.lse) : nullptr;
  PagedAttention a = {};
  a.heads = p.heads, a.groups = p.groups, a.scale = p.scale, a.qkv = workspace + at.qkv, a.append = true,
  a.rotary.n = p.rotary.n;
  bool waited = false;
  auto wait = [&] {
    if (!waited) barrier.wait();
    waited = true;
  };
  for (int item = blockIdx.x; item < item_count(p, splits); item += gridDim.x) {
    const Item i = item == blockIdx.x ? shared.constants.item : item_of(p, shared.constants, splits, item);
    const int position = shared.constants.positions[i.row];
    if (position < 0) continue;
    KvCache cache = cache_of(p, layer);
    if (item == blockIdx.x) use_table(cache, i, shared.constants);
    attend<T, INT8, D, WARPS, false>(a, cache, shared.attend, i.row, position, shared.cos[i.row], shared.sin[i.row],
                                     i.head, i.part, i.first, i.last, part + (int64_t)i.slot * p.heads * D,
                                     lse ? lse + i.slot * p.heads : nullptr, wait);
    __syncthreads();  // `shared` is free again
  }
  wait();
}

// The cache that this block will read in a layer's attention, into L2.
template <bool INT8, int D>
__device__ inline void prefetch_cache(const DecodeStep& p, const LayerPointers& layer, int splits,
                                      const StepConstants& constants) {
  if (static_cast<int>(blockIdx.x) >= item_count(p, splits)) return;
  const Item i = constants.item;
  KvCache cache = cache_of(p, layer);
  use_table(cache, i, constants);
  for (int token = i.first * 16 + threadIdx.x; token < min(i.last * 16, constants.positions[i.row]); token += THREADS) {
    const int64_t bytes = cache_place(cache, i.row, token, i.head) * (INT8 ? 1 : 2);
#pragma unroll
    for (int at = 0; at < D * (INT8 ? 1 : 2); at += 128) {
      prefetch_l2(static_cast<const uint8_t*>(cache.k) + bytes + at);
      prefetch_l2(static_cast<const uint8_t*>(cache.v) + bytes + at);
    }
  }
}

// All matrices in the order in which they are used, 4 a layer and the head, and what else is read in every layer.
__device__ inline void gather_constants(const DecodeStep& p, int count, Matrix* matrices, LayerPointers* layers,
                                        StepConstants& c) {
  const int rows[5] = {(p.heads + 2 * p.groups) * p.head_size, p.width, 2 * p.mlp_width, p.width, p.vocab};
  const int columns[5] = {p.width, p.heads * p.head_size, p.width, p.mlp_width, p.width};
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int layer = i / 4, kind = layer == p.layers ? 4 : i % 4;
    const DecodeLayer& l = p.layer[min(layer, p.layers - 1)];
    const void* w = kind == 0 ? l.qkv : kind == 1 ? l.proj : kind == 2 ? l.gate_up : kind == 3 ? l.mlp_proj : p.head;
    int64_t dealt = 0;
    for (int k = 0; k < 4; ++k) dealt += (rows[k] + SLOTS - 1) / SLOTS * (layer + (k < kind));
    matrices[i] = {static_cast<const uint8_t*>(w), rows[kind], columns[kind], kind == 2 ? p.mlp_width : 8,
                   static_cast<int>(dealt % gridDim.x)};
  }
  for (int i = threadIdx.x; i < p.layers; i += THREADS) {
    const DecodeLayer& l = p.layer[i];
    layers[i] = {{l.norm_1, l.norm_2}, l.k, l.v, l.k_scale, l.v_scale};
  }
  if (threadIdx.x < p.rows) c.positions[threadIdx.x] = p.positions[threadIdx.x];
}
__device__ inline void gather_table(const DecodeStep& p, int splits, StepConstants& c) {
  if (static_cast<int>(blockIdx.x) >= item_count(p, splits)) return;
  const Item i = item_of(p, c, splits, blockIdx.x);
  if (threadIdx.x == 0) c.item = i;
  const int per_block = p.cache.block_size / 16, from = per_block ? i.first / per_block : 0;
  for (int b = threadIdx.x; b < kTable && from + b < p.cache.max_blocks; b += THREADS) {
    c.table[b] = p.cache.table[(int64_t)i.row * p.cache.max_blocks + from + b];
  }
}

template <class T, Format F, bool INT8, int D>
__global__ void __launch_bounds__(THREADS, 1) step_kernel(const __grid_constant__ DecodeStep p) {
  constexpr int STAGES = step_stages(F, D, kHopper);
  using Ring = Stream<F, STAGES, WARPS>;
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<StepShared<D>*>(memory + WARPS * Ring::BYTES);
  auto* layers = reinterpret_cast<LayerPointers*>(&shared + 1);
  auto* matrices = reinterpret_cast<Matrix*>(layers + p.layers);
  auto* weights = reinterpret_cast<float*>(matrices + 4 * p.layers + 1);  // of attention's splits
  const int count = 4 * p.layers + (p.head ? 1 : 0);
  gather_constants(p, count, matrices, layers, shared.constants);
  __syncthreads();
  Ring stream;
  stream.start(matrices, count, p.group, memory);

  // Long contexts are split, into as many parts as there are vectors left in a product.
  int longest = 0, splits = 1;
  for (int row = 0; row < p.rows; ++row) longest = max(longest, shared.constants.positions[row] + 1);
  while (2 * splits * p.rows <= kDecodeRows && longest > kSplitTokens * splits) splits *= 2;
  gather_table(p, splits, shared.constants);
  for (int i = threadIdx.x; i < p.rows * (D / 2); i += THREADS) {
    const int row = i / (D / 2), d = i % (D / 2);
    const int64_t angle = (int64_t)max(0, shared.constants.positions[row]) * p.rotary.stride + d;
    if (d < p.rotary.n / 2) shared.cos[row][d] = p.rotary.cos[angle], shared.sin[row][d] = p.rotary.sin[angle];
  }
  __syncthreads();

  auto* workspace = static_cast<uint8_t*>(p.workspace);
  const StepBuffers at(p);
  auto* x = static_cast<T*>(p.x);
  auto *qkv = reinterpret_cast<T*>(workspace + at.qkv), *part = reinterpret_cast<T*>(workspace + at.part);
  auto* act = reinterpret_cast<T*>(workspace + at.act);
  GridBarrier barrier{reinterpret_cast<unsigned*>(workspace)};

  for (int i = 0; i < count; ++i) {
    const int kind = i == 4 * p.layers ? 4 : i % 4;
    const LayerPointers& layer = layers[min(i / 4, p.layers - 1)];
    Input<T> input{x, nullptr, p.rows, p.width, p.eps};
    Output<T> output{Store::add, p.rows, x, p.width};
    const void* next_norm = nullptr;  // into L2 while others are waited for
    if (kind == 0) {
      input.norm = static_cast<const T*>(layer.norm[0]);
      output = Output<T>{Store::plain, p.rows, qkv, (p.heads + 2 * p.groups) * D};
      prefetch_cache<INT8, D>(p, layer, splits, shared.constants);
    } else if (kind == 1) {
      input =
          Input<T>{part, nullptr, p.rows * splits, p.heads * D, 0.f, splits > 1 ? weights : nullptr, D == 64 ? 6 : 7};
      output.splits = splits;
      next_norm = layer.norm[1];
    } else if (kind == 2) {
      input.norm = static_cast<const T*>(layer.norm[1]);
      output = Output<T>{Store::swiglu, p.rows, act, p.mlp_width};
    } else if (kind == 3) {
      input = Input<T>{act, nullptr, p.rows, p.mlp_width};
      if (2 * p.rows * p.mlp_width <= kStagedBytes) input.staged = reinterpret_cast<T*>(shared.staged);
      next_norm = i + 1 < 4 * p.layers ? layers[i / 4 + 1].norm[0] : p.norm;
    } else {
      input.norm = static_cast<const T*>(p.norm);
      output = Output<T>{Store::fp32, p.rows, p.logits, p.logits_stride};
    }
    for (int c = threadIdx.x * 64; next_norm && c < p.width; c += THREADS * 64)
      prefetch_l2(static_cast<const T*>(next_norm) + c);
    if (kind == 1) {
      attention<T, INT8, D>(p, layer, splits, shared, barrier);
      barrier.arrive();
    }
    if (i > 0) barrier.wait();
    if (kind == 1 && splits > 1)
      share_of_splits(reinterpret_cast<float*>(workspace + at.lse), weights, p.rows, splits, p.heads);
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
  const int ring = WARPS * (major >= 9 ? Stream<F, step_stages(F, D, true), WARPS>::BYTES
                                       : Stream<F, step_stages(F, D, false), WARPS>::BYTES);
  const int shared = ring + sizeof(StepShared<D>) + p.layers * sizeof(LayerPointers) +
                     (4 * p.layers + 1) * sizeof(Matrix) + kDecodeRows * p.heads * sizeof(float);
  return launch(step_kernel<T, F, INT8, D>, dim3(multiprocessors()), THREADS, shared, false, true, stream, p);
}

template <Format F>
cudaError_t decode_step_of(const DecodeStep& p, cudaStream_t stream) {
  auto by_size = [&](auto zero) {
    using T = decltype(zero);
    if (p.head_size == 64) {
      return p.int8_cache ? launch_step<T, F, true, 64>(p, stream) : launch_step<T, F, false, 64>(p, stream);
    }
    return p.int8_cache ? launch_step<T, F, true, 128>(p, stream) : launch_step<T, F, false, 128>(p, stream);
  };
  return p.type == Type::bf16 ? by_size(__nv_bfloat16{}) : by_size(__half{});
}

// One a file, so that they compile side by side.
cudaError_t decode_step_plain(const DecodeStep& p, cudaStream_t stream);
cudaError_t decode_step_int8(const DecodeStep& p, cudaStream_t stream);
cudaError_t decode_step_int4(const DecodeStep& p, cudaStream_t stream);

}  // namespace tl
