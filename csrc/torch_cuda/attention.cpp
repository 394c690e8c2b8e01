// FlashAttention as an autograd function over csrc/flash_attention.
//
// q (B, H, T, D), k and v (B, G, S, D) as strided views, or one packed qkv (B, T, H + 2G, D); the result is
// (B, H, T, D) with the strides of (B, T, H, D). Saved for the backward pass: the inputs, the result, and one
// fp32 a row (log sum exp). A packed qkv may be turned by rotary tables first, in place; dQ is turned back while it is
// rounded, which spares RoPE's own backward pass most of its bytes.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "flash_attention/flash_attention.h"
#include "tensors.h"

namespace tl {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
constexpr const char* OP = "flash_attention";

struct Options {
  double scale;
  bool causal, deterministic;
  int64_t arch;  // 80, 90, or 0 for the card's own
};

// A (B, heads, rows, D) tensor as the kernels want it.
flash::View view(const at::Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)}; }

void check_view(const Argument& a, const at::Tensor& like) {
  check_same_device(a, like);
  check_dtype(a, like.scalar_type());
  check_aligned(a);
  TORCH_CHECK(a.t.stride(3) == 1, OP, ": ", a.name, " must have its last dimension contiguous, got strides ",
              a.t.strides());
  for (int i = 0; i < 3; ++i)
    TORCH_CHECK((a.t.stride(i) % 8 == 0 && a.t.stride(i) > 0) || a.t.size(i) == 1, OP, ": ", a.name,
                " must have strides that are positive multiples of 8 elements, got ", a.t.strides());
}

// Whether a gradient can be read where it lies.
bool readable(const at::Tensor& t) {
  bool ok = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) ok = ok && ((t.stride(i) % 8 == 0 && t.stride(i) > 0) || t.size(i) == 1);
  return ok;
}

bool use_sm90(int64_t arch) {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(arch == 0 || arch == 80 || arch == 90, OP, ": arch must be 0, 80 or 90, got ", arch);
  TORCH_CHECK(device->major >= 8, OP, ": needs compute capability 8.0 or later, got ", device->major, ".",
              device->minor);
  TORCH_CHECK(arch != 90 || device->major == 9, OP, ": the sm_90a kernels run on compute capability 9.0 only, got ",
              device->major, ".", device->minor);
  return arch == 90 || (arch == 0 && device->major == 9);
}

flash::Forward check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& doc_start,
                     const at::Tensor& doc_end, const Options& o) {
  check_cuda({OP, "q", q});
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf, OP,
              ": q must be bf16 or fp16, got ", q.scalar_type());
  for (auto& a : {Argument{OP, "q", q}, Argument{OP, "k", k}, Argument{OP, "v", v}}) {
    TORCH_CHECK(a.t.defined() && a.t.dim() == 4, OP, ": ", a.name, " must be (B, heads, T, D), got shape ",
                a.t.defined() ? a.t.sizes() : at::IntArrayRef());
    check_view(a, q);
  }
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3), g = k.size(1), s = k.size(2);
  TORCH_CHECK(d == 64 || d == 128, OP, ": head size must be 64 or 128, got ", d);
  check_shape({OP, "k", k}, {b, g, s, d});
  check_shape({OP, "v", v}, {b, g, s, d});
  TORCH_CHECK(h % g == 0, OP, ": q has ", h, " heads, not a multiple of the ", g, " heads of k and v");
  TORCH_CHECK(!o.causal || s >= t, OP, ": causal attention needs S >= T, got T = ", t, ", S = ", s);
  TORCH_CHECK(s < (1 << 30) && t < (1 << 30) && b * h * ((t + 63) / 64) < (1ll << 31), OP,
              ": sizes beyond 32-bit counters, got shape ", q.sizes(), " with S = ", s);
  TORCH_CHECK(std::isfinite(o.scale) && o.scale > 0, OP, ": scale must be positive, got ", o.scale);
  flash::Mask mask{static_cast<int>(s), o.causal, nullptr, nullptr};
  if (doc_start.defined()) {
    TORCH_CHECK(s >= t, OP, ": document masks need S >= T, got T = ", t, ", S = ", s);
    for (auto& a : {Argument{OP, "documents.start", doc_start}, Argument{OP, "documents.end", doc_end}}) {
      check_same_device(a, q);
      check_dtype(a, at::kInt);
      check_shape(a, {b, s});
      check_contiguous(a);
    }
    mask.doc_start = doc_start.data_ptr<int32_t>();
    mask.doc_end = doc_end.data_ptr<int32_t>();
  }
  return {static_cast<int>(b), static_cast<int>(h), static_cast<int>(g), static_cast<int>(t), static_cast<int>(d),
          q.scalar_type() == at::kHalf, static_cast<float>(o.scale), mask, view(q), view(k), view(v), {}, nullptr};
}

