// FlashAttention: what a launch needs. No torch type.
//
//   O = softmax(scale Q K^T + mask) V, head h of Q with head h / (H/G) of K and V
//
// Letters: B batch, T queries, S keys, H query heads, G key/value heads, D head size. The T queries are the
// last T of the S positions: query t stands at position p = t + S - T.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace flash {

// A (B, rows, heads, D) view with the last dimension contiguous; strides in elements.
struct View {
  void* data;
  int64_t batch, row, head;
};

// Which keys a query at position p sees: all, or those up to p (causal); with documents also only those in
// [doc_start[b][p], doc_end[b][p]).
struct Mask {
  int s;                     // S
  bool causal;
  const int32_t* doc_start;  // (B, S), or null
  const int32_t* doc_end;    // (B, S), or null
};

struct Forward {
  int batch, heads, groups, t, head_size;
  bool fp16;  // else bf16
  float scale;
  Mask mask;
  View q, k, v, out;
  float* lse;  // (B, H, T_pad) fp32: log sum exp of scale * scores; T_pad = padded(T)
};

// Rotary tables by which dQ is turned back, for q turned before attention: dimensions i and i + D/2 of a head.
struct Rotary {
  const float *cos, *sin;  // (T, D/2 at least), 8-byte aligned; null: q was not turned
  int64_t stride;          // from row to row, elements, even
};

struct Backward {
  Forward f;
  View dout, dq, dk, dv;
  float* delta;     // (B, H, T_pad) workspace: rowsum(dO * O)
  float* lse2;      // (B, H, T_pad) workspace: lse in base 2; +inf beyond T
  float* dq_sum;    // (B, H, T_pad/64, D/64, 8, 128, 4) workspace: dQ in fp32 (see backward_helpers.cu)
  int splits;       // the H/G heads of a group are worked on by this many blocks
  float* dkv_sum;   // (2, splits, B, S, G, D) workspace where splits > 1: partial dK, dV
  int32_t* turn;    // (B, H, T_pad/64, D/64) workspace of zeros where the result must repeat bit for bit
  Rotary rotary;    // of dQ alone
};

constexpr int kRowPad = 128;
inline int64_t padded(int64_t t) { return (t + kRowPad - 1) / kRowPad * kRowPad; }

// mma.sync path: sm_80 and later. wgmma and TMA path: sm_90a only.
cudaError_t forward_sm80(const Forward& p, cudaStream_t stream);
cudaError_t forward_sm90(const Forward& p, cudaStream_t stream);
cudaError_t backward_sm80(const Backward& p, cudaStream_t stream);
cudaError_t backward_sm90(const Backward& p, cudaStream_t stream);

// The three small kernels around the main backward kernel (backward_helpers.cu).
cudaError_t backward_prepare(const Backward& p, cudaStream_t stream);
cudaError_t backward_store_dq(const Backward& p, cudaStream_t stream);
cudaError_t backward_store_dkv(const Backward& p, cudaStream_t stream);

}  // namespace flash
