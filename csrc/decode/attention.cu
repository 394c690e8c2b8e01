// Decode attention over a paged cache: one new token a sequence, see attend.cuh for what a block does.
//
// A block for each sequence, key-value head (up to 8 of its query heads) and split. With several splits the last block
// to arrive puts the parts together:  o = sum_s 2^(lse_s - max) o_s / sum_s 2^(lse_s - max).
// With `append`, q and the new k are turned here and the new k and v written, so that RoPE costs no launch and no pass.
// Geometry: many sequences a warp each, since more of them fit than of anything larger (1,000 x 256 tokens: 84 us; 2
// warps 88, 4 warps 95, and with the next tile in flight 86, 97, 111); few 8 warps. Bytes a sequence: 2 G D length
// sizeof, each key-value head once for its group of query heads. Reference: `attention` over the gathered cache in
// fp32.
#include "attend.cuh"

namespace tl {
namespace {

constexpr int MAX_SPLITS = 16;

template <bool INT8, int D, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, WARPS == 8 || D == 128 ? 1 : 20 / WARPS)
    attention_kernel(const PagedAttention p) {
  __shared__ __align__(16) AttendShared<D, WARPS> shared;
  const int parts = (p.heads / p.groups + 7) / 8;
  const int head = blockIdx.x / parts, part = blockIdx.x % parts, sequence = blockIdx.y, split = blockIdx.z;
  launch_next();
  const int position = p.positions[sequence];
  if (position < 0) return wait_for_previous();
  const int64_t angle = (int64_t)position * p.rotary.stride;
  int first, last;
  split_range(position + 1, p.splits, split, first, last);
  const int row = p.heads * D;
  const int64_t slot = (int64_t)sequence * p.splits + split;
  auto* out = p.splits > 1 ? static_cast<bf16*>(p.partial) + slot * row : static_cast<bf16*>(p.out) + (int64_t)sequence * row;
  float* lse = p.splits > 1 ? p.lse + slot * p.heads : nullptr;
  attend<INT8, D, WARPS, WARPS == 8>(p, p.cache, shared, sequence, position, p.rotary.cos + angle,
                                        p.rotary.sin + angle, head, part, first, last, out, lse, wait_for_previous);
  if (p.splits == 1) return;

  __shared__ int ticket;
  __threadfence();
  __syncthreads();
  int* arrived = p.arrived + sequence * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) ticket = atomicAdd(arrived, 1);
  __syncthreads();
  if (ticket != p.splits - 1) return;
  __threadfence();
  const int per_group = p.heads / p.groups, count = min(8, per_group - part * 8);
  const auto* parts_o = static_cast<const bf16*>(p.partial) + (int64_t)sequence * p.splits * row;
  const float* parts_lse = p.lse + (int64_t)sequence * p.splits * p.heads;
  for (int i = threadIdx.x; i < count * (D / 8); i += WARPS * 32) {
    const int query = head * per_group + part * 8 + i / (D / 8), d = i % (D / 8) * 8;
    float largest = -INFINITY, sum = 0.f, y[8] = {};
    for (int s = 0; s < p.splits; ++s) largest = fmaxf(largest, __ldcg(parts_lse + s * p.heads + query));
    for (int s = 0; s < p.splits; ++s) {
      const float weight = exp2f(__ldcg(parts_lse + s * p.heads + query) - largest);
      float x[8];
      Vector<bf16>{load_l2(parts_o + s * row + query * D + d)}.unpack(x);
      sum += weight;
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] += weight * x[e];
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] /= sum;
    Vector<bf16>::pack(y).store(static_cast<bf16*>(p.out) + (int64_t)sequence * row + query * D + d);
  }
  if (threadIdx.x == 0) *arrived = 0;
}

template <bool INT8, int D>
cudaError_t by_size(const PagedAttention& p, cudaStream_t stream) {
  const int parts = (p.heads / p.groups + 7) / 8;
  const dim3 grid(p.groups * parts, p.sequences, p.splits);
  // Few blocks: 8 warps for a short way through the tokens. Many: one, and nothing to put together at the end.
  const int64_t a_multiprocessor = (int64_t)grid.x * grid.y * grid.z / multiprocessors();
  auto go = [&](auto kernel, int warps) { return launch(kernel, grid, 32 * warps, 0, p.overlap, stream, p); };
  if (a_multiprocessor < 4) return go(attention_kernel<INT8, D, 8>, 8);
  return a_multiprocessor < 12 ? go(attention_kernel<INT8, D, 2>, 2) : go(attention_kernel<INT8, D, 1>, 1);
}

}  // namespace

int paged_attention_splits(int sequences, int groups, int length) {
  const int blocks = sequences * groups, wanted = multiprocessors() / (blocks ? blocks : 1);
  const int useful = (length + 63) / 64;  // at least 64 tokens a split
  const int splits = wanted < useful ? wanted : useful;
  return splits < 1 ? 1 : splits > MAX_SPLITS ? MAX_SPLITS : splits;
}

cudaError_t paged_attention(const PagedAttention& p, cudaStream_t stream) {
  const bool sizes = (p.head_size == 64 || p.head_size == 128) && p.groups > 0 && p.heads % p.groups == 0;
  if (!sizes || p.splits < 1 || p.sequences > 65535 || (p.append && p.rotary.n % 16)) return cudaErrorInvalidValue;
  if (p.sequences == 0) return cudaSuccess;
  if (p.head_size == 64) return p.int8_cache ? by_size<true, 64>(p, stream) : by_size<false, 64>(p, stream);
  return p.int8_cache ? by_size<true, 128>(p, stream) : by_size<false, 128>(p, stream);
}

}  // namespace tl
