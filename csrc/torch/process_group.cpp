// Collective operations over libtorch's process groups: NCCL between cards, Gloo between CPUs.
//
// NCCL does every operation itself. Gloo has no reduce-scatter and libtorch's stand-in for it sums whole tensors on
// every rank, so with Gloo:
//   all_reduce      16-bit numbers as fp32, rounded once; avg: the sum, divided
//   reduce_scatter  all-to-all of bytes, then the parts summed in order of rank, 16-bit numbers in fp32
//   all_gather, broadcast   bytes
// What is left to do once the bytes have come is done by the waiting thread (Work::then). Gloo works on the host: of a
// tensor on a card it gets a copy, for which the CPU waits, and its result is copied back.
#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <ATen/core/grad_mode.h>
#include <atomic>
#include <functional>
#include <mutex>
#include <vector>

#include "api.h"
#include "guard.h"
#include "store.h"

namespace tl {
namespace {

using at::Tensor;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

constexpr Milliseconds kGlance{100};  // how often a thread that waits for Gloo looks whether the group was aborted

struct Group {
  std::shared_ptr<TcpStore> store;
  BackendPtr backend;
  const bool nccl;
  const at::Device device;  // of the tensors
  const Milliseconds timeout;
  std::atomic<bool> finished{false}, broken{false};

  Group(std::shared_ptr<TcpStore> s, BackendPtr b, bool n, at::Device d, Milliseconds t)
      : store(std::move(s)), backend(std::move(b)), nccl(n), device(d), timeout(t) {}
  ~Group();
  int rank() const { return backend->getRank(); }
  int size() const { return backend->getSize(); }
  std::mutex& issuing();
  void wait(c10d::Work& work);
  void abort();
  void check();
  void finish();

