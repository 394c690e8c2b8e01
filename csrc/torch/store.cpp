// libtorch's key-value store over TCP, by which the ranks of a run find each other.
#include "store.h"

#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "api.h"
#include "guard.h"

namespace tl {

namespace {

// libtorch warns, with a stack, of every connection that another process's end closes. A user's own setting stays.
void quiet_warnings() {
  if (std::getenv("TORCH_CPP_LOG_LEVEL"))
    c10::initLogging();
  else
    FLAGS_caffe2_log_level = 2;  // errors alone
}

StorePtr open(const TcpStore& s, bool serve) {
  static std::once_flag once;
  std::call_once(once, quiet_warnings);
  c10d::TCPStoreOptions options;
  options.port = s.port;
  options.isServer = serve;
  options.waitWorkers = false;
  options.timeout = s.timeout;
  return c10::make_intrusive<c10d::TCPStore>(s.host, options);
}

}  // namespace

TcpStore::TcpStore(std::string h, uint16_t p, bool serve, Milliseconds t) : host(std::move(h)), timeout(t), port(p) {
  store = open(*this, serve);
  port = static_cast<c10d::TCPStore&>(*store).getPort();
}

StorePtr TcpStore::connect() const { return open(*this, false); }

namespace {

using Bytes = std::vector<uint8_t>;

const TcpStore& store(void* handle) { return **static_cast<std::shared_ptr<TcpStore>*>(handle); }

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

extern "C" uint16_t tl_store_port(void* store) { return tl::store(store).port; }

extern "C" int tl_store_set(void* store, const char* key, const uint8_t* data, size_t size) {
  TL_GUARD({
    c10d::Store& s = *tl::store(store).store;
    s.set(key, tl::Bytes(data, data + size));
    s.check({key});  // nothing answers a set: with this, it is done when the call returns
  });
}

extern "C" int tl_store_get(void* store, const char* key, const uint8_t** data, size_t* size) {
  TL_GUARD(tl::show(tl::store(store).store->get(key), data, size));
}

extern "C" int tl_store_add(void* store, const char* key, int64_t value, int64_t* sum) {
  TL_GUARD(*sum = tl::store(store).store->add(key, value));
}

extern "C" int tl_store_check(void* store, int n, const char* const* keys, int* present) {
  TL_GUARD(*present = tl::store(store).store->check(std::vector<std::string>(keys, keys + n)));
}

extern "C" int tl_store_compare_set(void* store, const char* key, const uint8_t* expected, size_t expected_size,
                                    const uint8_t* desired, size_t desired_size, const uint8_t** data, size_t* size) {
  TL_GUARD({
    const tl::Bytes from(expected, expected + expected_size), to(desired, desired + desired_size);
    tl::show(tl::store(store).store->compareSet(key, from, to), data, size);
  });
}
