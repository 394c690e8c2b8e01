// RMSNorm, alone or with the residual addition before it, as an autograd function over csrc/rmsnorm.cu.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "norm.h"
#include "tensors.h"

namespace tl {

constexpr const char* OP = "rms_norm";

Normed rms_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps,
                Fp8Slot* slot) {
  check_cuda({OP, "x", x});
  const Type type = type_of({OP, "x", x});
  TORCH_CHECK(x.dim() >= 1, OP, ": x must have a last dimension to normalise");
  const int64_t c = x.size(-1), vector = type == Type::fp32 ? 4 : 8;
  TORCH_CHECK(c % vector == 0 && c <= rms_norm_max_columns(type), OP, ": the last dimension must be a multiple of ",
              vector, " of at most ", rms_norm_max_columns(type), ", got ", c);
  check_contiguous({OP, "x", x});
  check_aligned({OP, "x", x});
  check_block({OP, "weight", weight}, x, {c});
  if (residual.defined()) check_block({OP, "residual", residual}, x, x.sizes());

  const int64_t rows = x.numel() / c;
  Normed out;
  out.sum = residual.defined() ? at::empty_like(x) : x;
  out.rstd = at::empty({rows}, x.options().dtype(at::kFloat));
  out.y = slot ? at::empty(x.sizes(), x.options().dtype(at::kFloat8_e4m3fn)) : at::empty_like(x);
  C10_CUDA_CHECK(rms_norm_forward({type, rows, static_cast<int>(c), static_cast<float>(eps), x.data_ptr(),
                                   residual.defined() ? residual.data_ptr() : nullptr,
                                   residual.defined() ? out.sum.data_ptr() : nullptr, weight.data_ptr(),
                                   out.y.data_ptr(), out.rstd.data_ptr<float>(), slot},
                                  stream()));
  return out;
}

NormGradients rms_norm_gradients(const at::Tensor& dy, const at::Tensor& sum, const at::Tensor& weight,
                                 const at::Tensor& rstd, const at::Tensor& dsum) {
  const int64_t c = sum.size(-1), rows = sum.numel() / c;
  const int partial_rows = rms_norm_partial_rows(rows);
  at::Tensor dx = at::empty_like(sum), dweight = at::empty_like(weight);
  at::Tensor partial = at::empty({partial_rows, c}, sum.options().dtype(at::kFloat));
  C10_CUDA_CHECK(rms_norm_backward({type_of({OP, "x", sum}), rows, static_cast<int>(c), dy.data_ptr(),
                                    sum.data_ptr(), weight.data_ptr(), rstd.data_ptr<float>(),
                                    dsum.defined() ? dsum.data_ptr() : nullptr, dx.data_ptr(),
                                    partial.data_ptr<float>(), partial_rows, dweight.data_ptr()},
                                   stream()));
  return {dx, dweight};
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Saved: what was normalised, the weight, 1/rms of each row.
struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& addend,
                               const at::Tensor& weight, double eps) {
    const at::Tensor residual = addend.value_or(at::Tensor());
    check_cuda({OP, "x", x});
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    const Normed n = rms_norm(x, residual, weight, eps);
    ctx->save_for_backward({n.sum, weight, n.rstd});
    ctx->set_materialize_grads(false);
    ctx->saved_data["add"] = residual.defined();
    if (residual.defined()) return {n.y, n.sum};
    return {n.y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const bool add = ctx->saved_data["add"].toBool();
    if (!grads[0].defined()) return {add ? grads[1] : at::Tensor(), add ? grads[1] : at::Tensor(), {}, {}};
    c10::cuda::OptionalCUDAGuard device(device_of(s[0]));
    const at::Tensor dsum = add && grads[1].defined() ? block(grads[1]) : at::Tensor();
    const auto [dx, dweight] = rms_norm_gradients(block(grads[0]), s[0], s[1], s[2], dsum);
    return {dx, add ? dx : at::Tensor(), dweight, {}};
  }
};

}  // namespace
}  // namespace tl

extern "C" int tl_rms_norm(TlTensor x, TlTensor residual, TlTensor weight, double eps, TlTensor* y, TlTensor* sum) {
  TL_GUARD({
    auto r = tl::RmsNormFunction::apply(tl::tensor(x), tl::optional_tensor(residual), tl::tensor(weight), eps);
    *y = tl::give(r[0]);
    if (residual) *sum = tl::give(r[1]);
  });
}
