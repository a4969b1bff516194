// The selective scan, forward and backward: a vector holds neighbouring channels, the states of those channels
// stay in registers, time is walked step by step. The reverse direction is an index. Every number is summed in an
// order that depends on the shapes alone, so results do not depend on the number of threads.
#pragma once
#include "problem.h"
#include "vector.h"

namespace VLM_ISA {

constexpr int64_t kMaxStates = 256;
// states whose recurrences run side by side in the backward pass: enough to hide latencies, few enough for registers
constexpr int kStates = 4;
// and in the forward pass
#if defined(__AVX512F__)
constexpr int kHeld = 8;
#else
constexpr int kHeld = 4;
#endif

inline int64_t padded_states(const VlmScan &p) { return (p.states + kStates - 1) / kStates * kStates; }

// channels cut into vectors; a vector never spans two groups
template <class T> struct Blocks {
  explicit Blocks(const VlmScan &p)
      : width(Lanes<T>::width), group_channels(p.channels / p.groups),
        per_group((group_channels + width - 1) / width), count(per_group * p.groups) {}
  int64_t first(int64_t block) const {
    return block / per_group * group_channels + block % per_group * width;
  }
  int64_t lanes(int64_t block) const {
    const int64_t left = group_channels - block % per_group * width;
    return left < width ? left : width;
  }
  int64_t width, group_channels, per_group, count;
};

// A as (directions, block, state padded to a multiple of kStates, lane), scaled; padding is zero
template <class T> void arrange_A(const VlmScan &p, const Blocks<T> &blocks, int64_t padded, T *to) {
  for (int64_t d = 0; d < p.directions; ++d) {
    const T *A = static_cast<const T *>(p.direction[d].A);
    for (int64_t k = 0; k < blocks.count; ++k)
      for (int64_t n = 0; n < padded; ++n)
        for (int64_t i = 0; i < blocks.width; ++i)
          *to++ = n < p.states && i < blocks.lanes(k) ? A[(blocks.first(k) + i) * p.states + n] * Lanes<T>::decay_scale
                                                      : T(0);
  }
}

// whether the state is dropped before `t` because the step scanned before it is of another segment
VLM_INLINE bool drops(const int32_t *segments, int64_t t, int64_t step, bool reverse) {
  return segments && step > 0 && segments[t] != segments[reverse ? t + 1 : t - 1];
}

// Where a sequence lies in memory. Rows hold the channels of one step, or, turned, the steps of one channel.
template <class S> struct Plane {
  S *at;
  int64_t row;
  Plane<const S> constant() const { return {at, row}; }
};

// Tiles of kTile steps in scan order, of one vector of channels. Turned ones go through squares of W steps by W
// channels; a square that would stick out of the sequence is moved back inside.
constexpr int64_t kTile = 16;

struct Walk {
  int64_t length;
  bool reverse, turned;
  VLM_INLINE int64_t time(int64_t step) const { return reverse ? length - 1 - step : step; }
};

template <class T> VLM_INLINE int64_t square_start(const Walk &w, int64_t step) {
  const int64_t low = w.reverse ? w.time(step) - (Lanes<T>::width - 1) : step, most = w.length - Lanes<T>::width;
  return low < 0 ? 0 : low > most ? most : low;
}

template <class T, class S>
VLM_INLINE void load_tile(const Plane<const S> &from, const Walk &w, int64_t start, int64_t steps, int64_t lanes,
                          typename Lanes<T>::Vector *to) {
  constexpr int64_t W = Lanes<T>::width;
  if (!w.turned) {
    for (int64_t k = 0; k < steps; ++k) to[k] = load(from.at + w.time(start + k) * from.row, lanes);
  } else if (w.length < W) {
    for (int64_t k = 0; k < steps; ++k) {
      to[k] = typename Lanes<T>::Vector{};
      for (int64_t i = 0; i < lanes; ++i) to[k][i] = number(from.at[i * from.row + w.time(start + k)]);
    }
  } else {
    for (int64_t k = 0; k < steps; k += W) {
      typename Lanes<T>::Vector square[W];
      const int64_t low = square_start<T>(w, start + k);
      for (int64_t i = 0; i < W; ++i)
        square[i] = i < lanes ? load(from.at + i * from.row + low) : typename Lanes<T>::Vector{};
      transpose<T>(square);
      for (int64_t i = k; i < steps && i < k + W; ++i) to[i] = square[w.time(start + i) - low];
    }
  }
}

template <class T, class S>
VLM_INLINE void store_tile(const Plane<S> &to, const Walk &w, int64_t start, int64_t steps, int64_t lanes,
                           const typename Lanes<T>::Vector *from) {
  constexpr int64_t W = Lanes<T>::width;
  if (!w.turned) {
    for (int64_t k = 0; k < steps; ++k) store(to.at + w.time(start + k) * to.row, from[k], lanes);
    return;
  }
  for (int64_t k = 0; k < steps; k += W) {
    const int64_t count = steps - k < W ? steps - k : W;
    typename Lanes<T>::Vector square[W];
    const int64_t low = w.reverse ? w.time(start + k + count - 1) : start + k;
    for (int64_t i = 0; i < count; ++i) square[w.time(start + k + i) - low] = from[k + i];
    transpose<T>(square);
    for (int64_t i = 0; i < lanes; ++i) store(to.at + i * to.row + low, square[i], count);
  }
}

// Vectors of channels that walk side by side: the more, the longer the runs of memory that each step reads. Few
// enough to keep every thread busy and the sums that wait for the other direction in the cache. One where a row is
// a channel: then memory runs along time. The same numbers either way.
constexpr int64_t kMostVectors = 24, kMeetBytes = 1 << 19;

template <class T> int64_t strip_vectors(const VlmScan &p, const Blocks<T> &blocks) {
  if (p.turned) return 1;
  int64_t most = kMostVectors;
  if (p.directions > 1 && most > kMeetBytes / (p.length * kBytes)) most = kMeetBytes / (p.length * kBytes);
  const int64_t share = p.threads > 1 ? p.batch * blocks.count / (4 * p.threads) : blocks.count;
  if (most > share) most = share;
  return most < 1 ? 1 : most > blocks.per_group ? blocks.per_group : most;
}

// Room of one thread in the forward pass: where the directions meet, in full precision; states between tiles; the
// rows [B | C] of a direction where they are stored in less or turned; one tile of one vector.
template <class T, class S> struct ForwardRoom {
  using Vector = typename Lanes<T>::Vector;
  ForwardRoom(const VlmScan &p, int64_t strip)
      : copies(sizeof(S) < sizeof(T) || p.turned), meet(p.directions > 1 ? p.length * strip * Lanes<T>::width : 0),
        states(strip * p.states * Lanes<T>::width),
        rows(copies ? 2 * p.directions * p.length * p.states + Lanes<T>::width : 0) {}
  bool copies;
  Scratch<T> meet, states, rows;
  int64_t held[2] = {-1, -1};   // whose rows are there: batch row and group
  Vector dt[kTile], driven[kTile], y[kTile];

  // the rows of a direction, (length, 2 states)
  const T *widen(const VlmScan &p, int d, int64_t b, int64_t group) {
    const VlmDirection &q = p.direction[d];
    const int64_t N = p.states, from = b * q.bc_batch + group * q.bc_group;
    T *to = rows.data + d * 2 * p.length * N;
    if (held[d] == b * p.groups + group) return to;
    held[d] = b * p.groups + group;
    const S *stored[2] = {static_cast<const S *>(q.B) + from, static_cast<const S *>(q.C) + from};
    for (int64_t t = 0; t < p.length; t += kTile)
      for (int half = 0; half < 2; ++half)
        for (int64_t n = 0; n < N; n += Lanes<T>::width) {
          const int64_t steps = p.length - t < kTile ? p.length - t : kTile;
          const int64_t lanes = N - n < Lanes<T>::width ? N - n : Lanes<T>::width;
          const Plane<const S> plane{stored[half] + (p.turned ? n * q.bc_row : n), q.bc_row};
          Vector tile[kTile];
          load_tile<T, S>(plane, {p.length, false, bool(p.turned)}, t, steps, lanes, tile);
          for (int64_t k = 0; k < steps; ++k) store(to + (2 * (t + k) + half) * N + n, tile[k], lanes);
        }
    return to;
  }
};

// what one vector of channels reads and writes
template <class T, class S> struct VectorTask {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p;
  const VlmDirection &q;
  Walk w;
  int64_t b, e, lanes;
  int d;

  template <class P> Plane<P> plane(P *x, int64_t batch, int64_t row) const {
    return {x + b * batch + (w.turned ? e * row : e), row};
  }
  Plane<const S> u() const { return plane(static_cast<const S *>(q.u), q.u_batch, q.u_row); }
  Plane<const S> delta() const { return plane(static_cast<const S *>(q.delta), q.delta_batch, q.delta_row); }
  Plane<const S> z() const { return plane(static_cast<const S *>(p.z), p.z_batch, p.z_row); }
  Plane<S> dense(const void *x) const {
    return plane(static_cast<S *>(const_cast<void *>(x)), p.length * p.channels, w.turned ? p.length : p.channels);
  }
  Vector of_channels(const void *x) const { return x ? load(static_cast<const T *>(x) + e, lanes) : Vector{}; }
};

template <class T, class S>
VLM_INLINE void prepare_tile(const VectorTask<T, S> &c, int64_t start, int64_t steps, typename Lanes<T>::Vector *dt,
                             typename Lanes<T>::Vector *driven, typename Lanes<T>::Vector *y) {
  using Vector = typename Lanes<T>::Vector;
  const Vector D = c.of_channels(c.q.D), bias = c.of_channels(c.q.bias);
  load_tile<T, S>(c.u(), c.w, start, steps, c.lanes, driven);
  load_tile<T, S>(c.delta(), c.w, start, steps, c.lanes, dt);
  for (int64_t k = 0; k < steps; ++k) {
    const Vector input = driven[k];
    const Vector raw = dt[k] + bias;
    dt[k] = c.p.softplus ? softplus<T>(raw) : raw;
    y[k] = D * input;
    driven[k] = dt[k] * input;
  }
}

// K states of one vector of channels through one tile; they stay in registers
template <class T, int K, class Ahead>
VLM_INLINE void scan_states(typename Lanes<T>::Vector *state, const T *A, const T *B, const T *C, int64_t bc_step,
                            int64_t steps, uint32_t drops, const typename Lanes<T>::Vector *dt,
                            const typename Lanes<T>::Vector *driven, typename Lanes<T>::Vector *y, Ahead ahead) {
  using Vector = typename Lanes<T>::Vector;
  Vector h[K], a[K];
  for (int i = 0; i < K; ++i) {
    h[i] = state[i];
    a[i] = load(A + i * Lanes<T>::width);
  }
  for (int64_t k = 0; k < steps; ++k, B += bc_step, C += bc_step) {
    ahead(k);
    if (__builtin_expect(drops >> k & 1, 0))
      for (int i = 0; i < K; ++i) h[i] = Vector{};
    const Vector step = dt[k], input = driven[k];
    Vector sum = y[k], sum2{};
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      h[i] = Lanes<T>::decay(step, a[i]) * h[i] + input * B[i];
      if (i % 2) sum += h[i] * C[i];
      else sum2 += h[i] * C[i];
    }
    y[k] = sum + sum2;
  }
  for (int i = 0; i < K; ++i) state[i] = h[i];
}