// out (B, H, T, D) and lse (B, H, T_pad).
std::pair<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const at::Tensor& doc_start, const at::Tensor& doc_end, const Options& o) {
  check_cuda({OP, "q", q});
  c10::cuda::OptionalCUDAGuard device(device_of(q));
  flash::Forward p = check(q, k, v, doc_start, doc_end, o);
  at::Tensor out = at::empty({p.batch, p.t, p.heads, p.head_size}, q.options()).transpose(1, 2);
  at::Tensor lse = at::empty({p.batch, p.heads, flash::padded(p.t)}, q.options().dtype(at::kFloat));
  p.out = view(out);
  p.lse = lse.data_ptr<float>();
  C10_CUDA_CHECK(use_sm90(o.arch) ? flash::forward_sm90(p, stream()) : flash::forward_sm80(p, stream()));
  return {out, lse};
}

// How many blocks share the query heads of a group: more than one only where the blocks would not fill the card
// about twice, so that short ones (late keys of a causal row) can make up for long ones.
int head_splits(const flash::Forward& p, bool sm90) {
  const int64_t blocks = (p.mask.s + 127) / 128 * p.batch * p.groups, heads = p.heads / p.groups;
  const int64_t at_once = at::cuda::getCurrentDeviceProperties()->multiProcessorCount * (sm90 ? 1 : 2);
  int splits = 1;
  while (10 * blocks * splits < 19 * at_once && heads % (2 * splits) == 0) splits *= 2;
  return splits;
}

// Writes dq, dk, dv, which are views like q, k, v.
void backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
              const at::Tensor& lse, const at::Tensor& doc_start, const at::Tensor& doc_end, at::Tensor dout,
              const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv, const Options& o,
              const flash::Rotary& rotary = {}) {
  c10::cuda::OptionalCUDAGuard device(device_of(q));
  flash::Backward p{};
  p.f = check(q, k, v, doc_start, doc_end, o);
  if (!readable(dout)) dout = dout.transpose(1, 2).contiguous().transpose(1, 2);
  p.f.out = view(out);
  p.f.lse = lse.data_ptr<float>();
  p.dout = view(dout);
  p.dq = view(dq);
  p.dk = view(dk);
  p.dv = view(dv);
  const auto fp32 = q.options().dtype(at::kFloat);
  at::Tensor rows = at::empty({2, p.f.batch, p.f.heads, flash::padded(p.f.t)}, fp32);
  at::Tensor dq_sum = at::empty({rows.numel() / 2 * p.f.head_size}, fp32);
  p.delta = rows.data_ptr<float>();
  p.lse2 = p.delta + rows.numel() / 2;
  p.dq_sum = dq_sum.data_ptr<float>();
  p.rotary = rotary;
  p.splits = head_splits(p.f, use_sm90(o.arch));
  at::Tensor dkv_sum, turn;
  if (p.splits > 1) {
    dkv_sum = at::empty({2 * p.splits * k.numel()}, fp32);
    p.dkv_sum = dkv_sum.data_ptr<float>();
  }
  if (o.deterministic || at::globalContext().deterministicAlgorithms()) {
    turn = at::zeros({rows.numel() / 2 / 64 * (p.f.head_size / 64)}, q.options().dtype(at::kInt));
    p.turn = turn.data_ptr<int32_t>();
  }
  C10_CUDA_CHECK(flash::backward_prepare(p, stream()));
  C10_CUDA_CHECK(use_sm90(o.arch) ? flash::backward_sm90(p, stream()) : flash::backward_sm80(p, stream()));
  C10_CUDA_CHECK(flash::backward_store_dq(p, stream()));
  if (p.splits > 1) C10_CUDA_CHECK(flash::backward_store_dkv(p, stream()));
}

