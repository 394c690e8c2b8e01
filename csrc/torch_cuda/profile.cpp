// What the GPU does, and where the CPU waits for it: kernels, copies, memsets and waiting API calls with their times,
// from CUPTI's activity records. Kernels that a CUDA graph replays are recorded one by one.
//
// libcupti is looked up when a profile is asked for and not linked, so that a program without it starts. Of the API
// calls only those that can wait are kept. Buffers are kept as CUPTI fills them and read at the end, off the clock.
#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "tensors.h"

namespace tl {
namespace {

constexpr const char* kLibrary = "libcupti.so.13";
constexpr size_t kBufferBytes = 8 << 20;  // about 40,000 kernels

// ---- the library -------------------------------------------------------------------------------------------

struct Cupti {
  decltype(&cuptiGetVersion) get_version;
  decltype(&cuptiGetErrorMessage) error_message;
  decltype(&cuptiGetTimestamp) timestamp;
  decltype(&cuptiGetCallbackName) callback_name;
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks;
  decltype(&cuptiActivityEnable) enable;
  decltype(&cuptiActivityDisable) disable;
  decltype(&cuptiActivityGetNextRecord) next_record;
  decltype(&cuptiActivityGetNumDroppedRecords) dropped_records;
  decltype(&cuptiActivityFlushAll) flush;
};

template <class F>
void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  TORCH_CHECK(function, kLibrary, " has no function ", name, "; it must be that of CUDA 13");
}

Cupti load() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, "cannot load ", kLibrary, " (pip's nvidia-cuda-cupti): ", dlerror());
  Cupti c;
  find(library, "cuptiGetVersion", c.get_version);
  find(library, "cuptiGetErrorMessage", c.error_message);
  find(library, "cuptiGetTimestamp", c.timestamp);
  find(library, "cuptiGetCallbackName", c.callback_name);
  find(library, "cuptiActivityRegisterCallbacks", c.register_callbacks);
  find(library, "cuptiActivityEnable", c.enable);
  find(library, "cuptiActivityDisable", c.disable);
  find(library, "cuptiActivityGetNextRecord", c.next_record);
  find(library, "cuptiActivityGetNumDroppedRecords", c.dropped_records);
  find(library, "cuptiActivityFlushAll", c.flush);
  // Records are read by the layout of the headers this was compiled with.
  uint32_t version = 0;
  c.get_version(&version);
  TORCH_CHECK(version >= CUPTI_API_VERSION, kLibrary, ": expected version ", CUPTI_API_VERSION, " or newer, got ",
              version);
  return c;
}

const Cupti& cupti() {
  static const Cupti loaded = load();
  return loaded;
}

void check(CUptiResult result, const char* call) {
  if (result == CUPTI_SUCCESS) return;
  const char* text = "";
  cupti().error_message(result, &text);
  const bool privileges = result == CUPTI_ERROR_INSUFFICIENT_PRIVILEGES ||
                          result == CUPTI_ERROR_VIRTUALIZED_DEVICE_INSUFFICIENT_PRIVILEGES;
  TORCH_CHECK(!privileges, "CUPTI may not look at this GPU (error ", int(result), "): run as root, in a container ",
              "with --cap-add=SYS_ADMIN, or load the driver with NVreg_RestrictProfilingToAdminUsers=0");
  TORCH_CHECK(result != CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED,
              "another profiler (nsys, ncu, torch.profiler) is at work on this process, and CUPTI serves one");
  TORCH_CHECK(false, call, ": ", text, " (CUPTI error ", int(result), ")");
}

// ---- the calls that make the CPU wait ----------------------------------------------------------------------

// Copies between the GPU and pageable memory wait although their name says async; that is known by their record.
enum class Waits { always, if_pageable };
struct ApiCall {
  CUpti_CallbackId id;
  Waits waits;
};