template <class T, class S>
VLM_INLINE void finish_tile(const VectorTask<T, S> &c, int64_t start, int64_t steps, typename Lanes<T>::Vector *y,
                            T *meet, int64_t meet_row) {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p = c.p;
  if (c.d > 0)
    for (int64_t k = 0; k < steps; ++k) y[k] += load(meet + c.w.time(start + k) * meet_row);
  if (c.d + 1 < p.directions) {
    for (int64_t k = 0; k < steps; ++k) store(meet + c.w.time(start + k) * meet_row, y[k]);
    return;
  }
  if (p.total) store_tile<T, S>(c.dense(p.total), c.w, start, steps, c.lanes, y);
  if (p.z) {
    Vector gate[kTile];
    load_tile<T, S>(c.z(), c.w, start, steps, c.lanes, gate);
    for (int64_t k = 0; k < steps; ++k) y[k] *= gate[k] * sigmoid<T>(gate[k]);
  }
  store_tile<T, S>(c.dense(p.out), c.w, start, steps, c.lanes, y);
}

// one direction of `count` neighbouring vectors of channels; T computes, S is stored
template <class T, class S>
void scan_forward_strip(const VlmScan &p, const Blocks<T> &blocks, const T *A, int64_t padded, int64_t b, int64_t first,
                        int64_t count, int d, ForwardRoom<T, S> &room) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t W = Lanes<T>::width;
  const VlmDirection &q = p.direction[d];
  const int64_t N = p.states, L = p.length, E = p.channels, group = first / blocks.per_group;
  const int64_t chunks = (L + kChunk - 1) / kChunk;
  const Walk walk{L, bool(q.reverse), bool(p.turned)};
  const T *B, *C;
  int64_t bc_row;
  if (room.copies) {
    B = room.widen(p, d, b, group);
    C = B + N;
    bc_row = 2 * N;
  } else {
    B = static_cast<const T *>(q.B) + b * q.bc_batch + group * q.bc_group;
    C = static_cast<const T *>(q.C) + b * q.bc_batch + group * q.bc_group;
    bc_row = q.bc_row;
  }
  const int32_t *segments = p.segments ? p.segments + b * L : nullptr;
  Vector *h = reinterpret_cast<Vector *>(room.states.data);
  for (int64_t g = 0; g < count; ++g)
    for (int64_t n = 0; n < N; ++n)
      h[g * N + n] = q.initial ? load(static_cast<const T *>(q.initial) + (b * N + n) * E + blocks.first(first + g),
                                      blocks.lanes(first + g))
                               : Vector{};
  for (int64_t start = 0; start < L; start += kTile) {
    const int64_t steps = L - start < kTile ? L - start : kTile, t = walk.time(start);
    const int64_t bc_step = walk.reverse ? -bc_row : bc_row;
    uint32_t dropped = 0;
    if (segments)
      for (int64_t k = 0; k < steps; ++k)
        dropped |= uint32_t(drops(segments, walk.time(start + k), start + k, walk.reverse)) << k;
    for (int64_t g = 0; g < count; ++g) {
      const int64_t e = blocks.first(first + g), lanes = blocks.lanes(first + g);
      const VectorTask<T, S> c{p, q, walk, b, e, lanes, d};
      const T *mine = A + (first + g) * padded * W;
      Vector *dt = room.dt, *driven = room.driven, *y = room.y, *state = h + g * N;
      if (q.kept && start % kChunk == 0)
        for (int64_t n = 0; n < N; ++n)
          store(static_cast<T *>(q.kept) + ((b * chunks + start / kChunk) * N + n) * E + e, state[n], lanes);
      prepare_tile(c, start, steps, dt, driven, y);
      // the next tile comes in while this one is computed
      const bool more = start + 2 * kTile <= L;
      const Plane<const S> planes[3] = {c.u(), c.delta(), p.z && d + 1 == p.directions ? c.z() : c.u()};
      const auto ahead = [&](int64_t k) {
        const int64_t far = start + kTile;
        const int64_t at = walk.turned ? (walk.reverse ? walk.time(far + kTile - 1) : far) : walk.time(far + k);
        for (const Plane<const S> &x : planes)
          __builtin_prefetch(walk.turned ? x.at + (k < lanes ? k : 0) * x.row + at : x.at + at * x.row);
      };
      const auto nothing = [](int64_t) {};
      int64_t n = 0;
      for (; n + kHeld <= N; n += kHeld) {
        if (n == 0 && more)
          scan_states<T, kHeld>(state + n, mine + n * W, B + t * bc_row + n, C + t * bc_row + n, bc_step, steps,
                                dropped, dt, driven, y, ahead);
        else
          scan_states<T, kHeld>(state + n, mine + n * W, B + t * bc_row + n, C + t * bc_row + n, bc_step, steps,
                                dropped, dt, driven, y, nothing);
      }
      for (; n < N; ++n)
        scan_states<T, 1>(state + n, mine + n * W, B + t * bc_row + n, C + t * bc_row + n, bc_step, steps, dropped,
                          dt, driven, y, nothing);
      finish_tile(c, start, steps, y, room.meet.data + g * W, count * W);
    }
  }
  if (q.last)
    for (int64_t g = 0; g < count; ++g)
      for (int64_t n = 0; n < N; ++n)
        store(static_cast<T *>(q.last) + (b * N + n) * E + blocks.first(first + g), h[g * N + n],
              blocks.lanes(first + g));
}

