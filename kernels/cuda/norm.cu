// Adding to the residual stream and normalising the sum by its root mean square, forward and backward, in one kernel
// each. A warp has a row. Memory bounds both, so a row is read once and waits in registers for its statistics; only of
// rows too long for that everything is read twice.
#include "columns.cuh"
#include "norm_problem.cuh"

namespace vlm {

constexpr int kPieces = VLM_PIECES;
// four elements of each lane: 16 bytes of the stream, which is most of the traffic
constexpr int kChannels = 4, kPiece = 32 * kChannels;
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kMostRows = 64;
// blocks of the backward pass that shall find registers on a multiprocessor; unasked the compiler goes for more and
// spills some of them
constexpr int kBlocks = kPieces > 5 ? 2 : 4;
using Values = Channels<kChannels>;
using Piece = Columns<kChannels, 32>;

static_assert(kPieces >= 0 && kPieces <= 8, "pieces");

struct Statistics {
  float rms, dot;
};

// of the backward pass: the sums of each warp, or the statistics of each row
constexpr int kSharedBytes =
    kPieces ? kWarps * kPieces * kPiece * int(sizeof(float)) : kMostRows * int(sizeof(Statistics));

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// runs `body(i, first element, this lane's columns)` over the pieces of a row, from `begin` on, `every` apart
template <class Body>
__device__ __forceinline__ void for_pieces(long long width, int lane, const Body &body, int begin = 0, int every = 1) {
  const auto visit = [&](int i) {
    const long long left = width - static_cast<long long>(i) * kPiece;
    body(i, i * kPiece, Piece{lane, left < kPiece ? static_cast<int>(left) : kPiece});
  };
  if constexpr (kPieces > 0) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) visit(i);
  } else {
    for (int i = begin; static_cast<long long>(i) * kPiece < width; i += every) visit(i);
  }
}

__device__ __forceinline__ float inverse_rms(float squares, long long width, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

__device__ __forceinline__ void normalise(const NormForward &p, long long row, int lane) {
  const Io *x = static_cast<const Io *>(p.x) + row * p.x_row;
  Values kept[kPieces + 1];
  const auto load = [&](int first, const Piece &columns) {
    Values v = columns.load(x + first);
    if (p.residual) {
      const Values residual = columns.load(p.residual + row * p.width + first);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) v.of[i] += residual.of[i];
    }
    return v;
  };
  float squares = 0.0f;
  for_pieces(p.width, lane, [&](int i, int first, const Piece &columns) {
    const Values v = load(first, columns);
    if (kPieces) kept[i] = v;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) squares = fmaf(v.of[c], v.of[c], squares);
  });
  const float rms = inverse_rms(sum_over_warp(squares), p.width, p.eps);
  for_pieces(p.width, lane, [&](int i, int first, const Piece &columns) {
    const Values v = kPieces ? kept[i] : load(first, columns);
    // not before: the stream may take the place of the residual, which a long row reads again
    if (p.stream) columns.store(p.stream + row * p.width + first, v);
    const Values weight = columns.load(p.weight + first);
    Values out;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) out.of[c] = v.of[c] * rms * weight.of[c];
    columns.store(static_cast<Io *>(p.out) + row * p.width + first, out);
  });
}

// Of a row with gradient g = dout * weight before the weight, rms r and width n:
//   d stream = r g - stream r^3 / n * sum(g stream) + dstream      d weight += dout * stream * r
struct Row {
  const NormBackward &p;
  long long row;

  __device__ __forceinline__ Values stream(int first, const Piece &columns) const {
    return columns.load(p.stream + row * p.width + first);
  }
  __device__ __forceinline__ Values dout(int first, const Piece &columns) const {
    return columns.load(static_cast<const Io *>(p.dout) + row * p.dout_row + first);
  }

  __device__ __forceinline__ void finish(int first, const Piece &columns, const Statistics &s, const Values &stream,
                                         const Values &dout, Values &sums) const {
    const long long at = row * p.width + first;
    const Values weight = columns.load(p.weight + first);
    Values gradient = p.dstream ? columns.load(p.dstream + at) : Values::all(0.0f);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float normed = stream.of[c] * s.rms;
      sums.of[c] = fmaf(dout.of[c], normed, sums.of[c]);
      gradient.of[c] += s.rms * fmaf(-normed, s.dot, dout.of[c] * weight.of[c]);
    }
    if (p.dx) columns.store(static_cast<Io *>(p.dx) + at, gradient);
    if (p.dresidual) columns.store(p.dresidual + at, gradient);
  }
};

