// Matrix products by cuBLASLt, with the algorithm chosen by measurement.
//
// cuBLASLt's own first choice is 4 to 6 % slower than the best of its candidates on a 1B model's shapes. The first time
// that a product of some shape, layout and dtype is needed, the candidates are timed on the operands at hand, into
// memory of their own, and the winner is kept in the process and in a file, one line a product. It costs about half a
// second a product, once a card; nothing is searched while a CUDA graph is captured.
//
// Reference and switch: `matmul: aten` in a run's configuration gives libtorch's own products (of 16-bit matrices).
#include "matmul.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAGraphsUtils.cuh>
#include <ATen/ops/addmm.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <vector>

#include "tensors.h"

namespace tl {
namespace {

enum class Mode { aten, heuristic, search };

constexpr size_t WORKSPACE = 64 << 20;  // bytes; what NVIDIA advises for Hopper is 32 MiB
constexpr int CANDIDATES = 64;          // asked of the heuristic
constexpr int FINALISTS = 6;            // also tried with other cluster shapes and orders of tiles

// What an algorithm is chosen for, in cuBLASLt's column-major terms: D (m, n) = op(A) (m, k) op(B) (k, n).
struct Product {
  int64_t m, n, k, lda, ldb, ldd;
  bool transpose_a, transpose_b, add;
  cudaDataType_t type, type_d;
  int64_t alignment;  // bytes, of all pointers

  std::string name() const {
    std::ostringstream s;
    s << m << ' ' << n << ' ' << k << ' ' << lda << ' ' << ldb << ' ' << ldd << ' ' << transpose_a << transpose_b << add
      << ' ' << type << ' ' << type_d << ' ' << alignment;
    return s.str();
  }
};

struct Pointers {
  const void *a, *b;
  void* d;
  const float *inverse_a = nullptr, *inverse_b = nullptr;  // fp8: factors of A and B, on the device
};

void check(cublasStatus_t status, const char* call) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", call, " failed: ", cublasLtGetStatusString(status));
}
#define LT(call) check(call, #call)

// cuBLASLt's descriptors of one product.
struct Plan {
  cublasLtMatmulDesc_t op = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;

  Plan(const Product& p, const Pointers& x) {
    const cublasOperation_t none = CUBLAS_OP_N, transpose = CUBLAS_OP_T;
    LT(cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.transpose_a ? transpose : none);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.transpose_b ? transpose : none);
    if (p.type == CUDA_R_8F_E4M3) {
      set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, x.inverse_a);
      set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x.inverse_b);
      set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(1));  // 2 % of a step faster, the same error
    }
    LT(cublasLtMatrixLayoutCreate(&a, p.type, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k, p.lda));
    LT(cublasLtMatrixLayoutCreate(&b, p.type, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n, p.ldb));
    LT(cublasLtMatrixLayoutCreate(&d, p.type_d, p.m, p.n, p.ldd));
  }
  Plan(const Plan&) = delete;
  ~Plan() {
    cublasLtMatrixLayoutDestroy(a);
    cublasLtMatrixLayoutDestroy(b);
    cublasLtMatrixLayoutDestroy(d);
    cublasLtMatmulDescDestroy(op);
  }

  template <class T>
  void set(cublasLtMatmulDescAttributes_t what, const T& value) {
    LT(cublasLtMatmulDescSetAttribute(op, what, &value, sizeof value));
  }
};

// One card's handle, workspace and the algorithms found.
class Library {
 public:
  static Library& of(int device) {
    static std::mutex mutex;
    static std::map<int, std::unique_ptr<Library>> all;
    std::lock_guard<std::mutex> lock(mutex);
    auto& library = all[device];
    if (!library) library = std::make_unique<Library>();
    return *library;
  }

  Library() {
    LT(cublasLtCreate(&handle_));
    // Never freed: a captured graph may use it until the process ends.
    C10_CUDA_CHECK(cudaMalloc(&workspace_, WORKSPACE));
    const auto* p = at::cuda::getCurrentDeviceProperties();
    card_ = std::string(p->name) + ", cuBLASLt " + std::to_string(cublasLtGetVersion());
  }

