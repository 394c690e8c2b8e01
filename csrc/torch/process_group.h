// What the parts of the process groups share.
#pragma once
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace tl {

using Milliseconds = std::chrono::milliseconds;
using StorePtr = c10::intrusive_ptr<c10d::Store>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

// One store of keys and values, in the process that serves it or in another one. A client of libtorch's serves one
// call at a time, and a call that waits for a key would keep all others from setting it: so each call takes a client
// of its own, and there are as many connections as there were calls at once. A client whose call failed is dropped.
class TcpStore {
 public:
  TcpStore(std::string host, uint16_t port, bool serve, Milliseconds timeout);
  uint16_t port() const { return port_; }
  // A client that belongs to the caller.
  StorePtr client() { return connect(false); }

  template <typename Call>
  auto call(Call call) {
    StorePtr client = take();
    auto result = call(*client);
    give_back(std::move(client));
    return result;
  }

 private:
  StorePtr connect(bool serve);
  StorePtr take();
  void give_back(StorePtr client);

  const std::string host_;
  uint16_t port_;
  const Milliseconds timeout_;
  StorePtr server_;  // kept while anything uses the store
  std::mutex mutex_;
  std::vector<StorePtr> idle_;
};

// ProcessGroupNCCL on a card, connected to all ranks (nccl.cpp).
BackendPtr make_nccl(const StorePtr& store, int rank, int size, int device, Milliseconds timeout);

}  // namespace tl
