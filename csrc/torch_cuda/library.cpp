// The border of this library of CUDA code, which the program loads where there is a card (src/ffi/cuda.rs).
#include "api.h"

static void (*report)(const char* text, size_t length) = nullptr;

extern "C" void tl_cuda_library_open(void (*set_last_error)(const char*, size_t)) { report = set_last_error; }

// The program keeps the text of a failure; for TL_GUARD here.
extern "C" void tl_set_last_error(const char* text, size_t length) {
  if (report) report(text, length);
}
