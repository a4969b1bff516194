// Rows between global and shared memory, and pairs of channels between memory and registers.
#pragma once
#include "layout.cuh"

namespace vlm {

template <class T> struct Pairs {
  static __device__ __forceinline__ float2 load(const T *from) {
    return unpack<T>(*reinterpret_cast<const unsigned *>(from));
  }
  static __device__ __forceinline__ void store(T *to, float2 v) {
    *reinterpret_cast<unsigned *>(to) = pack<T>(v.x, v.y);
  }
  static __device__ __forceinline__ float widen(T x) { return unpack<T>(x.bits).x; }
  static __device__ __forceinline__ T narrow(float x) { return T{static_cast<unsigned short>(pack<T>(x, 0.0f))}; }
  static __device__ __forceinline__ T zero() { return T{0}; }
};

template <> struct Pairs<float> {
  static __device__ __forceinline__ float2 load(const float *from) { return *reinterpret_cast<const float2 *>(from); }
  static __device__ __forceinline__ void store(float *to, float2 v) { *reinterpret_cast<float2 *>(to) = v; }
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
  static __device__ __forceinline__ float zero() { return 0.0f; }
};

// `there` of the two channels exist; only an aligned row has a pair at an address of its own
template <class T> __device__ __forceinline__ float2 load_global(const T *from, int there) {
  if (kAligned) return there > 0 ? Pairs<T>::load(from) : make_float2(0.0f, 0.0f);
  return make_float2(there > 0 ? Pairs<T>::widen(from[0]) : 0.0f, there > 1 ? Pairs<T>::widen(from[1]) : 0.0f);
}

template <class T> __device__ __forceinline__ void store_global(T *to, float2 v, int there) {
  if (kAligned) {
    if (there > 0) Pairs<T>::store(to, v);
    return;
  }
  if (there > 0) to[0] = Pairs<T>::narrow(v.x);
  if (there > 1) to[1] = Pairs<T>::narrow(v.y);
}

// the times of a tile's rows in scan order; those beyond the sequence, at either end, do not exist
struct Times {
  int origin, sign, length;

  __device__ __forceinline__ int at(int row) const { return origin + sign * row; }
  __device__ __forceinline__ bool has(int row) const {
    return static_cast<unsigned>(at(row)) < static_cast<unsigned>(length);
  }
  // which step of the scan the first row is; negative where the rows before the sequence's end are missing
  __device__ __forceinline__ int first_step() const { return sign < 0 ? length - 1 - origin : origin; }
};

// `Columns` elements of each row of a tile, `columns` of which exist, to rows `Stride` apart; zeros elsewhere
template <int Columns, int Stride, int Rows = kRows, class T>
__device__ __forceinline__ void fetch(T *to, const T *from, long long row_stride, int columns, const Times &times,
                                      int lane) {
  // a product of 32-bit numbers is one instruction, of 64-bit ones it is four
  const int stride = static_cast<int>(row_stride);
#if VLM_ALIGNED
  constexpr int chunks = Columns / kVector;
#pragma unroll
  for (int first = 0; first < Rows * chunks; first += 32) {
    const int i = first + lane, row = i / chunks, column = i % chunks * kVector;
    if (Rows * chunks % 32 && i >= Rows * chunks) break;
    copy_async(to + row * Stride + column, from + static_cast<long long>(times.at(row)) * stride + column,
               times.has(row) && column < columns);
  }
#else
  for (int i = lane; i < Rows * Columns; i += 32) {
    const int row = i / Columns, column = i % Columns;
    const bool there = times.has(row) && column < columns;
    const T *source = from + static_cast<long long>(times.at(row)) * stride + column;
    to[row * Stride + column] = there ? *source : Pairs<T>::zero();
  }
#endif
}

}  // namespace vlm
