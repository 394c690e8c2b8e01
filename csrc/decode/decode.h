// Launches of the decode kernels: one new token a sequence, activations in bf16. Raw pointers, sizes and a stream; no
// torch type.
//
// All that changes from step to step (ids, positions, block tables, sampling state) lies in device memory, so that one
// captured CUDA graph serves every step. Letters: B sequences, H query heads, G key-value heads, D head size,
// C width, F width of the MLP, V vocabulary, N x K a weight's rows and columns. Pointers are 16-byte aligned.
// README.md beside this file has the layouts and what was measured.
#pragma once
#include "../kernels.h"

namespace tl {

constexpr int kDecodeRows = 8;  // most sequences that the matrix-vector kernels take

// ---- weights (weights.cuh) -------------------------------------------------------------------------------

enum class Format { plain, int8, int4 };  // plain: (N, K) of bf16; int8, int4: blocks, see weights.cuh

// Quantised weights back to bf16, for products of many rows.
struct Dequantize {
  Format format;
  int group;          // columns that share a scale: 32, 64 or 128
  int rows, columns;  // N, K
  const void* weight;
  void* y;  // (N, K)
};
cudaError_t dequantize(const Dequantize& p, cudaStream_t stream);

// ---- gemv.cu: y = W f(x) for 1 to 8 rows -----------------------------------------------------------------

enum class Store {
  plain,   // y = W f(x)
  fp32,    // the same, kept in fp32 (logits)
  add,     // y += W f(x): y is the residual stream
  swiglu,  // y = silu(gate) up, with W = [gate; up]
};

struct Gemv {
  Format format;
  int group;    // 32, 64 or 128
  int rows;     // 1 to 8
  int out, in;  // N, K; K a multiple of 8; swiglu: N = 2F, F a multiple of 8
  const void* weight;
  const void* x;     // (rows, K)
  const void* norm;  // (K,): x is RMS-normalised first; or null
  float eps;
  Store store;
  void* y;           // (rows, N) at y_stride; swiglu: (rows, F)
  int64_t y_stride;  // elements
  bool overlap;      // start while the kernel before still runs (needs compute capability 9.0); x, y: nothing else
                     // may have been written by it
};
cudaError_t gemv(const Gemv& p, cudaStream_t stream);

// ---- the paged key-value cache ---------------------------------------------------------------------------

// Element (block, token of the block, head, d) of one layer lies at
// block * block_stride + token * token_stride + head * head_stride + d.
struct KvCache {
  void *k, *v;               // bf16, or int8
  float *k_scale, *v_scale;  // int8: one a token and head, at the element's place / D; else null
  int64_t block_stride;      // elements; all multiples of 8
  int token_stride, head_stride;
  int block_size;    // tokens: a power of two, 8 or more
  const int* table;  // (B, max_blocks) blocks of each sequence
  int max_blocks;
};

struct Rotary {
  const float *cos, *sin;  // (positions, n/2 at least)
  int n;                   // dimensions that turn, n/2 a multiple of 8 where fused into attention
  int stride;              // of a position in the tables, a multiple of 4
};

// ---- attention.cu ----------------------------------------------------------------------------------------

struct PagedAttention {
  bool int8_cache;
  int sequences, heads, groups, head_size;  // B, H, G, D (64 or 128)
  float scale;                              // of the scores, 1/sqrt(D)
  const void* qkv;                          // (B, (H+2G) D); with `append` not yet turned
  KvCache cache;
  const int* positions;  // (B,) of the new token, which attends to itself and all before; below 0: idle, not written
  bool append;    // turn q and k by `rotary`, write the new k and v to the cache
  Rotary rotary;
  void* out;      // (B, H D)
  int splits;     // of each sequence's tokens: paged_attention_splits(); 1 needs none of what follows
  void* partial;  // (B, splits, H D)
  float* lse;     // (B, splits, H)
  int* arrived;   // (B * G * ceil(H/G/8),) zeros at first; zeros again after each launch
  bool overlap;   // as in Gemv; the cache before `positions` is read before the wait
};
// A good number of splits for sequences of up to `length` tokens; at most 16.
int paged_attention_splits(int sequences, int groups, int length);
cudaError_t paged_attention(const PagedAttention& p, cudaStream_t stream);

// ---- sample.cu -------------------------------------------------------------------------------------------

struct Sample {
  Type type;  // of the logits: fp32 or bf16
  int sequences, vocab;
  const void* logits;  // (B, V) at logits_stride
  int64_t logits_stride;
  const float* temperature;         // (B,) below 1e-6: greedy
  const int* top_k;                 // (B,) 0: off
  const float* top_p;               // (B,) 1: off; 0: greedy
  const float* repetition_penalty;  // (B,) 1: off
  uint32_t* seen;                   // (B, ceil(V/32)) bits of the ids so far; the new one is added
  const uint32_t* key;              // (B, 8) ChaCha8's key
  int* count;                       // (B,) tokens chosen so far: which draw, and where in `ids`; incremented
  int* positions;                   // (B,) incremented; below 0: idle row, nothing is written
  int* next;                        // (B,) the new id
  float* log_prob;                  // (B,) under the softmax of the logits as they came
  int *ids, ids_stride;             // (B, ids_stride): the new id goes to count % ids_stride
  float* log_probs;                 // (B, ids_stride), or null
  int* not_finite;                  // (B,) set to 1 where a logit is not finite; the id is then 0
  const void* embedding;            // (V, C) bf16: its row goes to x; or null
  void* x;                          // (B, C)
  int width;                        // C, a multiple of 8
  bool overlap;
};
cudaError_t sample(const Sample& p, cudaStream_t stream);

}  // namespace tl
