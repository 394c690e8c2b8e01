// Facts and switches of libtorch that tch does not expose: versions, allocator statistics, generator
// state, TF32, attention backends.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/api/include/torch/version.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#ifdef TL_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>
#endif
#include <algorithm>
#include <cstdlib>
#include <cstring>

#ifdef TL_WITH_CUDA
// From torch/csrc/cuda/nccl.h: the version of the NCCL inside libtorch_cuda, as major.minor.patch in 16 bits each.
namespace torch::cuda::nccl {
std::uint64_t version();
}
#endif

#include "api.h"
#include "guard.h"

std::string& tl_error_text() {
  static thread_local std::string text;
  return text;
}

extern "C" const char* tl_last_error() { return tl_error_text().c_str(); }
extern "C" void tl_set_last_error(const char* text, size_t length) { tl_error_text().assign(text, length); }

static void copy_text(const std::string& text, char* buffer, size_t capacity) {
  TORCH_CHECK(text.size() < capacity, "text of ", text.size(), " bytes, room for ", capacity);
  std::memcpy(buffer, text.c_str(), text.size() + 1);
}

extern "C" int tl_versions(char* buffer, size_t capacity) {
  TL_GUARD({
    std::string text = TORCH_VERSION;
#ifdef TL_WITH_CUDA
    int cuda = 0;
    cudaRuntimeGetVersion(&cuda);
    auto nccl = torch::cuda::nccl::version();
    text += "\n" + std::to_string(cuda / 1000) + "." + std::to_string(cuda % 1000 / 10);
    long cudnn = at::detail::getCUDAHooks().compiledWithCuDNN() ? at::detail::getCUDAHooks().versionCuDNN() : 0;
    text += "\n" + std::to_string(cudnn / 10000) + "." + std::to_string(cudnn % 10000 / 100) + "." +
            std::to_string(cudnn % 100);
    text += "\n" + std::to_string(nccl >> 32) + "." + std::to_string(nccl >> 16 & 0xffff) + "." +
            std::to_string(nccl & 0xffff);
#else
    text += "\n-\n-\n-";
#endif
    copy_text(text, buffer, capacity);
  });
}

#ifdef TL_WITH_CUDA
extern "C" int tl_cuda_memory(int device, int64_t out[4]) {
  TL_GUARD({
    auto s = c10::cuda::CUDACachingAllocator::getDeviceStats(device);
    out[0] = s.allocated_bytes[0].current;
    out[1] = s.allocated_bytes[0].peak;
    out[2] = s.reserved_bytes[0].current;
    out[3] = s.reserved_bytes[0].peak;
  });
}

extern "C" int tl_cuda_reset_peak_memory(int device) {
  TL_GUARD(c10::cuda::CUDACachingAllocator::resetPeakStats(device));
}

extern "C" int tl_cuda_set_device(int device) {
  TL_GUARD(c10::cuda::set_device(static_cast<c10::DeviceIndex>(device)));
}

extern "C" int tl_cuda_memory_limit(int device, int64_t bytes) {
  TL_GUARD({
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    const double total = static_cast<double>(at::cuda::getDeviceProperties(device)->totalGlobalMem);
    c10::cuda::CUDACachingAllocator::setMemoryFraction(std::min(1.0, static_cast<double>(bytes) / total), device);
  });
}

extern "C" int tl_cuda_device(int device, char* name, size_t capacity, int* major, int* minor, int64_t* total) {
  TL_GUARD({
    auto* p = at::cuda::getDeviceProperties(device);
    copy_text(p->name, name, capacity);
    *major = p->major;
    *minor = p->minor;
    *total = static_cast<int64_t>(p->totalGlobalMem);
  });
}
#else
static const char* kNoCuda = "this binary was built without CUDA; run ./scripts/setup.sh and build again";
extern "C" int tl_cuda_memory(int, int64_t*) { TL_GUARD(TORCH_CHECK(false, kNoCuda)); }
extern "C" int tl_cuda_reset_peak_memory(int) { TL_GUARD(TORCH_CHECK(false, kNoCuda)); }
extern "C" int tl_cuda_set_device(int) { TL_GUARD(TORCH_CHECK(false, kNoCuda)); }
extern "C" int tl_cuda_memory_limit(int, int64_t) { TL_GUARD(TORCH_CHECK(false, kNoCuda)); }
extern "C" int tl_cuda_device(int, char*, size_t, int*, int*, int64_t*) { TL_GUARD(TORCH_CHECK(false, kNoCuda)); }
#endif

#ifdef TL_WITH_CUDA
extern "C" int tl_event_new(void** event) {
  TL_GUARD({
    cudaEvent_t e = nullptr;
    C10_CUDA_CHECK(cudaEventCreate(&e));
    *event = e;
  });
}
extern "C" void tl_event_free(void* event) { cudaEventDestroy(static_cast<cudaEvent_t>(event)); }
extern "C" int tl_event_record(void* event) {
  TL_GUARD(C10_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event), at::cuda::getCurrentCUDAStream())));
}
extern "C" int tl_event_wait(void* event) {
  TL_GUARD(C10_CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(event))));
}
extern "C" int tl_event_elapsed_ms(void* from, void* to, float* ms) {
  TL_GUARD({
    C10_CUDA_CHECK(cudaEventSynchronize(static_cast<cudaEvent_t>(to)));
    C10_CUDA_CHECK(cudaEventElapsedTime(ms, static_cast<cudaEvent_t>(from), static_cast<cudaEvent_t>(to)));
  });
}
#endif

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