#define RT(NAME) CUPTI_RUNTIME_TRACE_CBID_##NAME
const std::vector<ApiCall> kRuntimeCalls = {
    {RT(cudaDeviceSynchronize_v3020), Waits::always},
    {RT(cudaStreamSynchronize_v3020), Waits::always},
    {RT(cudaStreamSynchronize_ptsz_v7000), Waits::always},
    {RT(cudaEventSynchronize_v3020), Waits::always},
    {RT(cudaMemcpy_v3020), Waits::always},
    {RT(cudaMemcpy_ptds_v7000), Waits::always},
    {RT(cudaMemcpy2D_v3020), Waits::always},
    {RT(cudaMemcpy2D_ptds_v7000), Waits::always},
    {RT(cudaMemcpy3D_v3020), Waits::always},
    {RT(cudaMemcpy3D_ptds_v7000), Waits::always},
    {RT(cudaMemcpyToSymbol_v3020), Waits::always},
    {RT(cudaMemcpyFromSymbol_v3020), Waits::always},
    {RT(cudaMemcpyPeer_v4000), Waits::always},
    {RT(cudaFree_v3020), Waits::always},  // waits for the whole device
    {RT(cudaFreeHost_v3020), Waits::always},
    {RT(cudaMemcpyAsync_v3020), Waits::if_pageable},
    {RT(cudaMemcpyAsync_ptsz_v7000), Waits::if_pageable},
    {RT(cudaMemcpy2DAsync_v3020), Waits::if_pageable},
};
#undef RT
#define DR(NAME) CUPTI_DRIVER_TRACE_CBID_##NAME
const std::vector<ApiCall> kDriverCalls = {
    {DR(cuCtxSynchronize), Waits::always},
    {DR(cuCtxSynchronize_v2), Waits::always},
    {DR(cuStreamSynchronize), Waits::always},
    {DR(cuStreamSynchronize_ptsz), Waits::always},
    {DR(cuEventSynchronize), Waits::always},
    {DR(cuMemcpy), Waits::always},
    {DR(cuMemcpy_ptds), Waits::always},
    {DR(cuMemcpyHtoD_v2), Waits::always},
    {DR(cuMemcpyHtoD_v2_ptds), Waits::always},
    {DR(cuMemcpyDtoH_v2), Waits::always},
    {DR(cuMemcpyDtoH_v2_ptds), Waits::always},
    {DR(cuMemcpy2D_v2), Waits::always},
    {DR(cuMemcpy3D_v2), Waits::always},
    {DR(cuMemFree_v2), Waits::always},
    {DR(cuMemFreeHost), Waits::always},
    {DR(cuMemcpyAsync), Waits::if_pageable},
    {DR(cuMemcpyHtoDAsync_v2), Waits::if_pageable},
    {DR(cuMemcpyDtoHAsync_v2), Waits::if_pageable},
};
#undef DR

// All API calls: CUPTI 13.0 takes cuptiActivityEnableRuntimeApi for single ones and then records none.
const CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY,
                                     CUPTI_ACTIVITY_KIND_MEMSET, CUPTI_ACTIVITY_KIND_RUNTIME,
                                     CUPTI_ACTIVITY_KIND_DRIVER};

void enable() {
  for (auto kind : kKinds) check(cupti().enable(kind), "cuptiActivityEnable");
}

// Also after an enable that failed halfway; what is not on stays off.
void disable() {
  for (auto kind : kKinds) cupti().disable(kind);
}

// ---- the recording -----------------------------------------------------------------------------------------

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
struct Buffer {
  std::unique_ptr<uint8_t, Free> bytes;
  size_t valid;
};

struct Recording {
  std::mutex mutex;  // CUPTI hands buffers over on a thread of its own
  std::vector<Buffer> buffers;
  bool on = false;
  uint64_t began = 0;
  // The result of the last stop; names are the demangled ones by what CUPTI calls them.
  std::vector<TlActivity> activities;
  std::unordered_map<std::string, std::string> names;
};