template <class T, class S> void scan_forward(const VlmScan &p) {
  const Blocks<T> blocks(p);
  const int64_t padded = padded_states(p), size = blocks.count * padded * blocks.width;
  Scratch<T> A(p.directions * size);
  arrange_A(p, blocks, padded, A.data);
  const int64_t strip = strip_vectors(p, blocks);
  const int64_t strips = (blocks.per_group + strip - 1) / strip, per_batch = p.groups * strips;
#pragma omp parallel num_threads(p.threads)
  {
    Scratch<char> memory(sizeof(ForwardRoom<T, S>));
    ForwardRoom<T, S> *room = new (memory.data) ForwardRoom<T, S>(p, strip);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.batch * per_batch; ++task) {
      const int64_t b = task / per_batch, group = task % per_batch / strips, from = task % strips * strip;
      const int64_t count = blocks.per_group - from < strip ? blocks.per_group - from : strip;
      for (int d = 0; d < p.directions; ++d)
        scan_forward_strip<T, S>(p, blocks, A.data + d * size, padded, b, group * blocks.per_group + from, count, d,
                                 *room);
    }
    room->~ForwardRoom<T, S>();
  }
}

// one chunk of one vector of channels, in scan order: what the states share, and what they add up to
template <class T> struct BackwardChunk {
  using Vector = typename Lanes<T>::Vector;
  Vector u[kChunk], dt[kChunk], driven[kChunk], slope[kChunk], dy[kChunk], along_B[kChunk], along_A[kChunk];
  Vector apart;   // or the chunks of neighbours would compete for the same lines of the first cache
};

