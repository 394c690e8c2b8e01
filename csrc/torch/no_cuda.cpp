// What a build without CUDA answers to a call of a kernel.
#ifndef TL_WITH_CUDA
#include <stdexcept>

#include "api.h"
#include "guard.h"

#define TL_ABSENT(NAME, ...)                                                                                  \
  extern "C" int NAME(__VA_ARGS__) {                                                                          \
    TL_GUARD(throw std::runtime_error("this binary was built without CUDA kernels; run ./scripts/setup.sh "   \
                                      "and build again"));                                                    \
  }
using T = TlTensor;
TL_ABSENT(tl_flash_attention, T, T, T, T, T, double, int, int, int, T*, T*)
TL_ABSENT(tl_flash_attention_qkv, T, int64_t, int64_t, T, T, T, T, double, int, int, int, T*)
TL_ABSENT(tl_linear, T, T, T*, T*)
TL_ABSENT(tl_norm_linear, T, T, T, double, T, T*, T*, T*)
TL_ABSENT(tl_norm_mlp, T, T, T, double, T, T, T, T*, T*, T*, T*)
TL_ABSENT(tl_fp8_cast_weight, T, T, T*)
TL_ABSENT(tl_fp8_update, T)
TL_ABSENT(tl_set_matmul, int, const char*)
TL_ABSENT(tl_rms_norm, T, T, T, double, T*, T*)
TL_ABSENT(tl_rope, T, T, T, int64_t, int64_t, T*)
TL_ABSENT(tl_swiglu, T, T*)
TL_ABSENT(tl_swiglu_mlp, T, T, T, T, T*)
TL_ABSENT(tl_cross_entropy, T, T, double, double, double, T*)
TL_ABSENT(tl_head_loss, T, T, T, int64_t, double, double, double, T*)
TL_ABSENT(tl_adamw, int, const TlAdamWTensors*, T, double, double, double, double, double, int64_t)
TL_ABSENT(tl_grad_norm, int, T*, double, T, T*, T*)
TL_ABSENT(tl_graph_begin, void*, void**)
TL_ABSENT(tl_graph_end, void*)
TL_ABSENT(tl_graph_replay, void*)
TL_ABSENT(tl_stage_new, T, int, void**)
TL_ABSENT(tl_stage_take, void*, T*)
TL_ABSENT(tl_read_back, T, T*, void*)
TL_ABSENT(tl_event_wait, void*)
TL_ABSENT(tl_page_locked, int64_t, int, T*)
TL_ABSENT(tl_link_new, int, int, int, T*, T*, void**)
TL_ABSENT(tl_link_load, void*, int, int64_t, int64_t)
TL_ABSENT(tl_link_store, void*, int, int64_t, int64_t)
TL_ABSENT(tl_link_wait, void*)
TL_ABSENT(tl_event_new, void**)
TL_ABSENT(tl_event_record, void*)
TL_ABSENT(tl_event_elapsed_ms, void*, void*, float*)
TL_ABSENT(tl_profile_start, void)
TL_ABSENT(tl_profile_now, int64_t*)
TL_ABSENT(tl_profile_stop, const TlActivity**, size_t*)
TL_ABSENT(tl_dequantize, const TlWeight*, T*)
TL_ABSENT(tl_decode_attention, const TlDecodeState*, const TlPagedLayer*, T, T*)
TL_ABSENT(tl_decoder_new, const TlDecoder*, void**)
TL_ABSENT(tl_decoder_run, void*, T, T, int)
TL_ABSENT(tl_sample, const TlSample*)
extern "C" void tl_decoder_free(void*) {}
extern "C" void tl_event_free(void*) {}
extern "C" void tl_graph_free(void*) {}
extern "C" void tl_stage_free(void*) {}
extern "C" void tl_link_free(void*) {}
#endif
