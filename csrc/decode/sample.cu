// Chooses the next token of each sequence on the card and gets everything ready for the next step.
//
//   logits -> repetition penalty -> top-k -> / temperature -> top-p -> softmax -> first id, in order of ids, whose
//   cumulative probability exceeds u times the total       (greedy: the first of the largest)
//
// u: 53 bits of ChaCha8, the count-th 64-bit number of its stream. Then: the id into `seen`, `next` and `ids`, its
// log-probability under the plain softmax, count and position plus 1, and its embedding into the residual stream.
//
// One block of 1,024 threads a sequence. Up to 32,768 logits stay in registers, 8 neighbours a thread and chunk; longer
// vocabularies are read again in each pass, from L2. Nothing is sorted: the k-th largest logit and the border of top-p
// are found bit by bit, 32 times a count or a sum. For top-k up to 1,024 the k-th largest of the threads' maxima comes
// first: what is below it cannot count, and the rest (about k) fits shared memory. Sums of probabilities in fp64 and in
// a fixed order: the same id in every run. Bytes: V logits.
// Reference: src/generate/sampler.rs.
#include <float.h>

#include "chacha.cuh"
#include "device.cuh"

namespace tl {
namespace {

constexpr int THREADS = 1024, CHUNK = THREADS * 8, LIST = 2048;

// A number that orders as the float does.
__device__ inline uint32_t order(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? ~0u : 1u << 31);
}

struct SampleShared {
  double sums[33];
  float floats[32];
  uint32_t words[32];
  int scans[33];
  uint32_t list[LIST];
  double u;
  int id;
};

template <class X, class Op>
__device__ X reduce(X x, Op op, X* scratch) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = op(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads();  // the last reader is done
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[threadIdx.x % 32];
#pragma unroll
  for (int step = 16; step; step /= 2) x = op(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Sum over the threads before this one; `total` over all. Order of additions is fixed.
template <class X>
__device__ X scan(X x, X& total, X* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  X sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const X other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  X before = 0;
  total = 0;
  for (int w = 0; w < THREADS / 32; ++w) {
    if (w == warp) before = total;
    total += scratch[w];
  }
  const X own = __shfl_up_sync(~0u, sum, 1);
  return before + (lane ? own : 0);
}

// The logits after what has been decided so far; masked ones are -inf.
template <class L, int KEPT>
struct Logits {
  const L* row;
  const uint32_t* seen;
  int vocab;
  bool aligned, raw = true;  // raw: as they came
  float penalty = 1.f, kth = -INFINITY, temperature = 1.f;
  uint32_t border = 0;  // top-p: below it masked, and those that equal it before `border_id`
  int border_id = 0;
  float kept[KEPT ? KEPT : 1][8];

  __device__ void read(int chunk, float (&x)[8]) const {
    const int id = chunk * CHUNK + threadIdx.x * 8;
    if (aligned && id + 8 <= vocab) {
      constexpr int N = Vector<L>::N;
#pragma unroll
      for (int i = 0; i < 8; i += N) Vector<L>::load(row + id + i).unpack(reinterpret_cast<float (&)[N]>(x[i]));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = id + i < vocab ? to_float(row[id + i]) : -INFINITY;
    }
    if (raw) return;
    const uint32_t bits = penalty != 1.f && id < vocab ? seen[id / 32] >> id % 32 : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (bits >> i & 1) x[i] = x[i] > 0.f ? x[i] / penalty : x[i] * penalty;
      x[i] = x[i] < kth ? -INFINITY : x[i];
      if (temperature != 1.f) x[i] = __fdiv_rn(x[i], temperature);
      x[i] += 0.f;  // no -0, which would be ordered before 0
      if (border == 0) continue;
      const uint32_t key = order(x[i]);
      if (key < border || (key == border && id + i < border_id)) x[i] = -INFINITY;
    }
  }
  __device__ void fill() {
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int c = 0; c < KEPT; ++c) read(c, kept[c]);
    }
  }
  __device__ int chunks() const { return KEPT ? KEPT : (vocab + CHUNK - 1) / CHUNK; }
  // f(chunk, its 8 logits of this thread)
  template <class Each>
  __device__ void each(Each f) const {
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int c = 0; c < KEPT; ++c) f(c, kept[c]);
    } else {
      for (int c = 0; c < chunks(); ++c) {
        float x[8];
        read(c, x);
        f(c, x);
      }
    }
  }
};

// Largest t with count(t) >= k, where count falls with t.
template <class Count>
__device__ uint32_t largest_with(int k, Count count) {
  uint32_t t = 0;
  for (int bit = 31; bit >= 0; --bit) {
    if (count(t | 1u << bit) >= k) t |= 1u << bit;
  }
  return t;
}