 private:
  std::mutex own_;
};

// A started operation: its tensors stay alive, also where it is never waited for.
struct Work {
  std::shared_ptr<Group> group;
  WorkPtr work;  // null: there was nothing to do
  std::vector<Tensor> tensors;
  std::function<void()> then;
};

// Held while an operation is started: libtorch's groups are not made for two threads. The Gloo groups of a process
// share one mutex, as each of them notes its operations in the process's only c10d::FlightRecorder, and libtorch 2.11
// looks a group up there before it takes the recorder's lock: two ranks in threads broke its map once in nine runs.
// Starting never waits for another rank with Gloo; with NCCL it may, so there each group has its own.
std::mutex& Group::issuing() {
  static std::mutex gloo;
  return nccl ? own_ : gloo;
}

Group::~Group() {
  if (finished) return;
  try {
    // Gloo's destructor waits for operations that may never end: the group is left behind then.
    if (nccl)
      backend->abort();
    else if (broken)
      backend.release();
  } catch (...) {
    backend.release();
  }
}

void Group::wait(c10d::Work& work) {
  if (nccl) {
    work.wait();
    return;
  }
  try {
    while (!work.isCompleted()) {
      TORCH_CHECK(!broken, "gloo: the group was aborted");
      try {
        work.wait(kGlance);
      } catch (...) {
        if (!work.isCompleted()) continue;
      }
    }
    work.wait();  // throws what the operation threw
  } catch (...) {
    broken = true;
    throw;
  }
}

void Group::abort() {
  if (broken.exchange(true) || finished) return;
  if (nccl) backend->abort();
}

void Group::check() {
  TORCH_CHECK(!finished, "the process group was finished before");
  TORCH_CHECK(!broken, "the process group was aborted, or an operation of it failed before");
  if (!nccl) return;
  const auto error = backend->getError();
  TORCH_CHECK(error != c10d::ErrorType::TIMEOUT, "NCCL: an operation took longer than ", timeout.count() / 1000.0,
              " s; what it should have written is not to be used");
  TORCH_CHECK(error == c10d::ErrorType::SUCCESS,
              "NCCL: an operation failed; what it should have written is not to be used");
}

void Group::finish() {
  check();
  std::lock_guard<std::mutex> lock(issuing());
  finished = true;
  if (nccl) backend->shutdown();
}

std::shared_ptr<Group>& shared(void* group) { return *static_cast<std::shared_ptr<Group>*>(group); }
Tensor& tensor(TlTensor handle) { return *static_cast<Tensor*>(handle); }

bool sixteen_bits(const Tensor& t) { return t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf; }

// The tensor as a row of numbers, after checks that both backends need.
Tensor flat(const Group& g, const char* op, const char* name, TlTensor handle) {
  const Tensor& t = tensor(handle);
  TORCH_CHECK(t.defined(), op, ": ", name, " is missing");
  TORCH_CHECK(t.device() == g.device, op, ": ", name, " must be on ", g.device, " like the group, got ", t.device());
  TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", t.strides(), " for shape ",
              t.sizes());
  return t.detach().view(-1);
}

Tensor bytes(const Tensor& t) { return t.view(at::kByte); }

// The tensor itself where it is on the host, else a copy.
Tensor on_host(const Tensor& t) { return t.to(at::kCPU); }

// What brings a host's copy back, where it is one.
std::function<void()> bring_back(Tensor t, Tensor host) {
  if (host.is_same(t)) return {};
  return [t, host] { t.copy_(host); };
}

void check_op(const char* op, const Tensor& t, int reduce_op) {
  TORCH_CHECK(reduce_op != TL_AVG || t.is_floating_point(), op, ": avg takes floating-point numbers, got ",
              t.scalar_type());
}

c10d::ReduceOp::RedOpType reduction(int op) {
  switch (op) {
    case TL_SUM: return c10d::ReduceOp::SUM;
    case TL_AVG: return c10d::ReduceOp::AVG;
    case TL_MAX: return c10d::ReduceOp::MAX;
    default: TORCH_CHECK(false, "unknown reduction ", op);
  }
}

// W shards make up the whole; a shard that lies inside must be the rank's own.
void check_parts(const Group& g, const char* op, const Tensor& whole, const Tensor& shard) {
  TORCH_CHECK(whole.scalar_type() == shard.scalar_type(), op, ": whole and shard must have one dtype, got ",
              whole.scalar_type(), " and ", shard.scalar_type());
  TORCH_CHECK(whole.numel() == shard.numel() * g.size(), op, ": whole must have ", g.size(), " x ", shard.numel(),
              " = ", shard.numel() * g.size(), " elements, got ", whole.numel());
  const auto *start = static_cast<const char*>(whole.data_ptr()), *part = static_cast<const char*>(shard.data_ptr());
  const auto whole_size = static_cast<int64_t>(whole.nbytes()), size = static_cast<int64_t>(shard.nbytes());
  const bool inside = part < start + whole_size && start < part + size;
  TORCH_CHECK(!inside || part == start + g.rank() * size, op, ": a shard inside the whole must start at element ",
              g.rank() * shard.numel(), ", rank ", g.rank(), "'s own, but lies at byte ", part - start);
}

// Starts an operation, one thread at a time.
template <typename Start>
WorkPtr start(Group& g, const Tensor& t, Start start) {
  g.check();
  if (t.numel() == 0) return {};
  std::lock_guard<std::mutex> lock(g.issuing());
  return start(*g.backend);
}

Work all_reduce(const std::shared_ptr<Group>& g, TlTensor handle, int op) {
  const Tensor t = flat(*g, "all_reduce", "tensor", handle);
  check_op("all_reduce", t, op);
  c10d::AllreduceOptions options;
  options.reduceOp = g->nccl || op != TL_AVG ? reduction(op) : c10d::ReduceOp::SUM;
  const Tensor sum = g->nccl ? t : on_host(t).to(sixteen_bits(t) ? at::kFloat : t.scalar_type());
  std::vector<Tensor> tensors{sum};
  WorkPtr work = start(*g, t, [&](c10d::Backend& b) { return b.allreduce(tensors, options); });
  std::function<void()> then;
  if (!g->nccl) {
    then = [t, sum, op, size = g->size()]() mutable {
      if (op == TL_AVG) sum.div_(size);
      if (!sum.is_same(t)) t.copy_(sum);
    };
  }
  return {g, std::move(work), {t, sum}, std::move(then)};
}

Work all_gather(const std::shared_ptr<Group>& g, TlTensor whole_handle, TlTensor shard_handle) {
  const Tensor whole = flat(*g, "all_gather", "whole", whole_handle);
  const Tensor shard = flat(*g, "all_gather", "shard", shard_handle);
  check_parts(*g, "all_gather", whole, shard);
  if (g->nccl) {
    Tensor to = whole, from = shard;
    WorkPtr work = start(*g, whole, [&](c10d::Backend& b) { return b._allgather_base(to, from); });
    return {g, std::move(work), {whole, shard}, {}};
  }
  const Tensor all = whole.is_cpu() ? whole : at::empty_like(whole, whole.options().device(at::kCPU));
  Tensor to = bytes(all), from = bytes(on_host(shard));
  WorkPtr work = start(*g, whole, [&](c10d::Backend& b) { return b._allgather_base(to, from); });
  return {g, std::move(work), {whole, all, from}, bring_back(whole, all)};
}

// parts (W, n) of this rank's shard, one from each rank -> shard (n,)
void reduce_parts(Tensor shard, const Tensor& parts, int op) {
  const at::ScalarType type = sixteen_bits(shard) ? at::kFloat : shard.scalar_type();
  Tensor sum = parts[0].to(type);
  for (int64_t rank = 1; rank < parts.size(0); ++rank) {
    if (op == TL_MAX)
      sum = at::maximum(sum, parts[rank].to(type));
    else
      sum.add_(parts[rank]);
  }
  if (op == TL_AVG) sum.div_(parts.size(0));
  shard.copy_(sum);
}

Work reduce_scatter(const std::shared_ptr<Group>& g, TlTensor shard_handle, TlTensor whole_handle, int op) {
  Tensor shard = flat(*g, "reduce_scatter", "shard", shard_handle);
  Tensor whole = flat(*g, "reduce_scatter", "whole", whole_handle);
  check_parts(*g, "reduce_scatter", whole, shard);
  check_op("reduce_scatter", whole, op);
  if (g->nccl) {
    c10d::ReduceScatterOptions options;
    options.reduceOp = reduction(op);
    WorkPtr work = start(*g, whole, [&](c10d::Backend& b) { return b._reduce_scatter_base(shard, whole, options); });
    return {g, std::move(work), {shard, whole}, {}};
  }
  const Tensor own = on_host(whole), parts = at::empty_like(own);
  WorkPtr work = start(*g, whole, [&](c10d::Backend& b) {
    Tensor from = bytes(own), to = bytes(parts);
    std::vector<int64_t> equal_in, equal_out;
    return b.alltoall_base(to, from, equal_out, equal_in);
  });
  auto then = [=, size = g->size()] { reduce_parts(shard, parts.view({size, -1}), op); };
  return {g, std::move(work), {shard, own, parts}, std::move(then)};
}

Work broadcast(const std::shared_ptr<Group>& g, TlTensor handle, int root) {
  const Tensor t = flat(*g, "broadcast", "tensor", handle);
  TORCH_CHECK(root >= 0 && root < g->size(), "broadcast: root must be below ", g->size(), ", got ", root);
  c10d::BroadcastOptions options;
  options.rootRank = root;
  const Tensor host = g->nccl ? t : on_host(t);
  std::vector<Tensor> tensors{g->nccl ? t : bytes(host)};
  WorkPtr work = start(*g, t, [&](c10d::Backend& b) { return b.broadcast(tensors, options); });
  return {g, std::move(work), {t, host}, bring_back(t, host)};
}

void barrier(Group& g) {
  g.check();
  c10d::BarrierOptions options;
  options.device = g.nccl ? g.device : at::Device(at::kCPU);
  WorkPtr work;
  {
    std::lock_guard<std::mutex> lock(g.issuing());
    work = g.backend->barrier(options);
  }
  if (g.nccl)
    work->wait(g.timeout);  // with a timeout, libtorch makes the CPU wait
  else
    g.wait(*work);
}

BackendPtr make_gloo(const StorePtr& store, int rank, int size, const char* address, Milliseconds timeout) {
  using c10d::ProcessGroupGloo;
  auto options = ProcessGroupGloo::Options::create(timeout);
  options->devices.push_back(address ? ProcessGroupGloo::createDeviceForHostname(address)
                                     : ProcessGroupGloo::createDefaultDevice());
  return c10::make_intrusive<ProcessGroupGloo>(store, rank, size, options);
}

// `make` starts an operation. Nothing here is recorded for a backward pass.
template <typename Make>
void give_work(void** work, Make make) {
  at::NoGradGuard no_grad;
  *work = new Work(make());
}

}  // namespace
}  // namespace tl

