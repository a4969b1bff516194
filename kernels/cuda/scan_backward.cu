// The selective scan, backward. With dy = dout silu(z), a[t] = exp(dt[t] A) and g[t] the gradient of the state h[t]:
//   g[t] = dy[t] C[t] + a[t+1] g[t+1]
//   dB[t] = sum_e g dt u    dC[t] = sum_e h dy    dA = sum_t g a h[t-1] dt    du = dt sum_n g B + D dy
//   d(dt)[t] = u sum_n g B + sum_n g a h[t-1] A
//
// A warp walks its channels chunk by chunk against the order of the scan; chunks begin where the forward pass kept a
// state. From there the states come again: first roughly, one every kMarkEvery steps into shared memory, then kSteps
// steps at a time with everything the way back needs in registers. Warps do not depend on each other, so what has to be
// added up over channel tiles or batch rows is written in parts, which sum.cu adds: no atomics, results repeat to the
// bit.
#include "problem.cuh"
#include "states.cuh"

namespace vlm {

static_assert(kSplit == 1, "the backward pass does not split time");

constexpr int kChunk = kKeepEvery;
constexpr int kSteps = 4, kMarkEvery = 8;
constexpr int kMarks = kChunk / kMarkEvery - 1;
constexpr int kQuads = kStates / 4;

// A sum over the pairs of channels: every lane leaves a quad of states for each of kSteps rows, and adds up a run of
// neighbouring quads. One quad's gap after every run puts those that are read together into different banks.
constexpr int kRun = kPairs < kSteps * kQuads ? kPairs : kSteps * kQuads;
constexpr int kRuns = 32 / kRun, kQuadRow = 32 + kRuns;
constexpr int kSharing = kPairs / kRun;
constexpr int kRounds = kSteps * kQuads / kRun;

// one chunk as it came from global memory
struct alignas(16) RawChunk {
  Io dout[kChunk * kTileChannels];
  Io z[kChunk * kTileChannels];
  Io total[kChunk * kTileChannels];
  Io delta[kChunk * (kRank ? kRankRow : kTileChannels)];
  Room<(sizeof(Io) == 4 ? 0 : kChunk * 2 * kStateCount * 2)> bc;
};

struct alignas(16) Work {
  float4 marks[kMarks][2 * kQuads][32];
  float4 quads[kSteps * kQuads * kQuadRow];
  // of a row and lane, the sums over its states of g B and of g a h A: both channels', then both channels'
  float4 along[kSteps * 32];
};

// the shared memory of one warp
struct alignas(16) ChunkRoom {
  float4 steps[kChunk * kPairs];  // delta of both channels, dy of both
  Io u[kChunk * kTileChannels];
  float bc[kChunk * 2 * kStateCount];
  float D[kTileChannels], bias[kTileChannels];
  unsigned drops;  // bit i: before row i the state is dropped
  // a chunk is raw only until its steps are prepared
  union {
    RawChunk raw;
    Work work;
  };
};

// small blocks fill a multiprocessor's shared memory best, and find room also where a block gets no more than 99 KiB
constexpr int kBackwardWarps = 2 * sizeof(ChunkRoom) > 99 * 1024 ? 1 : 2;
constexpr int kBackwardThreads = 32 * kBackwardWarps;
constexpr int kBackwardBytes = kBackwardWarps * int(sizeof(ChunkRoom));

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// what a warp works on, and what is this lane's of it
struct Task {
  const ScanBackward &p;
  const ScanBackwardDirection &q;
  ChunkRoom &room;
  int lane, pair, part;  // see layout.cuh
  int batch, group, length;
  int tile;              // of the group
  int span;
  bool reverse, gates;   // `gates`: it is this warp that writes dz
  long long channel;     // first of the tile
  int columns;           // channels of the tile that exist

