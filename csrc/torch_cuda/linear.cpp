// Linear layers without bias as autograd functions, alone or behind a norm, in 16 bits or in fp8.
//
//   linear       y = x W^T
//   norm_linear  y = rms_norm(x + residual) W^T,  and the sum x + residual
//   norm_mlp     y = (silu(h W1^T) * (h W2^T)) W3^T of h = rms_norm(x + residual),  and the sum
//
// As libtorch's, but that the weight's gradient is added to a persistent fp32 buffer by the product itself
// (matmul.h), and that the functions with a norm keep the sum and 1/rms only: the norm's output, which the weight's
// gradient needs, is computed again in the backward pass (2 C bytes a token less for each). For weights without a
// gradient, beside adapters, nothing is kept or computed. In fp8 (fp8.h) every product is of e4m3 casts of x, W and dy;
// what is kept stays bf16.
#include <torch/csrc/autograd/custom_function.h>

#include "fp8.h"
#include "mlp.h"
#include "norm.h"
#include "tensors.h"

namespace tl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x (.., C) as (N, C), and an empty result (.., O): autograd must not see a result that is a view, on which RoPE, in
// place, would cost copies of the whole gradient.
at::Tensor matrix(const at::Tensor& x) { return x.view({-1, x.size(-1)}); }
at::Tensor empty_result(const at::Tensor& x, int64_t outputs) {
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  return at::empty(shape, x.options());
}

// Tensors of an fp8 layer in the list that autograd keeps, from `at` on.
void save(variable_list& list, const Fp8Linear& l) {
  for (auto& t : {l.weight, l.weight_t, l.scales, l.weight_scale}) list.push_back(t);
}
Fp8Linear saved(const variable_list& list, size_t at) { return {list[at], list[at + 1], list[at + 2], list[at + 3]}; }

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  // x (.., C), weight (O, C) -> (.., O)
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const Fp8Linear& fp8) {
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    variable_list keep{weight.requires_grad() ? x : at::Tensor(), weight};  // dx alone needs no value of x
    save(keep, fp8);
    ctx->save_for_backward(keep);
    at::Tensor y = empty_result(x, weight.size(0));
    if (fp8.on())
      forward_product(matrix(y), cast(matrix(x), fp8.input(), true, false, true).rows, fp8);
    else
      product(matrix(y), matrix(x), weight.t());
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const at::Tensor &x = s[0], &weight = s[1];
    const Fp8Linear fp8 = saved(s, 2);
    c10::cuda::OptionalCUDAGuard device(device_of(weight));
    const at::Tensor dy = matrix(block(grads[0]));
    at::Tensor dx, dw;
    if (fp8.on()) {
      const Casted d = cast(dy, fp8.gradient(), true, true, true);
      dx = input_gradient(d.rows, fp8);
      const Casted x8 = cast(matrix(x), fp8.input(), false, true, false);  // trained: adapters are refused in fp8
      dw = weight_gradient_fp8(weight, d.transposed, fp8.gradient(), x8.transposed, fp8.input());
    } else {
      if (ctx->needs_input_grad(0)) dx = product(dy, weight);
      if (ctx->needs_input_grad(1)) dw = weight_gradient(weight, dy, matrix(x));
    }
    auto shape = grads[0].sizes().vec();
    shape.back() = weight.size(1);
    return {dx.defined() ? dx.view(shape) : dx, dw, {}};
  }
};

// Gradients of x, the residual and the norm's weight, given that of the norm's output and what reached the sum by
// another way.
variable_list norm_backward(const at::Tensor& dy, const at::Tensor& sum, const at::Tensor& weight,
                            const at::Tensor& rstd, const at::Tensor& dsum, bool add) {
  const auto [dx, dweight] =
      rms_norm_gradients(dy.view(sum.sizes()), sum, weight, rstd, dsum.defined() ? block(dsum) : at::Tensor());
  return {dx, add ? dx : at::Tensor(), dweight};
}

