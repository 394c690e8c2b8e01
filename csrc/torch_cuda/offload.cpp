// Optimizer state in page-locked memory of the host, and its copies to the card and back: two streams of their own,
// one a direction, so that both directions of PCIe are busy while the current stream computes.
//
//   in       load(0)  load(1)    load(2)    load(3) ..
//   current           update(0)  update(1)  update(2) ..
//   out                          store(0)   store(1) ..
//
// Staging memory is a ring of slots. Events alone keep the order; the CPU waits nowhere but in wait():
//   load(s)   after the last store of slot s; the current stream waits for it;
//   store(s)  after what the current stream was given so far, the update of slot s at its end.
// Stores run in the order they were given, so that a slot's last store comes after all stores before it: a load in the
// next step reads what this one stored, provided that its slot was stored at that place or later.
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <vector>

#include "tensors.h"

namespace tl {
namespace {

using c10::cuda::CUDAStream;

struct Slot {
  at::cuda::CUDAEvent loaded, updated, stored;
};

struct HostLink {
  CUDAStream in, out;
  std::vector<at::Tensor> host, card;  // (blocks, ..) and (slots, blocks of a slot, ..), kept until all copies are done
  std::vector<Slot> slots;

  HostLink(c10::DeviceIndex device, int count)
      : in(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device)),
        out(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device)),
        slots(count) {}
  ~HostLink() {
    cudaStreamSynchronize(in);
    cudaStreamSynchronize(out);
  }

  Slot& checked(int slot) {
    TORCH_CHECK(slot >= 0 && slot < static_cast<int>(slots.size()), "host link: slot must be below ", slots.size(),
                ", got ", slot);
    return slots[slot];
  }

  void copy(int slot, int64_t start, int64_t blocks, bool load) {
    for (size_t i = 0; i < host.size(); ++i) {
      const at::Tensor there = host[i].narrow(0, start, blocks), here = card[i][slot].narrow(0, 0, blocks);
      if (load)
        C10_CUDA_CHECK(cudaMemcpyAsync(here.data_ptr(), there.data_ptr(), there.nbytes(), cudaMemcpyHostToDevice, in));
      else
        C10_CUDA_CHECK(cudaMemcpyAsync(there.data_ptr(), here.data_ptr(), here.nbytes(), cudaMemcpyDeviceToHost, out));
    }
  }
};

// Host and card tensors of one kind go together.
void check_pair(const at::Tensor& host, const at::Tensor& card, int device, int slots) {
  const char* op = "host link";
  check_cuda({op, "card", card});
  TORCH_CHECK(card.get_device() == device && card.dim() == host.dim() + 1 && card.size(0) == slots &&
                  card.sizes().slice(2) == host.sizes().slice(1),
              op, ": card must be (", slots, ", blocks, ..) on device ", device, " with the blocks of host ",
              host.sizes(), ", got ", card.sizes(), " on ", card.device());
  TORCH_CHECK(host.is_cpu() && host.is_pinned(), op, ": host must be page-locked memory");
  check_contiguous({op, "host", host});
  check_contiguous({op, "card", card});
  check_dtype({op, "card", card}, host.scalar_type());
}

}  // namespace
}  // namespace tl

extern "C" int tl_page_locked(int64_t bytes, int device, TlTensor* out) {
  TL_GUARD({
    c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    void* memory = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocDefault));
    // Not libtorch's own cache of page-locked memory, which rounds sizes up to powers of two.
    *out = tl::give(at::from_blob(memory, {bytes}, [](void* p) { cudaFreeHost(p); }, at::TensorOptions(at::kByte)));
  });
}

extern "C" int tl_link_new(int device, int slots, int n, TlTensor* host, TlTensor* card, void** out) {
  TL_GUARD({
    c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    auto link = std::make_unique<tl::HostLink>(static_cast<c10::DeviceIndex>(device), slots);
    for (int i = 0; i < n; ++i) {
      tl::check_pair(tl::tensor(host[i]), tl::tensor(card[i]), device, slots);
      link->host.push_back(tl::tensor(host[i]));
      link->card.push_back(tl::tensor(card[i]));
    }
    // The allocator may have given memory that work before this still uses.
    for (auto& slot : link->slots) slot.stored.record(at::cuda::getCurrentCUDAStream());
    *out = link.release();
  });
}

extern "C" int tl_link_load(void* handle, int slot, int64_t start, int64_t blocks) {
  TL_GUARD({
    auto& link = *static_cast<tl::HostLink*>(handle);
    c10::cuda::CUDAGuard guard(link.in.device_index());
    auto& s = link.checked(slot);
    s.stored.block(link.in);
    link.copy(slot, start, blocks, /*load=*/true);
    s.loaded.record(link.in);
    s.loaded.block(at::cuda::getCurrentCUDAStream());
  });
}

extern "C" int tl_link_store(void* handle, int slot, int64_t start, int64_t blocks) {
  TL_GUARD({
    auto& link = *static_cast<tl::HostLink*>(handle);
    c10::cuda::CUDAGuard guard(link.out.device_index());
    auto& s = link.checked(slot);
    s.updated.record(at::cuda::getCurrentCUDAStream());
    s.updated.block(link.out);
    link.copy(slot, start, blocks, /*load=*/false);
    s.stored.record(link.out);
  });
}

extern "C" int tl_link_wait(void* handle) {
  TL_GUARD({
    auto& link = *static_cast<tl::HostLink*>(handle);
    C10_CUDA_CHECK(cudaStreamSynchronize(link.in));
    C10_CUDA_CHECK(cudaStreamSynchronize(link.out));
  });
}

extern "C" void tl_link_free(void* handle) { delete static_cast<tl::HostLink*>(handle); }
