// The draws of a seed: rand_chacha's ChaCha8Rng, any one of its numbers by itself.
#pragma once
#include <stdint.h>

namespace tl {

__device__ inline uint32_t rotate_left(uint32_t x, int n) { return __funnelshift_l(x, x, n); }

// The index-th 64-bit number of the stream of `key`, its upper 53 bits as a number in [0, 1).
//
// A block has 16 words, so 8 numbers; its state is constants, key, 64-bit block counter, stream 0; 8 rounds, then the
// first state added. A number is two consecutive words, the low one first.
__device__ inline double chacha8_uniform(const uint32_t* key, uint32_t index) {
  uint32_t first[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
  for (int i = 0; i < 8; ++i) first[4 + i] = key[i];
  first[12] = index / 8;
  first[13] = first[14] = first[15] = 0;
  uint32_t x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = first[i];
  auto quarter = [&](uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
    a += b, d = rotate_left(d ^ a, 16);
    c += d, b = rotate_left(b ^ c, 12);
    a += b, d = rotate_left(d ^ a, 8);
    c += d, b = rotate_left(b ^ c, 7);
  };
#pragma unroll
  for (int round = 0; round < 8; round += 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) quarter(x[i], x[4 + i], x[8 + i], x[12 + i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) quarter(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
  }
  uint64_t number = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // registers have no index
    if (index % 8 == i) number = x[2 * i] + first[2 * i] | static_cast<uint64_t>(x[2 * i + 1] + first[2 * i + 1]) << 32;
  }
  return static_cast<double>(number >> 11) * 0x1p-53;
}

}  // namespace tl