struct NormLinearFunction : torch::autograd::Function<NormLinearFunction> {
  // x, residual (.., C), norm (C,), weight (O, C) -> (.., O) and, where there is a residual, the sum (.., C)
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& residual,
                               const at::Tensor& norm, double eps, const at::Tensor& weight, const Fp8Linear& fp8) {
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    const Normed n =
        rms_norm(x, residual.value_or(at::Tensor()), norm, eps, fp8.on() ? fp8.input() : nullptr);
    variable_list keep{n.sum, n.rstd, norm, weight};
    save(keep, fp8);
    ctx->save_for_backward(keep);
    ctx->set_materialize_grads(false);
    ctx->saved_data["add"] = residual.has_value();
    ctx->saved_data["eps"] = eps;
    at::Tensor y = empty_result(x, weight.size(0));
    if (fp8.on())
      forward_product(matrix(y), matrix(n.y), fp8);
    else
      product(matrix(y), matrix(n.y), weight.t());
    if (residual) return {y, n.sum};
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const at::Tensor &sum = s[0], &rstd = s[1], &norm = s[2], &weight = s[3];
    const Fp8Linear fp8 = saved(s, 4);
    const bool add = ctx->saved_data["add"].toBool();
    const at::Tensor dsum = add ? grads[1] : at::Tensor();
    if (!grads[0].defined()) return {dsum, dsum, {}, {}, {}, {}};
    c10::cuda::OptionalCUDAGuard device(device_of(sum));
    const at::Tensor dy = matrix(block(grads[0]));
    at::Tensor dh, dw;
    if (fp8.on()) {
      const Casted d = cast(dy, fp8.gradient(), true, true, true);
      dh = input_gradient(d.rows, fp8);
      const at::Tensor h_t = cast_norm_transposed(sum, norm, rstd, fp8.input());
      dw = weight_gradient_fp8(weight, d.transposed, fp8.gradient(), h_t, fp8.input());
    } else {
      dh = product(dy, weight);
      if (weight.requires_grad()) {
        const at::Tensor h = matrix(rms_norm(sum, {}, norm, ctx->saved_data["eps"].toDouble()).y);
        dw = weight_gradient(weight, dy, h);
      }
    }
    const auto n = norm_backward(dh, sum, norm, rstd, dsum, add);
    return {n[0], n[1], n[2], {}, dw, {}};
  }
};

struct NormMlpFunction : torch::autograd::Function<NormMlpFunction> {
  // x, residual (.., C), norm (C,), w1 and w2 (F, C), w3 (C, F) -> (.., C) and, with a residual, the sum (.., C)
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const std::optional<at::Tensor>& residual,
                               const at::Tensor& norm, double eps, const at::Tensor& w1, const at::Tensor& w2,
                               const at::Tensor& w3, const Fp8Linear& gate_up8, const Fp8Linear& down8) {
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    const bool fp8 = gate_up8.on();
    const Normed n = rms_norm(x, residual.value_or(at::Tensor()), norm, eps, fp8 ? gate_up8.input() : nullptr);
    const at::Tensor h = matrix(n.y);
    const at::Tensor gate_up = at::empty({h.size(0), 2 * w1.size(0)}, x.options());  // (N, 2F)
    if (fp8)
      forward_product(gate_up, h, gate_up8);
    else
      gate_up_product(gate_up, h, w1, w2);
    variable_list keep{n.sum, n.rstd, norm, w1, w2, w3, gate_up};
    save(keep, gate_up8);
    save(keep, down8);
    ctx->save_for_backward(keep);
    ctx->set_materialize_grads(false);
    ctx->saved_data["add"] = residual.has_value();
    ctx->saved_data["eps"] = eps;
    at::Tensor y = empty_result(x, w3.size(0));
    if (fp8)
      forward_product(matrix(y), cast(gate_up, down8.input(), true, false, true, Fp8Source::act).rows, down8);
    else
      product(matrix(y), activate(gate_up), w3.t());
    if (residual) return {y, n.sum};
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const at::Tensor &sum = s[0], &rstd = s[1], &norm = s[2], &w1 = s[3], &w2 = s[4], &w3 = s[5], &gate_up = s[6];
    const Fp8Linear gate_up8 = saved(s, 7), down8 = saved(s, 11);
    const bool add = ctx->saved_data["add"].toBool();
    const at::Tensor dsum = add ? grads[1] : at::Tensor();
    if (!grads[0].defined()) return {dsum, dsum, {}, {}, {}, {}, {}, {}, {}};
    c10::cuda::OptionalCUDAGuard device(device_of(sum));
    const at::Tensor dy = matrix(block(grads[0]));
    const double eps = ctx->saved_data["eps"].toDouble();
    at::Tensor dh, dw1, dw2, dw3;
    if (gate_up8.on()) {
      dh = backward_fp8(dy, s, gate_up8, down8, dw1, dw2, dw3);
    } else {
      at::Tensor act = product(dy, w3);                                             // (N, F): dact, then act
      const at::Tensor dgate_up = activate_backward(gate_up, act, act.data_ptr());  // (N, 2F)
      if (w3.requires_grad()) dw3 = weight_gradient(w3, dy, act);
      act.reset();
      dh = gate_up_input_gradient(dgate_up, w1, w2);
      if (w1.requires_grad() || w2.requires_grad()) {
        const at::Tensor h = matrix(rms_norm(sum, {}, norm, eps).y);
        std::tie(dw1, dw2) = gate_up_weight_gradients(w1, w2, dgate_up, h);
      }
    }
    const auto n = norm_backward(dh, sum, norm, rstd, dsum, add);
    return {n[0], n[1], n[2], {}, dw1, dw2, dw3, {}, {}};
  }

 private:
  // dh; the weights' gradients.
  static at::Tensor backward_fp8(const at::Tensor& dy, const variable_list& s, const Fp8Linear& gate_up8,
                                 const Fp8Linear& down8, at::Tensor& dw1, at::Tensor& dw2, at::Tensor& dw3) {
    const at::Tensor &sum = s[0], &rstd = s[1], &norm = s[2], &w1 = s[3], &w2 = s[4], &w3 = s[5], &gate_up = s[6];
    const int64_t n = gate_up.size(0), f = gate_up.size(1) / 2;
    const Casted d = cast(dy, down8.gradient(), true, true, true);
    const at::Tensor dact = input_gradient(d.rows, down8);  // (N, F)
    const auto fp8 = dact.options().dtype(at::kFloat8_e4m3fn);
    at::Tensor dgate_up = at::empty({n, 2 * f}, fp8), dgate_up_t = at::empty({2 * f, n}, fp8);
    at::Tensor act_t = at::empty({f, n}, fp8);
    auto data = [](const at::Tensor& t) { return static_cast<uint8_t*>(t.data_ptr()); };
    C10_CUDA_CHECK(fp8_swiglu_backward({n, static_cast<int>(f), gate_up.data_ptr(), dact.data_ptr(), data(dgate_up),
                                        data(dgate_up_t), data(act_t), gate_up8.gradient(), down8.input()},
                                       stream()));
    dw3 = weight_gradient_fp8(w3, d.transposed, down8.gradient(), act_t, down8.input());
    const at::Tensor h_t = cast_norm_transposed(sum, norm, rstd, gate_up8.input());  // (C, N)
    const at::Tensor sum1 = gradient_buffer(w1), sum2 = gradient_buffer(w2), sum12 = joined(sum1, sum2);  // (2F, C)
    at::Tensor dw = sum12.defined() ? sum12 : at::empty({2 * f, sum.size(-1)}, w1.options());
    const bool add = sum12.defined() && adds_to({sum1, sum2});
    product_fp8(dw, dgate_up_t, gate_up8.gradient(), h_t, gate_up8.input(), add);
    if (!sum12.defined()) {
      dw1 = dw.narrow(0, 0, f);
      dw2 = dw.narrow(0, f, f);
    }
    return input_gradient(dgate_up, gate_up8);
  }
};

