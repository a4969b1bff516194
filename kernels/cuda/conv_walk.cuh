// What both passes of the convolution share: walkers, their rows on the way through shared memory, and the filters.
//
// Step by step a walker takes in the row at time t, and then knows all that the causal direction needs at t and all
// that the anti-causal one needs at t - kReach. So a window of kTaps rows serves both.
#pragma once
#include "columns.cuh"
#include "conv_problem.cuh"

namespace vlm {

constexpr int kTaps = VLM_TAPS, kDirections = VLM_DIRECTIONS;
constexpr bool kSegments = VLM_SEGMENTS;
constexpr int kReach = kTaps - 1;
// steps of a tile: one is fetched while the walker is on another
constexpr int kRows = 8;

static_assert(kTaps >= 2 && kTaps <= 4, "taps");
static_assert(kDirections == 1 || kDirections == 2, "directions");

// what is newest stands first
template <class T, int N> __device__ __forceinline__ void push(T (&window)[N], const T &newest) {
#pragma unroll
  for (int i = N - 1; i > 0; --i) window[i] = window[i - 1];
  window[0] = newest;
}

// Where a direction finds what is `lag` steps off in a window of kTaps rows: the causal one stands at the newest row
// and looks back, the mirrored one at the oldest and looks forward.
template <bool Mirrored> __device__ __forceinline__ constexpr int place(int lag) {
  return Mirrored ? kReach - lag : lag;
}

template <int N, int Lanes> struct Walker {
  static constexpr int kTileChannels = N * Lanes;

  Columns<N, Lanes> columns;
  int lane, batch, length, stretch, stretches;
  int start, end;     // the times that it answers for
  long long channel;  // first of the tile

  // walkers without work have no times and no channels, but wait with the others of their warp
  __device__ __forceinline__ Walker(const ConvSequence &p, unsigned number)
      : lane(threadIdx.x % Lanes), length(static_cast<int>(p.length)) {
    const int tiles = static_cast<int>((p.channels + kTileChannels - 1) / kTileChannels);
    const int span = static_cast<int>(p.stretch);
    stretches = (length + span - 1) / span;
    channel = number % tiles * kTileChannels;
    stretch = static_cast<int>(number / tiles % stretches);
    batch = static_cast<int>(number / tiles / stretches);
    start = stretch * span;
    end = length - start < span ? length : start + span;
    const long long left = p.channels - channel;
    columns = {lane, left < kTileChannels ? static_cast<int>(left) : kTileChannels};
    if (batch < p.batch) return;
    batch = 0;
    end = start;
    columns.count = 0;
  }

  __device__ __forceinline__ bool answers_for(int t) const { return t >= start && t < end; }

  // its channels at time 0 of a contiguous sequence
  __device__ __forceinline__ Io *column(void *sequence, long long channels) const {
    return static_cast<Io *>(sequence) + static_cast<long long>(batch) * length * channels + channel;
  }
  __device__ __forceinline__ void store(Io *column, int t, long long channels, const Channels<N> &v) const {
    columns.store(column + static_cast<long long>(t) * static_cast<int>(channels), v);
  }

  // rows from time `first` on of a sequence, zeros where it has none
  __device__ __forceinline__ void fetch(Io *to, const void *sequence, long long batch_stride, long long row_stride,
                                        int first) const {
    // a product of 32-bit numbers is one instruction, of 64-bit ones it is four
    const int stride = static_cast<int>(row_stride);
    const Io *from = static_cast<const Io *>(sequence) + batch * batch_stride + channel;
    constexpr int width = kAligned ? kVector : 1, pieces = kTileChannels / width;
    static_assert(kRows * pieces % Lanes == 0, "whole passes");
#pragma unroll(kAligned ? kRows * pieces / Lanes : 4)
    for (int begin = 0; begin < kRows * pieces; begin += Lanes) {
      const int i = begin + lane, row = i / pieces, column = i % pieces * width, t = first + row;
      const bool there = t >= 0 && t < length && column < columns.count;
      const Io *source = from + static_cast<long long>(t) * stride + column;
      if constexpr (kAligned) copy_async(to + i * width, source, there);
      else to[i] = there ? *source : narrow_one<Io>(0.0f);
    }
  }

  __device__ __forceinline__ void fetch_segments(int *to, const int *segments, int first) const {
    const int t = first + lane;
    if (kSegments && lane < kRows)
      to[lane] = t >= 0 && t < length ? segments[static_cast<long long>(batch) * length + t] : 0;
  }
};

// this lane's channels of a direction's taps, by lag, and of its bias
template <int N> struct Filter {
  Channels<N> tap[kTaps], bias;

  template <int Lanes> __device__ __forceinline__ void load(const ConvFilter &p, const Walker<N, Lanes> &w) {
    const float *weight = p.weight + w.channel * kTaps;
    bias = p.bias ? w.columns.load(p.bias + w.channel) : Channels<N>::all(0.0f);
#pragma unroll
    for (int k = 0; k < kTaps; ++k) tap[k] = Channels<N>::all(0.0f);
    if constexpr (kAligned && N * kTaps % 4 == 0) {
      if (!w.columns.has(0)) return;
#pragma unroll
      for (int i = 0; i < N * kTaps; i += 4) {
        const Channels<4> four = load_vector<float, 4>(weight + w.columns.at(0) * kTaps + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) tap[kReach - (i + j) % kTaps].of[(i + j) / kTaps] = four.of[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int k = 0; k < kTaps; ++k)
          if (w.columns.has(i)) tap[kReach - k].of[i] = weight[w.columns.at(i) * kTaps + k];
    }
  }

  // the convolution before SiLU, from windows of rows and of their segments
  template <bool Mirrored>
  __device__ __forceinline__ Channels<N> apply(const Channels<N> *rows, const int *segments) const {
    Channels<N> c = bias;
#pragma unroll
    for (int lag = 0; lag < kTaps; ++lag) {
      if (kSegments && segments[place<Mirrored>(lag)] != segments[place<Mirrored>(0)]) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) c.of[i] = fmaf(tap[lag].of[i], rows[place<Mirrored>(lag)].of[i], c.of[i]);
    }
    return c;
  }
};

}  // namespace vlm
