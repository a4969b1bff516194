// The selective scan, forward: for every batch row, channel and state, in scan order,
//   dt = softplus(delta + bias)    h = exp(dt A) h + dt u B    y = sum_n h C + D u    out = y silu(z)
//
// The exponentials are what bounds it, one for each state and step, so the rest is arranged to cost little beside
// them: time is walked step by step with the states in registers, channels lie across lanes and warps, and a warp
// fetches its next tile while it works on this one, without a barrier for the block.
//
// Two directions run side by side on the same channels and meet in the middle: who comes to a tile first leaves its
// sum in `out`, who comes second adds, gates and writes. One barrier separates the two halves; no atomics, so results
// repeat to the bit. Rounded to half a type the first sum would cost as much accuracy as the output itself, so of fp32
// the high words go to `out` and the low ones to `total`.
#include "partial.cuh"
#include "problem.cuh"
#include "states.cuh"

namespace vlm {

constexpr int kSplitBarrier = 1, kMeetingBarrier = 9;

// what a warp works on, and what is this lane's of it
struct Task {
  const ScanForward &p;
  const ScanDirection &q;
  WarpRoom *rooms;       // of the warps that share a channel tile and direction
  int lane, pair, part;  // see layout.cuh
  int turn;              // which of the warps that share the time
  int split_barrier, meeting_barrier;
  int batch, group, length, tiles;
  bool reverse;
  long long channel;     // first of the tile
  long long origin;      // where it is in `out` and `total` at time 0
  int columns;           // channels of the tile that exist
  int there;             // channels of this lane's pair that exist

  __device__ __forceinline__ WarpRoom &room() const { return rooms[turn]; }
  __device__ __forceinline__ long long lane_channel() const { return channel + 2 * pair; }
  __device__ __forceinline__ Times times(int tile) const {
    if (reverse) return {(tiles - 1 - tile) * kTile + kTile - 1 - turn * kRows, -1, length};
    return {tile * kTile + turn * kRows, 1, length};
  }
  // the row of `out` and `total` at time t, at the tile's first channel
  __device__ __forceinline__ long long row(int t) const {
    return origin + static_cast<long long>(t) * static_cast<int>(p.channels);
  }
};

struct Events {
  unsigned drops, keeps;  // bit i: before row i the state is dropped, is kept

  __device__ __forceinline__ bool at(int row) const { return kEvents && ((drops | keeps) >> row & 1); }
  __device__ __forceinline__ bool drop(int row) const { return kEvents && (drops >> row & 1); }
  __device__ __forceinline__ bool keep(int row) const { return kEvents && (keeps >> row & 1); }
};

__device__ __forceinline__ long long end_state(const Task &w, int c) {
  return (w.batch * w.p.channels + w.lane_channel() + c) * kStateCount + w.part * kStates;
}

__device__ __forceinline__ States load_initial(const Task &w) {
  States h;
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int n = 0; n < kStates; ++n)
      h.of[c][n] = w.q.initial && c < w.there ? w.q.initial[end_state(w, c) + n] : 0.0f;
  return h;
}

__device__ __forceinline__ void store_last(const Task &w, const States &h) {
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int n = 0; n < kStates; ++n)
      if (c < w.there) w.q.last[end_state(w, c) + n] = h.of[c][n];
}

__device__ __forceinline__ void store_kept(const Task &w, const States &h, int step) {
  const long long chunks = (w.length + kKeepEvery - 1) / kKeepEvery;
  float *to = w.q.kept + (w.batch * chunks + step / kKeepEvery) * kStateCount * w.p.channels;
#pragma unroll
  for (int n = 0; n < kStates; ++n) {
    float *pair = to + (w.part * kStates + n) * w.p.channels + w.lane_channel();
    const unsigned words[2] = {__float_as_uint(h.of[0][n]), __float_as_uint(h.of[1][n])};
    // left to itself the compiler stores one by one; held to pairs where time is split it spills
    if (!kAligned || kSplit > 1) store_global(pair, make_float2(h.of[0][n], h.of[1][n]), w.there);
    else if (w.there > 0) store_words(pair, words);
  }
}

