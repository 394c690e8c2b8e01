// The matrix-vector product that gemv.cu and the whole-step kernels share.
//
// A block takes tiles of 16 rows; its warps split K, chunk by chunk (weights.cuh), and their sums meet in shared
// memory. Weights do not depend on what is computed, so each warp runs a ring of asynchronous copies ahead of the
// products, over tile and matrix boundaries: while a block waits for the others (or for the kernel before), its ring
// fills, and memory never rests as long as the wait is shorter than the ring.
#pragma once
#include <type_traits>

#include "weights.cuh"

namespace tl {

// This warp's way through a list of matrices: of each, the tiles dealt to this block, of each tile, every WARPS-th
// chunk. (Asking for what comes after the ring with cp.async.bulk.prefetch.L2, 256 KB a block, made the step 28 %
// slower.)
template <Format F, int STAGES, int WARPS>
struct Stream {
  static constexpr int BYTES = STAGES * Chunk<F>::BYTES;  // shared memory a warp

  const Matrix* matrices;
  int count, shift;
  uint32_t ring;
  int matrix, tile, chunk, stage;
  Matrix now;

  __device__ void start(const Matrix* list, int length, int group, uint8_t* memory) {
    uint8_t* own = memory + threadIdx.x / 32 * BYTES;
    for (int i = threadIdx.x % 32; i < BYTES / 16; i += 32) reinterpret_cast<uint4*>(own)[i] = uint4{};
    matrices = list, count = length, shift = __ffs(group / 32) - 1, ring = shared_address(own);
    __syncwarp();
    matrix = -1, stage = 0;
    next_matrix();
    for (int i = 0; i < STAGES; ++i) copy_next(i);
  }
  // Tiles go round the blocks from one matrix to the next, so that over a layer all get about the same.
  __device__ static int first_tile(const Matrix& w) {
    const int tile = static_cast<int>(blockIdx.x) - w.dealt;
    return tile < 0 ? tile + static_cast<int>(gridDim.x) : tile;
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
    copy_next(stage);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

 private:
  __device__ void next_matrix() {
    chunk = threadIdx.x / 32;
    do {
      if (++matrix >= count) return;
      now = matrices[matrix];
      tile = first_tile(now);
    } while (tile >= now.tiles() || chunk * COLUMNS >= now.in);
  }
  __device__ void copy_next(int stage) {
    if (matrix < count) {
      copy_chunk<F>(ring + stage * Chunk<F>::BYTES, now, shift, tile, chunk);
      chunk += WARPS;
      if (chunk * COLUMNS >= now.in) {
        chunk = threadIdx.x / 32;
        tile += gridDim.x;
        if (tile >= now.tiles()) next_matrix();
      }
    }
    copies_commit();  // also where there was nothing to copy: wait() counts
  }
};

// Sums of the warps over some tiles, and of squares.
template <int WARPS>
struct Scratch {
  static constexpr int ROOM = 256;  // tiles x 16 slots x vectors
  float sum[WARPS][ROOM];
  float squares[WARPS][8];
};

// What a product reads: `rows` vectors of `in` columns: as they are, RMS-normalised, or parts of attention.
//
// Normalised: W (x w / rms) = (W (x w)) / rms, so that only x w, rounded, goes into the product and the root mean
// square is not needed before its end. (fp16: x w 2^-8, so that it cannot overflow.) Parts of attention: a split is a
// vector of its own, weighted by its share; Output adds the splits up after the product, which is linear. So the parts
// need no pass that puts them together.
template <class T>
struct Input {
  const T* x;     // (rows, in)
  const T* norm;  // (in,) or null
  int rows, in;
  float eps;
  const float* weights = nullptr;  // (rows, in >> head_bits) in shared memory, or null
  int head_bits = 0;
  T* staged = nullptr;  // shared memory for all of x, where a warp comes back for more of it; or null

  static constexpr float SCALE = Is<T>::bf16 ? 1.f : 1.f / 256;

  // Columns 32 j + 8 t .. of a chunk, of vector n: lane 4 n + t.
  __device__ void load(Fragment& f, int chunk) const {
    const int n = threadIdx.x % 32 / 4, column = chunk * COLUMNS + threadIdx.x % 4 * 8;
    const T* from = (staged ? staged : x) + (int64_t)n * in + column;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      f.x[j] = n >= rows || column + 32 * j >= in ? uint4{}
               : staged                           ? *reinterpret_cast<const uint4*>(from + 32 * j)
                                                  : load_l2(from + 32 * j);
    }
    if (!weights) return;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const float weight =
          n < rows && column + 32 * j < in ? weights[n * (in >> head_bits) + (column + 32 * j >> head_bits)] : 0.f;
      float v[8];
      Vector<T>{f.x[j]}.unpack(v);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= weight;
      f.x[j] = Vector<T>::pack(v).bits;
    }
  }
  // All of x, by all threads.
  __device__ void stage() const {
    if (!staged) return;
    for (int i = threadIdx.x * 8; i < rows * in; i += blockDim.x * 8)
      *reinterpret_cast<uint4*>(staged + i) = load_l2(x + i);
    __syncthreads();
  }
  // Adds up the squares of the vectors, on the diagonal of X X^T: lane 4 n + n / 2 has vector n's in c[n % 2].
  __device__ void squares(const Fragment& f, float (&c)[4]) const {
    float other[4] = {};
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      mma<T>(c, f.x[j].x, 0, f.x[j].y, 0, f.x[j].x, f.x[j].y);
      mma<T>(other, f.x[j].z, 0, f.x[j].w, 0, f.x[j].z, f.x[j].w);
    }
    c[0] += other[0], c[1] += other[1];
  }
  __device__ void weigh(Fragment& f, int chunk) const {
    using T2 = typename std::conditional<Is<T>::bf16, __nv_bfloat162, __half2>::type;
    const int column = chunk * COLUMNS + threadIdx.x % 4 * 8;
    uint4 w[BLOCKS];
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
      w[j] = column + 32 * j < in ? *reinterpret_cast<const uint4*>(norm + column + 32 * j) : uint4{};
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      auto *a = reinterpret_cast<T2*>(&f.x[j]), *b = reinterpret_cast<T2*>(&w[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!Is<T>::bf16) b[i] = __hmul2(b[i], T2{from_float<T>(SCALE), from_float<T>(SCALE)});
        a[i] = __hmul2(a[i], b[i]);
      }
    }
  }
  // What a finished product is multiplied by.
  template <int WARPS>
  __device__ float after(const Scratch<WARPS>& scratch, int n) const {
    if (!norm) return 1.f;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += scratch.squares[w][n];
    return rsqrtf(__fdividef(sum, in) + eps) * (1.f / SCALE);
  }
};

