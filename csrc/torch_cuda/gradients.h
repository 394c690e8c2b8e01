// Weights' persistent fp32 gradients, to which the matrix products of the backward pass add (matmul.h).
//
// A gradient need not be cleared between steps where a product writes all of it: the first one of a step overwrites
// it (4 bytes a value less to write and 4 less to read; 3 ms of a 1.1B model's step on an H100). Which gradients those
// are is seen, not told: a product that was replaced by another path, whose gradient autograd adds, is not among them.
// Gradients are known by their address. Where several units' use the same memory in turn, one of them is watched at a time.
#pragma once
#include <ATen/core/Tensor.h>

#include <initializer_list>

namespace tl {

// weight.grad where it is a persistent fp32 buffer beside a weight of 16 bits, else undefined.
at::Tensor gradient_buffer(const at::Tensor& weight);

// Whether a product that is about to write into these buffers must add: not where what they hold was declared old
// (tl_gradients_watch), the first time. Buffers of one product must agree; old ones that do not are cleared.
bool adds_to(std::initializer_list<at::Tensor> buffers);

}  // namespace tl
