// Entry points of quantised products, and the plain form of them: the reference of the others, which give its bits.
#include "quant_matmul.h"

#include <cmath>

#include "quant_panel.h"

namespace tl::cpu {
namespace {

float half_at(const uint8_t* halves, int64_t i) {
  uint16_t h;
  std::memcpy(&h, halves + 2 * i, 2);
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 0) return std::copysign(fraction * 0x1p-24f, sign ? -1.f : 1.f);
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Codes of 8 rows of a block, Q6_K's without their -32.
void unpack(int format, const uint8_t* panel, const Sections& at, int64_t b, int8_t out[TL_PANEL][TL_BLOCK]) {
  for (int r = 0; r < TL_PANEL; ++r) {
    for (int i = 0; i < TL_BLOCK; ++i) {
      const int t = i / 4, byte = r * 4 + i % 4;
      if (format == TL_INT8) {
        out[r][i] = static_cast<int8_t>(panel[b * 256 + t * 32 + byte]);
        continue;
      }
      int q = panel[b * 128 + t % 4 * 32 + byte] >> (t / 4 * 4) & 15;
      if (format == TL_Q6_K) q |= (panel[at.high + b * 64 + t / 4 * 32 + byte] >> (t % 4 * 2) & 3) << 4;
      out[r][i] = static_cast<int8_t>(q);
    }
  }
}

// Scale and minimum of row r in block b. Products of a half and a small integer are exact.
void scale_and_min(const tl_quant_matrix& w, const uint8_t* scales, int64_t b, int r, float& d, float& m) {
  m = 0;
  if (w.format == TL_Q4_0) {
    d = half_at(scales, b * 8 + r);
    m = -8 * d;
  } else if (w.format == TL_Q4_K) {
    const uint8_t *at = scales + b / 8 * 128, *s = at + 32 + r * 4, *t = s + 32, *upper = t + 32;
    const int i = b % 8, j = i % 4;
    const int six_s = i < 4 ? s[j] & 63 : (upper[j] & 15) | s[j] >> 6 << 4;
    const int six_t = i < 4 ? t[j] & 63 : upper[j] >> 4 | t[j] >> 6 << 4;
    d = half_at(at, r) * static_cast<float>(six_s);
    m = -(half_at(at, 8 + r) * static_cast<float>(six_t));
  } else {
    const int64_t group = b >> group_shift(w.k, w.group);
    d = half_at(scales, group * (w.format == TL_INT4 ? 16 : 8) + r);
    if (w.format == TL_INT4) m = half_at(scales, group * 16 + 8 + r);
  }
}

int dot(const int8_t* a, const int8_t* b, int n) {
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

int sum(const int8_t* x, int n) {
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += x[i];
  return sum;
}

void matmul(const tl_quant_matrix& w, const tl_activation_block* x, int64_t rows, int64_t n0, int64_t n1, float* y,
            int64_t stride) {
  const int64_t nb = w.k / TL_BLOCK;
  const Sections at = sections(w.format, w.k, w.group);
  for (int64_t n = n0; n < n1; n += TL_PANEL) {
    const uint8_t *panel = w.panels + n / TL_PANEL * at.bytes, *scales = panel + at.scales;
    const int64_t left = n1 - n, lanes = left < TL_PANEL ? left : int64_t{TL_PANEL};
    for (int64_t m = 0; m < rows; ++m)
      for (int r = 0; r < lanes; ++r) y[m * stride + n + r] = 0;
    for (int64_t b = 0; b < nb; ++b) {
      int8_t q[TL_PANEL][TL_BLOCK];
      unpack(w.format, panel, at, b, q);
      for (int64_t m = 0; m < rows; ++m) {
        const tl_activation_block& a = x[m * nb + b];
        for (int r = 0; r < lanes; ++r) {
          float &acc = y[m * stride + n + r], d, min;
          if (w.format == TL_Q6_K) {
            const auto* s = reinterpret_cast<const int8_t*>(scales + b * 16 + r * 2);
            const int first = dot(q[r], a.q, 16) - 32 * sum(a.q, 16);
            const int second = dot(q[r] + 16, a.q + 16, 16) - 32 * sum(a.q + 16, 16);
            const float d = half_at(panel + at.tail, b / 8 * 8 + r);
            acc = std::fma(static_cast<float>(first * s[0] + second * s[1]) * a.d, d, acc);
            continue;
          }
          scale_and_min(w, scales, b, r, d, min);
          acc = std::fma(static_cast<float>(dot(q[r], a.q, TL_BLOCK)) * a.d, d, acc);
          if (w.format != TL_INT8) acc = std::fma(min, a.s, acc);
        }
      }
    }
  }
}

// d = max |x| / 127; q = x / d to the nearest, ties to even. A NaN or an infinity makes d NaN.
void quantise(const float* x, int64_t blocks, tl_activation_block* out) {
  for (int64_t b = 0; b < blocks; ++b, x += TL_BLOCK) {
    uint32_t most = 0;  // bits of |x|, of which NaN's are the largest
    for (int i = 0; i < TL_BLOCK; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, 4);
      bits &= 0x7fffffff;
      if (bits > most) most = bits;
    }
    float largest;
    std::memcpy(&largest, &most, 4);
    const bool finite = most < 0x7f800000u, some = finite && largest >= TINY;
    const float inverse = some ? 127.f / largest : 0;
    out[b].d = some ? largest / 127.f : finite ? 0 : std::nanf("");
    int sums[2][2] = {};
    for (int i = 0; i < TL_BLOCK; ++i) {
      out[b].q[i] = some ? static_cast<int8_t>(std::nearbyint(x[i] * inverse)) : 0;
      sums[i / 16][i % 4 / 2] += out[b].q[i];
    }
    for (int i = 0; i < 4; ++i) out[b].offset[i] = static_cast<int16_t>(-32 * sums[i / 2][i % 2]);
    out[b].s = out[b].d * static_cast<float>(sums[0][0] + sums[0][1] + sums[1][0] + sums[1][1]);
  }
}

const Kernels& kernels(int isa) {
#if defined(__x86_64__)
  if (isa == TL_ISA_AVX512_VNNI) return avx512_vnni;
  if (isa == TL_ISA_AVX2) return avx2;
#endif
  return portable;
}

}  // namespace

const Kernels portable = {quantise, matmul};

}  // namespace tl::cpu

using namespace tl::cpu;

int tl_cpu_isa(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return TL_ISA_PORTABLE;
  const bool vnni = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vnni");
  return vnni ? TL_ISA_AVX512_VNNI : TL_ISA_AVX2;
#else
  return TL_ISA_PORTABLE;
#endif
}

int64_t tl_panel_bytes(int32_t format, int64_t k, int32_t group) {
  return suits(format, k, group) ? sections(format, k, group).bytes : 0;
}

void tl_quantise_activations(int isa, const float* x, int64_t rows, int64_t k, int64_t stride,
                             tl_activation_block* out) {
  for (int64_t m = 0; m < rows; ++m) kernels(isa).quantise(x + m * stride, k / TL_BLOCK, out + m * (k / TL_BLOCK));
}

void tl_quant_matmul(int isa, const tl_quant_matrix* w, const tl_activation_block* x, int64_t rows, int64_t n0,
                     int64_t n1, float* y, int64_t stride) {
  kernels(isa).matmul(*w, x, rows, n0, n1, y, stride);
}
