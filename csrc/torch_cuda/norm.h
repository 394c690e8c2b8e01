// RMSNorm without autograd, for functions that contain it.
#pragma once
#include "tensors.h"

namespace tl {

struct Normed {
  at::Tensor y, sum, rstd;  // the result; what was normalised, x + residual; fp32 1/rms of each row
};
// x (.., C), residual of x's shape or undefined, weight (C,). With a slot y is e4m3.
Normed rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps,
                Fp8Slot* slot = nullptr);

struct NormGradients {
  at::Tensor dx, dweight;  // dx is the gradient of x and of the residual alike
};
// dy of y's shape; dsum: the gradient that reached the sum by another way, or undefined.
NormGradients rms_norm_gradients(const at::Tensor& dy, const at::Tensor& sum, const at::Tensor& weight,
                                 const at::Tensor& rstd, const at::Tensor& dsum);

}  // namespace tl
