// The decode kernels of csrc/decode on tensors: one new token for each of B sequences. No autograd, nothing waits.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <vector>

#include "decode/decode.h"
#include "tensors.h"

namespace tl {
namespace {

// A tensor of ints or floats as a pointer, checked.
int* ints(const Argument& a) {
  check_cuda(a);
  check_dtype(a, at::kInt);
  check_contiguous(a);
  return a.t.data_ptr<int>();
}
float* floats(const Argument& a) {
  check_cuda(a);
  check_dtype(a, at::kFloat);
  check_contiguous(a);
  return a.t.data_ptr<float>();
}
const void* bf16(const Argument& a) {
  check_cuda(a);
  check_dtype(a, at::kBFloat16);
  check_contiguous(a);
  check_aligned(a);
  return a.t.data_ptr();
}

int64_t weight_bytes(const TlWeight& w) {
  const int64_t blocks = (w.rows + 7) / 8 * ((w.columns + 127) / 128);
  const int64_t groups = 8 * 128 / w.group;
  return blocks * (w.format == 1 ? 1024 + 2 * groups : 512 + 4 * groups);
}

const void* weight_of(const char* op, const TlWeight& w) {
  const Argument data{op, "weight", tensor(w.data)};
  if (w.format == 0) {
    check_shape(data, {w.rows, w.columns});
    return bf16(data);
  }
  TORCH_CHECK(w.group == 32 || w.group == 64 || w.group == 128, op, ": groups of 32, 64 or 128, got ", w.group);
  check_cuda(data);
  check_dtype(data, at::kByte);
  check_shape(data, {weight_bytes(w)});
  check_contiguous(data);
  check_aligned(data);
  return data.t.data_ptr();
}

// k, v (slots, G, D) as blocks of `block_size` tokens, bf16 or int8 with scales (slots, G); table (B, max_blocks).
KvCache cache_of(const char* op, const TlPagedLayer& l, TlTensor table, int block_size) {
  const at::Tensor& k = tensor(l.k);
  check_cuda({op, "k", k});
  TORCH_CHECK(k.dim() == 3 && k.size(0) % block_size == 0, op, ": k must be (slots, G, D) with slots a multiple of ",
              block_size, ", got ", k.sizes());
  check_contiguous({op, "k", k});
  check_block({op, "v", tensor(l.v)}, k, k.sizes());
  KvCache cache{};
  cache.k = k.data_ptr(), cache.v = tensor(l.v).data_ptr();
  if (l.k_scale) {
    for (TlTensor scale : {l.k_scale, l.v_scale}) check_shape({op, "scale", tensor(scale)}, {k.size(0), k.size(1)});
    check_dtype({op, "k", k}, at::kChar);
    cache.k_scale = floats({op, "k_scale", tensor(l.k_scale)});
    cache.v_scale = floats({op, "v_scale", tensor(l.v_scale)});
  } else {
    check_dtype({op, "k", k}, at::kBFloat16);
  }
  const int row = static_cast<int>(k.size(1) * k.size(2));
  cache.block_stride = int64_t{block_size} * row;
  cache.token_stride = row, cache.head_stride = static_cast<int>(k.size(2));
  cache.block_size = block_size;
  cache.table = ints({op, "table", tensor(table)});
  cache.max_blocks = static_cast<int>(tensor(table).size(1));
  return cache;
}

Rotary rotary_of(const char* op, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, int64_t d) {
  check_rotary_tables(op, x, cos, sin, cos.size(0), d);
  return {cos.data_ptr<float>(), sin.data_ptr<float>(), static_cast<int>(cos.size(1)),
          static_cast<int>(cos.stride(0))};
}

// Attention of `rows` new tokens, but for its buffers.
PagedAttention attention_of(const char* op, const TlDecodeState& s, const TlPagedLayer& layer, int heads) {
  const at::Tensor &k = tensor(layer.k), &positions = tensor(s.positions);
  PagedAttention p{};
  p.int8_cache = layer.k_scale != nullptr;
  p.groups = static_cast<int>(k.size(1)), p.head_size = static_cast<int>(k.size(2)), p.heads = heads;
  TORCH_CHECK(p.heads > 0 && p.heads % p.groups == 0, op, ": ", p.heads, " heads in ", p.groups, " groups");
  p.scale = 1.f / std::sqrt(static_cast<float>(p.head_size));
  p.cache = cache_of(op, layer, s.table, s.block_size);
  p.positions = ints({op, "positions", positions});
  p.append = true;
  p.rotary = rotary_of(op, k, tensor(s.cos), tensor(s.sin), p.head_size);
  p.arrived = ints({op, "arrived", tensor(s.arrived)});
  const int64_t needed = positions.size(0) * p.groups * ((p.heads / p.groups + 7) / 8);
  TORCH_CHECK(tensor(s.arrived).numel() >= needed, op, ": arrived needs ", needed, " numbers");
  return p;
}

// The launches of a step for up to kDecodeRows sequences: five a layer, and the head. Keeps its tensors alive.
struct Decoder {
  static constexpr const char* OP = "decoder";
  struct Layer {
    Gemv qkv, proj, gate_up, mlp_proj;
    PagedAttention attention;
  };
  std::vector<at::Tensor> keep;
  std::vector<Layer> layers;
  Gemv head;
  int longest;

