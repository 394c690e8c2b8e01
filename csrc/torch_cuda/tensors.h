// Checks that the wrappers share. Every message names the op and the argument, what was expected and what came.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "api.h"
#include "guard.h"
#include "kernels.h"

namespace tl {

inline at::Tensor& tensor(TlTensor handle) { return *static_cast<at::Tensor*>(handle); }
inline std::optional<at::Tensor> optional_tensor(TlTensor handle) {
  return handle ? std::make_optional(tensor(handle)) : std::nullopt;
}
inline TlTensor give(at::Tensor t) { return new at::Tensor(std::move(t)); }

// An argument of an op, for messages.
struct Argument {
  const char* op;
  const char* name;
  const at::Tensor& t;
};

inline void check_cuda(const Argument& a) {
  TORCH_CHECK(a.t.defined(), a.op, ": ", a.name, " is missing");
  TORCH_CHECK(a.t.is_cuda(), a.op, ": ", a.name, " must be on a CUDA device, got ", a.t.device());
  TORCH_CHECK(a.t.numel() > 0, a.op, ": ", a.name, " must not be empty, got shape ", a.t.sizes());
}
inline void check_same_device(const Argument& a, const at::Tensor& other) {
  check_cuda(a);
  TORCH_CHECK(a.t.device() == other.device(), a.op, ": ", a.name, " must be on ", other.device(), ", got ",
              a.t.device());
}
inline void check_dtype(const Argument& a, at::ScalarType type) {
  TORCH_CHECK(a.t.scalar_type() == type, a.op, ": ", a.name, " must be ", type, ", got ", a.t.scalar_type());
}
inline void check_shape(const Argument& a, at::IntArrayRef shape) {
  TORCH_CHECK(a.t.sizes() == shape, a.op, ": ", a.name, " must have shape ", shape, ", got ", a.t.sizes());
}
inline void check_contiguous(const Argument& a) {
  TORCH_CHECK(a.t.is_contiguous(), a.op, ": ", a.name, " must be contiguous, got strides ", a.t.strides(),
              " for shape ", a.t.sizes());
}
inline void check_aligned(const Argument& a) {
  const auto address = reinterpret_cast<uintptr_t>(a.t.data_ptr());
  TORCH_CHECK(address % 16 == 0, a.op, ": ", a.name, " must start at a multiple of 16 bytes, got offset ",
              address % 16);
}
// All of the above for a tensor that must lie as one block.
inline void check_block(const Argument& a, const at::Tensor& like, at::IntArrayRef shape) {
  check_same_device(a, like);
  check_dtype(a, like.scalar_type());
  check_shape(a, shape);
  check_contiguous(a);
  check_aligned(a);
}

// cos, sin (T, n) fp32 of rotary positions on x's device, n even and at most D, rows contiguous and alike.
inline void check_rotary_tables(const char* op, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                                int64_t t, int64_t head_size) {
  for (auto& a : {Argument{op, "cos", cos}, Argument{op, "sin", sin}}) {
    check_same_device(a, x);
    check_dtype(a, at::kFloat);
    TORCH_CHECK(a.t.dim() == 2 && a.t.size(0) == t && a.t.size(1) % 2 == 0 && a.t.size(1) <= head_size, op, ": ",
                a.name, " must be (T, n) with T = ", t, " and an even n of at most ", head_size, ", got ", a.t.sizes());
    TORCH_CHECK(a.t.stride(1) == 1 && a.t.stride(0) == cos.stride(0), op, ": ", a.name,
                " must have contiguous rows, got strides ", a.t.strides());
  }
  check_shape({op, "sin", sin}, cos.sizes());
}

inline Type type_of(const Argument& a) {
  switch (a.t.scalar_type()) {
    case at::kFloat: return Type::fp32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::fp16;
    default: TORCH_CHECK(false, a.op, ": ", a.name, " must be fp32, bf16 or fp16, got ", a.t.scalar_type());
  }
}

inline cudaStream_t stream() { return at::cuda::getCurrentCUDAStream(); }

// A gradient as a block: autograd may hand over an expanded or permuted one.
inline at::Tensor block(const at::Tensor& grad) {
  at::Tensor t = grad.contiguous();
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 ? t : t.clone();
}

}  // namespace tl
