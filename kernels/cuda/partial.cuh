// The sum that the first of two directions leaves for the second: all of fp32, whatever the stored type.
#pragma once
#include "problem.cuh"
#include "tile.cuh"

namespace vlm {

// the words of two floats as two words, high halves and low halves
__device__ __forceinline__ unsigned high_halves(float2 v) {
  return __float_as_uint(v.x) >> 16 | (__float_as_uint(v.y) & 0xffff0000u);
}
__device__ __forceinline__ unsigned low_halves(float2 v) {
  return (__float_as_uint(v.x) & 0xffffu) | __float_as_uint(v.y) << 16;
}
__device__ __forceinline__ float2 join_halves(unsigned high, unsigned low) {
  return make_float2(__uint_as_float(high << 16 | (low & 0xffffu)), __uint_as_float((high & 0xffff0000u) | low >> 16));
}

__device__ __forceinline__ void store_halves(void *to, long long at, unsigned word, int there) {
  if (kAligned) {
    if (there > 0) *reinterpret_cast<unsigned *>(static_cast<unsigned short *>(to) + at) = word;
    return;
  }
  unsigned short *half = static_cast<unsigned short *>(to) + at;
  if (there > 0) half[0] = static_cast<unsigned short>(word);
  if (there > 1) half[1] = static_cast<unsigned short>(word >> 16);
}

__device__ __forceinline__ void store_partial(const ScanForward &p, long long at, float2 y, int there) {
  if (sizeof(Io) == 4) {
    store_global(static_cast<float *>(p.out) + at, y, there);
    return;
  }
  store_halves(p.out, at, high_halves(y), there);
  store_halves(p.total, at, low_halves(y), there);
}

// from where a tile's partial sums were fetched to
template <class T> __device__ __forceinline__ float2 load_partial(const T *partial, int row, int pair) {
  const T *from = partial + row * kTileChannels + 2 * pair;
  if constexpr (sizeof(T) == 4) {
    return Pairs<T>::load(from);
  } else {
    const unsigned low = *reinterpret_cast<const unsigned *>(from + kRows * kTileChannels);
    return join_halves(*reinterpret_cast<const unsigned *>(from), low);
  }
}

}  // namespace vlm