extern "C" int tl_group_new(void* store, const char* prefix, TlMakeNccl nccl, int rank, int size, int device,
                            const char* address, int64_t timeout_ms, void** group) {
  TL_GUARD({
    const auto& shared_store = *static_cast<std::shared_ptr<tl::TcpStore>*>(store);
    const tl::Milliseconds timeout(timeout_ms);
    // A connection of its own: a group may wait for a key while other threads use the store.
    tl::StorePtr client = c10::make_intrusive<c10d::PrefixStore>(prefix, shared_store->connect());
    tl::BackendPtr backend;
    if (nccl) {
      void* made = nullptr;
      if (nccl(&client, rank, size, device, timeout_ms, &made) != 0) return 1;
      backend = tl::BackendPtr::reclaim(static_cast<c10d::Backend*>(made));
    } else {
      backend = tl::make_gloo(client, rank, size, address, timeout);
    }
    const at::Device where = device >= 0 ? at::Device(at::kCUDA, device) : at::Device(at::kCPU);
    auto made = std::make_shared<tl::Group>(shared_store, std::move(backend), nccl != nullptr, where, timeout);
    *group = new std::shared_ptr<tl::Group>(std::move(made));
  });
}

extern "C" void tl_group_free(void* group) { delete static_cast<std::shared_ptr<tl::Group>*>(group); }
extern "C" int tl_group_abort(void* group) { TL_GUARD(tl::shared(group)->abort()); }
extern "C" int tl_group_check(void* group) { TL_GUARD(tl::shared(group)->check()); }
extern "C" int tl_group_finish(void* group) { TL_GUARD(tl::shared(group)->finish()); }
extern "C" int tl_group_barrier(void* group) { TL_GUARD(tl::barrier(*tl::shared(group))); }

