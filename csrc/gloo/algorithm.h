// Empty: see csrc/gloo/context.h.
#pragma once
