// How the macros of one compilation become tiles, lanes and shared memory.
//
// A warp owns kTileChannels channels of one batch row and direction and walks time in tiles of kRows steps. A lane
// holds kStates states of two channels: `pair` says which channels, `part` which states. The rows of a tile lie in
// shared memory in scan order, so past the loads and the stores nothing depends on the direction.
#pragma once
#include "ptx.cuh"

#ifndef VLM_POLYNOMIAL
#define VLM_POLYNOMIAL 0
#endif

namespace vlm {

using fp32 = float;
using Io = VLM_IO;

constexpr int kStateCount = VLM_STATES, kDirections = VLM_DIRECTIONS, kRank = VLM_RANK, kSplit = VLM_SPLIT;
constexpr int kPolynomial = VLM_POLYNOMIAL;
constexpr bool kAligned = VLM_ALIGNED, kEvents = VLM_EVENTS;

// eight warps to a direction leave 128 registers to a lane, too few for the decays of 2 x 8 states
constexpr int kStates = kSplit == 8 ? 4 : 8;
constexpr int kParts = kStateCount / kStates;
constexpr int kPairs = 32 / kParts;
constexpr int kTileChannels = 2 * kPairs;
// in split time a lane keeps all its decays of a tile in registers
constexpr int kRows = kSplit == 1 ? 16 : 8;
constexpr int kTile = kRows * kSplit;

constexpr int kVector = 16 / int(sizeof(Io));
// a quarter of the banks more than the row: the fragments of a matrix product then come from different banks
constexpr int kRankRow = kRank + kVector;
// of a row of rank rows in 32-bit words, which are what fragments consist of: its length, and its distance to the next.
// A product takes eight words of each row at a time, whatever their type.
constexpr int kRankWords = kRank * int(sizeof(Io)) / 4, kRankStride = kRankRow * int(sizeof(Io)) / 4;
constexpr int kProducts = kRankWords / 8;

static_assert(kStateCount == 8 || kStateCount == 16 || kStateCount == 32 || kStateCount == 64, "states");
static_assert(kDirections == 1 || kDirections == 2, "directions");
static_assert(kRank == 0 || (kRank % 16 == 0 && kAligned), "rank rows are aligned");
static_assert(kSplit == 1 || kSplit == 2 || kSplit == 4 || (kSplit == 8 && (kStateCount == 16 || kStateCount == 32)),
              "split");
static_assert(kTileChannels % 8 == 0 && kRows % kParts == 0, "a tile is whole vectors and whole passes");

template <int Bytes> struct alignas(16) Room {
  char bytes[Bytes];
};
template <> struct Room<0> {};

constexpr int kDeltaElements = kRows * (kRank ? kRankRow : kTileChannels);
constexpr int kBcElements = kRows * 2 * kStateCount;
// fp32 of every row and channel, as elements of the stored type
constexpr int kPartialElements = kRows * kTileChannels * 4 / int(sizeof(Io));
// what of that has room where delta and, if they have been widened elsewhere, B and C lay
constexpr int kSpentElements = kDeltaElements + (sizeof(Io) == 4 ? 0 : kBcElements);

// One tile as it came from global memory. When the steps are prepared delta is spent, and what the other direction
// left takes its place.
struct alignas(16) Raw {
  Io u[kRows * kTileChannels];
  Io spent[kDirections == 2 && kPartialElements > kSpentElements ? kPartialElements : kSpentElements];
  Room<(sizeof(Io) == 4 ? kBcElements * 4 : 0)> unspent;

  __device__ __forceinline__ Io *delta() { return spent; }
  __device__ __forceinline__ Io *partial() { return spent; }
  __device__ __forceinline__ Io *bc() {
    return sizeof(Io) == 4 ? reinterpret_cast<Io *>(&unspent) : spent + kDeltaElements;
  }
};

// what the warps that share a tile tell each other: decay over the sub-tile and state at its end, for two channels
struct Publication {
  float4 decay[2 * kStates / 4][32], end[2 * kStates / 4][32];
};

// the shared memory of one warp
struct alignas(16) WarpRoom {
  Raw raw[2];
  Io z[kRows * kTileChannels];
  // what one step needs of a pair of channels: delta and delta * u of the first, then of the second; once every lane
  // has read them, the sums over the states take the place of the first two
  float4 steps[kRows * kPairs];
  float bias[kTileChannels];
  // B and C as fp32; of stored fp32 they are read where they landed
  Room<(sizeof(Io) == 4 ? 0 : kRows * 2 * kStateCount * 4)> wide;
  Room<kTileChannels * (kRank ? kRankRow : 0) * int(sizeof(Io))> weight;
  Room<(kSplit > 1 ? 2 * int(sizeof(Publication)) : 0)> published;
  Room<(kSplit > 1 ? 2 * kStates * 32 * 4 : 0)> carry;
};

// warps that work on the same channels
constexpr int kGroup = kDirections * kSplit;
constexpr int kWarps = kGroup > 4 ? kGroup : (kGroup <= 2 && sizeof(WarpRoom) > 24 * 1024 ? 2 : 4);
constexpr int kSlots = kWarps / kGroup;
constexpr int kThreads = 32 * kWarps;
constexpr int kSharedBytes = kWarps * int(sizeof(WarpRoom));
// Blocks that shall find registers on a multiprocessor. Where shared memory has room for a fifth block it gets them; it
// costs 1 KiB more than a block asks for.
constexpr int kBlocks = kSplit > 1 ? 1 : 5 * (kSharedBytes + 1024) <= 228 * 1024 ? 5 : 4;

}  // namespace vlm