  __device__ __forceinline__ const ScanDirection &given() const { return q.given; }
  // channels of this lane's pair that exist
  __device__ __forceinline__ int there() const { return columns - 2 * opaque(pair); }
  __device__ __forceinline__ long long lane_channel() const { return channel + 2 * pair; }
  __device__ __forceinline__ int chunks() const { return (length + kChunk - 1) / kChunk; }
  __device__ __forceinline__ Times times(int chunk) const {
    if (reverse) return {length - 1 - chunk * kChunk, -1, length};
    return {chunk * kChunk, 1, length};
  }
  // chunks of a span, and the first of this one
  __device__ __forceinline__ int span_chunks() const {
    const int spans = static_cast<int>(p.spans);
    return (chunks() + spans - 1) / spans;
  }
  __device__ __forceinline__ int first_chunk() const { return smaller(opaque(span) * span_chunks(), chunks()); }
  __device__ __forceinline__ int end_chunk() const { return smaller((span + 1) * span_chunks(), chunks()); }
  // where the sums of this span stand: the row of (b, spans, e)
  __device__ __forceinline__ long long sums_row() const {
    return (batch * p.spans + opaque(span)) * p.channels + lane_channel();
  }
  // the row of a contiguous sequence at time t, at the tile's first channel
  __device__ __forceinline__ long long row(int t) const {
    return (static_cast<long long>(batch) * length + t) * p.channels + channel;
  }
};

__device__ __forceinline__ Row row_of_B(const Task &w, int row) {
  return Row(w.room.bc + row * 2 * kStateCount + w.part * kStates);
}

__device__ __forceinline__ Row row_of_C(const Task &w, int row) {
  return Row(w.room.bc + (row * 2 + 1) * kStateCount + w.part * kStates);
}

__device__ __forceinline__ float2 load_u(const Task &w, int row, int pair) {
  return Pairs<Io>::load(w.room.u + row * kTileChannels + 2 * pair);
}

__device__ __forceinline__ States load_kept(const Task &w, int chunk) {
  const float *from = w.given().kept +
                      (static_cast<long long>(w.batch) * w.chunks() + opaque(chunk)) * kStateCount * w.p.channels +
                      w.lane_channel();
  const int there = w.there();
  States h;
#pragma unroll
  for (int n = 0; n < kStates; ++n) {
    const float2 v = load_global(from + (w.part * kStates + n) * w.p.channels, there);
    h.of[0][n] = v.x;
    h.of[1][n] = v.y;
  }
  return h;
}

// to the states of this lane's first channel
__device__ __forceinline__ void store_states(const Task &w, float *to, const States &s) {
  const int there = w.there();
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int n = 0; n < kStates; ++n)
      if (c < there)
        to[c * kStateCount + w.part * kStates + n] = s.of[c][n];
}

// `Whole`: else only what is needed to carry gradients back
template <bool Whole> __device__ __forceinline__ void fetch_chunk(const Task &w, const Times &times) {
  const ScanDirection &q = w.given();
  RawChunk &raw = w.room.raw;
  const int lane = opaque(w.lane);
  if (Whole)
    fetch<kTileChannels, kTileChannels, kChunk>(
        w.room.u, static_cast<const Io *>(q.u) + w.batch * q.u_batch + w.channel, q.u_row, w.columns, times, lane);
  fetch<kTileChannels, kTileChannels, kChunk>(raw.dout, static_cast<const Io *>(w.p.dout) + w.row(0), w.p.channels,
                                              w.columns, times, lane);
  if (w.p.z) {
    const Io *z = static_cast<const Io *>(w.p.z) + w.batch * w.p.z_batch + w.channel;
    fetch<kTileChannels, kTileChannels, kChunk>(raw.z, z, w.p.z_row, w.columns, times, lane);
    if (w.gates)
      fetch<kTileChannels, kTileChannels, kChunk>(raw.total, static_cast<const Io *>(w.p.total) + w.row(0),
                                                  w.p.channels, w.columns, times, lane);
  }
  const Io *delta = static_cast<const Io *>(q.delta) + w.batch * q.delta_batch;
#if VLM_RANK
  fetch<kRank, kRankRow, kChunk>(raw.delta, delta, q.delta_row, kRank, times, lane);
#else
  fetch<kTileChannels, kTileChannels, kChunk>(raw.delta, delta + w.channel, q.delta_row, w.columns, times, lane);
#endif
  Io *bc = sizeof(Io) == 4 ? reinterpret_cast<Io *>(w.room.bc) : reinterpret_cast<Io *>(&raw.bc);
  const long long at = w.batch * q.bc_batch + w.group * q.bc_group;
  if (Whole)
    fetch<kStateCount, 2 * kStateCount, kChunk>(bc, static_cast<const Io *>(q.B) + at, q.bc_row, kStateCount, times,
                                                lane);
  fetch<kStateCount, 2 * kStateCount, kChunk>(bc + kStateCount, static_cast<const Io *>(q.C) + at, q.bc_row,
                                              kStateCount, times, lane);
}

