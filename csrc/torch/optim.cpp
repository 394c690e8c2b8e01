// Checks the tensors of one optimizer step and launches csrc/adamw.cu on libtorch's current stream.
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "tensors.h"

static float* fp32(TlTensor handle, const at::Tensor& like, const char* what, int i) {
  auto& t = tl::tensor(handle);
  TORCH_CHECK(t.defined() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.device() == like.device() &&
                  t.numel() == like.numel(),
              "adamw: ", what, "[", i, "] must be contiguous fp32 of ", like.numel(), " elements on ", like.device(),
              ", got ", t.scalar_type(), " of ", t.numel(), " on ", t.device());
  tl::check_aligned({"adamw", what, t});
  return t.data_ptr<float>();
}

extern "C" int tl_adamw(int n, TlTensor* param, TlTensor* grad, TlTensor* exp_avg, TlTensor* exp_avg_sq,
                        TlTensor* weight, TlTensor clip, double lr, double beta1, double beta2, double eps,
                        double weight_decay, int64_t step, int clear_grad) {
  TL_GUARD({
    auto& scale = tl::tensor(clip);
    TORCH_CHECK(scale.is_cuda() && scale.scalar_type() == at::kFloat && scale.numel() == 1,
                "adamw: clip must be one fp32 number on a CUDA device, got ", scale.scalar_type(), " ",
                scale.sizes(), " on ", scale.device());
    c10::cuda::CUDAGuard device(scale.device());
    tl::AdamWConfig c{};
    c.lr = static_cast<float>(lr);
    c.beta1 = static_cast<float>(beta1);
    c.beta2 = static_cast<float>(beta2);
    c.eps = static_cast<float>(eps);
    c.decay = static_cast<float>(1.0 - lr * weight_decay);
    c.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step))));
    c.inv_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step))));
    c.clear_grad = clear_grad != 0;
    std::vector<tl::AdamWTensor> list(n);
    for (int i = 0; i < n; ++i) {
      auto& p = tl::tensor(param[i]);
      void* w = nullptr;
      if (weight[i]) {
        auto& t = tl::tensor(weight[i]);
        TORCH_CHECK(t.scalar_type() == at::kBFloat16 && t.is_contiguous() && t.numel() == p.numel() &&
                        t.device() == p.device(),
                    "adamw: weight[", i, "] must be contiguous bf16 of ", p.numel(), " elements on ", p.device(),
                    ", got ", t.scalar_type(), " of ", t.numel(), " on ", t.device());
        tl::check_aligned({"adamw", "weight", t});
        w = t.data_ptr();
      }
      TORCH_CHECK(p.device() == scale.device(), "adamw: param[", i, "] must be on ", scale.device(), ", got ",
                  p.device());
      list[i] = {fp32(param[i], p, "param", i), fp32(grad[i], p, "grad", i), fp32(exp_avg[i], p, "exp_avg", i),
                 fp32(exp_avg_sq[i], p, "exp_avg_sq", i), w, p.numel()};
    }
    C10_CUDA_CHECK(tl::adamw(list.data(), n, scale.data_ptr<float>(), c, tl::stream()));
  });
}

extern "C" int tl_grad_norm(int n, TlTensor* grad, double max_norm, TlTensor* norm, TlTensor* clip) {
  const char* op = "grad_norm";
  TL_GUARD({
    TORCH_CHECK(n > 0, op, ": no gradients");
    TORCH_CHECK(max_norm > 0, op, ": max_norm must be positive, got ", max_norm);
    auto& first = tl::tensor(grad[0]);
    tl::check_cuda({op, "grad[0]", first});
    c10::cuda::CUDAGuard device(first.device());
    std::vector<tl::NormTensor> list(n);
    for (int i = 0; i < n; ++i) {
      tl::Argument a{op, "grad", tl::tensor(grad[i])};
      tl::check_same_device(a, first);
      tl::check_contiguous(a);
      tl::check_aligned(a);
      list[i] = {a.t.data_ptr(), a.t.numel(), tl::type_of(a)};
    }
    const auto fp32 = first.options().dtype(at::kFloat);
    at::Tensor partial = at::empty({tl::kNormBlocks}, fp32), x = at::empty({}, fp32), c = at::empty({}, fp32);
    C10_CUDA_CHECK(tl::grad_norm(list.data(), n, static_cast<float>(max_norm), partial.data_ptr<float>(),
                                 x.data_ptr<float>(), c.data_ptr<float>(), tl::stream()));
    *norm = tl::give(x);
    *clip = tl::give(c);
  });
}
