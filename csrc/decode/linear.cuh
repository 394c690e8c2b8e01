// The matrix-vector product that gemv.cu and the whole-step kernels share.
//
// A block of 8 warps takes tiles of 16 rows; its warps split K, chunk by chunk (weights.cuh), and their sums meet in
// shared memory. Weights do not depend on what is computed, so each warp runs a ring of asynchronous copies ahead of
// the products, over tile and matrix boundaries: while a block waits for the others (or for the kernel before), its
// ring fills, and memory never rests as long as the wait is shorter than the ring.
#pragma once
#include "weights.cuh"

namespace tl {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int SET = WARPS * COLUMNS;  // columns that a block takes at once

// This warp's way through a list of matrices: of each, the tiles dealt to this block, of each tile, every 8th chunk.
template <Format F, int STAGES>
struct Stream {
  const Matrix* matrices;
  int count, shift;
  uint32_t ring;  // STAGES chunks
  int matrix, tile, set, stage;

  __device__ void start() {
    matrix = 0, tile = first_tile(matrices[0]), set = 0, stage = 0;
    skip_empty();
    for (int i = 0; i < STAGES; ++i) copy_next(ring + i * Chunk<F>::BYTES);
  }
  // Tiles go round the blocks from one matrix to the next, so that over a layer all get about the same.
  __device__ static int first_tile(const Matrix& w) {
    const int grid = gridDim.x;
    return (blockIdx.x + grid - w.dealt % grid) % grid;
  }
  // The chunk whose turn it is, copied.
  __device__ uint32_t wait() {
    copies_wait<STAGES - 1>();
    __syncwarp();
    return ring + stage * Chunk<F>::BYTES;
  }
  // It was read: its place takes the next chunk.
  __device__ void release() {
    __syncwarp();
    copy_next(ring + stage * Chunk<F>::BYTES);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

 private:
  __device__ void skip_empty() {
    while (matrix < count && tile >= matrices[matrix].tiles()) {
      if (++matrix < count) tile = first_tile(matrices[matrix]);
    }
  }
  __device__ void copy_next(uint32_t to) {
    if (matrix < count) {
      const Matrix& w = matrices[matrix];
      const int chunk = set * WARPS + threadIdx.x / 32;
      if (chunk * COLUMNS < w.in) copy_chunk<F>(to, w, shift, tile, chunk);
      if (++set * SET >= w.in) {
        set = 0;
        tile += gridDim.x;
        skip_empty();
      }
    }
    copies_commit();  // also where there was nothing to copy: wait() counts
  }
};

// Sums of the warps and of squares; two of each, so that one barrier a tile is enough.
struct Scratch {
  float sum[2][WARPS][SLOTS * 8];
  float squares[WARPS][8];
};

// What a product reads: `rows` vectors of `in` columns: as they are, RMS-normalised, or parts of attention.
//
// A split of attention is a vector of its own: it is weighted by 2^(lse - max) / sum over the row's splits, and since the
// product is linear, Output adds the splits up after it. So the parts need no pass that puts them together.
template <class T>
struct Input {
  const T* x;     // (rows, in)
  const T* norm;  // (in,) or null
  int rows, in;
  float eps;
  const float* lse = nullptr;  // (rows, heads), or null: no parts of attention
  int head_size = 64, splits = 1;  // splits: a power of two

  __device__ static int column(int chunk, int j) { return chunk * COLUMNS + 32 * j + threadIdx.x % 4 * 8; }
  __device__ static int row() { return threadIdx.x % 32 / 4; }