void save(AutogradContext* ctx, const Options& o) {
  ctx->saved_data["scale"] = o.scale;
  ctx->saved_data["causal"] = o.causal;
  ctx->saved_data["deterministic"] = o.deterministic;
  ctx->saved_data["arch"] = o.arch;
}
Options saved(AutogradContext* ctx) {
  return {ctx->saved_data["scale"].toDouble(), ctx->saved_data["causal"].toBool(),
          ctx->saved_data["deterministic"].toBool(), ctx->saved_data["arch"].toInt()};
}

struct Separate : torch::autograd::Function<Separate> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const std::optional<at::Tensor>& doc_start, const std::optional<at::Tensor>& doc_end,
                               double scale, bool causal, bool deterministic, int64_t arch) {
    const Options o{scale, causal, deterministic, arch};
    const at::Tensor start = doc_start.value_or(at::Tensor()), end = doc_end.value_or(at::Tensor());
    auto [out, lse] = tl::forward(q, k, v, start, end, o);
    ctx->save_for_backward({q, k, v, out, lse, start, end});
    ctx->mark_non_differentiable({lse});
    save(ctx, o);
    return {out, lse};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    auto like = [](const at::Tensor& t) {  // (B, T, heads, D) in memory
      return at::empty({t.size(0), t.size(2), t.size(1), t.size(3)}, t.options()).transpose(1, 2);
    };
    const at::Tensor dq = like(s[0]), dk = like(s[1]), dv = like(s[2]);
    tl::backward(s[0], s[1], s[2], s[3], s[4], s[5], s[6], grads[0], dq, dk, dv, saved(ctx));
    return {dq, dk, dv, {}, {}, {}, {}, {}, {}};
  }
};

// Views q, k, v (B, heads, T, D) of a packed (B, T, H + 2G, D).
std::array<at::Tensor, 3> unpack(const at::Tensor& qkv, int64_t heads, int64_t groups) {
  return {qkv.narrow(2, 0, heads).transpose(1, 2), qkv.narrow(2, heads, groups).transpose(1, 2),
          qkv.narrow(2, heads + groups, groups).transpose(1, 2)};
}

// Turns `heads` heads of a contiguous packed (B, T, H + 2G, D) in place, from head `first` on.
void turn(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, int64_t first, int64_t heads,
          bool backward) {
  c10::cuda::OptionalCUDAGuard device(device_of(qkv));
  const int64_t b = qkv.size(0), t = qkv.size(1), d = qkv.size(3);
  const at::Tensor x = qkv.narrow(2, first, heads);
  const int n = static_cast<int>(heads);
  C10_CUDA_CHECK(rope({type_of({OP, "qkv", qkv}), b * t, t, n, n, static_cast<int>(d), static_cast<int>(cos.size(1)),
                       qkv.stride(1), d, cos.stride(0), cos.data_ptr<float>(), sin.data_ptr<float>(), x.data_ptr(),
                       x.data_ptr(), backward},
                      stream()));
}

// Whether store_dq can turn dQ: whole heads, rows of pairs on 8 bytes.
bool turns_while_stored(const at::Tensor& cos, const at::Tensor& sin, int64_t head_size) {
  auto paired = [](const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 8 == 0; };
  return cos.size(1) == head_size && cos.stride(0) % 2 == 0 && paired(cos) && paired(sin);
}

