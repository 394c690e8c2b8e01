// The vector form of quant_matmul.cpp, included once an instruction set: TL_TARGET is the set, TL_KERNELS the name of
// the result, TL_VNNI whether a byte product adds up in 32 bits by itself.
//
// A vector has 8 rows of W: 4 codes of each as bytes, or one float of each. The codes of a panel meet the same 4
// activations in all rows, so these are broadcast. Unsigned codes of 4 bits may be added up in 16 bits over a block:
// 8 products of two, 15 * 127 * 16 = 30,480. Those of 6 bits over 16 values, where the start -32 sum x makes the end
// fit though it wraps between: 32 * 127 * 8 = 32,512.
// W is unpacked in registers for MT rows of x at a time. Unpacking it to memory once for all rows was no faster:
// twice the bytes then come from the cache.
#include <immintrin.h>

#include "quant_panel.h"

#define TL_FN static inline __attribute__((always_inline, target(TL_TARGET)))
#define TL_METHOD inline __attribute__((always_inline, target(TL_TARGET)))

namespace tl::cpu {
namespace {

using Int = __m256i;
using Float = __m256;
using Activations = tl_activation_block;

TL_FN Int load(const void* p) { return _mm256_loadu_si256(static_cast<const Int*>(p)); }
TL_FN Int broadcast4(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
TL_FN Float halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
TL_FN Int ones() { return _mm256_set1_epi16(1); }

// Keeps a running sum in its register. GCC would otherwise add up all products of a block as a tree, with most of them
// on the stack meanwhile: a third of the speed.
TL_FN Int pinned(Int sums) {
  __asm__("" : "+x"(sums));
  return sums;
}
// Unsigned u times signed s, added to sums: of pairs in 16 bits, or of fours in 32.
TL_FN Int add_products(Int sums, Int u, Int s) {
#if TL_VNNI
  return _mm256_dpbusd_epi32(sums, u, s);
#else
  return pinned(_mm256_add_epi16(sums, _mm256_maddubs_epi16(u, s)));
#endif
}
// Such sums as one integer a row.
TL_FN Int finish(Int sums) {
#if TL_VNNI
  return sums;
#else
  return _mm256_madd_epi16(sums, ones());
#endif
}
// The same with |u| up to 128, where two pairs may not fit in 16 bits.
TL_FN Int add_wide_products(Int sums, Int u, Int s) {
#if TL_VNNI
  return _mm256_dpbusd_epi32(sums, u, s);
#else
  return pinned(_mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), ones())));
#endif
}
// Sums that begin at -32 sum x, and their end: times s, of which both halves of a lane hold the row's.
TL_FN Int start_sums(const int16_t* offset) {
#if TL_VNNI
  return _mm256_madd_epi16(broadcast4(offset), ones());
#else
  return broadcast4(offset);
#endif
}
TL_FN Int finish_scaled(Int sums, Int s) {
#if TL_VNNI
  return _mm256_mullo_epi32(sums, _mm256_srai_epi32(s, 16));
#else
  return _mm256_madd_epi16(sums, s);
#endif
}

// Asks for n cache lines, `ahead` bytes on: the same place in the next panel. The hardware alone keeps too few lines of
// W under way between two cores' worth of arithmetic: a quarter of the speed of one row of x.
TL_FN void fetch(const uint8_t* p, int64_t ahead, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i)
    _mm_prefetch(reinterpret_cast<const char*>(p) + ahead + i * 64, _MM_HINT_T1);
}

