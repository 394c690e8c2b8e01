// The whole C ABI between Rust (src/ffi) and C++/CUDA (csrc).
//
// Rules. Every function returns 0 on success and 1 on failure; on failure tl_last_error() holds the full
// exception text of this thread. No exception crosses the border. A `TlTensor` is an `at::Tensor*`, the
// same pointer that tch and torch-sys carry; the callee never frees it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void* TlTensor;

// Text of the last failure on this thread; valid until the next failing call on this thread.
const char* tl_last_error(void);

// ---- runtime (csrc/torch/runtime.cpp) ----------------------------------------------------------------

// Versions as text, joined by '\n': libtorch, CUDA runtime, cuDNN, NCCL ("-" where absent).
int tl_versions(char* buffer, size_t capacity);
// out[0..4] = allocated, peak allocated, reserved, peak reserved bytes of the caching allocator.
int tl_cuda_memory(int device, int64_t out[4]);
int tl_cuda_reset_peak_memory(int device);
// Device name, compute capability, total memory in bytes.
int tl_cuda_device(int device, char* name, size_t capacity, int* major, int* minor, int64_t* total);
// State of the default generator of the CPU (device = -1) or of a CUDA device, as a new byte tensor in
// *out, which the caller owns.
int tl_rng_state(int device, TlTensor* out);
int tl_set_rng_state(int device, TlTensor state);
// TF32 for fp32 matrix products (torch.set_float32_matmul_precision("high")); deterministic algorithms.
int tl_set_math_mode(int allow_tf32, int deterministic);
// Attention kernels that scaled_dot_product_attention may pick from: bit 0 math, 1 flash, 2 efficient,
// 3 cuDNN.
int tl_set_sdp_backends(int mask);

// A copy of a CPU tensor in page-locked memory, as a new tensor in *out that the caller owns (tch's own
// pin_memory passes a deprecated argument and warns at each call).
int tl_pin_memory(TlTensor tensor, TlTensor* out);

// ---- optimizer (csrc/torch/optim.cpp -> csrc/optim/adamw.cu) -------------------------------------------

// One AdamW update of n tensors on one CUDA device, fp32 state, in place:
//   g' = g * clip;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2
//   p -= lr*wd*p + lr * (m / (1-b1^s)) / (sqrt(v / (1-b2^s)) + eps)
// where clip is a 0-dim fp32 tensor on the device. weight[i], where not null, receives p rounded to bf16.
// Where clip is not finite, nothing is written. The CPU does not wait.
int tl_adamw(int n, TlTensor* param, TlTensor* grad, TlTensor* exp_avg, TlTensor* exp_avg_sq,
             TlTensor* weight, TlTensor clip, double lr, double beta1, double beta2, double eps,
             double weight_decay, int64_t step);

#ifdef __cplusplus
}
#endif
