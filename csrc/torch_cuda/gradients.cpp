// Which gradients products write, and which of them hold what is to be overwritten.
#include "gradients.h"

#include <mutex>
#include <unordered_set>

#include "api.h"
#include "guard.h"

namespace tl {
namespace {

// Backward passes run on autograd's own threads, so this is the process's.
struct Registry {
  std::mutex mutex;
  std::unordered_set<const void*> written, old;
  bool record = false;
} registry;

const void* key(TlTensor grad) { return static_cast<at::Tensor*>(grad)->data_ptr(); }

}  // namespace

at::Tensor gradient_buffer(const at::Tensor& weight) {
  const at::Tensor& grad = weight.grad();
  const bool buffer = grad.defined() && grad.scalar_type() == at::kFloat && weight.scalar_type() != at::kFloat;
  return buffer ? grad : at::Tensor();
}

bool adds_to(std::initializer_list<at::Tensor> buffers) {
  std::lock_guard<std::mutex> lock(registry.mutex);
  size_t old = 0;
  for (auto& t : buffers) {
    if (registry.record) registry.written.insert(t.data_ptr());
    old += registry.old.count(t.data_ptr());
  }
  for (auto& t : buffers)
    if (registry.old.erase(t.data_ptr()) && old < buffers.size()) t.zero_();
  return old < buffers.size();
}

}  // namespace tl

extern "C" int tl_gradients_record(int on) {
  TL_GUARD({
    std::lock_guard<std::mutex> lock(tl::registry.mutex);
    tl::registry.record = on != 0;
    if (on) tl::registry.written.clear();
  });
}

extern "C" int tl_gradients_written(TlTensor grad, int* written) {
  TL_GUARD({
    std::lock_guard<std::mutex> lock(tl::registry.mutex);
    *written = static_cast<int>(tl::registry.written.count(tl::key(grad)));
  });
}

extern "C" int tl_gradients_overwrite(int n, TlTensor* grad, int* left) {
  TL_GUARD({
    std::lock_guard<std::mutex> lock(tl::registry.mutex);
    *left = static_cast<int>(tl::registry.old.size());
    tl::registry.old.clear();
    for (int i = 0; i < n; ++i) tl::registry.old.insert(tl::key(grad[i]));
  });
}
