// Which gradients products write, and which of them hold what is to be overwritten.
#include "gradients.h"

#include <mutex>
#include <unordered_map>

#include "api.h"
#include "guard.h"

namespace tl {
namespace {

enum class State { watched, old, written };

// Backward passes run on autograd's own threads, so this is the process's.
struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, State> watched;
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
  auto& watched = registry.watched;
  auto is_old = [&](const at::Tensor& t) {
    const auto at = watched.find(t.data_ptr());
    return at != watched.end() && at->second == State::old;
  };
  size_t old = 0;
  for (auto& t : buffers) old += is_old(t);
  for (auto& t : buffers) {
    if (is_old(t) && old < buffers.size()) t.zero_();
    if (const auto at = watched.find(t.data_ptr()); at != watched.end()) at->second = State::written;
  }
  return old < buffers.size();
}

}  // namespace tl

extern "C" int tl_gradients_watch(int n, TlTensor* grads, int old) {
  TL_GUARD({
    std::lock_guard<std::mutex> lock(tl::registry.mutex);
    const auto state = old ? tl::State::old : tl::State::watched;
    for (int i = 0; i < n; ++i) tl::registry.watched[tl::key(grads[i])] = state;
  });
}

extern "C" int tl_gradients_written(int n, TlTensor* grads, int* written) {
  TL_GUARD({
    std::lock_guard<std::mutex> lock(tl::registry.mutex);
    auto& watched = tl::registry.watched;
    for (int i = 0; i < n; ++i) {
      const auto at = watched.find(tl::key(grads[i]));
      written[i] = at != watched.end() && at->second == tl::State::written;
      if (at != watched.end()) watched.erase(at);
    }
  });
}
