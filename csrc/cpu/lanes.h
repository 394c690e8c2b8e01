// Eight floats: an AVX2 vector, or an array that any compiler understands. The same operations in the same order, each
// rounded once, so that both give the same bits. Included once an instruction set, within a namespace of its own.
#include <cmath>
#include <cstdint>
#include <cstring>

#if TL_VECTOR
#include <immintrin.h>
#define TL_FN static inline __attribute__((always_inline, target(TL_TARGET)))
#define TL_ENTRY __attribute__((target(TL_TARGET)))
#else
#define TL_FN static inline __attribute__((always_inline))
#define TL_ENTRY
#endif

namespace tl::cpu {
namespace {

#if TL_VECTOR

using Float8 = __m256;
TL_FN Float8 load8(const float* p) { return _mm256_loadu_ps(p); }
TL_FN void store8(float* p, Float8 x) { _mm256_storeu_ps(p, x); }
TL_FN Float8 all8(float x) { return _mm256_set1_ps(x); }
TL_FN Float8 add8(Float8 a, Float8 b) { return _mm256_add_ps(a, b); }
TL_FN Float8 mul8(Float8 a, Float8 b) { return _mm256_mul_ps(a, b); }
TL_FN Float8 div8(Float8 a, Float8 b) { return _mm256_div_ps(a, b); }
TL_FN Float8 fma8(Float8 a, Float8 b, Float8 c) { return _mm256_fmadd_ps(a, b, c); }
TL_FN Float8 max8(Float8 a, Float8 b) { return _mm256_max_ps(a, b); }  // a > b ? a : b, so b where there is a NaN
TL_FN Float8 pow2_8(Float8 n) {                                         // 2^n of a whole n, -126 to 127
  const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
TL_FN Float8 first8(Float8 x, int n) {  // the first n, then zeros
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
TL_FN Float8 from_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TL_FN Float8 from_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TL_FN Float8 from_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
TL_FN void to_f16(uint16_t* p, Float8 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// out[i][j] = in[j][i] of 8 x 8 floats, whose rows lie a stride apart.
TL_FN void transpose8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 x[8], y[8];
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {  // columns 0-3 of rows j and j + 4; columns 4-7
    const float *upper = in + j * in_stride, *lower = upper + 4 * in_stride;
    x[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper)), _mm_loadu_ps(lower), 1);
    x[j + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper + 4)), _mm_loadu_ps(lower + 4), 1);
  }
#pragma GCC unroll 2
  for (int h = 0; h < 8; h += 4) {
    y[h] = _mm256_unpacklo_ps(x[h], x[h + 1]);
    y[h + 1] = _mm256_unpackhi_ps(x[h], x[h + 1]);
    y[h + 2] = _mm256_unpacklo_ps(x[h + 2], x[h + 3]);
    y[h + 3] = _mm256_unpackhi_ps(x[h + 2], x[h + 3]);
    store8(out + h * out_stride, _mm256_shuffle_ps(y[h], y[h + 2], 0x44));
    store8(out + (h + 1) * out_stride, _mm256_shuffle_ps(y[h], y[h + 2], 0xee));
    store8(out + (h + 2) * out_stride, _mm256_shuffle_ps(y[h + 1], y[h + 3], 0x44));
    store8(out + (h + 3) * out_stride, _mm256_shuffle_ps(y[h + 1], y[h + 3], 0xee));
  }
}

#else

struct Float8 {
  float lane[8];
};
#define TL_EACH(expression)                   \
  Float8 y;                                   \
  for (int i = 0; i < 8; ++i) y.lane[i] = (expression); \
  return y

TL_FN Float8 load8(const float* p) { TL_EACH(p[i]); }
TL_FN void store8(float* p, Float8 x) { std::memcpy(p, x.lane, 32); }
TL_FN Float8 all8(float x) { TL_EACH(x); }
TL_FN Float8 add8(Float8 a, Float8 b) { TL_EACH(a.lane[i] + b.lane[i]); }
TL_FN Float8 mul8(Float8 a, Float8 b) { TL_EACH(a.lane[i] * b.lane[i]); }
TL_FN Float8 div8(Float8 a, Float8 b) { TL_EACH(a.lane[i] / b.lane[i]); }
TL_FN Float8 fma8(Float8 a, Float8 b, Float8 c) { TL_EACH(std::fma(a.lane[i], b.lane[i], c.lane[i])); }
TL_FN Float8 max8(Float8 a, Float8 b) { TL_EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
TL_FN float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
TL_FN uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
TL_FN Float8 pow2_8(Float8 n) { TL_EACH(float_of(static_cast<uint32_t>(static_cast<int>(n.lane[i]) + 127) << 23)); }
TL_FN Float8 first8(Float8 x, int n) { TL_EACH(i < n ? x.lane[i] : 0.f); }
TL_FN float half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24f, sign ? -1.f : 1.f);
  return float_of(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}
// The nearest half, ties to even: adding 2^k puts the last bit that a half keeps at the end of a float.
TL_FN uint16_t to_half(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (size >> 13 & 0x3ff));
  if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x38800000) return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}
TL_FN Float8 from_f16(const uint16_t* p) { TL_EACH(half(p[i])); }
TL_FN Float8 from_bf16(const uint16_t* p) { TL_EACH(float_of(static_cast<uint32_t>(p[i]) << 16)); }
TL_FN Float8 from_i8(const int8_t* p) { TL_EACH(static_cast<float>(p[i])); }
TL_FN void transpose8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) out[i * out_stride + j] = in[j * in_stride + i];
}
TL_FN void to_f16(uint16_t* p, Float8 x) {
  for (int i = 0; i < 8; ++i) p[i] = to_half(x.lane[i]);
}

#endif

// Sum and largest of the lanes: of pairs, then pairs of pairs, whatever the instruction set has.
TL_FN float sum8(Float8 x) {
  float v[8];
  store8(v, x);
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
TL_FN float max_of8(Float8 x) {
  float v[8];
  store8(v, x);
  float most = v[0];
  for (int i = 1; i < 8; ++i) most = most > v[i] ? most : v[i];
  return most;
}

// e^x for x <= 0, to 2 units in the last place; below -87 e^-87; NaN stays. 2^n of x / ln 2 to the nearest whole n,
// times a polynomial of the rest: 1 + r + r^2 (1/2 + ..), |r| < 0.35.
TL_FN Float8 exp8(Float8 x) {
  x = max8(all8(-87.f), x);
  const Float8 shift = all8(12582912.f);  // 1.5 * 2^23: no bit for a fraction
  const Float8 n = add8(fma8(x, all8(1.44269504f), shift), all8(-12582912.f));
  Float8 r = fma8(n, all8(-0.693359375f), x);
  r = fma8(n, all8(2.12194440e-4f), r);
  Float8 p = all8(1.f / 5040);
  p = fma8(p, r, all8(1.f / 720));
  p = fma8(p, r, all8(1.f / 120));
  p = fma8(p, r, all8(1.f / 24));
  p = fma8(p, r, all8(1.f / 6));
  p = fma8(p, r, all8(0.5f));
  p = fma8(mul8(p, r), r, add8(r, all8(1.f)));
  return mul8(p, pow2_8(n));
}

}  // namespace
}  // namespace tl::cpu
