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

// Room of one thread in the forward pass: where the directions meet, in full precision, and the rows [B | C] of one
// direction and group where they are stored in less.
template <class T, class S> struct ForwardRoom {
  explicit ForwardRoom(const VlmScan &p)
      : meet(p.directions > 1 ? p.length * Lanes<T>::width : 0), rows(sizeof(S) < sizeof(T) ? 2 * p.length * p.states : 0) {}
  Scratch<T> meet, rows;

  void widen(const VlmScan &p, const S *B, const S *C, int64_t stride) {
    for (int64_t t = 0; t < p.length; ++t)
      for (int64_t n = 0; n < p.states; ++n) {
        rows.data[2 * t * p.states + n] = number(B[t * stride + n]);
        rows.data[(2 * t + 1) * p.states + n] = number(C[t * stride + n]);
      }
  }
};

// one direction of one vector of channels; N states known at compile time, or 0; T computes, S is stored
template <class T, class S, int N>
void scan_forward_block(const VlmScan &p, const Blocks<T> &blocks, const T *A, int64_t b, int64_t block, int d,
                        ForwardRoom<T, S> &room) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t W = Lanes<T>::width;
  const VlmDirection &q = p.direction[d];
  const int64_t states = N ? N : p.states, L = p.length, E = p.channels;
  const int64_t e = blocks.first(block), lanes = blocks.lanes(block), group = block / blocks.per_group;
  const int64_t chunks = (L + kChunk - 1) / kChunk;
  const bool last_direction = d + 1 == p.directions;
  const S *u = static_cast<const S *>(q.u) + b * q.u_batch + e;
  const S *delta = static_cast<const S *>(q.delta) + b * q.delta_batch + e;
  const S *stored_B = static_cast<const S *>(q.B) + b * q.bc_batch + group * q.bc_group;
  const S *stored_C = static_cast<const S *>(q.C) + b * q.bc_batch + group * q.bc_group;
  const T *B, *C;
  int64_t bc_row;
  if constexpr (sizeof(S) < sizeof(T)) {
    room.widen(p, stored_B, stored_C, q.bc_row);
    B = room.rows.data;
    C = B + states;
    bc_row = 2 * states;
  } else {
    B = stored_B;
    C = stored_C;
    bc_row = q.bc_row;
  }
  const S *z = p.z ? static_cast<const S *>(p.z) + b * p.z_batch + e : nullptr;
  S *out = static_cast<S *>(p.out) + b * L * E + e;
  S *total = p.total ? static_cast<S *>(p.total) + b * L * E + e : nullptr;
  T *meet = room.meet.data;
  T *kept = q.kept ? static_cast<T *>(q.kept) + b * chunks * states * E + e : nullptr;
  const int32_t *segments = p.segments ? p.segments + b * L : nullptr;
  const Vector D = q.D ? load(static_cast<const T *>(q.D) + e, lanes) : Vector{};
  const Vector bias = q.bias ? load(static_cast<const T *>(q.bias) + e, lanes) : Vector{};
  Vector h[N ? N : kMaxStates];
  for (int64_t n = 0; n < states; ++n)
    h[n] = q.initial ? load(static_cast<const T *>(q.initial) + (b * states + n) * E + e, lanes) : Vector{};
  for (int64_t step = 0; step < L; ++step) {
    const int64_t t = q.reverse ? L - 1 - step : step;
    if (kept && step % kChunk == 0)
      for (int64_t n = 0; n < states; ++n) store(kept + (step / kChunk * states + n) * E, h[n], lanes);
    if (drops(segments, t, step, q.reverse))
      for (int64_t n = 0; n < states; ++n) h[n] = Vector{};
    const int64_t ahead = step + 8 < L ? (q.reverse ? t - 8 : t + 8) : t;
    __builtin_prefetch(u + ahead * q.u_row);
    __builtin_prefetch(delta + ahead * q.delta_row);
    const Vector input = load(u + t * q.u_row, lanes);
    Vector dt = load(delta + t * q.delta_row, lanes) + bias;
    if (p.softplus) dt = softplus<T>(dt);
    const Vector driven = dt * input;
    Vector y = D * input, y2{};
    const T *Bt = B + t * bc_row, *Ct = C + t * bc_row;
    if constexpr (N > 0) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        h[n] = Lanes<T>::decay(dt * load(A + n * W)) * h[n] + driven * Bt[n];
        if (n % 2) y += h[n] * Ct[n];
        else y2 += h[n] * Ct[n];
      }
    } else {
      for (int64_t n = 0; n < states; ++n) {
        h[n] = Lanes<T>::decay(dt * load(A + n * W)) * h[n] + driven * Bt[n];
        y += h[n] * Ct[n];
      }
    }
    y += y2;
    if (d > 0) y += load(meet + t * W);
    if (!last_direction) {
      store(meet + t * W, y);
      continue;
    }
    if (total) store(total + t * E, y, lanes);
    if (z) {
      const Vector gate = load(z + t * p.z_row, lanes);
      y *= gate * sigmoid<T>(gate);
    }
    store(out + t * E, y, lanes);
  }
  if (q.last)
    for (int64_t n = 0; n < states; ++n) store(static_cast<T *>(q.last) + (b * states + n) * E + e, h[n], lanes);
}

