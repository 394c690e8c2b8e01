// Declarations of Gloo that libtorch's ProcessGroupGloo.hpp needs. libtorch has Gloo inside, but its wheel lacks Gloo's
// headers. Nothing here is called or made by us: libtorch's process group is, which holds pointers to these classes.
#pragma once
#include <chrono>

namespace gloo {
class Context {
 public:
  std::chrono::milliseconds getTimeout() const;
  void setTimeout(std::chrono::milliseconds timeout);
};
}  // namespace gloo
