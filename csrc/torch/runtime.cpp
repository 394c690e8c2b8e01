// Facts and switches of libtorch that tch does not expose: its version, generator state, TF32, attention backends,
// single backward passes.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/api/include/torch/version.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <cstdlib>
#include <string>

#include "api.h"
#include "guard.h"

static thread_local std::string last_error;

extern "C" const char* tl_last_error() { return last_error.c_str(); }
extern "C" void tl_set_last_error(const char* text, size_t length) { last_error.assign(text, length); }

extern "C" const char* tl_libtorch_version() { return TORCH_VERSION; }

extern "C" int tl_backward(TlTensor out, TlTensor grad) {
  TL_GUARD(torch::autograd::backward({*static_cast<at::Tensor*>(out)}, {*static_cast<at::Tensor*>(grad)},
                                     /*retain_graph=*/true));
}

extern "C" int tl_set_grad(TlTensor weight, TlTensor grad) {
  TL_GUARD({
    auto& w = *static_cast<at::Tensor*>(weight);
    const at::Tensor g = grad ? *static_cast<at::Tensor*>(grad) : at::Tensor();
    TORCH_CHECK(w.is_leaf(), "set_grad: weight must be a leaf");
    TORCH_CHECK(!g.defined() || (g.sizes() == w.sizes() && g.device() == w.device()), "set_grad: grad must be ",
                w.sizes(), " on ", w.device(), ", got ", g.sizes(), " on ", g.device());
    w.mutable_grad() = g;
  });
}

extern "C" int tl_gradients(int n_out, TlTensor* out, TlTensor* grad, int n, TlTensor* inputs, TlTensor* gradients) {
  auto list = [](TlTensor* handles, int count) {
    std::vector<at::Tensor> tensors;
    for (int i = 0; i < count; ++i) tensors.push_back(*static_cast<at::Tensor*>(handles[i]));
    return tensors;
  };
  TL_GUARD({
    auto found = torch::autograd::grad(list(out, n_out), list(inputs, n), list(grad, n_out), /*retain_graph=*/true);
    for (int i = 0; i < n; ++i) gradients[i] = new at::Tensor(found[i]);
  });
}

extern "C" int tl_node_backward(TlTensor out, int n, TlTensor* gradients) {
  TL_GUARD({
    c10::AutoGradMode off(false);
    auto node = static_cast<at::Tensor*>(out)->grad_fn();
    TORCH_CHECK(node, "node_backward: no differentiable op made this tensor");
    TORCH_CHECK(n > 0 && static_cast<uint32_t>(n) <= node->num_inputs(), "node_backward: ", node->name(), " takes ",
                node->num_inputs(), " gradients, got ", n);
    torch::autograd::variable_list list(node->num_inputs());
    for (int i = 0; i < n; ++i) list[i] = *static_cast<at::Tensor*>(gradients[i]);
    (*node)(std::move(list));
  });
}

static at::Generator generator(int device) {
  return device < 0 ? at::detail::getDefaultCPUGenerator()
                    : at::globalContext().defaultGenerator(at::Device(at::kCUDA, device));
}

extern "C" int tl_rng_state(int device, TlTensor* out) {
  TL_GUARD({
    auto gen = generator(device);
    std::lock_guard<std::mutex> lock(gen.mutex());
    *out = new at::Tensor(gen.get_state());
  });
}

extern "C" int tl_set_rng_state(int device, TlTensor state) {
  TL_GUARD({
    auto gen = generator(device);
    std::lock_guard<std::mutex> lock(gen.mutex());
    gen.set_state(*static_cast<at::Tensor*>(state));
  });
}

extern "C" int tl_set_math_mode(int allow_tf32, int deterministic) {
  TL_GUARD({
    at::globalContext().setFloat32MatmulPrecision(allow_tf32 ? "high" : "highest");
    // cuBLAS is deterministic with a fixed workspace, which it reads from the environment at first use.
    if (deterministic) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    at::globalContext().setDeterministicAlgorithms(deterministic != 0, /*warn_only=*/false);
  });
}

extern "C" int tl_configure_allocator(void) {
  TL_GUARD({
    // Read from the environment at the first allocation; PYTORCH_CUDA_ALLOC_CONF is its older name.
    if (!getenv("PYTORCH_CUDA_ALLOC_CONF")) setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True", /*overwrite=*/0);
  });
}

extern "C" int tl_set_sdp_backends(int mask) {
  TL_GUARD({
    auto& c = at::globalContext();
    c.setSDPUseMath(mask & 1);
    c.setSDPUseFlash(mask & 2);
    c.setSDPUseMemEfficient(mask & 4);
    c.setSDPUseCuDNN(mask & 8);
  });
}
