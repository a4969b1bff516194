// A few channels of a row for each lane, between memory and fp32 registers.
#pragma once
#include "ptx.cuh"

namespace vlm {

using fp32 = float;
using Io = VLM_IO;

constexpr bool kAligned = VLM_ALIGNED;
// elements in 16 bytes
constexpr int kVector = 16 / int(sizeof(Io));

template <int N> struct Channels {
  float of[N];

  static __device__ __forceinline__ Channels all(float x) {
    Channels v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.of[i] = x;
    return v;
  }
};

__device__ __forceinline__ float widen_one(float x) { return x; }
template <class T> __device__ __forceinline__ float widen_one(T x) { return unpack<T>(x.bits).x; }

template <class T> __device__ __forceinline__ T narrow_one(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else return T{static_cast<unsigned short>(pack<T>(x, 0.0f))};
}

// neighbours, in accesses of up to 16 bytes
template <class T, int N> __device__ __forceinline__ Channels<N> load_vector(const T *from) {
  static_assert(N == 2 || N == 4 || N == 8, "whole accesses");
  Channels<N> v;
  if constexpr (sizeof(T) == 4 && N == 2) {
    const float2 w = *reinterpret_cast<const float2 *>(from);
    v.of[0] = w.x, v.of[1] = w.y;
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 w = *reinterpret_cast<const float4 *>(from + i);
      v.of[i] = w.x, v.of[i + 1] = w.y, v.of[i + 2] = w.z, v.of[i + 3] = w.w;
    }
  } else {
    unsigned words[N / 2];
    if constexpr (N == 2) {
      words[0] = *reinterpret_cast<const unsigned *>(from);
    } else if constexpr (N == 4) {
      const float2 w = *reinterpret_cast<const float2 *>(from);
      words[0] = __float_as_uint(w.x), words[1] = __float_as_uint(w.y);
    } else {
      const uint4 w = *reinterpret_cast<const uint4 *>(from);
      words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 two = unpack<T>(words[i]);
      v.of[2 * i] = two.x, v.of[2 * i + 1] = two.y;
    }
  }
  return v;
}

// to global memory
template <class T, int N> __device__ __forceinline__ void store_vector(T *to, const Channels<N> &v) {
  static_assert(N == 2 || N == 4 || N == 8, "whole accesses");
  constexpr int count = N * int(sizeof(T)) / 4, most = count < 4 ? count : 4;
#pragma unroll
  for (int first = 0; first < count; first += most) {
    unsigned words[most];
#pragma unroll
    for (int i = 0; i < most; ++i) {
      if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(v.of[first + i]);
      else words[i] = pack<T>(v.of[2 * (first + i)], v.of[2 * (first + i) + 1]);
    }
    if constexpr (most == 1) *reinterpret_cast<unsigned *>(to) = words[0];
    else store_words(to + first * 4 / int(sizeof(T)), words);
  }
}

// Which channels of a piece of a row, N * Lanes long, are this lane's. Of an aligned row they are neighbours and make
// one access; of another one every Lanes-th, so that the lanes' accesses still lie side by side.
template <int N, int Lanes> struct Columns {
  int lane;
  int count;  // channels of the piece that exist; of an aligned row whole vectors

  __device__ __forceinline__ int at(int i) const { return kAligned ? lane * N + i : lane + Lanes * i; }
  __device__ __forceinline__ bool has(int i) const { return at(i) < count; }

  // channels that do not exist are zero
  template <class T> __device__ __forceinline__ Channels<N> load(const T *piece) const {
    if constexpr (kAligned) {
      return has(0) ? load_vector<T, N>(piece + at(0)) : Channels<N>::all(0.0f);
    } else {
      Channels<N> v;
#pragma unroll
      for (int i = 0; i < N; ++i) v.of[i] = has(i) ? widen_one(piece[at(i)]) : 0.0f;
      return v;
    }
  }

  // from a room where all channels have a place
  template <class T> __device__ __forceinline__ Channels<N> load_all(const T *piece) const {
    return Columns{lane, N * Lanes}.load(piece);
  }

  // to global memory
  template <class T> __device__ __forceinline__ void store(T *piece, const Channels<N> &v) const {
    if constexpr (kAligned) {
      if (has(0)) store_vector(piece + at(0), v);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (has(i)) piece[at(i)] = narrow_one<T>(v.of[i]);
    }
  }
};

}  // namespace vlm