// Codes: quads j and j + 4 of a block.
struct Nibbles {
  const uint8_t* codes;
  int64_t ahead;
  TL_METHOD void fetch_next(int64_t b) const { fetch(codes + b * 128, ahead, 2); }
  TL_METHOD void pair(int64_t b, int j, Int& low, Int& high) const {
    const Int mask = _mm256_set1_epi8(15), packed = load(codes + b * 128 + j * 32);
    low = _mm256_and_si256(packed, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
  }
};
struct SixBits {
  const uint8_t *codes, *upper;
  int64_t ahead;
  TL_METHOD void fetch_next(int64_t b) const {
    fetch(codes + b * 128, ahead, 2);
    fetch(upper + b * 64, ahead, 1);
  }
  TL_METHOD void pair(int64_t b, int j, Int& low, Int& high) const {
    Nibbles{codes, 0}.pair(b, j, low, high);
    low = _mm256_or_si256(low, two_bits(load(upper + b * 64), j));
    high = _mm256_or_si256(high, two_bits(load(upper + b * 64 + 32), j));
  }
  static TL_METHOD Int two_bits(Int packed, int j) {  // bits 2j of each byte, at bit 4
    const Int moved = j < 2 ? _mm256_slli_epi16(packed, 4 - 2 * j) : _mm256_srli_epi16(packed, 2 * j - 4);
    return _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
  }
};
struct Bytes {
  const uint8_t* codes;
  int64_t ahead;
  TL_METHOD void fetch_next(int64_t b) const { fetch(codes + b * 256, ahead, 4); }
  TL_METHOD void pair(int64_t b, int j, Int& low, Int& high) const {
    low = load(codes + b * 256 + j * 32);
    high = load(codes + b * 256 + j * 32 + 128);
  }
};

// Scales d and minima m of a block.
struct ScaleOfBlock {  // Q4_0
  const uint8_t* scales;
  TL_METHOD void get(int64_t b, Float& d, Float& m) {
    d = halves(scales + b * 16);
    m = _mm256_mul_ps(d, _mm256_set1_ps(-8));
  }
};
struct ScaleAndMin {  // int4
  const uint8_t* scales;
  int shift;
  TL_METHOD void get(int64_t b, Float& d, Float& m) {
    const uint8_t* at = scales + (b >> shift) * 32;
    d = halves(at);
    m = halves(at + 16);
  }
};
struct SixBitScales {  // Q4_K: 8 blocks at a time
  const uint8_t* scales;
  Float d[8], m[8];
  TL_METHOD void get(int64_t b, Float& d_out, Float& m_out) {
    if (b % 8 == 0) unpack(scales + b / 8 * 128);
    d_out = d[b % 8];
    m_out = m[b % 8];
  }
  TL_METHOD void unpack(const uint8_t* at) {
    const Float d_all = halves(at), m_all = _mm256_xor_ps(halves(at + 16), _mm256_set1_ps(-0.f));
    const Int s = load(at + 32), t = load(at + 64), upper = load(at + 96);  // 4 bytes a row
    const Int six = _mm256_set1_epi8(63), four = _mm256_set1_epi8(15), two = _mm256_set1_epi8(0x30);
    Int s_of[2] = {_mm256_and_si256(s, six), _mm256_and_si256(upper, four)};
    Int t_of[2] = {_mm256_and_si256(t, six), _mm256_and_si256(_mm256_srli_epi16(upper, 4), four)};
    s_of[1] = _mm256_or_si256(s_of[1], _mm256_and_si256(_mm256_srli_epi16(s, 2), two));
    t_of[1] = _mm256_or_si256(t_of[1], _mm256_and_si256(_mm256_srli_epi16(t, 2), two));
    const Int byte = _mm256_set1_epi32(255);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Int s_i = _mm256_and_si256(_mm256_srli_epi32(s_of[i / 4], i % 4 * 8), byte);
      const Int t_i = _mm256_and_si256(_mm256_srli_epi32(t_of[i / 4], i % 4 * 8), byte);
      d[i] = _mm256_mul_ps(d_all, _mm256_cvtepi32_ps(s_i));
      m[i] = _mm256_mul_ps(m_all, _mm256_cvtepi32_ps(t_i));
    }
  }
};

// 4-bit codes, scale and minimum: MT rows of x, of nb blocks each.
template <int MT, class Codes, class Scales>
TL_FN void add_blocks(Float (&acc)[MT], Codes codes, Scales& scales, const Activations* x, int64_t nb) {
  for (int64_t b = 0; b < nb; ++b, ++x) {
    codes.fetch_next(b);
    Int sums[MT];
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) sums[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Int low, high;
      codes.pair(b, j, low, high);
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        sums[m] = add_products(sums[m], low, broadcast4(x[m * nb].q + j * 4));
        sums[m] = add_products(sums[m], high, broadcast4(x[m * nb].q + j * 4 + 16));
      }
    }
    Float d, min;
    scales.get(b, d, min);
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      const Activations& a = x[m * nb];
      const Float sum = _mm256_mul_ps(_mm256_cvtepi32_ps(finish(sums[m])), _mm256_set1_ps(a.d));
      acc[m] = _mm256_fmadd_ps(sum, d, acc[m]);
      acc[m] = _mm256_fmadd_ps(min, _mm256_set1_ps(a.s), acc[m]);
    }
  }
}