__device__ __forceinline__ void load_parameters(const Task &w) {
  for (int c = w.lane; c < kTileChannels; c += 32)
    w.room().bias[c] = w.q.bias && c < w.columns ? w.q.bias[w.channel + c] : 0.0f;
#if VLM_RANK
  Io *weight = reinterpret_cast<Io *>(&w.room().weight);
  for (int i = w.lane; i < kTileChannels * kRank; i += 32) {
    const int row = i / kRank, column = i % kRank;
    weight[row * kRankRow + column] =
        row < w.columns ? static_cast<const Io *>(w.q.weight)[(w.channel + row) * kRank + column] : Pairs<Io>::zero();
  }
#endif
}

// what the recurrence needs of a tile
__device__ __forceinline__ void fetch_tile(const Task &w, int tile) {
  Raw &raw = w.room().raw[tile % 2];
  const Times times = w.times(tile);
  const int lane = opaque(w.lane);
  const ScanDirection &q = w.q;
  fetch<kTileChannels, kTileChannels>(raw.u, static_cast<const Io *>(q.u) + w.batch * q.u_batch + w.channel, q.u_row,
                                      w.columns, times, lane);
  const Io *delta = static_cast<const Io *>(q.delta) + w.batch * q.delta_batch;
#if VLM_RANK
  fetch<kRank, kRankRow>(raw.delta(), delta, q.delta_row, kRank, times, lane);
#else
  fetch<kTileChannels, kTileChannels>(raw.delta(), delta + w.channel, q.delta_row, w.columns, times, lane);
#endif
  const long long bc = w.batch * q.bc_batch + w.group * q.bc_group;
  fetch<kStateCount, 2 * kStateCount>(raw.bc(), static_cast<const Io *>(q.B) + bc, q.bc_row, kStateCount, times, lane);
  fetch<kStateCount, 2 * kStateCount>(raw.bc() + kStateCount, static_cast<const Io *>(q.C) + bc, q.bc_row, kStateCount,
                                      times, lane);
}

__device__ __forceinline__ void fetch_gate(const Task &w, int tile) {
  if (w.p.z)
    fetch<kTileChannels, kTileChannels>(w.room().z, static_cast<const Io *>(w.p.z) + w.batch * w.p.z_batch + w.channel,
                                        w.p.z_row, w.columns, w.times(tile), opaque(w.lane));
}

__device__ __forceinline__ void fetch_partial(const Task &w, int tile) {
  Io *to = w.room().raw[tile % 2].partial();
  const Times times = w.times(tile);
  const int lane = opaque(w.lane);
  fetch<kTileChannels, kTileChannels>(to, static_cast<const Io *>(w.p.out) + w.row(0), w.p.channels, w.columns, times,
                                      lane);
  if (sizeof(Io) == 2)
    fetch<kTileChannels, kTileChannels>(to + kRows * kTileChannels, static_cast<const Io *>(w.p.total) + w.row(0),
                                        w.p.channels, w.columns, times, lane);
}

__device__ __forceinline__ Events find_events(const Task &w, int tile) {
  Events events{0, 0};
  if (!kEvents) return events;
  const Times times = w.times(tile);
  if (w.p.segments)
    events.drops = find_borders<kRows>(w.p.segments + static_cast<long long>(w.batch) * w.length, times, w.lane);
  if (w.q.kept) {
    const int row = -times.first_step() & (kKeepEvery - 1);
    if (row < kRows && times.has(row)) events.keeps = 1u << row;
  }
  return events;
}

// B and C of the tile as fp32
template <class T> __device__ __forceinline__ const float *widen(const Task &w, const T *bc) {
  if constexpr (sizeof(T) == 4) {
    return bc;
  } else {
    float *to = reinterpret_cast<float *>(&w.room().wide);
    widen_halves<kRows * 2 * kStateCount>(bc, to, w.lane);
    return to;
  }
}

