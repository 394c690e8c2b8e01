// Declarations of Gloo that libtorch's ProcessGroupGloo.hpp needs. libtorch has Gloo inside, its wheel leaves out Gloo's
// headers. Nothing of Gloo is called from here: libtorch's process group is, which holds pointers to these classes.
#pragma once
#include <chrono>

namespace gloo {
class Context {
 public:
  std::chrono::milliseconds getTimeout() const;
  void setTimeout(std::chrono::milliseconds timeout);
};
}  // namespace gloo