// kStates states of one step of a chunk, side by side: apart, at multiples of 4096 bytes, loads would wait for
// stores to other arrays
template <class T> struct BackwardStep {
  typename Lanes<T>::Vector decay[kStates], before[kStates];
  typename Lanes<T>::Vector sum_B[kStates], sum_C[kStates];   // dB and dC, still to be summed over lanes
};

// steps of all vectors that are read, or written, before the next ones: memory then goes by in long runs
constexpr int64_t kRows = 8;

// What one thread of the backward pass works in. The steps, with one vector's share of a chunk, fit the first cache.
template <class T> struct BackwardScratch {
  using Vector = typename Lanes<T>::Vector;
  BackwardScratch(int64_t padded, int64_t blocks)
      : padded(padded), memory(2 * blocks * padded * Lanes<T>::width + 2 * kChunk * padded),
        chunk_memory(blocks * sizeof(BackwardChunk<T>)) {
    carry = reinterpret_cast<Vector *>(memory.data);
    sum_A = carry + blocks * padded;
    B = reinterpret_cast<T *>(sum_A + blocks * padded);
    C = B + kChunk * padded;
    chunks = reinterpret_cast<BackwardChunk<T> *>(chunk_memory.data);
  }
  BackwardStep<T> step[kChunk];
  int64_t padded;
  Scratch<T> memory;
  Scratch<char> chunk_memory;
  Vector *carry, *sum_A;   // gradient flowing back in time; dA: (block, state)
  T *B, *C;                // rows of the chunk in scan order
  BackwardChunk<T> *chunks;   // one for each block
  T sums[kChunk * 2 * kStates];
};

