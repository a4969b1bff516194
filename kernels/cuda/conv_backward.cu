// The gradients of the depthwise convolution with bias and SiLU. The convolution is computed again, so the forward pass
// keeps nothing. Every walker adds up the gradients of the filters over its own stretch and leaves them to the host:
// no atomics, so results repeat to the bit.
//
// In: x and du of each direction. Out: dx, once. Nearly as much arithmetic comes with each element as the GPU can do
// while it moves those bytes, so the windows of rows and gradients stay in registers, which leaves a lane two channels.
#include "conv_walk.cuh"
#include "math.cuh"

namespace vlm {

constexpr int kChannels = 2, kLanes = 32;
using Mine = Walker<kChannels, kLanes>;
using Values = Channels<kChannels>;

struct alignas(16) Room {
  Io x[2][kRows * Mine::kTileChannels];
  Io du[2][kDirections][kRows * Mine::kTileChannels];
  int segments[2][kRows];
};

constexpr int kThreads = 128;
constexpr int kSlots = kThreads / kLanes;
constexpr int kSharedBytes = kSlots * int(sizeof(Room));

// one direction's filter and gradients
struct Direction {
  Filter<kChannels> filter, sums;
  Values before_silu[kTaps];  // gradients of the newest rows before SiLU
};

// du of the anti-causal direction comes with the row that completes its convolution
__device__ __forceinline__ void fetch_tile(const ConvBackward &p, const Mine &w, Room &room, int tile) {
  const ConvSequence &s = p.sequence;
  const int first = w.start - kReach + tile * kRows;
  w.fetch(room.x[tile % 2], s.x, s.x_batch, s.x_row, first);
#pragma unroll
  for (int d = 0; d < kDirections; ++d)
    w.fetch(room.du[tile % 2][d], p.du[d], p.du_batch[d], p.du_row[d], first - d * kReach);
  w.fetch_segments(room.segments[tile % 2], s.segments, first);
}

// takes in the gradient of the direction's next row; `counts`: whether this walker answers for it
template <bool Mirrored>
__device__ __forceinline__ void step(Direction &own, const Values *rows, const int *segments, const Values &du,
                                     bool counts) {
  const Values c = own.filter.apply<Mirrored>(rows, segments);
  Values gradient;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const float gate = reciprocal_approx(1.0f + exp2_approx(-kLog2E * c.of[i]));
    gradient.of[i] = du.of[i] * (gate * fmaf(c.of[i], 1.0f - gate, 1.0f));
  }
  push(own.before_silu, gradient);
  if (!counts) return;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) own.sums.bias.of[i] += gradient.of[i];
#pragma unroll
  for (int lag = 0; lag < kTaps; ++lag) {
    if (kSegments && segments[place<Mirrored>(lag)] != segments[place<Mirrored>(0)]) continue;
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      own.sums.tap[lag].of[i] = fmaf(gradient.of[i], rows[place<Mirrored>(lag)].of[i], own.sums.tap[lag].of[i]);
  }
}

// Adds what a direction gives to dx at t - kReach, where the window of the anti-causal gradients ends and that of the
// causal ones begins: each tap is seen from the other side. `segments` begins where the window of gradients does.
template <bool Mirrored>
__device__ __forceinline__ void add_dx(const Direction &own, const int *segments, Values &dx) {
#pragma unroll
  for (int lag = 0; lag < kTaps; ++lag) {
    if (kSegments && segments[place<!Mirrored>(lag)] != segments[place<!Mirrored>(0)]) continue;
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      dx.of[i] = fmaf(own.filter.tap[lag].of[i], own.before_silu[place<!Mirrored>(lag)].of[i], dx.of[i]);
  }
}

__device__ __forceinline__ void store_sums(const ConvBackward &p, const Mine &w, int d, const Filter<kChannels> &sums) {
  const long long channels = p.sequence.channels;
  const long long set = (static_cast<long long>(w.batch) * w.stretches + w.stretch) * kDirections + d;
  float *to = p.sums + set * (kTaps + 1) * channels + w.channel;
#pragma unroll
  for (int lag = 0; lag < kTaps; ++lag) w.columns.store(to + (kReach - lag) * channels, sums.tap[lag]);
  w.columns.store(to + kTaps * channels, sums.bias);
}

__device__ __forceinline__ void walk(const ConvBackward &p, const Mine &w, Room &room) {
  const ConvSequence &s = p.sequence;
  const int tiles = static_cast<int>((s.stretch + 2 * kReach + kRows - 1) / kRows);
  fetch_tile(p, w, room, 0);
  commit_copies();
  Direction direction[kDirections] = {};
#pragma unroll
  for (int d = 0; d < kDirections; ++d) direction[d].filter.load(p.filter[d], w);
  Io *to = w.column(p.dx, s.channels);
  Direction &causal = direction[0], &mirrored = direction[kDirections - 1];
  Values rows[kTaps] = {};
  // dx is looked at from kReach steps on either side
  int segments[kTaps + kReach] = {};
  int t = w.start - kReach;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) fetch_tile(p, w, room, tile + 1);
    commit_copies();
    wait_copies<1>();
    sync_warp();
#pragma unroll 4
    for (int row = 0; row < kRows; ++row, ++t) {
      const int at = row * Mine::kTileChannels;
      push(rows, w.columns.load_all(room.x[tile % 2] + at));
      if (kSegments) push(segments, room.segments[tile % 2][row]);
      Values dx = Values::all(0.0f);
      step<false>(causal, rows, segments, w.columns.load_all(room.du[tile % 2][0] + at), w.answers_for(t));
      add_dx<false>(causal, segments, dx);
      const int written = t - kReach;
      if constexpr (kDirections == 2) {
        step<true>(mirrored, rows, segments, w.columns.load_all(room.du[tile % 2][1] + at), w.answers_for(written));
        add_dx<true>(mirrored, segments + kReach, dx);
      }
      if (w.answers_for(written)) w.store(to, written, s.channels, dx);
    }
    sync_warp();
  }
#pragma unroll
  for (int d = 0; d < kDirections; ++d) store_sums(p, w, d, direction[d].sums);
}

}  // namespace vlm

extern "C" {

__constant__ long long vlm_conv_backward_geometry[4] = {vlm::kThreads, vlm::kSharedBytes, vlm::Mine::kTileChannels,
                                                        vlm::kSlots};

__global__ void __launch_bounds__(vlm::kThreads, 4) vlm_conv_backward(const __grid_constant__ vlm::ConvBackward p) {
  using namespace vlm;
  const int slot = threadIdx.x / kLanes;
  const Mine walker(p.sequence, blockIdx.x * kSlots + slot);
  walk(p, walker, reinterpret_cast<Room *>(shared_memory())[slot]);
}
}
