// Matrix products of the training step, by cuBLASLt with the algorithm that was fastest here, or by libtorch.
#pragma once
#include <ATen/core/Tensor.h>

#include "gradients.h"
#include "kernels.h"

namespace tl {

// out = a b, or out += a b. a (M, K) and b (K, N): bf16 or fp16, row-major or the transposed view of a row-major
// matrix; out (M, N): rows contiguous, their type or fp32. Sums in fp32. The CPU waits only while it searches.
void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add = false);

// a b as a new matrix in a's type.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

// out = a b^T, or out += a b^T, of e4m3 matrices a (M, K) and b (N, K), both row-major, sizes multiples of 16, with one
// factor each on the device; out (M, N) bf16 or fp32. Always by cuBLASLt.
void product_fp8(const at::Tensor& out, const at::Tensor& a, const Fp8Slot* a_slot, const at::Tensor& b,
                 const Fp8Slot* b_slot, bool add = false);

// The gradient dy^T x of `weight` (O, C), with dy (N, O) and x (N, C). Where weight.grad is a persistent fp32 buffer,
// the product is added to it, or overwrites it (gradients.h), and an undefined tensor returned, which autograd passes
// over; else it is returned.
at::Tensor weight_gradient(const at::Tensor& weight, const at::Tensor& dy, const at::Tensor& x);

// [a; b] as one view of twice the rows where b begins in memory where a ends; undefined otherwise. Either may be.
at::Tensor joined(const at::Tensor& a, const at::Tensor& b);

}  // namespace tl
