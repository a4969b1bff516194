// What both passes of the scan do alike: states in registers, B and C as fp32, borders of segments.
#pragma once
#include "math.cuh"
#include "problem.cuh"
#include "tile.cuh"

namespace vlm {

// the states of a lane: [channel of the pair][state]
struct States {
  float of[2][kStates];
};

// this lane's states of B or C
struct Row {
  float of[kStates];

  __device__ __forceinline__ explicit Row(const float *from) {
#pragma unroll
    for (int n = 0; n < kStates; n += 4) {
      const float4 v = *reinterpret_cast<const float4 *>(from + n);
      of[n] = v.x;
      of[n + 1] = v.y;
      of[n + 2] = v.z;
      of[n + 3] = v.w;
    }
  }
};

// the decay rates of a lane, for powers of two; `there` channels of its pair exist
template <class Task>
__device__ __forceinline__ States load_decays(const Task &w, const ScanDirection &q, int there) {
  States A;
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int n = 0; n < kStates; ++n)
      A.of[c][n] = c < there ? kLog2E * q.A[(w.lane_channel() + c) * kStateCount + w.part * kStates + n] : 0.0f;
  return A;
}

// States in shared memory, where those of one lane are 32 vectors apart; `at` is the lane's first.
__device__ __forceinline__ void put_states(float4 *at, const States &h) {
#pragma unroll
  for (int i = 0; i < 2 * kStates / 4; ++i) {
    const float *v = h.of[i / (kStates / 4)] + i % (kStates / 4) * 4;
    at[i * 32] = make_float4(v[0], v[1], v[2], v[3]);
  }
}

__device__ __forceinline__ States get_states(const float4 *at) {
  States h;
#pragma unroll
  for (int i = 0; i < 2 * kStates / 4; ++i) {
    float *v = h.of[i / (kStates / 4)] + i % (kStates / 4) * 4;
    const float4 quad = at[i * 32];
    v[0] = quad.x;
    v[1] = quad.y;
    v[2] = quad.z;
    v[3] = quad.w;
  }
  return h;
}

// `Count` halves as fp32, by a warp
template <int Count, class T> __device__ __forceinline__ void widen_halves(const T *from, float *to, int lane) {
  constexpr int vectors = Count / 8;
#pragma unroll 4
  for (int first = 0; first < vectors; first += 32) {
    const int i = first + lane;
    if (vectors % 32 && i >= vectors) break;
    const uint4 words = reinterpret_cast<const uint4 *>(from)[i];
    const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
    reinterpret_cast<float4 *>(to)[2 * i] = make_float4(a.x, a.y, b.x, b.y);
    reinterpret_cast<float4 *>(to)[2 * i + 1] = make_float4(c.x, c.y, d.x, d.y);
  }
}

// before which of `Rows` rows another segment begins, bit by bit; `segments` are those of the batch row
template <int Rows> __device__ __forceinline__ unsigned find_borders(const int *segments, const Times &times, int lane) {
  const int t = times.at(lane), before = t - times.sign;
  const bool border = (Rows == 32 || lane < Rows) && times.has(lane) && before >= 0 && before < times.length;
  return ballot(border && segments[t] != segments[before]);
}

}  // namespace vlm