template <class T, class S> void scan_forward(const VlmScan &p) {
  const Blocks<T> blocks(p);
  const int64_t padded = padded_states(p), size = blocks.count * padded * blocks.width;
  Scratch<T> A(p.directions * size);
  arrange_A(p, blocks, padded, A.data);
#pragma omp parallel num_threads(p.threads)
  {
    ForwardRoom<T, S> room(p);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < p.batch * blocks.count; ++task) {
      const int64_t b = task / blocks.count, block = task % blocks.count;
      for (int d = 0; d < p.directions; ++d) {
        const T *mine = A.data + d * size + block * padded * blocks.width;
        if (p.states == 16) scan_forward_block<T, S, 16>(p, blocks, mine, b, block, d, room);
        else if (p.states == 8) scan_forward_block<T, S, 8>(p, blocks, mine, b, block, d, room);
        else scan_forward_block<T, S, 0>(p, blocks, mine, b, block, d, room);
      }
    }
  }
}

// what one thread of the backward pass works in; [chunk step][...][lane]
template <class T> struct BackwardScratch {
  using Vector = typename Lanes<T>::Vector;
  BackwardScratch(int64_t padded, int64_t blocks)
      : padded(padded), memory((2 * kChunk * padded + 2 * blocks * padded) * Lanes<T>::width + 2 * kChunk * padded) {
    sum_B = reinterpret_cast<Vector *>(memory.data);
    sum_C = sum_B + kChunk * padded;
    carry = sum_C + kChunk * padded;
    sum_A = carry + blocks * padded;
    B = reinterpret_cast<T *>(sum_A + blocks * padded);
    C = B + kChunk * padded;
  }
  int64_t padded;
  Scratch<T> memory;
  Vector *sum_B, *sum_C;   // dB and dC of the chunk, still to be summed over lanes
  Vector *carry, *sum_A;   // gradient flowing back in time; dA: (block, state)
  T *B, *C;                // rows of the chunk in scan order
  Vector u[kChunk], dt[kChunk], driven[kChunk], slope[kChunk], dy[kChunk], along_B[kChunk], along_A[kChunk];
  Vector decay[kChunk][kStates], before[kChunk][kStates];
};

template <class T> struct BackwardTask {
  const VlmScan &p;
  const Blocks<T> &blocks;
  const T *A;
  int64_t b, d, group, first, end;   // blocks [first, end) of the group

  const VlmDirection &direction() const { return p.direction[d]; }
  // the time of a step in scan order
  int64_t time(int64_t step) const { return direction().reverse ? p.length - 1 - step : step; }
};

