// Quantised products with AVX-512's byte products (Ice Lake, Zen 4 and later), in 256 bits: no slower clock.
#if defined(__x86_64__)
#define TL_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"
#define TL_KERNELS avx512_vnni
#define TL_VNNI 1
#include "quant_tile.h"
#endif
