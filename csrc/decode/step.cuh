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
__host__ __device__ constexpr int step_stages(Format f, int head_size, bool hopper) {
  if (!hopper) return f == Format::plain ? 1 : f == Format::int8 ? 2 : 4;
  return f == Format::plain ? (head_size == 64 ? 3 : 2) : f == Format::int8 ? 5 : 9;
}

// Barrier over all blocks, in two halves, so that what needs no other block can be done in between.
struct GridBarrier {
  unsigned* arrived;  // zero at first; and a second word
  unsigned goal = 0;

  __device__ void arrive() {
    __syncthreads();
    goal += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1);
    }
  }
  __device__ void wait() {
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

template <int D>
union StepShared {
  Scratch scratch;
  AttendShared<D, WARPS> attend;
};

template <class T, Format F, bool INT8, int D>
__global__ void __launch_bounds__(THREADS, 1) step_kernel(const DecodeStep p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  constexpr int STAGES = step_stages(F, D, false);
#else
  constexpr int STAGES = step_stages(F, D, true);
#endif
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<StepShared<D>*>(memory + WARPS * STAGES * Chunk<F>::BYTES);
  auto* matrices = reinterpret_cast<Matrix*>(&shared + 1);  // 4 a layer, then the head
  const int qkv_rows = (p.heads + 2 * p.groups) * D, attention_width = p.heads * D;
  const int count = 4 * p.layers + (p.head.codes ? 1 : 0);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int rows[5] = {qkv_rows, p.width, 2 * p.mlp_width, p.width, p.vocab};
    const int columns[5] = {p.width, attention_width, p.width, p.mlp_width, p.width};
    const int layer = i / 4, kind = layer == p.layers ? 4 : i % 4;
    const DecodeLayer& l = p.layer[min(layer, p.layers - 1)];
    const Weight w = kind == 0 ? l.qkv : kind == 1 ? l.proj : kind == 2 ? l.gate_up : kind == 3 ? l.mlp_proj : p.head;
    int64_t dealt = 0;
    for (int k = 0; k < 4; ++k) dealt += (rows[k] + SLOTS - 1) / SLOTS * (layer + (k < kind));
    matrices[i] = {static_cast<const uint8_t*>(w.codes), static_cast<const uint8_t*>(w.scales), rows[kind], columns[kind],
                   kind == 2 ? p.mlp_width : 8, static_cast<int>(dealt % gridDim.x)};
  }
  __syncthreads();
  Stream<F, STAGES> stream{matrices, count, __ffs(p.group / 32) - 1,
                           shared_address(memory) + threadIdx.x / 32 * STAGES * Chunk<F>::BYTES};
  stream.start();

  auto* workspace = static_cast<uint8_t*>(p.workspace);
  const StepBuffers at(p);
  auto* x = static_cast<T*>(p.x);
  auto *qkv = reinterpret_cast<T*>(workspace + at.qkv), *part = reinterpret_cast<T*>(workspace + at.part);
  auto *lse = reinterpret_cast<float*>(workspace + at.lse);
  auto* act = reinterpret_cast<T*>(workspace + at.act);
  GridBarrier barrier{reinterpret_cast<unsigned*>(workspace)};
  const int splits = p.rows == 1 ? 8 : p.rows == 2 ? 4 : p.rows <= 4 ? 2 : 1;
  int turn = 0;

  for (int i = 0; i < count; ++i) {
    const int kind = i == 4 * p.layers ? 4 : i % 4;
    const DecodeLayer& layer = p.layer[min(i / 4, p.layers - 1)];
    Input<T> input{x, nullptr, p.rows, p.width, p.eps};
    Output<T> output{Store::add, p.rows, x, p.width};
    if (kind == 0) {
      input.norm = static_cast<const T*>(layer.norm_1);
      output = {Store::plain, p.rows, qkv, qkv_rows};
    } else if (kind == 1) {
      input = {part, nullptr, p.rows * splits, attention_width, 0.f, lse, D, splits};
      output.splits = splits;
    } else if (kind == 2) {
      input.norm = static_cast<const T*>(layer.norm_2);
      output = {Store::swiglu, p.rows, act, p.mlp_width};
    } else if (kind == 3) {
      input = {act, nullptr, p.rows, p.mlp_width};
    } else {
      input.norm = static_cast<const T*>(p.norm);
      output = {Store::fp32, p.rows, p.logits, p.logits_stride};
    }
    Fragment norm;
    input.prefetch(norm);
    if (kind == 1) {
      PagedAttention a = {};
      a.heads = p.heads, a.groups = p.groups, a.head_size = D, a.scale = p.scale;
      a.qkv = qkv, a.positions = p.positions, a.append = true, a.rotary = p.rotary;
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
        attend<T, INT8, D, WARPS>(a, cache, shared.attend, row, head / parts, head % parts, first, last,
                                  part + (int64_t)slot * attention_width, lse + slot * p.heads, wait);
        __syncthreads();  // `shared` is free again
      }
      wait();
      barrier.arrive();
    }
    if (i > 0) barrier.wait();
    linear<T, F, STAGES>(matrices[i], input, output, stream, shared.scratch, norm, turn);
    if (i + 1 < count) barrier.arrive();
  }
  barrier.leave();
}

template <class T, Format F, bool INT8, int D>
cudaError_t launch_step(const DecodeStep& p, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  if (auto error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return error;
  const int ring = WARPS * step_stages(F, D, major >= 9) * Chunk<F>::BYTES;
  const int shared = ring + sizeof(StepShared<D>) + (4 * p.layers + 1) * sizeof(Matrix);
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