// Never freed: CUPTI may hand back an empty buffer while the process ends.
Recording& recording() {
  static Recording& it = *new Recording;
  return it;
}

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* most_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(64, kBufferBytes));
  *size = *buffer ? kBufferBytes : 0;
  *most_records = 0;  // as many as fit
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  Buffer taken{std::unique_ptr<uint8_t, Free>(buffer), valid};
  if (valid == 0) return;
  std::lock_guard<std::mutex> lock(recording().mutex);
  recording().buffers.push_back(std::move(taken));
}

uint64_t now() {
  uint64_t ns = 0;
  check(cupti().timestamp(&ns), "cuptiGetTimestamp");
  return ns;
}

// ---- reading the records -----------------------------------------------------------------------------------

std::string demangled(const char* name) {
  if (std::strncmp(name, "_Z", 2) != 0) return name;  // a C name, such as cuBLAS's
  int status = 0;
  std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status), &std::free);
  return status == 0 ? text.get() : name;
}

// `cudaMemcpyAsync_v3020` -> `cudaMemcpyAsync`
std::string call_name(CUpti_CallbackDomain domain, CUpti_CallbackId id) {
  const char* name = nullptr;
  if (cupti().callback_name(domain, id, &name) != CUPTI_SUCCESS || !name) return "call " + std::to_string(id);
  const std::string text = name;
  return text.substr(0, text.find("_v"));
}

std::string copy_name(const CUpti_ActivityMemcpy6& copy) {
  switch (copy.copyKind) {
    case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD: return "memcpy HtoD";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH: return "memcpy DtoH";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOD: return "memcpy DtoD";
    default: return "memcpy";
  }
}

// Up to 64 KiB travel to the GPU inside the command itself, without a wait.
bool copy_waits(const CUpti_ActivityMemcpy6& copy) {
  return copy.dstKind == CUPTI_ACTIVITY_MEMORY_KIND_PAGEABLE ||
         (copy.srcKind == CUPTI_ACTIVITY_MEMORY_KIND_PAGEABLE && copy.bytes > (64 << 10));
}

class Reader {
 public:
  explicit Reader(Recording& r) : r(r) {}

  void read(const Buffer& buffer) {
    CUpti_Activity* record = nullptr;
    CUptiResult result;
    while ((result = cupti().next_record(buffer.bytes.get(), buffer.valid, &record)) == CUPTI_SUCCESS) read(*record);
    TORCH_CHECK(result == CUPTI_ERROR_MAX_LIMIT_REACHED, "cuptiActivityGetNextRecord: CUPTI error ", int(result));
  }

  // API calls can be told only when all copies are known. A call that begins after `end` is the profiler's own.
  void finish(uint64_t end) {
    TORCH_CHECK(untimed == 0, "CUPTI gave no times for ", untimed, " kernels or copies");
    for (auto& [kind, call] : calls) {
      const bool runtime = kind == CUPTI_ACTIVITY_KIND_RUNTIME;
      const auto& list = runtime ? kRuntimeCalls : kDriverCalls;
      const bool waited = always(list, call.cbid) || pageable.count(call.correlationId);
      if (!waited || call.start < r.began || call.start >= end) continue;
      const auto domain = runtime ? CUPTI_CB_DOMAIN_RUNTIME_API : CUPTI_CB_DOMAIN_DRIVER_API;
      add(TL_WAIT, call_name(domain, call.cbid), call.threadId, call.start, call.end);
    }
    std::sort(r.activities.begin(), r.activities.end(),
              [](const TlActivity& a, const TlActivity& b) { return a.start_ns < b.start_ns; });
  }

 private:
  Recording& r;
  std::vector<std::pair<CUpti_ActivityKind, CUpti_ActivityAPI>> calls;
  std::unordered_set<uint32_t> pageable;  // correlation ids of the copies that waited
  size_t untimed = 0;

  static bool always(const std::vector<ApiCall>& list, CUpti_CallbackId id) {
    return std::any_of(list.begin(), list.end(),
                       [id](const ApiCall& call) { return call.id == id && call.waits == Waits::always; });
  }