extern "C" int tl_all_reduce(void* group, TlTensor tensor, int op, void** work) {
  TL_GUARD(tl::give_work(work, [&] { return tl::all_reduce(tl::shared(group), tensor, op); }));
}

extern "C" int tl_all_gather(void* group, TlTensor whole, TlTensor shard, void** work) {
  TL_GUARD(tl::give_work(work, [&] { return tl::all_gather(tl::shared(group), whole, shard); }));
}

extern "C" int tl_reduce_scatter(void* group, TlTensor shard, TlTensor whole, int op, void** work) {
  TL_GUARD(tl::give_work(work, [&] { return tl::reduce_scatter(tl::shared(group), shard, whole, op); }));
}

extern "C" int tl_broadcast(void* group, TlTensor tensor, int root, void** work) {
  TL_GUARD(tl::give_work(work, [&] { return tl::broadcast(tl::shared(group), tensor, root); }));
}

extern "C" int tl_work_wait(void* work) {
  TL_GUARD({
    auto& w = *static_cast<tl::Work*>(work);
    if (w.work) {
      at::NoGradGuard no_grad;
      w.group->wait(*w.work);
      if (w.then) w.then();
    }
  });
}

extern "C" void tl_work_free(void* work) { delete static_cast<tl::Work*>(work); }
