// Cross-entropy with its gradient, alone or fused with the head, over csrc/cross_entropy.cu.
//
// The loss of a model is nearly always differentiated, so the forward pass computes the gradient too. It is right
// for a gradient of 1 of the loss; another one (a device number, which the CPU does not read) multiplies it in the
// backward pass by a kernel that returns at once where the number is 1.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>

#include "matmul.h"
#include "tensors.h"

namespace tl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
constexpr int64_t IGNORE = -100;

void check_target(const char* op, const at::Tensor& target, const at::Tensor& like, int64_t rows) {
  check_same_device({op, "target", target}, like);
  check_dtype({op, "target", target}, at::kLong);
  check_contiguous({op, "target", target});
  TORCH_CHECK(target.numel() == rows, op, ": target must have one id a row (", rows, "), got ", target.numel());
}
void check_scalars(const char* op, double scale, double label_smoothing, double z_loss) {
  TORCH_CHECK(std::isfinite(scale), op, ": scale must be finite, got ", scale);
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing < 1, op, ": label_smoothing must be in [0, 1), got ",
              label_smoothing);
  TORCH_CHECK(z_loss >= 0 && std::isfinite(z_loss), op, ": z_loss must not be negative, got ", z_loss);
}

// Multiplies saved gradients by the gradient of the loss, in place, once.
void multiply(AutogradContext* ctx, const char* op, const at::Tensor& factor, std::initializer_list<at::Tensor> list) {
  TORCH_CHECK(!ctx->saved_data.count("used"), op, ": backward can run once; compute the loss again");
  ctx->saved_data["used"] = true;
  const at::Tensor f = factor.to(at::kFloat).contiguous();
  for (auto& t : list)
    if (t.defined())
      C10_CUDA_CHECK(scale_by({type_of({op, "gradient", t}), t.numel(), t.data_ptr(), f.data_ptr<float>()}, stream()));
}

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  // logits (N, V), which become their gradient; target (N,) -> ()
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& target, double scale,
                            double label_smoothing, double z_loss) {
    c10::cuda::OptionalCUDAGuard device(device_of(logits));
    at::Tensor loss = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
    C10_CUDA_CHECK(cross_entropy({type_of({"cross_entropy", "logits", logits}), logits.size(0), logits.size(1),
                                  logits.data_ptr(), target.data_ptr<int64_t>(), IGNORE, static_cast<float>(scale),
                                  static_cast<float>(label_smoothing), static_cast<float>(z_loss),
                                  loss.data_ptr<float>()},
                                 stream()));
    ctx->save_for_backward({logits.detach()});
    return loss.sum();
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor d = ctx->get_saved_variables()[0];
    c10::cuda::OptionalCUDAGuard device(device_of(d));
    multiply(ctx, "cross_entropy", grads[0], {d});
    return {d, {}, {}, {}, {}};
  }
};

struct HeadLossFunction : torch::autograd::Function<HeadLossFunction> {
  // x (N, C), weight (V, C), target (N,) -> (); logits exist for a chunk of rows at a time, in x's dtype
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& target, int64_t chunks, double scale, double label_smoothing,
                            double z_loss, bool need_dx, bool need_dw) {
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    const Type type = type_of({"head_loss", "x", x});
    const int64_t n = x.size(0), v = weight.size(0);
    const int64_t rows = (n + chunks - 1) / chunks;
    at::Tensor logits = at::empty({rows, v}, x.options());
    at::Tensor loss = at::empty({n}, x.options().dtype(at::kFloat));
    at::Tensor dx = need_dx ? at::empty_like(x) : at::Tensor();
    at::Tensor dw = need_dw ? at::empty(weight.sizes(), x.options().dtype(at::kFloat)) : at::Tensor();
    for (int64_t start = 0; start < n; start += rows) {
      const int64_t count = std::min(rows, n - start);
      const at::Tensor part = x.narrow(0, start, count);
      at::Tensor l = logits.narrow(0, 0, count);
      product(l, part, weight.t());
      C10_CUDA_CHECK(cross_entropy({type, count, v, l.data_ptr(), target.data_ptr<int64_t>() + start, IGNORE,
                                    static_cast<float>(scale), static_cast<float>(label_smoothing),
                                    static_cast<float>(z_loss), loss.data_ptr<float>() + start},
                                   stream()));
      if (need_dx) product(dx.narrow(0, start, count), l, weight);
      if (need_dw) product(dw, l.t(), part, /*add=*/start > 0);
    }
    ctx->save_for_backward({weight, dx, dw});
    return loss.sum();
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    c10::cuda::OptionalCUDAGuard device(device_of(grads[0]));
    const at::Tensor &weight = s[0], &dx = s[1];
    at::Tensor dw = s[2];
    multiply(ctx, "head_loss", grads[0], {dx, dw});
    if (dw.defined()) {
      const at::Tensor sum = gradient_buffer(weight);
      if (sum.defined() && adds_to({sum})) sum.add_(dw);
      else if (sum.defined()) sum.copy_(dw);
      dw = sum.defined() ? at::Tensor() : dw.to(weight.scalar_type());
    }
    return {dx, dw, {}, {}, {}, {}, {}, {}, {}};
  }
};

}  // namespace
}  // namespace tl

extern "C" int tl_cross_entropy(TlTensor logits, TlTensor target, double scale, double label_smoothing, double z_loss,
                                TlTensor* loss) {
  const char* op = "cross_entropy";
  TL_GUARD({
    auto &l = tl::tensor(logits), &t = tl::tensor(target);
    tl::check_cuda({op, "logits", l});
    tl::type_of({op, "logits", l});
    TORCH_CHECK(l.dim() == 2, op, ": logits must be (N, V), got shape ", l.sizes());
    TORCH_CHECK(l.size(1) < (1ll << 31), op, ": logits must have V below 2^31, got ", l.size(1));
    tl::check_contiguous({op, "logits", l});
    tl::check_target(op, t, l, l.size(0));
    tl::check_scalars(op, scale, label_smoothing, z_loss);
    *loss = tl::give(tl::CrossEntropyFunction::apply(l, t, scale, label_smoothing, z_loss));
  });
}

extern "C" int tl_head_loss(TlTensor x, TlTensor weight, TlTensor target, int64_t chunks, double scale,
                            double label_smoothing, double z_loss, TlTensor* loss) {
  const char* op = "head_loss";
  TL_GUARD({
    auto &h = tl::tensor(x), &w = tl::tensor(weight), &t = tl::tensor(target);
    tl::check_cuda({op, "x", h});
    tl::type_of({op, "x", h});
    TORCH_CHECK(h.dim() == 2, op, ": x must be (N, C), got shape ", h.sizes());
    tl::check_contiguous({op, "x", h});
    tl::check_block({op, "weight", w}, h, {w.dim() == 2 ? w.size(0) : 0, h.size(1)});
    TORCH_CHECK(w.size(0) < (1ll << 31), op, ": weight must have V below 2^31 rows, got ", w.size(0));
    tl::check_target(op, t, h, h.size(0));
    tl::check_scalars(op, scale, label_smoothing, z_loss);
    TORCH_CHECK(chunks >= 1, op, ": chunks must be at least 1, got ", chunks);
    const bool grad = at::GradMode::is_enabled();
    *loss = tl::give(tl::HeadLossFunction::apply(h, w, t, chunks, scale, label_smoothing, z_loss,
                                                 grad && h.requires_grad(), grad && w.requires_grad()));
  });
}