// what the recurrence needs of one row and pair; a row beyond the sequence leaves the state as it is
template <bool Soft>
__device__ __forceinline__ void put_step(const Task &w, Raw &raw, bool there, int row, int pair, float2 delta) {
  const float2 u = Pairs<Io>::load(raw.u + row * kTileChannels + 2 * pair);
  if (Soft) delta = make_float2(softplus(delta.x), softplus(delta.y));
  if (!there) delta = make_float2(0.0f, 0.0f);
  w.room().steps[row * kPairs + pair] = make_float4(delta.x, delta.x * u.x, delta.y, delta.y * u.y);
}

#if VLM_RANK
// delta = rank rows @ weight^T: 16 steps and 8 channels at a time, with the bias as what is added to
template <bool Soft>
__device__ __forceinline__ void prepare_steps(const Task &w, Raw &raw, const Times &times) {
  const int row = w.lane / 4, part = w.lane % 4;
  const unsigned *rows = reinterpret_cast<const unsigned *>(raw.delta());
  const unsigned *weight = reinterpret_cast<const unsigned *>(&w.room().weight);
  constexpr int stride = kRankStride;
  unsigned a[kProducts][4];
#pragma unroll
  for (int k = 0; k < kProducts; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[k][2 * half] = rows[row * stride + 8 * k + 4 * half + part];
      a[k][2 * half + 1] = kRows > 8 ? rows[(row + 8) * stride + 8 * k + 4 * half + part] : 0;
    }
#pragma unroll
  for (int first = 0; first < kTileChannels; first += 8) {
    const float2 bias = Pairs<float>::load(w.room().bias + first + 2 * part);
    float c[4] = {bias.x, bias.y, bias.x, bias.y};
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      const unsigned *from = weight + (first + row) * stride + 8 * k + part;
      const unsigned b[2] = {from[0], from[4]};
      mma<Io>(c, a[k], b);
    }
    put_step<Soft>(w, raw, times.has(row), row, first / 2 + part, make_float2(c[0], c[1]));
    if (kRows > 8) put_step<Soft>(w, raw, times.has(row + 8), row + 8, first / 2 + part, make_float2(c[2], c[3]));
  }
}
#else
template <bool Soft>
__device__ __forceinline__ void prepare_steps(const Task &w, Raw &raw, const Times &times) {
  const float2 bias = Pairs<float>::load(w.room().bias + 2 * w.pair);
#pragma unroll
  for (int first = 0; first < kRows; first += kParts) {
    const int row = first + w.part;
    const float2 delta = Pairs<Io>::load(raw.delta() + row * kTileChannels + 2 * w.pair);
    put_step<Soft>(w, raw, times.has(row), row, w.pair, make_float2(delta.x + bias.x, delta.y + bias.y));
  }
}
#endif

// sums y of both channels over the lanes that share them, and leaves the sums where the step was read
__device__ __forceinline__ void put_sum(const Task &w, int row, float y0, float y1) {
#pragma unroll
  for (int mask = kPairs; mask < 32; mask *= 2) {
    y0 += shuffle_xor(y0, mask);
    y1 += shuffle_xor(y1, mask);
  }
  if (w.part == 0) w.room().steps[row * kPairs + w.pair] = make_float4(y0, y1, 0.0f, 0.0f);
}

// what is left after a step of state n of a lane's channel c: the first kPolynomial by polynomial, spread over n
__device__ __forceinline__ float decay(float x, int c, int n) {
  return 2 * n + c < kPolynomial ? exp2_polynomial(x) : exp2_approx(x);
}