  // Before the wait for x: the weights of the norm, where one set is all there is.
  __device__ void prefetch(Fragment& w) const {
    if (!norm || in > SET) return;
    load_norm(w, threadIdx.x / 32);
  }
  // 1 / sqrt(mean(x^2) + eps) of this lane's vector. Called by all threads.
  __device__ float rstd(Scratch& scratch, Fragment& f) const {
    if (!norm) return 1.f;
    float squares = 0.f;
    for (int chunk = threadIdx.x / 32; chunk * COLUMNS < in; chunk += WARPS) {
      load_x(f, chunk);
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        float v[8];
        Vector<T>{f.x[j]}.unpack(v);
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
      }
    }
    squares = quad_sum(squares);
    if (threadIdx.x % 4 == 0) scratch.squares[threadIdx.x / 32][row()] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) squares += scratch.squares[w][row()];
    return rsqrtf(squares / in + eps);
  }
  __device__ void load(Fragment& f, const Fragment& w, int chunk, float rstd) const {
    if (!norm || in > SET) load_x(f, chunk);  // else rstd() left it there
    if (lse && splits > 1) weigh(f, chunk);
    if (!norm) return;
    Fragment other;
    if (in > SET) load_norm(other, chunk);
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      float v[8], g[8];
      Vector<T>{f.x[j]}.unpack(v);
      Vector<T>{in > SET ? other.x[j] : w.x[j]}.unpack(g);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= rstd * g[i];
      f.x[j] = Vector<T>::pack(v).bits;
    }
  }

 private:
  __device__ void load_x(Fragment& f, int chunk) const {
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const bool valid = row() < rows && column(chunk, j) < in;
      f.x[j] = valid ? load_l2(x + (int64_t)row() * in + column(chunk, j)) : uint4{};
    }
  }
  __device__ void weigh(Fragment& f, int chunk) const {
    const int heads = in / head_size;
    float part[BLOCKS];
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const bool valid = row() < rows && column(chunk, j) < in;
      part[j] = valid ? __ldcg(lse + row() * heads + column(chunk, j) / head_size) : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      float largest = part[j];
      for (int step = 1; step < splits; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 4 * step));
      float weight = largest == -INFINITY ? 0.f : exp2f(part[j] - largest), sum = weight;
      for (int step = 1; step < splits; step *= 2) sum += __shfl_xor_sync(~0u, sum, 4 * step);
      weight = sum > 0.f ? weight / sum : 0.f;
      float v[8];
      Vector<T>{f.x[j]}.unpack(v);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= weight;
      f.x[j] = Vector<T>::pack(v).bits;
    }
  }
  __device__ void load_norm(Fragment& w, int chunk) const {
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const bool valid = row() < rows && column(chunk, j) < in;
      w.x[j] = valid ? *reinterpret_cast<const uint4*>(norm + column(chunk, j)) : uint4{};
    }
  }
};

// Where a product goes.
template <class T>
struct Output {
  Store store;
  int rows;
  void* y;         // (rows, ..) at stride; T, or float for Store::fp32
  int64_t stride;
  int splits = 1;  // vectors that are parts of one row and are added up

  // Before the products: the residual, which nobody else changes meanwhile.
  __device__ float before(const Matrix& w, int tile, int slot, int n) const {
    const int row = w.row(tile, slot);
    if (store != Store::add || n >= rows || row >= w.out) return 0.f;
    const auto bits = __ldcg(static_cast<const unsigned short*>(y) + n * stride + row);  // L1 may be stale
    return to_float(reinterpret_cast<const T&>(bits));
  }
  __device__ void operator()(const Matrix& w, const float (&sum)[WARPS][SLOTS * 8], int tile, int slot, int n,
                             float residual) const {
    const int row = w.row(tile, slot);
    if (n >= rows || row >= w.out || (store == Store::swiglu && slot >= 8)) return;
    auto total = [&](int slot) {
      float v = 0.f;
      for (int s = 0; s < splits; ++s) {
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) v += sum[warp][slot * 8 + n * splits + s];
      }
      return v;
    };
    float v = total(slot);
    if (store == Store::swiglu) v = v / (1.f + __expf(-v)) * total(slot + 8);
    if (store == Store::fp32) {
      static_cast<float*>(y)[n * stride + row] = v;
    } else {
      static_cast<T*>(y)[n * stride + row] = from_float<T>(v + residual);
    }
  }
};

// y = W f(x) for the tiles of `w` that are this block's. `f` and `norm` are registers: Input's, after prefetch().
// `turn` says which half of the scratch is free and goes from one call to the next.
template <class T, Format F, int STAGES>
__device__ void linear(const Matrix& w, const Input<T>& input, const Output<T>& output, Stream<F, STAGES>& stream,
                       Scratch& scratch, Fragment& norm, int& turn) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sets = (w.in + SET - 1) / SET;
  const int slot = threadIdx.x / 8, n = threadIdx.x % 8;  // of the first 128 threads, once sums are there
  int tile = Stream<F, STAGES>::first_tile(w);
  if (tile >= w.tiles()) return;
  Fragment f;
  const float rstd = input.rstd(scratch, f);
  for (bool first = true; tile < w.tiles(); tile += gridDim.x, first = false) {
    const float residual = slot < SLOTS ? output.before(w, tile, slot, n) : 0.f;
    float y[4] = {};
    for (int set = 0; set < sets; ++set) {
      const int chunk = set * WARPS + warp;
      const bool there = chunk * COLUMNS < w.in;
      if (there && (first || sets > 1)) {
        input.load(f, norm, chunk, rstd);
        if (F == Format::int4) sum_blocks<T>(f);
      }
      const uint32_t stage = stream.wait();
      if (there) multiply_chunk<T, F>(stage, f, stream.shift, y);
      stream.release();
    }
    float* sum = scratch.sum[turn][warp];
    reinterpret_cast<float2*>(sum)[lane] = {y[0], y[1]};  // slot g, vectors 2 t and 2 t + 1
    reinterpret_cast<float2*>(sum)[32 + lane] = {y[2], y[3]};
    __syncthreads();
    if (slot < SLOTS) output(w, scratch.sum[turn], tile, slot, n, residual);
    turn ^= 1;
  }
}

}  // namespace tl
