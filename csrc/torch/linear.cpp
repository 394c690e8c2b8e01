// nn.Linear without bias as an autograd function: as libtorch's, but that the weight's gradient is added to a
// persistent fp32 buffer by the product itself (matmul.h).
#include <torch/csrc/autograd/custom_function.h>

#include "matmul.h"
#include "tensors.h"

namespace tl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  // x (N, C), weight (O, C) -> (N, O)
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight) {
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    ctx->save_for_backward({x, weight});
    return product(x, weight.t());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const at::Tensor &x = s[0], &weight = s[1];
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    const at::Tensor dy = block(grads[0]);
    at::Tensor dx, dw;
    if (ctx->needs_input_grad(0)) dx = product(dy, weight);
    if (ctx->needs_input_grad(1)) dw = weight_gradient(weight, dy, x);
    return {dx, dw};
  }
};

}  // namespace
}  // namespace tl

extern "C" int tl_linear(TlTensor x, TlTensor weight, TlTensor* out) {
  const char* op = "linear";
  TL_GUARD({
    auto &t = tl::tensor(x), &w = tl::tensor(weight);
    tl::check_cuda({op, "x", t});
    tl::type_of({op, "x", t});
    tl::check_contiguous({op, "x", t});
    tl::check_aligned({op, "x", t});
    TORCH_CHECK(t.dim() >= 1, op, ": x must be (.., C), got shape ", t.sizes());
    const int64_t c = t.size(-1);
    tl::check_block({op, "weight", w}, t, {w.dim() == 2 ? w.size(0) : 0, c});
    auto shape = t.sizes().vec();
    shape.back() = w.size(0);
    *out = tl::give(tl::LinearFunction::apply(t.view({-1, c}), w).view(shape));
  });
}