  void run(const Product& p, const Pointers& x) {
    std::lock_guard<std::mutex> lock(mutex_);
    Plan plan(p, x);
    cublasStatus_t status = launch(plan, p, x, choose(p, plan, x));
    // A line of the file may be damaged and name an algorithm that there is not: without it there is a search.
    if (status != CUBLAS_STATUS_SUCCESS && found_.erase(p.name())) status = launch(plan, p, x, choose(p, plan, x));
    check(status, "cublasLtMatmul");
  }

  // Drops what was found and reads `file` again at the next product.
  void forget() {
    std::lock_guard<std::mutex> lock(mutex_);
    found_.clear();
    read_ = false;
  }

  static Mode mode;
  static std::string file;

 private:
  cublasStatus_t launch(const Plan& plan, const Product& p, const Pointers& x, const cublasLtMatmulAlgo_t& algorithm) {
    const float one = 1, beta = p.add ? 1 : 0;
    return cublasLtMatmul(handle_, plan.op, &one, x.a, plan.a, x.b, plan.b, &beta, x.d, plan.d, x.d, plan.d,
                          &algorithm, workspace_, WORKSPACE, stream());
  }

  cublasLtMatmulAlgo_t choose(const Product& p, const Plan& plan, const Pointers& x) {
    if (!read_) read_file();
    const std::string name = p.name();
    if (auto known = found_.find(name); known != found_.end()) return known->second;
    const auto candidates = ask(p, plan);
    if (at::cuda::currentStreamCaptureStatusMayInitCtx() != at::cuda::CaptureStatus::None) return candidates[0];
    const bool searches = mode == Mode::search && !at::globalContext().deterministicAlgorithms();
    const auto best = searches ? search(p, plan, x, candidates) : std::nullopt;
    if (best) append_to_file(name, *best);
    return found_[name] = best.value_or(candidates[0]);
  }

  std::vector<cublasLtMatmulAlgo_t> ask(const Product& p, const Plan& plan) {
    cublasLtMatmulPreference_t preference;
    LT(cublasLtMatmulPreferenceCreate(&preference));
    auto set = [&](cublasLtMatmulPreferenceAttributes_t what, auto value) {
      LT(cublasLtMatmulPreferenceSetAttribute(preference, what, &value, sizeof value));
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(WORKSPACE));
    for (auto what : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      set(what, static_cast<uint32_t>(p.alignment));
    std::vector<cublasLtMatmulHeuristicResult_t> results(CANDIDATES);
    int count = 0;
    const auto status = cublasLtMatmulAlgoGetHeuristic(handle_, plan.op, plan.a, plan.b, plan.d, plan.d, preference,
                                                       CANDIDATES, results.data(), &count);
    cublasLtMatmulPreferenceDestroy(preference);
    TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS && count > 0, "cuBLASLt has no algorithm for the product ", p.name(),
                ": ", cublasLtGetStatusString(status));
    std::vector<cublasLtMatmulAlgo_t> list;
    for (int i = 0; i < count; ++i) list.push_back(results[i].algo);
    return list;
  }

  // Times all candidates, then the best of them in other cluster shapes and orders of tiles, then the best of these
  // again for longer. Each one's sums of rows are compared with those of the heuristic's before it may win. Nothing where
  // they cannot be: operands of NaN or zeros alone, or no memory for a second result.
  std::optional<cublasLtMatmulAlgo_t> search(const Product& p, const Plan& plan, const Pointers& x,
                                             const std::vector<cublasLtMatmulAlgo_t>& candidates) {
    const auto type = p.type_d == CUDA_R_32F ? at::kFloat : p.type_d == CUDA_R_16BF ? at::kBFloat16 : at::kHalf;
    const auto options = at::TensorOptions().device(at::kCUDA).dtype(type);
    at::Tensor d;
    try {
      d = at::zeros({p.n, p.ldd}, options);
    } catch (const c10::OutOfMemoryError&) {
      return std::nullopt;
    }
    const at::Tensor columns = d.narrow(1, 0, p.m);
    const Pointers trial{x.a, x.b, d.data_ptr(), x.inverse_a, x.inverse_b};
    check(launch(plan, p, trial, candidates[0]), "cublasLtMatmul");
    const at::Tensor want = columns.sum(1, false, at::kFloat);  // (n,)

    std::vector<std::pair<float, cublasLtMatmulAlgo_t>> timed;
    auto add = [&](const cublasLtMatmulAlgo_t& algorithm, int calls) {
      d.fill_(p.add ? 0 : NAN);  // an element that is not written is seen
      if (launch(plan, p, trial, algorithm) != CUBLAS_STATUS_SUCCESS) {
        cudaGetLastError();
        return;
      }
      const at::Tensor got = columns.sum(1, false, at::kFloat);
      const double error = (got.sub(want).norm() / want.norm()).item().toDouble();
      if (error < 2e-2) timed.push_back({time(plan, p, trial, algorithm, calls), algorithm});
    };
    auto keep_best = [&](size_t count) {
      std::stable_sort(timed.begin(), timed.end(), [](auto& a, auto& b) { return a.first < b.first; });
      timed.resize(std::min(timed.size(), count));
    };
    for (auto& algorithm : candidates) add(algorithm, 3);
    if (timed.empty()) return std::nullopt;
    keep_best(FINALISTS);
    for (auto& [ms, algorithm] : std::vector(timed))
      for (auto& variant : variants(plan, algorithm)) add(variant, 3);
    keep_best(FINALISTS);
    for (auto& [ms, algorithm] : timed) ms = time(plan, p, trial, algorithm, 10);
    keep_best(1);
    return timed[0].second;
  }