  explicit Decoder(const TlDecoder& d) : longest(d.state.longest) {
    const at::Tensor norm = tensor(d.norm), k = tensor(d.layers[0].cache.k);
    c10::cuda::OptionalCUDAGuard device(device_of(norm));
    for (TlTensor t : {d.state.table, d.state.positions, d.state.cos, d.state.sin, d.state.arrived}) hold(t);
    const int64_t heads = d.heads, width = heads * k.size(2), packed = width + 2 * k.size(1) * k.size(2);
    const at::Tensor qkv = buffer(norm, {kDecodeRows, packed}), y = buffer(norm, {kDecodeRows, width});
    const at::Tensor act = buffer(norm, {kDecodeRows, d.layers[0].mlp_proj.columns});
    const at::Tensor partial = buffer(norm, {kDecodeRows * 16, width});  // paged_attention_splits: at most 16
    const at::Tensor lse = at::empty({kDecodeRows * 16, heads}, norm.options().dtype(at::kFloat));
    keep.push_back(lse);
    for (int i = 0; i < d.n_layer; ++i) {
      const TlDecodeLayer& l = d.layers[i];
      Layer out;
      out.qkv = product(l.qkv, nullptr, l.norm_1, d.eps, Store::plain, &qkv);
      out.proj = product(l.proj, &y, nullptr, d.eps, Store::add, nullptr);
      out.gate_up = product(l.gate_up, nullptr, l.norm_2, d.eps, Store::swiglu, &act);
      out.mlp_proj = product(l.mlp_proj, &act, nullptr, d.eps, Store::add, nullptr);
      out.attention = attention_of(OP, d.state, l.cache, d.heads);
      for (TlTensor t : {l.cache.k, l.cache.v, l.cache.k_scale, l.cache.v_scale}) {
        if (t) hold(t);
      }
      out.attention.qkv = qkv.data_ptr(), out.attention.out = y.data_ptr();
      out.attention.partial = partial.data_ptr(), out.attention.lse = lse.data_ptr<float>();
      layers.push_back(out);
    }
    head = product(d.head, nullptr, d.norm, d.eps, Store::fp32, nullptr);
  }