// Where a product goes.
template <class T>
struct Output {
  Store store;
  int rows;
  void* y;  // (rows, ..) at stride; T, or float for Store::fp32
  int64_t stride;
  int splits = 1;  // vectors that are parts of one row and are added up; a power of two

  // The residual, which nobody else changes meanwhile. From L2, where L1 may be stale.
  __device__ float residual(const Matrix& w, int row, int r) const {
    if (store != Store::add || r >= rows || row >= w.out) return 0.f;
    const auto bits = __ldcg(static_cast<const unsigned short*>(y) + r * stride + row);
    return to_float(reinterpret_cast<const T&>(bits));
  }
  __device__ void write(const Matrix& w, int row, int r, float v) const {
    if (r >= rows || row >= w.out) return;
    if (store == Store::fp32) {
      static_cast<float*>(y)[r * stride + row] = v;
    } else {
      static_cast<T*>(y)[r * stride + row] = from_float<T>(v);
    }
  }
};

// y = W f(x) for the tiles of `w` that are this block's. The block must meet at a barrier between two calls.
//
// Several tiles are multiplied before the warps meet (16 with one vector, 2 with eight): until then a warp waits for
// nothing but its own copies.
template <class T, Format F, int STAGES, int WARPS>
__device__ void linear(const Matrix& in_shared, const Input<T>& input, const Output<T>& output,
                       Stream<F, STAGES, WARPS>& stream, Scratch<WARPS>& scratch) {
  const Matrix w = in_shared;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, chunks = w.in + COLUMNS - 1 >> 8;
  const int bits = input.rows == 1 ? 0 : input.rows == 2 ? 1 : input.rows <= 4 ? 2 : 3;  // of a vector's index
  int tile = stream.first_tile(w);
  if (tile >= w.tiles()) return;
  // A sum's place is (tile of the batch, slot, vector); this thread adds up the one at threadIdx.x, and so on.
  auto row_of = [&](int first, int place) {
    return w.row(first + (place >> bits + 4) * gridDim.x, place >> bits & 15);
  };
  auto vector_of = [&](int place) { return place & (1 << bits) - 1; };
  float residual = output.residual(w, row_of(tile, threadIdx.x), vector_of(threadIdx.x) / output.splits);

  input.stage();
  Fragment f;
  float squares[4] = {};
  for (bool first = true; tile < w.tiles(); first = false) {
    const int first_of_batch = tile;
    int places = 0;
    for (; places + (16 << bits) <= Scratch<WARPS>::ROOM && tile < w.tiles(); places += 16 << bits, tile += gridDim.x) {
      float y[4] = {};
      for (int chunk = warp; chunk < chunks; chunk += WARPS) {
        const bool fresh = first && places == 0;
        if (fresh || chunks > WARPS) {
          input.load(f, chunk);
          if (input.norm) {
            if (fresh) input.squares(f, squares);
            input.weigh(f, chunk);
          }
          if (F == Format::int4) sum_blocks<T>(f, stream.shift);
        }
        const uint32_t stage = stream.wait();
        multiply_chunk<T, F>(stage, f, stream.shift, y);
        stream.release();
      }
      float* sum = scratch.sum[warp] + places;
      if (2 * t < 1 << bits) sum[(g << bits) + 2 * t] = y[0], sum[(g + 8 << bits) + 2 * t] = y[2];
      if (2 * t + 1 < 1 << bits) sum[(g << bits) + 2 * t + 1] = y[1], sum[(g + 8 << bits) + 2 * t + 1] = y[3];
    }
    if (first && t == g / 2) scratch.squares[warp][g] = g % 2 ? squares[1] : squares[0];
    __syncthreads();
    auto total = [&](int place) {
      float v = 0.f;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) v += scratch.sum[i][place];
      return v;
    };
    for (int place = threadIdx.x; place < (places + 31 & ~31); place += 32 * WARPS) {  // whole warps, for the shuffles
      const int n = vector_of(place), r = n / output.splits, row = row_of(first_of_batch, place);
      const float factor = input.after(scratch, n);
      float v = total(place) * factor;
      for (int step = 1; step < output.splits; step *= 2) v += __shfl_xor_sync(~0u, v, step);
      if (place >= places || n % output.splits) continue;
      if (output.store == Store::swiglu) {
        if (place >> bits & 8) continue;
        v = __fdividef(v, 1.f + __expf(-v)) * total(place + (8 << bits)) * factor;
      }
      if (!first || place != threadIdx.x) residual = output.residual(w, row, r);
      output.write(w, row, r, v + residual);
    }
    if (tile < w.tiles()) __syncthreads();  // the sums were read
  }
}

}  // namespace tl
