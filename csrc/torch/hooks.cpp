// A call when a tensor's gradient is known, before the function that made the tensor runs backward: where sharded
// training fetches the next unit's weights and sends off the gradients of the one before.
//
// On a CUDA device autograd calls it from its own thread, with the stream of the forward pass as the current one.
// Source: torch.Tensor.register_hook.
#include <ATen/core/Tensor.h>

#include <memory>

#include "api.h"
#include "guard.h"

extern "C" int tl_on_gradient(TlTensor t, TlCall call, void* context, void (*drop)(void*)) {
  const std::shared_ptr<void> owned(context, drop);  // also where this fails
  TL_GUARD({
    auto& tensor = *static_cast<at::Tensor*>(t);
    TORCH_CHECK(tensor.requires_grad(), "on_gradient: the tensor requires no gradient");
    tensor.register_hook([call, owned](const at::Tensor&) { TORCH_CHECK(call(owned.get()) == 0, tl_last_error()); });
  });
}