// adds a piece to the sums over its row
__device__ __forceinline__ void accumulate(const Values &stream, const Values &dout, const Values &weight,
                                           float &squares, float &dot) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    squares = fmaf(stream.of[c], stream.of[c], squares);
    dot = fmaf(dout.of[c] * weight.of[c], stream.of[c], dot);
  }
}

__device__ __forceinline__ Statistics statistics(const NormBackward &p, float squares, float dot) {
  const float rms = inverse_rms(sum_over_warp(squares), p.width, p.eps);
  return {rms, sum_over_warp(dot) * rms / static_cast<float>(p.width)};
}

#if VLM_PIECES
// each warp takes every kWarps-th row and sums over them; the warps' sums meet in shared memory
__device__ __forceinline__ void differentiate(const NormBackward &p, long long begin, long long end, int warp,
                                              int lane) {
  Values sums[kPieces] = {};
  for (long long number = begin + warp; number < end; number += kWarps) {
    const Row row{p, number};
    Values stream[kPieces], dout[kPieces];
    float squares = 0.0f, dot = 0.0f;
    for_pieces(p.width, lane, [&](int i, int first, const Piece &columns) {
      stream[i] = row.stream(first, columns);
      dout[i] = row.dout(first, columns);
      accumulate(stream[i], dout[i], columns.load(p.weight + first), squares, dot);
    });
    const Statistics s = statistics(p, squares, dot);
    for_pieces(p.width, lane, [&](int i, int first, const Piece &columns) {
      row.finish(first, columns, s, stream[i], dout[i], sums[i]);
    });
  }
  float *room = reinterpret_cast<float *>(shared_memory());
  constexpr int width = kPieces * kPiece;
  for_pieces(width, lane, [&](int i, int first, const Piece &columns) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) room[warp * width + first + columns.at(c)] = sums[i].of[c];
  });
  __syncthreads();
  for (int i = threadIdx.x; i < p.width; i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) sum += room[other * width + i];
    p.sums[blockIdx.x * p.width + i] = sum;
  }
}
#else
// first the warps share the rows and find their statistics, then they share the pieces and finish all rows of each
__device__ __forceinline__ void differentiate(const NormBackward &p, long long begin, long long end, int warp,
                                              int lane) {
  Statistics *room = reinterpret_cast<Statistics *>(shared_memory());
  for (long long number = begin + warp; number < end; number += kWarps) {
    const Row row{p, number};
    float squares = 0.0f, dot = 0.0f;
    for_pieces(p.width, lane, [&](int, int first, const Piece &columns) {
      accumulate(row.stream(first, columns), row.dout(first, columns), columns.load(p.weight + first), squares, dot);
    });
    const Statistics s = statistics(p, squares, dot);
    if (lane == 0) room[number - begin] = s;
  }
  __syncthreads();
  const auto finish = [&](int, int first, const Piece &columns) {
    Values sums = Values::all(0.0f);
    for (long long number = begin; number < end; ++number) {
      const Row row{p, number};
      row.finish(first, columns, room[number - begin], row.stream(first, columns), row.dout(first, columns), sums);
    }
    columns.store(p.sums + blockIdx.x * p.width + first, sums);
  };
  for_pieces(p.width, lane, finish, warp, kWarps);
}
#endif

}  // namespace vlm

extern "C" {

__constant__ long long vlm_norm_geometry[5] = {vlm::kThreads, vlm::kSharedBytes, vlm::kWarps, vlm::kPiece,
                                               vlm::kMostRows};

__global__ void __launch_bounds__(vlm::kThreads) vlm_norm_forward(const __grid_constant__ vlm::NormForward p) {
  const long long row = static_cast<long long>(blockIdx.x) * vlm::kWarps + threadIdx.x / 32;
  if (row < p.rows) vlm::normalise(p, row, threadIdx.x % 32);
}

__global__ void __launch_bounds__(vlm::kThreads, vlm::kBlocks)
    vlm_norm_backward(const __grid_constant__ vlm::NormBackward p) {
  const long long begin = blockIdx.x * p.block_rows, left = p.rows - begin;
  const long long end = begin + (left < p.block_rows ? left : p.block_rows);
  vlm::differentiate(p, begin, end, threadIdx.x / 32, threadIdx.x % 32);
}
}
