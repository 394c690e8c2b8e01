// How ranks on cards are connected, and what libtorch does when one of them fails.
#include "api.h"
#include "guard.h"

#if __has_include(<nccl.h>)
#define USE_C10D_NCCL
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/env.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <chrono>
#include <mutex>

namespace {

// How libtorch's watchdog behaves when an operation fails or takes too long. As it comes, it waits a minute and ends
// the process with SIGABRT. Instead it shall abort the communicators, so that the stream goes on and the process can
// tell its user what happened (ProcessGroupNCCL::getError). A user's own setting stays.
void configure_watchdog() {
  static std::once_flag once;
  std::call_once(once, [] {
    const char* settings[][2] = {
        {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"},      // abort communicators, not the process
        {"TORCH_NCCL_RETHROW_CUDA_ERRORS", "0"},       // the thread that launches kernels sees them as well
        {"TORCH_NCCL_ENABLE_MONITORING", "0"},         // no second watchdog that kills the process
        {"TORCH_NCCL_DUMP_ON_TIMEOUT", "0"},           // no dump of the flight recorder,
        {"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "0"},  // and no waiting for it
    };
    auto set = [](const char* name, const char* value) { c10::utils::set_env(name, value, /*overwrite=*/false); };
    for (const auto& [name, value] : settings) set(name, value);
    // Nor anything to dump: the recorder takes its lock too late, and crashes where two threads start operations.
    if (!c10::utils::has_env("TORCH_NCCL_TRACE_BUFFER_SIZE")) set("TORCH_FR_BUFFER_SIZE", "0");
  });
}

}  // namespace

extern "C" int tl_make_nccl(const void* store, int rank, int size, int device, int64_t timeout_ms, void** backend) {
  TL_GUARD({
    configure_watchdog();
    const at::Device card(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    c10::cuda::CUDAGuard guard(card);
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = std::chrono::milliseconds(timeout_ms);
    const auto& shared_store = *static_cast<const c10::intrusive_ptr<c10d::Store>*>(store);
    auto group = c10::make_intrusive<c10d::ProcessGroupNCCL>(shared_store, rank, size, options);
    group->eagerConnectSingleDevice(card);  // now rather than in the first step
    *backend = static_cast<c10d::Backend*>(group.release());
  });
}

extern "C" int tl_nccl_versions(int* built, int* running) {
  TL_GUARD({
    *built = NCCL_VERSION_CODE;
    *running = c10d::getNcclVersionNumber();
  });
}
#else
#include <stdexcept>
static const char* kAbsent = "this program was built without NCCL; run ./scripts/setup.sh and build again";
extern "C" int tl_make_nccl(const void*, int, int, int, int64_t, void**) { TL_GUARD(throw std::runtime_error(kAbsent)); }
extern "C" int tl_nccl_versions(int*, int*) { TL_GUARD(throw std::runtime_error(kAbsent)); }
#endif