// Key of the k-th largest logit, k < V.
template <class Row>
__device__ uint32_t kth_largest(const Row& logits, int k, SampleShared& s) {
  uint32_t most = 0;
  logits.each([&](int, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) most = max(most, order(x[i]));
  });
  if (k <= THREADS) {
    const uint32_t floor = largest_with(k, [&](uint32_t t) { return __syncthreads_count(most >= t); });
    int mine = 0, total;
    logits.each([&](int, const float (&x)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mine += order(x[i]) >= floor;
    });
    int at = scan(mine, total, s.scans);
    if (total <= LIST) {
      logits.each([&](int, const float (&x)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (order(x[i]) >= floor) s.list[at++] = order(x[i]);
        }
      });
      for (int i = total + threadIdx.x; i < LIST; i += THREADS) s.list[i] = 0;
      __syncthreads();
      const uint32_t a = s.list[threadIdx.x], b = s.list[THREADS + threadIdx.x];
      return largest_with(k, [&](uint32_t t) {
        return __syncthreads_count(a >= t) + (total > THREADS ? __syncthreads_count(b >= t) : 0);
      });
    }
  }
  return largest_with(k, [&](uint32_t t) {
    int n = 0;
    logits.each([&](int, const float (&x)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) n += order(x[i]) >= t;
    });
    return reduce(n, [](int a, int b) { return a + b; }, s.scans);
  });
}

// Sets the border of top-p: the least likely tokens whose probabilities add up to at most 1 - p go; of those that are
// equal, the first ids.
template <class Row>
__device__ void find_border(Row& logits, float largest, double p, SampleShared& s) {
  const auto add = [](double a, double b) { return a + b; };
  auto below = [&](uint32_t t) {  // mass of the logits whose key is less than t
    double mass = 0.;
    logits.each([&](int, const float (&x)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) mass += order(x[i]) < t ? expf(x[i] - largest) : 0.f;
    });
    return reduce(mass, add, s.sums);
  };
  const double cut = (1. - p) * below(~0u);
  uint32_t border = 0;
  for (int bit = 31; bit >= 0; --bit) {
    if (below(border | 1u << bit) <= cut) border |= 1u << bit;
  }
  border = min(border, order(largest));
  const uint32_t bits = border >> 31 ? border ^ 1u << 31 : ~border;
  const double room = cut - below(border), each = expf(__uint_as_float(bits) - largest);
  int equal = 0;
  logits.each([&](int, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) equal += order(x[i]) == border;
  });
  equal = reduce(equal, [](int a, int b) { return a + b; }, s.scans);
  const int gone = each > 0. && room > 0. ? static_cast<int>(fmin(room / each, equal - 1.)) : 0;
  int id = 0;
  if (gone > 0) {  // the id of the first that stays
    int base = 0;
    logits.each([&](int c, const float (&x)[8]) {
      int mine = 0, total;
#pragma unroll
      for (int i = 0; i < 8; ++i) mine += order(x[i]) == border;
      int rank = base + scan(mine, total, s.scans);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (order(x[i]) == border && rank++ == gone) s.id = c * CHUNK + threadIdx.x * 8 + i;
      }
      base += total;
    });
    __syncthreads();
    id = s.id;
    __syncthreads();
  }
  logits.border = border, logits.border_id = id;
}

// The first id whose cumulative probability exceeds u times the total.
template <class Row>
__device__ int draw(const Row& logits, float largest, double u, SampleShared& s) {
  auto mass8 = [&](const float (&x)[8]) {
    double mass = 0.;
#pragma unroll
    for (int i = 0; i < 8; ++i) mass += expf(x[i] - largest);
    return mass;
  };
  double total = 0.;
  logits.each([&](int, const float (&x)[8]) {
    double chunk;
    scan(mass8(x), chunk, s.sums);
    total += chunk;
  });
  double target = u * total, base = 0.;
  if (target >= total) target = nextafter(total, 0.);  // rounding; u < 1
  if (threadIdx.x == 0) s.id = -1;
  logits.each([&](int c, const float (&x)[8]) {
    const double mass = mass8(x);
    double chunk, before = base + scan(mass, chunk, s.sums);
    const bool here = base <= target && target < base + chunk;
    base += chunk;
    if (!here) return;  // all threads alike
    // The first thread past the target; where sums of another order leave none, the last one with a probability.
    uint32_t first = mass > 0. && before + mass > target ? threadIdx.x : THREADS + 1023 - threadIdx.x;
    if (mass == 0.) first = 4 * THREADS;
    first = reduce(first, [](uint32_t a, uint32_t b) { return min(a, b); }, s.words);
    if (first >= THREADS) first = THREADS + 1023 - first;
    if (threadIdx.x != first) return;
    int id = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float e = expf(x[i] - largest);
      before += e;
      if (found || e == 0.f) continue;
      id = c * CHUNK + threadIdx.x * 8 + i;
      found = before > target;
    }
    s.id = id;
  });
  __syncthreads();
  return s.id;
}