// B and C as fp32; of stored fp32 they already lie where they should
template <class T> __device__ __forceinline__ void widen(const Task &w) {
  if constexpr (sizeof(T) == 2) {
    const T *from = reinterpret_cast<const T *>(&w.room.raw.bc);
    widen_halves<kChunk * 2 * kStateCount>(from, w.room.bc, w.lane);
  }
}

// What the recurrence needs of one row and pair. A row beyond the sequence leaves states and gradients as they are.
template <bool Soft, bool Gated>
__device__ __forceinline__ void put_step(const Task &w, const Times &times, int row, int pair, float2 delta) {
  const bool exists = times.has(row);
  const int at = row * kTileChannels + 2 * pair;
  if (Soft) delta = make_float2(softplus(delta.x), softplus(delta.y));
  if (!exists) delta = make_float2(0.0f, 0.0f);
  float2 dy = Pairs<Io>::load(w.room.raw.dout + at);
  if (Gated) {
    const float2 z = Pairs<Io>::load(w.room.raw.z + at);
    const float2 gate = make_float2(sigmoid(z.x), sigmoid(z.y));
    // dz takes the place of the total. A warp that does not write it has neither, which costs less than a branch.
    const float2 total = Pairs<Io>::load(w.room.raw.total + at);
    Pairs<Io>::store(w.room.raw.total + at,
                     make_float2(dy.x * total.x * gate.x * fmaf(z.x, 1.0f - gate.x, 1.0f),
                                 dy.y * total.y * gate.y * fmaf(z.y, 1.0f - gate.y, 1.0f)));
    dy = make_float2(dy.x * z.x * gate.x, dy.y * z.y * gate.y);
  }
  w.room.steps[row * kPairs + pair] = make_float4(delta.x, delta.y, dy.x, dy.y);
}

#if VLM_RANK
// delta = rank rows @ weight^T: 16 steps and 8 channels at a time, with the bias as what is added to
template <bool Soft, bool Gated> __device__ __forceinline__ void prepare_steps(const Task &w, const Times &times) {
  constexpr int stride = kRankStride;
  const int lane = opaque(w.lane), row = lane / 4, part = lane % 4;
  const unsigned *rows = reinterpret_cast<const unsigned *>(w.room.raw.delta) + row * stride + part;
  const unsigned *weight = static_cast<const unsigned *>(w.given().weight) + (w.channel + row) * kRankWords + part;
  for (int first = 0; first < kTileChannels; first += 8) {
    unsigned b[kProducts][2];
#pragma unroll
    for (int k = 0; k < kProducts; ++k)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        b[k][i] = first + row < w.columns ? weight[first * kRankWords + 8 * k + 4 * i] : 0;
    const float2 bias = Pairs<float>::load(w.room.bias + first + 2 * part);
#pragma unroll
    for (int half = 0; half < kChunk; half += 16) {
      float c[4] = {bias.x, bias.y, bias.x, bias.y};
#pragma unroll
      for (int k = 0; k < kProducts; ++k) {
        const unsigned *from = rows + half * stride + 8 * k;
        const unsigned a[4] = {from[0], from[8 * stride], from[4], from[8 * stride + 4]};
        mma<Io>(c, a, b[k]);
      }
      put_step<Soft, Gated>(w, times, half + row, first / 2 + part, make_float2(c[0], c[1]));
      put_step<Soft, Gated>(w, times, half + row + 8, first / 2 + part, make_float2(c[2], c[3]));
    }
  }
}
#else
template <bool Soft, bool Gated> __device__ __forceinline__ void prepare_steps(const Task &w, const Times &times) {
  const int pair = opaque(w.pair), part = opaque(w.part);
  const float2 bias = Pairs<float>::load(w.room.bias + 2 * pair);
#pragma unroll 4
  for (int row = part; row < kChunk; row += kParts) {
    const float2 delta = Pairs<Io>::load(w.room.raw.delta + row * kTileChannels + 2 * pair);
    put_step<Soft, Gated>(w, times, row, pair, make_float2(delta.x + bias.x, delta.y + bias.y));
  }
}
#endif

