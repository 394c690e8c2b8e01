// SwiGLU over csrc/swiglu.cu, and the whole LLaMA MLP as one autograd function.
//
//   y = (silu(x W1^T) * (x W2^T)) W3^T
//
// The MLP saves x, where its weights are trained, and the packed projection [gate | up]; the product silu(gate) * up is
// computed again in the backward pass. W1 and W2 that lie behind each other in memory are multiplied as one (2F, C)
// matrix.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mlp.h"
#include "tensors.h"

namespace tl {
namespace {

// gate_up must be (.., 2F).
void check_gate_up(const Argument& a) {
  check_cuda(a);
  const int64_t vector = type_of(a) == Type::fp32 ? 4 : 8;
  TORCH_CHECK(a.t.dim() >= 1 && a.t.size(-1) % (2 * vector) == 0, a.op, ": ", a.name,
              " must end in 2F values with F a multiple of ", vector, ", got shape ", a.t.sizes());
  check_contiguous(a);
  check_aligned(a);
}

}  // namespace

at::Tensor activate(const at::Tensor& gate_up) {
  auto shape = gate_up.sizes().vec();
  const int64_t f = shape.back() /= 2;
  at::Tensor act = at::empty(shape, gate_up.options());
  C10_CUDA_CHECK(swiglu_forward({type_of({"swiglu", "gate_up", gate_up}), act.numel() / f, f, gate_up.data_ptr(),
                                 act.data_ptr(), nullptr, nullptr},
                                stream()));
  return act;
}

at::Tensor activate_backward(const at::Tensor& gate_up, const at::Tensor& dact, void* act) {
  at::Tensor d = at::empty_like(gate_up);
  const int64_t f = gate_up.size(-1) / 2;
  C10_CUDA_CHECK(swiglu_backward({type_of({"swiglu", "gate_up", gate_up}), dact.numel() / f, f, gate_up.data_ptr(),
                                  act, dact.data_ptr(), d.data_ptr()},
                                 stream()));
  return d;
}

void gate_up_product(const at::Tensor& gate_up, const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2) {
  const int64_t f = w1.size(0);
  if (const at::Tensor w = joined(w1, w2); w.defined()) {
    product(gate_up, x, w.t());
  } else {
    product(gate_up.narrow(1, 0, f), x, w1.t());
    product(gate_up.narrow(1, f, f), x, w2.t());
  }
}

at::Tensor gate_up_input_gradient(const at::Tensor& dgate_up, const at::Tensor& w1, const at::Tensor& w2) {
  if (const at::Tensor w = joined(w1, w2); w.defined()) return product(dgate_up, w);
  const int64_t f = w1.size(0);
  at::Tensor dx = product(dgate_up.narrow(1, 0, f), w1);
  product(dx, dgate_up.narrow(1, f, f), w2, /*add=*/true);
  return dx;
}

std::pair<at::Tensor, at::Tensor> gate_up_weight_gradients(const at::Tensor& w1, const at::Tensor& w2,
                                                           const at::Tensor& dgate_up, const at::Tensor& x) {
  const int64_t f = w1.size(0);
  const at::Tensor sum1 = gradient_buffer(w1), sum2 = gradient_buffer(w2);
  if (const at::Tensor sum = joined(sum1, sum2); sum.defined()) {
    product(sum, dgate_up.t(), x, adds_to({sum1, sum2}));
    return {};
  }
  if (sum1.defined() || sum2.defined())
    return {weight_gradient(w1, dgate_up.narrow(1, 0, f), x), weight_gradient(w2, dgate_up.narrow(1, f, f), x)};
  const at::Tensor dw = product(dgate_up.t(), x);  // (2F, C)
  return {dw.narrow(0, 0, f), dw.narrow(0, f, f)};
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SwiGluFunction : torch::autograd::Function<SwiGluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_up) {
    check_gate_up({"swiglu", "gate_up", gate_up});
    c10::cuda::OptionalCUDAGuard device(device_of(gate_up));
    ctx->save_for_backward({gate_up});
    return activate(gate_up);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor gate_up = ctx->get_saved_variables()[0];
    c10::cuda::OptionalCUDAGuard device(device_of(gate_up));
    return {activate_backward(gate_up, block(grads[0]), nullptr)};
  }
};