template <class L, int KEPT>
__global__ void __launch_bounds__(THREADS) sample_kernel(const Sample p) {
  __shared__ SampleShared s;
  const int b = blockIdx.x;
  launch_next();
  wait_for_previous();
  const int position = p.positions[b];
  if (position < 0) return;
  const int count = p.count[b], words = (p.vocab + 31) / 32;
  if (threadIdx.x / 32 == 31) {  // by a warp of its own, while the others read
    const double u = chacha8_uniform(p.key + 8 * b, count);
    if (threadIdx.x % 32 == 0) s.u = u;
  }
  Logits<L, KEPT> logits;
  logits.row = static_cast<const L*>(p.logits) + b * p.logits_stride;
  logits.seen = p.seen + (int64_t)b * words;
  logits.vocab = p.vocab;
  logits.aligned = p.logits_stride % 8 == 0;
  logits.fill();

  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  float own;  // this thread's largest
  auto maximum = [&] {
    own = -INFINITY;
    logits.each([&](int, const float (&x)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) own = fmaxf(own, x[i]);
    });
    return reduce(own, larger, s.floats);
  };
  const float raw_largest = maximum();
  float mass8 = 0.f;
  logits.each([&](int, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) mass8 += __expf(x[i] - raw_largest);
  });
  const double mass = reduce(static_cast<double>(mass8), [](double a, double b) { return a + b; }, s.sums);
  const bool finite = raw_largest > -INFINITY && mass <= DBL_MAX;  // a NaN or an infinity makes NaN of the sum

  int id = 0;
  if (finite) {
    const int k = p.top_k[b];
    const float temperature = p.temperature[b], top_p = p.top_p[b];
    float largest = raw_largest;
    logits.raw = false;
    if ((logits.penalty = p.repetition_penalty[b]) != 1.f) {
      logits.fill();
      largest = maximum();
    }
    if (temperature < 1e-6f || top_p == 0.f) {
      uint32_t first = ~0u;
      if (own == largest) {
        logits.each([&](int c, const float (&x)[8]) {
#pragma unroll
          for (int i = 7; i >= 0; --i) {
            if (x[i] == largest) first = min(first, static_cast<uint32_t>(c * CHUNK + threadIdx.x * 8 + i));
          }
        });
      }
      id = reduce(first, [](uint32_t a, uint32_t b) { return min(a, b); }, s.words);
    } else {
      if (k > 0 && k < p.vocab) {
        const uint32_t key = kth_largest(logits, k, s);
        logits.kth = __uint_as_float(key >> 31 ? key ^ 1u << 31 : ~key);
      }
      logits.temperature = temperature;
      logits.fill();
      largest = __fdiv_rn(largest, temperature) + 0.f;
      if (top_p < 1.f) {
        find_border(logits, largest, top_p, s);
        logits.fill();
      }
      id = draw(logits, largest, s.u, s);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const float log_prob = finite ? to_float(logits.row[id]) - raw_largest - static_cast<float>(log(mass)) : NAN;
    if (!finite) p.not_finite[b] = 1;
    const int64_t at = (int64_t)b * p.ids_stride + count % p.ids_stride;
    p.seen[(int64_t)b * words + id / 32] |= 1u << id % 32;
    p.next[b] = id, p.log_prob[b] = log_prob, p.ids[at] = id;
    if (p.log_probs) p.log_probs[at] = log_prob;
    p.count[b] = count + 1, p.positions[b] = position + 1;
  }
  if (!p.embedding) return;
  const auto* from = static_cast<const uint4*>(p.embedding) + (int64_t)id * (p.width / 8);
  auto* to = static_cast<uint4*>(p.x) + (int64_t)b * (p.width / 8);
  for (int i = threadIdx.x; i < p.width / 8; i += THREADS) to[i] = from[i];
}

}  // namespace

cudaError_t sample(const Sample& p, cudaStream_t stream) {
  if (p.vocab < 1 || p.ids_stride < 1 || p.width % 8) return cudaErrorInvalidValue;
  if (p.sequences == 0) return cudaSuccess;
  auto go = [&](auto kernel) { return launch(kernel, dim3(p.sequences), THREADS, 0, p.overlap, stream, p); };
  const bool kept = p.vocab <= 4 * CHUNK;
  if (p.type == Type::fp32) return kept ? go(sample_kernel<float, 4>) : go(sample_kernel<float, 0>);
  if (p.type == Type::bf16) return kept ? go(sample_kernel<bf16, 4>) : go(sample_kernel<bf16, 0>);
  return cudaErrorInvalidValue;
}

}  // namespace tl