  void read(const CUpti_Activity& record) {
    switch (record.kind) {
      case CUPTI_ACTIVITY_KIND_KERNEL:
      case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
        auto& kernel = reinterpret_cast<const CUpti_ActivityKernel10&>(record);
        add(TL_KERNEL, kernel.name ? kernel.name : "kernel", kernel.streamId, kernel.start, kernel.end);
        break;
      }
      case CUPTI_ACTIVITY_KIND_MEMCPY: {
        auto& copy = reinterpret_cast<const CUpti_ActivityMemcpy6&>(record);
        if (copy_waits(copy)) pageable.insert(copy.correlationId);
        add(TL_MEMCPY, copy_name(copy), copy.streamId, copy.start, copy.end);
        break;
      }
      case CUPTI_ACTIVITY_KIND_MEMSET: {
        auto& set = reinterpret_cast<const CUpti_ActivityMemset4&>(record);
        add(TL_MEMSET, "memset", set.streamId, set.start, set.end);
        break;
      }
      case CUPTI_ACTIVITY_KIND_RUNTIME:
      case CUPTI_ACTIVITY_KIND_DRIVER: {
        auto& call = reinterpret_cast<const CUpti_ActivityAPI&>(record);
        const auto& list = record.kind == CUPTI_ACTIVITY_KIND_RUNTIME ? kRuntimeCalls : kDriverCalls;
        const bool can_wait = std::any_of(list.begin(), list.end(), [&](auto& known) { return known.id == call.cbid; });
        if (can_wait) calls.emplace_back(record.kind, call);
        break;
      }
      default: break;
    }
  }

  void add(int kind, const std::string& name, uint32_t lane, uint64_t start, uint64_t end) {
    if (start == 0 || end < start) {
      ++untimed;
      return;
    }
    auto at = r.names.find(name);
    if (at == r.names.end()) at = r.names.emplace(name, demangled(name.c_str())).first;
    r.activities.push_back({at->second.c_str(), int64_t(start), int64_t(end), lane, kind});
  }
};

void start() {
  Recording& r = recording();
  TORCH_CHECK(!r.on, "a profile is being recorded already");
  cupti();
  C10_CUDA_CHECK(cudaDeviceSynchronize());
  check(cupti().register_callbacks(give_buffer, take_buffer), "cuptiActivityRegisterCallbacks");
  {
    std::lock_guard<std::mutex> lock(r.mutex);
    r.buffers.clear();
  }
  try {
    enable();
    r.began = now();
    r.on = true;
  } catch (...) {
    disable();
    throw;
  }
}

void stop() {
  Recording& r = recording();
  TORCH_CHECK(r.on, "no profile is being recorded");
  r.on = false;
  uint64_t end = 0;
  cupti().timestamp(&end);
  const cudaError_t waited = cudaDeviceSynchronize();
  cupti().flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  disable();
  C10_CUDA_CHECK(waited);
  check(cupti().flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "cuptiActivityFlushAll");

  std::vector<Buffer> buffers;
  {
    std::lock_guard<std::mutex> lock(r.mutex);
    buffers.swap(r.buffers);
  }
  size_t lost = 0;
  check(cupti().dropped_records(nullptr, 0, &lost), "cuptiActivityGetNumDroppedRecords");
  TORCH_CHECK(lost == 0, "CUPTI lost ", lost, " records");
  r.activities.clear();
  Reader reader(r);
  for (auto& buffer : buffers) reader.read(buffer);
  reader.finish(end);
}

}  // namespace
}  // namespace tl

extern "C" int tl_profile_start(void) { TL_GUARD(tl::start()); }

extern "C" int tl_profile_now(int64_t* ns) { TL_GUARD(*ns = static_cast<int64_t>(tl::now())); }

extern "C" int tl_profile_stop(const TlActivity** activities, size_t* n) {
  TL_GUARD({
    tl::stop();
    *activities = tl::recording().activities.data();
    *n = tl::recording().activities.size();
  });
}