struct MlpFunction : torch::autograd::Function<MlpFunction> {
  // x (N, C), w1 and w2 (F, C), w3 (C, F) -> (N, C)
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                            const at::Tensor& w3) {
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    const at::Tensor gate_up = at::empty({x.size(0), 2 * w1.size(0)}, x.options());
    gate_up_product(gate_up, x, w1, w2);
    const bool trained = w1.requires_grad() || w2.requires_grad();  // dx alone needs no value of x
    ctx->save_for_backward({trained ? x : at::Tensor(), w1, w2, w3, gate_up});
    return product(activate(gate_up), w3.t());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const at::Tensor &x = s[0], &w1 = s[1], &w2 = s[2], &w3 = s[3], &gate_up = s[4];
    c10::cuda::OptionalCUDAGuard device(device_of(gate_up));
    const at::Tensor dy = block(grads[0]);
    at::Tensor act = product(dy, w3);                                             // (N, F): dact, then act
    const at::Tensor dgate_up = activate_backward(gate_up, act, act.data_ptr());  // (N, 2F)
    const int64_t f = w1.size(0);
    at::Tensor dx, dw1, dw2, dw3;
    if (ctx->needs_input_grad(0)) dx = gate_up_input_gradient(dgate_up, w1, w2);
    if (ctx->needs_input_grad(1) && ctx->needs_input_grad(2)) {
      std::tie(dw1, dw2) = gate_up_weight_gradients(w1, w2, dgate_up, x);
    } else {
      if (ctx->needs_input_grad(1)) dw1 = weight_gradient(w1, dgate_up.narrow(1, 0, f), x);
      if (ctx->needs_input_grad(2)) dw2 = weight_gradient(w2, dgate_up.narrow(1, f, f), x);
    }
    if (ctx->needs_input_grad(3)) dw3 = weight_gradient(w3, dy, act);
    return {dx, dw1, dw2, dw3};
  }
};

}  // namespace
}  // namespace tl

extern "C" int tl_swiglu(TlTensor gate_up, TlTensor* out) {
  TL_GUARD(*out = tl::give(tl::SwiGluFunction::apply(tl::tensor(gate_up))));
}

extern "C" int tl_swiglu_mlp(TlTensor x, TlTensor fc_1, TlTensor fc_2, TlTensor proj, TlTensor* out) {
  const char* op = "swiglu_mlp";
  TL_GUARD({
    auto &t = tl::tensor(x), &w1 = tl::tensor(fc_1), &w2 = tl::tensor(fc_2), &w3 = tl::tensor(proj);
    tl::check_cuda({op, "x", t});
    const int64_t vector = tl::type_of({op, "x", t}) == tl::Type::fp32 ? 4 : 8;
    tl::check_contiguous({op, "x", t});
    TORCH_CHECK(t.dim() >= 1 && w1.dim() == 2 && w1.size(0) % vector == 0, op,
                ": fc_1 must be (F, C) with F a multiple of ", vector, ", got shape ", w1.sizes());
    const int64_t f = w1.size(0), c = t.size(-1);
    tl::check_block({op, "fc_1", w1}, t, {f, c});
    tl::check_block({op, "fc_2", w2}, t, {f, c});
    tl::check_block({op, "proj", w3}, t, {w3.dim() == 2 ? w3.size(0) : 0, f});
    auto shape = t.sizes().vec();
    shape.back() = w3.size(0);
    *out = tl::give(tl::MlpFunction::apply(t.view({-1, c}), w1, w2, w3).view(shape));
  });
}
