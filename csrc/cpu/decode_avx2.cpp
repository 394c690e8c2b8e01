// Attention and its neighbours with AVX2, FMA and F16C.
#if defined(__x86_64__)
#define TL_TARGET "avx2,fma,f16c"
#define TL_VECTOR 1
#define TL_KERNELS decode_avx2
#include "decode_tile.h"
#endif
