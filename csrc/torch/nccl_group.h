// NCCL's process group, where this build has CUDA and NCCL's header.
#pragma once
#if defined(TL_WITH_CUDA) && __has_include(<nccl.h>)
#define TL_WITH_NCCL
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "store.h"

namespace tl {
// ProcessGroupNCCL on a card, connected to all ranks.
c10::intrusive_ptr<c10d::Backend> make_nccl(const StorePtr& store, int rank, int size, int device,
                                            Milliseconds timeout);
}  // namespace tl
#endif

#define TL_NO_NCCL "this binary was built without NCCL; run ./scripts/setup.sh and build again"