// everything of one vector of channels that does not depend on the state: steps [start, start + steps)
template <class T, class S>
VLM_INLINE void load_chunk(const BackwardTask<T> &w, BackwardScratch<T> &s, int64_t block, int64_t start,
                           int64_t steps) {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p = w.p;
  const VlmDirection &q = w.direction();
  const int64_t e = w.blocks.first(block), lanes = w.blocks.lanes(block);
  const Vector bias = q.bias ? load(static_cast<const T *>(q.bias) + e, lanes) : Vector{};
  for (int64_t k = 0; k < steps; ++k) {
    const int64_t t = w.time(start + k), row = (w.b * p.length + t) * p.channels + e;
    Vector dt = load(static_cast<const S *>(q.delta) + w.b * q.delta_batch + t * q.delta_row + e, lanes) + bias;
    Vector slope = Vector{} + T(1);
    if (p.softplus) {
      const Softplus<T> soft = softplus_with_slope<T>(dt);
      dt = soft.value;
      slope = soft.slope;
    }
    const Vector u = load(static_cast<const S *>(q.u) + w.b * q.u_batch + t * q.u_row + e, lanes);
    Vector dy = load(static_cast<const S *>(p.dout) + row, lanes);
    if (p.z) {
      const Vector z = load(static_cast<const S *>(p.z) + w.b * p.z_batch + t * p.z_row + e, lanes);
      const Vector gate = sigmoid<T>(z);
      if (w.d == 0) {
        const Vector total = load(static_cast<const S *>(p.total) + row, lanes);
        store(static_cast<S *>(p.dz) + row, dy * total * (gate * (z * (T(1) - gate) + T(1))), lanes);
      }
      dy *= z * gate;
    }
    s.u[k] = u;
    s.dt[k] = dt;
    s.driven[k] = dt * u;
    s.slope[k] = slope;
    s.dy[k] = dy;
    s.along_B[k] = s.along_A[k] = Vector{};
  }
}

