// Turns any C++ exception at the C border into a return code and a message (see api.h).
#pragma once
#include <cstring>
#include <exception>

#include "api.h"

#define TL_GUARD(...)                                    \
  try {                                                  \
    __VA_ARGS__;                                         \
    return 0;                                            \
  } catch (const std::exception& e) {                    \
    tl_set_last_error(e.what(), std::strlen(e.what()));  \
  } catch (...) {                                        \
    constexpr char text[] = "unknown C++ exception";     \
    tl_set_last_error(text, sizeof text - 1);            \
  }                                                      \
  return 1
