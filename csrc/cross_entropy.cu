// Cross-entropy: the loss of each row, and its gradient written over the logits, in one pass.
//
//   lse = ln sum exp(x);  p = exp(x - lse)
//   loss = scale ((1 - e) (lse - x[target]) + e (lse - mean(x)) + z lse^2)       e label smoothing, z z-loss
//   dx   = scale (p (1 + 2 z lse) - (1 - e) [column = target] - e / V)
//
// fp32 inside whatever the logits' dtype. A row with target = ignore_index has loss 0 and gradient 0.
//
// A target outside [0, V) that is not ignore_index makes the loss NaN.
//
// A block of 1,024 threads stays on the chip and strides over rows; it holds a whole row in registers (K
// vectors of 16 bytes a thread), so the logits are read once and written once, and, where there is room, the
// next row is in flight while this one is summed. Rows that do not fit, or are not aligned to 16 bytes, are read
// three times instead. Bytes: 2 V sizeof a row.
// Reference: `cross_entropy_sum` in src/ops/loss.rs.
#include "vector.cuh"

namespace tl {
namespace {

constexpr int THREADS = 1024, WARPS = THREADS / 32;

constexpr float kLog2e = 1.4426950408889634f;

__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Maximum, sum of exp(x - max), and sum of x.
struct Sums {
  float max, exp, plain;
};

__device__ inline Sums merge(Sums a, Sums b) {
  const float m = fmaxf(a.max, b.max);
  const float base = m == -INFINITY ? 0.f : m;
  return {m, a.exp * __expf(a.max - base) + b.exp * __expf(b.max - base), a.plain + b.plain};
}
__device__ inline Sums warp_merge(Sums s) {
#pragma unroll
  for (int step = 16; step; step /= 2)
    s = merge(s, {__shfl_xor_sync(~0u, s.max, step), __shfl_xor_sync(~0u, s.exp, step),
                  __shfl_xor_sync(~0u, s.plain, step)});
  return s;
}
__device__ inline Sums block_merge(Sums s, Sums* scratch) {
  s = warp_merge(s);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = s;
  __syncthreads();
  return warp_merge(scratch[threadIdx.x % 32]);
}

// What the second half of a row needs.
struct Row {
  float lse, factor, smooth, hit;  // dx = exp(x - lse) factor - smooth - [target] hit
};

__device__ inline Row finish(const CrossEntropy& p, int64_t row, int64_t target, float hit, Sums s) {
  const float lse = s.max + __logf(s.exp), e = p.label_smoothing;
  if (threadIdx.x == 0) {
    const float loss = (1.f - e) * (lse - hit) + e * (lse - s.plain / p.columns) + p.z_loss * lse * lse;
    p.loss[row] = target == p.ignore_index ? 0.f : p.scale * loss;
  }
  return {lse, p.scale * (1.f + 2.f * p.z_loss * lse), p.scale * e / p.columns, p.scale * (1.f - e)};
}

// The logit of the target: 0 where it is ignored, NaN where it is none of the columns.
template <class T>
__device__ inline float target_logit(const CrossEntropy& p, const T* row, int64_t target) {
  if (target == p.ignore_index) return 0.f;
  return target >= 0 && target < p.columns ? to_float(row[target]) : NAN;
}

template <class T, int K, bool PREFETCH>
__global__ void __launch_bounds__(THREADS, 1) one_pass_kernel(const CrossEntropy p) {
  using V = Vector<T>;
  __shared__ Sums scratch[2][WARPS];
  T* logits = static_cast<T*>(p.logits);
  V v[K], next[PREFETCH ? K : 1];
  int64_t target = 0, next_target = 0;
  float hit = 0.f, next_hit = 0.f;
  auto read = [&](int64_t row, V* to) {
    next_target = p.target[row];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t c = (k * THREADS + threadIdx.x) * (int64_t)V::N;
      if (c < p.columns) to[k] = V::load_streaming(logits + row * p.columns + c);
    }
    next_hit = target_logit(p, logits + row * p.columns, next_target);
  };
  if (PREFETCH && blockIdx.x < p.rows) read(blockIdx.x, next);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    if (PREFETCH) {
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = next[PREFETCH ? k : 0];
    } else {
      read(row, v);
    }
    target = next_target;
    hit = next_hit;
    if (PREFETCH && row + gridDim.x < p.rows) read(row + gridDim.x, next);

