// The launches of csrc/decode as C functions, for kernels.py.
#include "decode/decode.h"
using namespace tl;
#define ABI(name, S) extern "C" int tl_##name(const S* p, void* s) { return name(*p, static_cast<cudaStream_t>(s)); }
ABI(gemv, Gemv) ABI(paged_attention, PagedAttention) ABI(rope_cache, RopeCache) ABI(decode_step, DecodeStep)
ABI(sample, Sample) ABI(embed, Embed) ABI(dequantize, Dequantize) ABI(rms_norm_forward, RmsNorm) ABI(swiglu_forward, SwiGlu)
extern "C" int tl_splits(int b, int g, int l) { return paged_attention_splits(b, g, l); }
extern "C" int64_t tl_workspace(const DecodeStep* p) { return decode_step_workspace(*p); }
extern "C" int tl_sizes(int i) { const int s[] = {sizeof(Gemv), sizeof(PagedAttention), sizeof(RopeCache), sizeof(DecodeStep), sizeof(Sample), sizeof(Embed), sizeof(Dequantize), sizeof(RmsNorm), sizeof(SwiGlu), sizeof(DecodeLayer)}; return s[i]; }