// one loop for each kind of problem, free of branches, so that the chains of several rows run side by side
__device__ __forceinline__ void prepare(const Task &w, const Times &times) {
  if (w.p.softplus) {
    if (w.p.z) prepare_steps<true, true>(w, times);
    else prepare_steps<true, false>(w, times);
  } else {
    if (w.p.z) prepare_steps<false, true>(w, times);
    else prepare_steps<false, false>(w, times);
  }
}

__device__ __forceinline__ void store_dz(const Task &w, const Times &times) {
  Io *to = static_cast<Io *>(w.p.dz) + w.row(0);
  const Io *from = w.room.raw.total;
  const int lane = opaque(w.lane);
#if VLM_ALIGNED
  constexpr int vectors = kTileChannels / kVector;
#pragma unroll
  for (int first = 0; first < kChunk * vectors; first += 32) {
    const int row = (first + lane) / vectors, column = (first + lane) % vectors * kVector;
    if (times.has(row) && column < w.columns)
      *reinterpret_cast<uint4 *>(to + times.at(row) * w.p.channels + column) =
          *reinterpret_cast<const uint4 *>(from + row * kTileChannels + column);
  }
#else
  for (int i = lane; i < kChunk * kTileChannels; i += 32) {
    const int row = i / kTileChannels, column = i % kTileChannels;
    if (times.has(row) && column < w.columns) to[times.at(row) * w.p.channels + column] = from[i];
  }
#endif
}

__device__ __forceinline__ void find_drops(const Task &w, const Times &times) {
  if (!kEvents) return;
  unsigned drops = 0;
  if (w.p.segments)
    drops = find_borders<kChunk>(w.p.segments + static_cast<long long>(w.batch) * w.length, times, w.lane);
  if (w.lane == 0) w.room.drops = drops;
}

__device__ __forceinline__ bool dropped(const Task &w, int row) { return kEvents && (w.room.drops >> row & 1); }

// one step of the forward pass
__device__ __forceinline__ void advance(const Task &w, const States &A, int row, States &h) {
  const float4 step = w.room.steps[row * kPairs + w.pair];
  const float2 u = load_u(w, row, w.pair);
  const Row B = row_of_B(w, row);
  const float drive[2] = {step.x * u.x, step.y * u.y}, delta[2] = {step.x, step.y};
  if (dropped(w, row)) h = States{};
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int n = 0; n < kStates; ++n)
      h.of[c][n] = fmaf(exp2_approx(delta[c] * A.of[c][n]), h.of[c][n], drive[c] * B.of[n]);
}

__device__ __forceinline__ void put_marks(const Task &w, int chunk, const States &A) {
  States h = load_kept(w, chunk);
  for (int mark = 0; mark < kMarks; ++mark) {
#pragma unroll 4
    for (int row = 0; row < kMarkEvery; ++row) advance(w, A, mark * kMarkEvery + row, h);
    put_states(&w.room.work.marks[mark][0][w.lane], h);
  }
}

// the state before a row
__device__ __forceinline__ States find_state(const Task &w, int chunk, const States &A, int row) {
  const int mark = row / kMarkEvery;
  States h = mark ? get_states(&w.room.work.marks[mark - 1][0][w.lane]) : load_kept(w, chunk);
#pragma unroll 2
  for (int i = mark * kMarkEvery; i < row; ++i) advance(w, A, i, h);
  return h;
}

// what the way back needs of the way there: decays, and the decayed states
struct Passage {
  States decay[kSteps], decayed[kSteps];
};

__device__ __forceinline__ void put_quad(const Task &w, int step, int n, const float (&v)[kStates]) {
  w.room.work.quads[(step * kQuads + n / 4) * kQuadRow + w.lane + w.lane / kRun] =
      make_float4(v[n], v[n + 1], v[n + 2], v[n + 3]);
}

__device__ __forceinline__ void go_forward(const Task &w, const States &A, int first, States h,
                                           Passage &passage) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = first + i;
    const float4 step = w.room.steps[row * kPairs + w.pair];
    const float2 u = load_u(w, row, w.pair);
    const Row B = row_of_B(w, row);
    const float drive[2] = {step.x * u.x, step.y * u.y}, delta[2] = {step.x, step.y};
    if (dropped(w, row)) h = States{};
    States &decay = passage.decay[i], &decayed = passage.decayed[i];
    float dC[kStates];
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        decay.of[c][n] = exp2_approx(delta[c] * A.of[c][n]);
        decayed.of[c][n] = decay.of[c][n] * h.of[c][n];
        h.of[c][n] = fmaf(drive[c], B.of[n], decayed.of[c][n]);
      }
      dC[n] = fmaf(h.of[0][n], step.z, h.of[1][n] * step.w);
      if (n % 4 == 3) put_quad(w, i, n - 3, dC);
    }
    if (dropped(w, row)) decay = States{};
  }
}

