// y = W f(x) for 1 to 8 vectors, f an RMSNorm or nothing, y stored, added to the residual stream or put through SwiGLU.
//
//   f(x) = x w / sqrt(mean(x^2) + eps), x w rounded to bf16;   y = W f(x)   |   y += W f(x)
//   y = silu(g) u with [g; u] = W f(x)
//
// Sums in fp32, one rounding. One kernel instead of norm, product and what follows: at batch 1 a launch costs as much
// as reading 8 MB. Every block computes the norm anew (2 C bytes from L2). Bytes: W once; the rest is small.
//
// A block takes tiles of 16 rows in turn, at most two blocks an SM (a block a tile was 8 % slower in bf16 and 18 % in
// int4). Its warps split K, chunk by chunk (weights.cuh), and their sums meet in shared memory. Weights do not depend on
// what is computed, so each warp runs a ring of asynchronous copies ahead of the products, over the borders of tiles.
// With `overlap` it asks for its first weights before the kernel that computes x has ended; so that a block finds room
// beside that kernel's, it takes at most half of an SM's shared memory.
// Reference: `Linear` after `rms_norm_reference`, src/ops.
#include "weights.cuh"

namespace tl {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
template <Format F>
constexpr int kStages = F == Format::plain  ? 1
                        : F == Format::int8 ? 2
                                            : 3;

// This warp's way through the matrix: of the tiles dealt to this block, every WARPS-th chunk.
template <Format F>
struct Stream {
  static constexpr int STAGES = kStages<F>, BYTES = STAGES * Chunk<F>::BYTES;  // of shared memory a warp

  const Matrix matrix;
  const int shift;
  const uint32_t ring;
  int tile, chunk, stage = 0;

  __device__ Stream(const Matrix& w, int group, uint8_t* memory)
      : matrix(w),
        shift(group == 32 ? 0 : group == 64 ? 1 : 2),
        ring(shared_address(memory) + threadIdx.x / 32 * BYTES),
        tile(blockIdx.x),
        chunk(threadIdx.x / 32) {
    uint8_t* own = memory + threadIdx.x / 32 * BYTES;  // what is not copied meets an x of 0, and must be finite
    for (int i = threadIdx.x % 32; i < BYTES / 16; i += 32) reinterpret_cast<uint4*>(own)[i] = uint4{};
    __syncwarp();
    if (chunk * COLUMNS >= matrix.in) tile = matrix.tiles();
    for (int i = 0; i < STAGES; ++i) copy_next(i);
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
  __device__ void copy_next(int stage) {
    if (tile < matrix.tiles()) {
      copy_chunk<F>(ring + stage * Chunk<F>::BYTES, matrix, shift, tile, chunk);
      chunk += WARPS;
      if (chunk * COLUMNS >= matrix.in) chunk = threadIdx.x / 32, tile += gridDim.x;
    }
    copies_commit();  // also where there was nothing to copy: wait() counts
  }
};

// Sums of the warps over some tiles, and of squares.
struct Scratch {
  static constexpr int ROOM = 256;  // tiles x 16 slots x vectors
  float sum[WARPS][ROOM];
  float squares[WARPS][8];
};

// What a product reads: `rows` vectors of `in` columns, as they are or RMS-normalised.
//
// Normalised: W (x w / rms) = (W (x w)) / rms, so that only x w, rounded, goes into the product and the root mean
// square is not needed before its end.
struct Input {
  const bf16* x;     // (rows, in)
  const bf16* norm;  // (in,) or null
  int rows, in;
  float eps;

  // Columns 32 j + 8 t .. of a chunk, of vector n: lane 4 n + t.
  __device__ void load(Fragment& f, int chunk) const {
    const int n = threadIdx.x % 32 / 4, column = chunk * COLUMNS + threadIdx.x % 4 * 8;
    const bf16* from = x + (int64_t)n * in + column;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
      f.x[j] = n >= rows || column + 32 * j >= in ? uint4{} : load_l2(from + 32 * j);
  }
  // Adds up the squares of the vectors, on the diagonal of X X^T: lane 4 n + n / 2 has vector n's in c[n % 2].
  __device__ void squares(const Fragment& f, float (&c)[4]) const {
    float other[4] = {};
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      mma(c, f.x[j].x, 0, f.x[j].y, 0, f.x[j].x, f.x[j].y);
      mma(other, f.x[j].z, 0, f.x[j].w, 0, f.x[j].z, f.x[j].w);
    }
    c[0] += other[0], c[1] += other[1];
  }
  __device__ void weigh(Fragment& f, int chunk) const {
    const int column = chunk * COLUMNS + threadIdx.x % 4 * 8;
    uint4 w[BLOCKS];
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
      w[j] = column + 32 * j < in ? *reinterpret_cast<const uint4*>(norm + column + 32 * j) : uint4{};
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      auto *a = reinterpret_cast<__nv_bfloat162*>(&f.x[j]), *b = reinterpret_cast<__nv_bfloat162*>(&w[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = __hmul2(a[i], b[i]);
    }
  }
  // What a finished product is multiplied by.
  __device__ float after(const Scratch& scratch, int n) const {
    if (!norm) return 1.f;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += scratch.squares[w][n];
    return rsqrtf(__fdividef(sum, in) + eps);
  }
};

// Where a product goes.
struct Output {
  Store store;
  int rows;
  void* y;  // (rows, ..) at stride; bf16, or float for Store::fp32
  int64_t stride;