// Q6_K: codes less 32, scales s of 16 values each and d of 256.
struct TwoScales {
  const uint8_t *scales, *tail;
};
template <int MT, class Codes>
TL_FN void add_blocks(Float (&acc)[MT], Codes codes, TwoScales& scales, const Activations* x, int64_t nb) {
  const __m128i twice = _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
  const Int first_of = _mm256_broadcastsi128_si256(twice);
  const Int second_of = _mm256_add_epi8(first_of, _mm256_set1_epi8(2));
  for (int64_t b = 0; b < nb; ++b, ++x) {
    codes.fetch_next(b);
    Int first[MT], second[MT];
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      first[m] = start_sums(x[m * nb].offset);
      second[m] = start_sums(x[m * nb].offset + 2);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Int low, high;
      codes.pair(b, j, low, high);
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        first[m] = add_products(first[m], low, broadcast4(x[m * nb].q + j * 4));
        second[m] = add_products(second[m], high, broadcast4(x[m * nb].q + j * 4 + 16));
      }
    }
    const Int s = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales.scales + b * 16)));
    const Int s_first = _mm256_shuffle_epi8(s, first_of), s_second = _mm256_shuffle_epi8(s, second_of);
    const Float d = halves(scales.tail + b / 8 * 16);
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      const Int sum = _mm256_add_epi32(finish_scaled(first[m], s_first), finish_scaled(second[m], s_second));
      acc[m] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(x[m * nb].d)), d, acc[m]);
    }
  }
}

// Signed 8-bit codes with one scale: |q| times x with q's sign.
struct Scale {
  const uint8_t* scales;
  int shift;
};
template <int MT>
TL_FN void add_blocks(Float (&acc)[MT], Bytes codes, Scale& scales, const Activations* x, int64_t nb) {
  for (int64_t b = 0; b < nb; ++b, ++x) {
    codes.fetch_next(b);
    Int sums[MT];
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) sums[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t) {
      const Int q = load(codes.codes + b * 256 + t * 32), size = _mm256_abs_epi8(q);
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        const Int signed_x = _mm256_sign_epi8(broadcast4(x[m * nb].q + t * 4), q);
        sums[m] = add_wide_products(sums[m], size, signed_x);
      }
    }
    const Float d = halves(scales.scales + (b >> scales.shift) * 16);
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) {
      const Float sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[m]), _mm256_set1_ps(x[m * nb].d));
      acc[m] = _mm256_fmadd_ps(sum, d, acc[m]);
    }
  }
}

// Where the results of a panel go.
struct Output {
  float* y;
  int64_t stride;
  Int mask;  // of the lanes that exist
};

template <int MT, class Codes, class Scales>
TL_FN void tile(const Output& out, Codes codes, Scales scales, const Activations* x, int64_t nb) {
  Float acc[MT];
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) acc[m] = _mm256_setzero_ps();
  add_blocks<MT>(acc, codes, scales, x, nb);
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) _mm256_maskstore_ps(out.y + m * out.stride, out.mask, acc[m]);
}

// All rows of x, MT at a time.
template <class Codes, class Scales>
__attribute__((noinline, target(TL_TARGET))) void all_rows(Output out, Codes codes, Scales scales, const Activations* x,
                                                           int64_t rows, int64_t nb) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4, x += 4 * nb, out.y += 4 * out.stride) tile<4>(out, codes, scales, x, nb);
  if (rows - m == 3) tile<3>(out, codes, scales, x, nb);
  if (rows - m == 2) tile<2>(out, codes, scales, x, nb);
  if (rows - m == 1) tile<1>(out, codes, scales, x, nb);
}