  const at::Tensor& hold(TlTensor t) {
    keep.push_back(tensor(t));
    return keep.back();
  }
  at::Tensor buffer(const at::Tensor& like, at::IntArrayRef shape) {
    keep.push_back(at::zeros(shape, like.options()));
    return keep.back();
  }
  // Where x or y are null, run() puts the residual stream or the logits.
  Gemv product(const TlWeight& w, const at::Tensor* x, TlTensor norm, double eps, Store store, const at::Tensor* y) {
    Gemv p{};
    p.format = static_cast<Format>(w.format), p.group = w.group;
    p.out = static_cast<int>(w.rows), p.in = static_cast<int>(w.columns);
    p.weight = weight_of(OP, w);
    hold(w.data);
    p.x = x ? x->data_ptr() : nullptr;
    p.norm = norm ? bf16({OP, "norm", hold(norm)}) : nullptr;
    p.eps = static_cast<float>(eps);
    p.store = store;
    p.y = y ? y->data_ptr() : nullptr;
    p.y_stride = y ? y->size(1) : 0;
    p.overlap = true;
    return p;
  }

  // x (B, C), the embeddings, becomes the residual stream of the last layer; logits (B, V).
  void run(const at::Tensor& x, const at::Tensor& logits, int rows) const {
    c10::cuda::OptionalCUDAGuard device(device_of(x));
    TORCH_CHECK(rows >= 1 && rows <= kDecodeRows, OP, ": 1 to ", kDecodeRows, " rows, got ", rows);
    TORCH_CHECK(x.size(0) >= rows && x.size(1) == head.in, OP, ": x must be (", rows, ", ", head.in, ") at least, got ",
                x.sizes());
    TORCH_CHECK(logits.size(0) >= rows && logits.size(1) == head.out, OP, ": logits must be (", rows, ", ", head.out,
                ") at least, got ", logits.sizes());
    void* stream_x = const_cast<void*>(bf16({OP, "x", x}));
    float* out = floats({OP, "logits", logits});
    bool first = true;  // what runs before a step may not be overlapped with
    auto go = [&](Gemv p) {
      if (!p.x) p.x = stream_x;
      if (!p.y) p.y = p.store == Store::fp32 ? static_cast<void*>(out) : stream_x, p.y_stride = p.out;
      p.rows = rows, p.overlap = !first && hopper();
      first = false;
      C10_CUDA_CHECK(gemv(p, stream()));
    };
    for (const Layer& l : layers) {
      go(l.qkv);
      PagedAttention a = l.attention;
      a.sequences = rows, a.overlap = hopper();
      a.splits = paged_attention_splits(rows, a.groups, longest);
      C10_CUDA_CHECK(paged_attention(a, stream()));
      go(l.proj);
      go(l.gate_up);
      go(l.mlp_proj);
    }
    go(head);
  }

