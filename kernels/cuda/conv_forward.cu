// The depthwise convolution along time with bias and SiLU, forward, of one or both directions.
//
// What bounds it is memory: a row is read once for both directions, into shared memory so that rows in flight cost no
// registers, and each output is written once, 16 bytes a lane.
#include "conv_walk.cuh"
#include "math.cuh"

namespace vlm {

// a lane has 16 bytes of a row: as few lanes to a walker as keep most tiles full at usual numbers of channels
constexpr int kLanes = 16;
using Mine = Walker<kVector, kLanes>;

struct alignas(16) Room {
  Io x[2][kRows * Mine::kTileChannels];
  int segments[2][kRows];
};

constexpr int kThreads = 128;
constexpr int kSlots = kThreads / kLanes;
constexpr int kSharedBytes = kSlots * int(sizeof(Room));

__device__ __forceinline__ void fetch_tile(const ConvSequence &p, const Mine &w, Room &room, int tile) {
  const int first = w.start - kReach + tile * kRows;
  w.fetch(room.x[tile % 2], p.x, p.x_batch, p.x_row, first);
  w.fetch_segments(room.segments[tile % 2], p.segments, first);
}

__device__ __forceinline__ void store_silu(const Mine &w, Io *out, int t, long long channels, Channels<kVector> c) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) c.of[i] = silu(c.of[i]);
  w.store(out, t, channels, c);
}

__device__ __forceinline__ void convolve(const ConvForward &p, const Mine &w, Room &room) {
  const ConvSequence &s = p.sequence;
  // only the anti-causal direction needs what comes behind the stretch
  const int tiles = static_cast<int>((s.stretch + kDirections * kReach + kRows - 1) / kRows);
  fetch_tile(s, w, room, 0);
  commit_copies();
  Filter<kVector> filter[kDirections];
  Io *out[kDirections];
#pragma unroll
  for (int d = 0; d < kDirections; ++d) {
    filter[d].load(p.filter[d], w);
    out[d] = w.column(p.out[d], s.channels);
  }
  Channels<kVector> rows[kTaps] = {};
  int segments[kTaps] = {};
  int t = w.start - kReach;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) fetch_tile(s, w, room, tile + 1);
    commit_copies();
    wait_copies<1>();
    sync_warp();
#pragma unroll 4
    for (int row = 0; row < kRows; ++row, ++t) {
      push(rows, w.columns.load_all(room.x[tile % 2] + row * Mine::kTileChannels));
      if (kSegments) push(segments, room.segments[tile % 2][row]);
      if (w.answers_for(t)) store_silu(w, out[0], t, s.channels, filter[0].apply<false>(rows, segments));
      if (kDirections == 2 && w.answers_for(t - kReach))
        store_silu(w, out[kDirections - 1], t - kReach, s.channels,
                   filter[kDirections - 1].apply<true>(rows, segments));
    }
    sync_warp();
  }
}

}  // namespace vlm

extern "C" {

__constant__ long long vlm_conv_forward_geometry[4] = {vlm::kThreads, vlm::kSharedBytes, vlm::Mine::kTileChannels,
                                                       vlm::kSlots};

__global__ void __launch_bounds__(vlm::kThreads, 3) vlm_conv_forward(const __grid_constant__ vlm::ConvForward p) {
  using namespace vlm;
  const int slot = threadIdx.x / kLanes;
  const Mine walker(p.sequence, blockIdx.x * kSlots + slot);
  convolve(p, walker, reinterpret_cast<Room *>(shared_memory())[slot]);
}
}