__device__ __forceinline__ void go_back(const Task &w, const States &A, int first, const Passage &passage,
                                        States &carry, States &dA) {
#pragma unroll
  for (int i = kSteps - 1; i >= 0; --i) {
    const int row = first + i;
    const float4 step = w.room.steps[row * kPairs + w.pair];
    const float2 u = load_u(w, row, w.pair);
    const Row B = row_of_B(w, row), C = row_of_C(w, row);
    const float delta[2] = {step.x, step.y}, dy[2] = {step.z, step.w}, drive[2] = {step.x * u.x, step.y * u.y};
    float along_B[2] = {0.0f, 0.0f}, along_A[2] = {0.0f, 0.0f}, dB[kStates];
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      float g[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        g[c] = fmaf(dy[c], C.of[n], carry.of[c][n]);
        along_B[c] = fmaf(g[c], B.of[n], along_B[c]);
        carry.of[c][n] = g[c] * passage.decay[i].of[c][n];
        const float through = g[c] * passage.decayed[i].of[c][n];
        along_A[c] = fmaf(through, A.of[c][n], along_A[c]);
        dA.of[c][n] = fmaf(through, delta[c], dA.of[c][n]);
      }
      dB[n] = fmaf(g[0], drive[0], g[1] * drive[1]);
      if (n % 4 == 3) put_quad(w, i, n - 3, dB);
    }
    w.room.work.along[i * 32 + w.lane] = make_float4(along_B[0], along_B[1], along_A[0], along_A[1]);
  }
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// adds the quads over the pairs of the tile and writes the rows of dB (which = 0) or dC (1)
__device__ __forceinline__ void store_rows(const Task &w, int chunk, int first, int which) {
  const Times times = w.times(opaque(chunk));
  const int lane = opaque(w.lane);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int run = 32 * round + lane, quad = run / kRuns, part = run % kRuns / kSharing;
    const float4 *from = w.room.work.quads + run * (kRun + 1);
    float4 sum = from[0];
#pragma unroll
    for (int i = 1; i < kRun; ++i) sum = add(sum, from[i]);
#pragma unroll
    for (int mask = 1; mask < kSharing; mask *= 2)
      sum = add(sum, make_float4(shuffle_xor(sum.x, mask), shuffle_xor(sum.y, mask), shuffle_xor(sum.z, mask),
                                 shuffle_xor(sum.w, mask)));
    const int row = first + quad / kQuads;
    if (run % kSharing || !times.has(row)) continue;
    const long long time = (static_cast<long long>(w.tile) * w.p.batch + w.batch) * w.length + times.at(row);
    const long long at = ((time * w.p.groups + w.group) * 2 + which) * kStateCount + part * kStates + quad % kQuads * 4;
    *reinterpret_cast<float4 *>(w.q.dBC + at) = sum;
  }
}

// From the sums over the states, kSteps rows of du and ddelta. `sums`: dD of both channels and dbias of both, over the
// rows that this lane finished.
__device__ __forceinline__ void finish(const Task &w, int chunk, int first, float4 &sums) {
  const Times times = w.times(opaque(chunk));
  const int pair = opaque(w.pair), part = opaque(w.part);
  const float2 D = Pairs<float>::load(w.room.D + 2 * pair);
#pragma unroll
  for (int i = 0; i < kSteps; i += kParts) {
    const int step_row = i + part, row = first + step_row;
    if (kParts > kSteps && step_row >= kSteps) break;
    const float4 step = w.room.steps[row * kPairs + pair];
    float4 along = w.room.work.along[step_row * 32 + pair];
#pragma unroll
    for (int k = 1; k < kParts; ++k) along = add(along, w.room.work.along[step_row * 32 + k * kPairs + pair]);
    const float2 u = load_u(w, row, pair);
    float2 ddelta = make_float2(fmaf(along.x, u.x, along.z * kLn2), fmaf(along.y, u.y, along.w * kLn2));
    if (w.p.softplus)
      ddelta = make_float2(ddelta.x * softplus_slope(step.x), ddelta.y * softplus_slope(step.y));
    const float2 du = make_float2(fmaf(along.x, step.x, D.x * step.z), fmaf(along.y, step.y, D.y * step.w));
    if (!times.has(row)) continue;
    sums = make_float4(fmaf(step.z, u.x, sums.x), fmaf(step.w, u.y, sums.y), sums.z + ddelta.x, sums.w + ddelta.y);
    const long long at = w.row(times.at(row)) + 2 * pair;
    store_global(static_cast<Io *>(w.q.du) + at, du, w.there());
    store_global(static_cast<Io *>(w.q.ddelta) + at, ddelta, w.there());
  }
}

