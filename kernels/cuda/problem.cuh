// What the host hands to the scan: raw pointers, sizes and strides in elements. One plain struct, passed by value.
// Sizes, row strides and the number of blocks stay below 2^31; offsets into a tensor may be larger.
// Letters: b batch, l length, e channels, g groups, n states, r rank. Channels are contiguous, channel i belongs to
// group i / (e / g). Sequences (u, delta, B, C, z, out, total) and `weight` are of the stored type, the rest is fp32.
//
// One compilation serves one kind of problem, chosen by macros:
//   VLM_IO          fp32, bf16, fp16: the stored type
//   VLM_STATES      8, 16, 32, 64
//   VLM_DIRECTIONS  1, or 2: out = gate * (forward + backward)
//   VLM_RANK        0: `delta` is (b, l, e). 16, 32 or 48: `delta` is (b, l, r) and the kernel multiplies it by
//                   `weight` (e, r), of fp32 with both rounded to tf32. The host pads r with zero columns in both.
//   VLM_ALIGNED     1: all sequences start at addresses, and have strides, that are multiples of 16 bytes, and so does
//                   every group's first channel; `kept` starts at a multiple of 8. 0: nothing is asked; no rank
//   VLM_EVENTS      1: `segments` or `kept` may be given. 0: both are null
//   VLM_SPLIT       1, 2, 4, 8: warps that share the time of one channel tile, for batches too small to fill the GPU
//                   (8 is for 16 or 32 states)
//   VLM_POLYNOMIAL  0 to 16: how many of the 2 x 8 exponentials that a lane needs for a step are polynomials, to relieve
//                   the unit for exponentials; unsplit scans only. Left out: 0
//
// Launch: grid = batch * ceil(groups * ceil(e / g / kTileChannels) / kSlots), block = kThreads, dynamic shared
// memory = kSharedBytes (layout.cuh). The three numbers and kSlots stand in `vlm_scan_forward_geometry` of each
// compiled module as (kThreads, kSharedBytes, kTileChannels, kSlots), so the host computes nothing twice.
#pragma once

namespace vlm {

// a state is kept at the start of every so many steps in scan order, for the backward pass
constexpr int kKeepEvery = 32;

struct ScanDirection {
  const void *u;         // (b, l, e), strided rows
  const void *delta;     // (b, l, e) or (b, l, r), strided rows
  const void *weight;    // (e, r) contiguous, or null
  const float *A;        // (e, n)
  const void *B, *C;     // (b, l, g, n), strided rows and groups
  const float *D, *bias; // (e) or null
  const float *initial;  // (b, e, n) or null
  float *last;           // (b, e, n) or null
  float *kept;           // (b, ceil(l / kKeepEvery), n, e) or null
  long long u_batch, u_row, delta_batch, delta_row, bc_batch, bc_row, bc_group;
};

struct ScanForward {
  long long batch, length, channels, groups;
  long long softplus;    // whether delta passes softplus
  long long reverse;     // of a single direction; of two, the second is reversed
  const int *segments;   // (b, l) or null; the state is dropped where the number changes
  const void *z;         // (b, l, e) gate, strided rows, or null
  long long z_batch, z_row;
  void *out;             // (b, l, e) contiguous
  void *total;           // (b, l, e) contiguous: the sum before the gate. Null if not asked for; but two directions of
                         // a half type need it, for what the first leaves to the second
  ScanDirection direction[2];
};

// The backward pass. The same macros; VLM_EVENTS 1: `segments` may be given, and VLM_SPLIT is 1. Gradients of sequences
// are of the stored type, those of parameters come as fp32 sums still to be added up over their first dimensions.
//
// For batches too small to fill the GPU time is cut into `spans` of whole chunks of kKeepEvery steps. What flows back
// over their borders is then found beforehand, by a launch of vlm_scan_backward_carry.
//
// Launch: grid = ceil(batch * spans * directions * groups * ceil(e / g / kTileChannels) / warps of a block), for the
// carry with spans - 1. The module's `vlm_scan_backward_geometry` is (threads, shared bytes, kTileChannels, warps of a
// block), for both.
struct ScanBackwardDirection {
  // what the forward pass was given, and `kept` as it left it; `initial` and `last` are not read
  ScanDirection given;
  void *du;              // (b, l, e) contiguous
  void *ddelta;          // (b, l, e) contiguous: of delta before bias and softplus, also where it came as rank rows
  float *dA;             // (b, spans, e, n)
  float *dD, *dbias;     // (b, spans, e), or null if not asked for
  float *dinitial;       // (b, e, n), or null if not asked for; not a sum
  float *dBC;            // (ceil(e / g / kTileChannels), b, l, g, 2, n): dB, then dC; at a multiple of 16 bytes
  float *carry;          // (b, spans - 1, 2, n, e), as aligned as `kept`; null of one span
};

struct ScanBackward {
  long long batch, length, channels, groups;
  long long softplus, reverse;  // as in ScanForward
  long long spans;       // at least 1
  const int *segments;   // (b, l) or null
  const void *z;         // (b, l, e) gate, strided rows, or null
  long long z_batch, z_row;
  const void *dout;      // (b, l, e) contiguous: gradient of the gated sum
  const void *total;     // (b, l, e) contiguous, from the forward pass, if there is a gate
  void *dz;              // (b, l, e) contiguous, if there is a gate
  ScanBackwardDirection direction[2];
};

// Adds up what the backward pass left in parts, in the order of the parts.
//
// Launch: grid = the sum of ceil(size / kSumThreads) over the list, kSumThreads threads, no shared memory.
constexpr int kSumThreads = 256, kMostSums = 8;

struct PartialSum {
  const float *parts;    // (count, size)
  void *sum;             // rows of `columns`, `row` elements apart
  long long count, size, columns, row;
  long long stored;      // whether the sum is of the stored type (VLM_IO), else fp32
};

struct PartialSums {
  long long count;
  PartialSum of[kMostSums];
};

}  // namespace vlm
