// Parts of the LLaMA MLP without autograd, for functions that contain it. W1 and W2 (F, C) that lie behind each other
// in memory are multiplied as one matrix, and so are their gradients.
#pragma once
#include "matmul.h"
#include "tensors.h"

namespace tl {

// [gate | up] (.., 2F) -> silu(gate) * up (.., F).
at::Tensor activate(const at::Tensor& gate_up);
// d(gate_up); where `act` is given it receives silu(gate) * up, and may be dact.
at::Tensor activate_backward(const at::Tensor& gate_up, const at::Tensor& dact, void* act);
// gate_up (N, 2F) = [x W1^T | x W2^T] of x (N, C), and back.
void gate_up_product(const at::Tensor& gate_up, const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2);
at::Tensor gate_up_input_gradient(const at::Tensor& dgate_up, const at::Tensor& w1, const at::Tensor& w2);
// As weight_gradient of matmul.h.
std::pair<at::Tensor, at::Tensor> gate_up_weight_gradients(const at::Tensor& w1, const at::Tensor& w2,
                                                           const at::Tensor& dgate_up, const at::Tensor& x);

}  // namespace tl