struct Packed : torch::autograd::Function<Packed> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& qkv, int64_t heads, int64_t groups,
                            const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin,
                            const std::optional<at::Tensor>& doc_start, const std::optional<at::Tensor>& doc_end,
                            double scale, bool causal, bool deterministic, int64_t arch) {
    const Options o{scale, causal, deterministic, arch};
    const at::Tensor start = doc_start.value_or(at::Tensor()), end = doc_end.value_or(at::Tensor());
    const auto [q, k, v] = unpack(qkv, heads, groups);
    if (cos) {
      check(q, k, v, start, end, o);  // before anything is written
      turn(qkv, *cos, *sin, 0, heads + groups, false);
    }
    auto [out, lse] = tl::forward(q, k, v, start, end, o);
    ctx->save_for_backward({qkv, out, lse, start, end, cos.value_or(at::Tensor()), sin.value_or(at::Tensor())});
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["groups"] = groups;
    save(ctx, o);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto s = ctx->get_saved_variables();
    const int64_t heads = ctx->saved_data["heads"].toInt(), groups = ctx->saved_data["groups"].toInt();
    const at::Tensor dqkv = at::empty(s[0].sizes(), s[0].options());
    const auto [q, k, v] = unpack(s[0], heads, groups);
    const auto [dq, dk, dv] = unpack(dqkv, heads, groups);
    const at::Tensor &cos = s[5], &sin = s[6];
    const bool turned = cos.defined(), stored = turned && turns_while_stored(cos, sin, q.size(3));
    flash::Rotary rotary{};
    if (stored) rotary = {cos.data_ptr<float>(), sin.data_ptr<float>(), cos.stride(0)};
    tl::backward(q, k, v, s[1], s[2], s[3], s[4], grads[0], dq, dk, dv, saved(ctx), rotary);
    if (turned) turn(dqkv, cos, sin, stored ? heads : 0, stored ? groups : heads + groups, true);
    return {dqkv, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

double scale_or_default(double scale, const at::Tensor& t) {
  return scale != 0 || t.dim() == 0 ? scale : 1.0 / std::sqrt(static_cast<double>(t.size(-1)));
}

}  // namespace
}  // namespace tl

extern "C" int tl_flash_attention(TlTensor q, TlTensor k, TlTensor v, TlTensor doc_start, TlTensor doc_end,
                                  double scale, int causal, int deterministic, int arch, TlTensor* out,
                                  TlTensor* lse) {
  TL_GUARD({
    auto& query = tl::tensor(q);
    auto r = tl::Separate::apply(query, tl::tensor(k), tl::tensor(v), tl::optional_tensor(doc_start),
                                 tl::optional_tensor(doc_end), tl::scale_or_default(scale, query), causal != 0,
                                 deterministic != 0, static_cast<int64_t>(arch));
    *out = tl::give(r[0]);
    if (lse) *lse = tl::give(r[1].narrow(2, 0, query.size(2)));
  });
}

extern "C" int tl_flash_attention_qkv(TlTensor qkv, int64_t heads, int64_t groups, TlTensor cos, TlTensor sin,
                                      TlTensor doc_start, TlTensor doc_end, double scale, int causal,
                                      int deterministic, int arch, TlTensor* out) {
  TL_GUARD({
    auto& packed = tl::tensor(qkv);
    TORCH_CHECK(packed.dim() == 4 && heads > 0 && groups > 0 && packed.size(2) == heads + 2 * groups,
                "flash_attention: qkv must be (B, T, H + 2G, D) with H = ", heads, ", G = ", groups, ", got ",
                packed.sizes());
    const auto c = tl::optional_tensor(cos), s = tl::optional_tensor(sin);
    if (c) {
      tl::check_contiguous({tl::OP, "qkv", packed});
      TORCH_CHECK(s.has_value(), tl::OP, ": cos without sin");
      tl::check_rotary_tables(tl::OP, packed, *c, *s, packed.size(1), packed.size(3));
    }
    *out = tl::give(tl::Packed::apply(packed, heads, groups, c, s, tl::optional_tensor(doc_start),
                                      tl::optional_tensor(doc_end), tl::scale_or_default(scale, packed), causal != 0,
                                      deterministic != 0, static_cast<int64_t>(arch)));
  });
}