// A panel against `rows` rows of x, which have nb blocks.
__attribute__((target(TL_TARGET))) void one_panel(const tl_quant_matrix& w, const Sections& at, const uint8_t* panel,
                                                  const Output& out, const Activations* x, int64_t rows) {
  const int64_t nb = w.k / TL_BLOCK, next = at.bytes;
  const uint8_t *scales = panel + at.scales, *high = panel + at.high, *tail = panel + at.tail;
  const int shift = w.format >= TL_INT4 ? group_shift(w.k, w.group) : 0;
  fetch(scales, next, (at.bytes - at.scales) / 64);
  switch (w.format) {
    case TL_Q4_0: return all_rows(out, Nibbles{panel, next}, ScaleOfBlock{scales}, x, rows, nb);
    case TL_Q4_K: return all_rows(out, Nibbles{panel, next}, SixBitScales{scales, {}, {}}, x, rows, nb);
    case TL_Q6_K: return all_rows(out, SixBits{panel, high, next}, TwoScales{scales, tail}, x, rows, nb);
    case TL_INT4: return all_rows(out, Nibbles{panel, next}, ScaleAndMin{scales, shift}, x, rows, nb);
    default: return all_rows(out, Bytes{panel, next}, Scale{scales, shift}, x, rows, nb);
  }
}

// Bytes of x that stay in the second-level cache while W passes by.
constexpr int64_t CACHED = 192 << 10;

__attribute__((target(TL_TARGET))) void matmul(const tl_quant_matrix& w, const Activations* x, int64_t rows, int64_t n0,
                                               int64_t n1, float* y, int64_t stride) {
  const Sections at = sections(w.format, w.k, w.group);
  const int64_t nb = w.k / TL_BLOCK, fit = CACHED / (nb * int64_t{sizeof(Activations)}) / 4 * 4;
  const int64_t some = fit < 8 ? 8 : fit;
  const Int lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t m = 0; m < rows; m += some) {
    for (int64_t n = n0; n < n1; n += TL_PANEL) {
      const int lanes = static_cast<int>(n1 - n < 8 ? n1 - n : 8);
      const Output out{y + m * stride + n, stride, _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), lane)};
      one_panel(w, at, w.panels + n / TL_PANEL * at.bytes, out, x + m * nb, rows - m < some ? rows - m : some);
    }
  }
}

__attribute__((target(TL_TARGET))) void quantise(const float* x, int64_t blocks, Activations* out) {
  const Int size = _mm256_set1_epi32(0x7fffffff);
  for (int64_t b = 0; b < blocks; ++b, x += TL_BLOCK) {
    Float v[4];
    Int most = _mm256_setzero_si256();  // bits of |x|, of which NaN's are the largest
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(x + i * 8);
      most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), size));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(m));
    const bool finite = _mm_cvtsi128_si32(m) < 0x7f800000, some = finite && largest >= TINY;
    const Float inverse = _mm256_set1_ps(some ? 127.f / largest : 0);
    const float d = some ? largest / 127.f : finite ? 0 : __builtin_nanf("");
    Int q[4];
    for (int i = 0; i < 4; ++i) {
      q[i] = some ? _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse)) : _mm256_setzero_si256();
    }
    // 32 integers as bytes: packing works in halves of a vector, and the order is put right at the end.
    const Int pairs = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const Int bytes = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<Int*>(out[b].q), bytes);
    // Lanes of 16 bits: sums of two neighbours; then of four lanes that are 4 values apart.
    const Int twos = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    Int sums = _mm256_add_epi16(twos, _mm256_shuffle_epi32(twos, 0x4e));
    sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0xb1));
    const Int offset = _mm256_mullo_epi16(sums, _mm256_set1_epi16(-32));
    const int32_t halves[2] = {_mm256_extract_epi32(offset, 0), _mm256_extract_epi32(offset, 4)};
    std::memcpy(out[b].offset, halves, 8);
    const Int fours = _mm256_madd_epi16(sums, ones());
    out[b].d = d;
    out[b].s = d * static_cast<float>(_mm256_extract_epi32(fours, 0) + _mm256_extract_epi32(fours, 4));
  }
}

}  // namespace

extern const Kernels TL_KERNELS = {quantise, matmul};

}  // namespace tl::cpu