__device__ __forceinline__ void load_parameters(const Task &w) {
  for (int c = w.lane; c < kTileChannels; c += 32) {
    w.room.D[c] = w.given().D && c < w.columns ? w.given().D[w.channel + c] : 0.0f;
    w.room.bias[c] = w.given().bias && c < w.columns ? w.given().bias[w.channel + c] : 0.0f;
  }
}

// (b, spans, e), over the lanes that finished rows of the same pair
__device__ __forceinline__ void store_sum(const Task &w, float *to, float2 sum) {
#pragma unroll
  for (int mask = kPairs; mask < 32; mask *= 2)
    sum = make_float2(sum.x + shuffle_xor(sum.x, mask), sum.y + shuffle_xor(sum.y, mask));
  if (!to || w.part) return;
  to += w.sums_row();
  if (w.there() > 0) to[0] = sum.x;
  if (w.there() > 1) to[1] = sum.y;
}

// a chunk as the loops want it
template <bool Whole> __device__ __forceinline__ void load_chunk(const Task &w, int chunk) {
  const Times times = w.times(chunk);
  fetch_chunk<Whole>(w, times);
  commit_copies();
  find_drops(w, times);
  wait_copies<0>();
  sync_warp();
  prepare(w, times);
  widen<Io>(w);
  sync_warp();
  if (Whole && w.gates) {
    store_dz(w, times);
    sync_warp();
  }
}

__device__ __forceinline__ float *carry_row(const Task &w, int span, int which) {
  const long long row = (w.batch * (w.p.spans - 1) + span - 1) * 2 + which;
  return w.q.carry + (row * kStateCount + w.part * kStates) * w.p.channels + w.lane_channel();
}

__device__ __forceinline__ void store_carry(const Task &w, int which, const States &s) {
  float *to = carry_row(w, w.span, which);
  const int there = w.there();
#pragma unroll
  for (int n = 0; n < kStates; ++n)
    store_global(to + n * w.p.channels, make_float2(s.of[0][n], s.of[1][n]), there);
}

// What flows back out of the span if nothing flows in, and what share of what flows in comes out
__device__ __forceinline__ void find_carry(const Task &w) {
  load_parameters(w);
  const States A = load_decays(w, w.given(), w.there());
  States carry{}, share;
#pragma unroll
  for (int n = 0; n < kStates; ++n) share.of[0][n] = share.of[1][n] = 1.0f;
  float elapsed[2] = {0.0f, 0.0f};
  for (int chunk = w.end_chunk() - 1; chunk >= w.first_chunk(); --chunk) {
    load_chunk<false>(w, chunk);
#pragma unroll 2
    for (int row = kChunk - 1; row >= 0; --row) {
      const float4 step = w.room.steps[row * kPairs + w.pair];
      const Row C = row_of_C(w, row);
      const float delta[2] = {step.x, step.y}, dy[2] = {step.z, step.w};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        elapsed[c] += delta[c];
#pragma unroll
        for (int n = 0; n < kStates; ++n)
          carry.of[c][n] = exp2_approx(delta[c] * A.of[c][n]) * fmaf(dy[c], C.of[n], carry.of[c][n]);
      }
      if (dropped(w, row)) {
        carry = share = States{};
        elapsed[0] = elapsed[1] = 0.0f;
      }
    }
    sync_warp();
  }
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int n = 0; n < kStates; ++n) share.of[c][n] *= exp2_approx(elapsed[c] * A.of[c][n]);
  store_carry(w, 0, carry);
  store_carry(w, 1, share);
}

