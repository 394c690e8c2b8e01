// What a linear layer needs beside its bf16 weight to compute in e4m3.
#pragma once
#include "matmul.h"
#include "tensors.h"

namespace tl {

struct Fp8Linear {
  at::Tensor weight, weight_t;  // e4m3 (O, C) and (C, O)
  at::Tensor scales;            // fp32 (2, 8): an Fp8Slot of the input and of the output's gradient
  at::Tensor weight_scale;      // fp32 (8,)

  bool on() const { return weight.defined(); }
  Fp8Slot* slot(int i) const { return reinterpret_cast<Fp8Slot*>(scales.data_ptr<float>()) + i; }
  Fp8Slot* input() const { return slot(0); }
  Fp8Slot* gradient() const { return slot(1); }
  Fp8Slot* own() const { return reinterpret_cast<Fp8Slot*>(weight_scale.data_ptr<float>()); }
};

// Reads and checks the four tensors of a layer (C ABI: an array of 4, or null: bf16).
Fp8Linear fp8_linear(const char* op, TlTensor* handles, const at::Tensor& x, int64_t inputs, int64_t outputs);

struct Casted {
  at::Tensor rows, transposed;  // e4m3 (N, C) and (C, N)
};

// Casts x (N, C) of bf16, or act of [gate | up] (N, 2C), in the orientations asked for.
Casted cast(const at::Tensor& x, Fp8Slot* slot, bool rows, bool transposed, bool note,
            Fp8Source source = Fp8Source::plain);
// The transposed e4m3 of RMSNorm's output, from what was normalised.
at::Tensor cast_norm_transposed(const at::Tensor& sum, const at::Tensor& weight, const at::Tensor& rstd,
                                Fp8Slot* slot);

// y (N, O), bf16, of x8 (N, C); the gradient dx (N, C), bf16, of dy8 (N, O).
void forward_product(const at::Tensor& y, const at::Tensor& x8, const Fp8Linear& layer);
at::Tensor input_gradient(const at::Tensor& dy8, const Fp8Linear& layer);
// dy^T x of dy8_t (O, N) and x8_t (C, N): added to `weight.grad` where that is a buffer, else returned in bf16.
at::Tensor weight_gradient_fp8(const at::Tensor& weight, const at::Tensor& dy8_t, const Fp8Slot* dy_slot,
                               const at::Tensor& x8_t, const Fp8Slot* x_slot);

}  // namespace tl