__device__ __forceinline__ void walk(const Task &w, const float *bc, const States &A, States &h, const Events &events,
                                     int first_step) {
#pragma unroll 4
  for (int row = 0; row < kRows; ++row) {
    if (events.at(row)) {
      if (events.keep(row)) store_kept(w, h, first_step + row);
      if (events.drop(row)) h = States{};
    }
    const float4 step = w.room().steps[row * kPairs + w.pair];
    const Row B(bc + row * 2 * kStateCount + w.part * kStates);
    const Row C(bc + (row * 2 + 1) * kStateCount + w.part * kStates);
    float y0 = 0.0f, y1 = 0.0f;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      h.of[0][n] = fmaf(decay(step.x * A.of[0][n], 0, n), h.of[0][n], step.y * B.of[n]);
      h.of[1][n] = fmaf(decay(step.z * A.of[1][n], 1, n), h.of[1][n], step.w * B.of[n]);
      y0 = fmaf(h.of[0][n], C.of[n], y0);
      y1 = fmaf(h.of[1][n], C.of[n], y1);
    }
    put_sum(w, row, y0, y1);
  }
}

__device__ __forceinline__ Publication &published(const Task &w, int turn, int tile) {
  return reinterpret_cast<Publication *>(&w.rooms[turn].published)[tile % 2];
}

// what this warp's rows do to a state: their decay, by one exponential of their summed delta, and what they leave
__device__ __forceinline__ void publish(const Task &w, int tile, const States &A, const States &h, float delta0,
                                        float delta1, bool dropped) {
  Publication &mine = published(w, w.turn, tile);
#pragma unroll
  for (int n = 0; n < kStates; n += 4)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float delta = c ? delta1 : delta0;
      const int place = (c * kStates + n) / 4;
      float decay[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) decay[i] = dropped ? 0.0f : exp2_approx(delta * A.of[c][n + i]);
      mine.decay[place][w.lane] = make_float4(decay[0], decay[1], decay[2], decay[3]);
      mine.end[place][w.lane] = make_float4(h.of[c][n], h.of[c][n + 1], h.of[c][n + 2], h.of[c][n + 3]);
    }
}

// the state before the tile: in shared memory, for the decays of a tile leave it no registers
__device__ __forceinline__ float4 *carried(const Task &w) {
  return reinterpret_cast<float4 *>(&w.room().carry) + w.lane;
}

// the state before this warp's rows; carries the state over the whole tile
__device__ __forceinline__ States enter(const Task &w, int tile) {
  States carry = get_states(carried(w)), entering = carry;
#pragma unroll 1
  for (int turn = 0; turn < kSplit; ++turn) {
    if (turn == w.turn) entering = carry;
    const Publication &other = published(w, turn, tile);
#pragma unroll
    for (int n = 0; n < kStates; n += 4)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float4 decay = other.decay[(c * kStates + n) / 4][w.lane];
        const float4 end = other.end[(c * kStates + n) / 4][w.lane];
        carry.of[c][n] = fmaf(decay.x, carry.of[c][n], end.x);
        carry.of[c][n + 1] = fmaf(decay.y, carry.of[c][n + 1], end.y);
        carry.of[c][n + 2] = fmaf(decay.z, carry.of[c][n + 2], end.z);
        carry.of[c][n + 3] = fmaf(decay.w, carry.of[c][n + 3], end.w);
      }
  }
  put_states(carried(w), carry);
  return entering;
}