// dB and dC of kStates states of a chunk: (step, B or C, state)
template <class T> inline void sum_over_lanes(BackwardScratch<T> &s, int64_t steps) {
  constexpr int W = Lanes<T>::width;
  typename Lanes<T>::Vector rows[W];
  for (int64_t first = 0; first < steps * 2 * kStates; first += W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const int64_t row = first + i, of = row % (2 * kStates);
      const BackwardStep<T> &step = s.step[row / (2 * kStates)];
      rows[i] = of < kStates ? step.sum_B[of] : step.sum_C[of - kStates];
    }
    store(s.sums + first, sum_rows<T>(rows));
  }
}

template <class T> struct BackwardTask {
  const VlmScan &p;
  const Blocks<T> &blocks;
  const T *A;
  int64_t b, d, group, first, end;   // blocks [first, end) of the group

  const VlmDirection &direction() const { return p.direction[d]; }
  // the first channel of a block, and how many it has
  int64_t channel(int64_t block) const {
    return group * blocks.group_channels + (block - group * blocks.per_group) * blocks.width;
  }
  int64_t lanes(int64_t block) const {
    const int64_t left = (group + 1) * blocks.group_channels - channel(block);
    return left < blocks.width ? left : blocks.width;
  }
  template <class S> VectorTask<T, S> vectors(int64_t block) const {
    const Walk walk{p.length, bool(direction().reverse), bool(p.turned)};
    return {p, direction(), walk, b, channel(block), lanes(block), int(d)};
  }
  // the time of a step in scan order
  int64_t time(int64_t step) const { return direction().reverse ? p.length - 1 - step : step; }
};

// Everything of one vector of channels that does not depend on the state: `steps` steps of a chunk from `at` on.
template <class T, class S>
VLM_INLINE void load_chunk(const BackwardTask<T> &w, BackwardChunk<T> &s, int64_t block, int64_t start, int64_t at,
                           int64_t steps) {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p = w.p;
  const VectorTask<T, S> c = w.template vectors<S>(block);
  const Vector bias = c.of_channels(c.q.bias);
  load_tile<T, S>(c.delta(), c.w, start + at, steps, c.lanes, s.dt + at);
  load_tile<T, S>(c.u(), c.w, start + at, steps, c.lanes, s.u + at);
  load_tile<T, S>(c.dense(p.dout).constant(), c.w, start + at, steps, c.lanes, s.dy + at);
  if (p.z) {
    Vector *z = s.slope, *dz = s.along_B, *total = s.along_A;
    load_tile<T, S>(c.z(), c.w, start + at, steps, c.lanes, z + at);
    if (w.d == 0) load_tile<T, S>(c.dense(p.total).constant(), c.w, start + at, steps, c.lanes, total + at);
    for (int64_t k = at; k < at + steps; ++k) {
      const Vector gate = sigmoid<T>(z[k]);
      if (w.d == 0) dz[k] = s.dy[k] * total[k] * (gate * (z[k] * (T(1) - gate) + T(1)));
      s.dy[k] *= z[k] * gate;
    }
    if (w.d == 0) store_tile<T, S>(c.dense(p.dz), c.w, start + at, steps, c.lanes, dz + at);
  }
  for (int64_t k = at; k < at + steps; ++k) {
    Vector dt = s.dt[k] + bias, slope = Vector{} + T(1);
    if (p.softplus) {
      const Softplus<T> soft = softplus_with_slope<T>(dt);
      dt = soft.value;
      slope = soft.slope;
    }
    s.dt[k] = dt;
    s.driven[k] = dt * s.u[k];
    s.slope[k] = slope;
    s.along_B[k] = s.along_A[k] = Vector{};
  }
}