  static bool hopper() { return at::cuda::getCurrentDeviceProperties()->major >= 9; }
};

at::Tensor attend(const TlDecodeState& s, const TlPagedLayer& layer, const at::Tensor& qkv) {
  constexpr const char* OP = "paged_attention";
  const void* in = bf16({OP, "qkv", qkv});
  c10::cuda::OptionalCUDAGuard device(device_of(qkv));
  const at::Tensor& k = tensor(layer.k);
  const int64_t rows = qkv.size(0), heads = qkv.size(1) / k.size(2) - 2 * k.size(1);
  PagedAttention p = attention_of(OP, s, layer, static_cast<int>(heads));
  TORCH_CHECK(qkv.dim() == 2 && tensor(s.positions).size(0) >= rows, OP, ": qkv must be (B, (H+2G) D), got ",
              qkv.sizes());
  const at::Tensor out = at::empty({rows, heads * k.size(2)}, qkv.options());
  p.sequences = static_cast<int>(rows);
  p.qkv = in, p.out = out.data_ptr();
  p.splits = paged_attention_splits(p.sequences, p.groups, s.longest);
  const at::Tensor partial = at::empty({rows * p.splits, out.size(1)}, qkv.options());
  const at::Tensor lse = at::empty({rows * p.splits, heads}, qkv.options().dtype(at::kFloat));
  p.partial = partial.data_ptr(), p.lse = lse.data_ptr<float>();
  C10_CUDA_CHECK(paged_attention(p, stream()));
  return out;
}

void choose(const TlSample& s) {
  constexpr const char* OP = "sample";
  const at::Tensor &logits = tensor(s.logits), &x = tensor(s.x), &ids = tensor(s.ids);
  check_cuda({OP, "logits", logits});
  check_contiguous({OP, "logits", logits});
  c10::cuda::OptionalCUDAGuard device(device_of(logits));
  Sample p{};
  p.type = type_of({OP, "logits", logits});
  p.sequences = s.rows, p.vocab = s.vocab;
  TORCH_CHECK(logits.dim() == 2 && logits.size(0) >= s.rows && logits.size(1) >= s.vocab, OP,
              ": logits must be at least (", s.rows, ", ", s.vocab, "), got ", logits.sizes());
  TORCH_CHECK(tensor(s.seen).size(1) == (s.vocab + 31) / 32, OP, ": seen must be (B, ", (s.vocab + 31) / 32, "), got ",
              tensor(s.seen).sizes());
  p.logits = logits.data_ptr(), p.logits_stride = logits.stride(0);
  p.temperature = floats({OP, "temperature", tensor(s.temperature)});
  p.top_k = ints({OP, "top_k", tensor(s.top_k)});
  p.top_p = floats({OP, "top_p", tensor(s.top_p)});
  p.repetition_penalty = floats({OP, "repetition_penalty", tensor(s.repetition_penalty)});
  p.seen = reinterpret_cast<uint32_t*>(ints({OP, "seen", tensor(s.seen)}));
  p.key = reinterpret_cast<const uint32_t*>(ints({OP, "key", tensor(s.key)}));
  p.count = ints({OP, "count", tensor(s.count)});
  p.positions = ints({OP, "positions", tensor(s.positions)});
  p.next = ints({OP, "next", tensor(s.next)});
  p.log_prob = floats({OP, "log_prob", tensor(s.log_prob)});
  p.ids = ints({OP, "ids", ids}), p.ids_stride = static_cast<int>(ids.size(1));
  p.not_finite = ints({OP, "not_finite", tensor(s.not_finite)});
  p.embedding = bf16({OP, "embedding", tensor(s.embedding)});
  p.x = const_cast<void*>(bf16({OP, "x", x})), p.width = static_cast<int>(x.size(-1));
  p.overlap = at::cuda::getCurrentDeviceProperties()->major >= 9;
  C10_CUDA_CHECK(sample(p, stream()));
}

at::Tensor dequantized(const TlWeight& w) {
  constexpr const char* OP = "dequantize";
  const at::Tensor& data = tensor(w.data);
  Dequantize p{};
  p.format = static_cast<Format>(w.format), p.group = w.group;
  p.rows = static_cast<int>(w.rows), p.columns = static_cast<int>(w.columns);
  p.weight = weight_of(OP, w);
  c10::cuda::OptionalCUDAGuard device(device_of(data));
  const at::Tensor y = at::empty({w.rows, w.columns}, data.options().dtype(at::kBFloat16));
  p.y = y.data_ptr();
  C10_CUDA_CHECK(dequantize(p, stream()));
  return y;
}

}  // namespace
}  // namespace tl

extern "C" int tl_decoder_new(const TlDecoder* decoder, void** out) { TL_GUARD(*out = new tl::Decoder(*decoder)); }
extern "C" int tl_decoder_run(void* decoder, TlTensor x, TlTensor logits, int rows) {
  TL_GUARD(static_cast<tl::Decoder*>(decoder)->run(tl::tensor(x), tl::tensor(logits), rows));
}
extern "C" void tl_decoder_free(void* decoder) { delete static_cast<tl::Decoder*>(decoder); }
extern "C" int tl_decode_attention(const TlDecodeState* state, const TlPagedLayer* layer, TlTensor qkv, TlTensor* out) {
  TL_GUARD(*out = tl::give(tl::attend(*state, *layer, tl::tensor(qkv))));
}
extern "C" int tl_sample(const TlSample* s) { TL_GUARD(tl::choose(*s)); }
extern "C" int tl_dequantize(const TlWeight* weight, TlTensor* out) {
  TL_GUARD(*out = tl::give(tl::dequantized(*weight)));
}
