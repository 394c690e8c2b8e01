// Activation checkpointing: a part of the network that keeps only its inputs, and that the backward pass runs again.
//
// The part is a Rust function of tensors. Its first run, without a graph, is done when tl_recompute is called; the node
// made here owns the function and gives the results a backward pass:
//
//   inputs' = leaves with the inputs' values;  outputs' = part(inputs'), with a graph;
//   outputs'.backward(gradients)      adds to .grad of the parameters that the part uses, and of inputs'
//   return inputs'.grad
//
// On a CUDA device autograd calls this from its own thread, on the stream of the first run. No CPU wait; no random
// numbers are kept, so a part with dropout would be another one the second time. Source: arXiv 1604.06174;
// torch.utils.checkpoint (use_reentrant=True).
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>

#include "api.h"
#include "guard.h"

namespace tl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The Rust function, which goes with this object.
struct Part : torch::CustomClassHolder {
  Part(TlPart run, void* context, void (*drop)(void*)) : run_(run), context_(context), drop_(drop) {}
  ~Part() override { drop_(context_); }

  variable_list operator()(variable_list& inputs, size_t n_out) const {
    std::vector<TlTensor> in, out(n_out, nullptr);
    for (at::Tensor& t : inputs) in.push_back(&t);
    const int failed = run_(context_, static_cast<int>(in.size()), in.data(), static_cast<int>(n_out), out.data());
    TORCH_CHECK(failed == 0, tl_last_error());
    variable_list results;
    for (TlTensor t : out) results.push_back(*std::unique_ptr<at::Tensor>(static_cast<at::Tensor*>(t)));
    return results;
  }

 private:
  TlPart run_;
  void* context_;
  void (*drop_)(void*);
};

struct RecomputeFunction : torch::autograd::Function<RecomputeFunction> {
  // `results` is a pointer so that autograd does not take them for inputs.
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, const variable_list* results,
                               const c10::intrusive_ptr<Part>& part) {
    ctx->save_for_backward(inputs.vec());
    ctx->set_materialize_grads(false);
    ctx->saved_data["part"] = c10::IValue::make_capsule(part);
    variable_list out;
    for (const at::Tensor& result : *results) out.push_back(result.detach());  // a result may be an input
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto part = c10::static_intrusive_pointer_cast<Part>(ctx->saved_data["part"].toCapsule());
    variable_list inputs;
    for (const at::Tensor& saved : ctx->get_saved_variables()) {
      inputs.push_back(saved.detach().set_requires_grad(saved.requires_grad()));
    }
    variable_list roots, root_grads;
    {
      c10::AutoGradMode with_graph(true);
      const variable_list outputs = (*part)(inputs, grads.size());
      for (size_t i = 0; i < grads.size(); ++i) {
        if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
        roots.push_back(outputs[i]);
        root_grads.push_back(grads[i]);
      }
    }
    if (!roots.empty()) torch::autograd::backward(roots, root_grads);
    variable_list found;
    for (const at::Tensor& input : inputs) found.push_back(input.grad());
    found.resize(found.size() + 2);  // `results` and `part` have no gradient
    return found;
  }
};

variable_list list(TlTensor* handles, int n) {
  variable_list tensors;
  for (int i = 0; i < n; ++i) tensors.push_back(*static_cast<at::Tensor*>(handles[i]));
  return tensors;
}

}  // namespace
}  // namespace tl

extern "C" int tl_recompute(int n_in, TlTensor* inputs, int n_out, TlTensor* results, TlPart run, void* context,
                            void (*drop)(void*), TlTensor* out) {
  TL_GUARD({
    const auto part = c10::make_intrusive<tl::Part>(run, context, drop);
    const auto in = tl::list(inputs, n_in), first = tl::list(results, n_out);
    const auto made = tl::RecomputeFunction::apply(at::TensorList(in), &first, part);
    for (int i = 0; i < n_out; ++i) out[i] = new at::Tensor(made[i]);
  });
}