// Brings what is read and written next closer, in the order of memory, two lines of the cache at a time.
template <class S> class Ahead {
 public:
  // the sequences of the chunk at `next`, if there is one, and the gradients of the one at `start`
  template <class T> Ahead(const BackwardTask<T> &w, int64_t next, int64_t start) {
    const VectorTask<T, S> c = w.template vectors<S>(w.first);
    const int64_t channels = w.channel(w.end - 1) + w.lanes(w.end - 1) - c.e, steps = kChunk;
    rows = c.w.turned ? channels : steps;
    lines = ((c.w.turned ? steps : channels) * int64_t(sizeof(S)) + 127) / 128;
    const auto add = [&](const Plane<const S> &x, int64_t from) {
      const int64_t t = c.w.reverse ? c.w.time(from + steps - 1) : from;
      at[planes] = reinterpret_cast<const char *>(x.at + t * (c.w.turned ? 1 : x.row));
      stride[planes++] = x.row * sizeof(S);
    };
    if (next >= 0) {
      add(c.delta(), next);
      add(c.u(), next);
      add(c.dense(c.p.dout).constant(), next);
      if (c.p.z) add(c.z(), next);
      if (c.p.z && w.d == 0) {
        add(c.dense(c.p.total).constant(), next);
        add(c.dense(c.p.dz).constant(), next);
      }
    }
    if (start + kChunk <= c.p.length) {
      add(c.dense(c.q.du).constant(), start);
      add(c.dense(c.q.ddelta).constant(), start);
    }
    if (!planes) rows = 0;
  }
  VLM_INLINE void fetch() {
    if (row == rows) return;
    const char *from = at[plane] + row * stride[plane] + 128 * line;
    __builtin_prefetch(from, 0, 2);
    __builtin_prefetch(from + 64, 0, 2);
    if (++line < lines) return;
    line = 0;
    if (++plane < planes) return;
    plane = 0;
    ++row;
  }

 private:
  const char *at[8];
  int64_t stride[8], rows = 0, lines = 0, row = 0, line = 0;
  int planes = 0, plane = 0;
};

// kStates states of one vector of channels, one chunk: forward again from the kept states, then back. The first
// vector begins the sums over channels.
template <class T, class S, bool first>
__attribute__((noinline)) void backward_states(const BackwardTask<T> &w, BackwardScratch<T> &s, int64_t block,
                                               int64_t n, int64_t chunk, int64_t steps, uint32_t drops, Ahead<S> &ahead) {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p = w.p;
  const int64_t chunks = (p.length + kChunk - 1) / kChunk, mine = (block - w.first) * s.padded + n;
  const T *kept = static_cast<const T *>(w.direction().kept);
  const int64_t lanes = w.lanes(block);
  kept += ((w.b * chunks + chunk) * p.states + n) * p.channels + w.channel(block);
  Vector h[kStates], A[kStates], carry[kStates], dA[kStates];
  for (int i = 0; i < kStates; ++i) {
    h[i] = n + i < p.states ? load(kept + i * p.channels, lanes) : Vector{};
    A[i] = load(w.A + (block * s.padded + n + i) * Lanes<T>::width);
    carry[i] = s.carry[mine + i];
    dA[i] = Vector{};
  }
  BackwardChunk<T> &c = s.chunks[block - w.first];
  const T *B = s.B + n, *C = s.C + n;
  for (int64_t k = 0; k < steps; ++k, B += s.padded, C += s.padded) {
    ahead.fetch();
    const Vector dt = c.dt[k], driven = c.driven[k];
    BackwardStep<T> &step = s.step[k];
    Vector a[kStates];
    for (int i = 0; i < kStates; ++i) a[i] = Lanes<T>::decay(dt, A[i]);
    if (__builtin_expect(drops >> k & 1, 0))
      for (int i = 0; i < kStates; ++i) a[i] = Vector{};
#pragma GCC unroll 4
    for (int i = 0; i < kStates; ++i) {
      step.decay[i] = a[i];
      step.before[i] = h[i];
      h[i] = a[i] * h[i] + driven * B[i];
    }
  }
  for (int64_t k = steps - 1; k >= 0; --k) {
    B -= s.padded, C -= s.padded;
    const Vector dt = c.dt[k], driven = c.driven[k], dy = c.dy[k];
    BackwardStep<T> &step = s.step[k];
    Vector along_B = c.along_B[k], along_A = c.along_A[k];
#pragma GCC unroll 4
    for (int i = 0; i < kStates; ++i) {
      const Vector dh = dy * C[i] + carry[i];
      step.sum_C[i] = first ? dy * h[i] : step.sum_C[i] + dy * h[i];
      step.sum_B[i] = first ? dh * driven : step.sum_B[i] + dh * driven;
      along_B += dh * B[i];
      h[i] = step.before[i];
      carry[i] = dh * step.decay[i];
      const Vector through = carry[i] * h[i];
      along_A += through * A[i];
      dA[i] += through * dt;
    }
    c.along_B[k] = along_B;
    c.along_A[k] = along_A;
  }
  for (int i = 0; i < kStates; ++i) {
    s.carry[mine + i] = carry[i];
    s.sum_A[mine + i] += dA[i];
  }
}

