// Casts and products of fp8 layers over csrc/fp8.cu and cuBLASLt; weights and scales.
#include "fp8.h"
#include "tensors.h"

#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>

namespace tl {
namespace {

constexpr const char* OP = "fp8";

at::Tensor empty_fp8(const at::Tensor& like, int64_t rows, int64_t columns) {
  return at::empty({rows, columns}, like.options().dtype(at::kFloat8_e4m3fn));
}

void check_sixteen(const char* op, const char* what, int64_t n) {
  TORCH_CHECK(n % 16 == 0, op, ": fp8 needs ", what, " to be a multiple of 16, got ", n);
}

}  // namespace

Fp8Linear fp8_linear(const char* op, TlTensor* handles, const at::Tensor& x, int64_t inputs, int64_t outputs) {
  if (!handles) return {};
  const Fp8Linear layer{tensor(handles[0]), tensor(handles[1]), tensor(handles[2]), tensor(handles[3])};
  check_dtype({op, "x", x}, at::kBFloat16);
  check_sixteen(op, "tokens", x.numel() / x.size(-1));
  check_sixteen(op, "inputs", inputs);
  check_sixteen(op, "outputs", outputs);
  const struct { const char* name; const at::Tensor& t; at::ScalarType type; std::vector<int64_t> shape; } wanted[] = {
      {"fp8 weight", layer.weight, at::kFloat8_e4m3fn, {outputs, inputs}},
      {"fp8 weight transposed", layer.weight_t, at::kFloat8_e4m3fn, {inputs, outputs}},
      {"fp8 scales", layer.scales, at::kFloat, {2, 8}},
      {"fp8 weight scale", layer.weight_scale, at::kFloat, {8}}};
  for (auto& w : wanted) {
    const Argument a{op, w.name, w.t};
    check_same_device(a, x);
    check_dtype(a, w.type);
    check_shape(a, w.shape);
    check_contiguous(a);
    check_aligned(a);
  }
  return layer;
}

Casted cast(const at::Tensor& x, Fp8Slot* slot, bool rows, bool transposed, bool note, Fp8Source source) {
  const int64_t n = x.size(0), c = source == Fp8Source::act ? x.size(1) / 2 : x.size(1);
  Casted out;
  if (rows) out.rows = empty_fp8(x, n, c);
  if (transposed) out.transposed = empty_fp8(x, c, n);
  auto data = [](const at::Tensor& t) { return t.defined() ? static_cast<uint8_t*>(t.data_ptr()) : nullptr; };
  C10_CUDA_CHECK(fp8_cast({source, n, static_cast<int>(c), x.data_ptr(), nullptr, nullptr, data(out.rows),
                           data(out.transposed), slot, note},
                          stream()));
  return out;
}

at::Tensor cast_norm_transposed(const at::Tensor& sum, const at::Tensor& weight, const at::Tensor& rstd,
                                Fp8Slot* slot) {
  const int64_t c = sum.size(-1), n = sum.numel() / c;
  at::Tensor out = empty_fp8(sum, c, n);
  C10_CUDA_CHECK(fp8_cast({Fp8Source::norm, n, static_cast<int>(c), sum.data_ptr(), rstd.data_ptr<float>(),
                           weight.data_ptr(), nullptr, static_cast<uint8_t*>(out.data_ptr()), slot, false},
                          stream()));
  return out;
}

void forward_product(const at::Tensor& y, const at::Tensor& x8, const Fp8Linear& layer) {
  product_fp8(y, x8, layer.input(), layer.weight, layer.own());
}

at::Tensor input_gradient(const at::Tensor& dy8, const Fp8Linear& layer) {
  at::Tensor dx = at::empty({dy8.size(0), layer.weight.size(1)}, dy8.options().dtype(at::kBFloat16));
  product_fp8(dx, dy8, layer.gradient(), layer.weight_t, layer.own());
  return dx;
}

at::Tensor weight_gradient_fp8(const at::Tensor& weight, const at::Tensor& dy8_t, const Fp8Slot* dy_slot,
                               const at::Tensor& x8_t, const Fp8Slot* x_slot) {
  const at::Tensor sum = gradient_buffer(weight);
  at::Tensor out = sum.defined() ? sum : at::empty(weight.sizes(), weight.options());
  product_fp8(out, dy8_t, dy_slot, x8_t, x_slot, sum.defined() && adds_to({sum}));
  return sum.defined() ? at::Tensor() : out;
}

}  // namespace tl

extern "C" int tl_fp8_cast_weight(TlTensor weight, TlTensor second, TlTensor* layer) {
  using namespace tl;
  TL_GUARD({
    const at::Tensor& first = tensor(weight);
    check_cuda({OP, "weight", first});
    c10::cuda::OptionalCUDAGuard device(device_of(first));
    const at::Tensor w = second ? joined(first, tensor(second)) : first;
    TORCH_CHECK(w.defined(), OP, ": the two weights of a layer must lie behind each other in memory");
    const at::Tensor &w8 = tensor(layer[0]), &w8_t = tensor(layer[1]);
    const Fp8Linear l{w8, w8_t, tensor(layer[2]), tensor(layer[3])};
    check_dtype({OP, "weight", w}, at::kBFloat16);
    check_shape({OP, "weight", w8}, w.sizes());
    C10_CUDA_CHECK(fp8_cast({Fp8Source::plain, w.size(0), static_cast<int>(w.size(1)), w.data_ptr(), nullptr, nullptr,
                             static_cast<uint8_t*>(w8.data_ptr()), static_cast<uint8_t*>(w8_t.data_ptr()), l.own(),
                             true},
                            stream()));
  });
}

extern "C" int tl_fp8_update(TlTensor scales) {
  using namespace tl;
  TL_GUARD({
    const at::Tensor& t = tensor(scales);
    check_cuda({OP, "scales", t});
    check_dtype({OP, "scales", t}, at::kFloat);
    check_contiguous({OP, "scales", t});
    TORCH_CHECK(t.numel() % 8 == 0, OP, ": scales have 8 numbers each, got shape ", t.sizes());
    c10::cuda::OptionalCUDAGuard device(device_of(t));
    C10_CUDA_CHECK(fp8_update(reinterpret_cast<Fp8Slot*>(t.data_ptr<float>()), static_cast<int>(t.numel() / 8),
                              stream()));
  });
}