  // The same tile in other cluster shapes and with the tiles in another order.
  std::vector<cublasLtMatmulAlgo_t> variants(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm) {
    std::vector<cublasLtMatmulAlgo_t> list;
    for (uint16_t cluster : {CUBLASLT_CLUSTER_SHAPE_1x1x1, CUBLASLT_CLUSTER_SHAPE_2x1x1, CUBLASLT_CLUSTER_SHAPE_1x2x1,
                             CUBLASLT_CLUSTER_SHAPE_2x2x1, CUBLASLT_CLUSTER_SHAPE_4x1x1}) {
      for (uint32_t swizzle : {0, 1, 2}) {
        cublasLtMatmulAlgo_t variant = algorithm;
        cublasLtMatmulHeuristicResult_t result;
        const bool possible =
            set(variant, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, cluster) &&
            set(variant, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, swizzle) &&
            cublasLtMatmulAlgoCheck(handle_, plan.op, plan.a, plan.b, plan.d, plan.d, &variant, &result) ==
                CUBLAS_STATUS_SUCCESS &&
            result.workspaceSize <= WORKSPACE;
        if (possible) list.push_back(variant);
      }
    }
    return list;
  }

  template <class T>
  static bool set(cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t what, T value) {
    return cublasLtMatmulAlgoConfigSetAttribute(&algorithm, what, &value, sizeof value) == CUBLAS_STATUS_SUCCESS;
  }

  // Milliseconds of one call, the best of two rounds. The CPU waits.
  float time(const Plan& plan, const Product& p, const Pointers& x, const cublasLtMatmulAlgo_t& algorithm, int calls) {
    cudaEvent_t from, to;
    C10_CUDA_CHECK(cudaEventCreate(&from));
    C10_CUDA_CHECK(cudaEventCreate(&to));
    float best = INFINITY, ms = 0;
    for (int round = 0; round < 2; ++round) {
      C10_CUDA_CHECK(cudaEventRecord(from, stream()));
      for (int i = 0; i < calls; ++i) launch(plan, p, x, algorithm);
      C10_CUDA_CHECK(cudaEventRecord(to, stream()));
      C10_CUDA_CHECK(cudaEventSynchronize(to));
      C10_CUDA_CHECK(cudaEventElapsedTime(&ms, from, to));
      best = std::min(best, ms / calls);
    }
    cudaEventDestroy(from);
    cudaEventDestroy(to);
    return best;
  }

  // Lines `card | product | algorithm as hexadecimal words`. Another card's, an old version's and cut lines are passed
  // over: their products are searched again.
  void read_file() {
    read_ = true;
    if (file.empty()) return;
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
      const size_t first = line.find(" | "), second = line.find(" | ", first + 1);
      if (second == std::string::npos || line.substr(0, first) != card_) continue;
      std::istringstream words(line.substr(second + 3));
      cublasLtMatmulAlgo_t algorithm;
      bool whole = true;
      for (auto& word : algorithm.data) whole = whole && (words >> std::hex >> word);
      if (whole) found_[line.substr(first + 3, second - first - 3)] = algorithm;
    }
  }

  void append_to_file(const std::string& name, const cublasLtMatmulAlgo_t& algorithm) {
    if (file.empty()) return;
    std::ostringstream line;
    line << card_ << " | " << name << " |" << std::hex;
    for (auto word : algorithm.data) line << ' ' << word;
    line << '\n';
    std::ofstream(file, std::ios::app) << line.str();  // where it cannot be written, the next run searches again
  }

  std::mutex mutex_;
  cublasLtHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
  std::string card_;
  bool read_ = false;
  std::map<std::string, cublasLtMatmulAlgo_t> found_;
};