// Checks x (.., C) and weight (O, C).
void check_linear(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  check_cuda({op, "x", x});
  type_of({op, "x", x});
  check_contiguous({op, "x", x});
  check_aligned({op, "x", x});
  TORCH_CHECK(x.dim() >= 1, op, ": x must be (.., C), got shape ", x.sizes());
  check_block({op, "weight", weight}, x, {weight.dim() == 2 ? weight.size(0) : 0, x.size(-1)});
}

}  // namespace
}  // namespace tl

extern "C" int tl_linear(TlTensor x, TlTensor weight, TlTensor* fp8, TlTensor* out) {
  using namespace tl;
  const char* op = "linear";
  TL_GUARD({
    auto &t = tensor(x), &w = tensor(weight);
    check_linear(op, t, w);
    *out = give(LinearFunction::apply(t, w, fp8_linear(op, fp8, t, w.size(1), w.size(0))));
  });
}

extern "C" int tl_norm_linear(TlTensor x, TlTensor residual, TlTensor norm, double eps, TlTensor weight, TlTensor* fp8,
                              TlTensor* out, TlTensor* sum) {
  using namespace tl;
  const char* op = "norm_linear";
  TL_GUARD({
    auto &t = tensor(x), &w = tensor(weight);
    check_linear(op, t, w);
    const Fp8Linear layer = fp8_linear(op, fp8, t, w.size(1), w.size(0));
    const auto r = NormLinearFunction::apply(t, optional_tensor(residual), tensor(norm), eps, w, layer);
    *out = give(r[0]);
    if (residual) *sum = give(r[1]);
  });
}

extern "C" int tl_norm_mlp(TlTensor x, TlTensor residual, TlTensor norm, double eps, TlTensor fc_1, TlTensor fc_2,
                           TlTensor proj, TlTensor* fp8_gate_up, TlTensor* fp8_down, TlTensor* out, TlTensor* sum) {
  using namespace tl;
  const char* op = "norm_mlp";
  TL_GUARD({
    auto &t = tensor(x), &w1 = tensor(fc_1), &w2 = tensor(fc_2), &w3 = tensor(proj);
    check_linear(op, t, w1);
    const int64_t f = w1.size(0), c = t.size(-1);
    TORCH_CHECK(f % 8 == 0, op, ": fc_1 must be (F, C) with F a multiple of 8, got shape ", w1.sizes());
    check_block({op, "fc_2", w2}, t, {f, c});
    check_block({op, "proj", w3}, t, {w3.dim() == 2 ? w3.size(0) : 0, f});
    const Fp8Linear gate_up = fp8_linear(op, fp8_gate_up, t, c, 2 * f);
    const Fp8Linear down = fp8_linear(op, fp8_down, t, f, w3.size(0));
    TORCH_CHECK(gate_up.on() == down.on(), op, ": both layers in fp8, or none");
    const auto r = NormMlpFunction::apply(t, optional_tensor(residual), tensor(norm), eps, w1, w2, w3, gate_up, down);
    *out = give(r[0]);
    if (residual) *sum = give(r[1]);
  });
}
