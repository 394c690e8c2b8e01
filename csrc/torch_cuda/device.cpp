// Cards: facts, allocator statistics, events.
#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "tensors.h"

// From torch/csrc/cuda/nccl.h: the version of the NCCL inside libtorch_cuda, as major.minor.patch in 16 bits each.
namespace torch::cuda::nccl {
std::uint64_t version();
}

static void copy_text(const std::string& text, char* buffer, size_t capacity) {
  TORCH_CHECK(text.size() < capacity, "text of ", text.size(), " bytes, room for ", capacity);
  std::memcpy(buffer, text.c_str(), text.size() + 1);
}

extern "C" int tl_cuda_versions(char* buffer, size_t capacity) {
  TL_GUARD({
    int cuda = 0;
    cudaRuntimeGetVersion(&cuda);
    const auto& hooks = at::detail::getCUDAHooks();
    const long cudnn = hooks.compiledWithCuDNN() ? hooks.versionCuDNN() : 0;
    const auto nccl = torch::cuda::nccl::version();
    auto dotted = [](auto... numbers) {
      std::string text;
      ((text += (text.empty() ? "" : ".") + std::to_string(numbers)), ...);
      return text;
    };
    copy_text(dotted(cuda / 1000, cuda % 1000 / 10) + "\n" +
                  dotted(cudnn / 10000, cudnn % 10000 / 100, cudnn % 100) + "\n" +
                  dotted(nccl >> 32, nccl >> 16 & 0xffff, nccl & 0xffff),
              buffer, capacity);
  });
}

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