template <class T, class S>
VLM_INLINE void store_chunk(const BackwardTask<T> &w, BackwardChunk<T> &s, int64_t block, int64_t start, int64_t at,
                            int64_t steps) {
  using Vector = typename Lanes<T>::Vector;
  const VlmDirection &q = w.direction();
  const VectorTask<T, S> c = w.template vectors<S>(block);
  const Vector D = c.of_channels(q.D);
  Vector sum_D{}, sum_bias{};
  for (int64_t k = at; k < at + steps; ++k) {
    const Vector ddelta = (s.along_B[k] * s.u[k] + s.along_A[k] * Lanes<T>::decay_unscale) * s.slope[k];
    sum_D += s.dy[k] * s.u[k];
    sum_bias += ddelta;
    s.along_B[k] = s.along_B[k] * s.dt[k] + s.dy[k] * D;
    s.along_A[k] = ddelta;
  }
  store_tile<T, S>(c.dense(q.du), c.w, start + at, steps, c.lanes, s.along_B + at);
  store_tile<T, S>(c.dense(q.ddelta), c.w, start + at, steps, c.lanes, s.along_A + at);
  T *dD = static_cast<T *>(q.dD) + w.b * c.p.channels + c.e, *dbias = static_cast<T *>(q.dbias) + w.b * c.p.channels + c.e;
  store(dD, load(dD, c.lanes) + sum_D, c.lanes);
  store(dbias, load(dbias, c.lanes) + sum_bias, c.lanes);
}

// rows B and C of a chunk, in scan order
template <class T, class S>
void load_rows(const BackwardTask<T> &w, BackwardScratch<T> &s, int64_t start, int64_t steps) {
  const VlmDirection &q = w.direction();
  const bool turned = w.p.turned;
  const int64_t state = q.bc_row, step = turned ? 1 : q.bc_row;
  const S *rows[2] = {static_cast<const S *>(q.B), static_cast<const S *>(q.C)};
  T *to[2] = {s.B, s.C};
  constexpr int64_t W = Lanes<T>::width;
  const int64_t N = w.p.states;
  for (int64_t k = 0; k < steps; ++k) {
    const int64_t from = w.b * q.bc_batch + w.time(start + k) * step + w.group * q.bc_group;
    for (int half = 0; half < 2; ++half) {
      T *row = to[half] + k * s.padded;
      if (turned)
        for (int64_t n = 0; n < N; ++n) row[n] = number(rows[half][from + n * state]);
      else
        for (int64_t n = 0; n < N; n += W) {
          const int64_t lanes = N - n < W ? N - n : W;
          store(row + n, load(rows[half] + from + n, lanes), lanes);
        }
      for (int64_t n = N; n < s.padded; ++n) row[n] = T(0);
    }
  }
}