// what flows into the span from those behind it
__device__ __forceinline__ States load_carry(const Task &w) {
  States carry{};
  const int there = w.there();
  for (int span = static_cast<int>(w.p.spans) - 1; span > w.span; --span)
#pragma unroll
    for (int n = 0; n < kStates; ++n) {
      const float2 own = load_global(carry_row(w, span, 0) + n * w.p.channels, there);
      const float2 share = load_global(carry_row(w, span, 1) + n * w.p.channels, there);
      carry.of[0][n] = fmaf(share.x, carry.of[0][n], own.x);
      carry.of[1][n] = fmaf(share.y, carry.of[1][n], own.y);
    }
  return carry;
}

__device__ __forceinline__ void scan_backward(const Task &w) {
  load_parameters(w);
  const States A = load_decays(w, w.given(), w.there());
  States carry = load_carry(w), dA{};
  float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int chunk = w.end_chunk() - 1; chunk >= w.first_chunk(); --chunk) {
    load_chunk<true>(w, chunk);
    put_marks(w, chunk, A);
    for (int first = kChunk - kSteps; first >= 0; first -= kSteps) {
      Passage passage;
      go_forward(w, A, first, find_state(w, chunk, A, first), passage);
      sync_warp();
      store_rows(w, chunk, first, 1);
      sync_warp();
      go_back(w, A, first, passage, carry, dA);
      sync_warp();
      store_rows(w, chunk, first, 0);
      finish(w, chunk, first, sums);
      sync_warp();
    }
  }
  store_states(w, w.q.dA + w.sums_row() * kStateCount, dA);
  if (w.q.dinitial && w.span == 0)
    store_states(w, w.q.dinitial + (w.batch * w.p.channels + w.lane_channel()) * kStateCount, carry);
  store_sum(w, w.q.dD, make_float2(sums.x, sums.y));
  store_sum(w, w.q.dbias, make_float2(sums.z, sums.w));
}

// spans from `first_span` on
template <bool Whole> __device__ __forceinline__ void run(const ScanBackward &p, int first_span) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_channels = static_cast<int>(p.channels / p.groups);
  const int tiles_per_group = (group_channels + kTileChannels - 1) / kTileChannels;
  const int channel_tiles = static_cast<int>(p.groups) * tiles_per_group, rows = static_cast<int>(p.batch);
  // warps of a block stand side by side on the same rows, so that B and C come once from far away
  const int number = static_cast<int>(blockIdx.x) * kBackwardWarps + warp;
  const int channel_tile = number % channel_tiles, direction = number / channel_tiles % kDirections;
  const int batch = number / channel_tiles / kDirections % rows;
  const int span = first_span + number / channel_tiles / kDirections / rows;
  if (span >= static_cast<int>(p.spans)) return;
  const int group = channel_tile / tiles_per_group, tile = channel_tile % tiles_per_group;
  const int first = tile * kTileChannels;
  const Task task{p,
                  p.direction[direction],
                  reinterpret_cast<ChunkRoom *>(shared_memory())[warp],
                  lane,
                  lane % kPairs,
                  lane / kPairs,
                  batch,
                  group,
                  static_cast<int>(p.length),
                  tile,
                  span,
                  kDirections == 2 ? direction == 1 : p.reverse != 0,
                  p.z != nullptr && direction == 0,
                  static_cast<long long>(group) * group_channels + first,
                  smaller(group_channels - first, kTileChannels)};
  if (Whole) scan_backward(task);
  else find_carry(task);
}

}  // namespace vlm

extern "C" {

__constant__ long long vlm_scan_backward_geometry[4] = {vlm::kBackwardThreads, vlm::kBackwardBytes,
                                                        vlm::kTileChannels, vlm::kBackwardWarps};

__global__ void __launch_bounds__(vlm::kBackwardThreads, 8 / vlm::kBackwardWarps)
    vlm_scan_backward_carry(const __grid_constant__ vlm::ScanBackward p) {
  vlm::run<false>(p, 1);
}

__global__ void __launch_bounds__(vlm::kBackwardThreads, 8 / vlm::kBackwardWarps)
    vlm_scan_backward(const __grid_constant__ vlm::ScanBackward p) {
  vlm::run<true>(p, 0);
}
}
