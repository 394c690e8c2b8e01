// Launches of the element-wise kernels: raw pointers, sizes and a stream; no torch type. Each kernel's file says
// what it computes. Pointers of 16-bit and fp32 tensors are 16-byte aligned unless said otherwise.
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

namespace tl {

enum class Type { fp32, bf16, fp16 };

// The scale of one tensor, on the device; 32 bytes. cuBLASLt reads `inverse`.
struct Fp8Slot {
  float inverse, scale;
  float amax;       // largest magnitude cast since the last update
  float largest;    // decaying maximum that the scale comes from
  float last;       // amax of the last update
  float overflows;  // updates in which a value was saturated
  float unused[2];
};

// ---- rmsnorm.cu: rows of C values ----------------------------------------------------------------------

struct RmsNorm {
  Type type;         // of x, y, residual, weight and their gradients
  int64_t rows;
  int columns;       // C, a multiple of 16 bytes, at most max_columns(type)
  float eps;
  const void* x;         // (rows, C)
  const void* residual;  // (rows, C) added to x first, or null
  void* sum;             // (rows, C) x + residual, where there is a residual
  const void* weight;    // (C,)
  void* y;               // (rows, C), or e4m3 where there is a slot
  float* rstd;           // (rows,)
  Fp8Slot* slot = nullptr;  // scale of y, bf16 only
};
cudaError_t rms_norm_forward(const RmsNorm& p, cudaStream_t stream);

struct RmsNormBackward {
  Type type;
  int64_t rows;
  int columns;
  const void* dy;      // (rows, C)
  const void* x;       // (rows, C) what was normalised: x, or the sum with the residual
  const void* weight;  // (C,)
  const float* rstd;   // (rows,)
  const void* dsum;    // (rows, C) gradient that reached the sum by another way, added to dx; or null
  void* dx;            // (rows, C); may be x or dy
  float* partial;      // (partial_rows, C) workspace
  int partial_rows;    // rms_norm_partial_rows(columns)
  void* dweight;       // (C,)
};
int rms_norm_max_columns(Type type);
int rms_norm_partial_rows(int64_t rows);
cudaError_t rms_norm_backward(const RmsNormBackward& p, cudaStream_t stream);

// ---- rope.cu -------------------------------------------------------------------------------------------

struct Rope {
  Type type;
  int64_t rows;          // B T; row r stands at position r % t of the tables
  int64_t t;
  int heads;             // heads to rotate
  int all_heads;         // heads of x, of which those after the first `heads` are copied; in place: heads
  int head_size, n;      // D, and how many of its dimensions turn
  int64_t row_stride, head_stride;  // of x, elements
  int64_t table_stride;             // of cos and sin, elements
  const float *cos, *sin;           // (T, n/2 at least)
  void* x;
  const void* from;                 // of x's strides; in place: x
  bool backward;                    // turn the other way
};
cudaError_t rope(const Rope& p, cudaStream_t stream);

// ---- swiglu.cu: rows of [gate | up], F values each -----------------------------------------------------

struct SwiGlu {
  Type type;
  int64_t rows;
  int64_t width;        // F, a multiple of 16 bytes
  const void* gate_up;  // (rows, 2F)
  void* act;            // forward: (rows, F) result. backward: the same recomputed, or null; may be dact
  const void* dact;     // backward: (rows, F)
  void* dgate_up;       // backward: (rows, 2F); may be gate_up
};
cudaError_t swiglu_forward(const SwiGlu& p, cudaStream_t stream);
cudaError_t swiglu_backward(const SwiGlu& p, cudaStream_t stream);

// ---- fp8.cu: e4m3 with one scale a tensor -----------------------------------------------------------------

enum class Fp8Source { plain, norm, act };
struct Fp8Cast {
  Fp8Source source;
  int64_t rows;
  int columns;         // of the result; both multiples of 16
  const void* x;       // bf16 (rows, columns); act: [gate | up], (rows, 2 columns)
  const float* rstd;   // norm: (rows,)
  const void* weight;  // norm: bf16 (columns,)
  uint8_t *out, *out_t;  // (rows, columns), (columns, rows); either may be null
  Fp8Slot* slot;
  bool note;  // the largest magnitude, in the slot
};
cudaError_t fp8_cast(const Fp8Cast& p, cudaStream_t stream);

struct Fp8SwiGluBackward {
  int64_t rows;
  int width;  // F
  const void *gate_up, *dact;  // bf16 (rows, 2F), (rows, F)
  uint8_t *dgate_up, *dgate_up_t, *act_t;  // (rows, 2F), (2F, rows), (F, rows)
  Fp8Slot *slot, *act_slot;  // of dgate_up; of act, only read
};
cudaError_t fp8_swiglu_backward(const Fp8SwiGluBackward& p, cudaStream_t stream);

// New scales from what was noted.
cudaError_t fp8_update(Fp8Slot* slots, int count, cudaStream_t stream);

// ---- nf4.cu ---------------------------------------------------------------------------------------------

struct Nf4Dequantize {
  Type type;                   // of y
  int64_t n;                   // values
  const void* codes;           // (ceil(n / 2),) bytes, two values each
  const void* absmax;          // (ceil(n / 64),) fp32; bytes where there is a map
  const float* nested_map;     // (256,) values of those bytes, or null
  const float* nested_absmax;  // with a map: one each 256 bytes
  const float* nested_offset;  // with a map: one number
  void* y;                     // (n,)
};
cudaError_t nf4_dequantize(const Nf4Dequantize& p, cudaStream_t stream);

// ---- cross_entropy.cu ----------------------------------------------------------------------------------

struct CrossEntropy {
  Type type;
  int64_t rows;
  int64_t columns;        // V
  void* logits;           // (rows, V), overwritten by the gradient
  const int64_t* target;  // (rows,); ignore_index: no loss, gradient 0
  int64_t ignore_index;
  float scale;            // of loss and gradient
  float label_smoothing, z_loss;
  float* loss;            // (rows,)
};
cudaError_t cross_entropy(const CrossEntropy& p, cudaStream_t stream);

// x *= *factor, a number on the device; nothing is read or written where it is 1.
struct ScaleBy {
  Type type;
  int64_t n;
  void* x;
  const float* factor;
};
cudaError_t scale_by(const ScaleBy& p, cudaStream_t stream);

// ---- adamw.cu ------------------------------------------------------------------------------------------

// How exact weights and moments are kept; src/train/optimizer/low_memory.rs defines the formats.
enum class Master { fp32, split, bf16 };
enum class State { fp32, bf16, int8 };
constexpr int kStateBlock = 256;  // elements that share a scale in State::int8

struct AdamWTensor {
  void* param;           // fp32: the exact weight. split: the 16 bits that `weight` lacks. bf16: null
  float* grad;
  void *exp_avg, *exp_avg_sq;               // fp32, bf16, or int8 and uint8
  float *exp_avg_scale, *exp_avg_sq_scale;  // int8: (ceil(n / kStateBlock),)
  void* weight;          // bf16; may be null for Master::fp32
  int64_t n;
  uint32_t key[2];       // of the random bits
  bool clear_grad;       // leave zeros in grad
};
struct AdamWConfig {
  float lr, beta1, beta2, eps;
  float decay;           // 1 - lr * weight_decay
  float step_size;       // lr / (1 - beta1^s)
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^s)
};
cudaError_t adamw(const AdamWTensor* tensors, int count, Master master, State state, const float* clip, AdamWConfig c,
                  cudaStream_t stream);

struct NormTensor {
  const void* grad;
  int64_t n;
  Type type;
};
constexpr int kNormBlocks = 1056;
// norm = sqrt(sum of squares); clip = min(1, max_norm / (norm + 1e-6)), not finite where norm is not. `partial`
// has kNormBlocks fp32. max_norm = inf: clip is 1. `watch` is null or has count + 1 numbers, 0 at first: after the
// first norm that is not finite the last is 1, those of the tensors that were to blame are 1, and clip stays nan.
cudaError_t grad_norm(const NormTensor* tensors, int count, float max_norm, float* partial, float* norm, float* clip,
                      int* watch, cudaStream_t stream);

}  // namespace tl
