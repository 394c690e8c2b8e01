// Checks the tensors of one optimizer step and launches csrc/adamw.cu on libtorch's current stream.
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "tensors.h"

namespace {

// The tensor `what[i]` of a parameter with n elements, checked, as a pointer.
void* block_of(TlTensor handle, at::ScalarType type, int64_t n, const at::Device& device, const char* what, int i) {
  TORCH_CHECK(handle, "adamw: ", what, "[", i, "] is missing");
  auto& t = tl::tensor(handle);
  TORCH_CHECK(t.defined() && t.scalar_type() == type && t.is_contiguous() && t.device() == device && t.numel() == n,
              "adamw: ", what, "[", i, "] must be contiguous ", type, " of ", n, " elements on ", device, ", got ",
              t.defined() ? toString(t.scalar_type()) : "no tensor", " of ", t.defined() ? t.numel() : 0, " on ",
              t.defined() ? t.device() : device);
  tl::check_aligned({"adamw", what, t});
  return t.data_ptr();
}

tl::Master master_of(const TlAdamWTensors& first) {
  if (!first.param) return tl::Master::bf16;
  const auto type = tl::tensor(first.param).scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kShort, "adamw: param[0] must be Float, or Short beside a bf16 weight, "
              "got ", type);
  return type == at::kFloat ? tl::Master::fp32 : tl::Master::split;
}

tl::State state_of(const TlAdamWTensors& first) {
  const auto type = tl::tensor(first.exp_avg).scalar_type();
  switch (type) {
    case at::kFloat: return tl::State::fp32;
    case at::kBFloat16: return tl::State::bf16;
    case at::kChar: return tl::State::int8;
    default: TORCH_CHECK(false, "adamw: exp_avg[0] must be Float, BFloat16 or Char, got ", type);
  }
}

// Checks parameter i against the formats that parameter 0 has, and takes its pointers.
tl::AdamWTensor entry_of(const TlAdamWTensors& t, tl::Master master, tl::State state, const at::Device& device, int i) {
  const int64_t n = tl::tensor(t.grad).numel();
  auto block = [&](TlTensor handle, at::ScalarType type, const char* what) {
    return block_of(handle, type, n, device, what, i);
  };
  tl::AdamWTensor out{};
  out.n = n;
  out.grad = static_cast<float*>(block(t.grad, at::kFloat, "grad"));
  TORCH_CHECK(master != tl::Master::bf16 || !t.param, "adamw: param[", i, "] must be missing as param[0] is");
  if (master != tl::Master::bf16)
    out.param = block(t.param, master == tl::Master::fp32 ? at::kFloat : at::kShort, "param");
  if (t.weight || master != tl::Master::fp32) out.weight = block(t.weight, at::kBFloat16, "weight");

  const bool codes = state == tl::State::int8;
  const auto wide = state == tl::State::fp32 ? at::kFloat : at::kBFloat16;
  out.exp_avg = block(t.exp_avg, codes ? at::kChar : wide, "exp_avg");
  out.exp_avg_sq = block(t.exp_avg_sq, codes ? at::kByte : wide, "exp_avg_sq");
  if (codes) {
    const int64_t blocks = (n + tl::kStateBlock - 1) / tl::kStateBlock;
    auto scale = [&](TlTensor handle, const char* what) {
      return static_cast<float*>(block_of(handle, at::kFloat, blocks, device, what, i));
    };
    out.exp_avg_scale = scale(t.exp_avg_scale, "exp_avg_scale");
    out.exp_avg_sq_scale = scale(t.exp_avg_sq_scale, "exp_avg_sq_scale");
  }
  out.key[0] = static_cast<uint32_t>(t.key);
  out.key[1] = static_cast<uint32_t>(t.key >> 32);
  out.clear_grad = t.clear_grad != 0;
  return out;
}

}  // namespace

extern "C" int tl_adamw(int n, const TlAdamWTensors* tensors, TlTensor clip, double lr, double beta1, double beta2,
                        double eps, double weight_decay, int64_t step) {
  TL_GUARD({
    TORCH_CHECK(n > 0, "adamw: no parameters");
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
    const tl::Master master = master_of(tensors[0]);
    const tl::State state = state_of(tensors[0]);
    std::vector<tl::AdamWTensor> list(n);
    for (int i = 0; i < n; ++i) list[i] = entry_of(tensors[i], master, state, scale.device(), i);
    C10_CUDA_CHECK(tl::adamw(list.data(), n, master, state, scale.data_ptr<float>(), c, tl::stream()));
  });
}

extern "C" int tl_grad_norm(int n, TlTensor* grad, double max_norm, TlTensor watch, TlTensor* norm, TlTensor* clip) {
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
    int* kept = nullptr;
    if (watch) {
      tl::Argument w{op, "watch", tl::tensor(watch)};
      tl::check_same_device(w, first);
      tl::check_dtype(w, at::kInt);
      tl::check_shape(w, {n + 1});
      kept = w.t.data_ptr<int>();
    }
    const auto fp32 = first.options().dtype(at::kFloat);
    at::Tensor partial = at::empty({tl::kNormBlocks}, fp32), x = at::empty({}, fp32), c = at::empty({}, fp32);
    C10_CUDA_CHECK(tl::grad_norm(list.data(), n, static_cast<float>(max_norm), partial.data_ptr<float>(),
                                 x.data_ptr<float>(), c.data_ptr<float>(), kept, tl::stream()));
    *norm = tl::give(x);
    *clip = tl::give(c);
  });
}