Mode Library::mode = Mode::aten;
std::string Library::file;

// A row-major matrix, or the transposed view of one.
struct Layout {
  bool transposed;
  int64_t ld;
};

std::optional<Layout> layout(const at::Tensor& t) {
  if (t.stride(1) == 1 && t.stride(0) >= t.size(1)) return Layout{false, t.stride(0)};
  if (t.stride(0) == 1 && t.stride(1) >= t.size(0)) return Layout{true, t.stride(1)};
  return std::nullopt;
}

cudaDataType_t data_type(at::ScalarType type) {
  return type == at::kFloat ? CUDA_R_32F : type == at::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
}

// The largest power of two up to 256 that divides all addresses.
int64_t alignment(const Pointers& x) {
  uintptr_t bits = 256;
  for (const void* p : {x.a, x.b, static_cast<const void*>(x.d)}) bits |= reinterpret_cast<uintptr_t>(p);
  return static_cast<int64_t>(bits & -bits);
}

void matmul_aten(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  if (a.scalar_type() == out.scalar_type() && !add)
    at::mm_out(out, a, b);
  else if (a.scalar_type() == out.scalar_type())
    at::addmm_out(out, out, a, b);
  else
    at::addmm_out(out, out, a, b, at::kFloat, add ? 1 : 0);
}

}  // namespace

void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  const bool half = a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf;
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const auto la = layout(a), lb = layout(b), lout = layout(out);
  if (Library::mode == Mode::aten || !half || deterministic || !la || !lb || !lout || lout->transposed)
    return matmul_aten(out, a, b, add);
  // Row-major out = a b is column-major out^T = b^T a^T, so b comes first.
  const Pointers x{b.data_ptr(), a.data_ptr(), out.data_ptr()};
  const auto type = data_type(a.scalar_type());
  Library::of(a.get_device())
      .run({out.size(1), out.size(0), a.size(1), lb->ld, la->ld, lout->ld, lb->transposed, la->transposed, add, type,
            data_type(out.scalar_type()), alignment(x)},
           x);
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  product(out, a, b);
  return out;
}

void product_fp8(const at::Tensor& out, const at::Tensor& a, const Fp8Slot* a_slot, const at::Tensor& b,
                 const Fp8Slot* b_slot, bool add) {
  const Pointers x{b.data_ptr(), a.data_ptr(), out.data_ptr(), &b_slot->inverse, &a_slot->inverse};
  const int64_t k = a.size(1);
  Library::of(a.get_device())
      .run({out.size(1), out.size(0), k, k, k, out.stride(0), true, false, add, CUDA_R_8F_E4M3,
            data_type(out.scalar_type()), alignment(x)},
           x);
}

at::Tensor weight_gradient(const at::Tensor& weight, const at::Tensor& dy, const at::Tensor& x) {
  const at::Tensor sum = gradient_buffer(weight);
  if (!sum.defined()) return product(dy.t(), x);
  product(sum, dy.t(), x, adds_to({sum}));
  return {};
}

at::Tensor joined(const at::Tensor& a, const at::Tensor& b) {
  const bool blocks = a.defined() && b.defined() && a.is_contiguous() && b.is_contiguous();
  const bool together = blocks && a.storage().is_alias_of(b.storage()) &&
                        b.storage_offset() == a.storage_offset() + a.numel();
  return together ? at::as_strided(a, {2 * a.size(0), a.size(1)}, {a.size(1), 1}) : at::Tensor();
}

}  // namespace tl

extern "C" int tl_set_matmul(int mode, const char* file) {
  TL_GUARD({
    TORCH_CHECK(mode >= 0 && mode <= 2, "set_matmul: mode must be 0, 1 or 2, got ", mode);
    tl::Library::mode = static_cast<tl::Mode>(mode);
    tl::Library::file = file ? file : "";
    if (at::globalContext().hasCUDA() && mode > 0) tl::Library::of(at::cuda::current_device()).forget();
  });
}