// kStates states of one vector of channels, one chunk: forward again from the kept states, then back
template <class T>
__attribute__((noinline)) void backward_states(const BackwardTask<T> &w, BackwardScratch<T> &s, int64_t block,
                                               int64_t n, int64_t start, int64_t steps) {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p = w.p;
  const VlmDirection &q = w.direction();
  const int64_t chunks = (p.length + kChunk - 1) / kChunk, mine = (block - w.first) * s.padded + n;
  const int32_t *segments = p.segments ? p.segments + w.b * p.length : nullptr;
  const T *kept = static_cast<const T *>(q.kept);
  kept += ((w.b * chunks + start / kChunk) * p.states + n) * p.channels + w.blocks.first(block);
  Vector h[kStates], A[kStates], carry[kStates], dA[kStates];
  for (int i = 0; i < kStates; ++i) {
    h[i] = n + i < p.states ? load(kept + i * p.channels, w.blocks.lanes(block)) : Vector{};
    A[i] = load(w.A + (block * s.padded + n + i) * Lanes<T>::width);
    carry[i] = s.carry[mine + i];
    dA[i] = Vector{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    const bool drop = drops(segments, w.time(start + k), start + k, q.reverse);
    const T *B = s.B + k * s.padded + n;
    Vector *sum = s.sum_C + k * s.padded + n;
#pragma GCC unroll 4
    for (int i = 0; i < kStates; ++i) {
      Vector a = Lanes<T>::decay(s.dt[k] * A[i]);
      if (__builtin_expect(drop, 0)) a = Vector{};
      s.decay[k][i] = a;
      s.before[k][i] = h[i];
      h[i] = a * h[i] + s.driven[k] * B[i];
      sum[i] += s.dy[k] * h[i];
    }
  }
  for (int64_t k = steps - 1; k >= 0; --k) {
    const T *B = s.B + k * s.padded + n, *C = s.C + k * s.padded + n;
    Vector *sum = s.sum_B + k * s.padded + n;
    Vector along_B{}, along_A{};
#pragma GCC unroll 4
    for (int i = 0; i < kStates; ++i) {
      const Vector dh = s.dy[k] * C[i] + carry[i];
      sum[i] += dh * s.driven[k];
      along_B += dh * B[i];
      carry[i] = dh * s.decay[k][i];
      const Vector through = carry[i] * s.before[k][i];
      along_A += through * A[i];
      dA[i] += through * s.dt[k];
    }
    s.along_B[k] += along_B;
    s.along_A[k] += along_A;
  }
  for (int i = 0; i < kStates; ++i) {
    s.carry[mine + i] = carry[i];
    s.sum_A[mine + i] += dA[i];
  }
}

template <class T, class S>
VLM_INLINE void store_chunk(const BackwardTask<T> &w, BackwardScratch<T> &s, int64_t block, int64_t start,
                            int64_t steps) {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p = w.p;
  const VlmDirection &q = w.direction();
  const int64_t e = w.blocks.first(block), lanes = w.blocks.lanes(block);
  const Vector D = q.D ? load(static_cast<const T *>(q.D) + e, lanes) : Vector{};
  Vector sum_D{}, sum_bias{};
  for (int64_t k = 0; k < steps; ++k) {
    const int64_t row = (w.b * p.length + w.time(start + k)) * p.channels + e;
    const Vector ddelta = (s.along_B[k] * s.u[k] + s.along_A[k] * Lanes<T>::decay_unscale) * s.slope[k];
    store(static_cast<S *>(q.du) + row, s.along_B[k] * s.dt[k] + s.dy[k] * D, lanes);
    store(static_cast<S *>(q.ddelta) + row, ddelta, lanes);
    sum_D += s.dy[k] * s.u[k];
    sum_bias += ddelta;
  }
  T *dD = static_cast<T *>(q.dD) + w.b * p.channels + e, *dbias = static_cast<T *>(q.dbias) + w.b * p.channels + e;
  store(dD, load(dD, lanes) + sum_D, lanes);
  store(dbias, load(dbias, lanes) + sum_bias, lanes);
}

template <class T, class S> void scan_backward_task(const BackwardTask<T> &w, BackwardScratch<T> &s, T *dBC) {
  using Vector = typename Lanes<T>::Vector;
  const VlmScan &p = w.p;
  const VlmDirection &q = w.direction();
  const int64_t L = p.length, E = p.channels, N = p.states, own = w.end - w.first;
  for (int64_t i = 0; i < own * s.padded; ++i) s.carry[i] = s.sum_A[i] = Vector{};
  for (int64_t k = w.first; k < w.end; ++k) {
    store(static_cast<T *>(q.dD) + w.b * E + w.blocks.first(k), Vector{}, w.blocks.lanes(k));
    store(static_cast<T *>(q.dbias) + w.b * E + w.blocks.first(k), Vector{}, w.blocks.lanes(k));
  }
  for (int64_t start = (L - 1) / kChunk * kChunk; start >= 0; start -= kChunk) {
    const int64_t steps = L - start < kChunk ? L - start : kChunk;
    for (int64_t i = 0; i < steps * s.padded; ++i) s.sum_B[i] = s.sum_C[i] = Vector{};
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t t = w.time(start + k);
      const int64_t from = w.b * q.bc_batch + t * q.bc_row + w.group * q.bc_group;
      for (int64_t n = 0; n < s.padded; ++n) {
        s.B[k * s.padded + n] = n < N ? number(static_cast<const S *>(q.B)[from + n]) : T(0);
        s.C[k * s.padded + n] = n < N ? number(static_cast<const S *>(q.C)[from + n]) : T(0);
      }
    }
    for (int64_t block = w.first; block < w.end; ++block) {
      load_chunk<T, S>(w, s, block, start, steps);
      for (int64_t n = 0; n < N; n += kStates) backward_states(w, s, block, n, start, steps);
      store_chunk<T, S>(w, s, block, start, steps);
    }
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t t = w.time(start + k);
      T *to = dBC + ((w.b * L + t) * p.groups + w.group) * 2 * N;
      for (int64_t n = 0; n < N; ++n) to[n] = sum_lanes<T>(s.sum_B[k * s.padded + n]);
      for (int64_t n = 0; n < N; ++n) to[N + n] = sum_lanes<T>(s.sum_C[k * s.padded + n]);
    }
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