    // Calls f(k, c, x) with each vector of this thread.
    auto each = [&](auto f) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t c = (k * THREADS + threadIdx.x) * (int64_t)V::N;
        if (c >= p.columns) continue;
        float x[V::N];
        v[k].unpack(x);
        f(k, c, x);
      }
    };
    Sums s{-INFINITY, 0.f, 0.f};
    each([&](int, int64_t, float (&x)[V::N]) {
#pragma unroll
      for (int i = 0; i < V::N; ++i) s.max = fmaxf(s.max, x[i]);
    });
    const float base = s.max == -INFINITY ? 0.f : s.max * kLog2e;
    each([&](int, int64_t, float (&x)[V::N]) {
#pragma unroll
      for (int i = 0; i < V::N; ++i) s.exp += fast_exp2(fmaf(x[i], kLog2e, -base));
    });
    if (p.label_smoothing != 0.f) {
      each([&](int, int64_t, float (&x)[V::N]) {
#pragma unroll
        for (int i = 0; i < V::N; ++i) s.plain += x[i];
      });
    }
    const Row r = finish(p, row, target, hit, block_merge(s, scratch[turn]));
    const bool ignored = target == p.ignore_index;
    const float lse2 = r.lse * kLog2e, smooth = ignored ? 0.f : r.smooth, factor = ignored ? 0.f : r.factor;
    each([&](int, int64_t c, float (&x)[V::N]) {
#pragma unroll
      for (int i = 0; i < V::N; ++i) x[i] = fmaf(fast_exp2(fmaf(x[i], kLog2e, -lse2)), factor, -smooth);
      V::pack(x).store(logits + row * p.columns + c);
    });
    // The target's own gradient over that of its vector, by the thread that wrote it.
    if (!ignored && target / V::N % THREADS == threadIdx.x && target >= 0 && target < p.columns)
      logits[row * p.columns + target] =
          from_float<T>(fast_exp2(fmaf(hit, kLog2e, -lse2)) * r.factor - r.smooth - r.hit);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS) three_pass_kernel(const CrossEntropy p) {
  __shared__ Sums scratch[WARPS];
  const int64_t row = blockIdx.x, target = p.target[row];
  T* logits = static_cast<T*>(p.logits) + row * p.columns;
  // Calls f with N neighbouring logits, and writes them back where f says so.
  auto each = [&](auto f) {
    for (int64_t c = N * threadIdx.x; c < p.columns; c += N * THREADS) {
      float x[N];
      if constexpr (N == 1) {
        x[0] = to_float(logits[c]);
        if (f(x, c)) logits[c] = from_float<T>(x[0]);
      } else {
        Vector<T>::load(logits + c).unpack(x);
        if (f(x, c)) Vector<T>::pack(x).store(logits + c);
      }
    }
  };
  const float hit = target_logit(p, logits, target);
  Sums s{-INFINITY, 0.f, 0.f};
  each([&](float (&x)[N], int64_t) {
    for (int i = 0; i < N; ++i) s.max = fmaxf(s.max, x[i]);
    return false;
  });
  const float base = s.max == -INFINITY ? 0.f : s.max;
  each([&](float (&x)[N], int64_t) {
    for (int i = 0; i < N; ++i) {
      s.exp += __expf(x[i] - base);
      s.plain += x[i];
    }
    return false;
  });
  const Row r = finish(p, row, target, hit, block_merge(s, scratch));
  each([&](float (&x)[N], int64_t c) {
    for (int i = 0; i < N; ++i) {
      const float dx = __expf(x[i] - r.lse) * r.factor - r.smooth - (c + i == target ? r.hit : 0.f);
      x[i] = target == p.ignore_index ? 0.f : dx;
    }
    return true;
  });
}

template <class T>
__global__ void __launch_bounds__(256) scale_kernel(const ScaleBy p) {
  const float factor = *p.factor;
  if (factor == 1.f) return;
  T* x = static_cast<T*>(p.x);
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < p.n; i += gridDim.x * 256ll)
    x[i] = from_float<T>(to_float(x[i]) * factor);
}

template <class T, int K, bool PREFETCH>
cudaError_t launch(const CrossEntropy& p, cudaStream_t stream) {
  const int64_t blocks = multiprocessors();
  one_pass_kernel<T, K, PREFETCH><<<p.rows < blocks ? p.rows : blocks, THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t by_columns(const CrossEntropy& p, cudaStream_t stream) {
  constexpr int V = Vector<T>::N;
  const int64_t vectors = p.columns / V;
  const bool aligned = p.columns % V == 0 && reinterpret_cast<uintptr_t>(p.logits) % 16 == 0;
  if (aligned && vectors <= 2 * THREADS) return launch<T, 2, true>(p, stream);
  if (aligned && vectors <= 4 * THREADS) return launch<T, 4, true>(p, stream);
  if (aligned && vectors <= 7 * THREADS) return launch<T, 7, false>(p, stream);
  if (aligned)
    three_pass_kernel<T, V><<<p.rows, THREADS, 0, stream>>>(p);
  else
    three_pass_kernel<T, 1><<<p.rows, THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t scale_by(const ScaleBy& p, cudaStream_t stream) {
  return TL_DISPATCH(p.type, T, [&] {
    scale_kernel<T><<<8 * multiprocessors(), 256, 0, stream>>>(p);
    return cudaGetLastError();
  }());
}

cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream) {
  return TL_DISPATCH(p.type, T, by_columns<T>(p, stream));
}

}  // namespace tl