// Split time: every warp of the group scans its own rows from an empty state and keeps the decays; the warps tell each
// other how their rows change a state, so each knows the state it starts from and walks its rows once more, without
// an exponential.
__device__ __forceinline__ void walk_split(const Task &w, int tile, const float *bc, const States &A,
                                           const Events &events, int first_step) {
  const float4 *steps = w.room().steps;
  float decay[kRows][2][kStates];
  States h{};
  float delta0 = 0.0f, delta1 = 0.0f;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float4 step = steps[row * kPairs + w.pair];
    const Row B(bc + row * 2 * kStateCount + w.part * kStates);
    delta0 += step.x;
    delta1 += step.z;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      decay[row][0][n] = events.drop(row) ? 0.0f : exp2_approx(step.x * A.of[0][n]);
      decay[row][1][n] = events.drop(row) ? 0.0f : exp2_approx(step.z * A.of[1][n]);
      h.of[0][n] = fmaf(decay[row][0][n], h.of[0][n], step.y * B.of[n]);
      h.of[1][n] = fmaf(decay[row][1][n], h.of[1][n], step.w * B.of[n]);
    }
  }
  publish(w, tile, A, h, delta0, delta1, events.drops != 0);
  // the publications alternate between two places: who is a tile ahead does not overwrite what others still read
  sync_named(w.split_barrier, 32 * kSplit);
  h = enter(w, tile);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (events.keep(row)) store_kept(w, h, first_step + row);
    const float4 step = steps[row * kPairs + w.pair];
    const Row B(bc + row * 2 * kStateCount + w.part * kStates);
    const Row C(bc + (row * 2 + 1) * kStateCount + w.part * kStates);
    float y0 = 0.0f, y1 = 0.0f;
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      h.of[0][n] = fmaf(decay[row][0][n], h.of[0][n], step.y * B.of[n]);
      h.of[1][n] = fmaf(decay[row][1][n], h.of[1][n], step.w * B.of[n]);
      y0 = fmaf(h.of[0][n], C.of[n], y0);
      y1 = fmaf(h.of[1][n], C.of[n], y1);
    }
    put_sum(w, row, y0, y1);
  }
}

// the ungated sum of one direction in one row
__device__ __forceinline__ float2 sum_of(const Task &w, Raw &raw, int row, int pair, float2 D) {
  const float4 sum = w.room().steps[row * kPairs + pair];
  const float2 u = Pairs<Io>::load(raw.u + row * kTileChannels + 2 * pair);
  return make_float2(fmaf(D.x, u.x, sum.x), fmaf(D.y, u.y, sum.y));
}

// the first visitor leaves its sum
__device__ __forceinline__ void leave(const Task &w, int tile, float2 D) {
  const Times times = w.times(tile);
  const int pair = opaque(w.pair), part = opaque(w.part);
#pragma unroll
  for (int first = 0; first < kRows; first += kParts) {
    const int row = first + part;
    store_partial(w.p, w.row(times.at(row)) + 2 * pair, sum_of(w, w.room().raw[tile % 2], row, pair, D),
                  times.has(row) ? w.there : 0);
  }
}

// the second visitor adds the other's sum, gates and writes
template <bool Gated> __device__ __forceinline__ void finish(const Task &w, int tile, float2 D) {
  Raw &raw = w.room().raw[tile % 2];
  const Times times = w.times(tile);
  const int pair = opaque(w.pair), part = opaque(w.part);
#pragma unroll
  for (int first = 0; first < kRows; first += kParts) {
    const int row = first + part;
    float2 y = sum_of(w, raw, row, pair, D);
    if (kDirections == 2) {
      const float2 other = load_partial(raw.partial(), row, pair);
      y = make_float2(y.x + other.x, y.y + other.y);
    }
    const long long at = w.row(times.at(row)) + 2 * pair;
    const int there = times.has(row) ? w.there : 0;
    if (w.p.total) store_global(static_cast<Io *>(w.p.total) + at, y, there);
    if (Gated) {
      const float2 z = Pairs<Io>::load(w.room().z + row * kTileChannels + 2 * pair);
      y = make_float2(y.x * silu(z.x), y.y * silu(z.y));
    }
    store_global(static_cast<Io *>(w.p.out) + at, y, there);
  }
}

__device__ __forceinline__ void meet(const Task &w) { sync_named(w.meeting_barrier, 64 * kSplit); }

