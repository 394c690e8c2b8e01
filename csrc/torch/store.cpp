// libtorch's key-value store over TCP, by which the ranks of a run find each other.
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "api.h"
#include "guard.h"
#include "process_group.h"

namespace tl {

TcpStore::TcpStore(std::string host, uint16_t port, bool serve, Milliseconds timeout)
    : host_(std::move(host)), port_(port), timeout_(timeout) {
  StorePtr first = connect(serve);
  if (serve) {
    port_ = static_cast<c10d::TCPStore&>(*first).getPort();
    server_ = first;
  }
  idle_.push_back(std::move(first));
}

StorePtr TcpStore::connect(bool serve) {
  c10d::TCPStoreOptions options;
  options.port = port_;
  options.isServer = serve;
  options.waitWorkers = false;
  options.timeout = timeout_;
  return c10::make_intrusive<c10d::TCPStore>(host_, options);
}

StorePtr TcpStore::take() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      StorePtr client = std::move(idle_.back());
      idle_.pop_back();
      return client;
    }
  }
  return connect(false);
}

void TcpStore::give_back(StorePtr client) {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(client));
}

namespace {

using Bytes = std::vector<uint8_t>;

TcpStore& store(void* handle) { return **static_cast<std::shared_ptr<TcpStore>*>(handle); }

void show(Bytes value, const uint8_t** data, size_t* size) {
  static thread_local Bytes last;
  last = std::move(value);
  *data = last.data();
  *size = last.size();
}

}  // namespace
}  // namespace tl

extern "C" int tl_store_new(const char* host, uint16_t port, int serve, int64_t timeout_ms, void** store) {
  TL_GUARD({
    auto made = std::make_shared<tl::TcpStore>(host, port, serve != 0, tl::Milliseconds(timeout_ms));
    *store = new std::shared_ptr<tl::TcpStore>(std::move(made));
  });
}

extern "C" void tl_store_free(void* store) { delete static_cast<std::shared_ptr<tl::TcpStore>*>(store); }

extern "C" uint16_t tl_store_port(void* store) { return tl::store(store).port(); }

extern "C" int tl_store_set(void* store, const char* key, const uint8_t* data, size_t size) {
  TL_GUARD(tl::store(store).call([&](c10d::Store& s) {
    s.set(key, tl::Bytes(data, data + size));
    return s.check({key});  // nothing answers a set: with this, it is done when the call returns
  }));
}

extern "C" int tl_store_get(void* store, const char* key, const uint8_t** data, size_t* size) {
  TL_GUARD(tl::show(tl::store(store).call([&](c10d::Store& s) { return s.get(key); }), data, size));
}

extern "C" int tl_store_wait(void* store, int n, const char* const* keys, int64_t timeout_ms) {
  TL_GUARD(tl::store(store).call([&](c10d::Store& s) {
    s.wait(std::vector<std::string>(keys, keys + n), tl::Milliseconds(timeout_ms));
    return 0;
  }));
}

extern "C" int tl_store_add(void* store, const char* key, int64_t value, int64_t* sum) {
  TL_GUARD(*sum = tl::store(store).call([&](c10d::Store& s) { return s.add(key, value); }));
}

extern "C" int tl_store_check(void* store, const char* key, int* present) {
  TL_GUARD(*present = tl::store(store).call([&](c10d::Store& s) { return s.check({key}); }));
}

extern "C" int tl_store_compare_set(void* store, const char* key, const uint8_t* expected, size_t expected_size,
                                    const uint8_t* desired, size_t desired_size, const uint8_t** data, size_t* size) {
  TL_GUARD({
    const tl::Bytes from(expected, expected + expected_size), to(desired, desired + desired_size);
    tl::show(tl::store(store).call([&](c10d::Store& s) { return s.compareSet(key, from, to); }), data, size);
  });
}
