// Quantised products with AVX2, FMA and F16C (2013 and later).
#if defined(__x86_64__)
#define TL_TARGET "avx2,fma,f16c"
#define TL_KERNELS avx2
#define TL_VNNI 0
#include "quant_tile.h"
#endif
