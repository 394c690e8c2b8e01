// Products of activations with quantised weights on the CPU: y (M, N) = x (M, K) W (N, K)^T, fp32 in and out.
//
// Weights lie in panels of 8 rows (src/quant/panel.rs packs them, from GGUF's blocks or from fp32), so that 8 rows are
// the 8 lanes of a vector and no sum crosses lanes. Activations are rounded to 8 bits by blocks of 32 along K, once for
// all matrices that share them. Element (m, n) is
//   acc = 0;  for each block b of 32 along K, in order:
//     isum = sum q_w q_x                          exact, in integers
//     acc  = fma(float(isum) * d_x[b], d_w[n, b], acc)
//     acc  = fma(m_w[n, b], s_x[b], acc)          s_x = d_x sum q_x; formats with a minimum
// whatever M is, which rows share a call, and which part of N a thread has: the same bits from all of these and from
// every instruction set. No allocation, no thread, no OpenMP inside; the caller splits N in whole panels.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Rows of a panel; values of an activation block.
enum { TL_PANEL = 8, TL_BLOCK = 32 };

// How a weight is stored. K is a multiple of 32, of 256 for the K types, of `group` for the last two.
//
// A panel is its codes, then the high bits (Q6_K), then the scales. nb = K / 32. "Quad" t of a block is its values
// 4t to 4t + 3. All of one section lie together: [block][...][row 0 to 7][...].
//   4-bit codes  [nb][j of 4][row of 8][i of 4]: low nibble value 4j + i of the block, high nibble value 16 + 4j + i
//   8-bit codes  [nb][t of 8][row of 8][i of 4], signed
typedef enum {
  TL_Q4_0 = 0,  // w = d (q - 8);       scales [nb][d: 8 halves]
  TL_Q4_K = 1,  // w = d s q - m t;     scales [nb / 8][d: 8 halves][m: 8 halves][4 bytes of each row][4][4], GGUF's 12
  TL_Q6_K = 2,  // w = d s (q - 32);    high [nb][half of 2][row][i]: bits 2j of half h: quad 4h + j;
                //                      scales [nb][row][s of values 0-15, s of 16-31], then [nb / 8][d: 8 halves]
  TL_INT4 = 3,  // w = scale q + min;   scales [K / group][scale: 8 halves][min: 8 halves]
  TL_INT8 = 4,  // w = scale q;         scales [K / group][scale: 8 halves]; with group 32 GGUF's Q8_0
} tl_quant_format;

typedef struct {
  const uint8_t* panels;  // ceil(n / 8) of them, each tl_panel_bytes; rows beyond n are zeros
  int64_t n, k;
  int32_t format;
  int32_t group;  // values that share a scale, INT4 and INT8
} tl_quant_matrix;

// 32 activations: x = d q. 48 bytes.
typedef struct {
  int8_t q[TL_BLOCK];
  float d;
  float s;           // d * sum q
  int16_t offset[4];  // -32 * (the sums over values i % 4 < 2, i % 4 >= 2 of the first 16; the same of the second 16)
} tl_activation_block;

// Instruction sets; a better one includes the lower ones.
enum { TL_ISA_PORTABLE = 0, TL_ISA_AVX2 = 1, TL_ISA_AVX512_VNNI = 2 };

// The best one that this processor has and this build knows.
int tl_cpu_isa(void);

// Bytes of a panel; 0 where K does not suit the format.
int64_t tl_panel_bytes(int32_t format, int64_t k, int32_t group);

// x (rows, k) with `stride` values between rows -> out (rows, k / 32).
void tl_quantise_activations(int isa, const float* x, int64_t rows, int64_t k, int64_t stride,
                             tl_activation_block* out);

// y[m, n] for m < rows, n0 <= n < n1, n0 a multiple of 8; y has `stride` values between rows.
void tl_quant_matmul(int isa, const tl_quant_matrix* w, const tl_activation_block* x, int64_t rows, int64_t n0,
                     int64_t n1, float* y, int64_t stride);

#ifdef __cplusplus
}
#endif
