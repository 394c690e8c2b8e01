// The store by which ranks find each other.
#pragma once
#include <chrono>
#include <string>

#include <torch/csrc/distributed/c10d/Store.hpp>

namespace tl {

using Milliseconds = std::chrono::milliseconds;
using StorePtr = c10::intrusive_ptr<c10d::Store>;

// One store of keys and values, in the process that serves it or in another one, over one connection. libtorch lets
// one call at a time use a connection, so none of them may wait for a key that another thread is to set.
struct TcpStore {
  TcpStore(std::string host, uint16_t port, bool serve, Milliseconds timeout);
  // A connection that belongs to the caller.
  StorePtr connect() const;

  const std::string host;
  const Milliseconds timeout;
  uint16_t port;
  StorePtr store;
};

}  // namespace tl
