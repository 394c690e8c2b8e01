// Turns any C++ exception at the C border into a return code and a message (see api.h).
#pragma once
#include <exception>
#include <string>

std::string& tl_error_text();  // thread-local, defined in runtime.cpp

#define TL_GUARD(...)                                \
  try {                                              \
    __VA_ARGS__;                                     \
    return 0;                                        \
  } catch (const std::exception& e) {                \
    tl_error_text() = e.what();                      \
  } catch (...) {                                    \
    tl_error_text() = "unknown C++ exception";       \
  }                                                  \
  return 1
