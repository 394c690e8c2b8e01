// Where things lie in a panel of 8 quantised rows; quant_matmul.h has the order of the bytes.
#pragma once
#include "quant_matmul.h"

#include <cstring>

namespace tl::cpu {

struct Sections {
  int64_t high, scales, tail, bytes;  // offsets from the panel's start; tail: Q6_K's d
};

inline Sections sections(int format, int64_t k, int64_t group) {
  const int64_t nb = k / TL_BLOCK, panel = TL_PANEL;
  switch (format) {
    case TL_Q4_0: return {0, nb * 16 * panel, 0, nb * 18 * panel};
    case TL_Q4_K: return {0, nb * 16 * panel, 0, nb * 18 * panel};
    case TL_Q6_K: return {nb * 16 * panel, nb * 24 * panel, nb * 26 * panel, nb * 26 * panel + nb / 8 * 2 * panel};
    case TL_INT4: return {0, nb * 16 * panel, 0, nb * 16 * panel + k / group * 4 * panel};
    default: return {0, nb * 32 * panel, 0, nb * 32 * panel + k / group * 2 * panel};
  }
}

// Block b has its scale at index b >> shift: a group is 1, 2 or 4 blocks, or the row.
inline int group_shift(int64_t k, int64_t group) {
  return group == k ? 62 : group == 4 * TL_BLOCK ? 2 : group == 2 * TL_BLOCK ? 1 : 0;
}

inline bool suits(int format, int64_t k, int64_t group) {
  if (k <= 0 || k % TL_BLOCK) return false;
  if (format == TL_Q4_0) return true;
  if (format == TL_Q4_K || format == TL_Q6_K) return k % 256 == 0;
  if (format != TL_INT4 && format != TL_INT8) return false;
  const bool small = group == 32 || group == 64 || group == 128;
  return (small || (group == k && format == TL_INT8)) && k % group == 0;
}

// Below this a block of activations is zero: 127 / x would overflow.
constexpr float TINY = 1e-36f;

// One set of functions an instruction set.
struct Kernels {
  void (*quantise)(const float* x, int64_t blocks, tl_activation_block* out);
  void (*matmul)(const tl_quant_matrix& w, const tl_activation_block* x, int64_t rows, int64_t n0, int64_t n1, float* y,
                 int64_t stride);
};
extern const Kernels portable, avx2, avx512_vnni;

}  // namespace tl::cpu
