// The twins of kernels/cuda/ptx.cuh: the same functions for a CPU.
#pragma once
#include "device.h"

namespace vlm {

inline char *shared_memory() { return emulation::running->shared(); }

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float max_or_nan(float x, float y) { return x != x || y != y ? NAN : std::max(x, y); }
inline float reciprocal_approx(float x) { return flushed(1.0f / flushed(x)); }

inline float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

inline float widen(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = std::ldexp(static_cast<float>(fraction), -24);
  return sign ? -small : small;
}

inline void narrow(float value, bf16 *to) {
  const uint32_t bits = __float_as_uint(value);
  if (std::isnan(value)) to->bits = 0x7fff;
  else to->bits = static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void narrow(float value, fp16 *to) {
  const unsigned short sign = static_cast<unsigned short>(__float_as_uint(value) >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (std::isnan(value)) {
    to->bits = 0x7fff;
  } else if (size >= 65520.0f) {
    to->bits = sign | 0x7c00;
  } else if (size < 6.103515625e-5f) {
    to->bits = sign | static_cast<unsigned short>(std::nearbyint(std::ldexp(size, 24)));
  } else {
    const uint32_t bits = __float_as_uint(size);
    to->bits = sign | static_cast<unsigned short>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
  }
}

template <class T> float2 unpack(unsigned word) {
  return {widen(T{static_cast<unsigned short>(word)}), widen(T{static_cast<unsigned short>(word >> 16)})};
}

template <class T> unsigned pack(float first, float second) {
  T low, high;
  narrow(first, &low);
  narrow(second, &high);
  return low.bits | unsigned(high.bits) << 16;
}

template <class T> void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const emulation::Words *all = emulation::running->meet("mma", {{a[0], a[1], a[2], a[3], b[0], b[1]}});
  const unsigned lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; k += 2) {
      const unsigned part = k / 2 % 4;
      const float2 left = unpack<T>(all[row % 8 * 4 + part].word[row / 8 + k / 8 * 2]);
      const float2 right = unpack<T>(all[column * 4 + part].word[4 + k / 8]);
      c[i] += left.x * right.x + left.y * right.y;
    }
  }
}

inline float rounded_to_tf32(unsigned word) {
  const bool is_number = (word >> 23 & 255) != 255;
  return __uint_as_float(is_number ? (word + 0x1000) & ~0x1fffu : word);
}

template <> inline void mma<float>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const emulation::Words *all = emulation::running->meet("mma", {{a[0], a[1], a[2], a[3], b[0], b[1]}});
  const unsigned lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 8; ++k)
      c[i] += rounded_to_tf32(all[row % 8 * 4 + k % 4].word[row / 8 + k / 4 * 2]) *
              rounded_to_tf32(all[column * 4 + k % 4].word[4 + k / 4]);
  }
}

inline float shuffle_xor(float x, int mask) {
  const emulation::Words *all = emulation::running->meet("shuffle_xor", {{__float_as_uint(x)}});
  return __uint_as_float(all[threadIdx.x % 32 ^ unsigned(mask)].word[0]);
}

inline unsigned ballot(bool answer) {
  const emulation::Words *all = emulation::running->meet("ballot", {{answer}});
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= all[i].word[0] << i;
  return bits;
}

template <int Words> void store_words(void *to, const unsigned (&words)[Words]) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof words) throw emulation::Failure("a store is not aligned");
  std::memcpy(to, words, sizeof words);
}

inline int opaque(int x) { return x; }
inline void sync_warp() { emulation::running->meet("sync_warp", {}); }
inline void sync_named(int barrier, int threads) { emulation::running->meet_named(barrier, unsigned(threads)); }
inline void copy_async(void *to, const void *from, bool there) { emulation::running->copy(to, from, there); }
inline void commit_copies() { emulation::running->commit(); }
template <int Pending> void wait_copies() { emulation::running->wait(Pending); }

}  // namespace vlm
