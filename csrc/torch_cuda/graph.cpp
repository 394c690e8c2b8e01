// CUDA graphs, and copies to the card on a stream of their own.
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include "tensors.h"

namespace tl {
namespace {

// Work that was captured once and is launched again by one call. Its memory stays in a pool of its own, or of another
// graph, if the two never run at the same time: captured on the same stream, since the pool keeps blocks by stream.
struct Graph {
  at::cuda::CUDAGraph graph;
  c10::cuda::CUDAStream outer = at::cuda::getCurrentCUDAStream();
  c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  bool capturing = false;

  // The cache is emptied first: what it holds could not be used in the graph's pool.
  void begin(Graph* other) {
    C10_CUDA_CHECK(cudaDeviceSynchronize());
    c10::cuda::CUDACachingAllocator::emptyCache();
    if (other) stream = other->stream;
    c10::cuda::setCurrentCUDAStream(stream);
    capturing = true;
    // Thread-local: what other threads of the program do meanwhile, pinning or allocating memory, neither fails nor
    // breaks the capture, as it would in the global mode, libtorch's default. Autograd's own threads may launch into
    // the stream in either mode. No mode lets another thread wait for the whole card (cudaDeviceSynchronize).
    graph.capture_begin(other ? other->graph.pool() : at::cuda::MempoolId_t{0, 0}, cudaStreamCaptureModeThreadLocal);
  }
  void end() {
    capturing = false;
    const auto restore = [this] { c10::cuda::setCurrentCUDAStream(outer); };
    try {
      graph.capture_end();
    } catch (...) {
      restore();
      throw;
    }
    restore();
  }
};

// A tensor on its way to the card.
struct Staged {
  at::Tensor pinned, tensor;
  at::cuda::CUDAEvent ready;
};

}  // namespace
}  // namespace tl

extern "C" int tl_graph_begin(void* other, void** out) {
  TL_GUARD({
    auto graph = std::make_unique<tl::Graph>();
    try {
      graph->begin(static_cast<tl::Graph*>(other));
    } catch (...) {
      c10::cuda::setCurrentCUDAStream(graph->outer);
      throw;
    }
    *out = graph.release();
  });
}
extern "C" int tl_graph_end(void* graph) { TL_GUARD(static_cast<tl::Graph*>(graph)->end()); }
extern "C" int tl_graph_replay(void* graph) { TL_GUARD(static_cast<tl::Graph*>(graph)->graph.replay()); }
extern "C" void tl_graph_free(void* graph) {
  auto* g = static_cast<tl::Graph*>(graph);
  try {
    if (g->capturing) g->end();
  } catch (...) {  // a capture that failed; its error was reported where it failed
  }
  delete g;
}

extern "C" int tl_stage_new(TlTensor tensor, int device, void** out) {
  TL_GUARD({
    c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    static const auto copies = c10::cuda::getStreamFromPool();
    auto staged = std::make_unique<tl::Staged>();
    staged->pinned = tl::tensor(tensor).pin_memory();
    c10::cuda::CUDAStreamGuard on(copies);
    staged->tensor = staged->pinned.to(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)),
                                       /*non_blocking=*/true);
    staged->ready.record(copies);
    *out = staged.release();
  });
}
extern "C" int tl_stage_take(void* staged, TlTensor* out) {
  TL_GUARD({
    auto* s = static_cast<tl::Staged*>(staged);
    const auto stream = at::cuda::getCurrentCUDAStream();
    s->ready.block(stream);
    s->tensor.record_stream(stream);
    *out = tl::give(s->tensor);
  });
}
extern "C" void tl_stage_free(void* staged) { delete static_cast<tl::Staged*>(staged); }

extern "C" int tl_read_back(TlTensor numbers, TlTensor* host, void* event) {
  TL_GUARD({
    const auto& from = tl::tensor(numbers);
    at::Tensor to = at::empty_like(from, from.options().device(at::kCPU).pinned_memory(true));
    to.copy_(from, /*non_blocking=*/true);
    C10_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event), tl::stream()));
    *host = tl::give(to);
  });
}