template <class T, class S> void scan_backward_task(const BackwardTask<T> &w, BackwardScratch<T> &s, T *dBC) {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p = w.p;
  const VlmDirection &q = w.direction();
  const int64_t L = p.length, E = p.channels, N = p.states, own = w.end - w.first;
  if (!own) {   // there are more parts than vectors
    for (int64_t t = 0; t < L; ++t) std::memset(dBC + ((w.b * L + t) * p.groups + w.group) * 2 * N, 0, 2 * N * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < own * s.padded; ++i) s.carry[i] = s.sum_A[i] = Vector{};
  for (int64_t k = w.first; k < w.end; ++k) {
    store(static_cast<T *>(q.dD) + w.b * E + w.blocks.first(k), Vector{}, w.blocks.lanes(k));
    store(static_cast<T *>(q.dbias) + w.b * E + w.blocks.first(k), Vector{}, w.blocks.lanes(k));
  }
  const int32_t *segments = p.segments ? p.segments + w.b * L : nullptr;
  for (int64_t start = (L - 1) / kChunk * kChunk; start >= 0; start -= kChunk) {
    const int64_t steps = L - start < kChunk ? L - start : kChunk;
    // turned, a row of memory has all steps of one channel
    const int64_t stride = p.turned ? kChunk : kRows;
    const auto rest = [&](int64_t at) { return stride < steps - at ? stride : steps - at; };
    uint32_t dropped = 0;
    if (segments)
      for (int64_t k = 0; k < steps; ++k)
        dropped |= uint32_t(drops(segments, w.time(start + k), start + k, q.reverse)) << k;
    load_rows<T, S>(w, s, start, steps);
    for (int64_t at = 0; at < steps; at += stride)
      for (int64_t block = w.first; block < w.end; ++block)
        load_chunk<T, S>(w, s.chunks[block - w.first], block, start, at, rest(at));
    Ahead<S> ahead(w, start - kChunk, start);
    for (int64_t n = 0; n < N; n += kStates) {
      backward_states<T, S, true>(w, s, w.first, n, start / kChunk, steps, dropped, ahead);
      for (int64_t block = w.first + 1; block < w.end; ++block)
        backward_states<T, S, false>(w, s, block, n, start / kChunk, steps, dropped, ahead);
      sum_over_lanes(s, steps);
      for (int64_t k = 0; k < steps; ++k) {
        T *to = dBC + ((w.b * L + w.time(start + k)) * p.groups + w.group) * 2 * N + n;
        const T *sums = s.sums + k * 2 * kStates;
        if (n + kStates <= N) {
          std::memcpy(to, sums, kStates * sizeof(T));
          std::memcpy(to + N, sums + kStates, kStates * sizeof(T));
        } else {
          for (int64_t i = 0; n + i < N; ++i) {
            to[i] = sums[i];
            to[N + i] = sums[kStates + i];
          }
        }
      }
    }
    for (int64_t at = 0; at < steps; at += stride)
      for (int64_t block = w.first; block < w.end; ++block)
        store_chunk<T, S>(w, s.chunks[block - w.first], block, start, at, rest(at));
  }
  for (int64_t k = w.first; k < w.end; ++k)
    for (int64_t n = 0; n < N; ++n) {
      const int64_t to = (w.b * N + n) * E + w.blocks.first(k), from = (k - w.first) * s.padded + n;
      store(static_cast<T *>(q.dA) + to, s.sum_A[from], w.blocks.lanes(k));
      if (q.dinitial) store(static_cast<T *>(q.dinitial) + to, s.carry[from], w.blocks.lanes(k));
    }
}

template <class T, class S> void scan_backward(const VlmScan &p) {
  const Blocks<T> blocks(p);
  const int64_t padded = padded_states(p), size = blocks.count * padded * blocks.width;
  Scratch<T> A(p.directions * size);
  arrange_A(p, blocks, padded, A.data);
  const int64_t per_part = (blocks.per_group + p.parts - 1) / p.parts;
  const int64_t per_batch = p.groups * p.parts;
#pragma omp parallel num_threads(p.threads)
  {
    Scratch<char> room(sizeof(BackwardScratch<T>));
    BackwardScratch<T> *s = new (room.data) BackwardScratch<T>(padded, per_part);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.directions * p.batch * per_batch; ++task) {
      const int64_t part = task % p.parts, group = task / p.parts % p.groups;
      const int64_t b = task / per_batch % p.batch, d = task / per_batch / p.batch;
      const int64_t from = part * per_part, to = from + per_part;
      const int64_t base = group * blocks.per_group;
      const BackwardTask<T> w{p, blocks, A.data + d * size, b, d, group,
                              base + (from < blocks.per_group ? from : blocks.per_group),
                              base + (to < blocks.per_group ? to : blocks.per_group)};
      T *dBC = static_cast<T *>(p.direction[d].dBC) + part * p.batch * p.length * p.groups * 2 * p.states;
      scan_backward_task<T, S>(w, *s, dBC);
    }
    s->~BackwardScratch<T>();
  }
}

}  // namespace VLM_ISA
