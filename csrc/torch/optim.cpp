// Checks the tensors of one optimizer step and launches csrc/optim/adamw.cu on libtorch's current stream.
#include <ATen/core/Tensor.h>
#ifdef TL_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#endif
#include <cmath>

#include "api.h"
#include "guard.h"
#include "optim/adamw.h"

#ifdef TL_WITH_CUDA
static float* fp32(TlTensor handle, const at::Tensor& like, const char* what, int i) {
  auto& t = *static_cast<at::Tensor*>(handle);
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.device() == like.device() &&
                  t.numel() == like.numel(),
              "adamw: ", what, "[", i, "] must be contiguous fp32 of ", like.numel(), " elements on ",
              like.device(), ", got ", t.scalar_type(), " of ", t.numel(), " on ", t.device());
  return t.data_ptr<float>();
}

extern "C" int tl_adamw(int n, TlTensor* param, TlTensor* grad, TlTensor* exp_avg, TlTensor* exp_avg_sq,
                        TlTensor* weight, TlTensor clip, double lr, double beta1, double beta2, double eps,
                        double weight_decay, int64_t step) {
  TL_GUARD({
    auto& scale = *static_cast<at::Tensor*>(clip);
    TORCH_CHECK(scale.is_cuda() && scale.scalar_type() == at::kFloat && scale.numel() == 1,
                "adamw: clip must be one fp32 number on a CUDA device");
    c10::cuda::CUDAGuard device(scale.device());
    auto stream = at::cuda::getCurrentCUDAStream();
    AdamWConfig c{};
    c.lr = static_cast<float>(lr);
    c.beta1 = static_cast<float>(beta1);
    c.beta2 = static_cast<float>(beta2);
    c.eps = static_cast<float>(eps);
    c.decay = static_cast<float>(1.0 - lr * weight_decay);
    c.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, static_cast<double>(step))));
    c.inv_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step))));
    for (int i = 0; i < n; ++i) {
      auto& p = *static_cast<at::Tensor*>(param[i]);
      void* w = nullptr;
      if (weight[i]) {
        auto& t = *static_cast<at::Tensor*>(weight[i]);
        TORCH_CHECK(t.scalar_type() == at::kBFloat16 && t.is_contiguous() && t.numel() == p.numel(),
                    "adamw: weight[", i, "] must be contiguous bf16 of ", p.numel(), " elements, got ",
                    t.scalar_type(), " of ", t.numel());
        w = t.data_ptr();
      }
      C10_CUDA_CHECK(adamw_launch(fp32(param[i], p, "param", i), fp32(grad[i], p, "grad", i),
                                  fp32(exp_avg[i], p, "exp_avg", i), fp32(exp_avg_sq[i], p, "exp_avg_sq", i),
                                  w, scale.data_ptr<float>(), p.numel(), c, stream));
    }
  });
}
#else
extern "C" int tl_adamw(int, TlTensor*, TlTensor*, TlTensor*, TlTensor*, TlTensor*, TlTensor, double, double,
                        double, double, double, int64_t) {
  TL_GUARD(TORCH_CHECK(false, "this binary was built without CUDA kernels; run ./scripts/setup.sh and build again"));
}
#endif
