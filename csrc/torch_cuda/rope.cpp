// Rotary embedding on a packed projection, in place but for its gradient, as an autograd function over csrc/rope.cu.
#include <ATen/ops/clone.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "tensors.h"

namespace tl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
constexpr const char* OP = "rope";

// to, from (B, T, heads D): turns the first `rotated` heads; the others are copied where `to` is not `from`.
void turn(const at::Tensor& to, const at::Tensor& from, const at::Tensor& cos, const at::Tensor& sin,
          int64_t rotated, int64_t head_size, bool backward) {
  c10::cuda::OptionalCUDAGuard device(device_of(to));
  const int64_t all = to.is_same(from) ? rotated : to.size(2) / head_size;
  C10_CUDA_CHECK(rope({type_of({OP, "x", to}), to.size(0) * to.size(1), to.size(1), static_cast<int>(rotated),
                       static_cast<int>(all), static_cast<int>(head_size), static_cast<int>(cos.size(1)), to.size(2),
                       head_size, cos.stride(0), cos.data_ptr<float>(), sin.data_ptr<float>(), to.data_ptr(),
                       from.data_ptr(), backward},
                      stream()));
}

struct RopeFunction : torch::autograd::Function<RopeFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                            int64_t rotated, int64_t head_size) {
    ctx->mark_dirty({x});
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["rotated"] = rotated;
    ctx->saved_data["head_size"] = head_size;
    turn(x, x, cos, sin, rotated, head_size, false);
    return x;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const int64_t rotated = ctx->saved_data["rotated"].toInt(), head_size = ctx->saved_data["head_size"].toInt();
    const at::Tensor dy = grads[0].contiguous();
    const bool whole_heads = s[0].size(1) == head_size;  // else the kernel leaves the rest of a head as it is
    const at::Tensor dx = whole_heads ? at::empty_like(dy) : dy.clone();
    turn(dx, whole_heads ? dy : dx, s[0], s[1], rotated, head_size, true);
    return {dx, {}, {}, {}, {}};
  }
};

}  // namespace
}  // namespace tl

extern "C" int tl_rope(TlTensor x, TlTensor cos, TlTensor sin, int64_t heads, int64_t head_size,
                       TlTensor* out) {
  using tl::OP;
  TL_GUARD({
    auto &t = tl::tensor(x), &c = tl::tensor(cos), &s = tl::tensor(sin);
    tl::check_cuda({OP, "x", t});
    tl::type_of({OP, "x", t});
    TORCH_CHECK(t.dim() == 3 && head_size > 0 && t.size(2) % head_size == 0, OP,
                ": x must be (B, T, heads D) with D = ", head_size, ", got shape ", t.sizes());
    tl::check_contiguous({OP, "x", t});
    TORCH_CHECK(heads > 0 && heads <= t.size(2) / head_size, OP, ": cannot rotate ", heads, " of ",
                t.size(2) / head_size, " heads");
    tl::check_rotary_tables(OP, t, c, s, t.size(1), head_size);
    *out = tl::give(tl::RopeFunction::apply(t, c, s, heads, head_size));
  });
}
