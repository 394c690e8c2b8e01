// NF4 weights (nf4.cu) as a frozen linear layer.
//
//   y = x W^T,   dx = dy W
//
// W is made from its codes in x's type in the forward pass, and again in the backward pass: between the two the graph
// keeps handles on the codes and scales, which live anyway, and nothing of x, whose values dx does not need. W itself
// lives for one product: 2 O C bytes, which the next layer's takes again. Making it moves 2.6 O C bytes, the product
// does 2 N O C operations: by these figures 2 % of its time at N = 16,384 tokens on an H100, 15 % at 2,048.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "matmul.h"
#include "tensors.h"

namespace tl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Nf4Weight {
  at::Tensor codes, absmax, map, nested_absmax, nested_offset;  // the last three: undefined, or all there
  int64_t rows, columns;

  bool nested() const { return map.defined(); }
};

void check_part(const Argument& a, const at::Tensor& like, at::ScalarType type, at::IntArrayRef shape) {
  check_same_device(a, like);
  check_dtype(a, type);
  check_shape(a, shape);
  check_contiguous(a);
}

Nf4Weight weight_of(const char* op, const TlNf4& w) {
  auto part = [](TlTensor t) { return t ? tensor(t) : at::Tensor(); };
  Nf4Weight out{part(w.codes),         part(w.absmax), part(w.nested_map), part(w.nested_absmax),
                part(w.nested_offset), w.rows,         w.columns};
  TORCH_CHECK(w.rows > 0 && w.columns > 0, op, ": weight must be (O, C), got (", w.rows, ", ", w.columns, ")");
  const int64_t n = w.rows * w.columns, blocks = (n + 63) / 64;
  const Argument codes{op, "codes", out.codes};
  check_cuda(codes);
  check_part(codes, out.codes, at::kByte, {(n + 1) / 2});
  check_aligned(codes);
  check_part({op, "absmax", out.absmax}, out.codes, out.nested() ? at::kByte : at::kFloat, {blocks});
  if (out.nested()) {
    check_part({op, "nested_map", out.map}, out.codes, at::kFloat, {256});
    check_part({op, "nested_absmax", out.nested_absmax}, out.codes, at::kFloat, {(blocks + 255) / 256});
    check_part({op, "nested_offset", out.nested_offset}, out.codes, at::kFloat, {});
  }
  return out;
}

// (rows, columns) of this type, on the current stream.
at::Tensor dequantized(const Nf4Weight& w, at::ScalarType type) {
  const at::Tensor y = at::empty({w.rows, w.columns}, w.codes.options().dtype(type));
  Nf4Dequantize p{};
  p.type = type_of({"nf4", "type", y});
  p.n = y.numel();
  p.codes = w.codes.data_ptr(), p.absmax = w.absmax.data_ptr();
  if (w.nested()) {
    p.nested_map = w.map.data_ptr<float>();
    p.nested_absmax = w.nested_absmax.data_ptr<float>(), p.nested_offset = w.nested_offset.data_ptr<float>();
  }
  p.y = y.data_ptr();
  C10_CUDA_CHECK(nf4_dequantize(p, stream()));
  return y;
}

at::Tensor matrix(const at::Tensor& x) { return x.view({-1, x.size(-1)}); }

struct Nf4LinearFunction : torch::autograd::Function<Nf4LinearFunction> {
  // x (.., C) -> (.., O)
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const Nf4Weight& w) {
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    ctx->save_for_backward({w.codes, w.absmax, w.map, w.nested_absmax, w.nested_offset});
    ctx->saved_data["rows"] = w.rows;
    ctx->saved_data["columns"] = w.columns;
    auto shape = x.sizes().vec();
    shape.back() = w.rows;
    const at::Tensor y = at::empty(shape, x.options());  // not a view, as in linear.cpp
    product(matrix(y), matrix(x), dequantized(w, x.scalar_type()).t());
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const Nf4Weight w{s[0], s[1], s[2], s[3], s[4], ctx->saved_data["rows"].toInt(),
                      ctx->saved_data["columns"].toInt()};
    c10::cuda::OptionalCUDAGuard device(device_of(w.codes));
    const at::Tensor dy = block(grads[0]);
    auto shape = dy.sizes().vec();
    shape.back() = w.columns;
    return {product(matrix(dy), dequantized(w, dy.scalar_type())).view(shape), {}};
  }
};

}  // namespace
}  // namespace tl

extern "C" int tl_nf4_dequantize(const TlNf4* weight, int type, TlTensor* out) {
  using namespace tl;
  const char* op = "nf4_dequantize";
  TL_GUARD({
    const Nf4Weight w = weight_of(op, *weight);
    constexpr at::ScalarType types[] = {at::kFloat, at::kBFloat16, at::kHalf};
    TORCH_CHECK(type >= TL_FP32 && type <= TL_FP16, op, ": type must be 0 (fp32), 1 (bf16) or 2 (fp16), got ", type);
    c10::cuda::OptionalCUDAGuard device(device_of(w.codes));
    *out = give(dequantized(w, types[type]));
  });
}

extern "C" int tl_nf4_linear(TlTensor x, const TlNf4* weight, TlTensor* out) {
  using namespace tl;
  const char* op = "nf4_linear";
  TL_GUARD({
    auto& t = tensor(x);
    const Argument argument{op, "x", t};
    check_cuda(argument);
    type_of(argument);
    check_contiguous(argument);
    check_aligned(argument);
    const Nf4Weight w = weight_of(op, *weight);
    check_same_device({op, "codes", w.codes}, t);
    TORCH_CHECK(t.dim() >= 1 && t.size(-1) == w.columns, op, ": x must be (.., ", w.columns, "), got shape ",
                t.sizes());
    *out = give(Nf4LinearFunction::apply(t, w));
  });
}
