// decode.h for one instruction set, which lanes.h makes.
//
// Attention keeps a running maximum m, sum l and output o of each row (token, head), and takes keys 32 at a time, from
// position 0: o and l are scaled to the new maximum, then the tile is added. Tiles begin at multiples of 32 whatever
// the chunk is, and a row stops at its own position, so that a token's bits do not depend on its neighbours. A tile is
// made fp32 once, keys transposed (a score a lane: no sum crosses lanes), and all rows of the group use it.
#include "decode_kernels.h"
#include "lanes.h"

namespace tl::cpu {
namespace {

constexpr int TILE = 32, LARGEST_HEAD = 256;
// Rows that share a tile, at most; and at least one token.
constexpr int64_t ROWS = 64;

TL_FN int64_t slot_of(const tl_paged_cache& c, const uint32_t* table, int64_t position) {
  return table[position / c.block_size] * c.block_size + position % c.block_size;
}

// One head of one token from the cache.
TL_FN void load_head(const tl_paged_cache& c, const void* from, const float* scales, int64_t slot, int64_t group,
                     float* out) {
  const int64_t at = (slot * c.groups + group) * c.head_size;
  for (int64_t i = 0; i < c.head_size; i += 8) {
    Float8 x;
    switch (c.type) {
      case TL_CACHE_F32: x = load8(static_cast<const float*>(from) + at + i); break;
      case TL_CACHE_BF16: x = from_bf16(static_cast<const uint16_t*>(from) + at + i); break;
      case TL_CACHE_F16: x = from_f16(static_cast<const uint16_t*>(from) + at + i); break;
      default:
        x = mul8(from_i8(static_cast<const int8_t*>(from) + at + i), all8(scales[slot * c.groups + group]));
    }
    store8(out + i, x);
  }
}

// Asks for the lines of one head of one token. Rows of a group lie G heads apart, which hardware does not foresee: cold
// keys and values, as behind 20 MB of weights, took four times as long.
TL_FN void fetch_head(const tl_paged_cache& c, int64_t slot, int64_t group) {
  const int64_t size = c.type == TL_CACHE_F32 ? 4 : c.type == TL_CACHE_INT8 ? 1 : 2;
  const int64_t at = (slot * c.groups + group) * c.head_size * size;
  for (int64_t i = 0; i < c.head_size * size; i += 64) {
    __builtin_prefetch(static_cast<const char*>(c.k) + at + i);
    __builtin_prefetch(static_cast<const char*>(c.v) + at + i);
  }
}

// Keys and values of positions [first, first + n): k transposed (D, TILE), v (TILE, D). The rest of k is zeros.
// Those of the next tile, up to `end`, are asked for.
TL_FN void load_tile(const tl_paged_cache& c, const uint32_t* table, int64_t group, int64_t first, int n, int64_t end,
                     float* k, float* v) {
  const int64_t d = c.head_size;
  alignas(32) float eight[8][LARGEST_HEAD];
  for (int j = 0; j < TILE; ++j) {
    if (j < n) {
      const int64_t slot = slot_of(c, table, first + j);
      load_head(c, c.k, c.k_scale, slot, group, eight[j % 8]);
      load_head(c, c.v, c.v_scale, slot, group, v + j * d);
      if (first + TILE + j < end) fetch_head(c, slot_of(c, table, first + TILE + j), group);
    } else {
      std::memset(eight[j % 8], 0, d * sizeof(float));
    }
    if (j % 8 < 7) continue;
    for (int64_t i = 0; i < d; i += 8) transpose8(eight[0] + i, LARGEST_HEAD, k + i * TILE + j - 7, TILE);
  }
}

// What is known of a row so far.
struct Row {
  float most, sum[8];
};

// Scores of R rows with all keys of a tile: scale q K^T.
template <int R>
TL_FN void scores(const float* const (&q)[R], float scale, const float* k, int64_t d, float (&out)[R][TILE]) {
  Float8 s[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) s[r][c] = all8(0);
  for (int64_t i = 0; i < d; ++i) {
    Float8 x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = all8(q[r][i]);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Float8 keys = load8(k + i * TILE + c * 8);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) s[r][c] = fma8(x[r], keys, s[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) store8(out[r] + c * 8, mul8(s[r][c], all8(scale)));
}

// out = out shrink + P V for 8 C values of R rows; row r has n[r] keys, the others at least n[0].
template <int R, int C>
TL_FN void add_values(const float (&p)[R][TILE], const int (&n)[R], const float (&shrink)[R], const float* v, int64_t d,
                      float* const (&out)[R], int64_t i) {
  Float8 o[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) o[r][c] = mul8(load8(out[r] + i + c * 8), all8(shrink[r]));
  for (int j = 0; j < n[0]; ++j) {
    Float8 x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = all8(p[r][j]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Float8 values = load8(v + j * d + i + c * 8);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) o[r][c] = fma8(x[r], values, o[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 1; r < R; ++r)
    for (int j = n[0]; j < n[r]; ++j)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) o[r][c] = fma8(all8(p[r][j]), load8(v + j * d + i + c * 8), o[r][c]);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store8(out[r] + i + c * 8, o[r][c]);
}

// R rows against a tile; row r sees its first n[r] keys, a later row no fewer.
template <int R>
TL_FN void add_tile(const float* const (&q)[R], const int (&n)[R], float scale, const float* k, const float* v,
                    int64_t d, Row* rows, float* const (&out)[R]) {
  alignas(32) float p[R][TILE];
  float shrink[R];
  scores(q, scale, k, d, p);
  for (int r = 0; r < R; ++r) {
    Float8 largest = all8(rows[r].most);
    if (n[r] == TILE) {
      for (int c = 0; c < 4; ++c) largest = max8(load8(p[r] + c * 8), largest);
    } else {
      for (int j = 0; j < n[r]; ++j) largest = max8(all8(p[r][j]), largest);
    }
    const float most = max_of8(largest);
    shrink[r] = max_of8(exp8(all8(rows[r].most - most)));
    rows[r].most = most;
    Float8 sum = mul8(load8(rows[r].sum), all8(shrink[r]));
    for (int c = 0; c < 4; ++c) {
      const Float8 e = first8(exp8(add8(load8(p[r] + c * 8), all8(-most))), n[r] - c * 8);
      sum = add8(sum, e);
      store8(p[r] + c * 8, e);
    }
    store8(rows[r].sum, sum);
  }
  int64_t i = 0;
  for (; i + 32 <= d; i += 32) add_values<R, 4>(p, n, shrink, v, d, out, i);
  for (; i < d; i += 8) add_values<R, 1>(p, n, shrink, v, d, out, i);
}

// Tokens [t0, t1) of a chunk.
TL_ENTRY void attend(const tl_paged_cache& c, const uint32_t* table, int64_t group, int64_t past, int64_t t0,
                     int64_t t1, int64_t heads, float scale, const float* q, int64_t q_stride, float* out,
                     int64_t out_stride, float* scratch) {
  const int64_t d = c.head_size, rows = (t1 - t0) * heads, end = past + t1;
  float *k = scratch, *v = k + d * TILE;
  auto* states = reinterpret_cast<Row*>(v + d * TILE);
  auto q_of = [&](int64_t r) { return q + (t0 + r / heads) * q_stride + r % heads * d; };
  auto out_of = [&](int64_t r) { return out + (t0 + r / heads) * out_stride + r % heads * d; };
  for (int64_t r = 0; r < rows; ++r) {
    states[r].most = -3.4e38f;
    store8(states[r].sum, all8(0));
    std::memset(out_of(r), 0, d * sizeof(float));
  }
  for (int64_t first = 0; first < end; first += TILE) {
    const int in_tile = static_cast<int>(end - first < TILE ? end - first : TILE);
    load_tile(c, table, group, first, in_tile, end, k, v);
    // How many keys of the tile row r sees.
    auto sees = [&](int64_t r) {
      const int64_t n = past + t0 + r / heads + 1 - first;
      return static_cast<int>(n < 0 ? 0 : n < in_tile ? n : in_tile);
    };
    for (int64_t r = 0; r < rows; ++r) {
      if (sees(r) == 0) continue;
      if (r + 1 < rows) {
        add_tile<2>({q_of(r), q_of(r + 1)}, {sees(r), sees(r + 1)}, scale, k, v, d, states + r,
                    {out_of(r), out_of(r + 1)});
        ++r;
      } else {
        add_tile<1>({q_of(r)}, {sees(r)}, scale, k, v, d, states + r, {out_of(r)});
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Float8 inverse = all8(1.f / sum8(load8(states[r].sum)));
    float* o = out_of(r);
    for (int64_t i = 0; i < d; i += 8) store8(o + i, mul8(load8(o + i), inverse));
  }
}

TL_ENTRY void attention(const tl_paged_cache& c, const uint32_t* table, int64_t group, int64_t past, int64_t t,
                        int64_t heads, float scale, const float* q, int64_t q_stride, float* out, int64_t out_stride,
                        float* scratch) {
  const int64_t some = heads < ROWS ? ROWS / heads : 1;
  for (int64_t t0 = 0; t0 < t; t0 += some) {
    const int64_t t1 = t0 + some < t ? t0 + some : t;
    attend(c, table, group, past, t0, t1, heads, scale, q, q_stride, out, out_stride, scratch);
  }
}

TL_FN void store_head(const tl_paged_cache& c, void* to, float* scales, int64_t slot, int64_t group, const float* x) {
  const int64_t at = (slot * c.groups + group) * c.head_size;
  float most = 0;
  for (int64_t i = 0; i < c.head_size; ++i) most = most > std::fabs(x[i]) ? most : std::fabs(x[i]);
  const float inverse = most > 0 ? 127.f / most : 0;
  if (c.type == TL_CACHE_INT8) scales[slot * c.groups + group] = most / 127.f;
  for (int64_t i = 0; i < c.head_size; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    switch (c.type) {
      case TL_CACHE_F32: static_cast<float*>(to)[at + i] = x[i]; break;
      case TL_CACHE_BF16: {  // the nearest, ties to even; a NaN stays one
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        static_cast<uint16_t*>(to)[at + i] =
            static_cast<uint16_t>(nan ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        break;
      }
      case TL_CACHE_F16:
        if (i % 8 == 0) to_f16(static_cast<uint16_t*>(to) + at + i, load8(x + i));
        break;
      default: static_cast<int8_t*>(to)[at + i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
    }
  }
}

TL_ENTRY void cache_store(const tl_paged_cache& c, int64_t slot, const float* k, const float* v) {
  for (int64_t group = 0; group < c.groups; ++group) {
    store_head(c, c.k, c.k_scale, slot, group, k + group * c.head_size);
    store_head(c, c.v, c.v_scale, slot, group, v + group * c.head_size);
  }
}

TL_ENTRY void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  Float8 squares = all8(0);
  for (int64_t i = 0; i < n; i += 8) {
    const Float8 v = load8(x + i);
    squares = fma8(v, v, squares);
  }
  const Float8 inverse = all8(1.f / std::sqrt(sum8(squares) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += 8) store8(y + i, mul8(mul8(load8(x + i), inverse), load8(weight + i)));
}

TL_ENTRY void swiglu(const float* gate_up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += 8) {
    // sigmoid(g) = e^min(g, 0) / (1 + e^-|g|): no power overflows.
    const Float8 g = load8(gate_up + i), negated = mul8(g, all8(-1)), size = max8(negated, g);
    const Float8 e = exp8(mul8(size, all8(-1)));
    float numerator[8], sign[8];
    store8(numerator, e);
    store8(sign, g);
    for (int j = 0; j < 8; ++j) numerator[j] = sign[j] >= 0 ? 1.f : numerator[j];
    const Float8 sigmoid = div8(load8(numerator), add8(all8(1), e));
    store8(y + i, mul8(mul8(g, sigmoid), load8(gate_up + n + i)));
  }
}

TL_ENTRY void rope(float* x, int64_t heads, int64_t head_size, int64_t rotated, const float* cos, const float* sin) {
  const int64_t half = rotated / 2;
  for (int64_t h = 0; h < heads; ++h, x += head_size) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      const float minus = -(b * sin[i]), plus = a * sin[i];
      x[i] = std::fma(a, cos[i], minus);
      x[i + half] = std::fma(b, cos[i], plus);
    }
  }
}

}  // namespace

extern const DecodeKernels TL_KERNELS = {attention, cache_store, rms_norm, swiglu, rope};

}  // namespace tl::cpu