__device__ __forceinline__ void scan(const Task &w) {
  load_parameters(w);
  const States A = load_decays(w, w.q, w.there);
  States h = load_initial(w);
  if (kSplit > 1) put_states(carried(w), h);
  const float2 D = make_float2(w.q.D && w.there > 0 ? w.q.D[w.lane_channel()] : 0.0f,
                               w.q.D && w.there > 1 ? w.q.D[w.lane_channel() + 1] : 0.0f);
  // from which tile on this warp is the second visitor. Of an odd number of tiles both come to the middle one at the
  // same time; the reversed warp finishes it, and waits for the other only when its own sum is ready.
  const int second_from = kDirections == 1 ? 0 : w.reverse ? w.tiles / 2 : (w.tiles + 1) / 2;
  const int middle = kDirections == 2 && w.reverse && w.tiles % 2 ? second_from : -1;
  fetch_tile(w, 0);
  commit_copies();
  for (int tile = 0; tile < w.tiles; ++tile) {
    const bool second = tile >= second_from;
    if (kDirections == 2 && tile == second_from && tile != middle) meet(w);
    if (tile + 1 < w.tiles) fetch_tile(w, tile + 1);
    commit_copies();
    const Events events = find_events(w, tile);
    wait_copies<1>();
    sync_warp();
    Raw &raw = w.room().raw[tile % 2];
    const Times times = w.times(tile);
    // two loops, each free of branches, so that the chains of several rows run side by side
    if (w.p.softplus) prepare_steps<true>(w, raw, times);
    else prepare_steps<false>(w, raw, times);
    const float *bc = widen(w, raw.bc());
    sync_warp();
    if (second) {
      fetch_gate(w, tile);
      if (kDirections == 2 && tile != middle) fetch_partial(w, tile);
      commit_copies();
    }
    if (kSplit == 1) walk(w, bc, A, h, events, times.first_step());
    else walk_split(w, tile, bc, A, events, times.first_step());
    if (tile == middle) {
      meet(w);
      fetch_partial(w, tile);
      commit_copies();
    }
    wait_copies<0>();
    sync_warp();
    if (!second) leave(w, tile, D);
    else if (w.p.z) finish<true>(w, tile, D);
    else finish<false>(w, tile, D);
    sync_warp();
  }
  if (second_from == w.tiles) meet(w);
  if (w.q.last && w.turn == 0) store_last(w, kSplit == 1 ? h : get_states(carried(w)));
}

}  // namespace vlm

extern "C" {

__constant__ long long vlm_scan_forward_geometry[4] = {vlm::kThreads, vlm::kSharedBytes, vlm::kTileChannels,
                                                       vlm::kSlots};

__global__ void __launch_bounds__(vlm::kThreads, vlm::kBlocks)
    vlm_scan_forward(const __grid_constant__ vlm::ScanForward p) {
  using namespace vlm;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slot = warp / kGroup, direction = warp / kSplit % kDirections;
  const int group_channels = static_cast<int>(p.channels / p.groups);
  const int tiles_per_group = (group_channels + kTileChannels - 1) / kTileChannels;
  const int channel_tiles = static_cast<int>(p.groups) * tiles_per_group;
  const int blocks = (channel_tiles + kSlots - 1) / kSlots;
  const int channel_tile = blockIdx.x % blocks * kSlots + slot;
  if (channel_tile >= channel_tiles) return;
  const int group = channel_tile / tiles_per_group, first = channel_tile % tiles_per_group * kTileChannels;
  const int columns = group_channels - first < kTileChannels ? group_channels - first : kTileChannels;
  const long long channel = static_cast<long long>(group) * group_channels + first;
  const int batch = blockIdx.x / blocks, pair = lane % kPairs, length = static_cast<int>(p.length);
  const Task task{p,
                  p.direction[direction],
                  reinterpret_cast<WarpRoom *>(shared_memory()) + warp / kSplit * kSplit,
                  lane,
                  pair,
                  lane / kPairs,
                  warp % kSplit,
                  kSplitBarrier + warp / kSplit,
                  kMeetingBarrier + slot,
                  batch,
                  group,
                  length,
                  (length + kTile - 1) / kTile,
                  kDirections == 2 ? direction == 1 : p.reverse != 0,
                  channel,
                  batch * p.length * p.channels + channel,
                  columns,
                  columns - 2 * pair};
  scan(task);
}
}