  // The residual, which nobody else changes meanwhile. From L2, where L1 may be stale.
  __device__ float residual(const Matrix& w, int row, int r) const {
    if (store != Store::add || r >= rows || row >= w.out) return 0.f;
    const auto bits = __ldcg(static_cast<const unsigned short*>(y) + r * stride + row);
    return to_float(reinterpret_cast<const bf16&>(bits));
  }
  __device__ void write(const Matrix& w, int row, int r, float v) const {
    if (r >= rows || row >= w.out) return;
    if (store == Store::fp32) {
      static_cast<float*>(y)[r * stride + row] = v;
    } else {
      static_cast<bf16*>(y)[r * stride + row] = from_float<bf16>(v);
    }
  }
};

// Several tiles are multiplied before the warps meet (16 with one vector, 2 with eight): until then a warp waits for
// nothing but its own copies.
template <Format F>
__device__ void multiply(const Matrix& w, const Input& input, const Output& output, Stream<F>& stream,
                         Scratch& scratch) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, chunks = w.in + COLUMNS - 1 >> 8;
  const int bits = input.rows == 1 ? 0 : input.rows == 2 ? 1 : input.rows <= 4 ? 2 : 3;  // of a vector's index
  int tile = blockIdx.x;
  // A sum's place is (tile of the batch, slot, vector); this thread adds up the one at threadIdx.x, and so on.
  auto row_of = [&](int first, int place) {
    return w.row(first + (place >> bits + 4) * gridDim.x, place >> bits & 15);
  };
  auto vector_of = [&](int place) { return place & (1 << bits) - 1; };
  float residual = output.residual(w, row_of(tile, threadIdx.x), vector_of(threadIdx.x));

  Fragment f;
  float squares[4] = {};
  for (bool first = true; tile < w.tiles(); first = false) {
    const int first_of_batch = tile;
    int places = 0;
    for (; places + (16 << bits) <= Scratch::ROOM && tile < w.tiles(); places += 16 << bits, tile += gridDim.x) {
      float y[4] = {};
      for (int chunk = warp; chunk < chunks; chunk += WARPS) {
        const bool fresh = first && places == 0;
        if (fresh || chunks > WARPS) {
          input.load(f, chunk);
          if (input.norm) {
            if (fresh) input.squares(f, squares);
            input.weigh(f, chunk);
          }
          if (F == Format::int4) sum_blocks(f, stream.shift);
        }
        const uint32_t stage = stream.wait();
        multiply_chunk<F>(stage, f, stream.shift, y);
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
    for (int place = threadIdx.x; place < places; place += THREADS) {
      const int n = vector_of(place), row = row_of(first_of_batch, place);
      const float factor = input.after(scratch, n);
      float v = total(place) * factor;
      if (output.store == Store::swiglu) {
        if (place >> bits & 8) continue;
        v = __fdividef(v, 1.f + __expf(-v)) * total(place + (8 << bits)) * factor;
      }
      if (!first || place != threadIdx.x) residual = output.residual(w, row, n);
      output.write(w, row, n, v + residual);
    }
    if (tile < w.tiles()) __syncthreads();  // the sums were read
  }
}

template <Format F>
struct Shared {
  Scratch scratch;
  alignas(128) uint8_t ring[WARPS * Stream<F>::BYTES];
};

template <Format F>
__global__ void __launch_bounds__(THREADS, 2) gemv_kernel(const __grid_constant__ Gemv p) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<F>*>(memory);
  const Matrix w = {static_cast<const uint8_t*>(p.weight), p.out, p.in, p.store == Store::swiglu ? p.out / 2 : 8};
  Stream<F> stream(w, p.group, shared.ring);
  launch_next();
  const Input input{static_cast<const bf16*>(p.x), static_cast<const bf16*>(p.norm), p.rows, p.in, p.eps};
  wait_for_previous();
  multiply(w, input, Output{p.store, p.rows, p.y, p.y_stride}, stream, shared.scratch);
}

}  // namespace

cudaError_t gemv(const Gemv& p, cudaStream_t stream) {
  if (p.rows < 1 || p.rows > kDecodeRows || p.in % 8 || (p.store == Store::swiglu && p.out % 16)) {
    return cudaErrorInvalidValue;
  }
  const int tiles = (p.out + SLOTS - 1) / SLOTS, most = 2 * multiprocessors(), blocks = tiles < most ? tiles : most;
  auto go = [&](auto kernel, int shared) {
    return launch(kernel, dim3(blocks), THREADS, shared, p.overlap, stream, p);
  };
  switch (p.format) {
    case Format::int8:
      return go(gemv_kernel<Format::int8>, sizeof(Shared<Format::int8>));
    case Format::int4:
      return go(gemv_kernel<Format::int4>, sizeof(Shared<Format::int4>));
    default:
      return go(gemv_kernel<Format::plain>, sizeof(Shared<Format::plain>));
  }
}

}  // namespace tl
